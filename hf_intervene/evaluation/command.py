"""The command that measures a model: `hf-intervene evaluate`, and `training/evaluate.py`.

Writes `metrics.json`, `metrics.md` and `floors.png`. Started as several processes (`accelerate
launch`, `torchrun`), these share out the contexts; the result is the same."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..card_metrics import head_mark, read_metrics
from ..cards import FLOORS_FILE
from ..data import quad
from ..data.identity import load_images
from ..errors import spoken
from ..logging import bars_on_terminals_only
from ..metrics.disentanglement import MIN_SAMPLES
from ..metrics.transport import PROTOCOLS
from ..model import InterventionModel
from ..options import add_reading_options, seed, whole_number
from ..plots import floor_chart, save
from ..pretrained import located
from ..trainer.checkpoints import check_writable, write_whole
from ..trainer.distributed import process_state
from ..trainer.parsing import RecipeParser
from ..trainer.simulated import SIMULATED
from ..trainer.stopping import stops_at_once
from ..yaml_files import read_settings
from .codes import CODE_IMAGES, code_scores
from .content import factor_effects
from .held_out import held_out_images, load_model, reading_of, trained_with, training_split
from .measuring import evaluate
from .setup import DETECTOR_IMAGES, content_options
from .tables import table


# Settings in which runs of one recipe differ.
_OF_A_RUN = ("seed", "data_seed", "output_dir", "base", "resume", "tracker", "image_cache")


def versions() -> dict[str, str]:
    """Of the libraries that figures depend on."""
    return {name: version(name) for name in ("torch", "transformers", "diffusers", "POT")}


def write(metrics: dict, folder: str | Path) -> None:
    """Write `metrics.json`, `metrics.md` and, of distances and their floors, `floors.png`, each
    whole or not at all.
    """
    for name, text in (
        ("metrics.json", json.dumps(metrics, indent=1)),
        ("metrics.md", table(metrics)),
    ):
        write_whole(Path(folder, name), text)
    save(floor_chart(metrics), Path(folder, FLOORS_FILE))


def check_own(folder: str | Path) -> None:
    """Refuse a folder where `write` would replace what was not written by it.

    Raises:
        ValueError: one sentence.
    """
    names = ("metrics.json", "metrics.md", FLOORS_FILE)
    there = [path for name in names if os.path.lexists(path := Path(folder, name))]
    if not there:
        return
    try:
        read_metrics(folder)
    except ValueError as error:
        raise ValueError(
            f"{there[0]} was not written by hf-intervene evaluate, and would be replaced: choose"
            " another --output, or move it away."
        ) from error


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    examples = """examples:
  python training/evaluate.py --model outputs/quad/model --output outputs/quad/metrics
  hf-intervene evaluate --model outputs/mine/model --dataset my-images --output outputs/mine/metrics --edits
  hf-intervene evaluate --model outputs/quad/model --output outputs/quad/metrics --json | jq .means"""  # noqa: E501
    options: dict[str, Any] = {
        "epilog": examples,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }
    parser = RecipeParser(
        description="Evaluate a trained model on held-out real images of every context.", **options
    )
    parser.add_argument(
        "--model", required=True, help="folder of a trained model or pipeline, or a name"
    )
    parser.add_argument(
        "--output", required=True, help="folder for metrics.json, metrics.md and floors.png"
    )
    parser.add_argument(
        "--dataset",
        help=(
            "quad, mnist, ident3d, avatars, an image folder, a saved data set or a Hub name"
            " (default: the one of the training)"
        ),
    )
    add_reading_options(parser, "as in training")
    parser.add_argument(
        "--variant", choices=quad.VARIANTS, help="quad and ident3d (default: as in training)"
    )
    parser.add_argument(
        "--mnist-digits",
        help="mnist: bundled, a folder, or a Hub name (default: as in training)",
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="own data: use all images, where training did not see them; so with another split",
    )
    parser.add_argument(
        "--images",
        type=whole_number(1),
        default=1280,
        help="images a side, of each context (default 1280)",
    )
    parser.add_argument("--projections", type=whole_number(1), default=500)
    parser.add_argument(
        "--num-inference-steps",
        type=whole_number(1, 10**6),
        default=50,
        help="of a denoiser (default 50)",
    )
    parser.add_argument(
        "--compose",
        default="head",
        choices=["head", "scores"],
        help="of a denoiser: how several concepts are put together, see InterventionModel.sample"
        " (default head)",
    )
    parser.add_argument(
        "--guidance-scale", type=float, help="of samples of a denoiser (default: the model's own)"
    )
    parser.add_argument("--protocol", default="independent", choices=[*PROTOCOLS, "both"])
    parser.add_argument(
        "--singles",
        action="store_true",
        help="obs and single concepts only, so that a choice of settings sees no combination",
    )
    parser.add_argument(
        "--edits", action="store_true", help="measure edits of observational images too"
    )
    parser.add_argument(
        "--detector-images",
        type=whole_number(0),
        default=DETECTOR_IMAGES,
        help=(
            "training images of each context, at most, for the detector of concepts "
            f"(default {DETECTOR_IMAGES}); 0: no presence"
        ),
    )
    parser.add_argument(
        "--no-tests",
        action="store_true",
        help="train no networks to tell real from generated images",
    )
    parser.add_argument(
        "--twins",
        type=whole_number(0),
        help="twins for the error of edits (default 256 where the data have twins); 0: none",
    )
    parser.add_argument(
        "--seed", type=seed, default=0, help="of held-out images, detector, noise and directions"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the metrics as JSON, for machines"
    )
    return parser


def as_trained(arguments: argparse.Namespace) -> argparse.Namespace:
    """The arguments, with the folder of a pipeline that comes with the package for its name, and
    with the data of the training where none are given.

    Raises:
        ValueError: the data of the training are a folder that is not here.
    """
    arguments.model = str(located(arguments.model))
    trained = trained_with(arguments.model)
    for name in ("variant", "mnist_digits"):
        if getattr(arguments, name) is None:
            setattr(arguments, name, trained[name])
    if arguments.dataset is None:
        name = str(trained["dataset"])
        if not (name in SIMULATED or "/" in name or Path(name).exists()):
            raise ValueError(
                f"the model was trained on {name!r}, and there is no such folder here: give"
                " --dataset."
            )
        arguments.dataset = name
    return arguments


def recipe_of(folder: str) -> dict:
    """The settings of the run that a model is of, without its seeds and its places: what runs of
    one table must have in common. Empty if they are not beside the model.
    """
    saved = read_settings(folder)
    return {name: value for name, value in saved.items() if name not in _OF_A_RUN}


def _has_codes_of_quad(arguments: argparse.Namespace, model: InterventionModel) -> bool:
    """Whether there are concepts whose true values are known, and enough images for their scores.
    A denoiser takes long to encode; its codes are measured together with its edits.
    """
    return (
        arguments.dataset == "quad"
        and model.head is not None
        and model.concepts == quad.CONCEPTS
        and arguments.images >= 2 * MIN_SAMPLES
        and (model.base.passes == 1 or arguments.edits)
    )


@spoken
@stops_at_once()
def main(argv: Sequence[str] | None = None) -> int:
    """Measure as the words of a command line say, `None` for those of this process; returns the
    exit status.
    """
    arguments = as_trained(make_parser().parse_args(sys.argv[1:] if argv is None else argv))
    process = process_state()
    bars_on_terminals_only()
    check_writable(arguments.output)
    if process.is_main_process:
        check_own(arguments.output)
    model = load_model(arguments.model).to(process.device)
    if len(model.base.image_shape) != 3:
        raise ValueError(
            "the model makes clips, and images are measured: look at samples, or train a head on"
            " single frames."
        )
    channels, height, _ = model.base.image_shape
    reading, other_split = reading_of(arguments)
    split = None if arguments.all or other_split else training_split(arguments.model)
    data = (height, channels, arguments.variant)
    real, other_real = held_out_images(
        arguments.dataset,
        model.concepts,
        arguments.images,
        arguments.seed,
        *data,
        split,
        arguments.mnist_digits,
        load_images(Path(arguments.model)),
        reading,
        arguments.singles,
    )
    content = content_options(
        arguments.dataset,
        model.concepts,
        *data,
        arguments.mnist_digits,
        split,
        other_real,
        arguments.seed,
        arguments.detector_images,
        arguments.twins,
        reading,
    ) | {"tests": not arguments.no_tests}
    protocols = PROTOCOLS if arguments.protocol == "both" else (arguments.protocol,)
    options = content | {
        "edits": arguments.edits,
        "num_inference_steps": arguments.num_inference_steps,
        "compose": arguments.compose,
        "guidance_scale": arguments.guidance_scale,
    }
    metrics = evaluate(
        model, real, other_real, protocols, arguments.projections, arguments.seed, **options
    )
    if not process.is_main_process:
        return 0
    if arguments.edits and arguments.dataset == "quad":
        options = {
            "images": min(256, arguments.images),
            "num_inference_steps": arguments.num_inference_steps,
        }
        metrics["factor_effects"] = factor_effects(
            model, arguments.variant, height, arguments.seed, **options
        )
    if _has_codes_of_quad(arguments, model):
        metrics["codes"] = code_scores(
            model, arguments.variant, min(CODE_IMAGES, arguments.images), arguments.seed, 20, ("c",)
        )
    metrics["settings"] = vars(arguments)
    metrics["head"] = head_mark(arguments.model)
    metrics["recipe"] = recipe_of(arguments.model)
    metrics["versions"] = versions()
    # Before writing: what a full disk cannot take is at least on the screen.
    print(json.dumps(metrics) if arguments.json else table(metrics))
    write(metrics, arguments.output)
    return 0
