"""Recovery of identifiable concepts on simulated data.

See METHOD section 6 and Markham et al., arXiv:2507.04754. The setting: x = f(e), with f injective
and differentiable. The concepts c_j = C_j e + noise_j follow a linear Gaussian SEM. The data x come
from the observational context and from a perfect intervention on each single concept. Only x and
its context are known.

`recovery_data.simulate` draws such data, and data that break one assumption. `recover` finds C_j e
from x, up to a linear map of each block:

1. *Contrast.* In the ratio of the densities of a context and the observational one, everything
   cancels except what the intervention replaced. So for any f the ratio depends on x only through
   C e. Without noise, with z = C e and A_k the edges into concept k,

       log p_k(x) / p_obs(x) = log N(z_k; m_k, V_k) - log N(z_k - A_k z; t_k, I),

   scaled so that the exogenous noise of `obs` has unit covariance. A network z = g(x) with these
   logits is trained to predict the context of x. This is a quadratic contrast, as in Buchholz et
   al., "Learning linear causal representations from interventions under general nonlinear mixing",
   arXiv:2306.02235. It finds z well up to a linear map. It decomposes each quadratic form poorly,
   because a difference of two squares can be written in several ways.
2. *Structure.* The encoded contexts are then Gaussian. They follow the SEM under each intervention,
   up to one linear map M. The likelihood, a function of the contexts' means and covariances, is
   maximised over M, the edges and the interventions. No causal order is given or imposed.

`score` compares the result with the truth on new observational samples.

Limit: step 1 does not make g injective. A ratio that is quadratic in one concept has the same value
on both sides of its vertex, so that g may fold there. The contexts of the concept's children
distinguish the sides. Folding was observed with two concepts and a weak edge.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.linalg import subspace_angles
from torch import nn
from torch.nn import functional as F

from .block_scores import block_mcc
from .recovery_data import Simulation, orthogonal, simulate


_HELD_OUT = 0.1  # share of the samples that choose the best step of the contrast
_CHECKS = 12  # number of evaluations on these samples


@dataclass
class Recovery:
    """Result of `recover`.

    Args:
        encoder: network from standardised x to z, up to a linear map.
        unmix: that map, M, (d * width, d * width).
        center, spread: mean and standard deviation with which x is standardised.
        width: dimensions of a concept.
        cross_entropy: cross-entropy of the contexts of held-out samples, in nats.
    """

    encoder: nn.Module
    unmix: np.ndarray
    center: np.ndarray
    spread: np.ndarray
    width: int
    cross_entropy: float

    def encode(self, x: np.ndarray) -> np.ndarray:
        """Return the concepts (n, d, width) of x (n, dimension), up to a linear map and a shift."""
        return (_run(self.encoder, (x - self.center) / self.spread) @ self.unmix.T).reshape(
            len(x), -1, self.width
        )


class ConceptEncoder(nn.Module):
    """The sum of a linear map and a network with two hidden layers: (B, inputs) to (B, outputs)."""

    def __init__(self, inputs: int, outputs: int, hidden: int = 128):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.network = nn.Sequential(
            nn.Linear(inputs, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, outputs),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.network(x)


class Structure(nn.Module):
    """The SEM and its interventions. The exogenous noise of `obs` is N(t, I).

    z has all concepts in one row, (B, d * width). V_k = (S_k' S_k)^-1, where S_k is upper
    triangular with a positive diagonal.

    Args:
        d: number of concepts.
        width: dimensions of a concept.
        own: the concepts that have a context of their own.
    """

    others: torch.Tensor
    targets: torch.Tensor

    def __init__(self, d: int, width: int, own: Sequence[int]):
        super().__init__()
        self.d, self.width, self.own = d, width, list(own)
        total = d * width
        self.edges = nn.Parameter(torch.zeros(total, total))
        self.noise_mean = nn.Parameter(torch.zeros(total))  # t
        self.means = nn.Parameter(torch.zeros(d, width))  # S_k m_k
        self.precisions = nn.Parameter(torch.zeros(d, width, width))
        block = torch.arange(total) // width
        self.register_buffer("others", (block[:, None] != block).float())
        targets = torch.tensor([-1, *self.own])[:, None] == block  # (1 + contexts, total)
        self.register_buffer("targets", targets.float())

    def roots(self) -> torch.Tensor:
        """Return S, (d, width, width)."""
        diagonal = self.precisions.diagonal(dim1=1, dim2=2)
        return torch.triu(self.precisions, 1) + torch.diag_embed(diagonal.exp())

    def logits(self, z: torch.Tensor) -> torch.Tensor:
        """Return log p_k / p_obs for `obs` (0) and each context in `own`, (B, 1 + contexts)."""
        noise = (z - z @ (self.edges * self.others).T - self.noise_mean).unflatten(
            1, (self.d, self.width)
        )
        new = (
            torch.einsum("kij,bkj->bki", self.roots(), z.unflatten(1, (self.d, self.width)))
            - self.means
        )
        log_determinant = self.precisions.diagonal(dim1=1, dim2=2).sum(1)  # (d,)
        ratios = (noise.square().sum(2) - new.square().sum(2)) / 2 + log_determinant  # (B, d)
        return F.pad(ratios[:, self.own], (1, 0))

    def whitening(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the matrices and offsets that map z of each context to N(0, I).

        The matrices are (contexts, d * width, d * width), the offsets (contexts, d * width).
        """
        total = self.d * self.width
        matrix = torch.eye(total, dtype=self.edges.dtype) - self.edges * self.others
        replaced = self.targets[:, :, None]  # (contexts, total, 1)
        matrices = (1 - replaced) * matrix + replaced * torch.block_diag(*self.roots())
        return matrices, (1 - self.targets) * self.noise_mean + self.targets * self.means.flatten()


def recover(
    observational: np.ndarray,
    interventional: Sequence[np.ndarray | None],
    width: int = 1,
    steps: int = 6000,
    batch_size: int = 512,
    seed: int = 0,
) -> Recovery:
    """Recover the concepts from data of all contexts; see the module docstring.

    Args:
        observational: x of the observational context, (n, dimension).
        interventional: x of the intervention on each concept, (n_j, dimension); `None` for a
            concept without a context.
        width: dimensions of a concept.
        steps: training steps of the contrast.
        batch_size: samples per step, of all contexts together.
        seed: seed of weights and batches.

    Raises:
        ValueError: there is no interventional context, or a context has fewer than 20 samples.
        FloatingPointError: the training diverged.
    """
    own = [k for k, x in enumerate(interventional) if x is not None]
    contexts = [
        np.asarray(x, dtype=np.float64) for x in (observational, *(interventional[k] for k in own))
    ]
    if not own or min(map(len, contexts)) < 20:
        raise ValueError(
            "recovery needs an observational and an interventional context with at least 20 samples"
            " each."
        )
    center, spread = np.concatenate(contexts).mean(0), np.concatenate(contexts).std(0)
    contexts = [(x - center) / spread for x in contexts]
    d = len(interventional)
    encoder, structure, cross_entropy = _contrast(contexts, own, d, width, steps, batch_size, seed)
    unmix = _structure([_run(encoder, x) for x in contexts], structure)
    return Recovery(encoder, unmix, center, spread, width, cross_entropy)


def _contrast(
    contexts: list[np.ndarray],
    own: list[int],
    d: int,
    width: int,
    steps: int,
    batch_size: int,
    seed: int,
) -> tuple[ConceptEncoder, Structure, float]:
    """Do step 1. Return the encoder, the structure, and the cross-entropy on held-out samples."""
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = ConceptEncoder(contexts[0].shape[1], d * width)
    structure = Structure(d, width, own)
    x = torch.from_numpy(np.concatenate(contexts)).float()
    y = torch.repeat_interleave(
        torch.arange(len(contexts)), torch.tensor([len(rows) for rows in contexts])
    )
    # If contexts have different sizes, the logits include the log of the prior odds.
    prior = torch.bincount(y).log()
    rows = torch.from_numpy(rng.permutation(len(x)))
    held_out, train = rows.split(
        [max(1, int(_HELD_OUT * len(x))), len(x) - max(1, int(_HELD_OUT * len(x)))]
    )
    parameters = [*encoder.parameters(), *structure.parameters()]
    optimizer = torch.optim.AdamW(parameters, 1e-2, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    best, best_state = float("inf"), None
    for step in range(1, steps + 1):
        batch = train[torch.from_numpy(rng.integers(len(train), size=min(batch_size, len(train))))]
        loss = F.cross_entropy(structure.logits(encoder(x[batch])) + prior, y[batch])
        optimizer.zero_grad()
        loss.backward()
        # The logits are quadratic: those of single samples can be huge.
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // _CHECKS) == 0 or step == steps:
            with torch.no_grad():
                value = float(
                    F.cross_entropy(structure.logits(encoder(x[held_out])) + prior, y[held_out])
                )
            if value < best:
                best = value
                best_state = copy.deepcopy((encoder.state_dict(), structure.state_dict()))
    if best_state is None:
        raise FloatingPointError("the contrast diverged: its loss is not finite.")
    for module, state in zip((encoder, structure), best_state):
        module.load_state_dict(state)
    return encoder.requires_grad_(False), structure, best


def _structure(contexts: list[np.ndarray], structure: Structure, starts: int = 6) -> np.ndarray:
    """Do step 2. Return the linear map (d * width, d * width) to the concepts.

    The likelihood has local maxima. The maximisation starts from the solution of step 1, from its
    directions alone, and from random directions, and the best result is used.

    Args:
        contexts: encoded contexts, (n, d * width).
        structure: the structure of step 1.
        starts: number of starts.
    """
    total = structure.d * structure.width
    covariance = np.cov(contexts[0].T, bias=True).reshape(total, total)
    values, vectors = np.linalg.eigh(covariance)
    # An encoded concept without a context of its own may be constant.
    whiten = (vectors / np.sqrt(np.maximum(values, 1e-6 * values[-1]))).T
    whitened = [(x - contexts[0].mean(0)) @ whiten.T for x in contexts]
    means = torch.from_numpy(np.stack([x.mean(0) for x in whitened]))
    ridge = 1e-4 * np.eye(total)
    covariances = torch.from_numpy(
        np.stack([np.cov(x.T, bias=True).reshape(total, total) + ridge for x in whitened])
    )
    shares = torch.tensor([len(x) for x in contexts], dtype=torch.float64)
    shares = shares / shares.sum()
    found = []
    for start in range(starts):
        first = np.linalg.inv(whiten)
        fresh = Structure(structure.d, structure.width, structure.own)
        if start == 0:
            # The encoded contexts are centred here, but not in step 1.
            fresh.load_state_dict(structure.state_dict())
            with torch.no_grad():
                shift = torch.from_numpy(contexts[0].mean(0)).float()
                fresh.noise_mean.sub_(shift - (fresh.edges * fresh.others) @ shift)
                fresh.means.sub_(
                    torch.einsum("kij,kj->ki", fresh.roots(), shift.view_as(fresh.means))
                )
        elif start > 1:
            first = orthogonal(total, total, np.random.default_rng(start))
        if start:
            first = first / np.linalg.norm(first, axis=1, keepdims=True)
        found.append(_maximum_likelihood(first, fresh.double(), means, covariances, shares))
    return min(found, key=lambda pair: pair[0])[1] @ whiten


def _maximum_likelihood(
    first: np.ndarray,
    structure: Structure,
    means: torch.Tensor,
    covariances: torch.Tensor,
    shares: torch.Tensor,
) -> tuple[float, np.ndarray]:
    """Minimise the negative log-likelihood of Gaussian contexts, starting from the map `first`.

    Returns:
        The minimum, up to a constant, and the map.
    """
    unmix = torch.from_numpy(first).requires_grad_()
    parameters = [unmix, *structure.parameters()]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=1000, history_size=30, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        matrices, offsets = structure.whitening()
        matrices = matrices @ unmix  # (contexts, d * width, d * width)
        spread = torch.einsum("kij,kjl,kil->k", matrices, covariances, matrices)
        centre = ((matrices @ means[:, :, None])[..., 0] - offsets).square().sum(1)
        return (shares * ((spread + centre) / 2 - torch.linalg.slogdet(matrices).logabsdet)).sum()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    value = float(loss().detach())
    return value if np.isfinite(value) else np.inf, unmix.detach().numpy()


def score(
    simulation: Simulation, recovery: Recovery, size: int = 4000, seed: int = 1_000_000
) -> dict:
    """Measure how well the concepts were recovered, on new observational samples.

    Returns:
        `mcc`: block MCC of the recovered blocks with each C_j e, averaged over the coordinates of a
        block. `floor`: that of a random rotation of all whitened C_j e: the result of chance if
        they are known only up to a linear map. `angle`: the largest principal angle between the
        rows of C_j and the linear map from e to the recovered block, in degrees, mean over
        concepts. `worst_angle`: the largest of these angles. `correlations`: those of each C_j e
        with its own block, (d,).
    """
    x, e = simulation.sample(0, size, seed)
    d, width, dimension = simulation.concepts.shape
    truth = (e @ simulation.concepts.reshape(-1, dimension).T).reshape(size, d, width)
    found = recovery.encode(x)
    flat = truth.reshape(size, -1)
    _, _, axes = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    spread = np.maximum((flat @ axes.T).std(0), 1e-9)
    rotated = (
        flat @ axes.T / spread @ orthogonal(d * width, d * width, np.random.default_rng(seed))
    ).reshape(truth.shape)
    directions = np.linalg.lstsq(
        e - e.mean(0), found.reshape(size, -1) - found.reshape(size, -1).mean(0), rcond=None
    )[0]
    directions = directions.T.reshape(d, width, dimension)
    angles = [
        np.degrees(subspace_angles(a.T, b.T).max()) for a, b in zip(directions, simulation.concepts)
    ]
    # no matching: a concept's context determines its block
    own = [
        np.mean([block_mcc(found[:, [j]], truth[:, j, [i]]) for i in range(width)])
        for j in range(d)
    ]
    return {
        "mcc": float(np.mean([block_mcc(found, truth[:, :, i]) for i in range(width)])),
        "floor": float(np.mean([block_mcc(rotated, truth[:, :, i]) for i in range(width)])),
        "angle": float(np.mean(angles)),
        "worst_angle": float(np.max(angles)),
        "correlations": [float(value) for value in own],
    }


def simulate_and_recover(samples: int, steps: int = 6000, **problem: Any) -> dict:
    """Do `simulate`, `recover` and `score`.

    Args:
        samples: number of samples of each context.
        steps: see `recover`.
        **problem: arguments of `simulate`.
    """
    simulation = simulate(**problem)
    d, seed = len(simulation.edges), problem.get("seed", 0)
    obs, *rest = (simulation.sample(k, samples, seed)[0] for k in range(d + 1))
    contexts: list[np.ndarray | None] = list(rest)
    if simulation.broken == "missing":
        contexts[simulation.affected] = None
    recovery = recover(obs, contexts, simulation.shift.shape[2], steps, seed=seed)
    return score(simulation, recovery) | {
        "affected": simulation.affected,
        "cross_entropy": recovery.cross_entropy,
    }


@torch.no_grad()
def _run(encoder: nn.Module, x: np.ndarray) -> np.ndarray:
    return encoder(torch.from_numpy(np.asarray(x, dtype=np.float32))).double().numpy()
