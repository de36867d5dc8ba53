"""Recovery of concepts that are identifiable, on simulated data (METHOD section 6; Markham et al.,
arXiv:2507.04754).

Setting: x = f(e), f injective and differentiable; concepts c_j = C_j e + noise_j, jointly a linear
Gaussian SEM; data x from the observational context and from a perfect intervention on each concept
alone. Nothing but x and the context it came from is known.

`simulate` draws such data, and data that break one assumption. `recover` finds the C_j e from x, up
to a linear map of each block:

1. *Contrast.* Of the density ratio of a context to the observational one only what the intervention
   replaced is left, so it is a function of x through C e alone, whatever f is. Without noise, z = C
   e and A the edges into concept k,

       log p_k(x) / p_obs(x) = log N(z_k; m_k, V_k) - log N(z_k - A_k z; t_k, I),

   scaled so that the exogenous noise of `obs` has unit covariance. A network z = g(x) with these as logits is trained to name the context of
   x: a quadratic contrast, as in Buchholz et al., "Learning linear causal representations from interventions under general nonlinear
   mixing", arXiv:2306.02235. That finds z up to a linear map well, but the decomposition of each quadratic form badly: a difference of two
   squares has others.
2. *Structure.* The encoded contexts are then Gaussian, of the SEM under each intervention, up to one linear map M. Its likelihood, a function of
   the contexts' means and covariances, is maximised over M, the edges and the interventions. No causal order is given or imposed.

`score` compares with the truth on fresh observational samples.

Limit: nothing in step 1 makes g injective. A ratio that is quadratic in one concept alone is the
same on both sides of its vertex, and g may fold there; what tells the sides apart are the contexts
of the concept's children. With two concepts and a weak edge folding was seen."""  # noqa: E501

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.linalg import subspace_angles
from torch import nn
from torch.nn import functional as F

from .disentanglement import block_mcc


BROKEN = ("missing", "unchanged", "soft", "dependent-rows", "folded")
_HELD_OUT = 0.1  # of the samples, by which the best step of the contrast is chosen
_CHECKS = 12  # times that is looked at


