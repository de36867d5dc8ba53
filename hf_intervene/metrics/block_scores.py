"""Scores of whole blocks of codes, given the true factors (METHOD section 5).

A code here is a block of several numbers, and a concept may lie on a curve in it. So each factor is
predicted from all entries of each block, and the predictions on held-out samples take the place of
single codes in MIG, SAP and MCC (`disentanglement.py`). By data processing they know no more of a
factor than the block does. The importance of a block for a factor, in DCI, is the R^2 of the
prediction from it alone. Informativeness is the R^2 of the prediction from all blocks together.

Predictions are linear, or by kernel ridge regression (`sklearn.kernel_ridge`).
"""

from collections.abc import Sequence
from typing import cast

import numpy as np

from .disentanglement import (
    FOLDS,
    Score,
    binned,
    checked,
    concentration,
    correlations,
    matched,
    mutual_information,
    scored,
    standardised,
)
from .results import check_installed


BLOCK_PREDICTORS = ("linear", "kernel")
_RIDGE = 0.3
_ROWS = 2000  # training samples of a fold at most: a kernel takes their square of memory


def measure_blocks(
    blocks: np.ndarray,
    factors: np.ndarray,
    own: Sequence[int] | None = None,
    resamples: int = 50,
    seed: int = 0,
    untrained: np.ndarray | None = None,
) -> dict[str, Score]:
    """Compute all scores of blocks of codes, each with floor, interval and an untrained model's.

    Intervals are over halves of the held-out predictions, which are made once.

    Args:
        blocks: (n, D, width).
        factors: (n, K).
        own: of each concept the column of its factor; concept j has block j. `None`: no
            `own_block` and `other_block`.
        resamples, seed, untrained: see `scored`.

    Returns:
        `Score` by name: `mcc_linear`, and by kernel regression `mcc`, `mig`, `sap`,
        `disentanglement`, `completeness` and `informativeness`. With `own` also `own_block`, the
        correlation of a concept's factor with its prediction from its own block, and `other_block`,
        that from the best other one, free blocks included; means over concepts.

    Raises:
        ValueError: blocks of another shape, an entry of `own` without a block or factor, or see
            `scored`.
        ImportError: scikit-learn is not installed; the message names the extra.
    """
    check_installed()
    blocks = _checked_blocks(blocks)
    shape = blocks.shape[1], np.shape(factors)[-1]
    if own is not None and (len(own) > shape[0] or not set(own) <= set(range(shape[1]))):
        raise ValueError(
            f"own must name a column of {shape[1]} factors for each of at most {shape[0]} blocks,"
            f" not {list(own)}."
        )

    def linear(predictions: np.ndarray, factors: np.ndarray) -> dict[str, float]:
        return {"mcc_linear": matched(_at_least_0(predictions, factors))}

    def by_kernel(predictions: np.ndarray, factors: np.ndarray) -> dict[str, float]:
        found = _at_least_0(predictions, factors)  # (D + 1, K), the last row of all blocks
        together, found = found[-1], found[:-1]
        importance, columns = found**2, np.maximum((found**2).sum(0), 1e-12)
        scores = {
            "mcc": matched(found),
            "mig": _gap(_predicted_information(predictions[:, :-1], factors)),
            "sap": _gap(importance),
            "disentanglement": concentration(importance),
            "completeness": concentration((importance / columns).T),
            "informativeness": float((together**2).mean()),
        }
        if own is not None:
            picked = found[:, list(own)]  # (D, concepts)
            of_itself = np.eye(*picked.shape) == 1
            scores["own_block"] = float(picked[of_itself].mean())
            scores["other_block"] = float(np.where(of_itself, 0, picked).max(0).mean())
        return scores

    def predict_linearly(codes: np.ndarray) -> np.ndarray:
        return block_predictions(codes, factors)

    def predict(codes: np.ndarray) -> np.ndarray:
        together = codes.reshape(len(codes), 1, -1)
        return np.concatenate(
            [block_predictions(x, factors, "kernel") for x in (codes, together)], 1
        )

    return {
        name: score
        for function, prepare in ((linear, predict_linearly), (by_kernel, predict))
        for name, score in cast(
            dict[str, Score],
            scored(function, blocks, factors, resamples, seed, untrained, prepare),
        ).items()
    }


