"""The commands `sample` and `edit`. Interventions are checked before torch is imported, which takes
seconds.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from .files import replacing
from .logging import disable_progress_bars
from .pretrained import concepts_of, located


MOVING = (".png", ".gif", ".webp")  # kinds of files that can hold a clip


if TYPE_CHECKING:
    from PIL import Image

    from .contexts import Value
    from .model import InterventionModel


def sample(arguments: argparse.Namespace) -> int:
    """Sample images from a saved pipeline or model: a grid with the observational images of the
    same noise above, or a folder of plain images.
    """
    _make_place(arguments)
    named = _interventions(arguments)
    model = _load(arguments.pipeline)
    _check_clip(arguments, model)
    interventions = _values(named, arguments, model)

    def draw(context: Any, **options: Any) -> Any:
        import torch

        noise = torch.Generator().manual_seed(arguments.seed)
        return model.sample(context, arguments.num_images, noise, output_type="pil", **options)

    images, label = draw(interventions, **_options(arguments)), _label(arguments)
    rows = {}
    if interventions and Path(arguments.output).suffix:
        # The other options are of interventions.
        rows = {"obs": draw("obs", num_inference_steps=arguments.num_inference_steps)}
    _save_images(images, rows | {label: images}, arguments)
    return _print_images(arguments, len(images), _other_command(arguments, "edit"))


def edit(arguments: argparse.Namespace) -> int:
    """Edit an image, or a clip, with a saved pipeline or model: a grid of it before and after, or a
    folder with the edited one.
    """
    from .image_files import open_image

    _make_place(arguments)
    named = _interventions(arguments)
    image = open_image(arguments.image)
    model = _load(arguments.pipeline)
    _check_clip(arguments, model)
    given: Any = _given(image, arguments, model)
    interventions = _values(named, arguments, model)
    options = _options(arguments)
    edited: Any = model.edit([given], interventions, arguments.context, "pil", **options)
    _save_images(edited, {"given": [given], _label(arguments): edited}, arguments)
    return _print_images(arguments, len(edited), _other_command(arguments, "sample"))


def _check_clip(arguments: argparse.Namespace, model: "InterventionModel") -> None:
    """Refuse a file that cannot hold what the model makes, before anything is made."""
    ending = Path(arguments.output).suffix.lower()
    if len(model.base.image_shape) == 4 and ending and ending not in MOVING:
        raise ValueError(
            f"{arguments.output} cannot hold a clip: give --output a name in {', '.join(MOVING)},"
            " or a folder."
        )


def _load(name: str) -> "InterventionModel":
    from . import pipeline

    disable_progress_bars()
    return pipeline.load_for_use(located(name))


def _interventions(arguments: argparse.Namespace) -> "dict[str, Value]":
    """What `--interventions` names, checked against the saved configuration alone.

    Raises:
        ValueError: one sentence: nothing or something unknown is named.
    """
    from .contexts import parse_values

    if arguments.interventions is None and not arguments.reference:
        raise ValueError("nothing is intervened on: give --interventions or --reference.")
    concepts = concepts_of(arguments.pipeline)
    values = parse_values(arguments.interventions, concepts)
    for reference in arguments.reference:
        name, _, path = reference.partition("=")
        if not path:
            raise ValueError(f"--reference takes CONCEPT=IMAGE, not {reference!r}.")
        if name in values:
            raise ValueError(f"concept {name!r} is named twice in --interventions and --reference.")
        parse_values(name, concepts)
    for context in (getattr(arguments, "context", None), arguments.reference_context):
        parse_values(context, concepts)
    return values


def _values(
    named: "dict[str, Value]", arguments: argparse.Namespace, model: "InterventionModel"
) -> "dict[str, Value]":
    """What `--interventions` named, and what `--reference` says."""
    from .image_files import open_image

    references = (reference.partition("=") for reference in arguments.reference)
    return named | {
        name: _fitted(open_image(path), path, arguments, model) for name, _, path in references
    }


def _fitted(
    image: "Image.Image", path: str, arguments: argparse.Namespace, model: "InterventionModel"
) -> "Image.Image":
    """The image of a file, of the size that the model takes.

    Raises:
        ValueError: one sentence: it has another size, and `--resize` was not given.
    """
    from .pipeline import fit_image

    if arguments.resize:
        return fit_image(image, model)
    *_, height, width = model.base.image_shape
    if image.size != (width, height):
        raise ValueError(
            f"{path} is {image.width}x{image.height}, and the model's images are {width}x{height}:"
            " --resize crops and resizes it."
        )
    return image


def _given(
    image: "Image.Image", arguments: argparse.Namespace, model: "InterventionModel"
) -> "Image.Image | list[Image.Image]":
    """What is edited: the image, or the frames of its file, if the model makes clips."""
    from .image_files import open_frames

    if len(model.base.image_shape) == 3:
        return _fitted(image, arguments.image, arguments, model)
    frames = open_frames(arguments.image, model.base.image_shape[1])
    return [_fitted(frame, arguments.image, arguments, model) for frame in frames]


def _options(arguments: argparse.Namespace) -> dict:
    return {
        name: value
        for name in ("num_inference_steps", "guidance_scale", "reference_context")
        if (value := getattr(arguments, name)) is not None
    }


def _label(arguments: argparse.Namespace) -> str:
    words = [arguments.interventions] if arguments.interventions else []
    return "+".join([*words, *arguments.reference])


def _other_command(arguments: argparse.Namespace, command: str) -> str:
    """A command to try next."""
    image = " photo.png --resize" if command == "edit" else ""
    words = f"--interventions {quote(arguments.interventions or 'obs')} --output {command}.png"
    return f"hf-intervene {command} {quote(arguments.pipeline)}{image} {words}"


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
        with TemporaryFile(dir=folder):  # without a name, where the system has such files
            pass
    except OSError as error:
        raise OSError(
            f"the folder {folder} cannot be made or written ({error.strerror}): choose another"
            " --output."
        ) from error
    if path.suffix and path.is_dir():
        raise ValueError(f"{path} is a folder: choose another --output.")


def _files(arguments: argparse.Namespace, count: int) -> list[Path]:
    path = Path(arguments.output)
    return [path] if path.suffix else [path / f"{number:04d}.png" for number in range(count)]


def _save_images(
    images: list[Any],
    rows: dict[str, list[Any]],
    arguments: argparse.Namespace,
) -> None:
    """Write the images or clips as files of a folder, or the rows as one picture.

    Args:
        images: PIL images, or of clips lists of them.
        rows: likewise, by the label before them.
        arguments: of the command.
    """
    from .grids import labelled_grid

    files = _files(arguments, len(images))
    clips = [image if isinstance(image, list) else [image] for image in images]
    if Path(arguments.output).suffix:
        moments = range(len(clips[0]))
        if len(moments) > 1:
            rows_at = [{k: [clip[t] for clip in v] for k, v in rows.items()} for t in moments]
        else:
            rows_at = [rows]
        clips = [[labelled_grid(at) for at in rows_at]]
    for file, (first, *others) in zip(files, clips):
        moving = {"save_all": True, "append_images": others, "duration": 125, "loop": 0}
        _save_whole(first, file, moving if others else {})


def _save_whole(image: "Image.Image", file: Path, options: dict[str, Any]) -> None:
    """Write an image whole or not at all.

    Raises:
        OSError: one sentence: it cannot be written, or the disk is full.
    """
    from PIL import Image

    try:
        with replacing(file) as partial:
            image.save(partial, Image.registered_extensions()[file.suffix.lower()], **options)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{file} cannot be written ({reason}): choose another --output.") from error


def _print_images(arguments: argparse.Namespace, count: int, command: str) -> int:
    files = [str(file) for file in _files(arguments, count)]
    result = {"output": str(Path(arguments.output)), "files": files}
    return show(arguments, result, arguments.output, [command])


def show(
    arguments: argparse.Namespace, result: dict, text: object, commands: Sequence[str] = ()
) -> int:
    """A result: for machines all of it, for people the text; on a terminal what to try next."""
    print(json.dumps(result) if arguments.json else text)
    if commands and not arguments.json and sys.stdout.isatty():
        print("try next:", *commands, sep="\n  ")
    return 0
