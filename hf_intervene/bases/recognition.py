"""Whether a denoiser in use is the one that a head was trained on, by the weights that it had then.

What others add to it does not count: LoRA layers, fused projections, layers of IP-Adapters. Weights
that are not in memory as they were, because they are offloaded, quantised or in 8 bits, say nothing
either way.
"""

import re
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .hashes import base_weights
from .loading import is_referenced


_ADDED = re.compile(
    r"\.processor\.|\.to_(added_)?(qkv|kv)\.|^encoder_hid_proj\.image_projection_layers\."
)


class _Weights:
    """Weights by name, where a function wants a model."""

    def __init__(self, weights: dict[str, torch.Tensor]):
        self._weights = weights

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._weights


def is_base(denoiser: nn.Module, reference: dict[str, str | None]) -> bool | None:
    """Whether a denoiser has the weights that a reference is of (see `loading.base_reference`);
    `None`: it cannot be told."""
    weights = _readable(denoiser)
    if weights is None:
        return None
    candidates = [
        weights,
        {name: value for name, value in weights.items() if not _ADDED.search(name)},
    ]
    candidates = candidates if len(candidates[0]) != len(candidates[1]) else candidates[:1]
    if any(is_referenced(_as_model(candidate), reference) for candidate in candidates):
        return True
    own = _own_names(denoiser)
    if not own or not own < weights.keys():
        return False
    candidate = {name: value for name, value in weights.items() if name in own}
    return is_referenced(_as_model(candidate), reference)


def _own_names(denoiser: nn.Module) -> set[str]:
    """The names of the weights that a new denoiser of this configuration has; empty where none can
    be made."""
    made: Any = type(denoiser)
    try:
        with torch.device("meta"):
            return set(made.from_config(denoiser.config).state_dict())
    except Exception:  # of a class that somebody has made
        return set()


def same_weights(denoiser: nn.Module, other: nn.Module) -> bool | None:
    """Whether a denoiser has the weights of another model; `None`: it cannot be told.

    The two are compared in the narrower of their precisions. A model that was saved in half
    precision and loaded in float32 counts as half.
    """
    here, there = _readable(denoiser), base_weights(other)
    if here is None:
        return None
    pairs = [
        (here[name], value.to(here[name].device)) for name, value in there.items() if name in here
    ]
    if len(pairs) < len(there) or any(a.shape != b.shape for a, b in pairs):
        return False
    if all(torch.equal(a, b.to(a.dtype)) for a, b in pairs):
        return True
    for narrow in (torch.bfloat16, torch.float16):
        was_narrow = all(torch.equal(b, b.to(narrow).to(b.dtype)) for _, b in pairs)
        if was_narrow and all(torch.equal(a.to(narrow), b.to(narrow)) for a, b in pairs):
            return True
    return False


def _readable(denoiser: nn.Module) -> dict[str, torch.Tensor] | None:
    """The weights of a denoiser without LoRA layers; `None` where they are not there as they
    were."""
    if getattr(denoiser, "hf_quantizer", None) is not None or _is_on_disk(denoiser):
        return None
    weights = base_weights(denoiser)
    if not all(isinstance(value, torch.Tensor) for value in weights.values()) or any(
        getattr(module, "parametrizations", None) for module in denoiser.modules()
    ):
        return None  # quantised by torch, or kept as parts that weights are computed from
    gone = any(
        value.is_meta or (value.is_floating_point() and value.itemsize < 2)
        for value in weights.values()
    )
    return None if gone else weights


def _is_on_disk(denoiser: nn.Module) -> bool:
    """Whether diffusers' group offloading keeps weights in files, and empty tensors in their
    place."""
    for module in denoiser.modules():
        registry: Any = getattr(module, "_diffusers_hook", None)
        for hook in getattr(registry, "hooks", {}).values():
            if getattr(getattr(hook, "config", None), "offload_to_disk_path", None) is not None:
                return True
    return False


def _as_model(weights: dict[str, torch.Tensor]) -> ModelMixin:
    found: Any = _Weights(weights)
    return found
