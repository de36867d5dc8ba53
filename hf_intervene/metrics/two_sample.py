"""Tests of whether two sets of samples have one distribution, such as generated and real images.

`image_two_sample_test` trains a small convolutional network to distinguish two sets of images. It
uses everything that differs, first of all blur. `kernel_distance` compares the features of a
detector, which depend on concepts and much less on blur. `two_sample_test` is for any samples, such
as codes or factors, and uses boosted trees.

The kernel distance (KID) was chosen over improved precision and recall for three reasons: it has no
neighbourhood size, outliers of the real images do not enlarge the region that counts as realistic,
and it is unbiased, so that its floor is 0 for any number of images.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import binomtest

from ..pixels import to_uint8
from .disentanglement import MIN_SAMPLES, principal_components
from .networks import SmallNetwork, apply, fit, prepared
from .results import Result, check_installed


MIN_IMAGES = 100  # a side
STEPS = 200
_HALVES = 50
_COMPONENTS = 32  # principal components that `two_sample_test` uses


@dataclass
class ImageTest(Result):
    """Result of `image_two_sample_test`.

    Args:
        accuracy: share of the held-out images whose set the network predicts correctly; 0.5 by
            chance.
        interval: its 95 % interval (Wilson's).
        p_value: probability of this accuracy or a higher one if both sets have one distribution
            (binomial, one-sided).
        images: number of held-out images of both sets together.
    """

    accuracy: float
    interval: tuple[float, float]
    p_value: float
    images: int


def image_two_sample_test(
    a: np.ndarray, b: np.ndarray, seed: int = 0, steps: int = STEPS
) -> ImageTest:
    """Test whether a network can distinguish two sets of images.

    This is the classifier two-sample test (Lopez-Paz and Oquab, arXiv:1610.06545). A small
    convolutional network is trained on one half of both sets and tested on the other. The larger
    set is cut to the size of the smaller. An accuracy of about 0.5 means that this network, with
    this number of images, cannot distinguish the sets.

    Args:
        a, b: images (n, H, W, C) and (m, H, W, C), uint8 or float in [0, 1]. Both are rounded to
            uint8, so that rounding does not distinguish them.
        seed: seed of split, weights and batches.
        steps: batches of 96 images; 200 take about eight seconds on one core at 32x32.

    Raises:
        ValueError: the images have different shapes, a set has fewer than 100, or pixels are
            outside [0, 1].
    """
    a, b = (np.asarray(x) for x in (a, b))
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(
            f"images of the shapes {a.shape[1:]} and {b.shape[1:]} cannot be compared."
        )
    size = min(len(a), len(b))
    if size < MIN_IMAGES:
        raise ValueError(
            f"a two-sample test of images needs at least {MIN_IMAGES} in each set, not {size}."
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
class TwoSampleTest(Result):
    """Result of `two_sample_test`.

    Args:
        accuracy: share of the held-out samples whose set the classifier predicts correctly.
        interval: its interval.
        samples: number of held-out samples.
    """

    accuracy: float
    interval: tuple[float, float]
    samples: int

    @property
    def told_apart(self) -> bool:
        """Whether the interval is above 0.5, the accuracy of guessing."""
        return self.interval[0] > 0.5

    def to_dict(self) -> dict:
        """Return the fields and `told_apart` as JSON has them."""
        return super().to_dict() | {"told_apart": self.told_apart}


def two_sample_test(
    a: np.ndarray, b: np.ndarray, level: float = 0.95, seed: int = 0
) -> TwoSampleTest:
    """Test whether a classifier can distinguish two sets of samples.

    The classifier, boosted trees on the leading principal components, is trained on one half of
    both sets and tested on the other (Lopez-Paz and Oquab, arXiv:1610.06545). The larger set is cut
    to the size of the smaller. An accuracy of about 0.5 means that *this* classifier cannot
    distinguish the sets. With more samples, or another classifier, it may be possible.

    Args:
        a, b: (n, ...) and (m, ...).
        level: level of the interval (Wilson's).
        seed: seed of split and classifier.

    Raises:
        ValueError: the samples have different shapes, are too few, or hold NaN or infinity.
        ImportError: scikit-learn is not installed; the message names the extra.
    """
    check_installed()
    from sklearn.ensemble import HistGradientBoostingClassifier

    a, b = (np.asarray(x) for x in (a, b))
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(
            f"samples of the shapes {a.shape[1:]} and {b.shape[1:]} cannot be compared."
        )
    size = min(len(a), len(b))
    if size < MIN_SAMPLES:
        raise ValueError(
            f"a two-sample test needs at least {MIN_SAMPLES} samples in each set, not {size}."
        )
    rng = np.random.default_rng(seed)
    a, b = (x[rng.permutation(len(x))[:size]].reshape(size, -1) for x in (a, b))
    features = principal_components(np.concatenate([a, b]), _COMPONENTS, seed)
    labels, train = np.repeat([0, 1], size), np.tile(np.arange(size) < size // 2, 2)
    classifier = HistGradientBoostingClassifier(
        max_iter=50,
        max_leaf_nodes=8,
        min_samples_leaf=min(20, size // 4),
        early_stopping=False,
        random_state=seed,
    ).fit(features[train], labels[train])
    right = classifier.predict(features[~train]) == labels[~train]
    interval = binomtest(int(right.sum()), len(right)).proportion_ci(level, "wilson")
    return TwoSampleTest(
        float(right.mean()), (float(interval.low), float(interval.high)), len(right)
    )


@dataclass
class KernelDistance(Result):
    """Result of `kernel_distance`.

    Args:
        value: squared maximum mean discrepancy, unbiased: for one distribution it is about 0, with
            either sign.
        interval: 95 % interval of the value.
    """

    value: float
    interval: tuple[float, float]


def kernel_distance(a: np.ndarray, b: np.ndarray, seed: int = 0) -> KernelDistance:
    """Compute the kernel inception distance (Binkowski et al., arXiv:1801.01401) of features.

    It is the unbiased squared MMD with the kernel (x . y / d + 1)^3. The interval is the value
    +- 1.96 standard deviations over 50 random halves, drawn without replacement. To first order the
    variance over halves is that of the full value; see `transport.compare_projected`.

    Args:
        a, b: features (n, d) and (m, d), for example of `Detector.features`.
        seed: seed of the halves.

    Raises:
        ValueError: the features have different widths, a set has fewer than four, or a value is NaN
            or infinite.
    """
    a, b = (np.asarray(x, dtype=np.float64) for x in (a, b))
    if a.ndim != 2 or a.shape[1:] != b.shape[1:] or min(len(a), len(b)) < 4:
        raise ValueError(
            f"features (n, d) and (m, d) of at least four images each are needed, not {a.shape}"
            f" and {b.shape}."
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("features must be finite; some are NaN or infinite.")
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
    """Return the unbiased squared MMD: without the diagonals, which compare samples to themselves.

    Args:
        within_a, within_b, between: kernel matrices (n, n), (m, m) and (n, m).
    """
    means = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (within_a, within_b)]
    return float(sum(means) - 2 * between.mean())


def _rounded(images: np.ndarray) -> np.ndarray:
    if images.dtype == np.uint8:
        return images
    if not (images.min() >= 0 and images.max() <= 1):
        raise ValueError("pixel values must lie in [0, 1] (or be uint8); some do not, or are NaN.")
    return to_uint8(images)
