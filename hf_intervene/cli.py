"""The command `hf-intervene`. Thin: every sub-command calls what Python users call."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.utils import make_image_grid
from PIL import Image, UnidentifiedImageError
from transformers.utils import logging as transformers_logging

from . import demo
from .cards import SAMPLES_FILE, card_path, write_card
from .contexts import OBS, Value, parse_values
from .data import ContextImages, load_contexts
from .metrics import identifiability
from .pipeline import InterventionPipeline
from .pretrained import bundled, bundled_names
from .push import draw_samples, full_name, push_folder
from .training import evaluate as evaluation
from .training import train as training
from .training.simulated import SIMULATED


PIPELINE = "folder or Hub name of a saved pipeline, or `quad`, which comes with the package"


def demonstrate(arguments: argparse.Namespace) -> int:
    """Simulate, train, save, measure, draw; see `demo.py`."""
    default = "outputs/demo-pretrained" if arguments.pretrained else "outputs/demo"
    run = demo.run_pretrained if arguments.pretrained else demo.run
    return run(Path(arguments.output or default))


def load_pipeline(name: str) -> InterventionPipeline:
    """A pipeline from a folder, from the Hub, or one that comes with the package."""
    return InterventionPipeline.from_pretrained(bundled(name) if name in bundled_names() and not Path(name).exists() else name)


def sample(arguments: argparse.Namespace) -> int:
    """Sample images from a saved pipeline into one picture or a folder of them."""
    pipe = load_pipeline(arguments.pipeline)
    generator = torch.Generator().manual_seed(arguments.seed)
    images = pipe(_interventions(arguments, pipe.concepts), arguments.num_images, generator, **_options(arguments)).images
    _save_images(images, Path(arguments.output))
    return 0


def edit(arguments: argparse.Namespace) -> int:
    """Edit an image with a saved pipeline."""
    pipe = load_pipeline(arguments.pipeline)
    interventions = _interventions(arguments, pipe.concepts)
    edited = pipe.edit(_open(arguments.image), interventions, arguments.context, **_options(arguments)).images
    _save_images(edited, Path(arguments.output))
    return 0


def _open(path: str) -> Image.Image:
    try:
        return Image.open(path)
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not an image that can be read.") from error


def _interventions(arguments: argparse.Namespace, concepts: Sequence[str]) -> dict[str, Value]:
    """What `--interventions` and `--reference` say together."""
    if arguments.interventions is None and not arguments.reference:
        raise ValueError("nothing is intervened on: give --interventions or --reference.")
    values = parse_values(arguments.interventions, concepts)
    for reference in arguments.reference:
        name, _, path = reference.partition("=")
        if not path:
            raise ValueError(f"--reference takes CONCEPT=IMAGE, not {reference!r}.")
        if name in values:
            raise ValueError(f"concept {name!r} is named twice in --interventions and --reference.")
        values[name] = _open(path)
    return values


def _options(arguments: argparse.Namespace) -> dict:
    return {name: getattr(arguments, name) for name in ("num_inference_steps", "guidance_scale", "reference_context")}


def _save_images(images: list, path: Path) -> None:
    if path.suffix:
        path.parent.mkdir(parents=True, exist_ok=True)
        make_image_grid(images, 1, len(images)).save(path)
    else:
        path.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(images):
            image.save(path / f"{number:04d}.png")
    print(path)


def concepts(arguments: argparse.Namespace) -> int:
    """Print what a saved pipeline can be intervened on."""
    pipe = load_pipeline(arguments.pipeline)
    print(json.dumps({"concepts": list(pipe.concepts), "contexts": [OBS, *pipe.concepts]}))
    return 0


def card(arguments: argparse.Namespace) -> int:
    """Write the model card and the picture of samples of a saved model, and push all of it when asked."""
    if (arguments.private or arguments.revision) and not arguments.push:
        raise ValueError("--private and --revision need --push.")
    model = evaluation.load_model(arguments.model)
    path = card_path(arguments.model)
    name = full_name(arguments.push) if arguments.push else None
    draw_samples(model, path.with_name(SAMPLES_FILE))
    print(write_card(arguments.model, name, arguments.metrics, arguments.license, arguments.dataset_id))
    if name:
        print(push_folder(arguments.model, name, private=arguments.private, revision=arguments.revision).commit_url)
    return 0


def check(arguments: argparse.Namespace) -> int:
    """Say whether a data set's contexts can identify its concepts. Returns 1 if an assumption fails."""
    if arguments.dataset in SIMULATED:
        images, _ = SIMULATED[arguments.dataset](arguments.resolution, 3).training(arguments.images, 1, 0.1, arguments.seed)
    else:
        data = ContextImages.from_dataset(load_contexts(arguments.dataset), None, arguments.resolution, complete=False)
        images = data.by_context()
    result = identifiability.check(images, max_images=arguments.images, seed=arguments.seed)
    print(json.dumps(result.to_dict(), indent=1) if arguments.json else result)
    return 0 if result.passed else 1


