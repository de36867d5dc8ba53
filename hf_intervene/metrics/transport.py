"""Sliced 2-Wasserstein distance between sets of images, with its floor and an interval.

See METHOD section 5. The distance is POT's `ot.sliced_wasserstein_distance` on flattened pixels in
[0, 1]: the root of the mean over directions of the squared one-dimensional W2. Two sets of real
images do not have distance 0 either. Their distance is the *floor*. A distance means little without
its floor.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from .results import Result


PROTOCOLS = ("independent", "paper")
MIN_IMAGES = 200  # in each set, for a ratio: with fewer, the floor hides differences of models
# The published figures compare 64 generated images, each 20 times, with 1,280 real ones.
PAPER_DISTINCT, PAPER_REPEATS = 64, 20

_CHUNK = 2**22  # pixels projected at once


@dataclass
class TransportResult(Result):
    """A distance with its floor and interval.

    Args:
        distance: sliced W2 between real and generated images.
        interval: 95 % interval of the distance.
        floor: sliced W2 between two disjoint sets of real images of the same sizes, with the same
            protocol.
        ratio: distance / floor. `None` with fewer than 200 distinct images in a set: then the floor
            is so high that the ratio is near 1 for any images.
        ratio_interval: 95 % interval of the ratio for a known floor, or `None`.
        mean_shift: the part of the distance that comes from the mean images. Exactly, distance^2 =
            mean_shift^2 + the squared distance after subtracting the mean image of each set.
        mean_shift_floor: the same part of the floor.
    """

    distance: float
    interval: tuple[float, float]
    floor: float
    ratio: float | None
    ratio_interval: tuple[float, float] | None
    mean_shift: float
    mean_shift_floor: float


@lru_cache(maxsize=1)  # drawing directions takes as long as a projection
def directions(dimension: int, num_projections: int, seed: int = 0) -> np.ndarray:
    """Draw random unit directions, float32 (dimension, num_projections), as POT does.

    Raises:
        ImportError: POT is not installed; the message names the extra.
    """
    try:
        from ot.sliced import get_random_projections
    except ImportError as error:
        raise ImportError(
            'measuring distances needs POT: pip install "hf-intervene[eval]".'
        ) from error
    return get_random_projections(dimension, num_projections, seed).astype(np.float32)


def project(
    images: np.ndarray, axes: np.ndarray, device: torch.device | str | None = None
) -> np.ndarray:
    """Project flattened images on directions, some hundred images at a time to save memory.

    Args:
        images: uint8 in [0, 255] or float in [0, 1], (n, ...).
        axes: (dimension, projections).
        device: the device to use; `None` means the GPU if there is one.

    Returns:
        float32 (n, projections).

    Raises:
        ValueError: float pixels are outside [0, 1] or NaN.
    """
    images = np.asarray(images)
    device = _gpu_or_cpu() if device is None else device
    onto = torch.from_numpy(axes).to(device)
    projected = np.empty((len(images), axes.shape[1]), np.float32)
    size = max(64, _CHUNK // max(1, len(axes)))
    for start in range(0, len(images), size):
        # torch needs an array that can be written to.
        part = np.require(images[start : start + size], requirements=("C", "W"))
        chunk = torch.from_numpy(part).to(device)
        if chunk.dtype == torch.uint8:
            chunk = chunk.float().div_(255)
        elif not all(0 <= extreme <= 1 for extreme in chunk.aminmax()):  # NaN fails both
            raise ValueError(
                "pixel values must lie in [0, 1] (or be uint8); some do not, or are NaN."
            )
        projected[start : start + size] = (chunk.flatten(1).float() @ onto).cpu().numpy()
    return projected


def sliced_w2(a: np.ndarray, b: np.ndarray) -> float:
    """Return the sliced W2 of projected samples (n, projections) and (m, projections).

    With n = m the quantile functions are the sorted values. Otherwise both are step functions,
    which are compared between all steps of both.
    """
    return _sliced_w2_of_sorted(_sort(a), _sort(b))


def _sort(x: np.ndarray) -> np.ndarray:
    """Sort each column. Without a GPU NumPy does it in a tenth of torch's time."""
    if _gpu_or_cpu() == "cpu":
        return np.sort(x, axis=0)
    return torch.from_numpy(x).cuda().sort(dim=0).values.cpu().numpy()


def _gpu_or_cpu() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _sliced_w2_of_sorted(a: np.ndarray, b: np.ndarray) -> float:
    if len(a) == len(b):
        squares = np.square(a - b).mean(0, dtype=np.float64)
    else:
        edges = np.union1d(np.arange(1, len(a) + 1) / len(a), np.arange(1, len(b) + 1) / len(b))
        weights = np.diff(edges, prepend=0.0)
        middle = edges - weights / 2
        rows = [np.minimum((middle * len(x)).astype(int), len(x) - 1) for x in (a, b)]
        squares = weights @ np.square(a[rows[0]] - b[rows[1]])
    return float(np.sqrt(squares.mean()))


