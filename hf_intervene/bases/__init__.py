"""Base families: how a head meets a pretrained model (see `base.py`)."""

from .base import Base, register_base, wrap_base
from .light_vae import LightVAE, LightVAEBase


__all__ = ["Base", "LightVAE", "LightVAEBase", "register_base", "wrap_base"]
