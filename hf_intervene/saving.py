"""Saving an `InterventionModel` and loading it: what was trained, and where to find the rest."""

import os
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.modeling_utils import ModelMixin

from . import hub
from .bases import Base
from .bases.base import base_family
from .bases.limits import check_finite
from .bases.loading import (
    ADAPTER_FOLDER,
    BASE_FOLDER,
    LORA_FOLDER,
    check_reference,
    is_referenced,
    load_companions,
    load_model_config,
    load_part,
    load_saved_base,
    remove_weights,
    save_companions,
)
from .bases.lora import has_lora, load_lora, lora_rank, merged, save_lora
from .configuration_intervention import InterventionConfig
from .logging import get_logger
from .modeling_intervention import InterventionHead
from .pretrained import not_bundled


if TYPE_CHECKING:
    from .model import InterventionModel


logger = get_logger(__name__)


def save_pretrained(
    self: "InterventionModel",
    save_directory: str | os.PathLike,
    save_base: bool | None = None,
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
    **kwargs: Any,
) -> None:
    """Save what was trained: the head as a transformers model, adapter and base as diffusers
    models.

    save_directory/config.json, model.safetensors    the head; `InterventionHead.from_pretrained` reads it alone
    save_directory/adapter/                          the base family's adapter, where it has one
    save_directory/lora/                             LoRA layers on the base, if it has any; plain PEFT reads them alone
    save_directory/base/                             the base; plain diffusers reads it alone
    save_directory/scheduler/, vae/, image_encoder/, image_processor/      what a denoiser needs beside it

    Args:
        save_directory: the folder.
        save_base: whether to save the base too (and the models beside it); `None`: unless it still
            is the pretrained one it was loaded as, or that one in half precision. Then the
            configuration's `base_reference` (`companion_references`) says where to load it from,
            and by which hash to know it.
        variant: put into the names of the weights of head, adapter and base, such as `"fp16"`; cast
            the model first (`model.half()`).
        max_shard_size: larger weights of head, adapter and base are saved in several files. LoRA
            layers are always one file.
        **kwargs: of the head's `save_pretrained`.
    """  # noqa: E501
    if kwargs.pop("push_to_hub", False):
        raise ValueError(
            "save_pretrained(push_to_hub=True) would push half of the model: use push_to_hub()."
        )
    if os.path.isfile(save_directory):
        raise NotADirectoryError(f"cannot save to {save_directory}: it is a file; give a folder.")
    reference = self.config.base_reference
    if has_lora(self.base.model):
        for part in (self, self.head) if self.head is not None else (self,):
            part.config.lora_rank = lora_rank(self.base.model)  # loading looks there
    save_companions(self.base, self.config, save_directory, save_base)
    if save_base is None:
        save_base = reference is None or not is_referenced(self.base.model, reference)
    base_folder = os.path.join(save_directory, BASE_FOLDER)
    if not save_base and os.path.isdir(base_folder):
        raise FileExistsError(
            f"{save_directory} holds the base of another model, which would be taken for this"
            " one's: empty it."
        )
    parts = {} if self.head is None else {save_directory: self.head}
    if self.base.adapter is not None:
        parts[os.path.join(save_directory, ADAPTER_FOLDER)] = self.base.adapter
    if save_base:  # on its own, without LoRA layers: merged into the weights
        parts[base_folder] = merged(self.base.model)
    elif has_lora(self.base.model):
        save_lora(self.base.model, os.path.join(save_directory, LORA_FOLDER))
    if self.head is None:
        self.config.save_pretrained(save_directory, **kwargs)
    for folder, part in parts.items():
        remove_weights(folder, variant)
        options = kwargs if part is self.head else {}
        part.save_pretrained(folder, variant=variant, max_shard_size=max_shard_size, **options)
    hub.forget_paths(
        save_directory, ("", ADAPTER_FOLDER, BASE_FOLDER, LORA_FOLDER, *self.base.companion_names)
    )


def from_pretrained(
    cls: type["InterventionModel"],
    pretrained_model_name_or_path: str | os.PathLike,
    base: ModelMixin | Base | None = None,
    torch_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    base_token: str | bool = False,
    subfolder: str | None = None,
    **kwargs: Any,
) -> "InterventionModel":
    """Load a model saved by `save_pretrained`, from a folder or the Hub; a base that was not saved
    with it, from its own place.

    Args:
        pretrained_model_name_or_path: folder or repository.
        base: the base to use instead, in the precision it has.
        torch_dtype: precision of head, adapter and base, as in a diffusers pipeline; `None`:
            float32. For a base in half precision under a head in float32, pass `base`.
        dtype: the same, by transformers' name for it.
        variant: the variant to read of what was saved here, such as `"fp16"`; a base elsewhere has
            its own in `base_reference`.
        base_token: token for a private base elsewhere, whose repository the model's configuration
            names and not you; `True`: that of `hf auth login`. Your token is sent there only if you
            say so.
        subfolder: of the folder or repository, where the model is.
        **kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, as elsewhere.

    Raises:
        OSError, ValueError, TypeError: one sentence: not a saved model, no such repository or no
            access to it, truncated, missing or pickled weights, weights that do not fit the
            configuration, a base that is not the one the head was trained on (in any precision), or
            of a class not registered.
    """
    name, dtype = pretrained_model_name_or_path, dtype or torch_dtype or torch.float32
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"torch_dtype must be a type such as torch.bfloat16, not {dtype!r}.")
    options = hub.pop_options(kwargs)
    if "output_loading_info" in kwargs:
        raise TypeError(
            "InterventionModel.from_pretrained takes no output_loading_info: what does not fit is"
            " an error here."
        )
    path = hub.subfolder(hub.folder(not_bundled(name), **options), subfolder, name)
    logger.info("loading the model %s from %s", name, path)
    config = InterventionConfig.from_pretrained(path)
    has_base = (path / BASE_FOLDER / "config.json").exists()
    saved_adapter = load_model_config(path / ADAPTER_FOLDER)
    if base is None:
        model = load_saved_base(
            name, path, config, dtype, variant, options | {"base_token": base_token}
        )
        family = base_family(model, saved_adapter)
    else:
        model, family = (
            (base.model, type(base))
            if isinstance(base, Base)
            else (base, base_family(base, saved_adapter))
        )
        if has_lora(model):
            raise ValueError(
                "the base that was passed carries LoRA layers of another head: pass a fresh copy"
                " of it."
            )
        if not has_base:
            check_reference(model, config.base_reference)
    head = None
    if config.ablation not in ("base", "base-pooled"):
        head = InterventionHead.from_pretrained(
            path, config=config, dtype=dtype, variant=variant, **kwargs
        )
        check_finite(head, f"the head of {name}")
    if family.adapter_class is not None:
        what = f"the adapter of {name}"
        adapter = load_part(
            family.adapter_class, path / ADAPTER_FOLDER, what, variant, torch_dtype=dtype
        )
        if isinstance(base, Base):
            parts = base.companions()
        else:
            parts = load_companions(
                name, path, config, family, dtype, options | {"base_token": base_token}
            )
        base = family(model, **{"adapter": adapter, **parts})
    elif not isinstance(base, Base):
        base = family(model)
    if config.lora_rank and not has_base:
        load_lora(
            model, path / LORA_FOLDER, f"the LoRA of {name}"
        )  # last: it changes the base that was passed
        check_finite(model, f"the base of {name} with its LoRA")
    model = cls(config, base, head).eval()
    model._loaded_from = path  # its card may have been edited
    return model
