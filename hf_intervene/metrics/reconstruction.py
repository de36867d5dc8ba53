"""Reconstruction: the negative ELBO in bits per pixel (METHOD section 5)."""

import math
from typing import TypeVar

import numpy as np
import torch


Array = TypeVar("Array", float, np.ndarray, torch.Tensor)


def bits_per_pixel(nats: Array, height: int, width: int) -> Array:
    """Convert a negative ELBO in nats to bits per pixel: nats / (H W ln 2).

    Args:
        nats: summed over channels and pixels; a float, or an array of any shape.
        height, width: H and W.
    """
    return nats / (height * width * math.log(2))


def entropy_bits(images: np.ndarray) -> float:
    """Return the mean of -x log2 x - (1 - x) log2 (1 - x), x = b / 255, in bits per pixel.

    No Bernoulli cross-entropy of the images is lower, whatever the model: it is that of the images
    as their own means.

    Args:
        images: uint8, (n, H, W, C).
    """
    x = np.arange(256) / 255
    with np.errstate(divide="ignore", invalid="ignore"):
        bits = np.nan_to_num(-x * np.log2(x) - (1 - x) * np.log2(1 - x))
    return float(bits[images].sum(-1).mean())


def mean_interval(
    values: np.ndarray, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Return the mean of values (n,) and its percentile bootstrap interval.

    Raises:
        ValueError: there are no values.
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        raise ValueError("there are no values to take the mean of.")
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(resamples, len(values)))].mean(1)
    tail = 50 * (1 - level)
    return float(values.mean()), (
        float(np.percentile(means, tail)),
        float(np.percentile(means, 100 - tail)),
    )
