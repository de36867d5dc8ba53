r"""The encoder's side of the head: the posterior over the exogenous noise z, and its whitening.

See METHOD sections 3 and 7.

The readout gives a diagonal Gaussian over numbers y,

    q(y | x, s) = N(m(x, s), diag(var(x, s))),

and z = T_k (y - o_k), k being the context of s, o_k the mean of y over the images of that context
and T_k = Cov_k[y]^(-1/2). This is an addition to the paper, where z = y. So z has mean 0 and
covariance I over every context with at most one intervention, whatever the encoder does. The prior,
from which samples are drawn, has the same mean and covariance. Without whitening, an encoder shifts
and correlates z by context, and stores one number in many places. Then samples from the prior lack
what A_int and W should carry. With whitening, none of this changes the KL divergence. With e_i the
i-th unit vector,

    KL(q(z | x, s) || N(0, I))
        = 1/2 (|T (m - o)|^2 + sum_i (var_i |T e_i|^2 - 1 - log var_i)) - log det T.
"""

import math

import torch
from torch import nn


# Numbers in the matrices of all contexts together: enough for 15 concepts and a free block of the
# default width, 16 MiB.
LARGEST = 2**22


class PosteriorLinear(nn.Linear):
    """Last layer of the posterior, (B, in_width) -> (B, 2 n): means, then log-variances.

    It starts at a standard deviation of about `std`, with means larger by a factor of 1 / std than
    those of a new nn.Linear. An nn.Linear would start near the prior. There z carries hardly any
    information, and a deep head needs many steps to use it.

    Args:
        in_width: width of the features.
        out_width: 2 n.
        std: initial standard deviation.
    """

    def __init__(self, in_width: int, out_width: int, std: float):
        self.std = std
        super().__init__(in_width, out_width)

    def reset_parameters(self) -> None:
        """Draw the weights anew, for posteriors of the standard deviation `std`."""
        super().reset_parameters()
        means = self.out_features // 2
        with torch.no_grad():
            self.weight[:means] /= self.std
            self.bias[means:] += 2 * math.log(self.std)


class Whitening(nn.Module):
    """The maps T_k of all training contexts: symmetric, positive definite, at first identities.

    Version 0.1 trained with them. The trainer no longer does, but models that have them load.

    Args:
        contexts: 1 + d: the observational context, then that of each concept.
        width: width of y, D * noise_width.

    Raises:
        ValueError: the matrices would have more than `LARGEST` numbers.
    """

    matrix: torch.Tensor
    log_det: torch.Tensor

    def __init__(self, contexts: int, width: int):
        super().__init__()
        if contexts * width**2 > LARGEST:
            raise ValueError(
                f"whitening takes {contexts} matrices of {width} x {width} numbers, more than"
                f" {LARGEST:,} in all: with so many concepts, or blocks so wide, use"
                ' posterior="centered".'
            )
        self.register_buffer("matrix", torch.eye(width).repeat(contexts, 1, 1))
        self.register_buffer("log_det", torch.zeros(contexts))  # in checkpoints, and not used

    def forward(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return z = T(s) y, with T(s) = sum_k weights_k T_k.

        Args:
            y: centred, (B, D, n).
            weights: (B, 1 + d), see `mixture`.

        Returns:
            float32, (B, D, n).
        """
        with torch.autocast(y.device.type, enabled=False):
            # T_k is symmetric, so rows y T_k are T_k y.
            return _mixed_product(
                y.flatten(1).float(), weights.float(), self.matrix.float()
            ).view_as(y)

    def variance(self, variance: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the marginal variances of z, (B, D, n), from those of y.

        Where `weights` mix contexts, the result is an upper bound: squares are convex.
        """
        with torch.autocast(variance.device.type, enabled=False):
            return _mixed_product(
                variance.flatten(1).float(), weights.float(), self.matrix.float().square()
            ).view_as(variance)

    def kl(self, mean: torch.Tensor, logvar: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return KL(q(z | x, s) || N(0, I)) of each sample in nats, (B,).

        Where `weights` mix contexts, the result is an upper bound: squares are convex, and log det
        is concave.

        Args:
            mean: centred means of y, (B, D, n).
            logvar: log-variances of y, (B, D, n).
            weights: (B, 1 + d).
        """
        with torch.autocast(mean.device.type, enabled=False):
            columns = weights.float() @ self.matrix.float().square().sum(1)  # (B, D n): |T e_i|^2
            logvar = logvar.flatten(1).float()
            terms = self(mean, weights).flatten(1).square() + columns * logvar.exp() - 1 - logvar
            # Of the matrices as they are: after a save in half precision a stored sum of
            # logarithms would be off by its rounding, which is more than that of its terms.
            log_det = torch.linalg.slogdet(self.matrix.float())[1]
            return 0.5 * terms.sum(1) - weights.float() @ log_det


def _mixed_product(y: torch.Tensor, weights: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Return sum_k weights_k y M_k, (B, n).

    Most rows belong to one context only. If the weights can be read, the products that have weight
    0 are left out.

    Args:
        y: (B, n).
        weights: (B, 1 + d).
        matrix: the M_k, (1 + d, n, n).
    """
    if not is_readable(weights):
        return torch.einsum("bk,kbi->bi", weights, y @ matrix)
    product = torch.zeros_like(y)
    for weight, M in zip(weights.T, matrix):
        rows = weight.nonzero()[:, 0]
        product.index_add_(0, rows, weight[rows, None] * (y[rows] @ M))
    return product


def is_readable(x: torch.Tensor) -> bool:
    """Whether Python can read the values of a tensor at almost no cost.

    It cannot on a device, which it would have to wait for, nor while a graph is compiled, whose
    shapes would depend on the values.
    """
    return x.device.type == "cpu" and not x.requires_grad and not torch.compiler.is_compiling()


def row_of(targets: torch.Tensor) -> torch.Tensor:
    """Return the training context of each row of targets, (B, d): 0 or 1 + j, (B,).

    At most one concept of a row may be intervened on.
    """
    return torch.where(targets.any(1), 1 + targets.argmax(1), 0)


def has_row(targets: torch.Tensor) -> torch.Tensor:
    """Whether each row of targets, (B, d), intervenes fully on at most one concept: bool (B,).

    These are the rows that `row_of` takes.
    """
    return ((targets == 0) | (targets == 1)).all(1) & (targets.sum(1) <= 1)


def mixture(targets: torch.Tensor) -> torch.Tensor:
    """Return each row of targets, (B, d), as a mixture of the training contexts.

    The weights, (B, 1 + d), are not negative and sum to 1. A row with one concept at strength s has
    weight 1 - s of the observational context. A row with several concepts has a weight in
    proportion to the strength of each.
    """
    s = targets.float()
    weights = torch.cat([1 - s.sum(1, keepdim=True), s], dim=1).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def gaussian_kl(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """Return KL(N(mean, exp(logvar)) || N(0, I)) of each sample in nats: (B, ...) -> (B,)."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)


__all__ = ["PosteriorLinear", "Whitening", "gaussian_kl", "has_row", "mixture", "row_of"]
