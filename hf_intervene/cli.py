"""The command `hf-intervene`. Thin: every sub-command calls what Python users call, and imports it
only when it runs: help and completion of words come at once."""

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import spoken
from .logging import bars_on_terminals_only, disable_progress_bars
from .options import READING, add_reading_options, seed, whole_number
from .pretrained import located


if TYPE_CHECKING:
    from PIL import Image

    from .contexts import Value
    from .model import InterventionModel


PIPELINE = (
    "folder or Hub name of a saved pipeline or model, or `quad`, which comes with the package"
)
DEMO_DATASETS = ("avatars", "quad")  # those of demo.py, which takes long to import
SHELLS = ("bash", "zsh", "tcsh")
EXAMPLES = {
    None: (
        """
  hf-intervene demo                                      everything once, in a few minutes
  hf-intervene app                                       a page to play with
  hf-intervene sample quad --interventions quad1+size --num-images 8 --output pair.png
  hf-intervene COMMAND --help                            options and examples of a command

HF_INTERVENE_VERBOSITY=info (or debug, warning, error) says more or less of what is done."""
    ),
    "demo": (
        """
  hf-intervene demo
  hf-intervene demo --dataset quad --output outputs/demo-quad
  hf-intervene demo --pretrained --output outputs/two-regimes"""
    ),
    "train": (
        """
  hf-intervene train --config my.yaml --output_dir outputs/mine
  hf-intervene train --dataset my-images --resolution 64 --output_dir outputs/mine
  hf-intervene train --dataset my-images --resolution 64 --output_dir outputs/mine --resume auto"""
    ),
    "evaluate": (
        """
  hf-intervene evaluate --model outputs/quad/model --dataset quad --output outputs/quad/metrics
  hf-intervene evaluate --model outputs/mine/model --dataset my-images --output outputs/mine/metrics --edits"""  # noqa: E501
    ),
    "sample": (
        """
  hf-intervene sample quad --interventions quad1+size --num-images 8 --output pair.png
  hf-intervene sample quad --interventions size=0.5 --seed 3 --output half/
  hf-intervene sample user/name --interventions smile@0.9 --output smiles.png"""
    ),
    "edit": (
        """
  hf-intervene edit quad photo.png --interventions quad1 --output edited.png
  hf-intervene edit outputs/mine/model photo.png --resize --interventions smile --output edited.png
  hf-intervene edit quad photo.png --reference quad1=other.png --output edited.png"""
    ),
    "concepts": (
        """
  hf-intervene concepts quad
  hf-intervene concepts outputs/mine/model --json"""
    ),
    "check": (
        """
  hf-intervene check my-images --resolution 64
  hf-intervene check my-data --image-column picture --context-column group --split test
  hf-intervene check quad --json > report.json"""
    ),
    "support": (
        """
  hf-intervene support black-forest-labs/FLUX.1-schnell
  hf-intervene support path/to/pipeline --size 512 --json"""
    ),
    "card": (
        """
  hf-intervene card outputs/demo/pipeline --metrics outputs/demo
  hf-intervene card outputs/mine/model --license apache-2.0 --push user/name"""
    ),
    "app": (
        """
  hf-intervene app
  hf-intervene app outputs/demo/pipeline --port 8000
  hf-intervene app user/name --export my-space"""
    ),
    "completion": (
        """
  hf-intervene completion bash > ~/.local/share/bash-completion/completions/hf-intervene
  hf-intervene completion zsh > ~/.zfunc/_hf-intervene"""
    ),
}


def demonstrate(arguments: argparse.Namespace) -> int:
    """Train, save, measure, draw; see `demo.py`."""
    from . import demo

    bars_on_terminals_only()
    default = "outputs/demo-pretrained" if arguments.pretrained else "outputs/demo"
    run = demo.run_pretrained if arguments.pretrained else demo.run
    return run(Path(arguments.output or default), arguments.dataset)


def sample(arguments: argparse.Namespace) -> int:
    """Sample images from a saved pipeline or model into one picture or a folder of them."""
    _make_place(arguments)
    model = _load(arguments.pipeline)
    import torch

    interventions, generator = (
        _interventions(arguments, model),
        torch.Generator().manual_seed(arguments.seed),
    )
    images = model.sample(
        interventions, arguments.num_images, generator, output_type="pil", **_options(arguments)
    )
    return _save_images(images, arguments)


def edit(arguments: argparse.Namespace) -> int:
    """Edit an image with a saved pipeline or model."""
    _make_place(arguments)
    model = _load(arguments.pipeline)
    image, interventions = (
        _open_image(arguments.image, arguments, model),
        _interventions(arguments, model),
    )
    return _save_images(
        model.edit(image, interventions, arguments.context, "pil", **_options(arguments)), arguments
    )


