"""`InterventionModel`: a pretrained base with an intervention head (METHOD sections 1 to 3;
arXiv:2507.04754).

    images --base.encode--> features --head.posterior--> z --head(z, s)--> embedding --base.decode--> images

Sampling enters at z; editing enters at the image and leaves at the image.
"""  # noqa: E501

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import AutoConfig, AutoModel
from transformers.utils import ModelOutput

from .bases import Base, wrap_base
from .bases.base import plain
from .bases.loading import base_reference
from .batch_norm import reestimate_batch_norm
from .configuration_intervention import InterventionConfig
from .contexts import Interventions, parse_choices, parse_interventions
from .image_files import flat_image
from .modeling_intervention import InterventionHead
from .posterior import gaussian_kl
from .push import push_to_hub
from .sampling_arguments import (
    check_batch_size,
    check_composition,
    check_images,
    check_noise,
    check_options,
)
from .saving import from_pretrained, save_pretrained
from .values import Values, each_alone, model_values


ImageInput = Image.Image | np.ndarray | torch.Tensor | Sequence[Image.Image]
Images = torch.Tensor | np.ndarray | list[Image.Image]  # as `output_type` says


@dataclass
class InterventionModelOutput(ModelOutput):
    """
    Args:
        loss: scalar, the objective: mean over the batch of reconstruction_loss + beta * kl; for a
            base with residual latents, of reconstruction_loss + bottleneck_loss + beta * kl +
            residual_weight * residual_kl.
        reconstruction_loss: -log p(x | z, s) of each image, nats, shape (B,); -log p(x | r) for a
            base with residual latents; for a denoiser its squared error at one time, summed over
            the entries of x.
        kl: KL(q(z | x, s) || N(0, I)) of each image, nats, shape (B,). The three terms together are
            the negative ELBO.
        residual_kl: log q(r | x) - log p(r | c) of each image, nats, shape (B,); 0 for a base
            without residual latents.
        bottleneck_loss: for a base with residual latents, -log p(x | c) of each image, by the
            concepts alone, nats, shape (B,).
        posterior_mean: mean of what `InterventionHead.posterior` is of: c for a head with flows,
            otherwise z, shape (B, *draw_shape).
        posterior_logvar: log-variance, likewise.
        draw: that of it which was decoded, likewise; for a head with flows the concepts c, (B, D,
            concept_width).
        reconstruction: mean image of p(x | z, s), shape (B, C, H, W), in [0, 1]; only with
            `return_reconstruction=True`.
    """

    loss: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    kl: torch.Tensor | None = None
    residual_kl: torch.Tensor | None = None
    bottleneck_loss: torch.Tensor | None = None
    posterior_mean: torch.Tensor | None = None
    posterior_logvar: torch.Tensor | None = None
    draw: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None


