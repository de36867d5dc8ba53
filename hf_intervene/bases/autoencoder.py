"""Spatial autoencoders of diffusers under a head: AutoencoderKL and its kin, AutoencoderTiny,
AutoencoderDC, VQModel, AutoencoderRAE.

Those of videos (AutoencoderKLWan, AutoencoderKLQwenImage) get each image as a video of one frame.

    pixels (B, C, S, S) --model.encode--> latents (B, c, h, h) --adapter--> features (B, feature_width)
    embedding (B, embedding_width, 1, 1) --adapter--> latents (B, c, h, h) --model.decode--> sample (B, C, S, S) in [-1, 1]

The head speaks vectors, these models speak latents in two dimensions; the adapter, a small
convolutional network of ours, translates. It is trained and saved with the head, whatever becomes
of the pretrained model. Latents are scaled and shifted as the model's own configuration says.
Pixels are Gaussian around the decoded image with one learnt variance for all (as in the training of
the Stable Diffusion autoencoders), so the reconstruction term is a density and may be negative.

With `residual_layers` the embedding decides the prior of the latents, not the latents themselves
(see `residual.py`)."""  # noqa: E501

import inspect
import json
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import diffusers
import torch
from diffusers import AsymmetricAutoencoderKL, VQModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .base import Base, Encoded
from .frozen import LeanConvolutions
from .light_vae import LightVAE
from .likelihoods import FIRST_SPREAD, gaussian_code_length, gaussian_loss
from .registry import register_base
from .residual import ResidualPrior


# standard deviation of q(r | x), in scaled latents, for models that have no distribution of their
# own
_DEQUANTISATION = 0.05


