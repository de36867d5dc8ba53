r"""Penalties on the edges among the concepts (METHOD section 2), in nats:

group lasso:  sum_{i != j} |W[i, j]|_F,        L2:  sum_{i != j} |W[i, j]|_F^2.
"""

from .base import Term


class GroupLasso(Term):
    """The first, of `InterventionHead.penalty`."""

    name = "group_lasso"

    def loss(self, model, output, targets, draws):
        return model.head.penalty(group_lasso=1.0)


class L2(Term):
    """The second."""

    name = "l2"

    def loss(self, model, output, targets, draws):
        return model.head.penalty(l2=1.0)


__all__ = ["L2", "GroupLasso"]
