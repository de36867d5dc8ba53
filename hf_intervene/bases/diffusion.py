"""Diffusion denoisers of diffusers under a head: UNet2DModel, UNet2DConditionModel, DiT, Stable
Diffusion 3's; on pixels or on latents.

The file is longer than most: the verbs of one family belong together.

    pixels (B, C, S, S) --vae--> x_0 (B, c, h, h);  pixels or x_0 --encoder--> features (B, feature_width)
    embedding (B, *embedding_shape) --decoder--> mean of x_0 (B, c, h, h); Gaussian likelihood
    embedding and that mean --projections--> hooks of the denoiser (injection.py)
    that mean, noised --denoiser and scheduler (denoising.py)--> x_0 --vae--> pixels

z says what the concepts decide, the noise carries the detail: the residual noise of this family (a
diffusion autoencoder, Preechakul et al., arXiv:2111.15640, whose semantic code is the head's). The
first terms of the objective are -log p(x_0 | z) by the decoder, and the denoising loss (METHOD
section 2), both summed over the entries of x. They are no likelihood of pixels, so there are no
bits per pixel.
"""  # noqa: E501

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel

from .adapter import (
    DiffusionAdapter,
    check_sites,
    check_supported,
    check_text,
    new_adapter,
    pixels_of_denoiser,
)
from .autoencoder import latent_shape, latents_of, scale_and_shift
from .base import Base, Encoded
from .denoising import Predict, Start, follow, generate, invert, noised
from .encoders import VisionEncoder
from .injection import Entries, Injection
from .likelihoods import gaussian_loss
from .registry import register_base
from .schedulers import (
    check_prediction,
    deterministic,
    prediction_type,
    training_scheduler,
    warn_of_clipping,
)
from .sites import find_sites


# Factor of the squared error. With 1 nothing of the concepts was learnt: the noisy image shows most
# of the clean one, so the concepts lowered the error by less than their KL.
PRECISION = 10.0


@dataclass
class _Entered:
    """
    Args:
        entries: what enters the denoiser of an embedding.
        mean: what denoising starts from, (B, *sample_shape); `None`: noise alone.
    """

    entries: Entries
    mean: torch.Tensor | None = None


