"""Compare the factors of sampled images of quad with those of real ones.

See METHOD sections 4 and 5. `match_factors` compares the factors of `read_factors`: the dependence
between factors, the shares of the kinds of shapes, the sizes, and all of them together. A distance
between pixels hardly depends on these: real images without triangles are nearly at its floor. As a
scale, every measure is also taken on real images with exactly one defect (`DEFECTS`).
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri
from scipy.stats import wasserstein_distance

from ..contexts import Context
from ..data import quad
from .factors import KINDS, LEVELS, Factors, true_factors
from .results import Result
from .two_sample import TwoSampleTest, two_sample_test


DEFECTS = ("no triangles", "one size", "circles only")
_RESAMPLES = 200


@dataclass
class FactorMatch(Result):
    """Result of `match_factors`.

    Args:
        slope: slope of the factors' correlations in samples on those in real images, by least
            squares through the origin over all pairs of u of `LEVELS` and the kind (circle 0 to
            ellipse 3, in the order of the renderer). 1 is right, 0 means no dependence. `None` if
            the correlations in real images are no larger than by chance.
        slope_interval: its 95 % interval, or `None`.
        shape_distance: total variation distance of the shares of the kinds.
        shape_interval: its 95 % interval.
        size_distance: Wasserstein-1 distance of u of the size.
        size_interval: its 95 % interval.
        two_sample: result of `two_sample_test` (boosted trees) on the factors of samples and real
            images, as `TwoSampleTest.to_dict` returns it.
        triangles: share of triangles. Models lose triangles first.
    """

    slope: float | None
    slope_interval: tuple[float, float] | None
    shape_distance: float
    shape_interval: tuple[float, float]
    size_distance: float
    size_interval: tuple[float, float]
    two_sample: dict
    triangles: float


def match_factors(real: Factors, other: Factors, seed: int = 0) -> FactorMatch:
    """Compare the factors of sampled images with those of real images.

    The interval of the slope is a percentile bootstrap over both sets. The intervals of the
    distances use random halves without replacement, because a distance of resampled sets is too
    large; see `transport.compare_projected`.

    Args:
        real: factors of real images.
        other: factors of the images to compare. Those of other real images give the floor.
        seed: seed of the resampling.

    Raises:
        ValueError: a set has fewer than 20 images.
        ImportError: scikit-learn is not installed; the message names the extra.
    """
    a, b = factor_table(real), factor_table(other)
    test: TwoSampleTest = two_sample_test(a, b, seed=seed)
    rng = np.random.default_rng(seed)
    slope, slope_interval = correlation_slope(a, b), None
    if slope is not None:
        drawn = [
            correlation_slope(*(x[rng.integers(len(x), size=len(x))] for x in (a, b)))
            for _ in range(_RESAMPLES)
        ]
        low, high = np.percentile([x for x in drawn if x is not None], [2.5, 97.5])
        slope_interval = (float(low), float(high))
    distances = _distances(a, b)
    halves = [
        _distances(*(x[rng.permutation(len(x))[: len(x) // 2]] for x in (a, b)))
        for _ in range(_RESAMPLES)
    ]
    margins = 1.96 * np.std(halves, axis=0, ddof=1)
    intervals = [(max(0.0, float(d - m)), float(d + m)) for d, m in zip(distances, margins)]
    triangles = float((b[:, -1] == KINDS.index("triangle")).mean())
    shape, size = distances
    return FactorMatch(
        slope, slope_interval, shape, intervals[0], size, intervals[1], test.to_dict(), triangles
    )


def factor_table(factors: Factors) -> np.ndarray:
    """Return u of `LEVELS` and the number of the kind of each image, (n, 7)."""
    return np.column_stack([factors.levels, factors.kinds.argmax(1)])


def correlation_slope(real: np.ndarray, other: np.ndarray) -> float | None:
    """Return the slope of the correlations of `other` (m, K) on those of `real` (n, K).

    It is fitted through the origin over the pairs of different columns. It is `None` if the mean
    square of the correlations of `real` is below four times that of independent columns, 1 / n.
    """
    rows, columns = np.triu_indices(real.shape[1], 1)
    a, b = (_correlations(x)[rows, columns] for x in (real, other))
    return float(a @ b / (a @ a)) if np.square(a).mean() > 4 / len(real) else None


def defective_latents(
    context: Context, size: int, variant: str, seed: int, defect: str
) -> np.ndarray:
    """Return latents (size, 8) of a context whose images have one defect, for `quad.render`.

    Args:
        context, size, variant, seed: as in `quad.sample_latents`.
        defect: one of `DEFECTS`: images with a triangle are replaced by others; every size is the
            median size; every shape is a circle.

    Raises:
        ValueError: the defect is unknown, or too few images have no triangle.
    """
    if defect == "no triangles":
        latents = quad.sample_latents(context, 4 * size, variant, seed)
        kept = latents[true_factors(latents).kinds.argmax(1) != KINDS.index("triangle")]
        if len(kept) < size:
            raise ValueError(
                f"only {len(kept)} of {4 * size} images of {context} have no triangle."
            )
        return kept[:size]
    latents = quad.sample_latents(context, size, variant, seed)
    if defect == "one size":
        latents[:, quad.LATENTS.index("size")] = np.median(latents[:, quad.LATENTS.index("size")])
    elif defect == "circles only":
        latents[:, quad.LATENTS.index("shape")] = ndtri(0.05)
    else:
        raise ValueError(f"there is no defect {defect!r}; choose one of {', '.join(DEFECTS)}.")
    return latents


def _distances(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Return the distances of two tables: total variation of kinds, Wasserstein-1 of sizes."""
    shares = [np.bincount(x[:, -1].astype(int), minlength=len(KINDS)) / len(x) for x in (a, b)]
    size = LEVELS.index("size")
    return float(np.abs(shares[0] - shares[1]).sum() / 2), float(
        wasserstein_distance(a[:, size], b[:, size])
    )


def _correlations(table: np.ndarray) -> np.ndarray:
    """Return the correlations of the columns; 0 for constant ones."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nan_to_num(np.corrcoef(table.T))
