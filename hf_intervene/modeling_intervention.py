"""The intervention head: the method of METHOD section 2 (Markham et al., arXiv:2507.04754).

    z (B, D, n) --mechanisms--> eps (B, D, w) --intervention--> c (B, D, w) --unpool--> e (B, *embedding_shape)

Shapes: B batch, d concepts, D = d + free blocks, n noise_width, w concept_width. Block layers hold
their activations as (D, B, width), see `blocks.py`.

There are two kinds of heads (`InterventionConfig.mechanism`):

    "flow"   the mechanisms are invertible (`flow.py`) and n = w + 1. The encoder gives one posterior q(c | x), which knows no
             context, and KL(q(c | x) || p(c | s)) is what the objective has. Contexts differ in p(c | s) alone.
    "mlp"    the paper's: the encoder gives q(z | x, s), and the KL is to N(0, I).
"""  # noqa: E501

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .checks import check_fit, check_loaded
from .configuration_intervention import CENTERED, InterventionConfig
from .contexts import Interventions, parse_interventions
from .flow import ConceptFlow, States
from .flow_head import FlowMixin
from .hub import check_weights, folder, pop_options
from .mechanisms import ExogenousLayer, ExpressiveLayers, places
from .posterior import PosteriorLinear, Whitening, gaussian_kl, has_row, mixture, row_of
from .structural import InterventionLayer, LowRankInterventionLayer, OrderedInterventionLayer


@dataclass
class InterventionHeadOutput(ModelOutput):
    """
    Args:
        embedding: representation `e`, shape (B, *embedding_shape): the decoder's input.
        concepts: `c`, shape (B, D, concept_width).
    """

    embedding: torch.Tensor | None = None
    concepts: torch.Tensor | None = None


