"""Counterfactual error: how far edited images are from their true answers, where there are twins
(METHOD section 1, task 3).

Twins are images of the same individual in two contexts. An edit of the one has the other as its
true answer. Three distances tell how to read the error: that of the image left as it is (doing
nothing), that of the model's own reconstruction of the true answer (the best that its decoder can
do), and that of the same individual with another one's change (`another_change`). An intervention
draws the concept anew: which of 14 glasses a person wears in the true answer nobody can know.
"""

from dataclasses import asdict, dataclass

import numpy as np
from scipy.stats import bootstrap


_CHANGED = 1 / 255  # of a pixel in [0, 1]: less is rounding


@dataclass
class CounterfactualError:
    """Distances are root mean squares over pixels and channels in [0, 1], averaged over the images.

    Args:
        edited: distance of the edited images to the true answers.
        edited_interval: its 95 % interval.
        unedited: distance of the images left as they are to the true answers.
        reconstructed: distance of the model's reconstruction of the true answers to them.
        ratio: `edited` over `unedited`; 1 is no better than doing nothing. `None` if the true
            answer changes nothing.
        ratio_interval: its 95 % interval, or `None`.
        another: distance of `another_change` to the true answers: right in all but in what was
            drawn.
        outside: share of what the edit changes that lies on pixels which the true answer leaves
            alone; `None` if nothing changes.
        outside_floor: the same of the change from the model's reconstruction of the image to that
            of the true answer.
        images: how many pairs.
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

    def to_dict(self) -> dict:
        """As JSON holds it."""
        return asdict(self)


def counterfactual_error(
    before: np.ndarray,
    truth: np.ndarray,
    edited: np.ndarray,
    returned: np.ndarray,
    returned_truth: np.ndarray,
    seed: int = 0,
) -> CounterfactualError:
    """Error of edits whose true answers are known. All images (n, H, W, C), uint8 or float in [0,
    1]; row i is one individual.

    Args:
        before: real images.
        truth: their true answers: the same individuals in the context that `before` was edited to.
        edited: `before`, edited by the model.
        returned: `before` as the model returns it when nothing is changed.
        returned_truth: `truth` likewise.
        seed: of the bootstrap (paired, over the images).

    Raises:
        ValueError: images of different shapes, or fewer than two.
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
    """Each individual with what the true answer of another one, drawn by chance, changes: its
    pixels there. float, (n, H, W, C), of images as in `counterfactual_error`."""
    shift = np.random.default_rng(seed).integers(1, len(truth))
    other, moved = np.roll(truth, shift, 0), np.roll(np.abs(truth - before), shift, 0)
    return np.where((moved >= _CHANGED / 2).any(-1, keepdims=True), other, before)


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Root mean square over pixels and channels of each image, (n,)."""
    return np.sqrt(np.square(a - b).mean((1, 2, 3), dtype=np.float64))


def _ratio_of_means(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
    return a.mean(axis=axis) / b.mean(axis=axis)


def _share(change: np.ndarray, where: np.ndarray) -> float | None:
    total = float(change.sum(dtype=np.float64))
    return float((change * where).sum(dtype=np.float64)) / total if total else None
