"""Effects of interventions on the true factors of quad, in samples: a matrix of contexts x factors
(METHOD section 5).

`factors.intervention_effects` asks what an *edit* does to an image. Here there are no pairs: the
distribution of each factor in sampled images of a context is held against that in sampled
observational ones, and the same is done with real images. The data determine what it should be in
the
contexts that they have: any model that fits them has the same rows, whatever its latent variables
mean.

How far the distribution of a factor moves:

    quad1 to quad4, size, color   Wasserstein-1 distance of u in [0, 1]; 1/2 from one end to the middle
    shape                         total variation distance of the mean probabilities of the kinds
    orientation                   Wasserstein-1 distance on the circle of phases, in periods of the kind's symmetry, of each kind that has
                                  one; averaged with the share of the kinds. It sees an angle only up to symmetry: a turn of all
                                  squares by a quarter is none, and wide distributions all look uniform. It is the factor that shows least.

Two sets of images of one context are not at distance 0 either: that is the *floor*, and what lies
under the 99 % quantile of such distances, the *noise*, is no sign of a move."""  # noqa: E501

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from scipy.special import ndtr

from ..data import quad
from ..data.quad import LATENTS
from .factors import KINDS, LEVELS, Factors


MIN_SAMPLES = 20
_QUANTILE = 0.99  # of the distances between observational sets


@dataclass
class EffectMatrix:
    """
    Args:
        contexts: names of the rows.
        values: how far each factor moved, (contexts, 8), the columns in the order of `LATENTS`; NaN
            of an orientation that no image has.
        intervals: their 95 % intervals, (contexts, 8, 2).
        floor: mean distance between two disjoint observational sets of the same size, (8,).
        noise: the 99 % quantile of such distances, (8,).
    """

    contexts: list[str]
    values: np.ndarray
    intervals: np.ndarray
    floor: np.ndarray
    noise: np.ndarray

    def rows(self, contexts: Sequence[str]) -> "EffectMatrix":
        """The same of some of the contexts only."""
        index = [self.contexts.index(name) for name in contexts]
        return replace(
            self,
            contexts=list(contexts),
            values=self.values[index],
            intervals=self.intervals[index],
        )

    def to_dict(self) -> dict:
        """As JSON holds it: arrays as lists."""
        return {key: np.asarray(value).tolist() for key, value in vars(self).items()}


def factor_moves(before: Factors, after: Factors) -> np.ndarray:
    """Distance between the distributions of each factor in two sets of images, which need not be of
    one size, (8,) in the order of `LATENTS`; see the module docstring."""
    moves = dict(zip(LEVELS, _w1(before.levels, after.levels)))
    moves["shape"] = np.abs(after.kinds.mean(0) - before.kinds.mean(0)).sum() / 2
    kinds = [x.kinds.argmax(1) for x in (before, after)]
    shares, turns = [], []
    for kind in range(1, len(KINDS)):
        rows = [found == kind for found in kinds]
        if all(found.any() for found in rows):
            shares.append(sum(found.mean() for found in rows))
            turns.append(
                circular_w1(before.phases[rows[0], kind - 1], after.phases[rows[1], kind - 1])
            )
    moves["orientation"] = np.average(turns, weights=shares) if shares else math.nan
    return np.array([moves[name] for name in LATENTS])


def circular_w1(a: np.ndarray, b: np.ndarray) -> float:
    """Wasserstein-1 distance of phases (n,) and (m,) on the circle of circumference 1, 0.5 at most:
    the integral of |F - G - median|, F and G the distribution functions from any point on (Rabin,
    Delon and Gousseau, "Transportation distances on the circle", 2011)."""
    a, b = (np.asarray(x, dtype=np.float64) % 1 for x in (a, b))
    points = np.concatenate([a, b])
    order = np.argsort(points, kind="stable")
    difference = np.cumsum(
        np.concatenate([np.full(len(a), 1 / len(a)), np.full(len(b), -1 / len(b))])[order]
    )
    # the length on which the difference holds, round the circle
    gaps = np.diff(np.append(points[order], points[order[0]] + 1))
    ranked = np.argsort(difference)
    median = difference[ranked][np.searchsorted(np.cumsum(gaps[ranked]), 0.5)]
    return float((np.abs(difference - median) * gaps).sum())


def effect_matrix(
    obs: Factors,
    other_obs: Factors,
    intervened: Mapping[str, Factors],
    resamples: int = 50,
    seed: int = 0,
) -> EffectMatrix:
    """How far each context moved each factor, with intervals, floor and noise.

    The intervals are of random halves without replacement (see `transport.compare_projected`);
    floor and noise are of random splits of all observational images in two.

    Args:
        obs: factors of observational images.
        other_obs: of as many others, which serve for floor and noise only.
        intervened: of images of each context.
        resamples: random halves, and four times as many splits.
        seed: of them.

    Raises:
        ValueError: one sentence: too few images, or two sets of observational ones of different
            size.
    """
    sizes = {len(x.levels) for x in (obs, other_obs, *intervened.values())}
    if min(sizes) < MIN_SAMPLES or len(obs.levels) != len(other_obs.levels):
        raise ValueError(
            f"at least {MIN_SAMPLES} images of every context are needed, and two observational sets"
            " of one size."
        )
    rng = np.random.default_rng(seed)
    values = np.stack([factor_moves(obs, x) for x in intervened.values()])
    margins = []
    for factors in intervened.values():
        halves = [factor_moves(*(_drawn(x, rng) for x in (obs, factors))) for _ in range(resamples)]
        margins.append(1.96 * np.std(halves, axis=0, ddof=1))
    pool = Factors(
        *(np.concatenate([getattr(x, f.name) for x in (obs, other_obs)]) for f in fields(Factors))
    )
    splits = [rng.permutation(len(pool.levels)) for _ in range(4 * resamples)]
    null = np.array(
        [
            factor_moves(*(_rows(pool, half) for half in np.array_split(order, 2)))
            for order in splits
        ]
    )
    intervals = values[..., None] + np.multiply.outer(np.array(margins), [-1.0, 1.0])
    noise = np.quantile(null, _QUANTILE, axis=0)
    return EffectMatrix(list(intervened), values, np.maximum(intervals, 0), null.mean(0), noise)


