"""Mixtures of logistic distributions as maps from noise to values: density, noise of a value, value
of a noise.

A value c and its noise z are the same quantile, of the mixture and of N(0, 1):

    Phi(z) = sum_k p_k sigmoid((c - m_k) / v_k)

Logistic, not Gaussian, as in PixelCNN++ (Salimans et al., arXiv:1701.05517): far from a narrow
component the log-density falls linearly.
"""

import math
from typing import NamedTuple

import torch
from torch.nn.functional import pad, softplus
from torch.special import log_ndtr, ndtr, ndtri


# Bound of a log-scale and of its negative. Narrower components than codes have use for make the
# gradient of context prediction large, and training at 64x64 unstable.
_LARGEST = 2.5
# The log-weight, mean and log-scale of one more component, which is broad. It bounds what a value
# far from all others costs: without it a few such values threw training off.
_BROAD = (math.log(1e-4), 0.0, math.log(3.0))


class Mixture(NamedTuple):
    """Mixtures of logistic distributions, one for each value: (..., K + 1) each, float32 or
    float64."""

    log_weight: torch.Tensor
    mean: torch.Tensor
    log_scale: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor) -> "Mixture":
        """Of a network's output x, (..., 3 K): K components, and a broad one."""
        x = x if x.dtype == torch.float64 else x.float()
        logits, mean, log_scale = x.chunk(3, dim=-1)
        log_weight = logits.log_softmax(-1) + math.log1p(-math.exp(_BROAD[0]))
        found = log_weight, mean, _LARGEST * torch.tanh(log_scale / _LARGEST)
        return cls(*(pad(part, (0, 1), value=value) for part, value in zip(found, _BROAD)))

    def of_blocks(self, blocks: slice) -> "Mixture":
        """Those of a part of the first dimension."""
        return Mixture(*(x[blocks] for x in self))

    def log_density(self, c: torch.Tensor) -> torch.Tensor:
        """Log-density of values c, (...)."""
        u = self._standard(c)
        of_each = self.log_weight - self.log_scale - softplus(u) - softplus(-u)
        return of_each.logsumexp(-1)

    def noise(self, c: torch.Tensor) -> torch.Tensor:
        """z of values c, (...). It follows from the smaller of both tails, which is exact where the
        other one is rounded to 1.
        """
        u = self._standard(c)
        weight, least = self.log_weight.exp(), torch.finfo(u.dtype).tiny
        below, above = ((weight * x.sigmoid()).sum(-1).clamp(min=least) for x in (u, -u))
        return torch.where(below < above, ndtri(below.clamp(max=0.5)), -ndtri(above.clamp(max=0.5)))

    def quantile(self, z: torch.Tensor) -> torch.Tensor:
        """Values c of noise z, (...), by bisection; with the gradient of the exact inverse."""
        with torch.no_grad():
            c = self._bisect(z.to(self.mean))
        if not torch.is_grad_enabled():
            return c
        found = self.noise(c)
        log_slope = self.log_density(c) + 0.5 * (found.square() + math.log(2 * math.pi))  # dz / dc
        change = (z - found) / log_slope.detach().exp().clamp(min=1e-6)
        return c + change - change.detach()

    def _bisect(self, z: torch.Tensor) -> torch.Tensor:
        # Where all components are above their own quantile the mixture is above its quantile too.
        u = (log_ndtr(z) - log_ndtr(-z))[..., None]  # sigmoid(u) = Phi(z)
        ends = self.mean + self.log_scale.exp() * u
        low, high = ends.amin(-1), ends.amax(-1)
        is_low, tail = z < 0, ndtr(-z.abs())  # the smaller tail
        sign, weight = torch.where(is_low, 1.0, -1.0).to(z)[..., None], self.log_weight.exp()
        for _ in range(52 if z.dtype == torch.float64 else 28):
            middle = (low + high) / 2
            share = (weight * (sign * self._standard(middle)).sigmoid()).sum(-1)
            below = (share < tail) == is_low
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def _standard(self, c: torch.Tensor) -> torch.Tensor:
        return (c[..., None] - self.mean) * (-self.log_scale).exp()


__all__ = ["Mixture"]
