"""Refuse weights that do not fit their configuration, before a model larger than they are is built.

This file travels with a checkpoint.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from .hub import MAX_SIZE


_Model = TypeVar("_Model", bound=nn.Module)
_LAYERS = 64  # a model may register at most so many parameters and modules for each weight


def check_fit(build: Callable[[], nn.Module], files: Sequence[Path], what: str) -> nn.Module:
    """Refuse a configuration that cannot be built, or whose model is larger than its weights.

    The model is built without memory for its weights.

    Args:
        build: makes the model. It runs on the meta device, and is stopped when it makes many more
            layers than there are weights.
        files: files of the weights. Only their headers are read.
        what: how a message names the model.

    Returns:
        The model on the meta device.

    Raises:
        OSError: the weights are truncated or corrupt.
        ValueError: the model cannot be built, or is larger than its weights.
    """
    there: dict[str, list[int]] = {}
    try:
        for file in files:
            with safe_open(file, "pt") as opened:
                there |= {name: opened.get_slice(name).get_shape() for name in opened.keys()}
    except (SafetensorError, OSError) as error:
        raise OSError(
            f"{what} cannot be read: its weights are truncated or corrupt; fetch it again."
        ) from error
    sizes = sum(math.prod(shape) for shape in there.values())
    try:
        with torch.device("meta"), _at_most(_LAYERS * (len(there) + _LAYERS)):
            model = build()
    except Exception as error:  # constructors raise many types of errors for unexpected values
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise ValueError(f"the configuration of {what} cannot be used: {reason}.") from error
    wanted = sum(value.numel() for value in model.state_dict().values())
    if wanted > 2 * sizes + MAX_SIZE:
        raise ValueError(
            f"the weights of {what} do not fit its configuration: it asks for {wanted:,} numbers,"
            f" and there are {sizes:,}."
        )
    return model


@contextmanager
def _at_most(limit: int) -> Iterator[None]:
    """Raise a ValueError if the body registers more than `limit` parameters and modules."""
    count = 0

    def hook(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > limit:
            raise ValueError(f"it makes more than {limit} layers, far more than there are weights")

    handles = [
        register(hook)
        for register in (
            register_module_parameter_registration_hook,
            register_module_buffer_registration_hook,
            register_module_module_registration_hook,
        )
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_loaded(load: Callable[[], tuple[_Model, dict[str, Any]]], what: str) -> _Model:
    """Load a model, and refuse weights that do not fit its configuration exactly.

    Args:
        load: runs `from_pretrained(..., output_loading_info=True)`.
        what: how a message names the model.

    Raises:
        OSError: the weights are truncated or corrupt.
        ValueError: weights are missing, left over, or have another shape.
    """
    try:
        model, info = load()
    except (SafetensorError, OSError, JSONDecodeError) as error:
        # diffusers reports an unreadable file and a missing file with one class of OSError.
        if isinstance(error, OSError) and "Unable to load weights" not in str(error):
            raise
        raise OSError(
            f"{what} cannot be read: its weights are truncated or corrupt; fetch it again."
        ) from error
    except RuntimeError as error:
        if "size mismatch" not in str(error) and "mismatched" not in str(error):
            raise
        raise ValueError(
            f"the weights of {what} do not fit its configuration: sizes differ ({_first(error)})."
        ) from error
    wrong = {
        key: sorted(map(str, info[key]))
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info.get(key)
    }
    if wrong:
        listing = "; ".join(
            f"{key.replace('_', ' ')}: {', '.join(names[:3])}" for key, names in wrong.items()
        )
        raise ValueError(f"the weights of {what} do not fit its configuration ({listing}).")
    return model


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if "mismatch" in line]
    return lines[0] if lines else str(error)


__all__ = ["check_fit", "check_loaded"]
