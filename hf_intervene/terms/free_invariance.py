r"""Free blocks know nothing of the context (an addition to the paper's objective).

    loss = -log a(k | c_free),    c ~ q(c | x),    k the context of x,

a is a small classifier that is trained beside the model (Ganin et al., arXiv:1505.07818). The
classifier follows the gradient of the loss. The encoder gets the reversed gradient, `strength`
times. No intervention changes a free block, so what distinguishes contexts belongs to a concept.
The ELBO asks for the same: p(c_free) is the same in all contexts. But where contexts overlap,
keeping a whole image in free blocks costs the ELBO a few nats only. Then concepts predict the
context, as `context_prediction.py` asks, and the decoder ignores them. This holds for free
variables that concepts cause, too: a free block can hold their noise."""

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
    sharded = False  # FSDP does not know of the parameters of terms
    contexts: torch.Tensor

    def __init__(self, strength: float, contexts: torch.Tensor, concepts: int, width: int):
        super().__init__(strength)
        self.register_buffer("contexts", contexts.float(), persistent=False)
        self.concepts = concepts
        self.classifier = nn.Sequential(
            nn.Linear(width, HIDDEN),
            nn.GELU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.GELU(),
            nn.Linear(HIDDEN, len(contexts)),
        )

    @classmethod
    def build(cls, strength, model, contexts):
        width = model.config.free_blocks * model.config.concept_width
        if not (model.head.is_flow and len(contexts) > 1 and width):
            return None
        return cls(strength, contexts, len(model.concepts), width)

    def weight(self, progress):
        # the strength is in the reversed gradient: a classifier that learns slowly is no adversary
        return 1.0

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
