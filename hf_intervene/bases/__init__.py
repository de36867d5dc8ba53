"""Base families: how a head meets a pretrained model (see `base.py`)."""

from .adapter import DiffusionAdapter
from .autoencoder import AutoencoderBase, LatentAdapter
from .base import Base, Encoded
from .diffusion import DiffusionBase
from .light_vae import LightVAE, LightVAEBase
from .pipelines import PipelineBase
from .pretrained import load_base
from .registry import register_base, wrap_base


__all__ = [
    "AutoencoderBase",
    "Base",
    "DiffusionAdapter",
    "DiffusionBase",
    "Encoded",
    "LatentAdapter",
    "LightVAE",
    "LightVAEBase",
    "PipelineBase",
    "load_base",
    "register_base",
    "wrap_base",
]
