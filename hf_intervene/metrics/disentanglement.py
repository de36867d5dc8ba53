"""Disentanglement of codes, given the true factors; each measure with its floor and an interval
(METHOD section 5).

    DCI     disentanglement, completeness, informativeness: Eastwood and Williams, "A framework for the quantitative evaluation of
            disentangled representations", ICLR 2018
    MIG     mutual information gap: Chen, Li, Grosse and Duvenaud, arXiv:1802.04942
    SAP     separated attribute predictability: Kumar, Sattigeri and Balakrishnan, arXiv:1711.00848
    MCC     mean correlation with the true factors, codes and factors matched one to one; of single codes or of whole blocks

Codes that have nothing to do with the factors do not score 0: there are many codes, and finitely
many samples. What they score, the rows of the codes being permuted, is the *floor*. A high score
means little without it.

The intervals are those of the samples. Resampling n of n rows with replacement would put equal rows
on both sides of a split, and raise a mutual information; random halves without replacement are
drawn instead, as for the distances (`transport.compare_projected`): to first order a score varies
over such halves as the full one does over fresh samples.

`two_sample_test` asks whether two sets of samples, such as two contexts, can be told apart at all.
"""  # noqa: E501

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import cast

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.stats import binomtest, rankdata

from .leakage import check_installed


MIN_SAMPLES = 20
CORRELATIONS = ("linear", "spearman")
PREDICTORS = ("boosting", "lasso")
_BINS = 20
_FLOORS = 3  # permutations that a floor is the mean of
_FOLDS = 5
_COMPONENTS = 32  # principal components that the two-sample test reads


@dataclass
class Score:
    """
    Args:
        value: the measure, 1 is best.
        interval: 95 % interval.
        floor: the same measure of codes that have nothing to do with the factors.
    """

    value: float
    interval: tuple[float, float]
    floor: float

    def to_dict(self) -> dict:
        """As JSON holds it."""
        return asdict(self)


@dataclass
class DCI:
    """
    Args:
        disentanglement: 1 if each code matters for one factor only.
        completeness: 1 if one code only matters for each factor.
        informativeness: R^2 of the factors predicted on held-out samples, mean over factors, 0 at
            least.
        importance: how much each code matters for each factor, (codes, factors).
    """

    disentanglement: float
    completeness: float
    informativeness: float
    importance: np.ndarray


@dataclass
class TwoSampleTest:
    """
    Args:
        accuracy: share of held-out samples whose set the classifier names rightly.
        interval: its interval.
        samples: held-out samples.
    """

    accuracy: float
    interval: tuple[float, float]
    samples: int

    @property
    def told_apart(self) -> bool:
        """Whether the interval lies above 0.5, the accuracy of guessing."""
        return self.interval[0] > 0.5

    def to_dict(self) -> dict:
        """As JSON holds it."""
        return asdict(self) | {"told_apart": self.told_apart}


def measure(
    codes: np.ndarray, factors: np.ndarray, resamples: int = 50, seed: int = 0
) -> dict[str, Score]:
    """MIG, SAP and the two MCC of codes (n, D) of one dimension, given factors (n, K), and their
    DCI by lasso.

    Returns:
        `Score` by name: `mig`, `sap`, `mcc_linear`, `mcc_spearman`, `disentanglement`,
            `completeness`, `informativeness`.

    Raises:
        ValueError: see `scored`.
        ImportError: scikit-learn is not installed; the message names the extra.
    """

    def everything(codes: np.ndarray, factors: np.ndarray) -> dict[str, float]:
        found = dci(codes, factors, "lasso", seed)
        return {
            "mig": mig(codes, factors),
            "sap": sap(codes, factors),
            **{f"mcc_{kind}": mcc(codes, factors, kind) for kind in CORRELATIONS},
            **{
                name: getattr(found, name)
                for name in ("disentanglement", "completeness", "informativeness")
            },
        }

    return cast(dict[str, Score], scored(everything, codes, factors, resamples, seed))


