"""Make a finished run a pipeline that comes with the package.

    python model_cards/pack.py RUN NAME

RUN is the output folder of `hf-intervene train`, with `metrics/` of `hf-intervene evaluate` in it.
Written are `hf_intervene/pretrained/NAME` (weights in half precision; loading casts them to
float32), its card and pictures, and `model_cards/NAME.md`, a copy of the card. What was there of
that name is replaced.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from safetensors.torch import load_file, save_file

from hf_intervene import InterventionModel, InterventionPipeline
from hf_intervene.cards import (
    CARD_FILE,
    FLOORS_FILE,
    MARKER,
    SAMPLES_FILE,
    write_card,
)
from hf_intervene.errors import spoken
from hf_intervene.origins import forget_paths
from hf_intervene.push import PARTS, draw_floors, draw_samples
from hf_intervene.yaml_files import SETTINGS_FILE


HERE = Path(__file__).resolve().parent
PRETRAINED = HERE.parent / "hf_intervene" / "pretrained"
MOST_BYTES = 12_000_000  # of a folder


def pack(run: Path, name: str) -> Path:
    """Write the pipeline of a run and its card; returns its folder.

    Raises:
        OSError, ValueError: one sentence: no finished run, or the pipeline is too large.
    """
    settings = run / "model" / SETTINGS_FILE
    if not settings.is_file():
        raise ValueError(f"{run} is no finished run: it has no {settings.relative_to(run)}.")
    metrics = run / "metrics"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, name)
        model = InterventionModel.from_pretrained(run / "model").eval()
        InterventionPipeline.from_model(model).save_pretrained(folder)
        forget_paths(folder, PARTS, shared=True)
        for file in folder.rglob("*.py"):  # the head's code, which the package has
            file.unlink()
        for file in folder.rglob("*.safetensors"):
            halves = {key: tensor.half() for key, tensor in load_file(file).items()}
            save_file(halves, file, metadata={"format": "pt"})
        shutil.copy(settings, folder)
        draw_samples(InterventionPipeline.from_pretrained(folder).model, folder / SAMPLES_FILE)
        draw_floors(metrics if metrics.is_dir() else None, folder)
        for file in folder.glob("*.png"):
            _reduce(file)
        _write_card(folder, metrics if metrics.is_dir() else None)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        if size > MOST_BYTES:
            raise ValueError(
                f"the pipeline has {size / 1e6:.1f} MB, and at most {MOST_BYTES / 1e6:.0f} MB may"
                " come with the package: train a smaller model."
            )
        shutil.rmtree(PRETRAINED / name, ignore_errors=True)
        shutil.copytree(folder, PRETRAINED / name)
    shutil.copy(PRETRAINED / name / CARD_FILE, HERE / f"{name}.md")
    return PRETRAINED / name


def _reduce(file: Path) -> None:
    """To 256 colours: a quarter of the size, and the eye sees no difference."""
    picture = Image.open(file).convert("RGB")
    kind = Image.Quantize.MAXCOVERAGE
    picture.quantize(256, kind, kmeans=2, dither=Image.Dither.NONE).save(file, optimize=True)


def _write_card(folder: Path, metrics: Path | None) -> None:
    """The card, loading the pipeline from the package, without the marker: it is not written
    again by `hf-intervene card`.
    """
    card = write_card(folder, metrics=metrics, license="apache-2.0", bundled=True)
    text = card.read_text(encoding="utf-8").replace(f"{MARKER}\n\n", "")
    card.write_text(text, encoding="utf-8")
    if metrics and not (folder / FLOORS_FILE).exists():
        raise ValueError(f"{metrics} has no distances to draw.")


@spoken
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="output folder of a finished training")
    parser.add_argument("name", help="what `bundled` and the commands call it")
    arguments = parser.parse_args(argv)
    print(pack(arguments.run, arguments.name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
