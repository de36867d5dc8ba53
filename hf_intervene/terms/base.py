"""What a term of the objective is, and how settings name it.

A new term is a file in this folder, or a class of your own that is imported before training:

    class MyTerm(Term):
        name = "my_term"

        def loss(self, model, output, targets, draws):
            ...

and its strength in the settings, `my_term: 0.5`.
"""

from collections.abc import Mapping
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
        sharded: whether it works where FSDP has cut the weights.
    """

    name: str
    sharded = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "name"):
            _KNOWN[cls.name] = cls

    def __init__(self, strength: float):
        super().__init__()
        self.strength = strength

    @classmethod
    def build(cls, strength: float, model: Any, contexts: torch.Tensor) -> "Term | None":
        """The term for a model; `None`: the model has no use for it.

        Args:
            strength: see above.
            model: the `InterventionModel`.
            contexts: targets of the training contexts, each once, (contexts, D).
        """
        return cls(strength)

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


_KNOWN: dict[str, type[Term]] = {}


def term_names() -> tuple[str, ...]:
    """The names of all terms that have been imported."""
    return tuple(_KNOWN)


def build_terms(model: Any, contexts: torch.Tensor, strengths: Mapping[str, float]) -> list[Term]:
    """The terms of an objective, but for those of strength 0 and those that the model has no use
    for.

    Args:
        model, contexts: as of `Term.build`.
        strengths: by the terms' names.

    Raises:
        ValueError: one sentence: there is no term of a name.
    """
    found = []
    for name, strength in strengths.items():
        if name not in _KNOWN:
            known = ", ".join(_KNOWN)
            raise ValueError(f"there is no term {name!r}: the terms are {known}.")
        term = _KNOWN[name].build(strength, model, contexts) if strength else None
        found += [term] if term is not None else []
    return found


__all__ = ["Term", "build_terms", "term_names"]
