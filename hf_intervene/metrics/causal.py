"""Effects between concepts in a trained intervention layer, and their agreement with the truth.

Two measures:

    from weights        `block_effects`: with the paper's head every c_i is linear in the exogenous
                        eps of all blocks, c = T eps + bias, where T depends on the targets
                        (`total_effect_operator`). The measure is the size of the blocks of T,
                        scaled by the spread of eps_j.
    from interventions  `intervention_moves`: how far the distribution of c_i moves when block j is
                        intervened on.

Data identify these effects only in part. A block is determined up to a map within the block, so
that the norm of a block of W alone has no meaning. Scaled by the spread of eps_j, and measured in
the embedding that the decoder takes (`readout`), it does not depend on the basis of either block,
nor on directions of c_i that the decoder ignores. It still depends on how training distributed the
noise of a concept: if a block is wide enough to carry the noise of another, or if the decoder mixes
blocks, several heads have the same distribution of images. Unobserved common causes can look like
effects, or move into free blocks. So the agreement with the truth must be measured.
"""

import math
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import torch
from scipy.stats import rankdata

from ..contexts import OBS
from ..modeling_intervention import InterventionHead
from ..structural import InterventionLayer
from .results import Result


_EXACT = 7  # up to this number of concepts all relabellings are used
_RELABELLINGS = 2000  # number of random relabellings of more concepts


@dataclass
class Agreement(Result):
    """Agreement of the entries off the diagonal of a matrix (d, d) with the truth.

    The floors are means over relabellings of the concepts, the same for rows and columns, which
    keep the structure of the matrix (Mantel, 1967; the quadratic assignment procedure of Hubert and
    Schultz, 1976). p is the share of relabellings, the identity included, with at least the same
    value. All are NaN if the truth has no effects, or an effect in every entry.

    Args:
        auroc: probability that the entry of a true effect is larger than that of a pair without an
            effect; 0.5 is chance.
        auroc_floor, auroc_p: see above.
        rank: Spearman correlation with the absolute true effects.
        rank_floor, rank_p: see above.
        direction: among the pairs with an effect in one direction, the share whose larger entry has
            this direction; 0.5 is chance.
    """

    auroc: float
    auroc_floor: float
    auroc_p: float
    rank: float
    rank_floor: float
    rank_p: float
    direction: float


@torch.no_grad()
def total_effect_operator(
    layer: torch.nn.Module, targets: torch.Tensor | None = None
) -> np.ndarray:
    """Return T of c = T eps + bias, (D, w, D, w), along all paths that the layer follows.

    `[i, :, j, :]` is the block from eps_j to c_i. In the structural form T is the sum of the powers
    of W up to the number of steps. In the reduced form it is the identity plus W_obs, with the
    columns of W_int for blocks that are intervened on. If interventions are perfect, the rows of
    these blocks have only the identity.

    Args:
        layer: an intervention layer.
        targets: (D,), entries in [0, 1]; `None` means observational.

    Raises:
        TypeError: the layer belongs to a head with flows, where effects are not linear.
    """
    if not isinstance(layer, InterventionLayer):
        raise TypeError(
            "effects are not linear in a head with flows: measure them on draws, with"
            " `intervention_moves`."
        )
    blocks, width = layer.bias.shape
    basis = torch.eye(blocks * width, dtype=layer.bias.dtype, device=layer.bias.device).view(
        -1, blocks, width
    )
    s = torch.zeros(blocks) if targets is None else targets
    s = s.to(basis.device).expand(len(basis), -1)[..., None]
    c = layer(basis, s) - layer.bias  # (D w, D, w): one input unit per row
    return c.double().permute(1, 2, 0).unflatten(2, (blocks, width)).cpu().numpy()


def block_effects(
    operator: np.ndarray, eps: np.ndarray, readout: np.ndarray | None = None
) -> np.ndarray:
    """Return the share of each c_i, as a standard deviation, that comes from eps_j, (D, D).

    It is |U_i T_ij S_j^(1/2)|, a Frobenius norm, divided by the root of the total variance of
    U_i c_i. S_j is the covariance of eps_j. The squares of a row sum to 1.

    Args:
        operator: T, (D, w, D, w).
        eps: draws, (n, D, w), whose blocks are independent, as under the prior.
        readout: U, (D, w, E). `None` means the identity; then the result depends on the basis of
            c_i.
    """
    width, blocks = eps.shape[2], eps.shape[1]
    readout = np.broadcast_to(np.eye(width), (blocks, width, width)) if readout is None else readout
    covariance = np.stack(
        [np.cov(eps[:, j], rowvar=False).reshape(width, width) for j in range(blocks)]
    )
    gram = np.einsum("iae,ibe->iab", readout, readout)
    variances = np.einsum(
        "iab,iajc,jcd,ibjd->ij", gram, operator, covariance, operator, optimize=True
    )
    variances = np.maximum(variances, 0)
    return np.sqrt(variances / np.maximum(variances.sum(1, keepdims=True), 1e-300))