def _add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--reference", metavar="CONCEPT=IMAGE", action="append", default=[], help="a concept at its value in an image; repeatable"
    )
    command.add_argument("--reference-context", help="the context the references came from (default obs)")
    command.add_argument("--num-inference-steps", type=int, default=50, help="of a denoiser (default 50)")
    command.add_argument(
        "--guidance-scale", type=float, default=1.0, help="of a denoiser: away from no interventions (default 1)"
    )


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    # train and evaluate have option parsers of their own; they are handed everything.
    if argv[:1] == ["train"]:
        return training.main(argv[1:])
    if argv[:1] == ["evaluate"]:
        return evaluation.main(argv[1:])
    transformers_logging.disable_progress_bar()
    parser = argparse.ArgumentParser(prog="hf-intervene", description="Interventions on concepts, and their compositions.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("demo", help="simulate, train, measure and draw, in a few minutes and without network")
    command.add_argument("--pretrained", action="store_true", help="heads on a pretrained autoencoder, frozen and with LoRA")
    command.add_argument("--output", help="folder for everything (default outputs/demo or outputs/demo-pretrained)")
    command.set_defaults(run=demonstrate)
    commands.add_parser("train", help="train a head: the options of training/train.py")
    commands.add_parser("evaluate", help="measure a model: the options of training/evaluate.py")
    command = commands.add_parser("sample", help="sample images under interventions")
    command.add_argument("pipeline", help=PIPELINE)
    command.add_argument(
        "--interventions", default="obs", help="quad1, quad1+size, size=0.5 (strength), size@0.9 (quantile), obs (default obs)"
    )
    command.add_argument("--num-images", type=int, default=8)
    command.add_argument("--seed", type=int, default=0)
    _add_options(command)
    command.add_argument("--output", required=True, help="a picture (one row) or a folder (one file an image)")
    command.set_defaults(run=sample)
    command = commands.add_parser("edit", help="edit an image by interventions")
    command.add_argument("pipeline", help=PIPELINE)
    command.add_argument("image", help="the image, of the pipeline's size")
    command.add_argument("--interventions", help="as of sample")
    command.add_argument("--context", default="obs", help="the context the image came from (default obs)")
    _add_options(command)
    command.add_argument("--output", required=True)
    command.set_defaults(run=edit)
    command = commands.add_parser("concepts", help="print what a pipeline can be intervened on, as JSON")
    command.add_argument("pipeline", help=PIPELINE)
    command.set_defaults(run=concepts)
    command = commands.add_parser("check", help="say whether a data set's contexts can identify its concepts, before training")
    command.add_argument(
        "dataset", help="quad, ident3d, mnist (--resolution 28), an image folder, a saved data set or a Hub name"
    )
    command.add_argument("--resolution", type=int, default=32, help="images are cropped and resized to this (default 32)")
    command.add_argument("--images", type=int, default=2000, help="images of a context that are tested, at most (default 2000)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--json", action="store_true", help="everything that was measured, for machines")
    command.set_defaults(run=check)
    command = commands.add_parser("card", help="write a saved model's card (README.md, samples.png), and push it to the Hub")
    command.add_argument("model", help="folder of a saved model or pipeline")
    command.add_argument("--metrics", help="metrics.json of `hf-intervene evaluate`, or its folder, to show")
    command.add_argument("--license", help="of the weights, such as apache-2.0")
    command.add_argument("--dataset-id", help="data set on the Hub that it was trained on")
    command.add_argument("--push", metavar="USER/NAME", help="push the folder to this repository on the Hub")
    command.add_argument("--private", action="store_true", default=None, help="a new repository is private")
    command.add_argument("--revision", help="branch to push to (default: main)")
    command.set_defaults(run=card)

    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except (OSError, ValueError, TypeError, ImportError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
