"""Matching each context's aggregate posterior to the prior, while training (an addition to the paper's objective).

Samples come from the prior N(0, I); what training saw is the aggregate posterior of each context, q_k(z) = E_{x ~ context k} q(z | x, s).
Where the two differ, samples miss (METHOD section 7: most of the distance of a prior sample from a reconstruction). The ELBO holds them
together only by the few nats it has for that. The first moment is taken out by `InterventionHead.center_posterior`; this file follows
the second, by which `InterventionHead.whiten_posterior` takes it out too, and pulls on it:

    weight * mean over contexts k of || Cov_{q_k}[z] - I ||_F^2

A batch holds too few samples of a context for its covariance, so a running one is kept, C_k = E[m m^T + diag(var)]. With it fixed, the
gradient is that of a sum over samples, 2 weight <C_k - I, m m^T>: the same however the batch is split over processes and micro-batches.
Under a whitened posterior these are covariances of y; there the pull keeps y well-conditioned, without which training is slower.

The means m alone are pulled. Variances are the KL's to decide, and they are exponentials: where C_k, which follows late, is below I, a pull
on them raised them by orders of magnitude before it showed, and drowned z in noise.

Time and memory of that grow with the cube of the number of concepts. With many, `BlockMomentMatching` keeps the covariances within blocks
only, in two groups of contexts for each block, and is linear.
"""

import torch

from .posterior import fits


def moment_matching(
    targets: torch.Tensor, noise_width: int, weight: float, device: torch.device | str = "cpu"
) -> "MomentMatching | BlockMomentMatching":
    """The penalty for contexts with these targets, (contexts, D): of whole covariances, or for many concepts of those within blocks."""
    contexts, blocks = targets.shape
    if fits(contexts, blocks * noise_width):
        return MomentMatching(contexts, blocks * noise_width, weight, device=device)
    return BlockMomentMatching(targets, noise_width, weight, device=device)


class MomentMatching:
    """
    Args:
        contexts: number of contexts.
        width: size of z, D * noise_width; the state is contexts * width^2 numbers.
        weight: of the penalty, in nats.
        momentum: weight of a batch in the running covariance.
        device: of the state.
    """

    def __init__(self, contexts: int, width: int, weight: float, momentum: float = 0.02, device: torch.device | str = "cpu"):
        self.weight, self.momentum = weight, momentum
        self.excess = torch.zeros(contexts, width, width, device=device)  # C_k - I

    def loss(self, mean: torch.Tensor, context_ids: torch.Tensor) -> torch.Tensor:
        """Mean over the batch of the penalty's linear form: its gradient is the penalty's by the means, its value is not. Scalar, in nats.

        Args:
            mean: of the posterior, (B, D, noise_width).
            context_ids: context of each sample, (B,) integers.
        """
        m, _ = self._by_context(mean, context_ids)  # (k, B, w)
        quadratic = 2 * (torch.bmm(m.detach(), self.excess) * m).sum()  # m^T (C - I) m has the gradient 2 (C - I) m
        return 2 * self.weight * quadratic / len(mean)

    @property
    def covariance(self) -> torch.Tensor:
        """C_k, (contexts, width, width)."""
        return self.excess + torch.eye(self.excess.shape[1], device=self.excess.device)

    @torch.no_grad()
    def update(self, mean: torch.Tensor, logvar: torch.Tensor, context_ids: torch.Tensor, pace: float = 1.0) -> None:
        """Move the running covariances towards those of a global batch, `pace` times as fast; logvar like mean, others as for `loss`."""
        m, membership = self._by_context(mean, context_ids)
        counts = membership.sum(1, keepdim=True)  # (k, 1, 1)
        variance = (logvar.float().exp().flatten(1) * membership).sum(1) / counts[:, 0].clamp(min=1)  # (k, w)
        share = pace * self.momentum * (counts > 0)  # (k, 1, 1)
        self.excess.mul_(1 - share).baddbmm_((share / counts.clamp(min=1) * m).mT, m)
        self.excess.diagonal(dim1=1, dim2=2).add_(share[:, 0] * (variance - 1))

    def _by_context(self, mean: torch.Tensor, context_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        membership = torch.nn.functional.one_hot(context_ids, len(self.excess)).float().T[..., None]  # (k, B, 1)
        return mean.float().flatten(1) * membership, membership


class BlockMomentMatching:
    """The penalty of many concepts: of the covariance of each block z_j by itself, over the contexts in which concept j is intervened on and
    over all others. What it leaves out: correlations between blocks, and differences among contexts that leave concept j alone.

    Args:
        targets: of each context, (contexts, D).
        noise_width: n; the state is 2 D n^2 numbers.
        weight, momentum, device: as of `MomentMatching`. A batch with few samples of a group counts for less, those of a concept's own
            contexts being rare.
    """

    enough = 8  # samples

    def __init__(
        self, targets: torch.Tensor, noise_width: int, weight: float, momentum: float = 0.02, device: torch.device | str = "cpu"
    ):
        self.weight, self.momentum = weight, momentum
        self.intervened = (targets > 0).T.contiguous().to(device)  # (D, contexts)
        self.excess = torch.zeros(2, targets.shape[1], noise_width, noise_width, device=device)  # C - I: others, own

    def loss(self, mean: torch.Tensor, context_ids: torch.Tensor) -> torch.Tensor:
        """As `MomentMatching.loss`."""
        m, own = self._by_block(mean, context_ids)
        others, intervened = (m.detach() @ torch.cat(tuple(self.excess), dim=2)).chunk(2, dim=2)  # (D, B, n)
        quadratic = 2 * (torch.where(own, intervened, others) * m).sum()
        return 2 * self.weight * quadratic / len(mean)

    @torch.no_grad()
    def update(self, mean: torch.Tensor, logvar: torch.Tensor, context_ids: torch.Tensor, pace: float = 1.0) -> None:
        """As `MomentMatching.update`."""
        m, own = self._by_block(mean, context_ids)
        variance = logvar.float().exp().transpose(0, 1)
        for excess, group in zip(self.excess, (~own, own)):  # (D, n, n), (D, B, 1)
            counts = group.sum(1, keepdim=True)  # (D, 1, 1)
            share = pace * self.momentum * (counts / self.enough).clamp(max=1)
            weights = share / counts.clamp(min=1) * group  # (D, B, 1)
            excess.mul_(1 - share).baddbmm_((weights * m).mT, m)
            excess.diagonal(dim1=1, dim2=2).add_((weights * (variance - 1)).sum(1))

    def _by_block(self, mean: torch.Tensor, context_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return mean.float().transpose(0, 1), self.intervened[:, context_ids, None]  # (D, B, n), (D, B, 1)


__all__ = ["BlockMomentMatching", "MomentMatching", "moment_matching"]
