"""Leakage: information about concepts in the residual noise, which interventions do not change.

In the model, residual noise that is drawn from the posterior is N(0, I) in every context (posterior
means are not). `context_leakage` measures how far this is true for a trained model: how well a
classifier predicts the context from the noise.
"""

from dataclasses import dataclass

import numpy as np

from .results import Result
from .results import check_installed as check_installed


_COMPONENTS = 64  # number of principal components that the classifier uses
FOLDS = 5


@dataclass
class LeakageResult(Result):
    """Result of `context_leakage`.

    Args:
        accuracy: cross-validated balanced accuracy of predicting the context from residual noise.
        interval: its 95 % interval.
        chance: the accuracy without leakage, 1 / number of contexts.
    """

    accuracy: float
    interval: tuple[float, float]
    chance: float


def context_leakage(residuals: np.ndarray, contexts: np.ndarray, seed: int = 0) -> LeakageResult:
    """Measure how well a logistic regression predicts the context from residual noise.

    Its input are the leading principal components of the noise, their squares and the mean square
    of all entries, because contexts may differ only in spread.

    Args:
        residuals: residual noise of held-out images, (N, ...).
        contexts: context of each, (N,).
        seed: seed of the folds.

    Raises:
        ImportError: scikit-learn is not installed; the message names the extra.
        ValueError: there are fewer than two contexts, one has fewer images than folds, the numbers
            of residuals and contexts differ, or a value is NaN or infinite.
    """
    check_installed()
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline, make_union
    from sklearn.preprocessing import FunctionTransformer, StandardScaler

    names, labels, counts = np.unique(contexts, return_inverse=True, return_counts=True)
    if len(names) < 2 or counts.min() < FOLDS:
        raise ValueError(f"leakage needs at least two contexts of {FOLDS} images each.")
    if len(residuals) != len(labels):
        raise ValueError(
            f"{len(residuals)} residuals were given for {len(labels)} contexts: give one for each."
        )
    flat = residuals.reshape(len(residuals), -1).astype(np.float64)
    if not np.isfinite(flat).all():
        raise ValueError("residuals must be finite; some are NaN or infinite.")
    components = PCA(min(_COMPONENTS, flat.shape[1], len(flat) // 2), random_state=seed)
    classifier = make_pipeline(
        make_union(components, FunctionTransformer(_mean_square)),
        FunctionTransformer(_with_squares),
        StandardScaler(),
        LogisticRegression(C=0.1, max_iter=1000),
    )
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    right = cross_val_predict(classifier, flat, labels, cv=folds) == labels
    by_context = [right[labels == k].mean() for k in range(len(names))]
    accuracy = float(np.mean(by_context))
    # Contexts are drawn independently: the variance of the mean over contexts is the sum of their
    # variances divided by the square of their number.
    margin = 1.96 * np.sqrt(sum(p * (1 - p) / n for p, n in zip(by_context, counts))) / len(names)
    return LeakageResult(accuracy, (accuracy - margin, accuracy + margin), 1 / len(names))


def _mean_square(x: np.ndarray) -> np.ndarray:
    return (x**2).mean(1, keepdims=True)


def _with_squares(x: np.ndarray) -> np.ndarray:
    return np.hstack([x, x**2])
