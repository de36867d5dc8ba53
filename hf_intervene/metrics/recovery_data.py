"""Simulated data that meet the assumptions of identifiability, or break one of them.

See METHOD section 6 and `recovery.py`, which recovers the concepts from such data.
"""

from dataclasses import dataclass

import numpy as np


BROKEN = ("missing", "unchanged", "soft", "dependent-rows", "folded")


@dataclass
class Simulation:
    """A random problem of `d` concepts with `width` dimensions each; see `simulate`.

    Args:
        edges: weights of the SEM, (d, d, width, width). Block [i, j] is the edge from j to i. They
            are strictly lower triangular in blocks.
        scale: standard deviation of the exogenous noise of each context, (1 + d, d, width). Row 0
            is `obs`.
        shift: mean of the exogenous noise, (1 + d, d, width).
        concepts: C, (d, width, dimension of e).
        unmix: map from concepts and nuisance to e, (dimension of e, d * width + nuisance).
        layers: weights and biases of f.
        noise: standard deviation of noise_j, divided by that of c_j in `obs`.
        broken: the assumption that does not hold, one of `BROKEN`, or `None`.
        affected: the concept whose context is missing or unchanged. It is the last one: it has no
            children whose contexts would show it.
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
        """Draw samples of a context: x (size, 2 * dimension of e), and e (size, dimension of e).

        Args:
            context: 0 is `obs`, k is the intervention on concept k - 1.
            size: number of samples.
            seed: seed of the samples.
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
        # This is C e, so that c_j = C_j e + noise_j. c_j has variance 1 in `obs`.
        c += self.noise * rng.standard_normal(c.shape)
        nuisance = rng.standard_normal((size, self.unmix.shape[1] - d * width))
        e = np.hstack([c, nuisance]) @ self.unmix.T
        return self._decode(e), e

    def _decode(self, e: np.ndarray) -> np.ndarray:
        x = np.abs(e) if self.broken == "folded" else e
        for weight, bias in self.layers:
            x = x @ weight.T + bias
            # A smooth leaky ReLU with slopes from 0.2 to 1, which is injective.
            x = 0.2 * x + 0.2 * np.logaddexp(0, 4 * x)
        return x


def simulate(
    d: int = 6,
    width: int = 1,
    nuisance: int = 2,
    noise: float = 0.0,
    broken: str | None = None,
    seed: int = 0,
) -> Simulation:
    """Draw a random problem.

    It has a random graph with at most three parents per concept on average, interventions that
    change mean and variance like those of quad, and an f of four layers that doubles the dimension.

    Args:
        d: number of concepts.
        width: dimensions of each concept.
        nuisance: further dimensions of e, with one distribution in all contexts.
        noise: standard deviation of noise_j, divided by that of the concept.
        broken: `None`: every assumption holds. `"missing"`: a concept has no context.
            `"unchanged"`: the context of a concept has the distribution of `obs`. `"soft"`:
            interventions keep the incoming edges. `"dependent-rows"`: e has one dimension less than
            all concepts together, and no nuisance. `"folded"`: f is not injective, because it
            ignores the sign of every entry of e.
        seed: seed of the problem.

    Raises:
        ValueError: there are fewer than two concepts, or `broken` is unknown.
    """
    if d < 2 or width < 1:
        raise ValueError(
            f"a simulation needs at least two concepts and one dimension, not {d} and {width}."
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
        unmix = orthogonal(size, size, rng) * rng.uniform(0.7, 1.4, size)
        concepts = np.linalg.inv(unmix)[:total]
    size = len(unmix)
    weights = [orthogonal(size, size, rng) for _ in range(3)] + [
        1.4 * orthogonal(2 * size, size, rng)
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


def orthogonal(rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a random matrix (rows, columns) with orthonormal columns, rows >= columns."""
    return np.linalg.qr(rng.standard_normal((rows, columns)))[0]