def _mean_shift(a: np.ndarray, b: np.ndarray) -> float:
    return float(
        np.sqrt(np.square(a.mean(0, dtype=np.float64) - b.mean(0, dtype=np.float64)).mean())
    )


def sliced_wasserstein(
    real: np.ndarray, generated: np.ndarray, num_projections: int = 500, seed: int = 0
) -> float:
    """Return the sliced W2 between images (n, ...) and (m, ...), POT's value for the same seed."""
    real, generated = _checked(real, generated)
    axes = directions(int(np.prod(real.shape[1:])), num_projections, seed)
    return sliced_w2(project(real, axes), project(generated, axes))


def _checked(*sets: np.ndarray) -> list[np.ndarray]:
    """Return sets of images as arrays (n, ...), which must have one shape and at least one image.

    Raises:
        ValueError: they do not.
    """
    arrays = [np.asarray(images) for images in sets]
    if len({array.shape[1:] for array in arrays}) > 1 or not all(
        array.ndim > 1 and array.size for array in arrays
    ):
        raise ValueError(
            "sets of at least one image (n, ...), all of one shape, are needed, not"
            f" {' and '.join(str(array.shape) for array in arrays)}."
        )
    return arrays


def compare(
    real: np.ndarray,
    other_real: np.ndarray,
    generated: np.ndarray,
    protocol: str = "independent",
    num_projections: int = 500,
    resamples: int = 50,
    seed: int = 0,
) -> TransportResult:
    """Measure the distance of generated images from real ones, with floor, ratio and interval.

    Args:
        real: real images of a context, uint8 or float in [0, 1], (n, ...).
        other_real: other real images of that context, none of them in `real`, (m, ...). There must
            be at least as many as generated images are used.
        generated: generated images, (m, ...).
        protocol: see `compare_projected`.
        num_projections: number of random directions.
        resamples: number of random halves for the interval.
        seed: seed of directions and halves.

    Raises:
        ValueError, ImportError: see `compare_projected`, `project` and `directions`.
    """
    sets = _checked(real, other_real, generated)
    axes = directions(int(np.prod(sets[0].shape[1:])), num_projections, seed)
    a, b, c = (project(images, axes) for images in sets)
    return compare_projected(a, b, c, protocol, resamples, seed)


def compare_projected(
    real: np.ndarray,
    other_real: np.ndarray,
    generated: np.ndarray,
    protocol: str = "independent",
    resamples: int = 50,
    seed: int = 0,
) -> TransportResult:
    """Compute `compare` for images that are already projected, each (n, projections).

    Resampling n of n images with replacement would increase a W2, because repeated points make a
    set coarser. So a random half of each set is drawn without replacement, `resamples` times. To
    first order the variance over such halves is that of the full statistic (twice that of n images,
    halved because half of a finite set is drawn). The interval is the distance +- 1.96 of these
    standard deviations. It describes the draw of images, for the given directions.

    Args:
        real, other_real, generated: see `compare`.
        protocol: `"independent"` uses all images. `"paper"` compares the first 64 of `generated`
            (and of `other_real`, for the floor), each 20 times, with the first 1,280 of `real`, as
            in the published figures.
        resamples: number of random halves for the interval.
        seed: seed of the halves.

    Raises:
        ValueError: the protocol is unknown, or there are too few images.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}; choose one of {', '.join(PROTOCOLS)}.")
    a, b, c = real, other_real, generated
    if protocol == "paper":
        if len(b) < PAPER_DISTINCT or len(c) < PAPER_DISTINCT:
            raise ValueError(
                f"the paper's protocol needs at least {PAPER_DISTINCT} images in each set."
            )
        a, b, c = a[: PAPER_DISTINCT * PAPER_REPEATS], b[:PAPER_DISTINCT], c[:PAPER_DISTINCT]
    b = b[: len(c)]
    if len(b) < len(c):
        raise ValueError(
            f"the floor needs as many other real images as generated ones: {len(c)}, not {len(b)}."
        )
    # Repeating every image the same number of times does not change the distribution, nor W2. So
    # nothing is repeated here.
    real_quantiles = _sort(a)
    distance, floor = (_sliced_w2_of_sorted(real_quantiles, _sort(x)) for x in (c, b))
    rng = np.random.default_rng(seed)
    halves = [
        sliced_w2(*(x[rng.permutation(len(x))[: max(1, len(x) // 2)]] for x in (a, c)))
        for _ in range(resamples)
    ]
    margin = 1.96 * float(np.std(halves, ddof=1))
    interval = (max(0.0, distance - margin), distance + margin)
    ratio = ratio_interval = None
    if min(len(a), len(c)) >= MIN_IMAGES:
        ratio = times_floor(distance, floor)
        ratio_interval = (times_floor(interval[0], floor), times_floor(interval[1], floor))
    return TransportResult(
        distance, interval, floor, ratio, ratio_interval, _mean_shift(a, c), _mean_shift(a, b)
    )


def times_floor(distance: float, floor: float) -> float:
    """Return distance / floor. For a floor of 0 it is infinity, or NaN if the distance is 0 too."""
    if floor > 0:
        return distance / floor
    return float("inf") if distance > 0 else float("nan")
