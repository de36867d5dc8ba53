"""What a run follows of the aggregate posteriors of its contexts (see `posterior.py`, `moments.py`, `prior_matching.py` and
`context_prediction.py` of the package)."""

import math
from functools import partial

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import reduce

from hf_intervene.context_prediction import ContextPrediction
from hf_intervene.data import ContextImages, shard
from hf_intervene.model import InterventionModel, InterventionModelOutput
from hf_intervene.moments import moment_matching
from hf_intervene.posterior import has_row
from hf_intervene.prior_matching import PriorMatching
from hf_intervene.training.arguments import TrainArguments


WHITEN_EVERY = 16  # steps between two looks at the covariances of a whitened posterior
LEAST_PACE = 0.25  # of following them
_PREDICTION = "contexts."  # how names of its state begin


class AggregatePosteriors:
    """Their means, which are taken out; their covariances, which are whitened and matched to the prior's; what else a critic sees; and,
    before these, whether each concept's block tells its context apart.

    Args:
        model: with a head.
        data: the training images.
        a: the settings; of them the weights of moment matching, of prior matching and of context prediction (0: none), and the seed.
        accelerator: its device holds the state, and its processes share what there is to learn.
    """

    def __init__(self, model: InterventionModel, data: ContextImages, a: TrainArguments, accelerator: Accelerator | PartialState):
        self.model, self.weight, self.seed = model, a.moment_matching, a.seed
        self.rank, self.world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
        learning = {"seed": a.seed, "device": device, "average": partial(reduce, reduction="mean") if self.world > 1 else None}
        self.contexts = model.seen(data.targets(model.config.free_blocks))  # (contexts, D)
        self.group = torch.arange(len(self.contexts), device=device)  # of contexts with one aggregate posterior
        if model.config.ablation == "head-pooled":
            self.contexts, self.group = self.contexts[:1], torch.zeros_like(self.group)
        self.whitened = model.head.whitening is not None
        concepts = self.contexts[:, : len(model.concepts)]
        self.single = has_row(concepts).nonzero()[
            :, 0
        ]  # contexts that are whitened; others, in data that have them, are mixtures of these
        self.moments = None
        if self.weight or self.whitened:
            self.moments = moment_matching(self.contexts, model.noise_shape[-1], self.weight, device)
        self.prior = None
        if weight := a.prior_matching * a.beta:
            self.prior = PriorMatching(*model.noise_shape, weight, **learning)
        self.prediction = None
        if len(self.contexts) > 1 and (weight := a.context_prediction * math.prod(model.base.image_shape)):
            self.prediction = ContextPrediction(concepts, model.noise_shape[-1], weight, **learning)

    def penalty(
        self, output: InterventionModelOutput, targets: torch.Tensor, ids: torch.Tensor, matched: float = 1.0
    ) -> torch.Tensor | float:
        """Those of moment matching and prior matching, `matched` times, and that of context prediction, 1 - matched times, for samples
        under targets (B, D) of the contexts `ids`, (B,); the gradient counts. A scalar in nats."""
        penalty: torch.Tensor | float = 0.0
        if self.moments is not None and self.weight:
            penalty = penalty + matched * self.moments.loss(output.posterior_mean, self.group[ids])
        if self.prior is not None:
            penalty = penalty + matched * self.prior.loss(output.exogenous_noise, self.model.seen(targets))
        if self.prediction is not None and output.observational_mean is not None:
            penalty = penalty + (1 - matched) * self.prediction.loss(output.observational_mean, ids)
        return penalty

    def follow(
        self,
        mean: torch.Tensor,
        logvar: torch.Tensor,
        observational: torch.Tensor | None,
        targets: torch.Tensor,
        ids: torch.Tensor,
        step: int,
        pace: float,
    ) -> None:
        """Go on by a global batch.

        Args:
            mean, logvar: as `InterventionHead.posterior` returned them, (B, D, noise_width).
            observational: the mean that it returns for observational images, for context prediction; `None`: that is over.
            targets: (B, D).
            ids: contexts, (B,).
            step: the number of the step.
            pace: share of the peak learning rate. Covariances settle as the weights do: few samples make noise, and early ones are soon
                out of date.
        """
        head, seen = self.model.head, self.model.seen(targets)
        if self.prediction is not None and observational is not None:
            self.prediction.update(self._share(observational), self._share(ids))
        if self.prior is not None:
            own = (self._share(x) for x in (mean, (0.5 * logvar).exp(), seen))
            means, stds, contexts = (x.repeat_interleave(self.prior.draws, dim=0) for x in own)
            generator = torch.Generator(mean.device).manual_seed(-1 - self.seed * 1_000_003 - step)  # numbers of no `step_noise`
            shape = (self.prior.draws * len(mean), *mean.shape[1:])  # drawn for the global batch, whoever learns from it
            for _ in range(self.prior.updates):
                noise, prior = (self._share(torch.randn(shape, generator=generator, device=mean.device)) for _ in range(2))
                self.prior.update(head.whiten(means + stds * noise, contexts), prior, contexts)
        head.center_posterior(mean, seen)
        if self.moments is not None:
            self.moments.update(mean, logvar, self.group[ids], pace=max(pace, LEAST_PACE))
            if self.whitened and step % WHITEN_EVERY == 0:
                head.whiten_posterior(self.contexts[self.single], self.moments.covariance[self.single])

    def _share(self, x: torch.Tensor) -> torch.Tensor:
        """This process's rows of those of a global batch."""
        return shard(x, self.rank, self.world)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps beside the model: nothing unless covariances are followed or something is learnt."""
        state = {} if self.moments is None else {"excess": self.moments.excess}
        if self.prior is not None:
            state |= self.prior.state_dict()
        if self.prediction is not None:
            state |= {_PREDICTION + name: value for name, value in self.prediction.state_dict().items()}
        return state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from what `state_dict` returned. Raises a KeyError or RuntimeError if it is of something else."""
        if self.moments is not None:
            self.moments.excess = state["excess"].to(self.moments.excess.device)
        if self.prior is not None:
            self.prior.load_state_dict(state)
        if self.prediction is not None:
            own = {name.removeprefix(_PREDICTION): value for name, value in state.items() if name.startswith(_PREDICTION)}
            self.prediction.load_state_dict(own)


__all__ = ["AggregatePosteriors"]
