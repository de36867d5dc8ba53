"""What is trained beside the head on a denoiser, and which denoisers it fits."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel, UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .base import plain
from .injection import Entries, Projections
from .light_vae import LightVAE, convolutional_encoder
from .likelihoods import FIRST_SPREAD
from .limits import check_types
from .replay import Recording
from .sites import Sites, find_sites


# A denoiser that starts from noise alone loses part of what the decoder shows of combinations that
# it never saw. With less noise it keeps more of it, and the images are duller.
START = 0.5
# With less, combinations lack more of their concepts. With 3 a small network tells images of single
# concepts from real ones more often, with 2 hardly more often than with 1 (seed 1000 of avatars).
GUIDANCE = 2.0


class DiffusionAdapter(ModelMixin, ConfigMixin):
    """What is trained beside the head on a denoiser: a light VAE's encoder and decoder of what is
    denoised, and the projections of the embedding and of what is decoded of it.

    The decoder gives z a likelihood: the denoising loss alone leaves z little to do, since the
    noisy image shows most of the clean one. It also says where in the image things are (as in
    DiffuseVAE, Pandey et al., arXiv:2201.00308).

    Args:
        sample_size: side S of the images in pixels.
        sites: the denoiser's, as a dictionary (see `injection.Sites`).
        embedding_shape: of one sample's embedding.
        map_size: side of the map that enters the middle block.
        encoder_shape: (C, S, S) of what the convolutional encoder reads, pixels or latents; `None`:
            a vision model is the encoder.
        decoded_shape: (C, S, S) of what is decoded of an embedding; `None`: an older head, without
            a decoder.
        feature_width: width of the features.
        text_shape, pooled_width: of the text's embeddings that a text-conditioned denoiser is
            given; they are kept with the weights.
        prediction_type: what the denoiser predicts (see `schedulers.py`).
        recording: how a pipeline calls the denoiser (see `replay.Recording`); `None`: of one that
            the package calls itself.
        class_label: the class that a denoiser of classes is given.
        num_frames: of a clip; `None`: it makes images.
        boundary: of two denoisers: the time from which on the first one denoises, as the scheduler
            counts it.
        start: samples start from what is decoded, with this share of noise, in (0, 1]; 1: from
            noise alone.
        guidance: the `guidance_scale` of samples for which none is given.
        noisiest: the largest share of noise that is trained: 1, or `start` if the head is trained
            for samples of its own model alone.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int,
        sites: dict,
        embedding_shape: tuple[int, ...],
        map_size: int = 0,
        encoder_shape: tuple[int, ...] | None = None,
        feature_width: int = 128,
        text_shape: tuple[int, ...] | None = None,
        pooled_width: int | None = None,
        prediction_type: str = "epsilon",
        recording: dict | None = None,
        class_label: int | None = None,
        num_frames: int | None = None,
        boundary: float | None = None,
        decoded_shape: tuple[int, ...] | None = None,
        start: float = 1.0,
        guidance: float = 1.0,
        noisiest: float = 1.0,
    ):
        super().__init__()
        if type(sample_size) is not int or sample_size < 1:
            raise ValueError(f"sample_size must be a whole number, 1 at least, not {sample_size!r}")
        check_types(Sites, sites)
        if not 0 < start <= 1 or (start < 1 and decoded_shape is None):
            raise ValueError(
                f"start must lie in (0, 1], and be 1 where nothing is decoded, not {start!r}"
            )
        if type(guidance) not in (int, float) or not math.isfinite(guidance):
            raise ValueError(f"guidance must be a finite number, not {guidance!r}")
        if not 0 < noisiest <= 1:
            raise ValueError(f"noisiest must lie in (0, 1], not {noisiest!r}")
        decoded_channels = 0 if decoded_shape is None else decoded_shape[0]
        self.projections = Projections(Sites(**sites), embedding_shape, map_size, decoded_channels)
        if decoded_shape is not None:
            network = light_vae(decoded_shape, feature_width, math.prod(embedding_shape))
            self.decoder = network.decoder
            # Of an entry of what is decoded: pixels in [-1, 1], or latents of deviation 1. From a
            # variance of 1 it falls slowly, and until it is small z has little to do.
            self.log_variance = nn.Parameter(torch.tensor(2 * math.log(2 * FIRST_SPREAD)))
            if encoder_shape is not None:
                self.encoder = network.encoder
        elif encoder_shape is not None:
            channels, size = [encoder_shape[0]], encoder_shape[-1]
            while size > 4:  # halved down to 4 x 4 or 3 x 3 and less
                channels.append(min(256, 32 * 2 ** (len(channels) - 1)))
                size //= 2
            self.encoder = convolutional_encoder(channels, channels[-1] * size**2, feature_width)
        if text_shape is not None:
            self.register_buffer("text", torch.zeros(1, *text_shape))
        if pooled_width is not None:
            self.register_buffer("pooled_text", torch.zeros(1, pooled_width))
        if recording is not None:
            self.recorded = Recording(recording)  # `recording` is the entry of the configuration

    def decode(self, embedding: torch.Tensor) -> torch.Tensor:
        """The mean of what is denoised, (B, *decoded_shape), given embeddings
        (B, *embedding_shape)."""
        return self.decoder(embedding.to(self.dtype))

    def entries(self, embedding: torch.Tensor, decoded: torch.Tensor | None = None) -> Entries:
        """What enters the denoiser of embeddings (B, *embedding_shape). `decoded`: what `decode`
        returned of them, if it is known."""
        if decoded is None and self.config.decoded_shape is not None:
            decoded = self.decode(embedding)
        return self.projections(embedding.to(self.dtype), decoded)


