"""What is trained beside the head on a denoiser, and which denoisers it fits."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from .base import plain
from .injection import Projections
from .light_vae import convolutional_encoder
from .replay import Recording
from .sites import Sites


class DiffusionAdapter(ModelMixin, ConfigMixin):
    """What is trained beside the head on a denoiser: the projections of the embedding, and the
    small convolutional encoder, if it is one.

    Args:
        sample_size: side S of the images in pixels.
        sites: the denoiser's, as a dictionary (see `injection.Sites`).
        embedding_shape: of one sample's embedding.
        map_size: side of the map that enters the middle block.
        encoder_shape: (C, S, S) of what the convolutional encoder reads, pixels or latents; `None`:
            a vision model is the encoder.
        feature_width: width of the features.
        text_shape, pooled_width: of the text's embeddings that a text-conditioned denoiser is
            given; they are kept with the weights.
        prediction_type: what the denoiser predicts (see `denoising.py`).
        recording: how a pipeline calls the denoiser (see `replay.Recording`); `None`: of one that
            the package calls itself.
        class_label: the class that a denoiser of classes is given.
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
    ):
        super().__init__()
        self.projections = Projections(Sites(**sites), embedding_shape, map_size)
        if encoder_shape is not None:
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


_SITE_NAMES = {
    "cross_width": "cross-attention width",
    "token_widths": "inner widths of cross-attention",
    "vector_width": "width of the time embedding",
    "map_channels": "width of the middle block",
}


def check_sites(sites: Sites, adapter: DiffusionAdapter, name: str) -> None:
    """Raise a ValueError unless an adapter's projections are for these sites, of a denoiser called
    `name`.
    """
    for key in (
        *_SITE_NAMES,
        *(key for key in vars(sites) if key not in _SITE_NAMES),
    ):  # first what says most
        expected, found = (
            plain(getattr(here, key)) for here in (sites, Sites(**adapter.config.sites))
        )
        if found != expected:
            raise ValueError(
                f"the head was trained for another denoiser: its {_SITE_NAMES.get(key, key)} is"
                f" {_short(found)}, that of this {name} is {_short(expected)}: use the kind of"
                " model that it was trained on."
            )


def _short(value: object) -> str:
    """Of a long list the first and how many."""
    if not isinstance(value, list):
        return str(value)
    return f"{value[:4]}{f' and {len(value) - 4} more' if len(value) > 4 else ''}"


__all__ = ["DiffusionAdapter", "check_sites"]
