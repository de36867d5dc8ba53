r"""Free blocks know nothing of the context (an addition to the paper's objective).

    loss = -log a(k | c_free),    c ~ q(c | x),    k the context of x,

a being a small classifier that is trained beside the model (Ganin et al., arXiv:1505.07818): its own gradient makes the loss
smaller; the encoder gets the reverse of it, `strength` times. No intervention changes a free block, so what tells contexts
apart belongs to a concept. The ELBO asks for the same: p(c_free) is one for all contexts. But where contexts overlap, an
encoder that keeps all of an image in free blocks costs it a few nats only; then concepts tell the context, as `context_prediction.py`
asks, and the decoder need not read them. A free variable that concepts cause is no exception: a block can hold its noise.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from .base import Term


HIDDEN = 128  # width of the classifier


class FreeInvariance(Term):
    """
    Args:
        strength: of the reversed gradient, in nats for each nat of cross-entropy.
        contexts: targets of the training contexts, (contexts, D).
        concepts: d.
        width: entries of all free blocks, f w.
    """

    name = "free_invariance"
    contexts: torch.Tensor

    def __init__(self, strength: float, contexts: torch.Tensor, concepts: int, width: int):
        super().__init__(strength)
        self.register_buffer("contexts", contexts.float(), persistent=False)
        self.concepts = concepts
        self.classifier = nn.Sequential(
            nn.Linear(width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, len(contexts))
        )

    def weight(self, progress):
        return 1.0  # the strength is in the reversed gradient: a classifier that learns slowly is no adversary

    def loss(self, model, output, targets, draws):
        free = _Reversed.apply(output.draw[:, self.concepts :].flatten(1), self.strength)
        same = (targets[:, None] == self.contexts).all(2)  # (B, contexts)
        return cross_entropy(self.classifier(free).float(), same.float().argmax(1))


class _Reversed(torch.autograd.Function):
    """The identity, with a gradient of -strength times its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, strength: float) -> torch.Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return -ctx.strength * gradient, None


__all__ = ["FreeInvariance"]
