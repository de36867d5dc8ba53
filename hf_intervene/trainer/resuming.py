"""What a run goes on from: which checkpoint, with which settings, and on which images."""

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from ..data import ContextImages
from ..data.identity import changes
from ..hub import read_json
from ..logging import get_logger
from ..model import InterventionModel
from ..options import READING
from .checkpoints import (
    STATE_FILE,
    checkpoints,
    load_checkpoint,
    newest_checkpoint,
)
from .earlier import earlier_defaults, of_today
from .parsing import RUNNING
from .sections import DataSettings
from .settings import TrainArguments
from .simulated import SIMULATED


logger = get_logger(__name__)
# Settings that may change where a run goes on from a checkpoint that was named, as after a loss
# that was not finite.
STEERING = {"learning_rate", "base_learning_rate", "max_grad_norm", "mixed_precision"}
STALE = "earlier-"  # before the name of a checkpoint of a line that was left


def as_resumed(arguments: TrainArguments, out: Path) -> TrainArguments:
    """The settings of a run, with what its checkpoint decided and they leave open: the precision
    that `auto` was, the way data were split before there was a setting for it. Only the state is
    read, of the checkpoint that is going to be resumed."""
    a = arguments
    paths = {"none": [], "auto": reversed(checkpoints(out / "checkpoints"))}.get(
        a.run.resume, [Path(a.run.resume)]
    )
    for path in paths:
        try:
            state = read_json(path / STATE_FILE)
            saved = (
                earlier_defaults(state.get("settings_version", 0), str(path)) | state["settings"]
            )
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue  # it is broken, which is said when it is loaded
        if saved.get("split_by") == "position" and a.data.split_by == DataSettings.split_by:
            a = TrainArguments(**a.flat() | {"split_by": "position"})
        precision = state.get("precision")
        auto = a.run.mixed_precision == "auto" == saved.get("mixed_precision")
        if auto and precision not in (None, a.run.precision):
            logger.warning(
                "going on in the precision %s, in which %s was trained; here auto would be %s.",
                precision,
                path,
                a.run.precision,
            )
            a = TrainArguments(**a.flat() | {"mixed_precision": precision})
        break
    return a


def resumed(arguments: TrainArguments, out: Path) -> tuple[Path, dict, dict] | None:
    """The checkpoint that a run goes on from: its path, tensors and state; `None` for a run that
    begins.

    Raises:
        OSError: one sentence: there is none, or none that can be read.
    """
    if arguments.run.resume == "none":
        return None
    if arguments.run.resume == "auto":
        found = newest_checkpoint(out / "checkpoints")
        if found is None and checkpoints(out / "checkpoints"):
            raise OSError(
                f"no checkpoint in {out / 'checkpoints'} can be read: remove them, or choose"
                " another output_dir."
            )
        return found
    return Path(arguments.run.resume), *load_checkpoint(arguments.run.resume)


def check_same(
    arguments: TrainArguments,
    state: Mapping,
    images: Mapping[str, torch.Tensor] | None,
    data: Mapping,
    path: Path,
) -> None:
    """Refuse to go on with other settings or other images.

    Args:
        arguments: the settings.
        state: of the checkpoint.
        images: fingerprints of the images it was trained and validated on; `None`: it has none.
        data: those of now, empty for data that are drawn by a seed.
        path: of the checkpoint.

    Raises:
        ValueError: one sentence.
    """
    now, saved = arguments.flat(), state["settings"]
    before = TrainArguments().flat() | of_today(saved, state.get("settings_version", 0), str(path))
    free = RUNNING | {"initial_posterior_std"}  # how a run started matters no more
    if arguments.run.resume != "auto":  # named on purpose: another way from there
        free = free | STEERING
    if before["mixed_precision"] == "auto" and now["mixed_precision"] == state.get("precision"):
        free = free | {"mixed_precision"}
    same_data: set[str] = set()
    if images and data:  # known by the images, wherever they are
        same_data = {"dataset", "image_cache", *READING}
    changed = [name for name in now if name not in free | same_data and now[name] != before[name]]
    if changed:  # said first: another split has other images
        listing = ", ".join(
            f"{name} was {before[name]!r}, is {now[name]!r}" for name in changed[:3]
        )
        raise ValueError(
            f"{path} belongs to a run with other settings ({listing}): use the same ones, or"
            " another output_dir."
        )
    different = changes(images, data) if images and data else None
    if different:
        raise ValueError(
            f"{path} was trained on other images:"
            f" {different.replace('train/', '').replace('validation/', '')}; go on with the"
            " data as they were, or begin anew in another output_dir."
        )


def beside(model: InterventionModel, *parts: ContextImages) -> dict[str, Any]:
    """What else of a run comes from files that may change meanwhile, as JSON has it: hashes of the
    frozen models beside a denoiser and of the images' prompts, and settings of the scheduler.

    Args:
        model: of the run.
        *parts: training and validation images.
    """
    references = model.config.companion_references or {}
    found: dict[str, Any] = {name: known["sha256"] for name, known in references.items()}
    scheduler = model.base.companions().get("scheduler")
    if scheduler is not None:
        values = json.loads(scheduler.to_json_string())
        found |= {
            f"scheduler {name}": value for name, value in values.items() if not name.startswith("_")
        }
    if getattr(model.base, "prompts", None) is not None:
        told = [
            (mark, part.prompts[number])
            for part in parts
            if part.prompts is not None and part.prompt_ids is not None
            for mark, number in zip(part.fingerprints().tolist(), part.prompt_ids.tolist())
        ]
        found["prompts"] = sha256(json.dumps(sorted(told)).encode()).hexdigest()
    return found


def check_beside(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Refuse to go on with other models, prompts or schedules beside the base.

    Args:
        before, now: of `beside`. What either lacks is not compared: versions have other settings.
        path: of the checkpoint.

    Raises:
        ValueError: one sentence.
    """
    changed = [name for name in before.keys() & now.keys() if before[name] != now[name]]
    if changed:
        listing = ", ".join(f"the {name}" for name in sorted(changed)[:3])
        raise ValueError(
            f"{path} was trained with something else beside the base ({listing}): go on with the"
            " files as they were, or begin anew in another output_dir."
        )


def leave_line(out: Path, path: Path, step: int) -> None:
    """Put aside the checkpoints of a folder that come after the one a run goes on from: they are of
    another line, and `--resume auto` would take the last of them."""
    for other in checkpoints(out / "checkpoints"):
        if int(other.name.removeprefix("step-")) > step and other.resolve() != path.resolve():
            aside = other.with_name(f"{STALE}{other.name}")
            if not aside.exists():
                other.rename(aside)
                logger.warning(
                    "%s is of the line that was left: it is kept as %s.", other, aside.name
                )


def image_marks(
    arguments: TrainArguments, train: ContextImages, validation: ContextImages
) -> dict[str, torch.Tensor]:
    """Fingerprints of the images of a run, by part and context; empty for data that are drawn by a
    seed.
    """
    if arguments.data.dataset in SIMULATED:
        return {}
    parts = {"train": train, "validation": validation}
    return {
        f"{part}/{name}": marks
        for part, data in parts.items()
        for name, marks in data.fingerprints_by_context().items()
    }


def trained_on(marks: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of `image_marks`, those of the training images, by context."""
    return {
        name.removeprefix("train/"): values
        for name, values in marks.items()
        if name.startswith("train/")
    }
