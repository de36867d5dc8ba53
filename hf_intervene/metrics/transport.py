"""Sliced 2-Wasserstein distance between sets of images, with its floor and an interval (METHOD
section 5).

The distance is POT's `ot.sliced_wasserstein_distance` on flattened pixels in [0, 1]: the root of
the mean over directions of the squared one-dimensional W2. Two sets of real images of the same
sizes are not at distance 0 either: that is the *floor*, and a distance means little without it."""

from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np
import torch


PROTOCOLS = ("independent", "paper")
MIN_IMAGES = 200  # a side, for a ratio: of fewer the floor hides most of what models differ in
PAPER_DISTINCT, PAPER_REPEATS = (
    64,
    20,
)  # the published figures: 64 generated images, each 20 times, against 1,280 real ones

_CHUNK = 2**22  # pixels projected at once


@dataclass
class TransportResult:
    """A distance with what is needed to read it.

    Args:
        distance: sliced W2 between real and generated images.
        interval: 95 % interval of the distance.
        floor: sliced W2 between two disjoint sets of real images of the same sizes, under the same
            protocol.
        ratio: distance / floor; `None` of fewer than 200 distinct images a side, where the floor is
            so high that the ratio is near 1 whatever was generated.
        ratio_interval: 95 % interval of the ratio, the floor taken as known, or `None`.
        mean_shift: the part of the distance that the mean images alone make. Exactly, distance^2 =
            mean_shift^2 + the square of the distance that is left when each side's mean image is
            taken out.
        mean_shift_floor: that part of the floor.
    """

    distance: float
    interval: tuple[float, float]
    floor: float
    ratio: float | None
    ratio_interval: tuple[float, float] | None
    mean_shift: float
    mean_shift_floor: float

    def to_dict(self) -> dict:
        """As JSON holds it."""
        return asdict(self)


@lru_cache(maxsize=1)  # drawing them takes as long as a projection
def directions(dimension: int, num_projections: int, seed: int = 0) -> np.ndarray:
    """Random unit directions, float32 of shape (dimension, num_projections), as POT draws them.

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
    """Project flattened images on directions, some hundred images at a time: no float copy of all
    of them is made.

    Args:
        images: uint8 in [0, 255] or float in [0, 1], (n, ...).
        axes: (dimension, projections).
        device: where to; `None`: the GPU if there is one.

    Returns:
        float32 (n, projections).

    Raises:
        ValueError: float pixels out of [0, 1] or NaN.
    """
    images = np.asarray(images)
    device = _gpu_or_cpu() if device is None else device
    onto = torch.from_numpy(axes).to(device)
    projected = np.empty((len(images), axes.shape[1]), np.float32)
    size = max(64, _CHUNK // max(1, len(axes)))
    for start in range(0, len(images), size):
        part = np.require(
            images[start : start + size], requirements=("C", "W")
        )  # torch does not take what cannot be written to
        chunk = torch.from_numpy(part).to(device)
        if chunk.dtype == torch.uint8:
            chunk = chunk.float().div_(255)
        elif not all(0 <= extreme <= 1 for extreme in chunk.aminmax()):  # NaN is neither
            raise ValueError(
                "pixel values must lie in [0, 1] (or be uint8); some do not, or are NaN."
            )
        projected[start : start + size] = (chunk.flatten(1).float() @ onto).cpu().numpy()
    return projected


def sliced_w2(a: np.ndarray, b: np.ndarray) -> float:
    """Sliced W2 of projected samples (n, projections) and (m, projections).

    With n = m the quantile functions are the sorted values; otherwise both are step functions,
    compared where either steps."""
    return _sliced_w2_of_sorted(_sort(a), _sort(b))


def _sort(x: np.ndarray) -> np.ndarray:
    """Each column sorted; without a GPU by NumPy, in a tenth of torch's time."""
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
    """Sliced W2 between two sets of images, (n, ...) and (m, ...), equal to POT's for the same
    seed.
    """
    axes = directions(int(np.prod(real.shape[1:])), num_projections, seed)
    return sliced_w2(project(real, axes), project(generated, axes))


def compare(
    real: np.ndarray,
    other_real: np.ndarray,
    generated: np.ndarray,
    protocol: str = "independent",
    num_projections: int = 500,
    resamples: int = 50,
    seed: int = 0,
) -> TransportResult:
    """Distance of generated images from real ones, with floor, ratio and interval. See
    `compare_projected`.

    Args:
        real: real images of a context, uint8 or float in [0, 1], (n, ...).
        other_real: further real images of that context, none in common with `real`, (m, ...), m >=
            the number of generated ones used.
        generated: generated images, (m, ...).
        protocol: see `compare_projected`.
        num_projections: random directions.
        resamples: random halves for the interval.
        seed: of directions and halves.
    """
    axes = directions(int(np.prod(real.shape[1:])), num_projections, seed)
    a, b, c = (project(images, axes) for images in (real, other_real, generated))
    return compare_projected(a, b, c, protocol, resamples, seed)


def compare_projected(
    real: np.ndarray,
    other_real: np.ndarray,
    generated: np.ndarray,
    protocol: str = "independent",
    resamples: int = 50,
    seed: int = 0,
) -> TransportResult:
    """`compare` for images that are projected already, each (n, projections).

    The interval: resampling n of n images with replacement would shift a W2 upward (repeated points
    look like a coarser set), so a random half of each side is drawn without replacement instead,
    `resamples` times. To first order the variance over such halves is that of the full-sample
    statistic (twice that of n images, halved because half of the finite set is drawn). The interval
    is the distance +- 1.96 of these standard deviations. It covers the draw of images, for the
    given directions.

    Args:
        real, other_real, generated: see `compare`.
        protocol: `"independent"`: as they are. `"paper"`: the first 64 of `generated` (and of
            `other_real`, for the floor), each 20 times, against the first 1,280 of `real`, as in
            the published figures.
        resamples: random halves for the interval.
        seed: of the halves.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}; choose one of {', '.join(PROTOCOLS)}.")
    a, b, c = real, other_real, generated
    if protocol == "paper":
        if len(b) < PAPER_DISTINCT or len(c) < PAPER_DISTINCT:
            raise ValueError(f"the paper's protocol needs at least {PAPER_DISTINCT} images a side.")
        a, b, c = a[: PAPER_DISTINCT * PAPER_REPEATS], b[:PAPER_DISTINCT], c[:PAPER_DISTINCT]
    b = b[: len(c)]
    if len(b) < len(c):
        raise ValueError(
            f"the floor needs as many further real images as generated ones: {len(c)}, not"
            f" {len(b)}."
        )
    # Repeating every image the same number of times leaves a distribution, and so W2, unchanged:
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
    """distance / floor; of a floor of 0 infinity, or NaN where the distance is 0 too."""
    if floor > 0:
        return distance / floor
    return float("inf") if distance > 0 else float("nan")