@register_base(UNet2DModel)
@register_base(UNet2DConditionModel)
@register_base(DiTTransformer2DModel)
@register_base(SD3Transformer2DModel)
class DiffusionBase(Base):
    """A denoiser under a head.

    Args:
        model: the denoiser.
        scheduler: the one it was trained with, or any other with the same kind of prediction; it
            generates too.
        vae: the autoencoder in front of a latent denoiser; it stays frozen.
        image_encoder, image_processor: a frozen vision model of transformers that z is read from;
            `None`: a small convolutional network, trained with the head, on what the denoiser works
            on.
        adapter: a trained adapter; `None` makes a new one.
        sample_size: side of the images in pixels; `None`: the adapter's, else the one of the
            denoiser's configuration.
        text, pooled_text: embeddings (1, length, width) and (1, width) of the text that a
            text-conditioned denoiser is to be given under the head, such as those of the empty
            prompt; `None`: zeros.
        embedding_width, num_tokens: of a new adapter: width of the embedding where it is a vector;
            number of its tokens where the denoiser has cross-attention (of its cross-attention
            width).
        min_snr_gamma: see `denoising.noised`.
        class_label: of a UNet2DModel with classes: the one that it is given for all images; the
            head decides the rest.

    Raises:
        TypeError, ValueError: one sentence: no scheduler or vae, no class, an adapter for another
            denoiser or kind of prediction.
    """

    adapter: DiffusionAdapter
    adapter_class = DiffusionAdapter
    companion_names: tuple[str, ...] = ("vae", "scheduler", "image_encoder", "image_processor")
    loss_name = "denoising_loss"
    loss_unit = "per entry, squared error times 10 and KL"
    passes = 50
    resident = ()  # only the denoiser's `forward` is called
    sample_shape: tuple[int, ...]  # of one noisy sample

    def __init__(
        self,
        model: ModelMixin,
        scheduler: SchedulerMixin | None = None,
        vae: ModelMixin | None = None,
        image_encoder: PreTrainedModel | None = None,
        image_processor: BaseImageProcessor | None = None,
        adapter: DiffusionAdapter | None = None,
        sample_size: int | None = None,
        text: torch.Tensor | None = None,
        pooled_text: torch.Tensor | None = None,
        embedding_width: int = 128,
        num_tokens: int = 4,
        min_snr_gamma: float | None = None,
        class_label: int | None = None,
    ):
        super().__init__(model)
        self._take_parts(scheduler, vae, image_encoder, image_processor, min_snr_gamma)
        if adapter is not None:
            class_label = adapter.config.class_label
        check_supported(model, class_label)
        assert scheduler is not None  # or `_take_parts` had raised
        channels = model.config.in_channels
        size = sample_size or (
            adapter.config.sample_size if adapter is not None else pixels_of_denoiser(model, vae)
        )
        if vae is None:
            self.image_shape = self.sample_shape = (channels, size, size)
        else:
            self.image_shape = (vae.config.get("in_channels", 3), size, size)
            self.sample_shape = tuple(latent_shape(vae, self.image_shape))
            if self.sample_shape[0] != channels:
                raise ValueError(
                    f"this {type(model).__name__} denoises {channels} channels, but the"
                    f" {type(vae).__name__} makes latents of {self.sample_shape[0]}: pass the vae"
                    " of its pipeline."
                )
            warn_of_clipping(scheduler, type(vae).__name__)
        if adapter is None:
            adapter = new_adapter(
                model,
                size,
                self.sample_shape,
                None if self.image_encoder is None else self.image_encoder.width,
                embedding_width,
                num_tokens,
                text,
                pooled_text,
                prediction_type=prediction_type(scheduler),
                class_label=class_label,
            )
        check_text(model, adapter)
        self._enter_by(adapter)

    def _take_parts(
        self,
        scheduler: SchedulerMixin | None,
        vae: ModelMixin | None,
        image_encoder: PreTrainedModel | None,
        image_processor: BaseImageProcessor | None,
        min_snr_gamma: float | None,
    ) -> None:
        """What is needed beside the denoiser."""
        if scheduler is None:
            raise ValueError(
                f"a head on a {type(self.model).__name__} needs the scheduler that it was trained"
                " with: pass scheduler=."
            )
        if not isinstance(scheduler, SchedulerMixin):
            raise TypeError(
                f"scheduler must be a scheduler of diffusers, not a {type(scheduler).__name__}."
            )
        self.scheduler, self.min_snr_gamma = deterministic(scheduler), min_snr_gamma
        self._training_scheduler = training_scheduler(scheduler)
        self.vae = None if vae is None else vae.requires_grad_(False).eval()
        self.image_encoder = None
        if image_encoder is not None:
            self.image_encoder = VisionEncoder(image_encoder, image_processor)

    def _enter_by(self, adapter: DiffusionAdapter) -> None:
        """Put the hooks of an adapter's embedding on the denoiser."""
        check_sites(find_sites(self.model), adapter, type(self.model).__name__)
        check_prediction(self.scheduler, adapter.config.prediction_type, "this head")
        self.adapter = adapter
        self.feature_width = adapter.config.feature_width
        if adapter.config.decoded_shape is not None:
            self.loss_terms = ("bottleneck_loss", "reconstruction_loss")
            self.loss_unit = "per entry, the decoder's nats, squared error times 10, and KL"
        self.embedding_shape = tuple(adapter.config.embedding_shape)
        self.injection = Injection(self.model)
        self.injection.install()

    @property
    def noise_shapes(self) -> Mapping[str, tuple[int, ...]]:  # type: ignore[override]
        """The noise that a sample starts from, or that the denoiser is to tell from an image."""
        return {"residual_noise": self.sample_shape}

    # From images to features

    def prepare(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the frozen parts make of images (B, C, S, S) in [0, 1]: `x0`, (B, *sample_shape),
        what is denoised, and, with a vision model, its `features` (B, feature_width); float32."""
        with torch.no_grad():
            x0 = 2 * pixel_values - 1
            if self.vae is not None:
                scale, shift = scale_and_shift(self.vae)
                x0 = (latents_of(self.vae, x0.to(self.vae.dtype))[0].float() - shift) * scale
            if self.image_encoder is None:
                return {"x0": x0}
            return {"x0": x0, "features": self.image_encoder(pixel_values)}

    def encode(self, pixel_values: torch.Tensor) -> Encoded:
        return self.encode_prepared(self.prepare(pixel_values))

    def encode_prepared(self, prepared: Mapping[str, torch.Tensor]) -> Encoded:
        """Of a base whose images have prompts of their own, with `prompts` among what was prepared:
        the number of each image's prompt, (B,) int64."""
        return Encoded(self._features(prepared), dict(prepared))

    def _features(self, prepared: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if self.image_encoder is not None:
            return prepared["features"]
        return self.adapter.encoder(self._arranged(prepared["x0"]).to(self.adapter.dtype))

    def denoise(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        embedding: torch.Tensor | Entries,
        prompts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The denoiser's prediction, (B, *sample_shape), float32, of noisy x (B, *sample_shape)
        at timesteps (B,) or (), under embeddings (B, *embedding_shape) or what `DiffusionAdapter`
        makes enter of them. `prompts`: of a family whose images have their own, see
        `PipelineBase.denoise`."""
        return self._denoise(x, timesteps, self._entries(embedding))

    def _entries(self, embedding: torch.Tensor | Entries) -> Entries:
        return embedding if isinstance(embedding, Entries) else self.adapter.entries(embedding)

    def _denoise(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        entries: Entries,
        injection: Injection | None = None,
        **text: Any,
    ) -> torch.Tensor:
        """The prediction of one denoiser, with what the family gives it of a text. `injection`: of
        a denoiser other than the model."""
        injection = injection or self.injection
        if not torch.compiler.is_compiling():
            injection.install()
        injection.set(entries)
        try:
            return self._predicted(x, timesteps, injection.denoiser, **text)
        finally:
            checkpointing = getattr(injection.denoiser, "is_gradient_checkpointing", False)
            injection.clear(torch.is_grad_enabled() and checkpointing)

    def _predicted(
        self, x: torch.Tensor, timesteps: torch.Tensor, denoiser: nn.Module | None = None
    ) -> torch.Tensor:
        output = self._call(x.to(self.model.dtype), timesteps)
        return output[
            :, : x.shape[1]
        ].float()  # without the variance, where the denoiser has learnt one

    def _call(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        model, batch = self.model, len(x)
        timesteps = timesteps.expand(batch)
        if isinstance(model, DiTTransformer2DModel):
            # the class of no class
            nobody = torch.full((batch,), model.config.num_embeds_ada_norm, device=x.device)
            return model(x, timestep=timesteps, class_labels=nobody).sample
        if isinstance(model, UNet2DModel):
            label = self.adapter.config.class_label
            labels = None if label is None else torch.full((batch,), label, device=x.device)
            return model(x, timesteps, class_labels=labels).sample
        text = {"encoder_hidden_states": self.adapter.text.to(x.dtype).expand(batch, -1, -1)}
        if isinstance(model, SD3Transformer2DModel):
            text["pooled_projections"] = self.adapter.pooled_text.to(x.dtype).expand(batch, -1)
        return model(x, timestep=timesteps, **text).sample

    def training_draws(
        self,
        num_images: int,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
    ) -> dict[str, torch.Tensor]:
        """Noise, and `time`, (num_images,): where on the part of the schedule that is trained,
        uniform in [0, 1). The times of a batch are spread evenly over it, in random order: its loss
        then depends less on which times it drew."""
        draws = self.draws(num_images, generator, device)
        order = torch.randperm(num_images, generator=generator, device=device)
        spread = torch.rand(num_images, generator=generator, device=device)
        return draws | {"time": (order + spread) / num_images}

    def loss(
        self, embedding: torch.Tensor, encoded: Encoded, draws: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """`reconstruction_loss`: squared error of the prediction, summed over the entries of x and
        weighted, times `PRECISION`; see `denoising.noised` for noise and time. `bottleneck_loss`:
        -log p(x_0 | embedding) of the decoder. Where there is one, the embedding has no gradient of
        the denoising loss (DiffuseVAE, Pandey et al., arXiv:2201.00308)."""
        noisy, timesteps, target, weight = noised(
            self._training_scheduler,
            self.adapter.config.prediction_type,
            encoded.kept["x0"],
            draws["residual_noise"],
            draws["time"],
            self.min_snr_gamma,
            self.adapter.config.noisiest,
        )
        terms: dict[str, torch.Tensor] = {}
        decoded = None
        if self.adapter.config.decoded_shape is not None:
            decoded = self.adapter.decode(embedding)
            x0 = self._arranged(encoded.kept["x0"])
            terms["bottleneck_loss"] = gaussian_loss(decoded, x0, self.adapter.log_variance)
            # Combinations keep more of their concepts if z learns from the decoder alone.
            embedding, decoded = embedding.detach(), decoded.detach()
        entries = self.adapter.entries(embedding, decoded)
        prompts = encoded.kept.get("prompts")
        prediction = self.denoise(noisy, timesteps, entries, prompts)  # (B, *sample_shape)
        errors = PRECISION * weight * (prediction - target).square().flatten(1).sum(1)  # (B,)
        return terms | {"reconstruction_loss": errors}

    def generate(
        self,
        embedding: torch.Tensor,
        draws: Mapping[str, torch.Tensor],
        observational: torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        along_path: bool = False,
        alone: Sequence[torch.Tensor] = (),
        **options: Any,
    ) -> torch.Tensor:
        """Images of embeddings (B, *embedding_shape), from noise (B, *sample_shape).

        Args:
            embedding, draws: see above.
            observational: embeddings of the same noise z without interventions, for guidance.
            guidance_scale: w of the prediction o + w (p - o), where o is that under
                `observational`; 1: no guidance.
            num_inference_steps: of the scheduler.
            generator: for schedulers that draw noise as they go.
            along_path: whether to follow the deterministic path, the one that `invert` goes back,
                instead of the scheduler.
            alone: embeddings of the same noise z under one concept each: the prediction is then
                o + w sum_k (p_k - o).
            **options: none.
        """

        # Decoded once, not in every step.
        entered = self._entered(embedding)
        without = None if observational is None else self._entered(observational)
        single = [self._entered(one) for one in alone]

        def combined(of: Callable[[_Entered], Any], scale: float) -> torch.Tensor:
            if without is not None and single:
                plain = of(without)
                changes = [of(one) - plain for one in single]
                return plain + scale * torch.stack(changes).sum(0)
            guided = of(entered)
            if without is None or scale == 1.0:
                return guided
            plain = of(without)
            return plain + scale * (guided - plain)

        def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return combined(lambda one: self.denoise(x, t, one.entries), guidance_scale)

        # The start is not guided: what is decoded shows the concepts as they are, and images that
        # start from more of them are told from real ones far more often.
        start = None if entered.mean is None else self._start(combined(lambda one: one.mean, 1.0))
        path = predict, self.scheduler, draws["residual_noise"], num_inference_steps
        x0 = follow(*path, start) if along_path else generate(*path, generator, start)
        return (self._to_images(x0).float() / 2 + 0.5).clamp(0, 1)

    def train_for_samples(self) -> None:
        """From now on train at the noise that samples pass through alone. Pipelines that the head
        is attached to start from noise alone, and pass through more."""
        self.adapter.register_to_config(noisiest=self.adapter.config.start)

    @property
    def guidance(self) -> float:
        return self.adapter.config.guidance

    @property
    def estimates(self) -> tuple[int, ...] | None:
        shape = self.adapter.config.decoded_shape
        # A vision model reads images, not what is decoded.
        return None if shape is None or self.image_encoder is not None else tuple(shape)

    def estimate(self, embedding: torch.Tensor) -> torch.Tensor:
        """E[x_0 | embedding], (B, *estimates), by the decoder."""
        return self.adapter.decode(embedding)

    def encode_estimate(self, estimate: torch.Tensor) -> Encoded:
        return Encoded(self.adapter.encoder(estimate.to(self.adapter.dtype)), {})

    def _arranged(self, x0: torch.Tensor) -> torch.Tensor:
        """What is denoised, (B, *sample_shape), as encoder and decoder have it: (B, c, h, h), of
        standard deviation about 1."""
        return x0

    def invert(
        self,
        encoded: Encoded,
        embedding: torch.Tensor,
        draws: Mapping[str, torch.Tensor] | None = None,
        num_inference_steps: int = 50,
        **options: Any,
    ) -> dict[str, torch.Tensor]:
        """The noise (B, *sample_shape) that the deterministic path leads to the images from."""
        entered = self._entered(embedding)
        start = None if entered.mean is None else self._start(entered.mean)
        predict: Predict = lambda x, t: self.denoise(x, t, entered.entries)  # noqa: E731
        x0 = encoded.kept["x0"]
        noise = invert(predict, self.scheduler, x0, num_inference_steps, start=start)
        return {"residual_noise": noise}

    def _start(self, mean: torch.Tensor) -> Start:
        spread = self.adapter.log_variance.detach().float().exp().sqrt()
        return Start(mean, self.adapter.config.start, spread)

    def _entered(self, embedding: torch.Tensor) -> _Entered:
        if self.adapter.config.start == 1:
            return _Entered(self._entries(embedding))
        mean = self.adapter.decode(embedding)
        return _Entered(self.adapter.entries(embedding, mean), mean.float())

    def check_alone(self, ablation: str) -> None:
        raise ValueError(
            f"the ablation {ablation!r} has no head, and a denoiser has no code z of its own to do"
            " without."
        )

    def check_guidance(self, guidance_scale: float, compose: str) -> None:
        """Nothing is refused."""

    def per_unit(self, loss: Any) -> Any:
        return loss / math.prod(self.sample_shape)

    def _to_images(self, x0: torch.Tensor) -> torch.Tensor:
        if self.vae is None:
            return x0
        scale, shift = scale_and_shift(self.vae)
        return self.vae.decode((x0 / scale + shift).to(self.vae.dtype)).sample

    def companions(self) -> dict[str, Any]:
        vision = self.image_encoder
        seeing = (None, None) if vision is None else (vision.model, vision.image_processor)
        parts = zip(self.companion_names, (self.vae, self.scheduler, *seeing))
        return {name: part for name, part in parts if part is not None}

    def encoder_modules(self) -> Iterable[nn.Module]:
        return self.modules()  # one pass does not make an image: batch norms are left as they are

    def release(self) -> None:
        self.injection.remove()

    def train(self, mode: bool = True) -> "DiffusionBase":
        super().train(mode)
        if self.vae is not None:
            self.vae.eval()
        return self