def scored(
    function: Callable[[np.ndarray, np.ndarray], dict[str, float] | float],
    codes: np.ndarray,
    factors: np.ndarray,
    resamples: int = 50,
    seed: int = 0,
) -> dict[str, Score] | Score:
    """A measure with its floor and interval (see the module docstring).

    Args:
        function: of codes and factors, such as `mig`; its value is a number, or a dict of numbers.
        codes: (n, ...).
        factors: (n, K).
        resamples: random halves for the interval.
        seed: of halves and permutations.

    Returns:
        A `Score`, or a dict of them.

    Raises:
        ValueError: one sentence: other shapes, too few samples, NaN or infinity, a factor that
            never changes.
    """
    codes, factors = _checked(codes, factors, 2 * MIN_SAMPLES)
    rng = np.random.default_rng(seed)
    value = function(codes, factors)
    floors = [function(rng.permutation(codes), factors) for _ in range(_FLOORS)]
    rows = [rng.permutation(len(codes))[: len(codes) // 2] for _ in range(resamples)]
    halves = [function(codes[half], factors[half]) for half in rows]

    def score(pick: Callable) -> Score:
        margin = 1.96 * float(np.std([pick(half) for half in halves], ddof=1))
        middle = float(pick(value))
        return Score(
            middle, (middle - margin, middle + margin), float(np.mean([pick(x) for x in floors]))
        )

    if isinstance(value, dict):
        return {name: score(lambda found, name=name: found[name]) for name in value}
    return score(lambda found: found)


def dci(codes: np.ndarray, factors: np.ndarray, predictor: str = "boosting", seed: int = 0) -> DCI:
    """Disentanglement, completeness and informativeness (Eastwood and Williams 2018).

    Each factor is predicted from all codes, on a random three quarters of the samples. With R the
    importances, a code's disentanglement is 1 - entropy of its row of R, normalised, in base K;
    they are averaged with the weight of the rows. Completeness is the same of the columns, in base
    D, factors weighing alike unless nothing predicts them. Of one factor, or one code, the entropy
    is 0.

    Args:
        codes: (n, D).
        factors: numbers, (n, K).
        predictor: `"boosting"`: gradient-boosted trees, whose importances are those of
            scikit-learn; `"lasso"`: linear, its penalty by cross-validation, the importances being
            the absolute weights of standardised codes.
        seed: of split and trees.

    Raises:
        ValueError: unknown predictor, or see `scored`.
        ImportError: scikit-learn is not installed; the message names the extra.
    """
    check_installed()
    from sklearn.ensemble import GradientBoostingRegressor
    from sklearn.linear_model import LassoCV

    if predictor not in PREDICTORS:
        raise ValueError(f"unknown predictor {predictor!r}; choose one of {', '.join(PREDICTORS)}.")
    codes, factors = _checked(codes, factors)
    codes = _standardised(codes)
    rows = np.random.default_rng(seed).permutation(len(codes))
    train, test = np.split(rows, [3 * len(rows) // 4])
    importance, r2 = np.zeros((codes.shape[1], factors.shape[1])), []
    for k, factor in enumerate(_standardised(factors).T):
        if predictor == "boosting":
            model = GradientBoostingRegressor(subsample=0.5, random_state=seed).fit(
                codes[train], factor[train]
            )
            importance[:, k] = model.feature_importances_
        else:
            model = LassoCV(cv=_FOLDS, max_iter=5000).fit(codes[train], factor[train])
            importance[:, k] = np.abs(model.coef_)
        r2.append(max(0.0, model.score(codes[test], factor[test])))
    disentanglement, completeness = (
        concentration(importance),
        concentration(importance.T / _nonzero(importance.sum(0))[:, None]),
    )
    return DCI(disentanglement, completeness, float(np.mean(r2)), importance)


def concentration(importance: np.ndarray) -> float:
    """Mean of 1 - normalised entropy of the rows of importances (a, b), in base b, weighed by their
    sums; 0 if all are 0.
    """
    totals = importance.sum(1)
    share = importance / _nonzero(totals)[:, None]
    entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(1) / np.log(
        max(2, importance.shape[1])
    )
    return float(((1 - entropy) * totals).sum() / _nonzero(totals.sum()))


def mig(codes: np.ndarray, factors: np.ndarray) -> float:
    """Mutual information gap (Chen et al. 2018): of each factor, the difference of its two largest
    mutual informations with a code, over its entropy; mean over factors. With one code only, the
    second largest is 0.

    What takes more than 20 values is binned by its quantiles, so that the gap is blind to monotone
    maps of a code.

    Args:
        codes: (n, D).
        factors: (n, K).

    Raises:
        ValueError: see `scored`.
    """
    codes, factors = _checked(codes, factors)
    columns, targets = ([_binned(column) for column in x.T] for x in (codes, factors))
    gaps = []
    for factor in targets:
        information = sorted(_mutual_information(code, factor) for code in columns)
        second = information[-2] if len(information) > 1 else 0.0
        gaps.append((information[-1] - second) / _mutual_information(factor, factor))
    return float(np.mean(gaps))


def sap(codes: np.ndarray, factors: np.ndarray) -> float:
    """Separated attribute predictability (Kumar et al. 2018), for factors that are numbers: of each
    factor, the difference of the two largest R^2 with which a single code predicts it linearly;
    mean over factors. With one code only, the second largest is 0.

    Args:
        codes: (n, D).
        factors: (n, K).

    Raises:
        ValueError: see `scored`.
    """
    codes, factors = _checked(codes, factors)
    r2 = np.sort(
        np.vstack([np.zeros(factors.shape[1]), correlations(codes, factors) ** 2]), axis=0
    )  # (1 + D, K)
    return float((r2[-1] - r2[-2]).mean())


def mcc(codes: np.ndarray, factors: np.ndarray, correlation: str = "linear") -> float:
    """Mean absolute correlation of the true factors with the codes, matched one to one so that it
    is largest.

    Args:
        codes: (n, D). If D < K, a factor without a code counts as 0.
        factors: (n, K).
        correlation: `"linear"`, or `"spearman"`, which is blind to monotone maps.

    Raises:
        ValueError: unknown correlation, or see `scored`.
    """
    if correlation not in CORRELATIONS:
        raise ValueError(
            f"unknown correlation {correlation!r}; choose one of {', '.join(CORRELATIONS)}."
        )
    codes, factors = _checked(codes, factors)
    if correlation == "spearman":
        codes, factors = rankdata(codes, axis=0), rankdata(factors, axis=0)
    return _matched(np.abs(correlations(codes, factors)))


def block_mcc(blocks: np.ndarray, factors: np.ndarray) -> float:
    """`mcc` of blocks of codes: in place of a correlation stands that of the factor with its linear
    prediction from the whole block, on held-out samples (five folds), 0 at least.

    Args:
        blocks: (n, D, width).
        factors: (n, K).

    Raises:
        ValueError: blocks of another shape, or see `scored`.
    """
    return _matched(np.maximum(block_correlations(blocks, factors), 0))


def block_correlations(blocks: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Correlation of each factor (n, K) with its linear prediction from each whole block (n, D,
    width) on held-out samples, (D, K). The matrix that `block_mcc` matches; about 0, and as often
    below, where a block says nothing.

    Raises:
        ValueError: see `block_mcc`.
    """
    blocks = np.asarray(blocks)
    if blocks.ndim != 3:
        raise ValueError(
            f"blocks of codes must have the shape (samples, blocks, width), not {blocks.shape}."
        )
    flat, factors = _checked(blocks.reshape(len(blocks), -1), factors)
    blocks = flat.reshape(*blocks.shape)
    folds = np.arange(len(blocks)) % _FOLDS
    found = np.zeros((blocks.shape[1], factors.shape[1]))
    for j in range(blocks.shape[1]):
        design = np.column_stack([_standardised(blocks[:, j]), np.ones(len(blocks))])
        predicted = np.empty_like(factors)
        for fold in range(_FOLDS):
            train, test = folds != fold, folds == fold
            predicted[test] = (
                design[test] @ np.linalg.lstsq(design[train], factors[train], rcond=None)[0]
            )
        found[j] = [
            correlations(predicted[:, [k]], factors[:, [k]])[0, 0] for k in range(factors.shape[1])
        ]
    return found


def correlations(codes: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Correlation of each code (n, D) with each factor (n, K), (D, K); 0 of one that never changes."""  # noqa: E501
    return _standardised(codes).T @ _standardised(factors) / len(codes)


def two_sample_test(
    a: np.ndarray, b: np.ndarray, level: float = 0.95, seed: int = 0
) -> TwoSampleTest:
    """Can two sets of samples be told apart? A classifier learns on one half of both and is asked
    about the other (Lopez-Paz and Oquab, arXiv:1610.06545). It is made of boosted trees on the
    leading principal components.

    As many are used of the larger set as there are of the smaller. An accuracy about 0.5 says that
    *this* classifier cannot tell them: more samples or a better one might.

    Args:
        a, b: (n, ...) and (m, ...).
        level: of the interval (Wilson's).
        seed: of split and classifier.

    Raises:
        ValueError: samples of two shapes, too few, NaN or infinity.
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
            f"a two-sample test needs at least {MIN_SAMPLES} samples a side, not {size}."
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


def principal_components(samples: np.ndarray, components: int, seed: int = 0) -> np.ndarray:
    """Leading principal components of samples (n, dimensions), at most `components`; (n,
    dimensions) as it is if it has no more.

    Raises:
        ValueError: NaN or infinity.
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


def _checked(
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


def _matched(found: np.ndarray) -> float:
    return float(found[linear_sum_assignment(found, maximize=True)].sum() / found.shape[1])


def _standardised(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(0)) / _nonzero(
        x.std(0) * (x.min(0) < x.max(0))
    )  # rounding gives a constant a spread


def _nonzero(x: np.ndarray) -> np.ndarray:
    return np.where(x == 0, 1, x)


def _binned(column: np.ndarray) -> np.ndarray:
    values, index = np.unique(column, return_inverse=True)
    if len(values) <= _BINS:
        return index
    return np.searchsorted(np.quantile(column, np.arange(1, _BINS) / _BINS), column, side="right")


def _mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    joint = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(joint, (a, b), 1 / len(a))
    independent = joint.sum(1, keepdims=True) * joint.sum(0)
    seen = joint > 0
    return float((joint[seen] * np.log(joint[seen] / independent[seen])).sum())