class InterventionHead(FlowMixin, PreTrainedModel):
    r"""Intervention head (METHOD section 2): exogenous noise and targets in, the decoder's
    embedding out; and, on the encoder's side, the posterior over the noise.

    Example:

    ```python
    head = InterventionHead(InterventionConfig(concepts=["quad1", "size"], embedding_shape=[128]))
    z = torch.randn(2, head.config.num_blocks, head.config.noise_width)
    embedding = head(z, head.targets([["quad1", "size"], "obs"])).embedding  # (2, 128)
    ```
    """

    config: InterventionConfig
    config_class = InterventionConfig
    posterior_offset: torch.Tensor  # of a centred posterior
    base_model_prefix = "head"
    _push: ClassVar[Callable[..., Any] | None] = None  # how the package pushes it, see `push.py`
    main_input_name = "z"

    def __init__(self, config: InterventionConfig):
        super().__init__(config)
        blocks, noise_width, width = config.num_blocks, config.noise_width, config.concept_width
        if config.mechanism == "flow":
            self.flow = ConceptFlow(
                len(config.concepts),
                blocks,
                width,
                config.flow_depth,
                config.flow_width,
                config.flow_components,
            )
            self.intervention = OrderedInterventionLayer(
                len(config.concepts), blocks, width, config.flow_width, config.concept_edges
            )
        else:
            self.exogenous = ExogenousLayer(blocks, noise_width)
            self.expressive = ExpressiveLayers(
                blocks, noise_width, width, config.depth, config.norm
            )
            layer = (blocks, width, config.intervention == "perfect", config.propagation_steps)
            rank = config.intervention_rank
            self.intervention = (
                InterventionLayer(*layer)
                if rank is None
                else LowRankInterventionLayer(*layer, rank)
            )
        self.unpool = nn.Linear(blocks * width, math.prod(config.embedding_shape))

        posterior_width = 2 * blocks * self.draw_width  # mean and log-variance
        if config.posterior == "unconditional":
            self.encoder_readout: nn.Module = PosteriorLinear(
                config.feature_width, posterior_width, config.initial_posterior_std
            )
        else:
            hidden = config.feature_width
            self.encoder_readout = nn.Sequential(
                nn.Linear(config.feature_width + len(config.concepts), hidden),
                nn.GELU(),
                PosteriorLinear(hidden, posterior_width, config.initial_posterior_std),
            )
        contexts = 1 + len(config.concepts)
        if config.posterior in CENTERED:
            # Row 0: the mean of the posterior means over the observational context; row 1 + j: over
            # the context of concept j.
            self.register_buffer("posterior_offset", torch.zeros(contexts, blocks, noise_width))
        self.whitening = (
            Whitening(contexts, blocks * noise_width) if config.posterior == "whitened" else None
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, InterventionLayer | OrderedInterventionLayer):
            module.reset_parameters(self.config.initializer_range)
        elif callable(reset := getattr(module, "reset_parameters", None)):
            reset()

    def forward(
        self,
        z: torch.Tensor,
        targets: torch.Tensor,
        values: torch.Tensor | None = None,
        chosen: torch.Tensor | None = None,
        return_dict: bool | None = None,
        edge_targets: torch.Tensor | None = None,
    ) -> InterventionHeadOutput | tuple:
        """Embedding of exogenous noise under interventions, of some concepts at chosen values.

        Args:
            z: exogenous noise, (B, D, noise_width); standard normal under the prior.
            targets: (B, D), entries in [0, 1]; each row its own context.
            values: chosen values of c, (B, D, concept_width), for do(c_j = v) (see
                `InterventionLayer`); read where `chosen` is true.
            chosen: which, bool (B, D): there s_j counts as 1.
            return_dict: whether to return an `InterventionHeadOutput` (default) or a tuple.
            edge_targets: (B, D), the targets that the intervention layer (step 3) sees, while
                `targets` go to the mechanisms (steps 1 and 2); `None`: the same. It tells the two
                ways of an intervention apart; see `hf_intervene.metrics.routes`.
        """
        blocks = self.config.num_blocks
        if z.ndim != 3 or z.shape[1] != blocks or z.shape[2] != self.config.noise_width:
            raise ValueError(
                f"z must have shape (batch, {blocks}, {self.config.noise_width}), not"
                f" {tuple(z.shape)}."
            )
        if targets.ndim != 2 or targets.shape[1] != blocks:
            raise ValueError(
                f"targets must have shape (batch, {blocks}), not {tuple(targets.shape)}."
            )
        if edge_targets is not None and edge_targets.shape != targets.shape:
            shapes = f"{tuple(targets.shape)}, not {tuple(edge_targets.shape)}"
            raise ValueError(f"edge_targets must have the shape of targets, {shapes}.")
        if (values is None) != (chosen is None):
            raise ValueError("values and chosen go together: give both or neither.")
        # (B, D, 1), the batch innermost in memory
        seen = targets if edge_targets is None else edge_targets
        s, edges = (x.to(self.dtype).T.contiguous().T[..., None] for x in (targets, seen))
        if values is not None and chosen is not None:
            shape = (*targets.shape, self.config.concept_width)
            if (
                tuple(values.shape) != shape
                or tuple(chosen.shape) != shape[:2]
                or chosen.dtype != torch.bool
            ):
                raise ValueError(
                    f"values must have shape {shape} and chosen, bool, {shape[:2]}, not"
                    f" {tuple(values.shape)} and {tuple(chosen.shape)}."
                )
            chosen = chosen[..., None]  # (B, D, 1)
            s, edges = (torch.where(chosen, 1.0, x) for x in (s, edges))
        if self.is_flow:
            c = self._follow(z.to(self.dtype), s, edges, values, chosen)
        else:
            c = self.intervention(self.mechanisms(z.to(self.dtype), s), edges, values, chosen)
        output = InterventionHeadOutput(embedding=self.represent(c), concepts=c)
        return output if return_dict is not False else output.to_tuple()

    def mechanisms(self, z: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """eps (B, D, w) of noise z (B, D, n) and strengths s (B, D, 1): with flows c of blocks
        without causes.
        """
        z, s = z.transpose(0, 1), s.transpose(0, 1)
        if self.is_flow:
            eps = self.flow(z, s, z.new_zeros(*z.shape[:2], self.config.flow_width))
        else:
            eps = self.expressive(self.exogenous(z, s))
        return eps.transpose(0, 1)

    def represent(self, c: torch.Tensor) -> torch.Tensor:
        """The embedding e, (B, *embedding_shape), of concepts c, (B, D, w)."""
        return self.unpool(c.flatten(1)).unflatten(1, self.config.embedding_shape)

    @property
    def is_flow(self) -> bool:
        """Whether the mechanisms are invertible."""
        return self.config.mechanism == "flow"

    @property
    def draw_width(self) -> int:
        """Width of a block of what the posterior is of: w for c, n for z."""
        return self.config.concept_width if self.is_flow else self.config.noise_width

    def posterior(
        self, features: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of what the encoder says, float32, each (B, D, draw_width): of q(c
        | x) for a head with flows, otherwise of q(z | x, s) (or q(z | x), see
        `InterventionConfig.posterior`). Of a whitened posterior those of y (see `posterior.py`).
        `whiten` makes a draw of it z, `embed_draw` the embedding, and `kl` is the KL of the
        objective.

        Args:
            features: encoder features, (B, feature_width).
            targets: (B, D).
        """
        s = targets[:, : len(self.config.concepts)]  # (B, d)
        features = features.to(self.dtype)  # the base may be in another precision
        if self.config.posterior != "unconditional":
            features = torch.cat([features, s.to(features.dtype)], dim=1)
        moments = self.encoder_readout(
            features
        ).float()  # (B, 2 D n) or (B, 2 D w): the KL wants float32
        mean, logvar = moments.unflatten(1, (2, self.config.num_blocks, self.draw_width)).unbind(1)
        if self.config.posterior in CENTERED:
            # Linear in the targets: offset_obs + sum_j s_j (offset_j - offset_obs).
            weights = torch.cat([1 - s.sum(1, keepdim=True), s], dim=1).float()  # (B, 1 + d)
            few, offset = places(weights), self.posterior_offset.float()
            if few is None:
                with torch.autocast(mean.device.type, enabled=False):  # as exact as it is added up
                    mean = mean - torch.einsum("bk,kdn->bdn", weights, offset)
            else:
                mean = mean.index_add(
                    0, few[0], weights[few][:, None, None] * offset[few[1]], alpha=-1
                )
        return mean, logvar.clamp(-30.0, 20.0)  # diffusers' bounds for a diagonal Gaussian

    def whiten(
        self, y: torch.Tensor, targets: torch.Tensor, states: States | None = None
    ) -> torch.Tensor:
        """Exogenous noise z, (B, D, noise_width), of a draw y from what `posterior` returned, (B,
        D, draw_width); `states` of y, if they are known.
        """
        if self.is_flow:
            return self._noise(y, targets, states)
        return y if self.whitening is None else self.whitening(y, self._mixture(targets))

    def embed_draw(self, y: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The embedding, (B, *embedding_shape), of a draw y, (B, D, draw_width), from what
        `posterior` returned.
        """
        if self.is_flow:  # y is c: there is no need to go back to z
            return self.represent(y.to(self.dtype))
        return self(self.whiten(y, targets), targets).embedding

    def kl(
        self,
        mean: torch.Tensor,
        logvar: torch.Tensor,
        targets: torch.Tensor,
        y: torch.Tensor | None = None,
        states: States | None = None,
    ) -> torch.Tensor:
        """KL of what `posterior` returned to the prior, of each sample in nats, (B,).

        With flows KL(q(c | x) || p(c | s)), estimated by the draw y, (B, D, draw_width), whose
        `states` may be known; its entropy is exact. Otherwise KL(q(z | x, s) || N(0, I)); an upper
        bound of it where a whitened posterior is asked for a context that is not of the training
        data."""
        if self.is_flow:
            entropy = 0.5 * (logvar + 1 + math.log(2 * math.pi)).flatten(1).sum(1)
            return -entropy - self.log_density(mean if y is None else y, targets, states)
        return (
            gaussian_kl(mean, logvar)
            if self.whitening is None
            else self.whitening.kl(mean, logvar, self._mixture(targets))
        )

    def marginals(
        self, mean: torch.Tensor, logvar: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of each entry of z, of what `posterior` returned; all (B, D,
        noise_width).

        With flows z of the posterior's mean, and the variance around it by a few draws.
        """
        if self.is_flow:
            return self._noise_marginals(mean, logvar, targets)
        if self.whitening is None:
            return mean, logvar
        weights = self._mixture(targets)
        return self.whitening(mean, weights), self.whitening.variance(logvar.exp(), weights).log()

    def _mixture(self, targets: torch.Tensor) -> torch.Tensor:
        return mixture(targets[:, : len(self.config.concepts)])

    @torch.no_grad()
    def center_posterior(
        self, mean: torch.Tensor, targets: torch.Tensor, momentum: float = 0.05
    ) -> None:
        """Move the offsets of a centred posterior towards the mean of each context in a batch; no
        effect on other posteriors.

        The prior of z is N(0, I) in every context. An encoder is quick to tell contexts apart by
        shifting z instead, and then samples from the prior miss what A_int and W_int should carry.
        Taking the context's mean out leaves that work to the head.

        Args:
            mean: posterior means of the batch, (B, D, noise_width), as `posterior` returned them
                (already centred so far).
            targets: (B, D); only rows with nothing or one whole concept intervened on count.
            momentum: weight of this batch in the running mean.
        """
        if self.config.posterior not in CENTERED:
            return
        s = targets[:, : len(self.config.concepts)].float()
        single = has_row(s)
        context = row_of(s)  # (B,)
        counts = torch.zeros(1 + s.shape[1], device=s.device).index_add(
            0, context, single.float()
        )  # (1 + d,)
        weight = momentum * single / counts[context].clamp(min=1)  # (B,)
        # Only these rows: the offsets of all contexts are many.
        self.posterior_offset.index_add_(
            0, context, (weight[:, None, None] * mean.float()).to(self.posterior_offset.dtype)
        )

    def penalty(self, group_lasso: float = 0.0, l2: float = 0.0) -> torch.Tensor:
        """Group-lasso and L2 penalty on the off-diagonal blocks of W_obs and W_int (METHOD section
        2), a scalar in nats.
        """
        return self.intervention.penalty(group_lasso, l2)

    def targets(self, interventions: Interventions, num_images: int | None = None) -> torch.Tensor:
        """Targets (num_images, D) of any form of `contexts.py`, on the head's device."""
        config = self.config
        return parse_interventions(
            interventions, config.concepts, num_images, config.free_blocks
        ).to(self.device)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:  # type: ignore[override]
        """Push to the Hub, with a model card where this package is installed; arguments as of
        `InterventionModel.push_to_hub`."""
        push = type(self)._push
        if push is not None:
            return push(self, repo_id, **options)
        return super().push_to_hub(repo_id, **options)  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(  # type: ignore[override]  # no `None` for the name, as in no model that is loaded
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *args: Any,
        subfolder: str = "",
        **kwargs: Any,
    ) -> "InterventionHead":
        """As in transformers, and strict: missing, unexpected or ill-shaped weights, truncated
        files, pickle files and what the Hub or the connection refuses are one-sentence errors.
        Keyword arguments as in transformers: `revision`, `token`, `local_files_only`..."""
        name, patterns = (
            pretrained_model_name_or_path,
            ("config.json", "model*.safetensors", "model.safetensors.index*.json"),
        )
        path = folder(
            name, [os.path.join(subfolder, pattern) for pattern in patterns], **pop_options(kwargs)
        )
        what = f"the head of {os.path.join(name, subfolder) if subfolder else name}"
        files = check_weights(path / subfolder, what, "model", kwargs.get("variant"))
        config = kwargs.get("config")
        if not isinstance(config, InterventionConfig):
            config = InterventionConfig.from_pretrained(path / subfolder)
        check_fit(lambda: cls(config), files, what)
        kwargs |= {"subfolder": subfolder, "use_safetensors": True}
        # by its hints a model, with output_loading_info too
        load: Callable[..., Any] = super().from_pretrained
        if kwargs.pop("output_loading_info", False):
            return load(path, *args, output_loading_info=True, **kwargs)
        return check_loaded(lambda: load(path, *args, output_loading_info=True, **kwargs), what)


InterventionHead.register_for_auto_class("AutoModel")  # see configuration_intervention.py

__all__ = ["InterventionHead", "InterventionHeadOutput"]
