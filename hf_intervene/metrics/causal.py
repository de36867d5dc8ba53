"""Which concept moves which, read off a trained intervention layer, and how far such readings agree
with the truth.

Two readings:

    from weights       `block_effects`: with the paper's head every c_i is linear in the exogenous eps of all blocks, c = T eps + bias,
                       T depending on the targets (`total_effect_operator`): the size of its blocks, scaled by the spread of eps_j
    from interventions `intervention_moves`: how far the distribution of c_i moves when block j is intervened on

What a model identifies of these is little. Blocks are determined up to maps within a block: a norm
of a block of W alone means nothing. Scaled by the spread of eps_j, and measured in the embedding
that the decoder reads (`readout`), it does not depend on the basis of either block, nor on
directions of c_i that no decoder hears. It still depends on where training left the noise of a
concept: several head parameters have one distribution of images, as soon as a block is wide enough
to carry the noise of another, or the decoder mixes blocks. Unobserved common causes look like
effects, or vanish into free blocks. So the agreement with the truth is something to measure."""  # noqa: E501

import math
from dataclasses import asdict, dataclass
from itertools import permutations

import numpy as np
import torch
from scipy.stats import rankdata

from ..contexts import OBS
from ..modeling_intervention import InterventionHead
from ..structural import InterventionLayer


_EXACT = 7  # up to so many concepts all relabellings are tried
_RELABELLINGS = 2000  # of more


@dataclass
class Agreement:
    """How far the entries off the diagonal of a matrix (d, d) agree with the truth.

    The floors are means over relabellings of the concepts, rows and columns alike, which keep
    whatever structure the matrix has (Mantel, 1967; the quadratic assignment procedure of Hubert
    and Schultz, 1976); p is the share of them that do at least as well, the identity included. NaN
    where the truth has no effect, or nothing but effects.

    Args:
        auroc: probability that a true effect has the larger entry than a pair without one; 0.5 is
            chance.
        auroc_floor, auroc_p: see above.
        rank: Spearman correlation with the absolute true effects.
        rank_floor, rank_p: see above.
        direction: share of the pairs with an effect one way whose larger entry is that way; 0.5 is
            chance.
    """

    auroc: float
    auroc_floor: float
    auroc_p: float
    rank: float
    rank_floor: float
    rank_p: float
    direction: float

    def to_dict(self) -> dict:
        """As JSON holds it."""
        return asdict(self)


@torch.no_grad()
def total_effect_operator(
    layer: torch.nn.Module, targets: torch.Tensor | None = None
) -> np.ndarray:
    """T of c = T eps + bias, (D, w, D, w): `[i, :, j, :]` is the block from eps_j to c_i, along all
    the paths that the layer follows.

    The structural form gives the sum of the powers of W up to its number of steps, the reduced form
    the identity and W_obs, its columns of W_int where the targets say so; with targets the rows of
    what is intervened on are cut if interventions are perfect.

    Args:
        layer: an intervention layer.
        targets: (D,), entries in [0, 1]; `None`: observational.

    Raises:
        TypeError: the layer of a head with flows, in which effects are not linear.
    """
    if not isinstance(layer, InterventionLayer):
        raise TypeError(
            "effects are not linear in a head with flows: read them off draws, by"
            " `intervention_moves`."
        )
    blocks, width = layer.bias.shape
    basis = torch.eye(blocks * width, dtype=layer.bias.dtype, device=layer.bias.device).view(
        -1, blocks, width
    )
    s = torch.zeros(blocks) if targets is None else targets
    c = (
        layer(basis, s.to(basis.device).expand(len(basis), -1)[..., None]) - layer.bias
    )  # (D w, D, w): one input unit a row
    return c.double().permute(1, 2, 0).unflatten(2, (blocks, width)).cpu().numpy()