def light_vae(shape: Sequence[int], hidden_width: int, latent_width: int) -> LightVAE:
    """A light VAE of (c, h, h), halved down to about 2 x 2, with 256 channels there."""
    levels = max(1, round(math.log2(shape[-1] / 2)))
    channels = tuple(max(32, 256 >> level) for level in reversed(range(levels)))
    return LightVAE(shape[0], shape[-1], channels, hidden_width, latent_width)


_SITE_NAMES = {
    "cross_width": "cross-attention width",
    "token_widths": "inner widths of cross-attention",
    "vector_width": "width of the time embedding",
    "map_channels": "width of the middle block",
    "input_channels": "width of the features of the sample",
}


def check_sites(sites: Sites, adapter: DiffusionAdapter, name: str) -> None:
    """Raise a ValueError unless an adapter's projections are for these sites, of a denoiser called
    `name`.
    """
    # first what says most
    for key in (
        *_SITE_NAMES,
        *(key for key in vars(sites) if key not in _SITE_NAMES),
    ):
        if key.startswith("input") and adapter.config.sites.get("input") is None:
            continue  # an older head does not enter there
        expected, found = (
            plain(getattr(here, key)) for here in (sites, Sites(**adapter.config.sites))
        )
        if found != expected:
            raise ValueError(
                f"the head was trained for another denoiser: its {_SITE_NAMES.get(key, key)} is"
                f" {_short(found)}, that of this {name} is {_short(expected)}: use the kind of"
                " model that it was trained on."
            )


def check_text(model: ModelMixin, adapter: DiffusionAdapter) -> None:
    """Raise a ValueError unless an adapter has the text that `DiffusionBase` gives a denoiser."""
    names = {UNet2DConditionModel: ["text"], SD3Transformer2DModel: ["text", "pooled_text"]}
    for name in names.get(type(model), []):
        if getattr(adapter, name, None) is None:
            raise ValueError(
                f"the adapter has no {name}, which this {type(model).__name__} is given: it is"
                " corrupt, or of another denoiser."
            )


def _short(value: object) -> str:
    """Of a long list the first and how many."""
    if not isinstance(value, list):
        return str(value)
    return f"{value[:4]}{f' and {len(value) - 4} more' if len(value) > 4 else ''}"


