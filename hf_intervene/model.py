"""`InterventionModel`: a pretrained base with an intervention head (METHOD sections 1 to 3;
arXiv:2507.04754).

    images --base.encode--> features --head.posterior--> z --head(z, s)--> embedding --base.loss--> terms
    noise z --head(z, s)--> embedding --base.generate--> images

Sampling enters at z; editing enters at the image and leaves at the image (`generation.py`).
"""  # noqa: E501

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.video_processor import VideoProcessor
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import AutoConfig, AutoModel
from transformers.utils import ModelOutput

from .bases import Base, wrap_base
from .bases.base import plain
from .bases.loading import base_reference
from .configuration_intervention import InterventionConfig
from .contexts import shown
from .flow import States
from .generation import GenerationMixin
from .modeling_intervention import InterventionHead
from .posterior import gaussian_kl
from .push import CardPushMixin, push_with_card
from .saving import SavingMixin
from .values import Values, each_alone


@dataclass
class InterventionModelOutput(ModelOutput):
    """
    Args:
        loss: scalar, the objective: mean over the batch of reconstruction_loss + beta * kl; for a
            base with residual latents, of reconstruction_loss + bottleneck_loss + beta * kl +
            residual_weight * residual_kl; for a denoiser the bottleneck_loss is added too.
        reconstruction_loss: -log p(x | z, s) of each image, nats, shape (B,); -log p(x | r) for a
            base with residual latents; for a denoiser ten times its squared error at one time,
            summed over the entries of x.
        kl: KL(q(z | x, s) || N(0, I)) of each image, nats, shape (B,). The three terms together are
            the negative ELBO.
        residual_kl: log q(r | x) - log p(r | c) of each image, nats, shape (B,); 0 for a base
            without residual latents.
        bottleneck_loss: for a base with residual latents, -log p(x | c) of each image, by the
            concepts alone, nats, shape (B,); for a denoiser -log p(x_0 | c), by the decoder beside
            the head.
        posterior_mean: mean of what `InterventionHead.posterior` is of: c for a head with flows,
            otherwise z, shape (B, *draw_shape).
        posterior_logvar: log-variance, likewise.
        draw: that of it which was decoded, likewise; for a head with flows the concepts c, (B, D,
            concept_width).
        states: for a head with flows, what `InterventionHead.states` says of the draw: terms of the
            objective share it.
    """

    loss: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    kl: torch.Tensor | None = None
    residual_kl: torch.Tensor | None = None
    bottleneck_loss: torch.Tensor | None = None
    posterior_mean: torch.Tensor | None = None
    posterior_logvar: torch.Tensor | None = None
    draw: torch.Tensor | None = None
    states: States | None = None