def _load(name: str) -> "InterventionModel":
    from . import pipeline

    disable_progress_bars()
    return pipeline.load_for_use(located(name))


def _open_image(
    path: str, arguments: argparse.Namespace, model: "InterventionModel"
) -> "Image.Image":
    from .image_files import open_image
    from .pipeline import fit_image

    image = open_image(path)
    if arguments.resize:
        return fit_image(image, model)
    _, height, width = model.base.image_shape
    if image.size != (width, height):
        raise ValueError(
            f"{path} is {image.width}x{image.height}, and the model's images are {width}x{height}:"
            " --resize crops and resizes it."
        )
    return image


def _interventions(arguments: argparse.Namespace, model: "InterventionModel") -> "dict[str, Value]":
    """What `--interventions` and `--reference` say together."""
    from .contexts import parse_values

    if arguments.interventions is None and not arguments.reference:
        raise ValueError("nothing is intervened on: give --interventions or --reference.")
    values = parse_values(arguments.interventions, model.concepts)
    for reference in arguments.reference:
        name, _, path = reference.partition("=")
        if not path:
            raise ValueError(f"--reference takes CONCEPT=IMAGE, not {reference!r}.")
        if name in values:
            raise ValueError(f"concept {name!r} is named twice in --interventions and --reference.")
        values[name] = _open_image(path, arguments, model)
    return values


def _options(arguments: argparse.Namespace) -> dict:
    return {
        name: getattr(arguments, name)
        for name in ("num_inference_steps", "guidance_scale", "reference_context")
    }


def _make_place(arguments: argparse.Namespace) -> None:
    """Make the folder that images are to be written to, before they are computed.

    Raises:
        OSError, ValueError: one sentence: it cannot be made, or no image of that kind can be
            written.
    """
    from PIL import Image

    path = Path(arguments.output)
    Image.init()
    if path.suffix and Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(
            f"{path} ends in {path.suffix}, and no image of that kind can be written: take .png, or"
            " a name without an ending for a folder."
        )
    folder = path.parent if path.suffix else path
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"the folder {folder} cannot be made ({error.strerror}): choose another --output."
        ) from error


def _save_images(images: Any, arguments: argparse.Namespace) -> int:
    from diffusers.utils import make_image_grid

    path = Path(arguments.output)
    if path.suffix:
        make_image_grid(images, 1, len(images)).save(path)
        files = [path]
    else:
        files = [path / f"{number:04d}.png" for number in range(len(images))]
        for file, image in zip(files, images):
            image.save(file)
    return _print(arguments, {"output": str(path), "files": list(map(str, files))}, path)


def _print(arguments: argparse.Namespace, result: dict, text: object) -> int:
    """A result: for machines all of it, for people the text."""
    print(json.dumps(result) if arguments.json else text)
    return 0


def concepts(arguments: argparse.Namespace) -> int:
    """Print what a saved pipeline or model can be intervened on."""
    names = list(_load(arguments.pipeline).concepts)
    from .contexts import OBS

    return _print(arguments, {"concepts": names, "contexts": [OBS, *names]}, "\n".join(names))


def support(arguments: argparse.Namespace) -> int:
    """Print where a head enters a pipeline of diffusers, how its denoiser is called, and what that
    keeps.
    """
    from dataclasses import asdict

    from .bases.pretrained import load_pipeline
    from .pipeline_support import support as found_support

    disable_progress_bars()
    pipe = load_pipeline(arguments.pipeline, f"the pipeline {arguments.pipeline!r}")
    found = found_support(pipe, arguments.prompt, arguments.size)
    return _print(arguments, asdict(found), found)


def card(arguments: argparse.Namespace) -> int:
    """Write the model card and its pictures of a saved model, and push all of it when asked."""
    from .cards import CARD_FILE, SAMPLES_FILE, card_path, is_generated, write_card
    from .evaluation import load_model
    from .push import draw_floors, draw_samples, full_name, push_folder

    if (arguments.private or arguments.revision) and not arguments.push:
        raise ValueError("--private and --revision need --push.")
    disable_progress_bars()
    model = load_model(arguments.model)
    own = Path(arguments.model, CARD_FILE)
    edited = (
        bool(arguments.push) and own.is_file() and not own.is_symlink() and not is_generated(own)
    )
    path = own if edited else card_path(arguments.model)
    name = full_name(arguments.push) if arguments.push else None
    if not edited:  # or it stays as it is, with its pictures
        draw_samples(model, path.with_name(SAMPLES_FILE))
        draw_floors(arguments.metrics, path.parent)
        write_card(
            arguments.model, name, arguments.metrics, arguments.license, arguments.dataset_id
        )
    result = {"card": str(path)}
    if name:
        commit = push_folder(
            arguments.model, name, private=arguments.private, revision=arguments.revision
        )
        result["commit"] = commit.commit_url
    return _print(arguments, result, "\n".join(result.values()))


