"""The parts of a saved model on disk, and by what a frozen base that is not among them is known again."""

import json
import os
import re
from pathlib import Path

import torch
from diffusers.models.modeling_utils import ModelMixin

from .. import hub
from ..configuration_intervention import InterventionConfig
from ..modeling_intervention import check_loaded
from .autoencoder import AutoencoderBase
from .base import Base, base_family, model_class_named, weight_hash


BASE_FOLDER, ADAPTER_FOLDER, LORA_FOLDER = "base", "adapter", "lora"


def load_model_config(folder: Path) -> dict | None:
    """The configuration of a saved diffusers model of any class, or `None` if there is none."""
    file = folder / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError as error:
        raise OSError(f"{file} is not valid JSON: {error}.") from error
    return found if "_class_name" in found else None


def base_folder(name_or_path: str | os.PathLike, subfolder: str | None = None, variant: str | None = None, **options) -> Path:
    """The folder of a saved diffusers model, from a folder or the Hub: of a repository, its files alone. See `hub.folder`."""
    weights, dotted = "diffusion_pytorch_model", f".{variant}" if variant else ""
    files = ("config.json", f"{weights}{dotted}.safetensors", f"{weights}{dotted}-*-of-*.safetensors")
    files += (f"{weights}.safetensors.index{dotted}.json",)
    path = hub.folder(name_or_path, [f"{subfolder}/{file}" if subfolder else file for file in files], **options)
    return path / (subfolder or "")


def load_base(name_or_path: str | os.PathLike, sample_size: int, subfolder: str | None = None, residual_layers: int = 0) -> Base:
    """Load a pretrained model of any registered class, from a folder or the Hub, and wrap it for images of `sample_size` pixels.

    Args:
        name_or_path: folder or repository.
        sample_size: side of the images in pixels.
        subfolder: its sub-folder there.
        residual_layers: couplings of the prior of residual latents; 0: none.

    Raises:
        OSError, ValueError: one sentence: nothing there, truncated weights, a class that is not registered, another image size, a class
            without residual latents.
    """
    what = f"{str(name_or_path)!r}{f' with a sub-folder {subfolder!r}' if subfolder else ''}"
    try:
        path = base_folder(name_or_path, subfolder)
    except OSError as error:
        raise OSError(f"there is no pretrained base {what}: {error}") from error
    config = load_model_config(path)
    if config is None:
        raise FileNotFoundError(f"there is no pretrained base {what}: give a folder saved by diffusers, or a Hub name.")
    model = load_part(model_class_named(config["_class_name"]), path, f"the base {what}")
    family = base_family(model)
    if issubclass(family, AutoencoderBase):
        base = family(model, sample_size=sample_size, residual_layers=residual_layers)
    elif residual_layers:
        raise ValueError(f"a {type(model).__name__} has no residual latents: leave residual_layers at 0.")
    else:
        base = family(model)
    if base.image_shape[-1] != sample_size:
        raise ValueError(
            f"the base {name_or_path} is for images of {base.image_shape[-1]} pixels, not {sample_size}: give it images of its size."
        )
    return base


def base_reference(
    model: ModelMixin, subfolder: str | None, revision: str | None, variant: str | None
) -> dict[str, str | None] | None:
    """Where a pretrained model came from, and the hash of its weights; `None` for one that was not loaded.

    `sha256` is of the weights as they are, `sha256_bfloat16` and `sha256_float16` are of the same weights cast, for whoever loads or
    saves the model in half precision.
    """
    name = model.config.get("_name_or_path")
    if not name:
        return None
    found = {"class_name": type(model).__name__} | hub.origin(str(name), revision, subfolder)
    dtype = _precision(model)
    found |= {"variant": variant, "dtype": _name(dtype), "sha256": weight_hash(model)}
    return found | {_key(cast): weight_hash(model, cast) for cast in (torch.bfloat16, torch.float16) if cast != dtype}


def is_referenced(model: ModelMixin, reference: dict[str, str | None]) -> bool:
    """Whether a model has exactly the weights that a reference is of, in whatever precision it is now."""
    now, then = _precision(model), getattr(torch, reference["dtype"])
    if now == then:
        return weight_hash(model) == reference["sha256"]
    if _key(now) in reference:
        return weight_hash(model, now) == reference[_key(now)]
    # In a wider type than then: the weights must still be values of the narrower one, or they have been trained since.
    floats = (value for value in model.state_dict().values() if value.is_floating_point())
    return all(torch.equal(v, v.to(then).to(v.dtype)) for v in floats) and weight_hash(model, then) == reference["sha256"]


