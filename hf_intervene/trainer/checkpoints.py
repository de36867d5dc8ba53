"""Training checkpoints: written whole or not at all, pruned, safetensors and JSON only.

checkpoints/step-000123/model.safetensors, ema.safetensors, optimizer.safetensors, state.json
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..files import replacing
from ..hub import read_json
from ..logging import get_logger
from .run_folder import keep_foreign, named_folder, remove


logger = get_logger(__name__)
STATE_FILE = "state.json"
# a checkpoint may hold, each a file of tensors
FILES = (
    "model",
    "terms",
    "ema",
    "optimizer",
    "moments",  # of versions before 0.2
    "images",
)


@contextmanager
def atomic_folder(path: str | os.PathLike, own: Sequence[str] = ("*",)) -> Iterator[Path]:
    """Write a folder whole or not at all: the body fills a temporary sibling, which then takes the
    place of `path`.

    Args:
        path: the folder.
        own: patterns of names of what is written in it; what else there was, of the user's, is
            kept.

    Raises:
        OSError: one sentence: the folder cannot be written or the disk is full. What was there
            before is still there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.writing")
    previous = path.with_name(f".{path.name}.previous")
    try:
        if previous.exists() and not path.exists():  # a crash between the two renames below
            previous.rename(path)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        keep_foreign(path, temporary, own)
        for file in temporary.rglob("*"):
            if not file.is_symlink():
                _sync(file)
        _sync(temporary)
        if os.path.lexists(path):
            remove(previous)
            path.rename(previous)
        temporary.rename(path)
        _sync(path.parent)
        with suppress(OSError):
            remove(previous)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(
            f"cannot write {path}: {_reason(error)}; earlier checkpoints are untouched."
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk: a machine that loses power keeps it."""
    # not every file system can do it for folders
    with suppress(OSError) if path.is_dir() else nullcontext():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all.

    Raises:
        OSError: one sentence: it cannot be written or the disk is full. What was there before is
            still there.
    """
    try:
        with replacing(path) as temporary:
            temporary.write_text(text)
            _sync(temporary)
    except OSError as error:
        raise OSError(f"cannot write {path}: {_reason(error)}.") from error


def remove_whole(path: Path) -> None:
    """Remove a folder so that what is left of it, if that is interrupted, is not taken for it; as
    far as it can be removed.
    """
    removing = path.with_name(f".{path.name}.removing")
    shutil.rmtree(removing, ignore_errors=True)
    with suppress(OSError):
        path.rename(removing)
        shutil.rmtree(removing)


def keep_history(path: Path, step: int) -> None:
    """Remove from a history, a JSON object a line, the rows after a step: those that a resumed run
    writes again, and a torn last line.
    """
    if not path.exists():
        return
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        with suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                rows.append(line + "\n")
    write_whole(path, "".join(rows))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def check_writable(folder: str | os.PathLike) -> None:
    """Make the folder and try to write in it, before hours are spent on what could not be saved.

    Raises:
        OSError, ValueError: one sentence: it cannot be written, or has no name.
    """
    try:
        named_folder(folder).mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=Path(folder)):  # without a name, where the system has such files
            pass
    except OSError as error:
        raise OSError(
            f"the output folder {folder} cannot be written ({_reason(error)}): choose another"
            " folder."
        ) from error


def check_empty(folder: str | os.PathLike) -> None:
    """`check_writable`, of a folder that must not hold anything yet.

    Raises:
        OSError, ValueError: one sentence: it cannot be written, or is not empty.
    """
    check_writable(folder)
    if any(Path(folder).iterdir()):
        raise ValueError(
            f"{folder} already holds something: choose another folder with --output, or remove it."
        )


def save_checkpoint(
    folder: str | os.PathLike,
    step: int,
    tensors: dict[str, dict[str, torch.Tensor]],
    state: dict,
    keep: int,
) -> Path:
    """Save a checkpoint, then remove all but the newest `keep`.

    Args:
        folder: the run's folder of checkpoints.
        step: optimiser steps done.
        tensors: for each file name (without ending) its tensors by name.
        state: JSON-able state.
        keep: checkpoints to keep.
    """
    path = Path(folder, f"step-{step:08d}")
    with atomic_folder(path) as temporary:
        for name, values in tensors.items():
            save_file(
                {key: value.detach().cpu().contiguous() for key, value in values.items()},
                temporary / f"{name}.safetensors",
            )
        (temporary / STATE_FILE).write_text(
            json.dumps({"step": step, "files": sorted(tensors), **state}, indent=1)
        )
    for old in checkpoints(folder)[:-keep]:
        remove_whole(old)
    return path


def checkpoints(folder: str | os.PathLike) -> list[Path]:
    """The complete checkpoints of a run, oldest first: by their steps, whatever the clock said when
    they were written.
    """
    found = [
        path
        for path in Path(folder).glob("step-*")
        if path.name[5:].isdecimal() and (path / STATE_FILE).exists()
    ]
    return sorted(found, key=lambda path: int(path.name[5:]))


def load_checkpoint(path: str | os.PathLike) -> tuple[dict[str, dict[str, torch.Tensor]], dict]:
    """Tensors and state as given to `save_checkpoint`.

    Raises:
        OSError: one sentence: no checkpoint, or it is truncated or corrupt.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no checkpoint {path}.")
    if "step-" not in path.name and not (path / STATE_FILE).exists():  # nothing to remove
        inside = checkpoints(path / "checkpoints") or [
            Path("outputs/mine/checkpoints/step-00000100")
        ]
        raise OSError(
            f"{path} is no checkpoint: give auto, or the folder of one, such as {inside[-1]}."
        )
    try:
        state = read_json(path / STATE_FILE)
        names = state["files"]
        if type(state["step"]) is not int or state["step"] < 0 or not set(names) <= set(FILES):
            raise ValueError("no checkpoint of this trainer")
        tensors = {name: load_file(path / f"{name}.safetensors") for name in names}
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        raise broken(path) from error
    return tensors, state


def broken(path: Path) -> OSError:
    """The error of a checkpoint that cannot be used."""
    return OSError(
        f"checkpoint {path} is incomplete or corrupt: remove it, or resume from another one."
    )


def newest_checkpoint(
    folder: str | os.PathLike,
) -> tuple[Path, dict[str, dict[str, torch.Tensor]], dict] | None:
    """The newest checkpoint that can be read, passing over broken ones; `None` if there is none."""
    for path in reversed(checkpoints(folder)):
        try:
            return path, *load_checkpoint(path)
        except OSError as error:
            logger.warning("%s", error)
    return None


def flatten_optimizer(
    state: Mapping[Any, dict[str, torch.Tensor]],
    parameters: list[torch.nn.Parameter],
) -> dict[str, torch.Tensor]:
    """The tensors of an optimiser's state, by `number of the parameter.entry`, whatever groups the
    parameters are in.
    """
    return {
        f"{i}.{key}": value
        for i, p in enumerate(parameters)
        for key, value in state.get(p, {}).items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: list[torch.nn.Parameter],
    tensors: dict[str, torch.Tensor],
    placed: Callable[[torch.Tensor, torch.nn.Parameter], torch.Tensor],
) -> None:
    """Inverse of `flatten_optimizer`; `placed` brings a tensor to where the state of a parameter
    is.
    """
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        parameter = parameters[int(index)]
        # it would fail in the middle of a step, or not at all
        if value.ndim and value.shape != parameter.shape:
            raise RuntimeError(
                f"the optimiser's {key} of parameter {index} has the shape {tuple(value.shape)}"
            )
        optimizer.state[parameter][key] = placed(value, parameter)
