"""How far the contexts change the data in linearly independent ways (METHOD section 6)."""

from collections.abc import Mapping, Sequence

import numpy as np


_PERMUTATIONS = 50


def shift_spectrum(obs: np.ndarray, contexts: Mapping[str, np.ndarray], seed: int = 0) -> dict:
    """Measure whether the contexts change the data in linearly independent ways.

    The shift of a context is the change of mean and covariance from `obs`, in coordinates in which
    `obs` has mean 0 and covariance I. The shifts of d contexts are the rows of a matrix. If a
    combination of shifts cancels, the matrix has a small singular value.

    Args:
        obs: (n, k).
        contexts: samples of each context, (n_j, k).
        seed: seed of the permutations.

    Returns:
        `hidden`: contexts whose shift is less than twice as long as one by chance; they are left
        out of the rest. `singular_values`: those of the other shifts, each divided by its length.
        `noise`: the 95 % quantile of the length of the smallest combination if samples are shuffled
        over the contexts; a combination that cancels is rarely longer. `closest`: the contexts of
        the combination with the smallest singular value.
    """
    names = list(contexts)
    pooled = np.concatenate([obs, *contexts.values()])
    edges = np.cumsum([len(obs), *map(len, contexts.values())])[:-1]
    shifts = _shifts(np.split(pooled, edges))
    rng = np.random.default_rng(seed)
    chance = np.stack(
        [_shifts(np.split(rng.permutation(pooled), edges)) for _ in range(_PERMUTATIONS)]
    )
    lengths = np.linalg.norm(shifts, axis=1)
    seen = np.flatnonzero(lengths > 2 * np.quantile(np.linalg.norm(chance, axis=2), 0.95, axis=0))
    result = {
        "hidden": [name for k, name in enumerate(names) if k not in seen],
        "singular_values": [],
        "noise": 0.0,
        "closest": [],
    }
    if len(seen):
        left, values, _ = np.linalg.svd(shifts[seen] / lengths[seen, None])
        weights = left[:, -1]
        cancelled = np.linalg.norm(
            np.einsum("k,pkm->pm", weights / lengths[seen], chance[:, seen]), axis=1
        )
        result["singular_values"], result["noise"] = (
            values.tolist(),
            float(np.quantile(cancelled, 0.95)),
        )
        result["closest"] = [
            names[k]
            for k, weight in zip(seen, np.abs(weights))
            if weight > np.abs(weights).max() / 3
        ]
    return result


def _shifts(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return the change of mean and covariance from the first part to each of the others.

    The shape is (parts - 1, k + k (k + 1) / 2).
    """
    obs, *others = parts
    covariance = np.cov(obs.T).reshape(obs.shape[1], -1)
    values, vectors = np.linalg.eigh(covariance)
    whiten = vectors / np.sqrt(np.maximum(values, 1e-6 * max(values[-1], 1e-12)))
    upper = np.triu_indices(obs.shape[1])
    # Entries off the diagonal occur twice in a symmetric matrix. All are halved, because a
    # covariance is of second order.
    weights = np.where(upper[0] == upper[1], 0.5, np.sqrt(0.5))
    rows = []
    for part in others:
        z = (part - obs.mean(0)) @ whiten
        change = np.cov(z.T).reshape(len(values), -1) - np.eye(len(values))
        rows.append(np.concatenate([z.mean(0), weights * change[upper]]))
    return np.stack(rows)