def check_reference(model: ModelMixin, config: InterventionConfig) -> None:
    """Raise a ValueError if a model is not the base that a head was trained on."""
    reference = config.base_reference
    if reference is not None and not is_referenced(model, reference):
        raise ValueError(
            f"this {type(model).__name__} is not the base that the head was trained on: its weights differ from those of "
            f"{reference['class_name']} {reference['name_or_path']} at training time; load that one, in {reference['dtype']}."
        )


def load_saved_base(
    name: str | os.PathLike,
    path: Path,
    config: InterventionConfig,
    dtype: torch.dtype,
    variant: str | None,
    options: dict,
) -> ModelMixin:
    """The base saved with a model in the folder `path`, or else, checked by its hash, the one its head was trained on.

    Args:
        name: of the model, for messages.
        path: its folder.
        config: of its head.
        dtype: precision to load in.
        variant: of the saved base.
        options: of `hub.folder`, for a base elsewhere.

    Raises:
        OSError, ValueError: one sentence: neither is there, truncated weights, another base than at training time.
    """
    saved = load_model_config(path / BASE_FOLDER)
    if saved is not None:
        model_class = model_class_named(saved["_class_name"])
        return load_part(model_class, path / BASE_FOLDER, f"the base of {name}", variant, torch_dtype=dtype)
    reference = config.base_reference
    if reference is None:
        raise OSError(f"{name} holds no base model (no {BASE_FOLDER}/config.json): pass base= with the one it was trained on.")
    source, model_class = reference["name_or_path"], model_class_named(reference["class_name"])
    # As it was then, checked and cast; from float32 cast while it is read, where the reference has a hash of that.
    then = getattr(torch, reference["dtype"])
    read_as = dtype if then == torch.float32 and _key(dtype) in reference else then
    try:
        options = options | {"revision": reference["revision"]}
        folder = base_folder(source, reference["subfolder"], reference["variant"], **options)
        model = load_part(model_class, folder, f"the base {source}", reference["variant"], torch_dtype=read_as)
    except OSError as error:
        raise OSError(
            f"the base that {name} was trained on, {source}, cannot be loaded ({' '.join(str(error).split())}): pass base= with a copy of it."
        ) from error
    check_reference(model, config)
    return model if read_as == dtype else model.to(dtype)


def load_part(model_class: type[ModelMixin], path: Path, what: str, variant: str | None = None, **kwargs) -> ModelMixin:
    """Load a diffusers model from a folder, strictly: safetensors only, and weights that fit its configuration.

    Raises:
        OSError, ValueError: one sentence.
    """
    hub.check_weights(path, what, variant)
    options = {"use_safetensors": True, "low_cpu_mem_usage": False, "output_loading_info": True, "variant": variant}
    return check_loaded(lambda: model_class.from_pretrained(path, **options, **kwargs), what)


def remove_weights(folder: str | os.PathLike, variant: str | None) -> None:
    """Remove a variant's weights from a folder before it is saved there anew.

    Both libraries leave the old index beside a new single file, or the old file beside new shards, and would then read what is old.
    """
    if not os.path.isdir(folder):
        return
    dotted = f".{re.escape(variant)}" if variant else ""
    shard, index = r"(-\d{5}-of-\d{5})?\.safetensors", rf"\.safetensors\.index{dotted}\.json"
    for file in os.listdir(folder):
        if re.fullmatch(rf"(model|diffusion_pytorch_model)({dotted}{shard}|{index})", file):
            os.remove(os.path.join(folder, file))


def _precision(model: ModelMixin) -> torch.dtype:
    """The narrowest floating-point type of a model's weights, LoRA layers aside: some models keep a few layers in float32."""
    weights = (value for name, value in model.state_dict().items() if ".lora_" not in name and value.is_floating_point())
    return min({value.dtype for value in weights}, key=lambda dtype: (dtype.itemsize, str(dtype)), default=torch.float32)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _key(dtype: torch.dtype) -> str:
    return f"sha256_{_name(dtype)}"