class InterventionModel(SavingMixin, GenerationMixin, CardPushMixin, PreTrainedModel):  # type: ignore[misc]
    r"""
    A base model under an intervention head.

    Args:
        config: configuration of the head; `config.ablation` may leave the head out (`"base"`,
            `"base-pooled"`) or make it ignore the context (`"head-pooled"`).
        base: a diffusers model of a registered class, or a `Base`.
        head: the head to use; `None` makes a new one.

    Example:

    ```python
    model = InterventionModel.build(LightVAE(sample_size=64), concepts=["quad1", "size"])
    loss = model(pixel_values, targets).loss
    images = model.sample(["quad1", "size"], num_images=8, generator=torch.Generator().manual_seed(0))
    ```
    """  # noqa: E501

    config: InterventionConfig
    config_class = InterventionConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    # Where it computes, if that is not where its weights are (offloading).
    execution_device: torch.device | None = None

    def __init__(
        self,
        config: InterventionConfig,
        base: ModelMixin | Base,
        head: InterventionHead | None = None,
    ):
        super().__init__(config)
        self.base = wrap_base(base)
        if config.ablation in ("base", "base-pooled"):
            self.base.check_alone(config.ablation)
            self.head, self.base.under_head = None, False
            self.noise_shape = self.draw_shape = tuple(self.base.embedding_shape)
        else:
            for name in ("feature_width", "embedding_shape"):
                expected, found = plain(getattr(self.base, name)), plain(getattr(config, name))
                if expected != found:
                    raise ValueError(
                        f"the head was made for {name} {found}, but this"
                        f" {type(self.base.model).__name__} has {expected}: use the base that the"
                        " head was trained on, or make a new head."
                    )
            self.head = InterventionHead(config) if head is None else head
            self.noise_shape = (config.num_blocks, config.noise_width)
            self.draw_shape = (config.num_blocks, self.head.draw_width)
            self.base.freeze_unused()
        self._draw_names = set(self.base.training_draws(1, torch.Generator()))
        as_they_are = {"do_resize": False, "do_normalize": False, "vae_scale_factor": 1}
        self.image_processor = VideoProcessor(**as_they_are)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: head and base arrive initialised."""

    @classmethod
    def build(
        cls,
        base: ModelMixin | Base,
        concepts: Sequence[str],
        ablation: str | None = None,
        base_subfolder: str | None = None,
        base_revision: str | None = None,
        base_variant: str | None = None,
        scheduler: SchedulerMixin | None = None,
        vae: ModelMixin | None = None,
        **head_options: Any,
    ) -> "InterventionModel":
        """Add a new head to a base.

        Args:
            base: a diffusers model of a registered class, or a `Base`.
            concepts: names of the concepts.
            ablation: see `InterventionConfig`.
            base_subfolder, base_revision, base_variant: where the base was loaded from within its
                repository; diffusers does not keep them.
            scheduler: of a denoiser: that of its pipeline.
            vae: of a denoiser of latents: the autoencoder of its pipeline.
            **head_options: other fields of `InterventionConfig`; `feature_width` and
                `embedding_shape` come from the base.

        Raises:
            TypeError, ValueError: one sentence: the base is of a class that is not registered, or
                needs other parts; the concepts are not a list of names.
        """
        if isinstance(concepts, (str, bytes)) or not isinstance(concepts, Iterable):
            raise TypeError(f"concepts must be a list of names, not {shown(concepts)}.")
        parts = {"scheduler": scheduler, "vae": vae}
        parts = {name: part for name, part in parts.items() if part is not None}
        base = wrap_base(base, **parts)
        references = {name: base_reference(part) for name, part in base.companion_models().items()}
        config = InterventionConfig(
            concepts=list(concepts),
            ablation=ablation,
            feature_width=base.feature_width,
            embedding_shape=list(base.embedding_shape),
            base_reference=base_reference(base.model, base_subfolder, base_revision, base_variant),
            companion_references={k: v for k, v in references.items() if v is not None} or None,
            **head_options,
        )
        return cls(config, base)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return super().device if self.execution_device is None else self.execution_device

    @property
    def concepts(self) -> tuple[str, ...]:
        """Names of the d concepts, in block order."""
        return tuple(self.config.concepts)

    @property
    def num_blocks(self) -> int:
        """D: concept blocks and free blocks."""
        return self.config.num_blocks

    # The objective

    def posterior(
        self, pixel_values: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of each entry of z under q(z | x, s), each (B, *noise_shape), of
        images (B, C, H, W) under targets (B, D).
        """
        features = self.base.encode(pixel_values).features
        mean, logvar = self._posterior_of(features, targets)
        if self.head is None:
            return mean, logvar
        return self.head.marginals(mean, logvar, self.seen(targets))

    def _posterior_of(
        self, features: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of y where the head whitens its posterior, otherwise of z."""
        if self.head is None:
            return self.base.posterior(features)
        return self.head.posterior(features, self.seen(targets))

    def _noise_of(self, y: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return y if self.head is None else self.head.whiten(y, self.seen(targets))

    def embed(
        self,
        z: torch.Tensor,
        targets: torch.Tensor,
        values: Values | None = None,
        edge_targets: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The representation e, (B, *embedding_shape), of noise (B, *noise_shape) under targets (B,
        D), some concepts at chosen values. `edge_targets`: see `InterventionHead.forward`."""
        if self.head is None:
            return z
        options = {} if edge_targets is None else {"edge_targets": self.seen(edge_targets)}
        return self.head(z, self.seen(targets), *(values or ()), **options).embedding

    def decode(
        self,
        z: torch.Tensor,
        targets: torch.Tensor,
        draws: Mapping[str, torch.Tensor] | None = None,
        values: Values | None = None,
        guidance_scale: float = 1.0,
        compose: str = "head",
        **options: Any,
    ) -> torch.Tensor:
        """Images (B, C, H, W) in [0, 1] of noise z (B, *noise_shape) under targets (B, D).

        Args:
            z, targets: see above.
            draws: the base's noise beside z, by name (see `Base.draws`), which a denoiser needs.
            values: chosen values of concepts.
            guidance_scale, compose: see `sample`.
            **options: further ones of the base's `generate`.
        """
        embedding = self.embed(z, targets, values)  # (B, *embedding_shape)
        options["guidance_scale"] = guidance_scale
        if compose == "scores":
            options["alone"] = [self.embed(z, *one) for one in each_alone(targets, values)]
        if guidance_scale != 1.0 or options.get("alone"):
            options["observational"] = self.embed(z, torch.zeros_like(targets))
        return self.base.generate(embedding, draws or {}, **options)

    def seen(self, targets: torch.Tensor) -> torch.Tensor:
        """The targets the head sees: none in the ablation that pools the contexts."""
        return torch.zeros_like(targets) if self.config.ablation == "head-pooled" else targets

    def posterior_draws(
        self, num_images: int, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Random numbers for so many images, as arguments of `forward`, on the CPU: standard normal
        `noise`, (num_images, *draw_shape), and those of `Base.training_draws`."""
        noise = torch.randn(num_images, *self.draw_shape, generator=generator)
        return {"noise": noise} | self.base.training_draws(num_images, generator)

    def forward(
        self,
        pixel_values: torch.Tensor | None,
        targets: torch.Tensor,
        beta: float | torch.Tensor = 1.0,
        noise: torch.Tensor | None = None,
        residual_weight: float | torch.Tensor = 1.0,
        prepared: dict[str, torch.Tensor] | None = None,
        whole: bool | None = None,
        return_dict: bool | None = None,
        code_length: bool = False,
        **draws: torch.Tensor,
    ) -> InterventionModelOutput | tuple:
        """The negative ELBO, E_q[-log p(x | z, s)] + beta KL(q(z | x, s) || N(0, I)) (METHOD
        section 2), with one posterior sample. The first term is the base's `loss`: for a base with
        residual latents that of `bases/residual.py`, for a denoiser the denoising loss.

        Args:
            pixel_values: images, (B, C, H, W), in [0, 1], or clips, (B, C, T, H, W); `None` with
                `prepared`.
            targets: (B, D), entries in [0, 1].
            beta: weight of the KL; as a scalar tensor, a compiled model takes another one without
                being compiled again.
            noise: standard normal draws for the posterior sample, (B, *draw_shape); `None` draws
                them.
            residual_weight: weight of the term of the residual latents.
            prepared: what the base's `prepare` made of the images; of a recorded pipeline
                (`PipelineBase`) also `prompts`, the number of each image's prompt, (B,) int64, if
                they have their own.
            whole: whether all targets are 0 or 1; `None`: look (see `InterventionHead.states`).
            code_length: whether images are bytes and have probabilities, as bits per pixel want
                them, without a gradient (see `Base.code_length`).
            **draws: all random numbers of the base's `loss`, by name (see `Base.training_draws`);
                without them they are drawn.
        """
        if prepared is None:
            found = None if pixel_values is None else tuple(pixel_values.shape)
            if pixel_values is None or found is None or found[1:] != self.base.image_shape:
                shape = ", ".join(map(str, self.base.image_shape))
                raise ValueError(f"pixel_values must have shape (batch, {shape}), not {found}.")
            encoded = self.base.encode(pixel_values)
        else:
            encoded = self.base.encode_prepared(prepared)
        mean, logvar = self._posterior_of(encoded.features, targets)  # (B, *draw_shape)
        noise = torch.randn_like(mean) if noise is None else noise
        draws = self._all_draws(draws, targets)
        y, s = mean + (0.5 * logvar).exp() * noise, self.seen(targets)  # (B, *draw_shape)
        states = None
        if self.head is None:
            embedding, kl = self.embed(y, targets), gaussian_kl(mean, logvar)
        else:
            embedding = self.head.embed_draw(y, s)  # (B, *embedding_shape)
            states = self.head.states(y, s, whole) if self.head.is_flow else None
            kl = self.head.kl(mean, logvar, s, y, states)  # (B,)
        of_base = self.base.code_length if code_length else self.base.loss
        terms = of_base(embedding, encoded, draws)  # each (B,)
        loss = beta * kl
        for name, term in terms.items():
            loss = loss + (residual_weight * term if name == "residual_kl" else term)
        output = InterventionModelOutput(
            loss=loss.mean(),
            kl=kl,
            posterior_mean=mean,
            posterior_logvar=logvar,
            draw=y,
            states=states,
            **{"residual_kl": torch.zeros_like(kl)} | terms,
        )
        return output if return_dict is not False else output.to_tuple()

    def _all_draws(
        self, draws: dict[str, torch.Tensor], targets: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The random numbers of the base's loss: those given, and new ones where they lack."""
        if draws.keys() == self._draw_names:
            return draws
        if unknown := sorted(draws.keys() - self._draw_names):
            raise TypeError(f"forward() takes no {', '.join(unknown)}.")
        return self.base.training_draws(len(targets), device=targets.device) | draws


AutoConfig.register(InterventionConfig.model_type, InterventionConfig, exist_ok=True)
AutoModel.register(InterventionConfig, InterventionHead, exist_ok=True)
# The head's code travels with checkpoints and knows no model cards.
InterventionHead._push = push_with_card