def block_effects(
    operator: np.ndarray, eps: np.ndarray, readout: np.ndarray | None = None
) -> np.ndarray:
    """Share of each c_i, as a standard deviation, that comes from eps_j, (D, D): |U_i T_ij
    S_j^(1/2)| over the root of the total variance of U_i c_i, in Frobenius norms, S_j the
    covariance of eps_j. The squares of a row sum to 1.

    Args:
        operator: T, (D, w, D, w).
        eps: draws, (n, D, w). Blocks are independent, as they are under the prior.
        readout: U, (D, w, E); `None`: the identity, in which the result depends on the basis of
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
    """How far each c_i moves under each intervention, in observational standard deviations: of its
    mean, and of its Gaussian approximation (2-Wasserstein, or Frechet, distance), each (D,
    interventions). The root of the total variance of U_i c_i is the unit.

    Args:
        obs: draws of c, (n, D, w).
        intervened: of each intervention, (interventions, m, D, w).
        readout: U, (D, w, E); see `block_effects`.
    """
    means, distances = np.zeros((2, obs.shape[1], len(intervened)))
    for i in range(obs.shape[1]):
        # c_i in coordinates in which distances are those of U_i c_i.
        basis = np.eye(obs.shape[2]) if readout is None else np.linalg.qr(readout[i].T)[1].T
        before = obs[:, i] @ basis
        unit = math.sqrt(max(before.var(0).sum(), 1e-300))
        for k, draws in enumerate(intervened):
            after = draws[:, i] @ basis
            means[i, k] = np.linalg.norm(after.mean(0) - before.mean(0)) / unit
            distances[i, k] = math.sqrt(means[i, k] ** 2 + _bures(before, after) / unit**2)
    return means, distances


def agreement(learnt: np.ndarray, true: np.ndarray, seed: int = 0) -> Agreement:
    """Agreement of magnitudes with the truth, off the diagonal.

    Args:
        learnt: magnitudes of the effects of j on i, (d, d).
        true: true effects, (d, d); 0 where there is none. The sign does not count.
        seed: of the relabellings of more than seven concepts.
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
    relabelled = np.stack(
        [learnt[np.ix_(order, order)][off] for order in orders]
    )  # the first is as it is
    target, positive = true[off], true[off] > 0
    ranks = rankdata(relabelled, axis=1)
    found = {"auroc": _auroc(ranks, positive), "rank": _row_correlations(ranks, rankdata(target))}
    one_way = (true > 0) & ~(true.T > 0) & off
    larger = np.where(learnt == learnt.T, 0.5, learnt > learnt.T)
    scores: dict[str, float] = {}
    for name, values in found.items():
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
    """Draws of a head under the prior, all of the same noise z.

    Returns:
        eps, observational and with every concept intervened on, (2, n, D, w); c in each of the
        given contexts, (contexts, n, D, w).
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
    """T, (D, w, D, w), each concept's columns those of the context in which it alone is intervened
    on; the free blocks' observational.
    """
    operator = total_effect_operator(head.intervention)
    for j, concept in enumerate(head.config.concepts):
        operator[:, :, j] = total_effect_operator(head.intervention, head.targets(concept)[0])[
            :, :, j
        ]
    return operator


def head_readout(head: InterventionHead) -> np.ndarray:
    """U of e = sum_j U_j c_j + b, (D, w, E), as float64."""
    blocks = head.config.num_blocks
    return (
        head.unpool.weight.detach()
        .double()
        .cpu()
        .numpy()
        .T.reshape(blocks, head.config.concept_width, -1)
    )


def _bures(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Bures distance of the covariances of draws (n, w) and (m, w)."""
    first, second = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    # The trace of (A^(1/2) B A^(1/2))^(1/2) is the sum of the roots of the eigenvalues of A B.
    cross = np.sqrt(np.maximum(np.linalg.eigvals(first @ second).real, 0)).sum()
    return max(0.0, float(np.trace(first) + np.trace(second) - 2 * cross))


def _auroc(ranks: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """AUROC of each row of ranks (orders, entries)."""
    n, m = positive.sum(), (~positive).sum()
    if n == 0 or m == 0:
        return np.full(len(ranks), math.nan)
    return (ranks[:, positive].sum(1) - n * (n + 1) / 2) / (n * m)


def _row_correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a - a.mean(1, keepdims=True), b - b.mean()
    scale = np.sqrt(np.square(a).sum(1) * np.square(b).sum())
    return a @ b / np.where(scale > 0, scale, math.nan)
