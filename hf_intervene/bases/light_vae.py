"""The light VAE of the paper as a diffusers model (METHOD section 3; arXiv:2507.04754).

    pixels (B, C, S, S) --strided convolutions--> (B, 256, S/16, S/16) --linear--> features (B, hidden_width)
    latent (B, latent_width, 1, 1) --linear, GELU, linear--> (B, 256, S/16, S/16) --transposed convolutions--> logits (B, C, S, S)

The mean of a pixel is the sigmoid of its logit. The likelihood is the paper's Bernoulli, or a
Gaussian with one variance for all pixels, learnt (Rybkin et al., arXiv:2006.13202); see
`likelihoods.py`. A small variance gives small and faint concepts their weight.
"""  # noqa: E501

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .base import Base, Encoded
from .likelihoods import (
    FIRST_SPREAD,
    bernoulli_code_length,
    bernoulli_loss,
    gaussian_code_length,
    gaussian_loss,
)
from .registry import register_base


LIKELIHOODS = ("bernoulli", "gaussian")


class LightVAE(ModelMixin, ConfigMixin):
    r"""Strided 4x4 convolutions, one per entry of `block_out_channels`, each halving the image,
    and their mirror image as decoder.

    Args:
        in_channels: channels of an image.
        sample_size: side of an image in pixels; any that survives the halvings (28, 32 and 64 with
            the default four).
        block_out_channels: channels after each convolution.
        hidden_width: width of the features and of the decoder's hidden layer.
        latent_width: width of the latent, shape (B, latent_width, 1, 1).
        norm: `"group"`, `"batch"` (the paper's) or `"none"`. Batch norm's running statistics are
            gathered on posterior samples and do not fit samples from the prior; see
            `InterventionModel.reestimate_batch_norm`.
        likelihood: `"bernoulli"` or `"gaussian"` (see the module docstring).

    Raises:
        ValueError: one sentence: a size that cannot be halved so often, an unknown norm or
            likelihood.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        sample_size: int = 64,
        block_out_channels: tuple[int, ...] = (32, 64, 128, 256),
        hidden_width: int = 128,
        latent_width: int = 128,
        norm: str = "group",
        likelihood: str = "bernoulli",
    ):
        super().__init__()
        if likelihood not in LIKELIHOODS:
            raise ValueError(
                f"likelihood must be one of {', '.join(LIKELIHOODS)}, not {likelihood!r}."
            )
        if sample_size >> len(block_out_channels) < 1:
            raise ValueError(
                f"images of {sample_size} pixels cannot be halved {len(block_out_channels)} times: "
                "use larger images or fewer block_out_channels."
            )
        channels = [in_channels, *block_out_channels]
        sizes = [sample_size]  # sizes[k]: side after k convolutions
        for _ in block_out_channels:
            sizes.append(sizes[-1] // 2)
        smallest = (channels[-1], sizes[-1], sizes[-1])
        flat = smallest[0] * smallest[1] * smallest[2]

        self.encoder = convolutional_encoder(channels, flat, hidden_width, norm)
        self.quant = nn.Linear(hidden_width, 2 * latent_width)

        if likelihood == "gaussian":
            # of a pixel in [0, 1]
            self.log_variance = nn.Parameter(torch.tensor(2 * math.log(FIRST_SPREAD)))

        up: list[nn.Module] = []
        for level in range(len(block_out_channels), 0, -1):
            # An odd side loses its last row when halved; output_padding gives it back (28 -> 14 ->
            # 7 -> 3 -> 1 and up again).
            odd = sizes[level - 1] - 2 * sizes[level]
            up += [
                nn.ConvTranspose2d(
                    channels[level], channels[level - 1], 4, stride=2, padding=1, output_padding=odd
                )
            ]
            if level > 1:
                up += [_norm(norm, channels[level - 1]), nn.GELU()]
        self.decoder = nn.Sequential(
            nn.Flatten(),
            nn.Linear(latent_width, hidden_width),
            nn.GELU(),
            nn.Linear(hidden_width, flat),
            nn.Unflatten(1, smallest),
            _norm(norm, channels[-1]),
            nn.GELU(),
            *up,
        )

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple:
        """Posterior over latents (B, latent_width, 1, 1) of images x (B, C, S, S) in [0, 1]."""
        distribution = DiagonalGaussianDistribution(self.quant(self.encoder(x))[..., None, None])
        return AutoencoderKLOutput(latent_dist=distribution) if return_dict else (distribution,)

    def decode(self, z: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple:
        """Bernoulli logits (B, C, S, S) of latents z (B, latent_width, 1, 1); their sigmoid is the
        image.
        """
        sample = self.decoder(z)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> DecoderOutput | tuple:
        """Logits of the reconstruction of images (B, C, S, S) from one posterior sample each."""
        return self.decode(
            self.encode(sample, return_dict=False)[0].sample(generator), return_dict=return_dict
        )


def convolutional_encoder(
    channels: Sequence[int], flat: int, hidden_width: int, norm: str = "group"
) -> nn.Sequential:
    """Strided 4x4 convolutions between these numbers of channels, then from their `flat` numbers to
    features (B, hidden_width).
    """
    down: list[nn.Module] = []
    for before, after in zip(channels[:-1], channels[1:]):
        down += [nn.Conv2d(before, after, 4, stride=2, padding=1), _norm(norm, after), nn.GELU()]
    return nn.Sequential(*down, nn.Flatten(), nn.Linear(flat, hidden_width), nn.GELU())


def _norm(kind: str, channels: int) -> nn.Module:
    if kind == "group":
        return nn.GroupNorm(min(8, channels), channels)
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "none":
        return nn.Identity()
    raise ValueError(f"norm must be one of group, batch, none, not {kind!r}.")


@register_base(LightVAE)
class LightVAEBase(Base):
    """A `LightVAE` under a head: the head's embedding takes the place of its latent."""

    def __init__(self, model: LightVAE):
        super().__init__(model)
        config = model.config
        self.feature_width = config.hidden_width
        self.embedding_shape = (config.latent_width, 1, 1)
        self.image_shape = (config.in_channels, config.sample_size, config.sample_size)
        self.unnormalised = "Bernoulli" if config.likelihood == "bernoulli" else None

    def encode(self, pixel_values: torch.Tensor) -> Encoded:
        features = self.model.encoder(pixel_values.to(self.model.dtype))
        return Encoded(features, {"pixel_values": pixel_values})

    def posterior(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, logvar = self.model.quant(features)[..., None, None].chunk(2, dim=1)
        return mean, logvar

    def loss(
        self, embedding: torch.Tensor, encoded: Encoded, draws: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        pixel_values, logits = encoded.kept["pixel_values"], self._logits(embedding)
        # In float32: at bf16 the rounding of each pixel's term is of the size of the differences
        # that matter.
        if self.unnormalised is None:
            loss = gaussian_loss(logits.float().sigmoid(), pixel_values, self.model.log_variance)
        else:
            loss = bernoulli_loss(logits, pixel_values)
        return {"reconstruction_loss": loss}

    def code_length(
        self, embedding: torch.Tensor, encoded: Encoded, draws: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        pixel_values, logits = encoded.kept["pixel_values"], self._logits(embedding).float()
        if self.unnormalised is None:
            mean, log_variance = logits.sigmoid(), self.model.log_variance
            return {"reconstruction_loss": gaussian_code_length(mean, pixel_values, log_variance)}
        return {"reconstruction_loss": bernoulli_code_length(logits, pixel_values)}

    def generate(
        self, embedding: torch.Tensor, draws: Mapping[str, torch.Tensor], **options: Any
    ) -> torch.Tensor:
        return self._logits(embedding).float().sigmoid()

    def _logits(self, embedding: torch.Tensor) -> torch.Tensor:
        return self.model.decode(embedding.to(self.model.dtype)).sample  # (B, C, S, S)

    def encoder_modules(self) -> Iterable[nn.Module]:
        return self.model.encoder.modules()

    def freeze_unused(self) -> None:
        self.model.quant.requires_grad_(False)
