r"""Invertible mechanisms: how each concept comes about, as a density (an addition to the paper, where they are MLPs).

Block j of the concepts has two maps of its noise, F_j(.; 0) without and F_j(.; 1) with an intervention,

    eps_j = F_j(z_j; s_j),    z_j ~ N(0, I),    eps_j = c_j - (1 - s_j) sum_{i != j} W[j, i] c_i,

each a stack of affine couplings (Dinh et al., arXiv:1605.08803), so that both directions and the density are exact:

    log f_j(eps; s) = log N(z; 0, I) - log |det dF_j/dz|    at z = F_j^{-1}(eps; s).

Without an intervention a concept may be there all the same: 5 of 100 people wear glasses. One map is too smooth for that, and
puts half glasses on many. So without an intervention the noise is a mixture; with a share pi_j, learnt, it is that of one,

    p(eps_j | s_j) = (1 - pi_j) f_j(eps_j; s_j) + pi_j f_j(eps_j; 1).

The last entry of z_j says which: the second where it is above the quantile 1 - pi_j of N(0, 1).

So p(c | s) is known for every context. A posterior q(c | x) that is the same in every context can be fitted by it (see
`InterventionHead.kl`), and the decoder, which reads c alone, has nothing else by which to tell contexts apart. Free blocks are
never intervened on and have one map.
"""

import math

import torch
from torch import nn
from torch.nn.functional import gelu, logsigmoid

from .blocks import BlockLinear, SmallBlockLinear


SHARE = 0.05  # pi_j before training


