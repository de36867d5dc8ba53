r"""Contexts can be told from the concepts (an addition to the paper's objective).

    loss = -log p(k | c),    p(k | c) = p(c | s_k) / sum_l p(c | s_l),    c ~ q(c | x),    k the context of x.

The densities are the head's own (`flow.py`). Contexts k and obs differ in block k alone, so that
log p(c | s_k) - log p(c | obs) is a function of c_k and its causes: what tells a context apart has
to be in the block of its concept. The ELBO asks for the same, but gives a concept of few pixels
little weight; this term gives every concept the same."""  # noqa: E501

import torch
from torch.nn.functional import cross_entropy

from .base import Term


class ContextPrediction(Term):
    """
    Args:
        strength: in nats for each nat of cross-entropy.
        contexts: targets of the training contexts, (contexts, D). Only those with entries 0 and 1
            are told apart.
    """

    name = "context_prediction"
    contexts: torch.Tensor

    def __init__(self, strength: float, contexts: torch.Tensor):
        super().__init__(strength)
        whole = ((contexts == 0) | (contexts == 1)).all(1)
        self.register_buffer("contexts", contexts[whole].float(), persistent=False)

    @classmethod
    def build(cls, strength, model, contexts):
        return cls(strength, contexts) if model.head.is_flow and len(contexts) > 1 else None

    def loss(self, model, output, targets, draws):
        # (B, contexts)
        logits = model.head.context_log_densities(output.draw, self.contexts, output.states)
        same = (targets[:, None] == self.contexts).all(2)  # (B, contexts)
        known = same.any(1)
        losses = cross_entropy(logits, same.float().argmax(1), reduction="none")
        return (losses * known).sum() / known.sum().clamp(min=1)


__all__ = ["ContextPrediction"]