def intervention_moves(
    obs: np.ndarray, intervened: np.ndarray, readout: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Measure how far the distribution of each c_i moves under each intervention.

    The unit is the observational standard deviation: the root of the total variance of U_i c_i.

    Args:
        obs: observational draws of c, (n, D, w).
        intervened: draws of c under each intervention, (interventions, m, D, w).
        readout: U, (D, w, E); see `block_effects`.

    Returns:
        The distance of the means, and the 2-Wasserstein (Frechet) distance of the Gaussian
        approximations, each (D, interventions).
    """
    means, distances = np.zeros((2, obs.shape[1], len(intervened)))
    for i in range(obs.shape[1]):
        # Coordinates of c_i in which distances are those of U_i c_i.
        basis = np.eye(obs.shape[2]) if readout is None else np.linalg.qr(readout[i].T)[1].T
        before = obs[:, i] @ basis
        unit = math.sqrt(max(before.var(0).sum(), 1e-300))
        for k, draws in enumerate(intervened):
            after = draws[:, i] @ basis
            means[i, k] = np.linalg.norm(after.mean(0) - before.mean(0)) / unit
            distances[i, k] = math.sqrt(means[i, k] ** 2 + _bures(before, after) / unit**2)
    return means, distances


def agreement(learnt: np.ndarray, true: np.ndarray, seed: int = 0) -> Agreement:
    """Measure the agreement of magnitudes with the truth, off the diagonal.

    Args:
        learnt: magnitudes of the effects of j on i, (d, d).
        true: true effects, (d, d); 0 for no effect. The sign is ignored.
        seed: seed of the relabellings of more than seven concepts.

    Raises:
        ValueError: the matrices are not square, or have different sizes.
    """
    learnt, true = (np.abs(np.asarray(x, dtype=np.float64)) for x in (learnt, true))
    if learnt.ndim != 2 or learnt.shape != true.shape or learnt.shape[0] != learnt.shape[1]:
        raise ValueError(
            f"two square matrices of one size are needed, not {learnt.shape} and {true.shape}."
        )
    d = len(learnt)
    off = ~np.eye(d, dtype=bool)
    if d <= _EXACT:
        orders = np.array(list(permutations(range(d))))
    else:
        rng = np.random.default_rng(seed)
        orders = np.array([np.arange(d), *(rng.permutation(d) for _ in range(_RELABELLINGS))])
    relabelled = np.stack([learnt[np.ix_(order, order)][off] for order in orders])
    target, positive = true[off], true[off] > 0
    ranks = rankdata(relabelled, axis=1)
    found = {"auroc": _auroc(ranks, positive), "rank": _row_correlations(ranks, rankdata(target))}
    one_way = (true > 0) & ~(true.T > 0) & off
    larger = np.where(learnt == learnt.T, 0.5, learnt > learnt.T)
    scores: dict[str, float] = {}
    for name, values in found.items():  # the first value is that of the identity
        known = not np.isnan(values[0])
        scores |= {
            name: float(values[0]),
            f"{name}_floor": float(values.mean()),
            f"{name}_p": float((values >= values[0] - 1e-12).mean()) if known else math.nan,
        }
    return Agreement(
        **scores, direction=float(larger[one_way].mean()) if one_way.any() else math.nan
    )


@torch.no_grad()
def head_draws(
    head: InterventionHead, interventions: list, samples: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Draw from a head under the prior, with the same noise z in all contexts.

    Args:
        head: the head.
        interventions: contexts, in any form of `contexts.py`.
        samples: n, the number of draws.
        seed: seed of the noise.

    Returns:
        eps, first observational, then with every concept intervened on, (2, n, D, w); and c in each
        of the given contexts, (contexts, n, D, w).
    """
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(samples, head.config.num_blocks, head.config.noise_width, generator=generator)
    z = z.to(head.device, head.dtype)
    strengths = [head.targets(context)[0] for context in (OBS, list(head.config.concepts))]
    eps = [head.mechanisms(z, s.to(z.dtype).expand(samples, -1)[..., None]) for s in strengths]
    c = [head(z, head.targets(context, samples)).concepts for context in interventions]
    both, drawn = (torch.stack(draws).double().cpu().numpy() for draws in (eps, c))
    return both, drawn


def single_interventions_operator(head: InterventionHead) -> np.ndarray:
    """Return T, (D, w, D, w), with the columns of each concept from its own context.

    That is the context in which only this concept is intervened on. The columns of free blocks are
    observational.
    """
    operator = total_effect_operator(head.intervention)
    for j, concept in enumerate(head.config.concepts):
        operator[:, :, j] = total_effect_operator(head.intervention, head.targets(concept)[0])[
            :, :, j
        ]
    return operator


def head_readout(head: InterventionHead) -> np.ndarray:
    """Return U of e = sum_j U_j c_j + b, (D, w, E), as float64."""
    blocks = head.config.num_blocks
    return (
        head.unpool.weight.detach()
        .double()
        .cpu()
        .numpy()
        .T.reshape(blocks, head.config.concept_width, -1)
    )


def _bures(a: np.ndarray, b: np.ndarray) -> float:
    """Return the squared Bures distance of the covariances of draws (n, w) and (m, w)."""
    first, second = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    # The trace of (A^(1/2) B A^(1/2))^(1/2) is the sum of the roots of the eigenvalues of A B.
    cross = np.sqrt(np.maximum(np.linalg.eigvals(first @ second).real, 0)).sum()
    return max(0.0, float(np.trace(first) + np.trace(second) - 2 * cross))


def _auroc(ranks: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Return the AUROC of each row of ranks (orders, entries)."""
    n, m = positive.sum(), (~positive).sum()
    if n == 0 or m == 0:
        return np.full(len(ranks), math.nan)
    return (ranks[:, positive].sum(1) - n * (n + 1) / 2) / (n * m)


def _row_correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a - a.mean(1, keepdims=True), b - b.mean()
    scale = np.sqrt(np.square(a).sum(1) * np.square(b).sum())
    return a @ b / np.where(scale > 0, scale, math.nan)
