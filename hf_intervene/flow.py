r"""Invertible mechanisms: how each concept comes about, as a density (an addition to the paper, where they are MLPs).

Block j of the concepts has two maps of its noise, one for s_j = 0 and one for s_j = 1,

    eps_j = F_j(z_j; s_j),    z_j ~ N(0, I),    eps_j = c_j - (1 - s_j) sum_{i != j} W[j, i] c_i,

each a stack of affine couplings (Dinh et al., arXiv:1605.08803), so that both directions and the density are exact:

    log p(eps_j | s_j) = log N(z_j; 0, I) - log |det dF_j/dz_j|.

So p(c | s) is known for every context. A posterior q(c | x) that is the same in every context can be fitted by it
(see `InterventionHead.kl`), and the decoder, which reads c alone, has nothing else by which to tell contexts apart.
Free blocks are never intervened on and have one map only.
"""

import math

import torch
from torch import nn

from .blocks import BlockLinear


class ConceptFlow(nn.Module):
    """The maps F_j of all blocks.

    Shapes: z, eps (D, B, w); s (D, B, 1). Maps are numbered: the first D are those of s_j = 0, the last d those of s_j = 1.

    Args:
        concepts: d.
        blocks: D, concepts first.
        width: w; with w = 1 there is nothing to couple, and each map is affine.
        depth: couplings of each map.
        hidden_width: of the network in a coupling, which has one hidden layer.
    """

    def __init__(self, concepts: int, blocks: int, width: int, depth: int = 4, hidden_width: int = 32):
        super().__init__()
        self.concepts, self.blocks = concepts, blocks
        maps = blocks + concepts
        # Even couplings read the first part of a block and move the rest; odd ones the other way round.
        self.split = [width // 2, width - width // 2]
        self.hidden, self.move = nn.ModuleList(), nn.ModuleList()
        for layer in range(depth if width > 1 else 0):
            read, moved = self.split[:: 1 if layer % 2 == 0 else -1]
            self.hidden.append(BlockLinear(maps, read, hidden_width))
            self.move.append(ZeroBlockLinear(maps, hidden_width, 2 * moved))
        self.mean = nn.Parameter(torch.empty(maps, 1, width))
        self.log_scale = nn.Parameter(torch.empty(maps, 1, width))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.log_scale)
        # An intervention starts somewhere else, so that the encoder and the flow do not have to find out which way to part.
        nn.init.zeros_(self.mean[: self.blocks])
        nn.init.normal_(self.mean[self.blocks :], std=0.5)

    def forward(self, z: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """eps = F(z; s). Between s = 0 and 1 the shifts and log-scales of every layer are interpolated."""
        x = z
        for layer in range(len(self.hidden)):
            read, moved = self._halves(x, layer)
            shift, log_scale = self._coupling(layer, read, s)
            x = self._whole(read, moved * log_scale.exp() + shift, layer)
        mean, log_scale = self._mixed(self.mean, s), self._mixed(self.log_scale, s)
        return x * log_scale.exp() + mean

    def inverse(self, eps: torch.Tensor, s: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
        """z with F(z; s) = eps, and log |det dz/deps|, (D, B).

        Args:
            eps: (D, B, w); with s = 1 of the concepts alone, (d, B, w).
            s: (D, B, 1), or 0.0 or 1.0 for all: then only maps of that kind are computed.
        """
        mean, log_scale = self._mixed(self.mean, s), self._mixed(self.log_scale, s)
        x = (eps - mean) * (-log_scale).exp()
        log_det = -log_scale.sum(-1).expand(x.shape[:2])
        for layer in reversed(range(len(self.hidden))):
            read, moved = self._halves(x, layer)
            shift, log_scale = self._coupling(layer, read, s)
            x = self._whole(read, (moved - shift) * (-log_scale).exp(), layer)
            log_det = log_det - log_scale.sum(-1)
        return x, log_det

    def log_density(self, eps: torch.Tensor, s: torch.Tensor | float) -> torch.Tensor:
        """log p(eps_j | s_j) of each block, (D, B), in nats; arguments as of `inverse`."""
        z, log_det = self.inverse(eps, s)
        return log_det - 0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)

    def _coupling(self, layer: int, read: torch.Tensor, s: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, move = self.hidden[layer], self.move[layer]
        if isinstance(s, float):
            maps = slice(self.blocks) if s == 0 else slice(self.blocks, None)
            out = move(nn.functional.gelu(hidden(read, maps)), maps)
        else:
            both = torch.cat([read, read[: self.concepts]])  # (D + d, B, read)
            out = self._mixed(move(nn.functional.gelu(hidden(both))), s)
        shift, log_scale = out.chunk(2, dim=-1)
        return shift, 2 * torch.tanh(log_scale / 2)  # a scale between exp(-2) and exp(2)

    def _mixed(self, of_maps: torch.Tensor, s: torch.Tensor | float) -> torch.Tensor:
        """From (D + d, ...) of all maps to (D, ...) of those under s."""
        obs, intervened = of_maps.split([self.blocks, self.concepts])
        if isinstance(s, float):
            return obs if s == 0 else intervened
        mixed = torch.lerp(obs[: self.concepts], intervened, s[: self.concepts])
        return torch.cat([mixed, obs[self.concepts :].expand(-1, *mixed.shape[1:])])

    def _halves(self, x: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = x.split(self.split, dim=-1)
        return (first, second) if layer % 2 == 0 else (second, first)

    def _whole(self, read: torch.Tensor, moved: torch.Tensor, layer: int) -> torch.Tensor:
        return torch.cat((read, moved) if layer % 2 == 0 else (moved, read), dim=-1)
