"""Intervention layer (METHOD section 2, step 3): a linear SEM among the concepts, whose edges the
context selects.
"""

import math
from collections.abc import Callable

import torch
from torch import nn


class InterventionLayer(nn.Module):
    """Intervention layer (METHOD section 2, step 3): a linear SEM whose structure the context
    selects.

    With `steps=1` its reduced form, the paper's, with effects of their own for intervened causes:

        c_i = eps_i + (1 - s_i) sum_{j != i} ((1 - s_j) W_obs[i, j] + s_j W_int[i, j]) eps_j + bias_i

    The two sums are one product of (W_obs | W_int) with ((1 - s) eps, s eps) stacked. With `steps=k
    > 1` the structural form, one W for all contexts (an intervention changes how a concept comes
    about, not what it does), followed along directed paths of up to k edges:

        c_i = eps_i + (1 - s_i) sum_{j != i} W[i, j] c_j,  then  + bias_i

    There, cutting the edges into a concept also cuts the paths through it, which the reduced form
    cannot know of concepts that were never intervened on together. With `perfect=False` (soft
    interventions) there is no factor (1 - s_i).

    do(c_j = v): where `chosen` says so, c_j = values_j exactly, whatever it would hear, and the
    others hear eps_j = v - bias_j in place of its noise (reduced form), or c_j = v - bias_j along
    every path (structural form). So a chosen value is a perfect intervention on its concept, with
    soft interventions too. In the reduced form what W_obs has summed up over paths through j stays,
    as it does under s_j = 1.
    Shapes: eps (B, D, w), s (B, D, 1), values (B, D, w), chosen (B, D, 1) -> c (B, D, w).
    """  # noqa: E501

    def __init__(self, blocks: int, width: int, perfect: bool, steps: int):
        super().__init__()
        self.perfect, self.steps = perfect, steps
        self.slices = 2 if steps == 1 else 1
        self.add_weights(blocks, width)
        self.bias = nn.Parameter(torch.empty(blocks, width))

    def add_weights(self, blocks: int, width: int) -> None:
        """Make the parameters of W."""
        # weight[i, :, 0, j, :] is the block W_obs[i, j] (or W), weight[i, :, 1, j, :] is W_int[i,
        # j]; blocks with i = j are not used.
        self.weight = nn.Parameter(torch.empty(blocks, width, self.slices, blocks, width))

    def reset_parameters(self, std: float) -> None:
        """As a new layer's, the entries of W of this standard deviation."""
        nn.init.zeros_(self.bias)
        nn.init.normal_(self.weight, std=std)
        with torch.no_grad():
            self.weight.copy_(self.weight[:, :, :1].expand_as(self.weight))  # W_int starts as W_obs

    def off_diagonal(self) -> torch.Tensor:
        """The weight with its blocks i = j set to zero, (D, w, 2 or 1, D, w)."""
        blocks = len(self.bias)
        mask = 1 - torch.eye(blocks, dtype=self.weight.dtype, device=self.weight.device)
        return self.weight * mask[:, None, None, :, None]

    def penalty(self, group_lasso: float, l2: float) -> torch.Tensor:
        """`InterventionHead.penalty`."""
        squares = self.off_diagonal().float().square().sum((1, 4))  # (D, 2 or 1, D)
        return group_lasso * _norm(squares).sum() + l2 * squares.sum()

    def hearing(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The map of what the blocks send, (2 or 1, D, w, B), to what each hears of the others,
        sum_{j != i} W[i, j] sent_j, (D, w, B).
        """
        weight = self.off_diagonal().flatten(2).flatten(0, 1)  # (D w, 2 D w) or (D w, D w)
        return lambda sent: (weight @ sent.flatten(0, 2)).unflatten(0, self.bias.shape)

    def forward(
        self,
        eps: torch.Tensor,
        s: torch.Tensor,
        values: torch.Tensor | None = None,
        chosen: torch.Tensor | None = None,
    ) -> torch.Tensor:
        eps, s = (
            x.permute(1, 2, 0) for x in (eps, s.to(eps.dtype))
        )  # (D, w, B), (D, 1, B): samples are columns
        bias, kept = self.bias[..., None], 1 - s
        if values is not None and chosen is not None:
            values, chosen = (x.permute(1, 2, 0) for x in (values, chosen))
            held = (values - bias).to(eps.dtype)
            eps = torch.where(chosen, held, eps)
        hear = self.hearing()
        c = eps
        for _ in range(self.steps):
            heard = hear(torch.stack([kept * c, s * c]) if self.steps == 1 else c[None])
            c = torch.addcmul(eps, kept, heard) if self.perfect else eps + heard
            if values is not None and chosen is not None:
                c = torch.where(chosen, held, c)
        c = c + bias
        if values is not None and chosen is not None:
            c = torch.where(chosen, values.to(c.dtype), c)  # (v - bias) + bias is v up to rounding
        return c.permute(2, 0, 1)  # (B, D, w)


class OrderedInterventionLayer(nn.Module):
    """The message to each block of a head with flows from its causes (see `flow.py`):

        h_i = (1 - s_i) sum_{j before i} W[i, j] c_j.

    Free blocks come first. Each has a message from the free blocks before it, which is never cut. A
    concept has none, or one from all free blocks and from the concepts before it in `order`. So
    there are no cycles, and the density needs no determinant. W starts at 0: what no data ask for
    does not depend on anything.

    Args:
        concepts: d; the free blocks follow.
        blocks, width: D and w.
        message_width: m, of h.
        concept_edges: whether concepts may depend on other blocks.
    """

    order: torch.Tensor

    def __init__(
        self, concepts: int, blocks: int, width: int, message_width: int, concept_edges: bool
    ):
        super().__init__()
        self.concepts, self.concept_edges = concepts, concept_edges
        self.weight = nn.Parameter(torch.empty(blocks, message_width, blocks, width))
        self.register_buffer("order", torch.arange(concepts))  # of the concepts, causes first
        self._levels: tuple[torch.Tensor, tuple[int, bool], list[list[int]]] | None = (
            None  # of this order as it is
        )

    def reset_parameters(self, std: float) -> None:
        """As a new layer's."""
        nn.init.zeros_(self.weight)

    def edges(self) -> torch.Tensor:
        """Whether block j may be a cause of block i, bool (D, D)."""
        blocks, d = len(self.weight), self.concepts
        position = torch.arange(blocks, device=self.order.device) - d  # free blocks first, in turn
        position[:d] = blocks + torch.argsort(self.order)
        before = position[:, None] > position
        before[:d] &= self.concept_edges
        return before

    @torch.compiler.disable
    def levels(self) -> list[list[int]]:
        """Blocks whose causes are all in levels before. The device is asked for the order only
        after a change.
        """
        state = self.order._version, self.concept_edges
        known = self._levels
        if known is not None and known[0] is self.order and known[1] == state:
            return known[2]
        before = self.edges().cpu()
        depth = [0] * len(before)
        for i in sorted(range(len(before)), key=lambda i: int(before[i].sum())):
            depth[i] = 1 + max((depth[j] for j in before[i].nonzero()[:, 0].tolist()), default=-1)
        levels = [[i for i, own in enumerate(depth) if own == n] for n in range(max(depth) + 1)]
        self._levels = self.order, state, levels
        return levels

    def off_diagonal(self) -> torch.Tensor:
        """W with its blocks that are no edges set to zero, (D, m, D, w)."""
        return self.weight * self.edges()[:, None, :, None]

    def forward(
        self, c: torch.Tensor, s: torch.Tensor, blocks: list[int] | slice = slice(None)
    ) -> torch.Tensor:
        """h of these blocks, (n, B, m), of all c, (B, D, w), and their s, (n, B, 1)."""
        weight = self.off_diagonal()[blocks]  # (n, m, D, w)
        messages = c.flatten(1) @ weight.flatten(2).flatten(0, 1).T  # (B, n m)
        return (1 - s) * messages.unflatten(1, weight.shape[:2]).transpose(0, 1)

    def penalty(self, group_lasso: float, l2: float) -> torch.Tensor:
        """`InterventionHead.penalty`, of the edges into concepts."""
        squares = self.off_diagonal()[: self.concepts].float().square().sum((1, 3))  # (d, D)
        return group_lasso * _norm(squares).sum() + l2 * squares.sum()


class LowRankInterventionLayer(InterventionLayer):
    """Intervention layer whose weights have a low rank r, for many concepts: W[i, j] = U_i V_j^T
    for i != j, U_i and V_j of shape (w, r).

    What a block hears, sum_{j != i} W[i, j] x_j = U_i (sum_j V_j^T x_j) - U_i V_i^T x_i, costs as
    much as D maps to r numbers and back; no (D w, D w) matrix is made. In the reduced form W_obs[i,
    j] = U_i V_obs[j]^T and W_int[i, j] = U_i V_int[j]^T: r is the rank of (W_obs | W_int). Shapes
    as those of `InterventionLayer`."""

    def __init__(self, blocks: int, width: int, perfect: bool, steps: int, rank: int):
        self.rank = rank
        super().__init__(blocks, width, perfect, steps)

    def add_weights(self, blocks: int, width: int) -> None:
        self.effects = nn.Parameter(torch.empty(blocks, width, self.rank))  # U
        # V_obs and V_int, or V
        self.causes = nn.Parameter(torch.empty(self.slices, blocks, width, self.rank))

    def reset_parameters(self, std: float) -> None:
        nn.init.zeros_(self.bias)
        # the entries of U V^T have the standard deviation std
        for factor in (
            self.effects,
            self.causes,
        ):
            nn.init.normal_(factor, std=(std / math.sqrt(self.rank)) ** 0.5)
        with torch.no_grad():
            self.causes.copy_(self.causes[:1].expand_as(self.causes))  # W_int starts as W_obs

    def off_diagonal(self) -> torch.Tensor:
        """W with its blocks i = j set to zero, (D, w, 2 or 1, D, w): to look at, quadratic in D."""
        mask = 1 - torch.eye(len(self.bias), dtype=self.bias.dtype, device=self.bias.device)
        return torch.einsum("iar,kjbr,ij->iakjb", self.effects, self.causes, mask)

    def penalty(self, group_lasso: float, l2: float) -> torch.Tensor:
        """`InterventionHead.penalty`, by |U_i V_j^T|^2 = <U_i^T U_i, V_j^T V_j>: the L2 term is
        linear in D, the group lasso has D^2 norms.
        """
        u, v = (
            x.float().mT @ x.float() for x in (self.effects, self.causes)
        )  # (D, r, r), (2 or 1, D, r, r)
        total = l2 * ((u.sum(0) * v.sum(1)).sum() - (u * v).sum())
        if group_lasso:
            squares = torch.einsum("irq,kjrq->ikj", u, v).clamp(min=0)  # (D, 2 or 1, D), rounded
            mask = 1 - torch.eye(len(u), device=u.device)
            total = total + group_lasso * _norm(squares * mask[:, None]).sum()
        return total

    def hearing(self) -> Callable[[torch.Tensor], torch.Tensor]:
        effects, causes = (
            self.effects.flatten(0, 1),
            self.causes.flatten(0, 2),
        )  # (D w, r), (2 D w, r) or (D w, r)
        # -U_i V_i^T, (D, w, 2 w) or (D, w, w)
        itself = -self.effects @ self.causes.permute(1, 3, 0, 2).flatten(2)

        def hear(sent: torch.Tensor) -> torch.Tensor:
            heard = (effects @ (causes.T @ sent.flatten(0, 2))).unflatten(0, self.bias.shape)
            return torch.baddbmm(heard, itself, sent.transpose(0, 1).flatten(1, 2))

        return hear


def _norm(squares: torch.Tensor) -> torch.Tensor:
    return (squares + 1e-12).sqrt()  # the gradient of a norm at 0 is not finite


__all__ = ["InterventionLayer", "LowRankInterventionLayer", "OrderedInterventionLayer"]
