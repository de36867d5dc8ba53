r"""Likelihoods of pixels, in nats.

What training minimises, for pixels x in [0, 1]:

    Bernoulli (the paper's):   -x log m - (1 - x) log(1 - m), the binary cross-entropy;
    Gaussian:                  (x - m)^2 / (2 v) + log(2 pi v) / 2, with one variance v.

Neither is the length of a code for an image of bytes: the first is not normalised over the values
between 0 and 1, and the second is a density. The code lengths give every byte b = 255 x a
probability, and these sum to 1 over the 256 values:

    Bernoulli:   P(b) = m^x (1 - m)^(1 - x) / sum_b' m^x' (1 - m)^(1 - x');
    Gaussian:    P(b) = the mass of N(m, v) between x - 1/510 and x + 1/510; the first and the last byte
                 have the tails (Salimans et al., arXiv:1701.05517, for another density).
"""  # noqa: E501

import math

import torch
from torch.nn.functional import binary_cross_entropy_with_logits


STEPS = 255  # between the bytes of a pixel
FIRST_SPREAD = 0.2  # sqrt(v) of a pixel in [0, 1] before training


def gaussian_loss(
    mean: torch.Tensor, pixel_values: torch.Tensor, log_variance: torch.Tensor
) -> torch.Tensor:
    """-log N(x; mean, v) of images x, both (B, C, H, W), with one variance v: (B,), nats."""
    log_variance = log_variance.float()
    squares = (mean.float() - pixel_values.float()).square().flatten(1)
    return 0.5 * (squares / log_variance.exp() + log_variance + math.log(2 * math.pi)).sum(1)


def bernoulli_loss(logits: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of images and logits, both (B, C, H, W): (B,), nats."""
    loss = binary_cross_entropy_with_logits(logits.float(), pixel_values.float(), reduction="none")
    return loss.flatten(1).sum(1)


def gaussian_code_length(
    mean: torch.Tensor, pixel_values: torch.Tensor, log_variance: torch.Tensor
) -> torch.Tensor:
    """-log P(b) of images of bytes under the Gaussian: (B,), float32, nats.

    Args:
        mean: (B, C, H, W).
        pixel_values: b / 255, (B, C, H, W).
        log_variance: scalar.
    """
    # On the CPU: not all devices have float64.
    m, x, v = (value.detach().double().cpu() for value in (mean, pixel_values, log_variance))
    level = (x * STEPS).round()
    above = ((level + 0.5) / STEPS - m) / (v / 2).exp()
    below = ((level - 0.5) / STEPS - m) / (v / 2).exp()
    above = torch.where(level == STEPS, math.inf, above)
    below = torch.where(level == 0, -math.inf, below)
    # The mass between two points far above the mean is that between their mirror images.
    mirrored = above + below > 0
    high, low = torch.where(mirrored, -below, above), torch.where(mirrored, -above, below)
    log_high, log_low = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    log_mass = log_high + torch.log(-torch.expm1(log_low - log_high))
    return -log_mass.flatten(1).sum(1).float().to(mean.device)


def bernoulli_code_length(logits: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
    """-log P(b) of images of bytes under the normalised Bernoulli: (B,), float32, nats.

    Args:
        logits: (B, C, H, W).
        pixel_values: b / 255, (B, C, H, W).
    """
    x, logit = (value.detach().double().cpu() for value in (pixel_values, logits))
    # log sum_b exp(b a) with a = logit / 255, a geometric series; at a = 0 it is log 256.
    a = logit / STEPS
    slope = a.abs().clamp(min=1e-12)
    series = torch.log(torch.expm1(-(STEPS + 1) * slope) / torch.expm1(-slope))
    lengths = series + STEPS * a.clamp(min=0) - (x * STEPS).round() * a
    return lengths.flatten(1).sum(1).float().to(logits.device)