class ConceptFlow(nn.Module):
    """The maps F_j of all blocks, and their mixtures.

    Shapes: z (D, B, w + 1); eps (D, B, w); s (D, B, 1), entries in [0, 1]. Maps are numbered: the first D are those
    without an intervention, the last d those with one.

    Args:
        concepts: d.
        blocks: D, concepts first.
        width: w; with w = 1 there is nothing to couple, and each map is affine.
        depth: couplings of each map.
        hidden_width: of the network in a coupling, which has one hidden layer.
    """

    def __init__(self, concepts: int, blocks: int, width: int, depth: int = 4, hidden_width: int = 32):
        super().__init__()
        self.concepts, self.blocks, self.width = concepts, blocks, width
        maps = blocks + concepts
        # Even couplings read the first part of a block and move the rest; odd ones the other way round.
        self.split = [width // 2, width - width // 2]
        self.hidden, self.move = nn.ModuleList(), nn.ModuleList()
        for layer in range(depth if width > 1 else 0):
            read, moved = self.split if layer % 2 == 0 else self.split[::-1]
            self.hidden.append(BlockLinear(maps, read, hidden_width))
            self.move.append(SmallBlockLinear(maps, hidden_width, 2 * moved))
        self.mean = nn.Parameter(torch.empty(maps, 1, width))
        self.log_scale = nn.Parameter(torch.empty(maps, 1, width))
        self.share_logit = nn.Parameter(torch.empty(concepts))  # of pi

    def reset_parameters(self) -> None:
        """Start near the identity, interventions elsewhere."""
        nn.init.zeros_(self.log_scale)
        nn.init.constant_(self.share_logit, math.log(SHARE / (1 - SHARE)))
        # Interventions start somewhere else, so that encoder and flow need not find out which way to part.
        with torch.no_grad():
            self.mean[: self.blocks].zero_()
            self.mean[self.blocks :].normal_(std=0.5)

    @property
    def shares(self) -> torch.Tensor:
        """pi_j of the concepts, (d,)."""
        return self.share_logit.sigmoid()

    def forward(self, z: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """eps = F(z; s). Between s = 0 and 1 shifts and log-scales of every layer are interpolated."""
        x, which = z.split([self.width, 1], dim=-1)
        there = which[: self.concepts] > self._threshold()
        s = torch.cat([torch.where(there, 1.0, s[: self.concepts]), s[self.concepts :]])
        for layer in range(len(self.hidden)):
            read, moved = self._halves(x, layer)
            shift, log_scale = self._coupling(layer, read, s)
            x = self._whole(read, moved * log_scale.exp() + shift, layer)
        mean, log_scale = self._mixed(self.mean, s), self._mixed(self.log_scale, s)
        return x * log_scale.exp() + mean

    def inverse(self, eps: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """z with F(z; s) = eps, of the more likely part of the mixture; its last entry in the middle of that part."""
        z, density = self._component(eps, s)
        d = self.concepts
        there, density_there = self._component(eps[:d], 1.0)
        without, within = (x[:, None] for x in (logsigmoid(-self.share_logit), logsigmoid(self.share_logit)))
        second = (density_there + within > density[:d] + without)[..., None] & (s[:d] < 1)  # (d, B, 1)
        share = self.shares.float()[:, None, None]
        middle = torch.where(second, 1 - share / 2, torch.where(s[:d] < 1, (1 - share) / 2, 0.5))
        which = math.sqrt(2) * torch.erfinv(2 * middle - 1)
        which = torch.cat([which, torch.zeros_like(z[d:, :, :1])]).to(z.dtype)
        return torch.cat([torch.cat([torch.where(second, there, z[:d]), z[d:]]), which], dim=-1)

    def log_density(self, eps: torch.Tensor, s: torch.Tensor | float) -> torch.Tensor:
        """log p(eps_j | s_j) of each block, (D, B), in nats.

        Args:
            eps: (D, B, w); with s = 1.0 of the concepts alone, (d, B, w).
            s: (D, B, 1), or 0.0 or 1.0 for all: then only maps of that kind are computed.
        """
        density, d = self._component(eps, s)[1], self.concepts
        if isinstance(s, float) and s == 1:
            return density
        there = self._component(eps[:d], 1.0)[1]
        mixture = torch.logaddexp(
            density[:d] + logsigmoid(-self.share_logit)[:, None], there + logsigmoid(self.share_logit)[:, None]
        )
        return torch.cat([mixture, density[d:]])

    def _component(self, eps: torch.Tensor, s: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
        """F^{-1}(eps; s), (D, B, w), and log f(eps; s), (D, B), without the mixture. Arguments as of `log_density`."""
        mean, log_scale = self._mixed(self.mean, s), self._mixed(self.log_scale, s)
        x = (eps - mean) * (-log_scale).exp()
        log_det = -log_scale.sum(-1).expand(x.shape[:2])
        for layer in reversed(range(len(self.hidden))):
            read, moved = self._halves(x, layer)
            shift, log_scale = self._coupling(layer, read, s)
            x = self._whole(read, (moved - shift) * (-log_scale).exp(), layer)
            log_det = log_det - log_scale.sum(-1)
        return x, log_det - 0.5 * (x.square() + math.log(2 * math.pi)).sum(-1)

    def _coupling(self, layer: int, read: torch.Tensor, s: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, move = self.hidden[layer], self.move[layer]
        if isinstance(s, float):
            maps = slice(self.blocks) if s == 0 else slice(self.blocks, None)
            out = move(gelu(hidden(read, maps)), maps)
        else:
            both = torch.cat([read, read[: self.concepts]])  # (D + d, B, read)
            out = self._mixed(move(gelu(hidden(both))), s)
        shift, log_scale = out.chunk(2, dim=-1)
        return shift, 2 * torch.tanh(log_scale / 2)  # a scale between exp(-2) and exp(2)

    def _mixed(self, of_maps: torch.Tensor, s: torch.Tensor | float) -> torch.Tensor:
        """From (D + d, ...) of all maps to (D, ...) of those under s."""
        obs, intervened = of_maps.split([self.blocks, self.concepts])
        if isinstance(s, float):
            return obs if s == 0 else intervened
        mixed = torch.lerp(obs[: self.concepts], intervened, s[: self.concepts].to(obs.dtype))
        return torch.cat([mixed, obs[self.concepts :].expand(-1, *mixed.shape[1:])])

    def _threshold(self) -> torch.Tensor:
        """The quantile 1 - pi of N(0, 1), (d, 1, 1)."""
        return math.sqrt(2) * torch.erfinv(1 - 2 * self.shares.float())[:, None, None]

    def _halves(self, x: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = x.split(self.split, dim=-1)
        return (first, second) if layer % 2 == 0 else (second, first)

    def _whole(self, read: torch.Tensor, moved: torch.Tensor, layer: int) -> torch.Tensor:
        return torch.cat((read, moved) if layer % 2 == 0 else (moved, read), dim=-1)


__all__ = ["ConceptFlow"]
