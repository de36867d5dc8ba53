"""Counterfactual error: the distance of edited images from their true answers.

See METHOD section 1, task 3. It needs twins: images of the same individual in two contexts. The one
is the true answer to an edit of the other. Three distances help to read the error: that of the
unedited image, that of the model's reconstruction of the true answer (the best that its decoder can
do), and that of the same individual with the change of another one (`another_change`). An
intervention draws the concept at random: no model can know which of 14 glasses a person wears in
the true answer.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap

from .results import Result


_CHANGED = 1 / 255  # the smallest change of a pixel in [0, 1] that is not rounding


@dataclass
class CounterfactualError(Result):
    """Result of `counterfactual_error`.

    Distances are root mean squares over pixels in [0, 1] and channels, averaged over the images.

    Args:
        edited: distance of the edited images from the true answers.
        edited_interval: its 95 % interval.
        unedited: distance of the unedited images from the true answers.
        reconstructed: distance of the model's reconstructions of the true answers from them.
        ratio: `edited` / `unedited`; 1 is no better than no edit. `None` if the true answers are
            equal to the unedited images.
        ratio_interval: its 95 % interval, or `None`.
        another: distance of `another_change` from the true answers. That image is right except in
            what the intervention drew at random.
        outside: share of the edit's change that is on pixels which the true answer does not change;
            `None` if nothing changes.
        outside_floor: the same share of the change from the model's reconstruction of the image to
            that of the true answer.
        images: number of pairs.
    """

    edited: float
    edited_interval: tuple[float, float]
    unedited: float
    reconstructed: float
    ratio: float | None
    ratio_interval: tuple[float, float] | None
    another: float
    outside: float | None
    outside_floor: float | None
    images: int


def counterfactual_error(
    before: np.ndarray,
    truth: np.ndarray,
    edited: np.ndarray,
    returned: np.ndarray,
    returned_truth: np.ndarray,
    seed: int = 0,
) -> CounterfactualError:
    """Compute the error of edits whose true answers are known.

    All images are (n, H, W, C), uint8 or float in [0, 1]. Row i is one individual in each.

    Args:
        before: real images.
        truth: the true answers: the same individuals in the context of the edit.
        edited: `before`, edited by the model.
        returned: the model's output for `before` without an edit.
        returned_truth: the model's output for `truth` without an edit.
        seed: seed of the bootstrap (paired, over the images).

    Raises:
        ValueError: the images have different shapes, or there are fewer than two.
    """
    arrays = [np.asarray(x) for x in (before, truth, edited, returned, returned_truth)]
    if len({x.shape for x in arrays}) > 1 or arrays[0].ndim != 4 or len(arrays[0]) < 2:
        raise ValueError(
            "five arrays of one shape (n, H, W, C), n at least 2, are needed, not "
            f"{[x.shape for x in arrays]}."
        )
    before, truth, edited, returned, returned_truth = (
        x.astype(np.float32) / 255 if x.dtype == np.uint8 else x.astype(np.float32) for x in arrays
    )
    errors, idle, best = (_distances(x, truth) for x in (edited, before, returned_truth))
    still = np.all(np.abs(truth - before) < _CHANGED / 2, axis=-1, keepdims=True)  # (n, H, W, 1)

    def interval(*data: np.ndarray, statistic: object) -> tuple[float, float]:
        options = {
            "paired": True,
            "n_resamples": 1000,
            "method": "percentile",
            "rng": np.random.default_rng(seed),
        }
        found = bootstrap(data, statistic, vectorized=True, **options).confidence_interval
        return float(found.low), float(found.high)

    moves = bool(idle.mean() > 0)
    return CounterfactualError(
        float(errors.mean()),
        interval(errors, statistic=np.mean),
        float(idle.mean()),
        float(best.mean()),
        float(errors.mean() / idle.mean()) if moves else None,
        interval(errors, idle, statistic=_ratio_of_means) if moves else None,
        float(_distances(another_change(before, truth, seed), truth).mean()),
        _share(np.abs(edited - returned), still),
        _share(np.abs(returned_truth - returned), still),
        len(truth),
    )


def another_change(before: np.ndarray, truth: np.ndarray, seed: int = 0) -> np.ndarray:
    """Give each individual the pixels that the true answer of a random other one changes.

    Args:
        before, truth: float images as in `counterfactual_error`.
        seed: seed of the choice of the other individual.

    Returns:
        float images (n, H, W, C).
    """
    shift = np.random.default_rng(seed).integers(1, len(truth))
    other, moved = np.roll(truth, shift, 0), np.roll(np.abs(truth - before), shift, 0)
    return np.where((moved >= _CHANGED / 2).any(-1, keepdims=True), other, before)


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the root mean square over pixels and channels of each image, (n,)."""
    return np.sqrt(np.square(a - b).mean((1, 2, 3), dtype=np.float64))


def _ratio_of_means(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
    return a.mean(axis=axis) / b.mean(axis=axis)


def _share(change: np.ndarray, where: np.ndarray) -> float | None:
    total = float(change.sum(dtype=np.float64))
    return float((change * where).sum(dtype=np.float64)) / total if total else None