@dataclass
class Simulation:
    """A random problem of `d` concepts of `width` dimensions; see `simulate`.

    Args:
        edges: weights of the SEM, (d, d, width, width), block [i, j] from j to i, strictly lower
            triangular in blocks.
        scale: of the exogenous noise of each context, (1 + d, d, width); row 0 is `obs`.
        shift: its mean, (1 + d, d, width).
        concepts: C, (d, width, dimension of e).
        unmix: of e from concepts and nuisance, (dimension of e, d * width + nuisance).
        layers: weights and biases of f.
        noise: standard deviation of noise_j, over that of c_j in `obs`.
        broken: the assumption that does not hold, one of `BROKEN`, or `None`.
        affected: the concept whose context is missing or unchanged, the last: it has no children
            whose contexts would show it.
    """

    edges: np.ndarray
    scale: np.ndarray
    shift: np.ndarray
    concepts: np.ndarray
    unmix: np.ndarray
    layers: list[tuple[np.ndarray, np.ndarray]]
    noise: float
    broken: str | None
    affected: int

    def sample(self, context: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples of a context (0: `obs`, k: the intervention on concept k - 1): x (size, 2 *
        dimension of e) and e (size, ...).
        """
        rng = np.random.default_rng((seed, context))
        d, width = self.shift.shape[1:]
        active = 0 if self.broken == "unchanged" and context == self.affected + 1 else context
        edges = self.edges.copy()
        if active and self.broken != "soft":
            edges[active - 1] = 0
        matrix = edges.transpose(0, 2, 1, 3).reshape(d * width, d * width)
        exogenous = self.shift[active] + self.scale[active] * rng.standard_normal((size, d, width))
        c = np.linalg.solve(
            np.eye(d * width) - matrix, exogenous.reshape(size, -1).T
        ).T  # (size, d * width)
        c += self.noise * rng.standard_normal(
            c.shape
        )  # now C e, so that c_j = C_j e + noise_j; c_j has variance 1 in `obs`
        nuisance = rng.standard_normal((size, self.unmix.shape[1] - d * width))
        e = np.hstack([c, nuisance]) @ self.unmix.T
        return self._decode(e), e

    def _decode(self, e: np.ndarray) -> np.ndarray:
        x = np.abs(e) if self.broken == "folded" else e
        for weight, bias in self.layers:
            x = x @ weight.T + bias
            x = 0.2 * x + 0.2 * np.logaddexp(
                0, 4 * x
            )  # a smooth leaky ReLU, of slopes 0.2 and 1: injective
        return x


def simulate(
    d: int = 6,
    width: int = 1,
    nuisance: int = 2,
    noise: float = 0.0,
    broken: str | None = None,
    seed: int = 0,
) -> Simulation:
    """Draw a problem: a random graph of three parents a concept at most on average, interventions
    that change mean and variance as those of quad do, and an f of four layers that doubles the
    dimension.

    Args:
        d: number of concepts.
        width: dimensions of each.
        nuisance: further dimensions of e, the same in all contexts.
        noise: standard deviation of noise_j, over that of the concept.
        broken: `None`: every assumption holds. `"missing"`: a concept has no context.
            `"unchanged"`: a concept's context is `obs` again. `"soft"`: interventions keep the
            incoming edges. `"dependent-rows"`: e has one dimension less than the concepts together,
            and no nuisance. `"folded"`: f is not injective, the sign of every entry of e is lost.
        seed: of the problem.

    Raises:
        ValueError: fewer than two concepts, or another assumption.
    """
    if d < 2 or width < 1:
        raise ValueError(
            f"a simulation needs at least two concepts of one dimension, not {d} of {width}."
        )
    if broken is not None and broken not in BROKEN:
        raise ValueError(f"unknown assumption {broken!r}; choose one of {', '.join(BROKEN)}.")
    rng = np.random.default_rng(seed)
    edges = np.zeros((d, d, width, width))
    for i in range(d):
        for j in range(i):
            if rng.random() < min(1, 3 / (d - 1)):
                edges[i, j] = (
                    rng.choice([-1, 1], (width, width))
                    * rng.uniform(0.5, 1.5, (width, width))
                    / width
                )
    scale = np.repeat(np.sqrt(rng.uniform(1, 2, (1, d, width))), d + 1, 0)
    shift = np.zeros((d + 1, d, width))
    for j in range(d):
        scale[j + 1, j] = np.sqrt(rng.uniform(1, 2, width))
        shift[j + 1, j] = rng.choice([-1, 1], width) * rng.uniform(1, 2, width)
    total = d * width
    mixing = np.linalg.inv(np.eye(total) - edges.transpose(0, 2, 1, 3).reshape(total, total))
    spread = np.sqrt(mixing**2 @ scale[0].ravel() ** 2).reshape(d, width)
    edges *= spread[None, :, None, :] / spread[:, None, :, None]
    scale, shift = scale / spread, shift / spread

    if broken == "dependent-rows":
        concepts = rng.standard_normal((total, total - 1)) / np.sqrt(total)
        unmix = np.linalg.pinv(concepts)
    else:
        size = total + nuisance
        unmix = _orthogonal(size, size, rng) * rng.uniform(0.7, 1.4, size)
        concepts = np.linalg.inv(unmix)[:total]
    size = len(unmix)
    weights = [_orthogonal(size, size, rng) for _ in range(3)] + [
        1.4 * _orthogonal(2 * size, size, rng)
    ]
    layers = [(weight, rng.normal(0, 0.5, len(weight))) for weight in weights]
    return Simulation(
        edges,
        scale,
        shift,
        concepts.reshape(d, width, size),
        unmix,
        layers,
        noise,
        broken,
        affected=d - 1,
    )


@dataclass
class Recovery:
    """What `recover` found.

    Args:
        encoder: network from standardised x to z up to a linear map.
        unmix: that map, M, (d * width, d * width).
        center, spread: of x, by which it is standardised.
        width: dimensions of a concept.
        cross_entropy: of naming the context of held-out samples, in nats.
    """

    encoder: nn.Module
    unmix: np.ndarray
    center: np.ndarray
    spread: np.ndarray
    width: int
    cross_entropy: float

    def encode(self, x: np.ndarray) -> np.ndarray:
        """Concepts (n, d, width) of x (n, dimension), each up to a linear map and a shift."""
        return (_run(self.encoder, (x - self.center) / self.spread) @ self.unmix.T).reshape(
            len(x), -1, self.width
        )


class ConceptEncoder(nn.Module):
    """A linear map and a network of two hidden layers, added: x (B, inputs) to z (B, outputs)."""

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
    """The SEM, exogenous noise of `obs` N(t, I), and its interventions; concepts (d) of `width`,
    those of `own` with a context.

    z are all concepts in a row, (B, d * width). S_k is upper triangular with a positive diagonal:
    V_k = (S_k' S_k)^-1."""

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
        """S, (d, width, width)."""
        diagonal = self.precisions.diagonal(dim1=1, dim2=2)
        return torch.triu(self.precisions, 1) + torch.diag_embed(diagonal.exp())

    def logits(self, z: torch.Tensor) -> torch.Tensor:
        """log p_k / p_obs of `obs` (0) and of each context in `own`, (B, 1 + contexts)."""
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
        """Matrices (contexts, d * width, d * width) and offsets by which z of each context would
        become N(0, I).
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
        steps: of the contrast.
        batch_size: samples a step, of all contexts together.
        seed: of weights and batches.

    Raises:
        ValueError: no interventional context, or fewer than 20 samples in one.
    """
    own = [k for k, x in enumerate(interventional) if x is not None]
    contexts = [
        np.asarray(x, dtype=np.float64) for x in (observational, *(interventional[k] for k in own))
    ]
    if not own or min(map(len, contexts)) < 20:
        raise ValueError(
            "recovery needs an observational and an interventional context of 20 samples each at"
            " least."
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
    """Step 1: the encoder, the structure in its logits, and the cross-entropy of held-out samples."""  # noqa: E501
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = ConceptEncoder(contexts[0].shape[1], d * width)
    structure = Structure(d, width, own)
    x = torch.from_numpy(np.concatenate(contexts)).float()
    y = torch.repeat_interleave(
        torch.arange(len(contexts)), torch.tensor([len(rows) for rows in contexts])
    )
    # Contexts of unequal sizes: the prior odds belong to the logits.
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
        nn.utils.clip_grad_norm_(
            parameters, 1.0
        )  # the logits are quadratic: single samples can have huge ones
        optimizer.step()
        schedule.step()
        if step % max(1, steps // _CHECKS) == 0 or step == steps:
            with torch.no_grad():
                value = float(
                    F.cross_entropy(structure.logits(encoder(x[held_out])) + prior, y[held_out])
                )
            if value < best:
                best, best_state = (
                    value,
                    copy.deepcopy((encoder.state_dict(), structure.state_dict())),
                )
    if best_state is None:
        raise FloatingPointError("the contrast diverged: its loss is not finite.")
    for module, state in zip((encoder, structure), best_state):
        module.load_state_dict(state)
    return encoder.requires_grad_(False), structure, best


def _structure(contexts: list[np.ndarray], structure: Structure, starts: int = 6) -> np.ndarray:
    """Step 2: the linear map (d * width, d * width) to the concepts, from encoded contexts (n, d *
    width).

    The likelihood has local maxima. The best is taken of what is reached from step 1's own
    solution, from its directions without the rest, and from random ones."""
    total = structure.d * structure.width
    covariance = np.cov(contexts[0].T, bias=True).reshape(total, total)
    values, vectors = np.linalg.eigh(covariance)
    # Encoded concepts without a context of their own may be constant.
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
            # The encoded contexts are centred here, as they were not in step 1.
            fresh.load_state_dict(structure.state_dict())
            with torch.no_grad():
                shift = torch.from_numpy(contexts[0].mean(0)).float()
                fresh.noise_mean.sub_(shift - (fresh.edges * fresh.others) @ shift)
                fresh.means.sub_(
                    torch.einsum("kij,kj->ki", fresh.roots(), shift.view_as(fresh.means))
                )
        elif start > 1:
            first = _orthogonal(total, total, np.random.default_rng(start))
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
    """Negative log-likelihood of Gaussian contexts (up to a constant) and the map that minimises
    it, from a `first` one.
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
    """How well the concepts were recovered, on fresh observational samples.

    Returns:
        `mcc`: block MCC of the recovered blocks with each C_j e (averaged over the coordinates of a
        block); `floor`: that of a random rotation of all whitened C_j e, which is what is left to
        chance once they are known up to a linear map; `angle`: mean over concepts of the largest
        principal angle between the rows of C_j and of what the recovered block is of e, linearly,
        in degrees; `worst_angle`: the largest of them; `correlations`: of each C_j e with its own
        block, (d,).
    """
    x, e = simulation.sample(0, size, seed)
    d, width, dimension = simulation.concepts.shape
    truth = (e @ simulation.concepts.reshape(-1, dimension).T).reshape(size, d, width)
    found = recovery.encode(x)
    flat = truth.reshape(size, -1)
    _, _, axes = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    spread = np.maximum((flat @ axes.T).std(0), 1e-9)
    rotated = (
        flat @ axes.T / spread @ _orthogonal(d * width, d * width, np.random.default_rng(seed))
    ).reshape(truth.shape)
    directions = np.linalg.lstsq(
        e - e.mean(0), found.reshape(size, -1) - found.reshape(size, -1).mean(0), rcond=None
    )[0]
    directions = directions.T.reshape(d, width, dimension)
    angles = [
        np.degrees(subspace_angles(a.T, b.T).max()) for a, b in zip(directions, simulation.concepts)
    ]
    own = [
        np.mean([block_mcc(found[:, [j]], truth[:, j, [i]]) for i in range(width)])
        for j in range(d)
    ]  # no matching: the context says which block is whose
    return {
        "mcc": float(np.mean([block_mcc(found, truth[:, :, i]) for i in range(width)])),
        "floor": float(np.mean([block_mcc(rotated, truth[:, :, i]) for i in range(width)])),
        "angle": float(np.mean(angles)),
        "worst_angle": float(np.max(angles)),
        "correlations": [float(value) for value in own],
    }


def simulate_and_recover(samples: int, steps: int = 6000, **problem: Any) -> dict:
    """`simulate`, `recover` and `score` in one: `samples` in each context; `problem` are the
    arguments of `simulate`.
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


def _orthogonal(rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """Random matrix (rows, columns) with orthonormal columns, rows >= columns."""
    return np.linalg.qr(rng.standard_normal((rows, columns)))[0]


@torch.no_grad()
def _run(encoder: nn.Module, x: np.ndarray) -> np.ndarray:
    return encoder(torch.from_numpy(np.asarray(x, dtype=np.float32))).double().numpy()
