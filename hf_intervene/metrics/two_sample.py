"""Can generated images be told from real ones? A small convolutional network tries, and a kernel
distance in a detector's features.

The two answer different questions. The network sees everything, and first of all blur: it is how
far samples are from real images. The kernel distance sees what the detector sees, concepts and what
goes with them, blurred or not.

KID was chosen over improved precision and recall: it has no neighbourhood size to choose, no
outlier of the real images opens a large region of "realistic" ones, and it is unbiased, so that its
floor is 0 at any number of images.
"""

from dataclasses import asdict, dataclass

import numpy as np
import torch
from scipy.stats import binomtest

from ..pixels import to_uint8
from .networks import SmallNetwork, apply, fit, prepared


MIN_IMAGES = 100  # a side
STEPS = 200
_HALVES = 50


@dataclass
class ImageTest:
    """
    Args:
        accuracy: share of the held-out images that the network puts on the right side; 0.5 by
            chance.
        interval: its 95 % interval (Wilson's).
        p_value: probability of so high an accuracy if the two sets had one distribution (binomial,
            one-sided).
        images: number of held-out images, of both sides together.
    """

    accuracy: float
    interval: tuple[float, float]
    p_value: float
    images: int

    def to_dict(self) -> dict:
        """As JSON holds it."""
        return asdict(self)


def image_two_sample_test(
    a: np.ndarray, b: np.ndarray, seed: int = 0, steps: int = STEPS
) -> ImageTest:
    """Classifier two-sample test of images (Lopez-Paz and Oquab, arXiv:1610.06545): a small
    convolutional network learns on one half of both sets and is asked about the other.

    As many images are used of the larger set as there are of the smaller. An accuracy about 0.5
    says that this network, with so many images, cannot tell them.

    Args:
        a, b: images (n, H, W, C) and (m, H, W, C), uint8 or float in [0, 1]; both are rounded to
            uint8, so that rounding tells nothing.
        seed: of split, weights and batches.
        steps: batches of 96 images; 200 take about eight seconds on one core at 32x32.

    Raises:
        ValueError: images of two shapes, fewer than 100 a side, or pixels out of [0, 1].
    """
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(
            f"images of the shapes {a.shape[1:]} and {b.shape[1:]} cannot be compared."
        )
    size = min(len(a), len(b))
    if size < MIN_IMAGES:
        raise ValueError(
            f"a two-sample test of images needs at least {MIN_IMAGES} a side, not {size}."
        )
    rng = np.random.default_rng(seed)
    sides = [prepared(_rounded(x)[rng.permutation(len(x))[:size]]) for x in (a, b)]
    x = torch.cat(sides)
    labels = torch.arange(2).repeat_interleave(size).float()
    train = torch.arange(size).repeat(2) < size // 2
    network = SmallNetwork(x.shape[1:], 1, seed)
    fit(network, x[train], labels[train, None], steps, seed, what="telling images apart")
    right = (apply(network, x[~train])[:, 0] > 0) == (labels[~train] > 0)
    test = binomtest(int(right.sum()), len(right), alternative="greater")
    interval = binomtest(int(right.sum()), len(right)).proportion_ci(0.95, "wilson")
    return ImageTest(
        float(right.float().mean()),
        (float(interval.low), float(interval.high)),
        float(test.pvalue),
        len(right),
    )


@dataclass
class KernelDistance:
    """
    Args:
        value: squared maximum mean discrepancy, unbiased: about 0, and below it as often, for one
            distribution.
        interval: 95 % interval of the value.
    """

    value: float
    interval: tuple[float, float]

    def to_dict(self) -> dict:
        """As JSON holds it."""
        return asdict(self)


def kernel_distance(a: np.ndarray, b: np.ndarray, seed: int = 0) -> KernelDistance:
    """Kernel inception distance (Binkowski et al., arXiv:1801.01401) of features: the unbiased
    squared MMD under the kernel (x . y / d + 1)^3.

    The interval is the value +- 1.96 standard deviations over 50 random halves, drawn without
    replacement: to first order the variance over halves is that of the whole; see
    `transport.compare_projected`.

    Args:
        a, b: features (n, d) and (m, d), such as `Detector.features` returns.
        seed: of the halves.

    Raises:
        ValueError: features of two widths, or fewer than four of a side.
    """
    a, b = (np.asarray(x, dtype=np.float64) for x in (a, b))
    if a.ndim != 2 or a.shape[1:] != b.shape[1:] or min(len(a), len(b)) < 4:
        raise ValueError(
            f"features (n, d) and (m, d) of four images a side at least are needed, not {a.shape} "
            f"and {b.shape}."
        )
    scale = np.sqrt(np.square(a).mean()) or 1.0
    a, b = a / scale, b / scale
    within_a, within_b, between = (_kernel(x, y) for x, y in ((a, a), (b, b), (a, b)))
    rng = np.random.default_rng(seed)
    halves = []
    for _ in range(_HALVES):
        i, j = (rng.permutation(len(x))[: len(x) // 2] for x in (a, b))
        halves.append(_mmd(within_a[np.ix_(i, i)], within_b[np.ix_(j, j)], between[np.ix_(i, j)]))
    value, margin = _mmd(within_a, within_b, between), 1.96 * float(np.std(halves, ddof=1))
    return KernelDistance(value, (value - margin, value + margin))


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mmd(within_a: np.ndarray, within_b: np.ndarray, between: np.ndarray) -> float:
    """Unbiased: the diagonals, each sample with itself, are left out."""
    means = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (within_a, within_b)]
    return float(sum(means) - 2 * between.mean())


def _rounded(images: np.ndarray) -> np.ndarray:
    if images.dtype == np.uint8:
        return images
    if not (images.min() >= 0 and images.max() <= 1):
        raise ValueError("pixel values must lie in [0, 1] (or be uint8); some do not, or are NaN.")
    return to_uint8(images)