def check(arguments: argparse.Namespace) -> int:
    """Say whether a data set's contexts can identify its concepts. Returns 1 if an assumption
    fails.
    """
    from .data import ContextImages, load_contexts
    from .metrics import identifiability
    from .trainer.settings import check_reading
    from .trainer.simulated import SIMULATED

    bars_on_terminals_only()
    reading = {name: getattr(arguments, name) for name in READING}
    if arguments.dataset in SIMULATED:
        check_reading(arguments.dataset, reading)
        images, _ = SIMULATED[arguments.dataset](arguments.resolution, 3).training(
            arguments.images, 1, 0.1, arguments.seed
        )
    else:
        data = ContextImages.from_dataset(
            load_contexts(arguments.dataset, **reading), None, arguments.resolution, complete=False
        )
        images = data.by_context()
    result = identifiability.check(images, max_images=arguments.images, seed=arguments.seed)
    print(json.dumps(result.to_dict(), indent=1) if arguments.json else result)
    return 0 if result.passed else 1


def app(arguments: argparse.Namespace) -> int:
    """Serve the page of a pipeline, or export it."""
    if arguments.export is None:
        from .page_process import launch

        launch(arguments.pipeline, arguments.host, arguments.port, time_limit=arguments.time_limit)
        return 0
    from .space import export

    disable_progress_bars()
    folder = export(arguments.pipeline, arguments.export)
    print(
        f"{folder}   (a Space: push it to the Hub as it is; here: pip install -r requirements.txt"
        " && python app.py)"
    )
    return 0


def completion(arguments: argparse.Namespace) -> int:
    """Print the script that completes commands and options in a shell."""
    import shtab

    print(shtab.complete(make_parser(whole=True), arguments.shell))
    return 0


def _add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--reference",
        metavar="CONCEPT=IMAGE",
        action="append",
        default=[],
        help="a concept at its value in an image; repeatable",
    )
    command.add_argument(
        "--reference-context", help="the context the references came from (default obs)"
    )
    command.add_argument(
        "--num-inference-steps",
        type=whole_number(1, 10**6),
        default=50,
        help="of a denoiser (default 50)",
    )
    command.add_argument(
        "--guidance-scale",
        type=float,
        default=1.0,
        help="of a denoiser: away from no interventions (default 1)",
    )
    command.add_argument(
        "--resize", action="store_true", help="crop and resize the images given to the model's size"
    )


def _path(text: str) -> str:
    if not text.strip():  # it would be the folder one is in
        raise argparse.ArgumentTypeError(
            "an empty text is no name of a file or folder ('.' is the folder you are in)"
        )
    return text


