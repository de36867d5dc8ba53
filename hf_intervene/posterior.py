r"""The encoder's side of the head: the posterior over the exogenous noise z (METHOD sections 3 and
7), and its whitening.

The readout gives a diagonal Gaussian over numbers y,

    q(y | x, s) = N(m(x, s), diag(var(x, s))),

and z = T_k (y - o_k), k being the context of s, o_k the mean of y over the images of that context
and T_k = Cov_k[y]^(-1/2) (an addition to the paper, where z = y). So whatever the encoder does, z
has mean 0 and covariance I over every context with at most one intervention, as the prior from
which samples come has in every context. Without that an encoder shifts and correlates z by context,
and keeps copies of one number in many places; then samples from the prior miss what A_int and W
should carry. Neither does z pay nats for it: with e_i the i-th unit vector,

    KL(q(z | x, s) || N(0, I)) = 1/2 (|T (m - o)|^2 + sum_i (var_i |T e_i|^2 - 1 - log var_i)) - log det T.
"""  # noqa: E501

import math

import torch
from torch import nn


LARGEST = (
    2**22
)  # numbers in the matrices of all contexts: those of 15 concepts and a free block of the default width, 16 MiB  # noqa: E501


class PosteriorLinear(nn.Linear):
    """Last layer of the posterior, (B, in_width) -> (B, 2 n): means, then log-variances.

    It starts at a standard deviation of about `std`, with means larger by 1 / std than nn.Linear
    starts them. Next to the prior, where that would start, z says hardly anything, and a deep head
    takes long to hear it."""

    def __init__(self, in_width: int, out_width: int, std: float):
        self.std = std
        super().__init__(in_width, out_width)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        means = self.out_features // 2
        with torch.no_grad():
            self.weight[:means] /= self.std
            self.bias[means:] += 2 * math.log(self.std)


class Whitening(nn.Module):
    """The maps T_k of all training contexts, symmetric and positive definite; identities before
    they are loaded.

    Version 0.1 trained with them; the trainer no longer does, and models that have them load.

    Args:
        contexts: 1 + d: the observational one, then those of the concepts.
        width: of y, D * noise_width.
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
        self.register_buffer("log_det", torch.zeros(contexts))

    def forward(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """z = T(s) y, float32, (B, D, n), of centred y (B, D, n), with T(s) = sum_k weights_k T_k,
        weights (B, 1 + d) (see `mixture`).
        """
        with torch.autocast(y.device.type, enabled=False):
            return _mixed_product(
                y.flatten(1).float(), weights.float(), self.matrix.float()
            ).view_as(y)  # T_k is symmetric

    def variance(self, variance: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Marginal variances of z, (B, D, n), of those of y; where `weights` mix contexts, an upper
        bound (squares are convex).
        """
        with torch.autocast(variance.device.type, enabled=False):
            return _mixed_product(
                variance.flatten(1).float(), weights.float(), self.matrix.float().square()
            ).view_as(variance)

    def kl(self, mean: torch.Tensor, logvar: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """KL(q(z | x, s) || N(0, I)) of each sample in nats, (B,), of mean and log-variance of y,
        (B, D, n). Where `weights` mix contexts, an upper bound: squares are convex, and log det is
        concave."""
        with torch.autocast(mean.device.type, enabled=False):
            columns = weights.float() @ self.matrix.float().square().sum(1)  # (B, D n): |T e_i|^2
            logvar = logvar.flatten(1).float()
            terms = self(mean, weights).flatten(1).square() + columns * logvar.exp() - 1 - logvar
            return 0.5 * terms.sum(1) - weights.float() @ self.log_det.float()


def _mixed_product(y: torch.Tensor, weights: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """sum_k weights_k y M_k of rows y (B, n), weights (B, 1 + d) and matrices M_k (1 + d, n, n) ->
    (B, n).

    Most rows are of one context only. Where that can be looked up, the other products are left out.
    """
    if not at_hand(weights):
        return torch.einsum("bk,kbi->bi", weights, y @ matrix)
    product = torch.zeros_like(y)
    for weight, M in zip(weights.T, matrix):
        rows = weight.nonzero()[:, 0]
        product.index_add_(0, rows, weight[rows, None] * (y[rows] @ M))
    return product


def at_hand(x: torch.Tensor) -> bool:
    """Whether the host can look at values at next to no cost: not on a device, which it would have
    to wait for, nor in a graph, whose shapes would depend on them."""
    return x.device.type == "cpu" and not x.requires_grad and not torch.compiler.is_compiling()


def row_of(targets: torch.Tensor) -> torch.Tensor:
    """The training context of each row of targets, (B, d), with nothing or one concept intervened
    on: 0 or 1 + j, (B,).
    """
    return torch.where(targets.any(1), 1 + targets.argmax(1), 0)


def has_row(targets: torch.Tensor) -> torch.Tensor:
    """Whether each row of targets, (B, d), has nothing or one whole concept intervened on, (B,):
    `row_of` is for those.
    """
    return ((targets == 0) | (targets == 1)).all(1) & (targets.sum(1) <= 1)


def mixture(targets: torch.Tensor) -> torch.Tensor:
    """How much a row of targets, (B, d), is of each training context: weights (B, 1 + d) that are
    not negative and sum to 1.

    A context with one concept at strength s is 1 - s of the observational one; one with several, as
    much of each concept's own."""
    s = targets.float()
    weights = torch.cat([1 - s.sum(1, keepdim=True), s], dim=1).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def gaussian_kl(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, exp(logvar)) || N(0, I)) of each sample in nats: (B, ...) -> (B,)."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)


__all__ = ["PosteriorLinear", "Whitening", "gaussian_kl", "has_row", "mixture", "row_of"]
