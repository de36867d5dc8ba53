r"""What is minimised: the negative ELBO of a model and a list of terms beside it,

    E_q[-log p(x | c)] + beta KL(q || p) + sum_t weight_t(progress) loss_t.

`DistributedDataParallel`, `FSDP` and `torch.compile` wrap an `Objective` as they wrap a model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from .logging import get_logger
from .model import InterventionModel, InterventionModelOutput
from .terms import Term, build_terms


logger = get_logger(__name__)


@dataclass
class ObjectiveOutput(InterventionModelOutput):
    """
    Args:
        terms: the unweighted terms beside the ELBO, scalars by name, without a gradient.
    """

    terms: dict[str, torch.Tensor] | None = None


class Objective(nn.Module):
    """
    Args:
        model: the model.
        terms: those beside the ELBO; of strength 0 they are left out.
        whole: whether no context has an intervention of a strength between 0 and 1; `None`: each
            batch is looked at.
    """

    def __init__(
        self, model: InterventionModel, terms: Sequence[Term] = (), whole: bool | None = None
    ):
        super().__init__()
        self.model, self.whole = model, whole
        self.terms = nn.ModuleDict({term.name: term for term in terms if term.strength})

    @classmethod
    def build(
        cls,
        model: InterventionModel,
        contexts: torch.Tensor,
        strengths: Mapping[str, float],
        sharded: bool = False,
    ) -> "Objective":
        """The objective with the terms that settings ask for; without a head there are none.

        Args:
            model: the model; the objective is on its device.
            contexts: targets of the training contexts, (any number, D).
            strengths: of terms, by name.
            sharded: whether FSDP has cut the weights, which some terms do not work with.

        Raises:
            ValueError: one sentence: there is no term of a name.
        """
        if model.head is None:
            return cls(model)
        each = model.seen(contexts).unique(dim=0)
        terms = build_terms(model, each, strengths)
        if left_out := [term.name for term in terms if sharded and not term.sharded]:
            logger.warning(
                "%s left out: FSDP does not work with it yet; DDP and ZeRO-2 do.",
                " and ".join(left_out),
            )
            terms = [term for term in terms if term.sharded]
        whole = bool(((each == 0) | (each == 1)).all())
        return cls(model, terms, whole).to(model.device)

    def _named_terms(self) -> Mapping[str, Term]:
        return cast(Mapping[str, Term], self.terms)  # whose values are modules to a type checker

    def weights(self, progress: float) -> dict[str, float]:
        """The weight of each term at this share of the training."""
        return {name: term.weight(progress) for name, term in self._named_terms().items()}

    def draws(self, rows: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """All random numbers for so many images, each (rows, ...), on the CPU: arguments of
        `forward`. Those of a term have its name before theirs: `edit_consistency.noise`."""
        found = self.model.posterior_draws(rows, generator)
        for name, term in self._named_terms().items():
            found |= {f"{name}.{key}": value for key, value in term.draw(rows, generator).items()}
        return found

    def forward(
        self, targets: torch.Tensor, weights: dict[str, torch.Tensor], **inputs: Any
    ) -> ObjectiveOutput:
        """The objective of a batch.

        Args:
            targets: (B, D).
            weights: of the terms, scalar tensors: as numbers, a compiled objective would be
                compiled anew for each. A term without one is not computed.
            **inputs: `draws`, and further arguments of the model's `forward`.
        """
        own = {name: inputs.pop(name) for name in list(inputs) if "." in name}
        output = self.model(targets=targets, whole=self.whole, **inputs)
        loss, found = output.loss, {}
        for name, weight in weights.items():
            draws = {
                key.partition(".")[2]: value
                for key, value in own.items()
                if key.startswith(f"{name}.")
            }
            term = self._named_terms()[name].loss(
                self.model, output, self.model.seen(targets), draws
            )
            loss, found[name] = loss + weight * term, term.detach()
        return ObjectiveOutput(**{**output, "loss": loss}, terms=found)


__all__ = ["Objective", "ObjectiveOutput"]