def true_moves(contexts: Sequence[str], variant: str = "dependent") -> np.ndarray:
    """Which factors each context moves by the causal model of quad, bool (contexts, 8): their mean
    or spread is not the observational.
    """
    means, spreads = (
        np.stack(rows) for rows in zip(*(quad.moments(name, variant) for name in contexts))
    )
    return ~(np.isclose(means, 0) & np.isclose(spreads, 1))


def compare_effects(
    generated: EffectMatrix, real: EffectMatrix, moving: np.ndarray
) -> dict[str, float]:
    """One line on how well the effects in generated images are those in real ones.

    Args:
        generated, real: matrices of the same contexts.
        moving: which factors each context moves in truth, bool (contexts, 8); see `true_moves`.

    Returns:
        `correlation` and mean absolute `error` of all entries; `moving`: how many move in truth,
        `visible`: how many of them above the noise of real images; `size`: sum of generated moves
        over that of real ones where truth moves visibly, floors subtracted; `found`: share of the
        visible moves that generated images make by half at least, above their noise; `spurious`:
        share of the factors that truth leaves alone whose generated move is above the noise (0.01
        by chance); `spurious_size`: their mean move, floor subtracted, over the mean visible true
        one. What real images in place of the generated ones score is the floor of all of these.
    """
    a, b = generated.values, real.values
    known = ~(np.isnan(a) | np.isnan(b))
    visible, still = moving & known & (b > real.noise), ~moving & known
    excess, true_excess = a - generated.floor, b - real.floor
    return {
        "correlation": _correlation(a[known], b[known]),
        "error": float(np.abs(a - b)[known].mean()),
        "moving": int((moving & known).sum()),
        "visible": int(visible.sum()),
        "size": _ratio(excess[visible].sum(), true_excess[visible].sum()),
        "found": _ratio(
            ((a > generated.noise) & (excess > true_excess / 2))[visible].sum(), visible.sum()
        ),
        "spurious": _ratio((a > generated.noise)[still].sum(), still.sum()),
        "spurious_size": (
            _ratio(excess[still].mean(), true_excess[visible].mean())
            if still.any() and visible.any()
            else math.nan
        ),
    }


def mean_shifts(obs: Factors, intervened: Mapping[str, Factors]) -> tuple[np.ndarray, np.ndarray]:
    """Shift of the mean of each factor of `LEVELS` from observational images to those of each
    context, and its standard error, each (contexts, 6), in units of u. Unlike `factor_moves` it has
    a sign."""
    means = np.stack([x.levels.mean(0) for x in intervened.values()]) - obs.levels.mean(0)
    errors = [
        np.sqrt(x.levels.var(0) / len(x.levels) + obs.levels.var(0) / len(obs.levels))
        for x in intervened.values()
    ]
    return means, np.stack(errors)


def true_mean_shifts(contexts: Sequence[str], variant: str = "dependent") -> np.ndarray:
    """What `mean_shifts` is by the causal model, exactly: E u = Phi(mean / sqrt(1 + variance)) of a
    Gaussian latent, (contexts, 6).
    """
    columns = [LATENTS.index(name) for name in LEVELS]
    moments = np.stack([quad.moments(name, variant) for name in contexts])[
        ..., columns
    ]  # (contexts, 2, 6)
    return ndtr(moments[:, 0] / np.sqrt(1 + moments[:, 1] ** 2)) - 0.5


def _w1(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Wasserstein-1 distance of the columns of (n, K) and (m, K), (K,)."""
    if len(a) == len(b):
        return np.abs(np.sort(a, axis=0) - np.sort(b, axis=0)).mean(0)
    points = np.sort(np.concatenate([a, b]), axis=0)
    distances = []
    for column, x, y in zip(points.T, np.sort(a, axis=0).T, np.sort(b, axis=0).T):
        f, g = (np.searchsorted(z, column[:-1], side="right") / len(z) for z in (x, y))
        distances.append((np.abs(f - g) * np.diff(column)).sum())
    return np.array(distances)


def _rows(factors: Factors, rows: np.ndarray) -> Factors:
    return Factors(*(getattr(factors, f.name)[rows] for f in fields(Factors)))


def _drawn(factors: Factors, rng: np.random.Generator) -> Factors:
    size = len(factors.levels)
    return _rows(factors, rng.permutation(size)[: size // 2])


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1]) if len(a) > 1 and np.ptp(a) and np.ptp(b) else math.nan


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else math.nan