def new_adapter(
    model: ModelMixin,
    size: int,
    sample_shape: tuple[int, ...],
    vision_width: int | None,
    embedding_width: int,
    num_tokens: int,
    text: torch.Tensor | None,
    pooled_text: torch.Tensor | None,
    **options: Any,
) -> DiffusionAdapter:
    """An adapter for a denoiser of `DiffusionBase`, as yet untrained.

    Args:
        model: the denoiser.
        size: side of the images in pixels.
        sample_shape: (c, h, h) of what is denoised.
        vision_width: of the features of a vision model; `None`: there is none, and a small
            convolutional network encodes.
        embedding_width, num_tokens, text, pooled_text: of `DiffusionBase`.
        **options: `prediction_type` and `class_label` of the adapter.
    """
    sites, config = find_sites(model), model.config
    if isinstance(model, UNet2DConditionModel) and text is None:
        text = torch.zeros(1, 1, _width(config.cross_attention_dim))
    if isinstance(model, SD3Transformer2DModel):
        text = torch.zeros(1, 1, config.joint_attention_dim) if text is None else text
        if pooled_text is None:
            pooled_text = torch.zeros(1, config.pooled_projection_dim)
    shape: tuple[int, ...] = (embedding_width,)
    if sites.tokens:
        shape = (num_tokens, _width(config.cross_attention_dim))
    adapter = DiffusionAdapter(
        sample_size=size,
        sites=vars(sites),
        embedding_shape=shape,
        map_size=sample_shape[-1] >> (len(config.block_out_channels) - 1) if sites.map else 0,
        encoder_shape=None if vision_width is not None else sample_shape,
        decoded_shape=sample_shape,
        start=START,
        guidance=GUIDANCE,
        feature_width=128 if vision_width is None else vision_width,
        text_shape=None if text is None else tuple(text.shape[1:]),
        pooled_width=None if pooled_text is None else pooled_text.shape[-1],
        **options,
    )
    for buffer, value in (("text", text), ("pooled_text", pooled_text)):
        if value is not None:
            getattr(adapter, buffer).copy_(value)
    return adapter


def check_supported(model: ModelMixin, class_label: int | None) -> None:
    """Raise a ValueError unless a denoiser is conditioned on what `DiffusionBase` gives it."""
    config, name = model.config, type(model).__name__
    classes = config.get("num_class_embeds") if isinstance(model, UNet2DModel) else None
    if (
        isinstance(model, UNet2DModel)
        and getattr(model, "class_embedding", None) is not None
        and classes is None
    ):
        raise ValueError(
            f"this {name} is conditioned on classes by other than their numbers, which is not"
            " supported."
        )
    if classes is not None and not (isinstance(class_label, int) and 0 <= class_label < classes):
        raise ValueError(
            f"this {name} is conditioned on classes: give class_label, from 0 to {classes - 1}, the"
            f" one for all images, not {class_label!r}."
        )
    if classes is None and class_label is not None:
        raise ValueError(f"this {name} has no classes: leave class_label out.")
    wants = ("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim")
    more = next((key for key in wants if config.get(key)), None)
    if isinstance(model, UNet2DConditionModel) and more is not None:
        raise ValueError(
            f"this {name} wants more than text ({more}={config[more]!r}), which its pipeline makes:"
            " give the whole pipeline, as PipelineBase.from_pipeline(pipe) or --base."
        )


def _width(value: int | Sequence[int]) -> int:
    return value if isinstance(value, int) else value[0]


def pixels_of_denoiser(model: ModelMixin, vae: ModelMixin | None) -> int:
    """Side in pixels of the images of a denoiser, by its configuration.

    Raises:
        ValueError: it does not say.
    """
    size = model.config.get("sample_size")
    size = size[0] if isinstance(size, (list, tuple)) and len(set(size)) == 1 else size
    if not isinstance(size, int):
        raise ValueError(
            f"this {type(model).__name__} does not say what size of image it is for: give"
            " sample_size, in pixels."
        )
    if vae is None:
        return size
    halvings = (
        len(vae.config.get("block_out_channels") or vae.config.get("encoder_block_out_channels"))
        - 1
    )
    return size * vae.config.get("spatial_compression_ratio", 2**halvings)


__all__ = ["DiffusionAdapter", "check_sites", "check_supported", "new_adapter"]
