r"""Telling contexts apart, concept by concept, by each concept's own block (an addition to the paper's objective).

An intervention on concept k changes how that concept comes about, and nothing else: by Bayes' rule the ratio of densities that tells its
context from the observational one is a function of the concept (and of its causes) alone,

    p(x | do k) / p(x | obs) = p_int(c_k) / p_obs(c_k | its causes).

Nothing in the ELBO asks that c_k lie in block k. Any block may carry it: then the head has to shift it from outside, which it learns slowly
and not well, and what a block means is for nobody to say. So, while z takes shape, a classifier is to name the context of an image by

    log p(k | x) = l_k(m_k(x)) + const,    log p(obs | x) = const,

m_k being block k of the posterior's mean as if x were observational (told its context, it would give it away). l_k is a small network of
block k alone; the gradient on m_k asks the encoder to put there what tells this context apart, and the decoder finds it there. In contexts
with several concepts intervened on their l_k add up.

The classifiers learn from every global batch by themselves (see `auxiliary.py`). The weight falls to 0 while those of moment matching and
prior matching rise: afterwards z is to be of the prior, in every context.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from .auxiliary import Auxiliary, Average
from .modeling_intervention import BlockLinear


class BlockClassifiers(nn.Module):
    """l_k of every concept, (B, d, n) -> (B, d), float32.

    Args:
        concepts, noise_width: d and n.
    """

    width = 32

    def __init__(self, concepts: int, noise_width: int):
        super().__init__()
        self.hidden, self.logit = BlockLinear(concepts, noise_width, self.width), BlockLinear(concepts, self.width, 1)
        for layer in (self.hidden, self.logit):
            layer.reset_parameters()

    def forward(self, m: torch.Tensor) -> torch.Tensor:
        return self.logit(nn.functional.gelu(self.hidden(m.float().transpose(0, 1))))[..., 0].T  # (d, B, n) -> (B, d)


class ContextPrediction(Auxiliary):
    """
    Args:
        contexts: targets of each, (contexts, d).
        noise_width: n.
        weight: of the classifier's cross-entropy, in nats.
        seed: of the classifiers' weights.
        device: of the state.
        average: see `Auxiliary`.
    """

    def __init__(
        self,
        contexts: torch.Tensor,
        noise_width: int,
        weight: float,
        seed: int = 0,
        device: torch.device | str = "cpu",
        average: Average | None = None,
    ):
        self.contexts, self.weight = contexts.float().to(device), weight
        super().__init__(lambda: BlockClassifiers(contexts.shape[1], noise_width), seed, device, 3e-3, (0.9, 0.999), average)

    def loss(self, mean: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The penalty, weight * mean cross-entropy, a scalar in nats.

        Args:
            mean: of the posteriors as if all images were observational, (B, D, noise_width), free blocks last.
            ids: contexts, (B,).
        """
        return self.weight * self._cross_entropy(mean, ids)

    def update(self, mean: torch.Tensor, ids: torch.Tensor) -> None:
        """Let the classifiers learn from a batch; arguments as of `loss`."""
        mean = mean.detach()
        self.learn(lambda: self._cross_entropy(mean, ids))

    def _cross_entropy(self, mean: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast(mean.device.type, enabled=False):
            logits = self.network(mean[:, : self.contexts.shape[1]])  # (B, d)
            return cross_entropy(logits @ self.contexts.T, ids)


__all__ = ["ContextPrediction"]
