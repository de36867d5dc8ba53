"""The command `hf-intervene`. Thin: every sub-command calls what Python users call."""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.utils import make_image_grid
from PIL import Image, UnidentifiedImageError
from transformers.utils import logging as transformers_logging

from .cards import SAMPLES_FILE, SETTINGS_FILE, card_path, write_card
from .contexts import OBS
from .data import quad
from .pipeline import InterventionPipeline
from .plots import contexts_grid, edit_strips
from .push import draw_samples, full_name, push_folder
from .training import evaluate as evaluation
from .training import train as training
from .training.checkpoints import check_writable


DEMO = dict(
    resolution=32,
    images_per_context=3000,
    validation_images=100,
    epochs=7,
    beta=2.0,  # weights in nats: a 32x32 image has a quarter of the nats of the 64x64 one the defaults are for
    moment_matching=5.0,
    log_every=100,
    tracker="none",
)
DEMO_IMAGES = 640  # images a side of the demo's distances
_STRIP = 8  # images in a strip of its picture


def demo(arguments: argparse.Namespace) -> int:
    """Simulate quad, train, save a pipeline, measure it, draw it."""
    start = time.perf_counter()
    out = Path(arguments.output)
    check_writable(out)
    if (out / "run").exists():
        raise ValueError(f"{out} already holds a demo: choose another folder with --output, or remove it.")
    settings = training.TrainArguments(output_dir=str(out / "run"), **DEMO)
    print(
        f"Training on quad ({settings.variant}, {settings.resolution}x{settings.resolution}): "
        f"{settings.images_per_context} images in each of {', '.join(quad.TRAIN_CONTEXTS)}.\n"
        "No image ever carries two interventions. This takes about four minutes on two cores."
    )
    result = training.train(settings, on_log=_print_progress if not sys.stderr.isatty() else None)
    if result.interrupted:
        return 130
    model = evaluation.load_model(result.model_dir)
    pipe = InterventionPipeline.from_model(model)
    pipe.save_pretrained(out / "pipeline")
    shutil.copy(result.model_dir / SETTINGS_FILE, out / "pipeline")

    real, other = evaluation.held_out_images("quad", model.concepts, DEMO_IMAGES, 0, settings.resolution, 3, settings.variant)
    metrics = evaluation.evaluate(model, real, other, protocols=("independent",), num_projections=200)
    evaluation.write(metrics, out)

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(_STRIP, *model.noise_shape, generator=generator)
    generated = {name: _to_uint8(pipe(name, noise=noise, output_type="np").images) for name in real}
    contexts_grid(real, generated, unseen=quad.HELD_OUT).savefig(out / "contexts.png", dpi=130, bbox_inches="tight")
    originals = real["obs"][:_STRIP]
    edits = {
        name: _to_uint8(pipe.edit(originals, name, output_type="np").images)
        for name in ("obs", "quad1", "quad2", "quad4", "size", "quad1+size", "quad2+quad4")
    }
    edits = {("reconstruction" if name == "obs" else name): images for name, images in edits.items()}
    edit_strips(originals, edits).savefig(out / "edits.png", dpi=130, bbox_inches="tight")

    print(f"\n{evaluation.table(metrics)}")
    print(
        f"Done in {time.perf_counter() - start:.0f} s. Look at:\n"
        f"  {out / 'contexts.png'}   every context and nine unseen pairs, real above generated\n"
        f"  {out / 'edits.png'}      images edited by one and by two interventions\n"
        f"  {out / 'metrics.md'}     the table above\n"
        "Try next:\n"
        f"  hf-intervene sample {out / 'pipeline'} --interventions quad1+size --num-images 8 --output pair.png\n"
        "  accelerate launch training/train.py --config training/configs/quad.yaml   (64x64, a better model)\n"
        '  README.md, "Your own images"'
    )
    return 0


def _print_progress(row: dict) -> None:
    if "validation" in row:
        print(f"step {row['step']}/{row['total']}: validation {row['validation']:.3f} bits per pixel", flush=True)


def _to_uint8(images):
    return (images * 255).round().astype("uint8")


def sample(arguments: argparse.Namespace) -> int:
    """Sample images from a saved pipeline into one picture or a folder of them."""
    pipe = InterventionPipeline.from_pretrained(arguments.pipeline)
    generator = torch.Generator().manual_seed(arguments.seed)
    images = pipe(arguments.interventions, arguments.num_images, generator).images
    _save_images(images, Path(arguments.output))
    return 0


def edit(arguments: argparse.Namespace) -> int:
    """Edit an image with a saved pipeline."""
    pipe = InterventionPipeline.from_pretrained(arguments.pipeline)
    try:
        image = Image.open(arguments.image)
    except UnidentifiedImageError as error:
        raise ValueError(f"{arguments.image} is not an image that can be read.") from error
    _save_images(pipe.edit(image, arguments.interventions, arguments.context).images, Path(arguments.output))
    return 0


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
    pipe = InterventionPipeline.from_pretrained(arguments.pipeline)
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
    command.add_argument("--output", default="outputs/demo", help="folder for everything (default outputs/demo)")
    command.set_defaults(run=demo)
    commands.add_parser("train", help="train a head: the options of training/train.py")
    commands.add_parser("evaluate", help="measure a model: the options of training/evaluate.py")
    command = commands.add_parser("sample", help="sample images under interventions")
    command.add_argument("pipeline", help="folder of a saved pipeline")
    command.add_argument("--interventions", default="obs", help="quad1, quad1+size, size=0.5, obs (default obs)")
    command.add_argument("--num-images", type=int, default=8)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--output", required=True, help="a picture (one row) or a folder (one file an image)")
    command.set_defaults(run=sample)
    command = commands.add_parser("edit", help="edit an image by interventions")
    command.add_argument("pipeline", help="folder of a saved pipeline")
    command.add_argument("image", help="the image, of the pipeline's size")
    command.add_argument("--interventions", required=True)
    command.add_argument("--context", default="obs", help="the context the image came from (default obs)")
    command.add_argument("--output", required=True)
    command.set_defaults(run=edit)
    command = commands.add_parser("concepts", help="print what a pipeline can be intervened on, as JSON")
    command.add_argument("pipeline", help="folder of a saved pipeline")
    command.set_defaults(run=concepts)
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
