r"""Residual latents: what the concepts leave open of an autoencoder's own spatial latents r, with a
learnt prior p(r | c).

A head alone is a bottleneck of a few hundred numbers, which blurs a strong decoder. With residual
latents the model is a hierarchical VAE of two groups: z, which the concepts come from, then r given
the concepts,

    p(x, r, z | s) = p(z) p(r | c(z, s)) p(x | r),        q(z, r | x, s) = q(z | x, s) q(r | x),

    -ELBO = E_q[-log p(x | r)] + KL(q(z | x, s) || p(z)) + E_q[log q(r | x) - log p(r | c)].

Training adds the reconstruction by the concepts alone, -log p(x | c), from the latents m(c) that
they ask for. Without it the residual carries everything: on quad z had collapsed to 0.01 nats after
200 steps.

q(r | x) is the autoencoder's own posterior. p(r | c) is an invertible map of standard normal noise
rho, so that an edit can keep the noise of an image and change its concepts: rho = f^-1(r; c), then
r' = f(rho; c'). With c' = c that is the identity, and the image comes back as sharp as the
autoencoder itself can make it."""

import math

import torch
from torch import nn


_MAX_LOG_SCALE = 2.0  # of one coupling: keeps the inverse well conditioned


class ResidualPrior(nn.Module):
    r"""p(r | m) of latents r (B, c, h, h) given the latents m (B, c, h, h) that the concepts ask
    for.

    r = m + exp(l(m)) y, where y comes from rho ~ N(0, I) by `layers` affine couplings: each scales
    and shifts one half of the entries by functions of the other half and of m (RealNVP; Dinh et
    al., arXiv:1605.08803). The halves are those of a checkerboard and of the channels in turn. It
    starts as N(m, exp(2 l)) with a constant l. Sums of logarithms are in float32 whatever the
    precision of the networks.

    Args:
        channels: c.
        layers: number of couplings.
        hidden: width of their networks.
    """

    def __init__(self, channels: int, layers: int, hidden: int = 64):
        super().__init__()
        self.log_scale = _network(channels, hidden, channels)
        self.couplings = nn.ModuleList(
            _network(2 * channels, hidden, 2 * channels) for _ in range(layers)
        )

    def forward(self, rho: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        """Latents r of noise rho, both (B, c, h, h), float32."""
        y = rho.float()
        for number, network in enumerate(self.couplings):
            log_scale, shift, moved = self._coupling(number, network, y, m)
            y = torch.where(moved, y * log_scale.exp() + shift, y)
        return m.float() + self.log_scale(m).float().exp() * y

    def inverse(self, r: torch.Tensor, m: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The noise rho of latents r, (B, c, h, h), and log p(r | m) of each sample in nats, (B,);
        float32.
        """
        log_scale = self.log_scale(m).float()
        y = (r.float() - m.float()) * (-log_scale).exp()
        log_volume = log_scale.flatten(1).sum(1)
        for number, network in reversed(list(enumerate(self.couplings))):
            log_scale, shift, moved = self._coupling(number, network, y, m)
            y = torch.where(moved, (y - shift) * (-log_scale).exp(), y)
            log_volume = log_volume + (log_scale * moved).flatten(1).sum(1)
        log_normal = -0.5 * (y.square() + math.log(2 * math.pi)).flatten(1).sum(1)
        return y, log_normal - log_volume

    def _coupling(
        self, number: int, network: nn.Module, y: torch.Tensor, m: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-scale and shift of each entry, and which entries they are for."""
        moved = _half(number, y)
        dtype = next(network.parameters()).dtype
        given = torch.cat([y.masked_fill(moved, 0).to(dtype), m.to(dtype)], dim=1)
        raw, shift = network(given).float().chunk(2, dim=1)
        return _MAX_LOG_SCALE * torch.tanh(raw / _MAX_LOG_SCALE), shift, moved


def _network(in_channels: int, hidden: int, out_channels: int) -> nn.Sequential:
    last = nn.Conv2d(hidden, out_channels, 3, padding=1)
    for parameter in last.parameters():
        nn.init.zeros_(parameter)
    return nn.Sequential(
        nn.Conv2d(in_channels, hidden, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(hidden, hidden, 3, padding=1),
        nn.GELU(),
        last,
    )


def _half(number: int, y: torch.Tensor) -> torch.Tensor:
    """Which half of (B, c, h, h) coupling `number` moves, as a boolean mask that broadcasts: white,
    black, first channels, last ones.
    """
    channels, height, width = y.shape[1:]
    if number % 4 < 2 or channels == 1:
        rows, columns = torch.arange(height, device=y.device), torch.arange(width, device=y.device)
        return ((rows[:, None] + columns + number) % 2 == 0).expand(1, 1, height, width)
    return ((torch.arange(channels, device=y.device) < channels // 2) == (number % 2 == 0))[
        None, :, None, None
    ]
