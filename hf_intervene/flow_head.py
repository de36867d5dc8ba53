"""What a head with flows knows of its concepts: their density, the noise that made them, and how
they follow from it. See `flow.py`.
"""

from collections.abc import Sequence
from typing import Any

import torch

from .configuration_intervention import InterventionConfig
from .flow import ConceptFlow, States


class FlowMixin:
    """Methods of an `InterventionHead` with flows; shapes as there."""

    config: InterventionConfig
    dtype: torch.dtype
    flow: ConceptFlow
    intervention: Any  # an `OrderedInterventionLayer`

    def states(self, c: torch.Tensor, targets: torch.Tensor, whole: bool | None = None) -> States:
        """What all maps say of c: once for all that a training step asks.

        Args:
            c: (B, D, w).
            targets: (B, D).
            whole: whether all targets are 0 or 1, which saves a third of the work; `None`: look,
                for which a device has to be waited for.
        """
        with torch.autocast(c.device.type, enabled=False):
            c, s = c.to(self.dtype), targets.to(self.dtype).T[..., None]  # (D, B, 1)
            if whole is None:  # a graph cannot depend on values
                whole = not torch.compiler.is_compiling() and bool(((s == 0) | (s == 1)).all())
            h = self.intervention(c, torch.zeros_like(s))
            return self.flow.states(c.transpose(0, 1), s, h, whole)

    def _noise(
        self, c: torch.Tensor, targets: torch.Tensor, states: States | None = None
    ) -> torch.Tensor:
        """z, (B, D, w + 1), of concepts c, (B, D, w)."""
        states = self.states(c, targets) if states is None else states
        return self.flow.inverse(states, targets.to(self.dtype).T[..., None]).transpose(0, 1)

    def log_density(
        self, c: torch.Tensor, targets: torch.Tensor, states: States | None = None
    ) -> torch.Tensor:
        """log p(c | s) = sum_j log p(c_j | s_j, h_j), in nats, (B,), float32 (see
        `flow.py`).

        Args:
            c: (B, D, w).
            targets: (B, D).
            states: of c, if they are known.
        """
        states = self.states(c, targets) if states is None else states
        with torch.autocast(c.device.type, enabled=False):
            s = targets.to(self.dtype).T[..., None]
            return self.flow.log_densities(states, s).sum(0).float()

    def context_log_densities(
        self, c: torch.Tensor, contexts: torch.Tensor, states: States | None = None
    ) -> torch.Tensor:
        """log p(c | s_k) of every context, in nats, (B, contexts), float32.

        Contexts differ in what was intervened on only, so each block is computed once for each of
        its states and not once for each context.

        Args:
            c: (B, D, w).
            contexts: their targets, (contexts, D), 0 or 1.
            states: of c, if they are known.
        """
        if states is None:
            states = self.states(c, c.new_zeros(c.shape[:2]), whole=True)
        with torch.autocast(c.device.type, enabled=False):
            obs, there = self.flow.state_densities(states)
            change = there - obs[: len(there)]  # (d, B)
            contexts = contexts.to(self.dtype)[:, : len(there)]
            return (obs.sum(0)[:, None] + change.T @ contexts.T).float()

    def _follow(
        self,
        z: torch.Tensor,
        s: torch.Tensor,
        edges: torch.Tensor,
        values: torch.Tensor | None,
        chosen: torch.Tensor | None,
    ) -> torch.Tensor:
        """c, causes before effects. Shapes as in `forward`, s and edges (B, D,
        1).
        """
        c: list[torch.Tensor] = [z.new_zeros(len(z), self.config.concept_width)] * z.shape[1]
        for level in self.intervention.levels():
            for j, of_block in zip(level, self._made(z, s, edges, c, level)):
                # a chosen value depends on nothing: do(c_j = v)
                if values is not None and chosen is not None:
                    of_block = torch.where(chosen[:, j], values[:, j].to(of_block.dtype), of_block)
                c[j] = of_block
        return torch.stack(c, dim=1)

    def remade(self, c: torch.Tensor, z: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Concepts of noise z under targets, (B, D, w), where free blocks are those of c. Free
        blocks come first, so nothing that they depend on changes.

        Args:
            c: (B, D, w).
            z: (B, D, noise_width).
            targets: (B, D).
        """
        s, d = targets.to(self.dtype)[..., None], len(self.config.concepts)
        found = list(c.to(self.dtype).unbind(1))
        for level in self.intervention.levels():
            concepts = [j for j in level if j < d]
            for j, of_block in zip(concepts, self._made(z, s, s, found, concepts)):
                found[j] = of_block
        return torch.stack(found, dim=1)

    def _made(
        self,
        z: torch.Tensor,
        s: torch.Tensor,
        edges: torch.Tensor,
        c: list[torch.Tensor],
        blocks: list[int],
    ) -> Sequence[torch.Tensor]:
        """c of these blocks, each (B, w), from noise, strengths and the c of their causes."""
        if not blocks:
            return ()
        h = self.intervention(torch.stack(c, dim=1), edges[:, blocks].transpose(0, 1), blocks)
        return self.flow(z[:, blocks].transpose(0, 1), s[:, blocks].transpose(0, 1), h, blocks)

    def _noise_marginals(
        self, mean: torch.Tensor, logvar: torch.Tensor, targets: torch.Tensor, draws: int = 16
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of z with flows: z of the mean of c, and the variance of z around it over draws with a
        fixed seed.
        """
        z = self._noise(mean, targets)
        noise = torch.randn(draws, *mean.shape[1:], generator=torch.Generator().manual_seed(0)).to(
            mean.device
        )
        std, squares = (0.5 * logvar).exp(), torch.zeros_like(z)
        for n in noise:
            squares = squares + (self._noise(mean + std * n, targets) - z).square()
        return z, (squares / draws).clamp(min=1e-12).log()


__all__ = ["FlowMixin"]
