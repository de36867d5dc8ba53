"""Disentanglement of codes, given the true factors (METHOD section 5).

    DCI     disentanglement, completeness, informativeness: Eastwood and Williams, "A framework for
            the quantitative evaluation of disentangled representations", ICLR 2018
    MIG     mutual information gap: Chen, Li, Grosse and Duvenaud, arXiv:1802.04942
    SAP     separated attribute predictability: Kumar, Sattigeri and Balakrishnan, arXiv:1711.00848
    MCC     mean correlation with the true factors, codes and factors matched one to one

Whole blocks of codes have the same scores in `block_scores.py`.

Codes that are independent of the factors do not score 0, because there are many codes and finitely
many samples. Their score is the *floor*. It is measured on permuted rows of the codes. An untrained
model scores more than that: a random map of an image says much about it. A high score means little
without both.

The intervals describe the draw of the samples. Resampling n of n rows with replacement would put
equal rows on both sides of a split, and increase a mutual information. Instead, random halves are
drawn without replacement, as for distances (`transport.compare_projected`). To first order, a score
varies over such halves as the full score does over new samples.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.stats import rankdata

from .results import Result, check_installed


MIN_SAMPLES = 20
CORRELATIONS = ("linear", "spearman")
PREDICTORS = ("boosting", "lasso")
_BINS = 20
_FLOORS = 3  # a floor is the mean over so many permutations
FOLDS = 5


@dataclass
class Score(Result):
    """A measure with its floor and interval.

    Args:
        value: the measure; 1 is best.
        interval: 95 % interval.
        floor: the measure for codes that are independent of the factors.
        untrained: the measure for the codes of an untrained model, if they were given.
    """

    value: float
    interval: tuple[float, float]
    floor: float
    untrained: float | None = None


@dataclass
class DCI:
    """Disentanglement, completeness and informativeness; see `dci`.

    Args:
        disentanglement: 1 if each code is important for only one factor.
        completeness: 1 if only one code is important for each factor.
        informativeness: R^2 of the predicted factors on held-out samples, at least 0, mean over
            factors.
        importance: importance of each code for each factor, (codes, factors).
    """

    disentanglement: float
    completeness: float
    informativeness: float
    importance: np.ndarray


def measure(
    codes: np.ndarray,
    factors: np.ndarray,
    resamples: int = 50,
    seed: int = 0,
    untrained: np.ndarray | None = None,
) -> dict[str, Score]:
    """Compute MIG, SAP, both MCC and DCI (by lasso) of codes (n, D), given factors (n, K).

    Args:
        codes, factors, resamples, seed, untrained: see `scored`.

    Returns:
        `Score` by name: `mig`, `sap`, `mcc_linear`, `mcc_spearman`, `disentanglement`,
        `completeness`, `informativeness`.

    Raises:
        ValueError: see `scored`.
        ImportError: scikit-learn is not installed; the message names the extra.
    """

    def everything(codes: np.ndarray, factors: np.ndarray) -> dict[str, float]:
        found = dci(codes, factors, "lasso", seed)
        by_lasso = ("disentanglement", "completeness", "informativeness")
        return (
            {"mig": mig(codes, factors), "sap": sap(codes, factors)}
            | {f"mcc_{kind}": mcc(codes, factors, kind) for kind in CORRELATIONS}
            | {name: getattr(found, name) for name in by_lasso}
        )

    return cast(dict[str, Score], scored(everything, codes, factors, resamples, seed, untrained))


def scored(
    function: Callable[[np.ndarray, np.ndarray], dict[str, float] | float],
    codes: np.ndarray,
    factors: np.ndarray,
    resamples: int = 50,
    seed: int = 0,
    untrained: np.ndarray | None = None,
    prepare: Callable[[np.ndarray], np.ndarray] | None = None,
) -> dict[str, Score] | Score:
    """Compute a measure with its floors and interval (see the module docstring).

    Args:
        function: function of codes and factors, such as `mig`. It returns a number, or a dict of
            numbers.
        codes: (n, ...).
        factors: (n, K).
        resamples: number of random halves for the interval.
        seed: seed of halves and permutations.
        untrained: codes of the same samples by an untrained model, of the shape of `codes`.
        prepare: what is done once to all rows of codes before `function` sees them or a half of
            them, such as a fit; `None`: nothing.

    Returns:
        A `Score`, or a dict of them.

    Raises:
        ValueError: a shape is wrong, there are too few samples, a value is NaN or infinite, or a
            factor is constant.
    """
    codes, factors = checked(codes, factors, 2 * MIN_SAMPLES)
    if untrained is not None and np.shape(untrained) != codes.shape:
        raise ValueError(
            f"the codes of the untrained model must have the shape {codes.shape} of the others, not"
            f" {np.shape(untrained)}."
        )
    ready = prepare if prepare is not None else np.asarray
    rng = np.random.default_rng(seed)
    prepared = ready(codes)
    value = function(prepared, factors)
    floors = [function(ready(rng.permutation(codes)), factors) for _ in range(_FLOORS)]
    rows = [rng.permutation(len(codes))[: len(codes) // 2] for _ in range(resamples)]
    halves = [function(prepared[half], factors[half]) for half in rows]
    beside = None if untrained is None else function(ready(checked(untrained, factors)[0]), factors)

    def score(pick: Callable) -> Score:
        margin = 1.96 * float(np.std([pick(half) for half in halves], ddof=1))
        middle = float(pick(value))
        return Score(
            middle,
            (middle - margin, middle + margin),
            float(np.mean([pick(x) for x in floors])),
            None if beside is None else float(pick(beside)),
        )

    if isinstance(value, dict):
        return {name: score(lambda found, name=name: found[name]) for name in value}
    return score(lambda found: found)


def dci(codes: np.ndarray, factors: np.ndarray, predictor: str = "boosting", seed: int = 0) -> DCI:
    """Compute disentanglement, completeness and informativeness (Eastwood and Williams 2018).

    Each factor is predicted from all codes, trained on a random three quarters of the samples. R
    are the importances. The disentanglement of a code is 1 - entropy of its normalised row of R, in
    base K. The mean over codes is weighted by the sums of the rows. Completeness is the same for
    the columns, in base D. There all factors have equal weights, except those that nothing
    predicts. With one factor, or one code, the entropy is 0.

    Args:
        codes: (n, D).
        factors: numbers, (n, K).
        predictor: `"boosting"`: gradient-boosted trees, with the importances of scikit-learn.
            `"lasso"`: linear, with a penalty chosen by cross-validation; the importances are the
            absolute weights of standardised codes.
        seed: seed of split and trees.

    Raises:
        ValueError: unknown predictor, or see `scored`.
        ImportError: scikit-learn is not installed; the message names the extra.
    """
    check_installed()
    from sklearn.ensemble import GradientBoostingRegressor
    from sklearn.linear_model import LassoCV

    if predictor not in PREDICTORS:
        raise ValueError(f"unknown predictor {predictor!r}; choose one of {', '.join(PREDICTORS)}.")
    codes, factors = checked(codes, factors)
    codes = standardised(codes)
    rows = np.random.default_rng(seed).permutation(len(codes))
    train, test = np.split(rows, [3 * len(rows) // 4])
    importance, r2 = np.zeros((codes.shape[1], factors.shape[1])), []
    for k, factor in enumerate(standardised(factors).T):
        if predictor == "boosting":
            model = GradientBoostingRegressor(subsample=0.5, random_state=seed).fit(
                codes[train], factor[train]
            )
            importance[:, k] = model.feature_importances_
        else:
            model = LassoCV(cv=FOLDS, max_iter=5000).fit(codes[train], factor[train])
            importance[:, k] = np.abs(model.coef_)
        r2.append(max(0.0, model.score(codes[test], factor[test])))
    disentanglement, completeness = (
        concentration(importance),
        concentration(importance.T / _nonzero(importance.sum(0))[:, None]),
    )
    return DCI(disentanglement, completeness, float(np.mean(r2)), importance)


def concentration(importance: np.ndarray) -> float:
    """Return the mean of 1 - entropy over the normalised rows of importances (a, b), in base b.

    Rows are weighted by their sums. If all importances are 0, the result is 0.
    """
    totals = importance.sum(1)
    share = importance / _nonzero(totals)[:, None]
    entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(1) / np.log(
        max(2, importance.shape[1])
    )
    return float(((1 - entropy) * totals).sum() / _nonzero(totals.sum()))


def mig(codes: np.ndarray, factors: np.ndarray) -> float:
    """Compute the mutual information gap (Chen et al. 2018).

    It is the mean over factors of the difference between the two largest mutual informations of a
    code and the factor, divided by the entropy of the factor. With one code, the second is 0. A
    variable with more than 20 values is binned by its quantiles, so that monotone maps of a code
    do not change the gap.

    Args:
        codes: (n, D).
        factors: (n, K).

    Raises:
        ValueError: see `scored`.
    """
    codes, factors = checked(codes, factors)
    columns, targets = ([binned(column) for column in x.T] for x in (codes, factors))
    gaps = []
    for factor in targets:
        information = sorted(mutual_information(code, factor) for code in columns)
        second = information[-2] if len(information) > 1 else 0.0
        gaps.append((information[-1] - second) / mutual_information(factor, factor))
    return float(np.mean(gaps))


def sap(codes: np.ndarray, factors: np.ndarray) -> float:
    """Compute the separated attribute predictability (Kumar et al. 2018) for numerical factors.

    It is the mean over factors of the difference between the two largest R^2 with which a single
    code predicts the factor linearly. With one code, the second is 0.

    Args:
        codes: (n, D).
        factors: (n, K).

    Raises:
        ValueError: see `scored`.
    """
    codes, factors = checked(codes, factors)
    r2 = np.sort(
        np.vstack([np.zeros(factors.shape[1]), correlations(codes, factors) ** 2]), axis=0
    )  # (1 + D, K)
    return float((r2[-1] - r2[-2]).mean())


def mcc(codes: np.ndarray, factors: np.ndarray, correlation: str = "linear") -> float:
    """Compute the mean absolute correlation of factors with codes, in the best one-to-one matching.

    Args:
        codes: (n, D). If D < K, a factor without a code counts as 0.
        factors: (n, K).
        correlation: `"linear"`, or `"spearman"`, which monotone maps do not change.

    Raises:
        ValueError: unknown correlation, or see `scored`.
    """
    if correlation not in CORRELATIONS:
        raise ValueError(
            f"unknown correlation {correlation!r}; choose one of {', '.join(CORRELATIONS)}."
        )
    codes, factors = checked(codes, factors)
    if correlation == "spearman":
        codes, factors = rankdata(codes, axis=0), rankdata(factors, axis=0)
    return matched(np.abs(correlations(codes, factors)))


def correlations(codes: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Return the correlations of codes (n, D) and factors (n, K), (D, K); 0 for constant ones."""
    return standardised(codes).T @ standardised(factors) / len(codes)


