"""Training checkpoints: written whole or not at all, pruned, safetensors and JSON only.

checkpoints/step-000123/model.safetensors, ema.safetensors, optimizer.safetensors, state.json
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


STATE_FILE = "state.json"


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Write a folder whole or not at all: the body fills a temporary sibling, which then takes the place of `path`.

    Raises:
        OSError: one sentence: the folder cannot be written or the disk is full. What was there before is still there.
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
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        if path.exists():
            shutil.rmtree(previous, ignore_errors=True)
            path.rename(previous)
        temporary.rename(path)
        shutil.rmtree(previous, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"cannot write {path}: {_reason(error)}; earlier checkpoints are untouched.") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text)
    temporary.replace(path)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def check_writable(folder: str | os.PathLike) -> None:
    """Make the folder and try to write in it, before hours are spent on what could not be saved.

    Raises:
        OSError: one sentence: it cannot be written.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        probe = Path(folder, ".writable")
        probe.write_text("")
        probe.unlink(missing_ok=True)  # another process of this run may have been here first
    except OSError as error:
        raise OSError(f"the output folder {folder} cannot be written ({_reason(error)}): choose another output_dir.") from error


def check_empty(folder: str | os.PathLike) -> None:
    """`check_writable`, of a folder that must not hold anything yet.

    Raises:
        OSError, ValueError: one sentence: it cannot be written, or is not empty.
    """
    check_writable(folder)
    if any(Path(folder).iterdir()):
        raise ValueError(f"{folder} already holds something: choose another folder with --output, or remove it.")


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
                {key: value.detach().cpu().contiguous() for key, value in values.items()}, temporary / f"{name}.safetensors"
            )
        (temporary / STATE_FILE).write_text(json.dumps({"step": step, "files": sorted(tensors), **state}, indent=1))
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def checkpoints(folder: str | os.PathLike) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in Path(folder).glob("step-*") if (path / STATE_FILE).exists())


def load_checkpoint(path: str | os.PathLike) -> tuple[dict[str, dict[str, torch.Tensor]], dict]:
    """Tensors and state as given to `save_checkpoint`.

    Raises:
        OSError: one sentence: no checkpoint, truncated or corrupt, or older than what can be resumed.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no checkpoint {path}.")
    try:
        state = json.loads((path / STATE_FILE).read_text())
        names = state.get("files")
        tensors = {name: load_file(path / f"{name}.safetensors") for name in names or ()}
    except (OSError, ValueError, AttributeError, TypeError, SafetensorError) as error:
        raise OSError(f"checkpoint {path} is incomplete or corrupt: remove it, or resume from another one.") from error
    if names is None:
        raise OSError(f"checkpoint {path} is of a version before 0.1, which cannot be resumed: start the run anew elsewhere.")
    return tensors, state


def newest_checkpoint(folder: str | os.PathLike) -> tuple[Path, dict[str, dict[str, torch.Tensor]], dict] | None:
    """The newest checkpoint that can be read, passing over broken ones; `None` if there is none."""
    for path in reversed(checkpoints(folder)):
        try:
            return path, *load_checkpoint(path)
        except OSError as error:
            print(f"warning: {error}", file=sys.stderr)
    return None


def flatten_optimizer(
    state: Mapping[torch.nn.Parameter, dict[str, torch.Tensor]], parameters: list[torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """The tensors of an Adam optimiser's state, by `number of the parameter.entry`, whatever groups the parameters are in."""
    return {f"{i}.{key}": value for i, p in enumerate(parameters) for key, value in state.get(p, {}).items()}


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: list[torch.nn.Parameter],
    tensors: dict[str, torch.Tensor],
    placed: Callable[[torch.Tensor, torch.nn.Parameter], torch.Tensor],
) -> None:
    """Inverse of `flatten_optimizer`; `placed` brings a tensor to where the state of a parameter is."""
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        parameter = parameters[int(index)]
        optimizer.state[parameter][key] = placed(value, parameter)
