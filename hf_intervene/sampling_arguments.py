"""Checks of the arguments of `sample`, `edit` and similar methods, before anything is computed.

Every error is one sentence.
"""

import math
from typing import Any

import torch

from .contexts import shown


OUTPUT_TYPES = ("pt", "np", "pil")
COMPOSITIONS = ("head", "scores")  # how several concepts are composed


def check_options(
    generator: Any, rows: int, batch_size: Any, output_type: Any, **numbers: Any
) -> None:
    """Check the arguments that sampling methods share.

    Args:
        generator: `None`, a `torch.Generator`, or a list with one for each of `rows` samples.
        rows: number of samples.
        batch_size: `None`, or how many samples are processed at once.
        output_type: one of `OUTPUT_TYPES`.
        **numbers: further arguments, which must be finite numbers.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value; the message names it.
    """
    check_generator(generator, rows)
    check_batch_size(batch_size)
    if output_type not in OUTPUT_TYPES:
        raise ValueError(
            f"output_type must be one of {', '.join(OUTPUT_TYPES)}, not {shown(output_type)}."
        )
    for name, value in numbers.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, not {shown(value)}.")


def check_composition(compose: Any) -> None:
    """Raise a ValueError if `compose` is not one of `COMPOSITIONS`."""
    if compose not in COMPOSITIONS:
        known = ", ".join(COMPOSITIONS)
        raise ValueError(f"compose must be one of {known}, not {shown(compose)}.")


def check_batch_size(batch_size: Any) -> None:
    """Raise a ValueError if `batch_size` is neither a whole number of at least 1 nor `None`."""
    if batch_size is not None and not (isinstance(batch_size, int) and batch_size >= 1):
        raise ValueError(f"batch_size must be a whole number, 1 at least, not {shown(batch_size)}.")


def check_generator(generator: Any, rows: int) -> None:
    """Check that `generator` is `None`, a `torch.Generator`, or a list with one for each sample.

    Raises:
        TypeError: it is something else.
        ValueError: the list has neither one entry nor `rows` entries.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return
    if not isinstance(generator, list) or not all(
        isinstance(one, torch.Generator) for one in generator
    ):
        raise TypeError(
            f"generator must be a torch.Generator, or a list of them, not {shown(generator)}: "
            "torch.Generator().manual_seed(0) makes one."
        )
    if len(generator) not in (1, rows):
        raise ValueError(
            f"{len(generator)} generators were given for {rows} samples: give one, or one for each."
        )


def check_noise(
    name: str, noise: Any, shape: tuple[int, ...], rows: int | None = None
) -> torch.Tensor:
    """Return noise as float32, on its own device.

    Args:
        name: name of the argument, for messages.
        noise: tensor (n, *shape).
        shape: shape of the noise of one sample.
        rows: n, if it is known.

    Raises:
        TypeError: the noise is not a tensor.
        ValueError: the noise has another shape or number of rows, or is not finite.
    """
    if not isinstance(noise, torch.Tensor):
        raise TypeError(
            f"{name} must be a tensor, not a {type(noise).__name__}: torch.as_tensor({name}) makes"
            " one from an array."
        )
    if tuple(noise.shape[1:]) != tuple(shape) or not noise.ndim:
        wanted = f"(num_samples, {', '.join(map(str, shape))})"
        raise ValueError(f"{name} must have shape {wanted}, not {tuple(noise.shape)}.")
    if rows is not None and len(noise) != rows:
        raise ValueError(
            f"{name} has {len(noise)} rows for {rows} samples: give one row per sample."
        )
    noise = noise.detach().float()
    if not bool(torch.isfinite(noise).all()):
        raise ValueError(f"{name} must be finite numbers, and some are NaN or infinite.")
    return noise


def check_images(images: torch.Tensor) -> torch.Tensor:
    """Raise a ValueError if images of a model hold NaN or infinity, which would look black."""
    if not bool(torch.isfinite(images).all()):
        raise ValueError(
            "the model made images that are not finite numbers: its weights or its scheduler are"
            " wrong, or guidance_scale is too large; in half precision, float32 may help."
        )
    return images
