r"""Invertible mechanisms: how each concept comes about, as a density (an addition to the paper,
where they are MLPs).

Block j of the concepts is made of noise and of a message from its causes
(`OrderedInterventionLayer`),

    c_j = F_j(z_j; s_j, h_j),    z_j ~ N(0, I),    h_j = (1 - s_j) sum_{i before j} W[j, i] c_i.

F_j(.; 0, h) and F_j(.; 1, 0), without and with an intervention, are two stacks of affine couplings
(Dinh et al., arXiv:1605.08803) whose networks read h too, so that both directions and the density
are exact:

    log f_j(c; s, h) = log N(z; 0, I) - log |det dF_j/dz|    at z = F_j^{-1}(c; s, h).

Without an intervention a concept may be there all the same: 5 of 100 people wear glasses. One map
is too smooth for that, and puts half glasses on many. So without an intervention c_j is a mixture;
with a share pi_j, learnt, it is that of one,

    p(c_j | s_j, h_j) = (1 - pi_j) f_j(c_j; s_j, h_j) + pi_j f_j(c_j; 1, 0).

The last entry of z_j says which: the second where it is above the quantile 1 - pi_j of N(0, 1).

So p(c | s), the product over blocks, is known for every context. A posterior q(c | x) that is the
same in every context can be fitted by it (see `InterventionHead.kl`), and the decoder, which reads
c alone, has no other way to distinguish contexts. Free blocks are never intervened on and have one
map."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import gelu, logsigmoid

from .blocks import BlockLinear, SmallBlockLinear


SHARE = 0.05  # pi_j before training


class _Maps(NamedTuple):
    """The numbers of the maps of some blocks, concepts first."""

    obs: slice | list[int]  # those without an intervention
    intervened: slice | list[int]  # those of the concepts with one
    concepts: slice | list[int]  # the concepts, by their number among all
    number: int  # of concepts


class ConceptFlow(nn.Module):
    """The maps F_j of all blocks, and their mixtures.

    Shapes, for n blocks: z (n, B, w + 1); c (n, B, w); s (n, B, 1), entries in [0, 1]; h (n, B, m).
    Maps are numbered: the first D are those without an intervention, the last d those with one,
    which have no message.

    Args:
        concepts: d.
        blocks: D, concepts first.
        width: w; with w = 1 there is nothing to couple, and each map is affine.
        depth: couplings of each map.
        hidden_width: m, of h and of the network in a coupling, which has one hidden layer.
    """

    def __init__(
        self, concepts: int, blocks: int, width: int, depth: int = 4, hidden_width: int = 32
    ):
        super().__init__()
        self.concepts, self.blocks, self.width = concepts, blocks, width
        maps = blocks + concepts
        # Even couplings read the first part of a block and move the rest; odd ones the other way
        # round.
        self.split = [width // 2, width - width // 2]
        self.hidden, self.message, self.move = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for layer in range(depth if width > 1 else 0):
            read, moved = self.split if layer % 2 == 0 else self.split[::-1]
            self.hidden.append(BlockLinear(maps, read, hidden_width))
            self.message.append(BlockLinear(blocks, hidden_width, hidden_width))
            self.move.append(SmallBlockLinear(maps, hidden_width, 2 * moved))
        self.shift = BlockLinear(blocks, hidden_width, width)  # of the mean, by h
        self.mean = nn.Parameter(torch.empty(maps, 1, width))
        self.log_scale = nn.Parameter(torch.empty(maps, 1, width))
        self.share_logit = nn.Parameter(torch.empty(concepts))  # of pi

    def reset_parameters(self) -> None:
        """Start near the identity, interventions elsewhere."""
        nn.init.zeros_(self.log_scale)
        nn.init.constant_(self.share_logit, math.log(SHARE / (1 - SHARE)))
        # Interventions start somewhere else, so that encoder and flow need not find out which way
        # to part.
        with torch.no_grad():
            self.mean[: self.blocks].zero_()
            self.mean[self.blocks :].normal_(std=0.5)

    @property
    def shares(self) -> torch.Tensor:
        """pi_j of the concepts, (d,)."""
        return self.share_logit.sigmoid()

    def forward(
        self, z: torch.Tensor, s: torch.Tensor, h: torch.Tensor, blocks: Sequence[int] | None = None
    ) -> torch.Tensor:
        """c = F(z; s, h) of these blocks, sorted, all by default. Between s = 0 and 1 shifts and
        log-scales of every layer are interpolated."""
        maps = self._maps(blocks)
        x, which = z.split([self.width, 1], dim=-1)
        there = which[: maps.number] > self._threshold()[maps.concepts]
        s = torch.cat([torch.where(there, 1.0, s[: maps.number]), s[maps.number :]])
        for layer in range(len(self.hidden)):
            read, moved = self._halves(x, layer)
            shift, log_scale = self._coupling(layer, read, s, h, maps)
            x = self._whole(read, moved * log_scale.exp() + shift, layer)
        mean, log_scale = self._affine(s, h, maps)
        return x * log_scale.exp() + mean

    def inverse(self, c: torch.Tensor, s: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """z with F(z; s, h) = c, of the more likely part of the mixture; its last entry in the
        middle of that part.
        """
        z, density = self._component(c, s, h)
        d = self.concepts
        there, density_there = self._component(c[:d], 1.0, None)
        without, within = (
            x[:, None] for x in (logsigmoid(-self.share_logit), logsigmoid(self.share_logit))
        )
        second = (density_there + within > density[:d] + without)[..., None] & (
            s[:d] < 1
        )  # (d, B, 1)
        share = self.shares.float()[:, None, None]
        middle = torch.where(second, 1 - share / 2, torch.where(s[:d] < 1, (1 - share) / 2, 0.5))
        which = math.sqrt(2) * torch.erfinv(2 * middle - 1)
        which = torch.cat([which, torch.zeros_like(z[d:, :, :1])]).to(z.dtype)
        return torch.cat([torch.cat([torch.where(second, there, z[:d]), z[d:]]), which], dim=-1)

    def log_densities(
        self, c: torch.Tensor, s: torch.Tensor | float, h: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """log p(c_j | s_j, h_j) of each block, (D, B), and log f_j(c_j; 1, 0) of each concept, (d,
        B), in nats.

        Args:
            c: (D, B, w).
            s: (D, B, 1), or 0.0 for all.
            h: (D, B, m).
        """
        density, d = self._component(c, s, h)[1], self.concepts
        there = self._component(c[:d], 1.0, None)[1]
        mixture = torch.logaddexp(
            density[:d] + logsigmoid(-self.share_logit)[:, None],
            there + logsigmoid(self.share_logit)[:, None],
        )
        return torch.cat([mixture, density[d:]]), there

    def _component(
        self, c: torch.Tensor, s: torch.Tensor | float, h: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """F^{-1}(c; s, h), (n, B, w), and log f(c; s, h), (n, B), without the mixture. s = 1.0 is
        of the concepts alone.
        """
        maps = self._maps(None)
        mean, log_scale = self._affine(s, h, maps)
        x = (c - mean) * (-log_scale).exp()
        log_det = -log_scale.sum(-1).expand(x.shape[:2])
        for layer in reversed(range(len(self.hidden))):
            read, moved = self._halves(x, layer)
            shift, log_scale = self._coupling(layer, read, s, h, maps)
            x = self._whole(read, (moved - shift) * (-log_scale).exp(), layer)
            log_det = log_det - log_scale.sum(-1)
        return x, log_det - 0.5 * (x.square() + math.log(2 * math.pi)).sum(-1)

    def _maps(self, blocks: Sequence[int] | None) -> _Maps:
        d, all_blocks = self.concepts, self.blocks
        if blocks is None:
            return _Maps(slice(all_blocks), slice(all_blocks, None), slice(d), d)
        concepts = [j for j in blocks if j < d]
        return _Maps(list(blocks), [all_blocks + j for j in concepts], concepts, len(concepts))

    def _coupling(
        self,
        layer: int,
        read: torch.Tensor,
        s: torch.Tensor | float,
        h: torch.Tensor | None,
        maps: _Maps,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, message, move = self.hidden[layer], self.message[layer], self.move[layer]
        out = intervened = None
        if h is not None:
            out = move(gelu(hidden(read, maps.obs) + message(h, maps.obs)), maps.obs)
        if not isinstance(s, float) or s == 1:
            intervened = move(gelu(hidden(read[: maps.number], maps.intervened)), maps.intervened)
        shift, log_scale = _mixed(out, intervened, s).chunk(2, dim=-1)
        return shift, 2 * torch.tanh(log_scale / 2)  # a scale between exp(-2) and exp(2)

    def _affine(
        self, s: torch.Tensor | float, h: torch.Tensor | None, maps: _Maps
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-scale of the last layer."""
        mean = None if h is None else self.mean[maps.obs] + self.shift(h, maps.obs)
        log_scale = self.log_scale[maps.obs]
        return (
            _mixed(mean, self.mean[maps.intervened], s),
            _mixed(log_scale, self.log_scale[maps.intervened], s),
        )

    def _threshold(self) -> torch.Tensor:
        """The quantile 1 - pi of N(0, 1), (d, 1, 1)."""
        return math.sqrt(2) * torch.erfinv(1 - 2 * self.shares.float())[:, None, None]

    def _halves(self, x: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = x.split(self.split, dim=-1)
        return (first, second) if layer % 2 == 0 else (second, first)

    def _whole(self, read: torch.Tensor, moved: torch.Tensor, layer: int) -> torch.Tensor:
        return torch.cat((read, moved) if layer % 2 == 0 else (moved, read), dim=-1)


def _mixed(
    obs: torch.Tensor | None, intervened: torch.Tensor | None, s: torch.Tensor | float
) -> torch.Tensor:
    """What is computed without an intervention, (n, ...), and with one, (concepts, ...), as s asks
    for: (n, ...).
    """
    if isinstance(s, float):
        found = intervened if s == 1 else obs
        assert found is not None
        return found
    assert obs is not None and intervened is not None
    count = len(intervened)
    mixed = torch.lerp(obs[:count], intervened, s[:count].to(obs.dtype))
    return torch.cat([mixed, obs[count:].expand(-1, *mixed.shape[1:])])


__all__ = ["ConceptFlow"]