def principal_components(samples: np.ndarray, components: int, seed: int = 0) -> np.ndarray:
    """Return at most `components` leading principal components of samples (n, dimensions).

    Samples that have no more dimensions are returned as they are.

    Raises:
        ValueError: a value is NaN or infinite.
        ImportError: scikit-learn is not installed; the message names the extra.
    """
    check_installed()
    from sklearn.decomposition import PCA

    samples = np.asarray(samples, dtype=np.float32)
    if not np.isfinite(samples).all():
        raise ValueError("samples must be finite; some are NaN or infinite.")
    if samples.shape[1] <= components:
        return samples
    return PCA(
        min(components, len(samples)), svd_solver="randomized", random_state=seed
    ).fit_transform(samples)


def checked(
    codes: np.ndarray, factors: np.ndarray, least: int = MIN_SAMPLES
) -> tuple[np.ndarray, np.ndarray]:
    codes, factors = (np.asarray(x, dtype=np.float64) for x in (codes, factors))
    if (
        codes.ndim < 2
        or factors.ndim != 2
        or len(codes) != len(factors)
        or 0 in codes.shape[1:] + factors.shape[1:]
    ):
        raise ValueError(
            f"codes (n, D) and factors (n, K) of the same samples are needed, not {codes.shape} and"
            f" {factors.shape}."
        )
    if len(codes) < least:
        raise ValueError(f"at least {least} samples are needed, not {len(codes)}.")
    if not (np.isfinite(codes).all() and np.isfinite(factors).all()):
        raise ValueError("codes and factors must be finite; some are NaN or infinite.")
    constant = np.flatnonzero(factors.min(0) == factors.max(0))
    if len(constant):
        raise ValueError(
            f"factor {constant[0]} has one value in all samples: there is nothing to find in the"
            " codes."
        )
    return codes, factors


def matched(found: np.ndarray) -> float:
    return float(found[linear_sum_assignment(found, maximize=True)].sum() / found.shape[1])


def standardised(x: np.ndarray) -> np.ndarray:
    # By rounding, a constant column may have a standard deviation above 0.
    return (x - x.mean(0)) / _nonzero(x.std(0) * (x.min(0) < x.max(0)))


def _nonzero(x: np.ndarray) -> np.ndarray:
    return np.where(x == 0, 1, x)


def binned(column: np.ndarray) -> np.ndarray:
    values, index = np.unique(column, return_inverse=True)
    if len(values) <= _BINS:
        return index
    return np.searchsorted(np.quantile(column, np.arange(1, _BINS) / _BINS), column, side="right")


def mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    joint = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(joint, (a, b), 1 / len(a))
    independent = joint.sum(1, keepdims=True) * joint.sum(0)
    seen = joint > 0
    return float((joint[seen] * np.log(joint[seen] / independent[seen])).sum())
