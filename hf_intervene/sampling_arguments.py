"""What users give to `sample`, `edit` and their like: checked before anything is computed, each
with an error of one sentence.
"""

import math
from typing import Any

import torch


OUTPUT_TYPES = ("pt", "np", "pil")
COMPOSITIONS = ("head", "scores")  # how several concepts are put together


def check_options(
    generator: Any, rows: int, batch_size: Any, output_type: Any, **numbers: Any
) -> None:
    """Refuse what nothing can be sampled with.

    Args:
        generator: `None`, a `torch.Generator`, or a list of one for each of `rows` samples.
        rows: number of samples.
        batch_size: `None`, or how many are processed at once.
        output_type: one of `OUTPUT_TYPES`.
        **numbers: by name what must be finite numbers.

    Raises:
        TypeError, ValueError: one sentence.
    """
    check_generator(generator, rows)
    check_batch_size(batch_size)
    if output_type not in OUTPUT_TYPES:
        raise ValueError(
            f"output_type must be one of {', '.join(OUTPUT_TYPES)}, not {_short(output_type)}."
        )
    for name, value in numbers.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, not {_short(value)}.")


def check_composition(compose: Any) -> None:
    """Raise a ValueError unless it is one of `COMPOSITIONS`."""
    if compose not in COMPOSITIONS:
        known = ", ".join(COMPOSITIONS)
        raise ValueError(f"compose must be one of {known}, not {_short(compose)}.")


def check_batch_size(batch_size: Any) -> None:
    """Raise a ValueError unless it is a whole number, 1 at least, or `None`."""
    if batch_size is not None and not (isinstance(batch_size, int) and batch_size >= 1):
        raise ValueError(
            f"batch_size must be a whole number, 1 at least, not {_short(batch_size)}."
        )


def check_generator(generator: Any, rows: int) -> None:
    """Raise a TypeError or ValueError unless it is `None`, a `torch.Generator`, or a list of one
    for each of `rows` samples.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return
    if not isinstance(generator, list) or not all(
        isinstance(one, torch.Generator) for one in generator
    ):
        raise TypeError(
            f"generator must be a torch.Generator, or a list of them, not {_short(generator)}: "
            "torch.Generator().manual_seed(0) makes one."
        )
    if len(generator) not in (1, rows):
        raise ValueError(
            f"{len(generator)} generators were given for {rows} samples: give one, or one for each."
        )


def check_noise(
    name: str, noise: Any, shape: tuple[int, ...], rows: int | None = None
) -> torch.Tensor:
    """Noise as float32, on the device where it is.

    Args:
        name: what it is called.
        noise: tensor (n, *shape).
        shape: of one sample.
        rows: n, where it is known.

    Raises:
        TypeError, ValueError: one sentence: no tensor, of another shape or number of rows, not
            finite.
    """
    if not isinstance(noise, torch.Tensor):
        raise TypeError(
            f"{name} must be a tensor, not a {type(noise).__name__}: torch.as_tensor({name}) makes"
            " one of an array."
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
    """Raise a ValueError if images that a model made are not numbers: they would be shown as black."""  # noqa: E501
    if not bool(torch.isfinite(images).all()):
        raise ValueError(
            "the model made images that are not finite numbers: its weights or its scheduler are"
            " not right, or guidance_scale is too large; in half precision, float32 may help."
        )
    return images


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}... ({type(value).__name__})"
