"""Leakage of residual latents: what of the concepts sits in the residual noise, where interventions
do not reach it.

Under the model, residual noise that is drawn from the posterior is N(0, I) whatever the context
(that of posterior means is not). `context_leakage` says how far that holds of a trained one: how
well a context can be told from the noise."""

from dataclasses import asdict, dataclass

import numpy as np


_COMPONENTS = 64  # of the principal components that the classifier reads
FOLDS = 5


@dataclass
class LeakageResult:
    """
    Args:
        accuracy: cross-validated balanced accuracy of telling the context from the residual noise.
        interval: its 95 % interval.
        chance: the accuracy without leakage, 1 / number of contexts.
    """

    accuracy: float
    interval: tuple[float, float]
    chance: float

    def to_dict(self) -> dict:
        """As JSON holds it."""
        return asdict(self)


def check_installed() -> None:
    """Raise an ImportError that names the extra if scikit-learn is not installed."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'measuring leakage needs scikit-learn: pip install "hf-intervene[eval]".'
        ) from error


def context_leakage(residuals: np.ndarray, contexts: np.ndarray, seed: int = 0) -> LeakageResult:
    """How well a logistic regression tells the context from residual noise.

    It reads the noise's leading principal components, their squares and the mean square of all:
    contexts may differ in spread alone.

    Args:
        residuals: residual noise of held-out images, (N, ...).
        contexts: context of each, (N,).
        seed: of the folds.

    Raises:
        ImportError: scikit-learn is not installed; the message names the extra.
        ValueError: fewer than two contexts, or one with fewer images than folds.
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
    flat = residuals.reshape(len(residuals), -1).astype(np.float64)
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
    # Contexts are drawn independently: the variance of their mean is the sum of theirs over the
    # square of their number.
    margin = 1.96 * np.sqrt(sum(p * (1 - p) / n for p, n in zip(by_context, counts))) / len(names)
    return LeakageResult(accuracy, (accuracy - margin, accuracy + margin), 1 / len(names))


def _mean_square(x: np.ndarray) -> np.ndarray:
    return (x**2).mean(1, keepdims=True)


def _with_squares(x: np.ndarray) -> np.ndarray:
    return np.hstack([x, x**2])
