"""What a run follows of the aggregate posteriors of its contexts (see `hf_intervene/posterior.py` and `hf_intervene/moments.py`)."""

import torch

from hf_intervene.data import ContextImages
from hf_intervene.model import InterventionModel, InterventionModelOutput
from hf_intervene.moments import moment_matching


WHITEN_EVERY = 16  # steps between two looks at the covariances of a whitened posterior
LEAST_PACE = 0.25  # of following them


class AggregatePosteriors:
    """Their means, which are taken out; their covariances, which are whitened and matched to the prior's.

    Args:
        model: with a head.
        data: the training images.
        weight: of moment matching, in nats; 0: none.
        device: of the state.
    """

    def __init__(self, model: InterventionModel, data: ContextImages, weight: float, device: torch.device):
        self.model, self.weight = model, weight
        self.contexts = model.seen(data.targets(model.config.free_blocks))  # (contexts, D)
        self.group = torch.arange(len(self.contexts), device=device)  # of contexts with one aggregate posterior
        if model.config.ablation == "head-pooled":
            self.contexts, self.group = self.contexts[:1], torch.zeros_like(self.group)
        self.whitened = model.head.whitening is not None
        self.moments = None
        if weight or self.whitened:
            self.moments = moment_matching(self.contexts, model.noise_shape[-1], weight, device)

    def penalty(self, output: InterventionModelOutput, ids: torch.Tensor) -> torch.Tensor | float:
        """That of moment matching for samples of the contexts `ids`, (B,); its gradient counts. A scalar in nats."""
        if self.moments is None or not self.weight:
            return 0.0
        return self.moments.loss(output.posterior_mean, output.posterior_logvar, self.group[ids])

    def follow(
        self, mean: torch.Tensor, logvar: torch.Tensor, targets: torch.Tensor, ids: torch.Tensor, step: int, pace: float
    ) -> None:
        """Go on by a global batch.

        Args:
            mean, logvar: as `InterventionHead.posterior` returned them, (B, D, noise_width).
            targets: (B, D).
            ids: contexts, (B,).
            step: the number of the step.
            pace: share of the peak learning rate. Covariances settle as the weights do: few samples make noise, and early ones are soon
                out of date.
        """
        self.model.head.center_posterior(mean, self.model.seen(targets))
        if self.moments is not None:
            self.moments.update(mean, logvar, self.group[ids], pace=max(pace, LEAST_PACE))
            if self.whitened and step % WHITEN_EVERY == 0:
                self.model.head.whiten_posterior(self.contexts, self.moments.covariance)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps beside the model: nothing unless covariances are followed."""
        return {} if self.moments is None else {"excess": self.moments.excess}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from what `state_dict` returned. Raises a KeyError if covariances are followed and there are none."""
        if self.moments is not None:
            self.moments.excess = state["excess"].to(self.moments.excess.device)


__all__ = ["AggregatePosteriors"]
