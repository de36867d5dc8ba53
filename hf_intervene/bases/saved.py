"""A base on disk beside the head that was trained on it: what is saved of it, and where the rest is
found.

    base/       the base; plain diffusers reads it alone
    adapter/    the base family's adapter, where it has one
    lora/       LoRA layers on the base, if it has any; plain PEFT reads them alone
    scheduler/, vae/, image_encoder/, image_processor/    what a denoiser needs beside it
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from ..configuration_intervention import InterventionConfig
from ..logging import get_logger
from .base import Base
from .limits import check_finite
from .loading import (
    base_folder,
    check_reference,
    is_referenced,
    load_model_config,
    load_part,
    load_scheduler,
    load_vision,
    remove_weights,
    type_key,
)
from .lora import has_lora, load_lora, merged, save_lora
from .registry import base_family, model_class_named


logger = get_logger(__name__)

PART_FOLDERS = BASE_FOLDER, ADAPTER_FOLDER, LORA_FOLDER = "base", "adapter", "lora"


def save_base_of(
    base: Base,
    config: InterventionConfig,
    directory: str | os.PathLike,
    everything: bool | None,
    variant: str | None,
    max_shard_size: int | str,
) -> None:
    """Save a base, its adapter, its LoRA layers and what it needs beside it, as far as they cannot
    be found elsewhere.

    Args:
        base, config: the base, and the configuration that says where it came from.
        directory: of the model.
        everything: whether to save what can be found elsewhere too; `None`: not.
        variant, max_shard_size: of the weights.

    Raises:
        FileExistsError: the folder holds a part of another model, which would be taken for this
            one's.
    """
    reference, folder = config.base_reference, os.path.join(directory, BASE_FOLDER)
    _save_companions(base, config, directory, everything)
    if everything is None:
        everything = reference is None or not is_referenced(base.model, reference)
    if not everything and os.path.isdir(folder):
        raise FileExistsError(
            f"{directory} holds the base of another model, which would be taken for this one's:"
            " empty it."
        )
    parts: dict[str, Any] = {}
    if base.adapter is not None:
        parts[os.path.join(directory, ADAPTER_FOLDER)] = base.adapter
    if everything:  # on its own, without LoRA layers: merged into the weights
        parts[folder] = merged(base.model)
    elif has_lora(base.model):
        save_lora(base.model, os.path.join(directory, LORA_FOLDER))
    for name, part in parts.items():
        remove_weights(name, variant)
        part.save_pretrained(name, variant=variant, max_shard_size=max_shard_size)


def load_base_of(
    name: str | os.PathLike,
    path: Path,
    config: InterventionConfig,
    base: ModelMixin | Base | None,
    dtype: torch.dtype,
    variant: str | None,
    options: dict,
) -> Base:
    """The base of a saved model with its adapter and what it needs beside it, without its LoRA.

    Args:
        name: of the model, for messages.
        path: its folder.
        config: of its head.
        base: to use in place of the one that it was trained on; `None`: that one.
        dtype: precision to load in.
        variant: of the weights.
        options: of `hub.folder`, for a base elsewhere, and `base_token`, the token for it.

    Raises:
        OSError, ValueError, TypeError: one sentence: see `InterventionModel.from_pretrained`.
    """
    has_base = (path / BASE_FOLDER / "config.json").exists()
    saved_adapter = load_model_config(path / ADAPTER_FOLDER)
    if base is None:
        model = _load_model(name, path, config, dtype, variant, options)
        family = base_family(model, saved_adapter)
    else:
        model = base.model if isinstance(base, Base) else base
        family = type(base) if isinstance(base, Base) else base_family(base, saved_adapter)
        if has_lora(model):
            raise ValueError(
                "the base that was passed carries LoRA layers of another head: pass a fresh copy"
                " of it."
            )
        if not has_base:
            check_reference(model, config.base_reference)
    if family.adapter_class is not None:
        what = f"the adapter of {name}"
        adapter = load_part(
            family.adapter_class, path / ADAPTER_FOLDER, what, variant, torch_dtype=dtype
        )
        if isinstance(base, Base):
            parts = base.companions()
        else:
            parts = _load_companions(name, path, config, family, dtype, options)
        base = family(model, **{"adapter": adapter, **parts})
    elif not isinstance(base, Base):
        base = family(model)
    return base


def load_lora_of(
    name: str | os.PathLike, path: Path, config: InterventionConfig, base: Base
) -> None:
    """Put the LoRA of a saved model, if it has one, on its base. This comes last: it changes a
    base that was passed. Arguments and errors as of `load_base_of`.
    """
    if config.lora_rank and not (path / BASE_FOLDER / "config.json").exists():
        load_lora(base.model, path / LORA_FOLDER, f"the LoRA of {name}")
        check_finite(base.model, f"the base of {name} with its LoRA")


def _load_model(
    name: str | os.PathLike,
    path: Path,
    config: InterventionConfig,
    dtype: torch.dtype,
    variant: str | None,
    options: dict,
) -> ModelMixin:
    """The base saved with a model in the folder `path`, or else, checked by its hash, the one its
    head was trained on. Arguments as of `load_base_of`.

    Raises:
        OSError, ValueError: one sentence: neither is there, truncated weights, another base than at
            training time.
    """
    saved = load_model_config(path / BASE_FOLDER)
    if saved is not None:
        model_class = model_class_named(saved["_class_name"])
        return load_part(
            model_class, path / BASE_FOLDER, f"the base of {name}", variant, torch_dtype=dtype
        )
    reference = config.base_reference
    if reference is None:
        raise OSError(
            f"{name} holds no base model (no {BASE_FOLDER}/config.json): pass base= with the one it"
            " was trained on."
        )
    return _load_referenced(name, reference, dtype, options)


def _read_as(reference: dict[str, str | None], dtype: torch.dtype) -> torch.dtype:
    """The precision to read a model in that is known by its hash and wanted in `dtype`: that of
    then, to be checked and cast; from float32 it is cast while it is read, where the reference has
    a hash of that."""
    then = getattr(torch, str(reference["dtype"]))
    return dtype if then == torch.float32 and type_key(dtype) in reference else then


def _load_referenced(
    name: str | os.PathLike, reference: dict[str, str | None], dtype: torch.dtype, options: dict
) -> ModelMixin:
    source, model_class = (
        str(reference["name_or_path"]),
        model_class_named(str(reference["class_name"])),
    )
    read_as = _read_as(reference, dtype)
    try:
        options = _options_of(name, reference, options)
        folder = base_folder(source, reference["subfolder"], reference["variant"], **options)
        model = load_part(
            model_class, folder, f"the base {source}", reference["variant"], torch_dtype=read_as
        )
    except OSError as error:
        raise OSError(
            f"the base that {name} was trained on, {source}, cannot be loaded"
            f" ({' '.join(str(error).split())}): pass base= with a copy of it, or, if it is private"
            " and you trust it with your token, base_token=True."
        ) from error
    check_reference(model, reference)
    return model if read_as == dtype else model.to(dtype)


def _options_of(name: str | os.PathLike, reference: dict[str, str | None], options: dict) -> dict:
    """Options of `hub.folder` for what the configuration of a model names and its user did not: at
    the revision of training time, and without the user's token unless `base_token` gives one. What
    is fetched from where is said."""
    source, revision = str(reference["name_or_path"]), reference["revision"]
    options = {k: v for k, v in options.items() if k != "base_token"} | {
        "revision": revision,
        "token": options.get("base_token", False),
    }
    file = "/".join(filter(None, (reference["subfolder"], "config.json")))
    if not os.path.isdir(source) and not options.get("local_files_only"):
        cached = None
        with suppress(HFValidationError):  # a folder that is gone; `base_folder` says so
            cached = try_to_load_from_cache(
                source, file, cache_dir=options.get("cache_dir"), revision=revision
            )
        if not isinstance(cached, str):
            logger.warning(
                "fetching %s at %s from the Hub, which %s was trained on.",
                source,
                revision or "its newest",
                name,
            )
    return options


def _save_companions(
    base: Base, config: InterventionConfig, directory: str | os.PathLike, everything: bool | None
) -> None:
    """Save what a base needs beside its model, each in a folder of its name; of models, unless
    `everything`, those alone that `config.companion_references` does not say where to find."""
    for name, part in base.companions().items():
        reference, folder = (
            (config.companion_references or {}).get(name),
            os.path.join(directory, name),
        )
        if not everything and reference is not None and is_referenced(part, reference):
            if os.path.isdir(folder):
                raise FileExistsError(
                    f"{directory} holds the {name} of another model, which would be taken for this"
                    " one's: empty it."
                )
        else:
            part.save_pretrained(folder)


def _load_companions(
    name: str | os.PathLike,
    path: Path,
    config: InterventionConfig,
    family: type[Base],
    dtype: torch.dtype,
    options: dict,
) -> dict[str, Any]:
    """What a base of a family needs beside its model, from the folder `path` of the saved model
    `name`, or from where `config.companion_references` says. Arguments and errors as of
    `load_base_of`."""
    found: dict[str, Any] = {}
    references = config.companion_references or {}
    if "scheduler" in family.companion_names:
        found["scheduler"] = load_scheduler(path / "scheduler", str(name))
    for part in {"vae", "base_2"} & {*family.companion_names}:
        saved = load_model_config(path / part)
        if saved is not None:
            model_class, what = model_class_named(saved["_class_name"]), f"the {part} of {name}"
            found[part] = load_part(model_class, path / part, what, torch_dtype=dtype)
        elif part in references:
            found[part] = _load_referenced(name, references[part], dtype, options)
    if (path / "image_processor").exists():
        here, reference = path / "image_encoder", references.get("image_encoder")
        if here.exists() or reference is None:
            found |= load_vision(here, path / "image_processor", dtype)
        else:
            source = os.path.join(str(reference["name_or_path"]), reference["subfolder"] or "")
            is_folder = os.path.isdir(source)
            name_there = source if is_folder else str(reference["name_or_path"])
            where = {} if is_folder else _options_of(name, reference, options)
            found |= load_vision(
                name_there, path / "image_processor", _read_as(reference, dtype), **where
            )
            check_reference(found["image_encoder"], reference)
            found["image_encoder"].to(dtype)
    return found


__all__ = ["load_base_of", "load_lora_of", "save_base_of"]