def block_mcc(blocks: np.ndarray, factors: np.ndarray, predictor: str = "linear") -> float:
    """Compute `mcc` for blocks of codes.

    The correlation of a factor with a block is that with its prediction from the whole block, on
    held-out samples (five folds). It is at least 0.

    Args:
        blocks: (n, D, width).
        factors: (n, K).
        predictor: see `block_predictions`.

    Raises:
        ValueError, ImportError: see `block_predictions`.
    """
    return matched(np.maximum(block_correlations(blocks, factors, predictor), 0))


def block_correlations(
    blocks: np.ndarray, factors: np.ndarray, predictor: str = "linear"
) -> np.ndarray:
    """Return the correlations that `block_mcc` matches, (D, K).

    They are those of each factor with its prediction from each block, on held-out samples. For a
    block that is independent of the factor they are about 0, with either sign.

    Args:
        blocks: (n, D, width).
        factors: (n, K).
        predictor: see `block_predictions`.

    Raises:
        ValueError, ImportError: see `block_predictions`.
    """
    predictions = block_predictions(blocks, factors, predictor)
    return _predicted_correlations(predictions, np.asarray(factors, dtype=np.float64))


def block_predictions(
    blocks: np.ndarray, factors: np.ndarray, predictor: str = "linear"
) -> np.ndarray:
    """Predict each factor from each whole block, on held-out samples (five folds).

    Args:
        blocks: (n, D, width).
        factors: (n, K).
        predictor: `"linear"`: least squares. `"kernel"`: kernel ridge regression of standardised
            entries, with exp(-|a - b|^2 / width) and a penalty of 0.3, on at most 2,000 samples of
            the others.

    Returns:
        (n, D, K).

    Raises:
        ValueError: unknown predictor, blocks of another shape, or see `scored`.
        ImportError: scikit-learn is not installed, which `"kernel"` needs.
    """
    if predictor not in BLOCK_PREDICTORS:
        raise ValueError(
            f"unknown predictor {predictor!r}; choose one of {', '.join(BLOCK_PREDICTORS)}."
        )
    if predictor == "kernel":
        check_installed()
    blocks, factors = checked(_checked_blocks(blocks), factors)
    folds = np.arange(len(blocks)) % FOLDS
    predictions = np.empty((*blocks.shape[:2], factors.shape[1]))
    for j in range(blocks.shape[1]):
        block = standardised(blocks[:, j])  # (n, width)
        for fold in range(FOLDS):
            train, test = np.flatnonzero(folds != fold), folds == fold
            if predictor == "kernel":
                predictions[test, j] = _kernel(block, factors, train[:_ROWS], test)
            else:
                design = np.column_stack([block, np.ones(len(block))])
                weights = np.linalg.lstsq(design[train], factors[train], rcond=None)[0]
                predictions[test, j] = design[test] @ weights
    return predictions


def _kernel(
    block: np.ndarray, factors: np.ndarray, train: np.ndarray, test: np.ndarray
) -> np.ndarray:
    from sklearn.kernel_ridge import KernelRidge

    middle = factors[train].mean(0)
    ridge = KernelRidge(alpha=_RIDGE, kernel="rbf", gamma=1 / block.shape[1])
    return middle + ridge.fit(block[train], factors[train] - middle).predict(block[test])


def _checked_blocks(blocks: np.ndarray) -> np.ndarray:
    blocks = np.asarray(blocks)
    if blocks.ndim != 3:
        raise ValueError(
            f"blocks of codes must have the shape (samples, blocks, width), not {blocks.shape}."
        )
    return blocks


def _predicted_correlations(predictions: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Correlations of predictions (n, D, K) with their factors (n, K), (D, K)."""
    columns = [
        correlations(predictions[..., k], factors[:, [k]])[:, 0] for k in range(factors.shape[1])
    ]
    return np.stack(columns, axis=1)


def _at_least_0(predictions: np.ndarray, factors: np.ndarray) -> np.ndarray:
    return np.maximum(_predicted_correlations(predictions, factors), 0)


def _predicted_information(predictions: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Mutual information of predictions with their factors, over the factor's entropy, (D, K)."""
    found = np.zeros(predictions.shape[1:])
    for k, factor in enumerate(binned(column) for column in factors.T):
        entropy = mutual_information(factor, factor)
        for j in range(len(found)):
            found[j, k] = mutual_information(binned(predictions[:, j, k]), factor) / entropy
    return found


def _gap(found: np.ndarray) -> float:
    """Mean over factors of the difference between the two largest entries of a column, (D, K); the
    second is 0 of one block.
    """
    ordered = np.sort(np.vstack([np.zeros(found.shape[1]), found]), axis=0)
    return float((ordered[-1] - ordered[-2]).mean())