def make_parser(whole: bool = False) -> argparse.ArgumentParser:
    """The parser of all commands.

    Args:
        whole: with the options of `train` and `evaluate` too, which have parsers of their own.
    """
    plain: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    description = "Interventions on concepts, and their compositions."
    parser = argparse.ArgumentParser(
        "hf-intervene", description=description, epilog=f"examples:{EXAMPLES[None]}", **plain
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(
        name: str,
        run: Callable[[argparse.Namespace], int] | None = None,
        help: str = "",
        json: bool = False,
        **options: Any,
    ) -> argparse.ArgumentParser:
        text = f"{help[0].upper()}{help[1:]}."
        command = commands.add_parser(
            name,
            help=help,
            description=text,
            epilog=f"examples:{EXAMPLES[name]}",
            **plain,
            **options,
        )
        command.set_defaults(run=run)
        if json:
            command.add_argument(
                "--json", action="store_true", help="print the result as JSON, for machines"
            )
        return command

    command = add("demo", demonstrate, "train, measure and draw, in minutes and without network")
    command.add_argument(
        "--pretrained",
        action="store_true",
        help="heads on a pretrained autoencoder, frozen and with LoRA",
    )
    command.add_argument(
        "--dataset",
        choices=DEMO_DATASETS,
        default=DEMO_DATASETS[0],
        help="avatars: faces (default); quad: the paper's coloured shapes",
    )
    command.add_argument(
        "--output",
        type=_path,
        help="folder for everything (default outputs/demo or outputs/demo-pretrained)",
    )

    for name, help in (
        ("train", "train a head: the options of training/train.py"),
        ("evaluate", "measure a model"),
    ):
        parents: dict[str, Any] = (
            {"parents": [_recipe_parser(name)], "add_help": False} if whole else {}
        )
        add(name, None, help, **parents)

    command = add("sample", sample, "sample images under interventions", json=True)
    command.add_argument("pipeline", help=PIPELINE)
    command.add_argument(
        "--interventions",
        default="obs",
        help="quad1, quad1+size, size=0.5 (strength), size@0.9 (quantile), obs (default obs)",
    )
    command.add_argument(
        "--num-images", type=whole_number(1, 10**9), default=8, help="how many (default 8)"
    )
    command.add_argument("--seed", type=seed, default=0, help="of the noise (default 0)")
    _add_options(command)
    command.add_argument(
        "--output",
        type=_path,
        required=True,
        help="a picture (one row) or a folder (one file an image)",
    )

    command = add("edit", edit, "edit an image by interventions", json=True)
    command.add_argument("pipeline", help=PIPELINE)
    command.add_argument("image", help="the image, of the model's size unless --resize is given")
    command.add_argument("--interventions", help="as of sample")
    command.add_argument(
        "--context", default="obs", help="the context the image came from (default obs)"
    )
    _add_options(command)
    command.add_argument("--output", type=_path, required=True, help="as of sample")

    command = add("concepts", concepts, "print what a pipeline can be intervened on", json=True)
    command.add_argument("pipeline", help=PIPELINE)

    command = add(
        "check",
        check,
        "say whether a data set's contexts can identify its concepts, before training",
        json=True,
    )
    command.add_argument(
        "dataset",
        help=(
            "quad, ident3d, avatars, mnist (--resolution 28), an image folder, a saved data set "
            "or a Hub name"
        ),
    )
    add_reading_options(command)
    command.add_argument(
        "--resolution",
        type=whole_number(1, 2**14),
        default=32,
        help="images are cropped and resized to this (default 32)",
    )
    command.add_argument(
        "--images",
        type=whole_number(1),
        default=2000,
        help="images of a context that are tested, at most (default 2000)",
    )
    command.add_argument("--seed", type=seed, default=0, help="of the test's split (default 0)")

    command = add(
        "support",
        support,
        "print how a head enters a pipeline of diffusers, and what it keeps",
        json=True,
    )
    command.add_argument("pipeline", help="folder or Hub name of a pipeline of diffusers")
    command.add_argument(
        "--prompt", default="", help="the prompt to record it with (default: the empty one)"
    )
    command.add_argument(
        "--size", type=int, help="side of the images in pixels (default: the pipeline's own)"
    )

    command = add(
        "card",
        card,
        "write a saved model's card and its pictures, and push it to the Hub",
        json=True,
    )
    command.add_argument("model", type=_path, help="folder of a saved model or pipeline")
    command.add_argument(
        "--metrics", help="metrics.json of `hf-intervene evaluate`, or its folder, to show"
    )
    command.add_argument("--license", help="of the weights, such as apache-2.0")
    command.add_argument("--dataset-id", help="data set on the Hub that it was trained on")
    command.add_argument(
        "--push", metavar="USER/NAME", help="push the folder to this repository on the Hub"
    )
    command.add_argument(
        "--private", action="store_true", default=None, help="a new repository is private"
    )
    command.add_argument("--revision", help="branch to push to (default: main)")

    command = add(
        "app", app, "serve a page to play with: sample, edit, compose (needs the extra `app`)"
    )
    command.add_argument("pipeline", nargs="?", default="quad", help=f"{PIPELINE} (default quad)")
    command.add_argument(
        "--host", help="address to listen at (default 127.0.0.1: this machine only)"
    )
    command.add_argument(
        "--port",
        type=whole_number(0, 2**16 - 1),
        help="port to listen at (default: the first free one from 7860 on)",
    )
    command.add_argument(
        "--time-limit", type=float, help="seconds that a request may take (default 300)"
    )
    command.add_argument(
        "--export",
        type=_path,
        metavar="DIR",
        help="write the page as a Hugging Face Space instead of serving it",
    )

    command = add(
        "completion", completion, "print the script that completes commands and options in a shell"
    )
    command.add_argument("shell", choices=SHELLS)
    return parser


def _recipe_parser(name: str) -> argparse.ArgumentParser:
    from .evaluation.command import make_parser as evaluation_parser
    from .trainer.parsing import make_parser as training_parser

    if name == "evaluate":
        return evaluation_parser()
    parser = training_parser()
    parser.add_argument(
        "--config", help="YAML file of settings"
    )  # these two are read before the others
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON, for machines"
    )
    return parser


@spoken
def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    # The source line is for who wrote it.
    warnings.formatwarning = lambda message, category, filename, lineno, line=None: (
        f"warning: {message}\n"
    )
    # train and evaluate have option parsers of their own; they are handed everything.
    if argv[:1] == ["train"]:
        from .trainer import command as training

        return training.main(argv[1:])
    if argv[:1] == ["evaluate"]:
        from .evaluation import command as evaluation

        return evaluation.main(argv[1:])
    arguments = make_parser().parse_args(argv)
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
