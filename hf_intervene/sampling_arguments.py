"""Checks of the arguments of `sample`, `edit` and similar methods, before anything is computed.

Every error is one sentence.
"""

import os
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar, cast
from warnings import warn

import numpy as np
import torch
from diffusers.video_processor import VideoProcessor
from PIL import Image

from .contexts import shown
from .image_files import flat_image, open_frames, open_image


_Method = TypeVar("_Method", bound=Callable[..., Any])
ImageInput = (
    Image.Image | str | os.PathLike | np.ndarray | torch.Tensor | Sequence[Image.Image | str]
)
OUTPUT_TYPES = ("pt", "np", "pil")
COMPOSITIONS = ("head", "scores")  # how several concepts are composed


def is_complex(values: np.ndarray | torch.Tensor) -> bool:
    """Return whether an array or tensor holds complex numbers."""
    return values.is_complex() if isinstance(values, torch.Tensor) else np.iscomplexobj(values)


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
        if not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
            raise ValueError(f"{name} must be a finite number, not {shown(value)}.")


def check_composition(compose: Any) -> None:
    """Raise a ValueError if `compose` is not one of `COMPOSITIONS`."""
    if compose not in COMPOSITIONS:
        known = ", ".join(COMPOSITIONS)
        raise ValueError(f"compose must be one of {known}, not {shown(compose)}.")


def check_batch_size(batch_size: Any) -> None:
    """Raise a ValueError if `batch_size` is neither a whole number of at least 1 nor `None`."""
    if batch_size is not None and not (type(batch_size) is int and 1 <= batch_size <= sys.maxsize):
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
        wanted = f"(num_images, {', '.join(map(str, shape))})"
        raise ValueError(f"{name} must have shape {wanted}, not {tuple(noise.shape)}.")
    if rows is not None and len(noise) != rows:
        raise ValueError(
            f"{name} has {len(noise)} rows for {rows} samples: give one row per sample."
        )
    if noise.is_meta or noise.is_complex():
        raise ValueError(f"{name} must hold real numbers, not be {noise.dtype} on {noise.device}.")
    noise = noise.detach().float()
    if not bool(torch.isfinite(noise).all()):
        raise ValueError(f"{name} must be finite numbers, and some are NaN or infinite.")
    return noise


def check_pixels(
    images: Any, image_shape: tuple[int, ...], processor: VideoProcessor, device: torch.device
) -> torch.Tensor:
    """Images of any form as a float tensor (N, C, H, W) in [0, 1], clips as (N, C, T, H, W).

    Args:
        images: an `ImageInput`.
        image_shape: (C, H, W) that they must have, or (C, T, H, W).
        processor: that brings them to a tensor, and resizes nothing.
        device: of the tensor.

    Raises:
        OSError, TypeError, ValueError: one sentence.
    """
    if isinstance(images, (str, os.PathLike)):
        images = [images]
    if isinstance(images, np.ndarray) and images.dtype == np.uint8:
        images = images.astype(np.float32) / 255
    channels, is_clip = image_shape[0], len(image_shape) == 4
    if isinstance(images, Image.Image):
        images = [images]
    if not isinstance(images, (np.ndarray, torch.Tensor, list, tuple)):
        raise TypeError(
            "images must be PIL images, names of files, an array or a tensor, not a"
            f" {type(images).__name__}."
        )
    if isinstance(images, (np.ndarray, torch.Tensor)):
        if not images.ndim:
            raise ValueError("images must have three or four dimensions, and this array has none.")
        if is_complex(images):
            raise ValueError("images must hold real numbers, not complex ones.")
    if not len(images):
        raise ValueError("there are no images: give one at least.")
    images = _flat(images, channels, image_shape[1] if is_clip else None)
    try:
        if is_clip and isinstance(images, torch.Tensor):
            # diffusers has the frames in front of the channels.
            images = (images if images.ndim == 5 else images[None]).transpose(1, 2)
        bring = processor.preprocess_video if is_clip else processor.preprocess
        pixel_values = bring(images).to(device, torch.float32)
    except (ValueError, TypeError, RuntimeError, IndexError, AttributeError) as error:
        raise ValueError(
            "clips must be lists of PIL images, a uint8 array (N, T, H, W, C) or a float tensor (N,"
            " C, T, H, W) in [0, 1], all of one size."
            if is_clip
            else "images must be PIL images, a uint8 array (N, H, W, C) or a float tensor (N, C, H,"
            " W) in [0, 1], all of one size."
        ) from error
    if tuple(pixel_values.shape[1:]) != tuple(image_shape):
        expected, found = ("x".join(map(str, s)) for s in (image_shape, pixel_values.shape[1:]))
        kind, axes = ("clips", "frames, height") if is_clip else ("images", "height")
        raise ValueError(
            f"{kind} of {expected} (channels, {axes}, width) were expected, not {found}: resize"
            " them first."
        )
    if not bool(((pixel_values >= 0) & (pixel_values <= 1)).all()):  # NaN fails the comparison
        raise ValueError("pixel values must lie in [0, 1]; some do not, or are NaN.")
    return pixel_values


def _flat(images: Any, channels: int, frames: int | None) -> Any:
    """PIL images and files, and lists of them, as PIL images with so many channels; all else as it
    is. `frames`: of the clip that a file is read as."""
    if isinstance(images, (list, tuple)):
        return [_flat(image, channels, frames) for image in images]
    if isinstance(images, (str, os.PathLike)):
        if frames is None:
            images = open_image(images)
        else:
            return _flat(open_frames(images, frames), channels, None)
    return flat_image(images, channels) if isinstance(images, Image.Image) else images


def renamed(**names: str) -> Callable[[_Method], _Method]:
    """Decorate a method whose arguments had other names before: those still work, with a
    FutureWarning.

    Args:
        **names: the name of today, by the former one.
    """

    def decorate(method: _Method) -> _Method:
        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            for before, now in names.items():
                if before in kwargs and now not in kwargs:
                    warn(f"{before} is called {now} now.", FutureWarning, stacklevel=2)
                    kwargs[now] = kwargs.pop(before)
            return method(*args, **kwargs)

        return cast(_Method, call)

    return decorate


def check_images(images: torch.Tensor) -> torch.Tensor:
    """Raise a ValueError if images of a model hold NaN or infinity, which would look black."""
    if not bool(torch.isfinite(images).all()):
        raise ValueError(
            "the model made images that are not finite numbers: its weights or its scheduler are"
            " wrong, or guidance_scale is too large; in half precision, float32 may help."
        )
    return images
