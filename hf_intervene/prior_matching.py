r"""Matching each context's aggregate posterior to the prior, in all that a critic tells apart (an addition to the paper's objective).

The KL of the ELBO, averaged over the images of a context k, has two parts (Hoffman and Johnson, 2016):

    E_{x ~ k} KL(q(z | x, s) || N(0, I)) = I_k(x; z) + KL(q_k || N(0, I)),    q_k(z) = E_{x ~ k} q(z | x, s).

The first is the information about an image, which its reconstruction needs. The second is what samples miss: they come from N(0, I), and the
decoder has learnt what q_k draws. So only the second gets more weight here. `moments.py` and the whitening of `posterior.py` see means and
covariances; a concept of one dimension that the encoder lays as a curve into a block of many has the right ones too. The ratio of densities is
that of a classifier that tells the two apart (Sugiyama et al., 2012; used on latents by Makhzani et al., 2015, and Kim and Mnih, 2018):

    KL(q_k || N(0, I)) = E_{z ~ q_k} log q_k(z) / p(z) ~ E_{z ~ q_k} logit(z, s).

One small classifier serves all contexts. It learns a little every step (see `auxiliary.py`), from draws of the posteriors and as many of the
prior.
"""

import torch
from torch import nn
from torch.nn.functional import softplus

from .auxiliary import Auxiliary, Average
from .modeling_intervention import BlockLinear


class Critic(nn.Module):
    """log q_k(z) / p(z) as a sum: of each block by itself, which takes few draws to learn, and of all blocks together.

    Args:
        blocks, noise_width: D and n.
    """

    block_width, width = 64, 128

    def __init__(self, blocks: int, noise_width: int):
        super().__init__()
        w, v = self.block_width, self.width
        alone = [BlockLinear(blocks, *sizes) for sizes in ((noise_width + 1, w), (w, w), (w, 1))]
        for layer in alone:
            layer.reset_parameters()
        together = [nn.Linear(*sizes) for sizes in ((blocks * (noise_width + 1), v), (v, v), (v, 1))]
        self.alone = nn.Sequential(alone[0], nn.LeakyReLU(0.2), alone[1], nn.LeakyReLU(0.2), alone[2])
        self.together = nn.Sequential(together[0], nn.LeakyReLU(0.2), together[1], nn.LeakyReLU(0.2), together[2])

    def forward(self, z: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """z (B, D, n), targets (B, D) -> (B,), float32."""
        x = torch.cat([z.float(), targets.float()[..., None]], dim=2)  # (B, D, n + 1)
        alone = self.alone(x.transpose(0, 1))  # (D, B, 1)
        together = self.together(x.flatten(1))  # (B, 1)
        return (alone.sum(0) + together)[:, 0]


class PriorMatching(Auxiliary):
    """
    Args:
        blocks, noise_width: D and n.
        weight: of the penalty, in nats.
        seed: of the classifier's weights.
        device: of the state.
        average: see `Auxiliary`.
    """

    draws = 4  # of z from the posterior of an image, and as many of the prior, each time the classifier learns
    updates = 2  # times it learns, a step

    def __init__(
        self,
        blocks: int,
        noise_width: int,
        weight: float,
        seed: int = 0,
        device: torch.device | str = "cpu",
        average: Average | None = None,
    ):
        self.weight = weight
        super().__init__(lambda: Critic(blocks, noise_width), seed, device, 3e-3, (0.5, 0.9), average)

    def log_ratio(self, z: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The classifier's logit, an estimate of log q_k(z) / p(z), (B,), float32, of noise (B, D, n) in contexts with targets (B, D)."""
        with torch.autocast(z.device.type, enabled=False):
            return self.network(z, targets)

    def loss(self, z: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The penalty, weight * mean log ratio, a scalar in nats: draws (B, D, noise_width) of the posteriors, targets (B, D)."""
        return self.weight * self.log_ratio(z, targets).mean()

    def update(self, z: torch.Tensor, prior: torch.Tensor, targets: torch.Tensor) -> None:
        """Let the classifier learn from draws of the posteriors and as many of the prior, both (n, D, noise_width), targets (n, D)."""
        both, contexts = torch.cat([z.detach(), prior]), torch.cat([targets, targets])

        def loss() -> torch.Tensor:
            of_posterior, of_prior = self.log_ratio(both, contexts).chunk(2)
            return softplus(-of_posterior).mean() + softplus(of_prior).mean()

        self.learn(loss)


__all__ = ["PriorMatching"]
