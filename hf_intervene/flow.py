r"""Invertible mechanisms: how each concept comes about, as a density (an addition to the paper,
where they are MLPs).

Block j of the concepts is made of noise and of a message from its causes
(`OrderedInterventionLayer`),

    c_j = F_j(z_j; s_j, h_j),    z_j ~ N(0, I),    h_j = (1 - s_j) sum_{i before j} W[j, i] c_i,

one entry after the other. Given the entries before it, entry i is a mixture of K logistic
distributions, whose parameters a small network gives (see `mixtures.py`):

    Phi(z_ji) = sum_k p_k sigmoid((c_ji - m_k) / v_k),    (p, m, v) = N_ji(c_j<i; s_j, h_j).

So both directions and the density are exact, and codes may lie in clusters: a hat is one of ten,
and half a hat between two of them is none. (Affine couplings, which stretch N(0, I) smoothly, put
much of it between clusters.) F_j(.; 0, h) and F_j(.; 1, 0), without and with an intervention, have
networks of their own.

Without an intervention a concept may be there all the same: 5 of 100 people wear glasses. So
without an intervention c_j is with a share pi_j, learnt, that of one,

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
from .mixtures import Mixture


SHARE = 0.05  # pi_j before training


class Part(NamedTuple):
    """What one map of each of n blocks says of concepts c, (n, B, w)."""

    c: torch.Tensor
    mixtures: Mixture  # of its entries, (n, w, B)
    density: torch.Tensor  # log f(c), (n, B), in nats

    @property
    def noise(self) -> torch.Tensor:
        """F^{-1}(c), (n, B, w). Only edits need it."""
        return self.mixtures.noise(self.c.mT).mT.to(self.c.dtype)

    def of(self, maps: slice) -> "Part":
        """The part of some maps."""
        return Part(self.c[maps], self.mixtures.of_blocks(maps), self.density[maps])


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
    which have no message. Networks are numbered map by map, w to a map.

    Args:
        concepts: d.
        blocks: D, concepts first.
        width: w.
        depth: hidden layers of a network.
        hidden_width: m, of h and of these layers.
        components: K.
    """

    def __init__(
        self,
        concepts: int,
        blocks: int,
        width: int,
        depth: int = 2,
        hidden_width: int = 128,
        components: int = 8,
    ):
        super().__init__()
        self.concepts, self.blocks, self.width = concepts, blocks, width
        networks = (blocks + concepts) * width
        self.first = BlockLinear(networks, width, hidden_width)
        self.hidden = nn.ModuleList(
            BlockLinear(networks, hidden_width, hidden_width) for _ in range(depth - 1)
        )
        self.last = SmallBlockLinear(networks, hidden_width, 3 * components)
        self.share_logit = nn.Parameter(torch.empty(concepts))  # of pi

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start near N(0, I), interventions elsewhere. The layers have their own."""
        nn.init.constant_(self.share_logit, math.log(SHARE / (1 - SHARE)))
        of_maps = self.last.bias.view(-1, self.width, self.last.bias.shape[-1])
        _, means, log_scales = of_maps.chunk(3, dim=-1)
        k = torch.arange(means.shape[-1], dtype=torch.float64)
        means.copy_(torch.special.ndtri((k + 0.5) / len(k)))
        log_scales.fill_(-1.2)  # about half the standard deviation of N(0, 1)
        # Interventions start somewhere else, so that encoder and flow need not find out which way
        # to part.
        means[self.blocks :] += 0.5 * torch.randn_like(means[self.blocks :, :, :1])

    @property
    def shares(self) -> torch.Tensor:
        """pi_j of the concepts, (d,)."""
        return self.share_logit.sigmoid()

    def forward(
        self, z: torch.Tensor, s: torch.Tensor, h: torch.Tensor, blocks: Sequence[int] | None = None
    ) -> torch.Tensor:
        """c = F(z; s, h) of these blocks, sorted, all by default. Between s = 0 and 1 what the
        networks say is interpolated."""
        maps = self._maps(blocks)
        x, which = z.split([self.width, 1], dim=-1)
        there = which[: maps.number] > self._threshold()[maps.concepts]
        s = torch.cat([torch.where(there, 1.0, s[: maps.number]), s[maps.number :]])
        c = torch.zeros_like(x)
        for i in range(self.width):
            of_entry = self._mixtures(c, h, s, maps, range(i, i + 1))
            value = of_entry.quantile(x[..., i][:, None])[:, 0].to(x.dtype)  # (n, B)
            c = torch.cat([c[..., :i], value[..., None], c[..., i + 1 :]], dim=-1)
        return c

    def states(self, c: torch.Tensor, s: torch.Tensor, h: torch.Tensor, whole: bool) -> States:
        """What all maps say of c.

        Args:
            c: (D, B, w).
            s: (D, B, 1).
            h: of s = 0, (D, B, m).
            whole: whether all s are 0 or 1; others need maps of their own.
        """
        both = self._part(torch.cat([c, c[: self.concepts]]), h, None)
        obs, there = both.of(slice(self.blocks)), both.of(slice(self.blocks, None))
        return States(obs, there, obs if whole else self._part(c, (1 - s) * h, s))

    def inverse(self, states: States, s: torch.Tensor) -> torch.Tensor:
        """z with F(z; s, h) = c, (D, B, w + 1), of the more likely part of the mixture; its last
        entry in the middle of that part.

        Args:
            states: of c.
            s: (D, B, 1).
        """
        z, density, there, d = states.own.noise, states.own.density, states.there, self.concepts
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
        found = self._mixtures(c, h, s, self._maps(None), range(self.width))
        return Part(c, found, found.log_density(c.mT).sum(1))

    def _maps(self, blocks: Sequence[int] | None) -> _Maps:
        d, all_blocks = self.concepts, self.blocks
        if blocks is None:
            return _Maps(slice(all_blocks), slice(None), slice(d), d)
        concepts = [j for j in blocks if j < d]
        both = [*blocks, *(all_blocks + j for j in concepts)]
        return _Maps(list(blocks), both, concepts, len(concepts))

    def _mixtures(
        self,
        c: torch.Tensor,
        h: torch.Tensor,
        s: torch.Tensor | None,
        maps: _Maps,
        entries: range,
    ) -> Mixture:
        """Those of these entries of c, (n, entries, B, K), at strengths s; `None`: of all maps,
        each with a c of its own.
        """
        if s is not None:
            c = torch.cat([c, c[: maps.number]])
        w, count = self.width, len(entries)
        if maps.both == slice(None) and count == w:
            networks: slice | list[int] = slice(None)
        else:
            of_all = range(self.blocks + self.concepts)
            numbers = of_all[maps.both] if isinstance(maps.both, slice) else maps.both
            networks = [w * j + i for j in numbers for i in entries]
        own = torch.arange(entries.start, entries.stop, device=c.device)
        before = own[:, None] > torch.arange(w, device=c.device)  # (entries, w)
        read = c[:, None] * before[:, None]  # (n, entries, B, w): each reads those before it
        x = self.first(read.flatten(0, 1), networks).unflatten(0, (-1, count))
        n = len(h)
        x = gelu(torch.cat([x[:n] + h[:, None], x[n:]])).flatten(0, 1)
        for layer in self.hidden:
            x = x + gelu(layer(x, networks))
        x = self.last(x, networks).unflatten(0, (-1, count))
        return Mixture.of(x if s is None else _mixed(x, s[:, None]))

    def _threshold(self) -> torch.Tensor:
        """The quantile 1 - pi of N(0, 1), (d, 1, 1)."""
        return math.sqrt(2) * torch.erfinv(1 - 2 * self.shares.float())[:, None, None]


def _mixed(both: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """What both kinds of maps say, (n + k, ...), at strengths s, (n, B, 1): (n, ...)."""
    n = len(s)
    obs, intervened = both[:n], both[n:]
    k = len(intervened)
    mixed = torch.lerp(obs[:k], intervened, s[:k].to(obs.dtype))
    return torch.cat([mixed, obs[k:].expand(-1, *mixed.shape[1:])])


__all__ = ["ConceptFlow", "Part", "States"]