class LatentAdapter(ModelMixin, ConfigMixin):
    """Between the vectors of a head and the latents of an autoencoder: the light VAE's layers on
    latents, and the variance of a pixel.

    Args:
        sample_size: side S of the images in pixels.
        in_channels: channels c of the latents.
        latent_size: side h of the latents.
        hidden_width: width of the features.
        latent_width: width of the embedding.
        residual_layers: couplings of the prior of residual latents; 0: no residual latents.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int,
        in_channels: int,
        latent_size: int,
        hidden_width: int = 128,
        latent_width: int = 128,
        residual_layers: int = 0,
    ):
        super().__init__()
        halvings = max(1, round(math.log2(latent_size / 4)))  # down to about 4 x 4
        channels = [64, *[128] * (halvings - 1)]
        self.network = LightVAE(
            in_channels, latent_size, tuple(channels), hidden_width, latent_width
        )
        # of a pixel in [0, 1]
        self.log_variance = nn.Parameter(torch.tensor(2 * math.log(FIRST_SPREAD)))
        if residual_layers:
            self.residual_prior = ResidualPrior(in_channels, residual_layers)
            # of a pixel given the residual too
            self.residual_log_variance = nn.Parameter(torch.tensor(2 * math.log(0.1)))


class AutoencoderBase(Base):
    """An autoencoder under a head, with an adapter between them (see the module docstring).

    A model whose configuration names another image size than yours (the Stable Diffusion
    autoencoders say 512 or 256) is wrapped first: `InterventionModel.build(wrap_base(vae,
    sample_size=64), concepts)`.

    Args:
        model: the autoencoder.
        sample_size: side of the images in pixels; `None`: the adapter's, else the one of the
            model's configuration.
        adapter: a trained adapter; `None` makes a new one.
        residual_layers: of a new adapter: couplings of the prior of residual latents; 0: no
            residual latents.

    Raises:
        ValueError: no image size is known, the model's encoder cannot take it, or the adapter is
            for other latents.
    """

    adapter: LatentAdapter
    adapter_class = LatentAdapter

    def __init__(
        self,
        model: ModelMixin,
        sample_size: int | None = None,
        adapter: LatentAdapter | None = None,
        residual_layers: int = 0,
    ):
        super().__init__(model)
        name = type(model).__name__
        size = sample_size
        if size is None:
            size = (
                model.config.get("sample_size") if adapter is None else adapter.config.sample_size
            )
        if size is None:
            raise ValueError(
                f"this {name} does not say what size of image it is for: give sample_size, in"
                " pixels."
            )
        if not isinstance(size, int) or size < 1:
            raise ValueError(
                f"sample_size must be the side of a square image in pixels, not {size!r}."
            )
        self.image_shape = (model.config.get("in_channels", 3), size, size)
        shape = latent_shape(model, self.image_shape)
        if adapter is None:
            adapter = LatentAdapter(
                size, in_channels=shape[0], latent_size=shape[-1], residual_layers=residual_layers
            )
        if (adapter.config.in_channels, adapter.config.latent_size) != (shape[0], shape[-1]):
            raise ValueError(
                f"the adapter is for {adapter.config.in_channels} x {adapter.config.latent_size}^2"
                f" latents, but this {name} makes {shape[0]} x {shape[-1]}^2 of {size}x{size}"
                " images: use the base it was trained on."
            )
        self.adapter = adapter
        self.feature_width = adapter.config.hidden_width
        self.embedding_shape = (adapter.config.latent_width, 1, 1)
        if adapter.config.residual_layers:
            self.noise_shapes = {"residual_noise": tuple(shape)}
            self.loss_terms = ("bottleneck_loss", "reconstruction_loss", "residual_kl")

    def encode(self, pixel_values: torch.Tensor) -> Encoded:
        """The features come from the mean of the latents' posterior q(r | x), which is kept."""
        mean, std = self._latent_posterior(pixel_values)
        kept = {"pixel_values": pixel_values, "mean": mean, "std": std}
        return Encoded(self.adapter.network.encoder(mean), kept)

    def posterior(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, logvar = self.adapter.network.quant(features)[..., None, None].chunk(2, dim=1)
        return mean, logvar

    def loss(
        self, embedding: torch.Tensor, encoded: Encoded, draws: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """-log p(x | e); with residual latents r ~ q(r | x) the terms of `residual.py`."""
        return self._terms(gaussian_loss, embedding, encoded, draws)

    def code_length(
        self, embedding: torch.Tensor, encoded: Encoded, draws: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        return self._terms(gaussian_code_length, embedding, encoded, draws)

    def _terms(
        self,
        pixels_loss: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
        embedding: torch.Tensor,
        encoded: Encoded,
        draws: Mapping[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """`loss`, with one of the functions of `likelihoods.py`."""
        pixel_values, asked = encoded.kept["pixel_values"], self._asked_for(embedding)
        alone = pixels_loss(self._pixels(asked), pixel_values, self.adapter.log_variance)  # (B,)
        if not self.noise_shapes:
            return {"reconstruction_loss": alone}
        noise, std = draws["residual_noise"], encoded.kept["std"]
        r = encoded.kept["mean"] + std * noise  # (B, c, h, h)
        log_q = (
            -(0.5 * (noise.float().square() + math.log(2 * math.pi)) + std.float().log())
            .flatten(1)
            .sum(1)
        )  # (B,)
        log_p = self.adapter.residual_prior.inverse(r, asked)[1]  # (B,)
        variance = self.adapter.residual_log_variance
        return {
            "bottleneck_loss": alone,
            "reconstruction_loss": pixels_loss(self._pixels(r), pixel_values, variance),
            "residual_kl": log_q - log_p,
        }

    def generate(
        self, embedding: torch.Tensor, draws: Mapping[str, torch.Tensor], **options: Any
    ) -> torch.Tensor:
        """With residual noise, standard normal under the prior, of the latents that it stands for;
        without, of those that the embedding asks for."""
        latents = self._asked_for(embedding)
        if "residual_noise" in draws:
            latents = self.adapter.residual_prior(draws["residual_noise"], latents)
        return self._pixels(latents).clamp(0, 1)

    def invert(
        self,
        encoded: Encoded,
        embedding: torch.Tensor,
        draws: Mapping[str, torch.Tensor] | None = None,
        **options: Any,
    ) -> dict[str, torch.Tensor]:
        if not self.noise_shapes:
            return {}
        r = encoded.kept["mean"]
        if draws is not None:
            r = r + encoded.kept["std"] * draws["residual_noise"]
        noise, _ = self.adapter.residual_prior.inverse(r, self._asked_for(embedding))
        return {"residual_noise": noise}

    def _asked_for(self, embedding: torch.Tensor) -> torch.Tensor:
        """The latents (B, c, h, h) that an embedding asks for."""
        return self.adapter.network.decoder(embedding.to(self.adapter.dtype))

    def _pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """Images (B, C, S, S), about in [0, 1], float32, of scaled latents (B, c, h, h)."""
        scale, shift = scale_and_shift(self.model, latents)
        latents = (latents / scale + shift).to(self.model.dtype)
        with self._lean():
            return images_of(self.model, latents).float() / 2 + 0.5

    def _latent_posterior(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of q(r | x), scaled, each (B, c, h, h), in the adapter's
        dtype.
        """
        with self._lean():
            mean, std = latents_of(self.model, (2 * pixel_values - 1).to(self.model.dtype))
        scale, shift = scale_and_shift(self.model, mean)
        mean = (mean - shift) * scale
        std = torch.full_like(mean, _DEQUANTISATION) if std is None else std * scale
        return mean.to(self.adapter.dtype), std.to(self.adapter.dtype)

    def _lean(self) -> AbstractContextManager:
        # Checkpointing must save the same when it computes a block again, outside; a compiled graph
        # saves only what it needs anyway.
        if self.model.is_gradient_checkpointing or torch.compiler.is_compiling():
            return nullcontext()
        frozen = torch.is_grad_enabled() and not all(
            p.requires_grad for p in self.model.parameters()
        )
        return LeanConvolutions() if frozen else nullcontext()

    def encoder_modules(self) -> Iterable[nn.Module]:
        return [*self.model.encoder.modules(), *self.adapter.network.encoder.modules()]

    def train(self, mode: bool = True) -> "AutoencoderBase":
        """As in torch."""
        super().train(mode)
        if has_unit_pixels(self.model):
            # AutoencoderRAE itself, not its layers: in training it draws noise for its latents
            self.model.training = False
        return self

    def freeze_unused(self) -> None:
        self.adapter.network.quant.requires_grad_(False)
        if isinstance(self.model, VQModel):
            # the straight-through estimator passes the codebook by
            self.model.quantize.requires_grad_(False)
        if isinstance(self.model, AsymmetricAutoencoderKL):
            self.model.decoder.condition_encoder.requires_grad_(False)  # for inpainting only
        if has_unit_pixels(self.model):
            for name, parameter in self.model.encoder.named_parameters():
                if name.endswith("mask_token"):  # for the training of the vision model itself
                    parameter.requires_grad_(False)


def latent_shape(model: ModelMixin, image_shape: tuple[int, ...]) -> torch.Size:
    """Shape (c, h, h) of the latents of one image (C, S, S), or (c, t, h, h) of those of a clip (C,
    T, S, S).

    Raises:
        ValueError: such images cannot be encoded, or come back in another size.
    """
    config = json.dumps(dict(model.config), default=str)
    return _latent_shape(type(model), config, image_shape)  # type: ignore[arg-type]  # a class is hashable


@lru_cache
def _latent_shape(
    model_class: type[ModelMixin], config: str, image_shape: tuple[int, ...]
) -> torch.Size:
    """From a pass without data or weights through a model of a configuration, given as JSON."""
    known = inspect.signature(model_class.__init__).parameters
    arguments = {key: value for key, value in json.loads(config).items() if key in known}
    advice = (
        f"this {model_class.__name__} cannot encode images of {image_shape[-1]} pixels: choose a"
        " multiple of its downsampling factor"
    )
    if len(image_shape) == 4:
        advice = (
            f"this {model_class.__name__} cannot encode clips of {image_shape[1]} frames of"
            f" {image_shape[-1]} pixels: choose another number of frames, such as 5 or 9, and a"
            " multiple of its downsampling factor"
        )
    with torch.device("meta"), torch.no_grad():
        model = model_class(**arguments)
        try:
            latents, _ = latents_of(model, torch.empty(1, *image_shape))
            returned = images_of(model, latents).shape
        except RuntimeError as error:
            raise ValueError(f"{advice}.") from error
    if tuple(returned[2:]) != image_shape[1:]:
        found = " x ".join(map(str, returned[2:] if len(image_shape) == 4 else returned[-1:]))
        raise ValueError(f"{advice} (they come back with {found}).")
    return latents.shape[1:]


def latents_of(model: ModelMixin, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Mean and standard deviation of the unscaled latents, (B, c, h, h), of images (B, C, S, S) in
    [-1, 1]; `None` for models without one. Of clips (B, C, T, S, S) they are (B, c, t, h, h)."""
    sample = sample / 2 + 0.5 if has_unit_pixels(model) else sample
    image = has_frames(model) and sample.ndim == 4  # which such a model takes as one frame
    output = model.encode(sample.unsqueeze(2) if image else sample)
    if "latent_dist" in output:
        mean, std = output.latent_dist.mean, output.latent_dist.std
    else:
        mean, std = output.latents if "latents" in output else output.latent, None
    if image:
        return mean.squeeze(2), None if std is None else std.squeeze(2)
    return mean, std


def images_of(model: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
    """Images (B, C, S, S), about in [-1, 1], of unscaled latents (B, c, h, h); clips (B, C, T, S,
    S) of (B, c, t, h, h)."""
    image = has_frames(model) and latents.ndim == 4
    sample = model.decode(latents.unsqueeze(2) if image else latents).sample
    sample = sample.squeeze(2) if image else sample
    return 2 * sample - 1 if has_unit_pixels(model) else sample


def has_frames(model: ModelMixin) -> bool:
    """Whether a model is for videos, (B, C, frames, S, S): it has convolutions in three dimensions."""  # noqa: E501
    return any(isinstance(module, nn.Conv3d) for module in model.modules())


def has_unit_pixels(model: ModelMixin) -> bool:
    """Whether the pixels of a model are in [0, 1], not in [-1, 1]: of AutoencoderRAE, whose encoder
    is a vision model's.
    """
    return type(model).__name__ == "AutoencoderRAE"


def scale_and_shift(model: ModelMixin, like: torch.Tensor | None = None) -> tuple[Any, Any]:
    """Scale and shift by which latents (B, c, h, h) are scaled to variance 1: (latents - shift) *
    scale.

    Two numbers, or, for a model with statistics of each channel, two tensors (c, 1, 1) in the type
    and on the device of `like`."""
    if has_unit_pixels(model):
        return 1.0, 0.0  # AutoencoderRAE scales its latents itself
    mean, std = model.config.get("latents_mean"), model.config.get("latents_std")
    if like is not None and isinstance(mean, (list, tuple)) and isinstance(std, (list, tuple)):
        shift, deviation = (
            torch.tensor(v, dtype=like.dtype, device=like.device)[:, None, None]
            for v in (mean, std)
        )
        return 1 / deviation, shift
    return model.config.get("scaling_factor") or 1.0, model.config.get("shift_factor") or 0.0


# By name: an older diffusers does not have them all.
_CLASSES: tuple[str, ...] = (
    "AutoencoderKL",
    "AsymmetricAutoencoderKL",
    "AutoencoderTiny",
    "AutoencoderDC",
    "VQModel",
    "AutoencoderKLFlux2",
)
_CLASSES += (
    "AutoencoderKLHunyuanImage",
    "AutoencoderKLKVAE",
    "AutoencoderKLQwenImage",
    "AutoencoderKLWan",
    "AutoencoderRAE",
)
for _class in (getattr(diffusers, name, None) for name in _CLASSES):
    if _class is not None:
        register_base(_class)(AutoencoderBase)