class InterventionModel(PreTrainedModel):
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
    images = model.sample(["quad1", "size"], num_samples=8, generator=torch.Generator().manual_seed(0))
    ```
    """  # noqa: E501

    config: InterventionConfig
    config_class = InterventionConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    _loaded_from: Path | None = None  # the folder, if it was loaded
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
            if self.base.denoises:
                raise ValueError(
                    f"the ablation {config.ablation!r} has no head, and a denoiser has no code z of"
                    " its own to do without."
                )
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
        self.image_processor = VaeImageProcessor(
            do_resize=False, do_normalize=False, vae_scale_factor=1
        )

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
        **head_options: Any,
    ) -> "InterventionModel":
        """Add a new head to a base.

        Args:
            base: a diffusers model of a registered class.
            concepts: names of the concepts.
            ablation: see `InterventionConfig`.
            base_subfolder, base_revision, base_variant: where the base was loaded from within its
                repository; diffusers does not keep them.
            **head_options: other fields of `InterventionConfig`; `feature_width` and
                `embedding_shape` come from the base.
        """
        base = wrap_base(base)
        references = {name: base_reference(part) for name, part in base.companion_models().items()}
        config = InterventionConfig(
            concepts=list(concepts),
            ablation=ablation,
            feature_width=base.feature_width,
            embedding_shape=list(base.embedding_shape),
            base_reference=base_reference(base.model, base_subfolder, base_revision, base_variant),
            companion_references={
                name: found for name, found in references.items() if found is not None
            }
            or None,
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
        mean, logvar = self._posterior_of(self.base.encode(pixel_values), targets)
        return (
            (mean, logvar)
            if self.head is None
            else self.head.marginals(mean, logvar, self.seen(targets))
        )

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
        residual: torch.Tensor | None = None,
        values: Values | None = None,
        **denoising: Any,
    ) -> torch.Tensor:
        """Parameters of p(x | z, s), (B, C, H, W), of noise (B, *noise_shape) under targets (B, D);
        of p(x | z, s, rho) with residual noise rho (B, *residual_shape), which a denoiser needs;
        further arguments are those of `DiffusionBase.decode`, and `compose` (see `sample`)."""
        embedding = self.embed(z, targets, values)
        if denoising.pop("compose", "head") == "scores":
            denoising["alone"] = [self.embed(z, *one) for one in each_alone(targets, values)]
        if denoising.get("guidance_scale", 1.0) != 1.0 or denoising.get("alone"):
            denoising["observational"] = self.embed(z, torch.zeros_like(targets))
        decode: Callable[..., torch.Tensor] = (
            self.base.decode
        )  # of some families with residual noise and more
        return decode(embedding) if residual is None else decode(embedding, residual, **denoising)

    def seen(self, targets: torch.Tensor) -> torch.Tensor:
        """The targets the head sees: none in the ablation that pools the contexts."""
        return torch.zeros_like(targets) if self.config.ablation == "head-pooled" else targets

    def posterior_draws(
        self, num_images: int, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Draws for the posterior of images, as keyword arguments of `forward`, on the CPU:
        standard normal `noise`, (num_images, *draw_shape), and, for a base with residual latents or
        a denoiser, `residual_noise`, (num_images, *residual_shape); for a denoiser `time` too,
        uniform in [0, 1), (num_images,)."""
        shapes = {"noise": self.draw_shape}
        if self.base.residual_shape is not None:
            shapes["residual_noise"] = self.base.residual_shape
        draws = {
            name: torch.randn(num_images, *shape, generator=generator)
            for name, shape in shapes.items()
        }
        if self.base.denoises:
            # Spread evenly over the schedule, in random order: the loss of a batch depends less on
            # the times that it drew.
            order = torch.randperm(num_images, generator=generator)
            draws["time"] = (order + torch.rand(num_images, generator=generator)) / num_images
        return draws

    def forward(
        self,
        pixel_values: torch.Tensor | None,
        targets: torch.Tensor,
        beta: float | torch.Tensor = 1.0,
        noise: torch.Tensor | None = None,
        residual_weight: float = 1.0,
        residual_noise: torch.Tensor | None = None,
        time: torch.Tensor | None = None,
        prepared: dict[str, torch.Tensor] | None = None,
        return_reconstruction: bool = False,
        return_dict: bool | None = None,
    ) -> InterventionModelOutput | tuple:
        """The negative ELBO, E_q[-log p(x | z, s)] + beta KL(q(z | x, s) || N(0, I)) (METHOD
        section 2), with one posterior sample; for a base with residual latents, that of
        `bases/residual.py`; for a denoiser, the denoising loss takes the place of the first term.

        Args:
            pixel_values: images, (B, C, H, W), in [0, 1]; `None` with `prepared`.
            targets: (B, D), entries in [0, 1].
            beta: weight of the KL; as a scalar tensor, a compiled model takes another one without
                being compiled again.
            noise: standard normal draws for the posterior sample, (B, *draw_shape); `None` draws
                them.
            residual_weight: weight of the term of the residual latents.
            residual_noise: standard normal draws for theirs, or the noise that a denoiser is to
                tell from the image, (B, *residual_shape); `None` draws them.
            time: for a denoiser, uniform draws in [0, 1), (B,): how noisy; `None` draws them.
            prepared: for a denoiser, what its `prepare` made of the images; of a recorded pipeline
                (`PipelineBase`) also `prompts`, the number of each image's prompt, (B,) int64, if
                they have their own.
            return_reconstruction: whether to return the reconstructed images; not for a denoiser.
        """
        found = None if pixel_values is None else tuple(pixel_values.shape)
        if prepared is None and (found is None or found[1:] != self.base.image_shape):
            raise ValueError(
                "pixel_values must have shape (batch,"
                f" {', '.join(map(str, self.base.image_shape))}), not {found}."
            )
        x: Any = pixel_values  # (B, C, H, W)
        rho: Any = residual_noise  # (B, *residual_shape)
        if return_reconstruction and self.base.denoises:
            raise ValueError("a denoiser reconstructs in many steps: use reconstruct().")
        if self.base.residual_shape is not None and rho is None:
            rho = torch.randn(len(targets), *self.base.residual_shape, device=targets.device)
        if self.base.denoises:
            prepared = self.base.prepare(x) if prepared is None else prepared
            features, latents = self.base.features(prepared), prepared["x0"]
        elif self.base.residual_shape is None:
            features = self.base.encode(x)
        else:
            features, latents, log_q = self.base.encode_latents(x, rho)
        mean, logvar = self._posterior_of(features, targets)  # (B, *draw_shape)
        if noise is None:
            noise = torch.randn_like(mean)
        y, s = mean + (0.5 * logvar).exp() * noise, self.seen(targets)  # (B, *draw_shape)
        embedding = (
            self.embed(y, targets) if self.head is None else self.head.embed_draw(y, s)
        )  # (B, *embedding_shape)
        kl = (
            gaussian_kl(mean, logvar) if self.head is None else self.head.kl(mean, logvar, s, y)
        )  # (B,)
        residual_kl, bottleneck_loss = torch.zeros_like(kl), None
        decoded: Any = None
        if self.base.denoises:
            time = torch.rand(len(targets), device=targets.device) if time is None else time
            prompts = (prepared or {}).get("prompts")  # (B,), where images have their own
            reconstruction_loss = self.base.denoising_loss(
                embedding, latents, rho, time, prompts
            )  # (B,)
        else:
            decoded = self.base.decode(embedding)  # (B, C, H, W)
            reconstruction_loss = self.base.reconstruction_loss(decoded, x)  # (B,)
        loss = reconstruction_loss + beta * kl
        if self.base.residual_shape is not None and not self.base.denoises:
            bottleneck_loss, decoded = reconstruction_loss, self.base.decode_latents(latents)
            reconstruction_loss = self.base.residual_reconstruction_loss(decoded, x)  # (B,)
            residual_kl = log_q - self.base.residual(latents, embedding)[1]  # (B,)
            loss = loss + reconstruction_loss + residual_weight * residual_kl
        output = InterventionModelOutput(
            loss=loss.mean(),
            reconstruction_loss=reconstruction_loss,
            kl=kl,
            residual_kl=residual_kl,
            bottleneck_loss=bottleneck_loss,
            posterior_mean=mean,
            posterior_logvar=logvar,
            draw=y,
            reconstruction=self.base.to_pixels(decoded) if return_reconstruction else None,
        )
        return output if return_dict is not False else output.to_tuple()

    # What a user asks for

    @property
    def images_at_once(self) -> int:
        """How many images are processed at once unless said otherwise: 256 of up to 64x64 pixels,
        and fewer of larger ones.
        """
        _, height, width = self.base.image_shape
        return max(1, min(256, 256 * 64**2 // (height * width)))

    @torch.no_grad()
    def sample(
        self,
        interventions: Interventions = None,
        num_samples: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: torch.Tensor | None = None,
        output_type: str = "pt",
        batch_size: int | None = None,
        residual_scale: float = 1.0,
        residual_noise: torch.Tensor | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        reference_context: Interventions = None,
        compose: str = "head",
    ) -> Images:
        """Sample images from p(x | s), z from the prior.

        Args:
            interventions: what to intervene on, in any form of `hf_intervene.contexts`; several
                concepts at once compose. With chosen values (see `values.py`) from p(x | do(c_j =
                v)).
            num_samples: number of images; `None`: one for each context given.
            generator: makes the draw reproducible.
            noise: exogenous noise to use, (num_samples, *noise_shape), to compare interventions
                under the same noise.
            output_type: `"pt"` (float tensor (N, C, H, W) in [0, 1]), `"np"` (N, H, W, C) or
                `"pil"`.
            batch_size: images decoded at once; `None`: `images_at_once`.
            residual_scale: standard deviation of the residual noise, for a base with residual
                latents: 1 is the model's own, 0 leaves the residual out (what the concepts decide,
                alone).
            residual_noise: residual noise to use, of those latents or of a denoiser (x_T),
                (num_samples, *residual_shape).
            num_inference_steps: of a denoiser's scheduler.
            guidance_scale: for a denoiser: above 1, further away from what it makes of the same
                noise without interventions.
            reference_context: the context that reference images in `interventions` came from, or
                one for each sample: observational unless said otherwise.
            compose: how several concepts are put together. `"head"`: the head is given all of them
                at once. `"scores"`, of a denoiser: its prediction is o + w sum_k (p_k - o), where
                p_k is that under concept k alone, o that under nothing and w the `guidance_scale`
                (Liu et al., arXiv:2206.01714); it is right for concepts that are independent of
                each other.

        Raises:
            ValueError: one sentence: noise of another shape, guidance with no interventions or no
                denoiser.
        """
        if noise is not None:
            noise = check_noise("noise", noise, self.noise_shape)
            num_samples = noise.shape[0] if num_samples is None else num_samples
        check_batch_size(batch_size)  # references are encoded with it
        targets, values = self._chosen(interventions, num_samples, reference_context, batch_size)
        numbers = {"guidance_scale": guidance_scale, "residual_scale": residual_scale}
        check_options(generator, len(targets), batch_size, output_type, **numbers)
        if noise is None:
            noise = randn_tensor(
                (len(targets), *self.noise_shape),
                generator=generator,
                device=self.device,
                dtype=torch.float32,
            )
        elif len(noise) != len(targets):
            raise ValueError(
                f"noise has {len(noise)} rows for {len(targets)} samples: give one row per sample."
            )
        residual = None
        if self.base.residual_shape is not None:
            shape = (len(targets), *self.base.residual_shape)
            if residual_noise is None:
                residual_noise = randn_tensor(
                    shape, generator=generator, device=self.device, dtype=torch.float32
                )
            else:
                residual_noise = check_noise(
                    "residual_noise", residual_noise, shape[1:], len(targets)
                )
            residual = residual_scale * residual_noise.to(self.device)
        options: dict[str, Any] = {}
        if self.base.denoises:
            options = {
                "num_inference_steps": num_inference_steps,
                "guidance_scale": guidance_scale,
                "generator": generator,
            }
            options["compose"] = compose
        self._check_guidance(guidance_scale, targets, compose)
        return self._decoded_images(
            noise, targets, values, output_type, batch_size, residual, **options
        )

    @torch.no_grad()
    def reconstruct(
        self,
        images: ImageInput,
        context: Interventions = None,
        output_type: str = "pt",
        batch_size: int | None = None,
    ) -> Images:
        """Encode images under the context they came from and decode the posterior mean. See `edit`."""  # noqa: E501
        return self.edit(
            images, context, context=context, output_type=output_type, batch_size=batch_size
        )

    @torch.no_grad()
    def edit(
        self,
        images: ImageInput,
        interventions: Interventions,
        context: Interventions = None,
        output_type: str = "pt",
        batch_size: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        reference_context: Interventions = None,
        compose: str = "head",
    ) -> Images:
        """Counterfactual: abduct, act, predict. The exogenous noise of an image is kept (that of
        its residual latents too, where the base has them; of a denoiser the noise x_T that leads to
        the image), the targets are replaced.

        Args:
            images: PIL image(s), uint8 array (N, H, W, C) or float tensor (N, C, H, W) in [0, 1],
                of the base's own size.
            interventions: the interventions to apply, in any form of `hf_intervene.contexts`,
                chosen values among them.
            context: the context that the images came from: observational unless said otherwise.
            output_type: see `sample`.
            batch_size: images processed at once; `None`: `images_at_once`.
            num_inference_steps: of a denoiser, each way.
            guidance_scale, reference_context, compose: see `sample`.
        """
        check_options(None, 1, batch_size, output_type, guidance_scale=guidance_scale)
        pixel_values = self.preprocess(images)
        before = self.targets(context, len(pixel_values))
        after = self._chosen(interventions, len(pixel_values), reference_context, batch_size)
        self._check_guidance(guidance_scale, after[0], compose)  # before the long part
        noise, residual = self.abduct(pixel_values, before, None, batch_size, num_inference_steps)
        denoising = num_inference_steps, guidance_scale, compose
        return self._predict(noise, residual, after, output_type, batch_size, *denoising)

    @torch.no_grad()
    def predict(
        self,
        noise: torch.Tensor,
        residual: torch.Tensor | None,
        interventions: Interventions,
        output_type: str = "pt",
        batch_size: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        reference_context: Interventions = None,
        compose: str = "head",
    ) -> Images:
        """The last step of `edit`: images of what `abduct` returned, under other interventions.
        Arguments as there.
        """
        check_options(None, 1, batch_size, output_type, guidance_scale=guidance_scale)
        noise = check_noise("noise", noise, self.noise_shape)
        if self.base.residual_shape is not None:
            residual = check_noise("residual", residual, self.base.residual_shape, len(noise))
        after = self._chosen(interventions, len(noise), reference_context, batch_size)
        self._check_guidance(guidance_scale, after[0], compose)
        denoising = num_inference_steps, guidance_scale, compose
        return self._predict(noise, residual, after, output_type, batch_size, *denoising)

    def _predict(
        self,
        noise: torch.Tensor,
        residual: torch.Tensor | None,
        after: tuple[torch.Tensor, Values | None],
        output_type: str,
        batch_size: int | None,
        num_inference_steps: int,
        guidance_scale: float,
        compose: str,
    ) -> Images:
        options: dict[str, Any] = {}
        if self.base.denoises:
            options = {
                "num_inference_steps": num_inference_steps,
                "guidance_scale": guidance_scale,
                "along_path": True,
            }
            options["compose"] = compose
        return self._decoded_images(noise, *after, output_type, batch_size, residual, **options)

    def _check_guidance(self, guidance_scale: float, targets: torch.Tensor, compose: str) -> None:
        check_composition(compose)
        if compose != "head" and not self.base.denoises:
            raise ValueError(
                f"compose={compose!r} is for denoisers; a {type(self.base.model).__name__} has no "
                "scores: leave it out."
            )
        if guidance_scale == 1.0:
            return
        if not self.base.denoises:
            raise ValueError(
                f"guidance_scale is for denoisers; a {type(self.base.model).__name__} has none:"
                " leave it at 1."
            )
        if not bool((targets != 0).any()):
            raise ValueError(
                "guidance_scale leads away from the observational context, but nothing is"
                " intervened on: leave it at 1."
            )

    @torch.no_grad()
    def abduct(
        self,
        pixel_values: torch.Tensor,
        targets: torch.Tensor,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
        num_inference_steps: int = 50,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The noise of images, float32: z, (B, *noise_shape), and the residual noise (B,
        *residual_shape) that belongs to it, or `None` for a base without residual latents.

        Args:
            pixel_values: images, (B, C, H, W).
            targets: of the context they came from, (B, D).
            generator: draws from the posteriors; `None`: their means. Only draws are N(0, I) under
                the model.
            batch_size: images processed at once; `None`: `images_at_once`.
            num_inference_steps: of a denoiser.
        """
        options = {"num_inference_steps": num_inference_steps} if self.base.denoises else {}
        batch_size = batch_size or self.images_at_once
        batches = zip(pixel_values.split(batch_size), targets.split(batch_size))
        noise, residuals = zip(
            *[self._abduct_batch(x, s, generator, **options) for x, s in batches]
        )
        return torch.cat(noise), None if residuals[0] is None else torch.cat(residuals)

    def _abduct_batch(
        self,
        pixel_values: torch.Tensor,
        targets: torch.Tensor,
        generator: torch.Generator | None,
        **denoising: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        def noise(shape: tuple[int, ...]) -> torch.Tensor:
            shape = (len(pixel_values), *shape)
            if generator is None:
                return torch.zeros(shape, device=pixel_values.device)
            return randn_tensor(
                shape, generator=generator, device=pixel_values.device, dtype=torch.float32
            )

        if self.base.residual_shape is None:
            features = self.base.encode(pixel_values)
        else:
            features, latents, _ = self.base.encode_latents(
                pixel_values, noise(self.base.residual_shape)
            )
        mean, logvar = self._posterior_of(features, targets)
        z = self._noise_of(
            mean.float() + (0.5 * logvar.float()).exp() * noise(self.draw_shape), targets
        )
        if self.base.residual_shape is None:
            return z, None
        return z, self.base.residual_noise(latents, self.embed(z, targets), **denoising)

    def targets(self, interventions: Interventions, num_samples: int | None = None) -> torch.Tensor:
        """Targets (num_samples, D) on the model's device of any form of `hf_intervene.contexts`."""
        return parse_interventions(
            interventions, self.concepts, num_samples, self.config.free_blocks
        ).to(self.device)

    def _chosen(
        self,
        interventions: Interventions,
        num_samples: int | None,
        reference_context: Interventions,
        batch_size: int | None,
    ) -> tuple[torch.Tensor, Values | None]:
        """Targets (num_samples, D) and the chosen values of interventions."""
        targets, choices = parse_choices(
            interventions, self.concepts, num_samples, self.config.free_blocks
        )
        return targets.to(self.device), model_values(
            self, choices, len(targets), reference_context, batch_size
        )

    def preprocess(self, images: ImageInput) -> torch.Tensor:
        """Check images and bring them to a float tensor (N, C, H, W) in [0, 1] on the model's
        device.
        """
        if isinstance(images, (str, os.PathLike)):
            raise TypeError(
                f"an image was expected, not the name of a file: PIL.Image.open({str(images)!r})"
                " opens it."
            )
        if isinstance(images, np.ndarray) and images.dtype == np.uint8:
            images = images.astype(np.float32) / 255
        channels, height, width = self.base.image_shape
        if isinstance(images, Image.Image):
            images = [images]
        if not isinstance(images, (np.ndarray, torch.Tensor, list, tuple)):
            raise TypeError(
                f"images must be PIL images, an array or a tensor, not a {type(images).__name__}."
            )
        if not len(images):
            raise ValueError("there are no images: give one at least.")
        if isinstance(images, (list, tuple)) and all(
            isinstance(image, Image.Image) for image in images
        ):
            images = [flat_image(image, channels) for image in images]
        try:
            pixel_values = self.image_processor.preprocess(images).to(self.device, torch.float32)
        except (ValueError, TypeError, RuntimeError, IndexError) as error:
            raise ValueError(
                "images must be PIL images, a uint8 array (N, H, W, C) or a float tensor (N, C, H,"
                " W) in [0, 1], all of one size."
            ) from error
        if tuple(pixel_values.shape[1:]) != (channels, height, width):
            found = "x".join(map(str, pixel_values.shape[1:]))
            raise ValueError(
                f"images of {channels}x{height}x{width} (channels, height, width) were expected,"
                f" not {found}: resize them first."
            )
        if not bool(((pixel_values >= 0) & (pixel_values <= 1)).all()):  # NaN fails the comparison
            raise ValueError("pixel values must lie in [0, 1]; some do not, or are NaN.")
        return pixel_values

    def _decoded_images(
        self,
        noise: torch.Tensor,
        targets: torch.Tensor,
        values: Values | None,
        output_type: str,
        batch_size: int | None,
        residual: torch.Tensor | None,
        **denoising: Any,
    ) -> Images:
        noise, batch_size = noise.to(self.device), batch_size or self.images_at_once
        residuals, chosen = (
            [None] * len(noise) if part is None else part.split(batch_size)
            for part in (residual, values)
        )
        images = torch.cat(
            [
                check_images(self.base.to_pixels(self.decode(z, s, rho, v, **denoising)))
                for z, s, rho, v in zip(
                    noise.split(batch_size), targets.split(batch_size), residuals, chosen
                )
            ]
        )
        return self.image_processor.postprocess(
            images, output_type=output_type, do_denormalize=[False] * len(images)
        )

    reestimate_batch_norm = reestimate_batch_norm

    # Saving and loading

    # Their arguments are not those of transformers' models.
    push_to_hub = push_to_hub  # type: ignore[assignment]
    save_pretrained = save_pretrained  # type: ignore[assignment]
    from_pretrained = classmethod(from_pretrained)  # type: ignore[assignment]


AutoConfig.register(InterventionConfig.model_type, InterventionConfig, exist_ok=True)
AutoModel.register(InterventionConfig, InterventionHead, exist_ok=True)
# The head's code travels with checkpoints and cannot know of model cards; here it learns.
InterventionHead.push_to_hub = push_to_hub  # type: ignore[method-assign, assignment]  # other arguments than transformers'
