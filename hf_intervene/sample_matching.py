r"""Matching samples to images, context by context (an addition to the paper's objective).

The ELBO sees images and what their posteriors are decoded to, and never a sample. Here samples of each context, z from the prior, are
compared with its training images by their energy distance (Székely and Rizzo, 2013; as an objective: Bellemare et al., arXiv:1705.10743),

    E_k = 2 E|y - x| - E|y - y'| - E|x - x'|,    y, y' ~ p(x | s_k),    x, x' images of context k,

which is 0 only where the two distributions are the same. Unlike that of a Wasserstein distance its estimate from few samples is not biased,
and nothing has to be learnt for it. |y - x| is the root mean square over the values of an image (pixels times channels), so that E_k does
not depend on the resolution; the last term depends on no weight of the model and is left out.

It is a sum over small groups of samples, each of one context: the same however a batch is split over processes and micro-batches.
"""

import torch


GROUP = 4  # samples of a context that are compared with one another
IMAGES = 16  # of the context, which they are compared with
EVERY = 4  # rows of a batch for a group; it is of the context of the first
NOT_FOR_DENOISERS = "sample matching is not for denoisers, whose samples take many steps: set sample_matching to 0."


def energy_distance(samples: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """2 E|y - x| - E|y - y'| of each of G groups, an estimate without bias: (G,), float32.

    Args:
        samples: y, (G, n, ...), n of at least 2.
        images: x, (G, m, ...), with as many values each.
    """
    y, x = samples.float().flatten(2), images.float().flatten(2)
    n, scale = y.shape[1], y.shape[2] ** 0.5
    # Not by products of matrices: at first all samples are nearly the same, and nothing but rounding would be left of their distances.
    across, within = (torch.cdist(y, other, compute_mode="donot_use_mm_for_euclid_dist") for other in (x, y))
    others = 1 - torch.eye(n, device=y.device)
    return (2 * across.mean((1, 2)) - (within * others).sum((1, 2)) / (n * (n - 1))) / scale


__all__ = ["EVERY", "GROUP", "IMAGES", "NOT_FOR_DENOISERS", "energy_distance"]
