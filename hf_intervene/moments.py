"""Matching each context's aggregate posterior to the prior, while training (an addition to the paper's objective).

Samples come from the prior N(0, I); what training saw is the aggregate posterior of each context, q_k(z) = E_{x ~ context k} q(z | x, s).
Where the two differ, samples miss (METHOD section 7: most of the distance of a prior sample from a reconstruction). The ELBO holds them
together only by the few nats it has for that. The first moment is taken out by `InterventionHead.center_posterior`; this file pulls on
the second:

    weight * mean over contexts k of || Cov_{q_k}[z] - I ||_F^2

A batch holds too few samples of a context for its covariance, so a running one is kept, C_k. With it fixed, the gradient is that of a sum
over samples, 2 weight <C_k - I, m m^T + diag(var)>: the same however the batch is split over processes and micro-batches.
"""

import torch


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

    def loss(self, mean: torch.Tensor, logvar: torch.Tensor, context_ids: torch.Tensor) -> torch.Tensor:
        """Mean over the batch of the penalty's linear form: its gradient is the penalty's, its value is not. Scalar, in nats.

        Args:
            mean, logvar: of the posterior, (B, D, noise_width).
            context_ids: context of each sample, (B,) integers.
        """
        m, membership = self._by_context(mean, context_ids)  # (k, B, w), (k, B, 1)
        quadratic = (torch.bmm(m, self.excess) * m).sum()
        variance = logvar.float().exp().flatten(1) * membership  # (k, B, w)
        diagonal = (variance * self.excess.diagonal(dim1=1, dim2=2)[:, None]).sum()
        return 2 * self.weight * (quadratic + diagonal) / len(mean)

    @torch.no_grad()
    def update(self, mean: torch.Tensor, logvar: torch.Tensor, context_ids: torch.Tensor) -> None:
        """Move the running covariances towards those of a global batch; arguments as for `loss`."""
        m, membership = self._by_context(mean, context_ids)
        counts = membership.sum(1, keepdim=True)  # (k, 1, 1)
        variance = (logvar.float().exp().flatten(1) * membership).sum(1) / counts[:, 0].clamp(min=1)  # (k, w)
        batch = torch.bmm(m.transpose(1, 2), m) / counts.clamp(min=1) + torch.diag_embed(variance - 1)
        self.excess += self.momentum * (counts > 0) * (batch - self.excess)

    def _by_context(self, mean: torch.Tensor, context_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        membership = torch.nn.functional.one_hot(context_ids, len(self.excess)).float().T[..., None]  # (k, B, 1)
        return mean.float().flatten(1) * membership, membership


__all__ = ["MomentMatching"]
