"""A head for `attach`, from an object, a folder or the Hub, with its adapter and its LoRA; and
whether a denoiser is the one that it was trained on."""

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import hub
from .bases.adapter import DiffusionAdapter
from .bases.limits import check_finite
from .bases.loading import load_model_config, load_part
from .bases.lora import has_lora
from .bases.lora_layers import LoraLayers
from .bases.recognition import is_base, same_weights
from .bases.registry import model_class_named
from .bases.saved import BASE_FOLDER, LORA_FOLDER
from .model import InterventionModel
from .modeling_intervention import InterventionHead
from .pretrained import not_bundled


class LoadedHead:
    """A head with what it needs, and how it is known whether a denoiser is the one that it was
    trained on.

    Args:
        head, adapter: the head and its adapter.
        lora: its LoRA layers, if it has any.
        reference: of the base that it was trained on, to compare a denoiser with; `None`: there is
            nothing to compare.
        unreadable: whether a denoiser should have been compared with the base saved with the head,
            and could not be.
    """

    def __init__(
        self,
        head: InterventionHead,
        adapter: DiffusionAdapter,
        lora: LoraLayers | None = None,
        reference: dict[str, str | None] | None = None,
        unreadable: bool = False,
    ):
        self.head, self.adapter, self.lora = head, adapter, lora
        self.reference, self.unreadable = reference, unreadable

    @classmethod
    def from_object(
        cls, denoiser: nn.Module, head: Any, adapter: DiffusionAdapter | None
    ) -> "LoadedHead":
        """Of a model, or of a head and its adapter. Errors as of `attach`."""
        if isinstance(head, InterventionModel):
            if not isinstance(head.base.adapter, DiffusionAdapter) or head.head is None:
                raise ValueError(
                    f"this head is on a {type(head.base.model).__name__}, not on a denoiser: it "
                    "cannot enter a pipeline's."
                )
            here = head.base.model is denoiser  # its LoRA is in place then
            lora = (
                LoraLayers.from_model(head.base.model)
                if has_lora(head.base.model) and not here
                else None
            )
            return cls(
                head.head, head.base.adapter, lora, None if here else head.config.base_reference
            )
        if isinstance(head, InterventionHead):
            if not isinstance(adapter, DiffusionAdapter):
                raise ValueError(
                    "a head alone does not say how it enters a denoiser: pass adapter= too, or the "
                    "folder of both."
                )
            return cls(head, adapter, None, head.config.base_reference)
        raise TypeError(
            "head must be a folder, a Hub name, an InterventionModel or an InterventionHead, not a "
            f"{type(head).__name__}."
        )

    @classmethod
    def from_folder(
        cls,
        denoiser: nn.Module,
        name: str | os.PathLike,
        subfolder: str | None,
        variant: str | None,
        dtype: torch.dtype | None,
        options: dict,
    ) -> "LoadedHead":
        """From a folder or the Hub; arguments and errors as of `attach`."""
        path = hub.subfolder(hub.folder(not_bundled(name), **options), subfolder, name)
        part = "head" if (path / "model_index.json").exists() else ""
        precision = dtype or torch.float32
        head = InterventionHead.from_pretrained(
            path, subfolder=part, variant=variant, dtype=precision
        )
        saved = load_model_config(path / "adapter")
        if (saved or {}).get("_class_name") != DiffusionAdapter.__name__:
            raise ValueError(f"{name} is not a head on a denoiser: it has no adapter of one.")
        adapter = load_part(
            DiffusionAdapter,
            path / "adapter",
            f"the adapter of {name}",
            variant,
            torch_dtype=precision,
        )
        check_finite(head, f"the head of {name}")
        if (path / BASE_FOLDER).is_dir():
            known = _check_own_base(denoiser, path, name, subfolder, variant)
            return cls(head, adapter, unreadable=not known)
        lora = None
        if head.config.lora_rank:
            lora = LoraLayers.from_folder(path / LORA_FOLDER, f"the LoRA of {name}")
            check_finite(lora, f"the LoRA of {name}")
        return cls(head, adapter, lora, head.config.base_reference)

    def warn_unless_known(self, denoiser: nn.Module) -> None:
        """Warn if a denoiser is not the one that the head was trained on, or if that cannot be
        told. Warn, too, if the head was not trained at all noise levels."""
        if self.adapter.config.noisiest < 1:
            warnings.warn(
                "this head and its base were trained at the noise that samples of their own model "
                "pass through. A pipeline starts from more, and its images may be muddy: train a "
                "head to attach with --regime frozen or lora.",
                stacklevel=3,
            )
        known: bool | None = True
        if self.unreadable:
            known = None
        elif self.reference is not None:
            known = is_base(denoiser, self.reference)
        kind = type(denoiser).__name__
        if known is None:
            warnings.warn(
                f"whether this {kind} is the one that the head was trained on cannot be told: its "
                "weights are offloaded, quantised or in 8 bits. Attach the head before that to "
                "have it checked.",
                stacklevel=3,
            )
        elif not known and self.reference is not None:
            warnings.warn(
                f"this {kind} is not the one that the head was trained on "
                f"({self.reference['name_or_path']}): it fits, but how well it works is not known.",
                stacklevel=3,
            )


def _check_own_base(
    denoiser: nn.Module, path: Path, name: Any, subfolder: str | None, variant: str | None
) -> bool:
    """Raise a ValueError unless a denoiser has the weights of the base saved with a head, which was
    trained too or made anew.

    Returns:
        Whether that could be told.
    """
    model_class = model_class_named(
        (load_model_config(path / BASE_FOLDER) or {}).get("_class_name", "")
    )
    own = load_part(model_class, path / BASE_FOLDER, f"the base of {name}", variant)
    same = same_weights(denoiser, own)
    if same is False:
        there = "/".join(filter(None, (subfolder, BASE_FOLDER)))
        raise ValueError(
            f"{name} has a base of its own, which is not the denoiser of this pipeline: make the "
            f"pipeline with that one, {model_class.__name__}.from_pretrained({str(name)!r}, "
            f"subfolder={there!r})."
        )
    return same is not None
