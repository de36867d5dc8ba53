"""What a term of the objective is."""

from typing import Any

import torch
from torch import nn


class Term(nn.Module):
    """One term of the objective beside the ELBO, in nats of an image.

    A term has no state of its own: its gradient goes to the model. Its random numbers are drawn for
    the whole global batch, so that a result does not depend on the number of processes.

    Args:
        strength: its weight, once it has risen.

    Attributes:
        name: in settings, logs and the names of its random numbers.
    """

    name: str

    def __init__(self, strength: float):
        super().__init__()
        self.strength = strength

    def weight(self, progress: float) -> float:
        """The weight at this share of the training, in [0, 1]."""
        return self.strength

    def draw(self, rows: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Random numbers for so many images, each (rows, ...), on the CPU."""
        return {}

    def loss(
        self, model: Any, output: Any, targets: torch.Tensor, draws: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The unweighted term, a scalar.

        Args:
            model: the `InterventionModel`.
            output: its `InterventionModelOutput` for these images.
            targets: of the images, (B, D).
            draws: what `draw` returned for them.
        """
        raise NotImplementedError


__all__ = ["Term"]
