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


class Part(NamedTuple):
    """What one map of each of n blocks says of concepts c, (n, B, w)."""

    noise: torch.Tensor  # F^{-1}(c), (n, B, w)
    density: torch.Tensor  # log f(c), (n, B), in nats


class States(NamedTuple):
    """What all maps say of concepts c. KL, context prediction and edits of a step share one."""

    obs: Part  # without an intervention, of all blocks
    there: Part  # with one, of the concepts
    own: Part  # at the strengths of the batch, of all blocks; where these are 0 or 1 it is `obs`


class _Maps(NamedTuple):
    """The numbers of the maps of n blocks, k of them concepts, which come first."""

    obs: slice | list[int]  # those without an intervention
    both: slice | list[int]  # the same, then those of the concepts with one, n + k
    concepts: slice | list[int]  # the concepts, by their number among all
    number: int  # k


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
            shift, log_scale = self._coupling(layer, read, h, s, maps)
            x = self._whole(read, moved * log_scale.exp() + shift, layer)
        mean, log_scale = self._affine(h, s, maps)
        return x * log_scale.exp() + mean

    def states(self, c: torch.Tensor, s: torch.Tensor, h: torch.Tensor, whole: bool) -> States:
        """What all maps say of c.

        Args:
            c: (D, B, w).
            s: (D, B, 1).
            h: of s = 0, (D, B, m).
            whole: whether all s are 0 or 1; others need maps of their own.
        """
        noise, density = self._part(torch.cat([c, c[: self.concepts]]), h, None)
        obs = Part(noise[: self.blocks], density[: self.blocks])
        there = Part(noise[self.blocks :], density[self.blocks :])
        return States(obs, there, obs if whole else self._part(c, (1 - s) * h, s))

    def inverse(self, states: States, s: torch.Tensor) -> torch.Tensor:
        """z with F(z; s, h) = c, (D, B, w + 1), of the more likely part of the mixture; its last
        entry in the middle of that part.

        Args:
            states: of c.
            s: (D, B, 1).
        """
        (z, density), there, d = states.own, states.there, self.concepts
        s = s[:d]  # of the concepts, the only ones that have a mixture
        without, within = (
            x[:, None] for x in (logsigmoid(-self.share_logit), logsigmoid(self.share_logit))
        )
        likelier = there.density + within > density[:d] + without  # (d, B)
        second = likelier[..., None] & (s < 1)  # (d, B, 1)
        share = self.shares.float()[:, None, None]
        middle = torch.where(second, 1 - share / 2, torch.where(s < 1, (1 - share) / 2, 0.5))
        which = math.sqrt(2) * torch.erfinv(2 * middle - 1)
        which = torch.cat([which, torch.zeros_like(z[d:, :, :1])]).to(z.dtype)
        x = torch.cat([torch.where(second | (s == 1), there.noise, z[:d]), z[d:]])
        return torch.cat([x, which], dim=-1)

    def log_densities(self, states: States, s: torch.Tensor) -> torch.Tensor:
        """log p(c_j | s_j, h_j) of each block, (D, B), in nats; arguments as of `inverse`."""
        # Under a whole intervention the mixture is one of equal parts.
        d, there = self.concepts, states.there.density
        densities = self._mixture(states.own.density, there)
        return torch.cat([torch.where(s[:d, :, 0] == 1, there, densities[:d]), densities[d:]])

    def state_densities(self, states: States) -> tuple[torch.Tensor, torch.Tensor]:
        """log p(c_j | 0, h_j) of each block, (D, B), and log p(c_j | 1) of each concept, (d, B), in
        nats.
        """
        return self._mixture(states.obs.density, states.there.density), states.there.density

    def _mixture(self, density: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        """Log-densities of mixtures, (D, B), of those of both parts, (D, B) and (d, B)."""
        d = self.concepts
        mixture = torch.logaddexp(
            density[:d] + logsigmoid(-self.share_logit)[:, None],
            there + logsigmoid(self.share_logit)[:, None],
        )
        return torch.cat([mixture, density[d:]])

    def _part(self, c: torch.Tensor, h: torch.Tensor, s: torch.Tensor | None) -> Part:
        """The inverse of the maps of all blocks at strengths s; `None`: of all maps, each with a c
        of its own.
        """
        maps = self._maps(None)
        mean, log_scale = self._affine(h, s, maps)
        x = (c - mean) * (-log_scale).exp()
        log_det = -log_scale.sum(-1).expand(x.shape[:2])
        for layer in reversed(range(len(self.hidden))):
            read, moved = self._halves(x, layer)
            shift, log_scale = self._coupling(layer, read, h, s, maps)
            x = self._whole(read, (moved - shift) * (-log_scale).exp(), layer)
            log_det = log_det - log_scale.sum(-1)
        return Part(x, log_det - 0.5 * (x.square() + math.log(2 * math.pi)).sum(-1))

    def _maps(self, blocks: Sequence[int] | None) -> _Maps:
        d, all_blocks = self.concepts, self.blocks
        if blocks is None:
            return _Maps(slice(all_blocks), slice(None), slice(d), d)
        concepts = [j for j in blocks if j < d]
        both = [*blocks, *(all_blocks + j for j in concepts)]
        return _Maps(list(blocks), both, concepts, len(concepts))

    def _coupling(
        self,
        layer: int,
        read: torch.Tensor,
        h: torch.Tensor,
        s: torch.Tensor | None,
        maps: _Maps,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Shift and log-scale of a layer, at strengths s; `None`: of all maps, which read each
        their own.
        """
        if s is not None:
            read = torch.cat([read, read[: maps.number]])
        x = _heard(self.hidden[layer](read, maps.both), self.message[layer](h, maps.obs))
        x = self.move[layer](gelu(x), maps.both)
        shift, log_scale = (x if s is None else _mixed(x, s)).chunk(2, dim=-1)
        return shift, 2 * torch.tanh(log_scale / 2)  # a scale between exp(-2) and exp(2)

    def _affine(
        self, h: torch.Tensor, s: torch.Tensor | None, maps: _Maps
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-scale of the last layer, likewise."""
        heard = self.shift(h, maps.obs)
        mean = self.mean[maps.both].expand(-1, heard.shape[1], -1)
        mean, log_scale = _heard(mean, heard), self.log_scale[maps.both]
        return (mean, log_scale) if s is None else (_mixed(mean, s), _mixed(log_scale, s))

    def _threshold(self) -> torch.Tensor:
        """The quantile 1 - pi of N(0, 1), (d, 1, 1)."""
        return math.sqrt(2) * torch.erfinv(1 - 2 * self.shares.float())[:, None, None]

    def _halves(self, x: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = x.split(self.split, dim=-1)
        return (first, second) if layer % 2 == 0 else (second, first)

    def _whole(self, read: torch.Tensor, moved: torch.Tensor, layer: int) -> torch.Tensor:
        return torch.cat((read, moved) if layer % 2 == 0 else (moved, read), dim=-1)


def _heard(x: torch.Tensor, message: torch.Tensor) -> torch.Tensor:
    """x of both kinds of maps, (n + k, B, m), with the message to those without an intervention,
    (n, B, m), added.
    """
    n = len(message)
    return torch.cat([x[:n] + message, x[n:]])


def _mixed(both: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """What both kinds of maps say, (n + k, ...), at strengths s, (n, B, 1): (n, ...)."""
    n = len(s)
    obs, intervened = both[:n], both[n:]
    k = len(intervened)
    mixed = torch.lerp(obs[:k], intervened, s[:k].to(obs.dtype))
    return torch.cat([mixed, obs[k:].expand(-1, *mixed.shape[1:])])


__all__ = ["ConceptFlow", "Part", "States"]
