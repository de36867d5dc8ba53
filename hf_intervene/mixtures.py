"""Mixtures of logistic distributions as maps from noise to values: density, noise of a value, value
of a noise.

A value c and its noise z are the same quantile, of the mixture and of N(0, 1):

    Phi(z) = sum_k p_k sigmoid((c - m_k) / v_k)

Logistic, not Gaussian, as in PixelCNN++ (Salimans et al., arXiv:1701.05517): far from a narrow
component the log-density falls linearly, so that one far value does not throw training off.
"""

import math
from typing import NamedTuple

import torch
from torch.nn.functional import softplus
from torch.special import log_ndtr, ndtr, ndtri


_LARGEST = 5.0  # of a log-scale, and of its negative


class Mixture(NamedTuple):
    """Mixtures of K logistic distributions, one for each value: (..., K) each, float32 or float64."""

    log_weight: torch.Tensor
    mean: torch.Tensor
    log_scale: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor) -> "Mixture":
        """Those that a network's output x, (..., 3 K), stands for."""
        x = x if x.dtype == torch.float64 else x.float()
        logits, mean, log_scale = x.chunk(3, dim=-1)
        return cls(logits.log_softmax(-1), mean, _LARGEST * torch.tanh(log_scale / _LARGEST))

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
