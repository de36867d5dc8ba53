"""The parts of a saved model on disk, and by what a frozen base that is not among them is known again."""

import os
import re

import torch
from diffusers.models.modeling_utils import ModelMixin

from ..configuration_intervention import InterventionConfig
from ..modeling_intervention import check_loaded
from .autoencoder import AutoencoderBase
from .base import Base, base_family, load_model_config, model_class_named, weight_hash


BASE_FOLDER, ADAPTER_FOLDER, LORA_FOLDER = "base", "adapter", "lora"


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
    config = load_model_config(name_or_path, subfolder)
    if config is None:
        raise FileNotFoundError(
            f"there is no pretrained base {str(name_or_path)!r}{f' with a sub-folder {subfolder!r}' if subfolder else ''}: "
            "give a folder saved by diffusers, or a Hub name."
        )
    model = load_part(model_class_named(config["_class_name"]), name_or_path, subfolder, f"the base {name_or_path}")
    family = base_family(model)
    if residual_layers and not issubclass(family, AutoencoderBase):
        raise ValueError(f"a {type(model).__name__} has no residual latents: leave residual_layers at 0.")
    options = {"residual_layers": residual_layers} if residual_layers else {}
    base = family(model) if family.adapter_class is None else family(model, sample_size=sample_size, **options)
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
    found = {"class_name": type(model).__name__, "name_or_path": str(name), "subfolder": subfolder, "revision": revision}
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
    name: str | os.PathLike, config: InterventionConfig, saved: dict | None, dtype: torch.dtype, variant: str | None, **kwargs
) -> ModelMixin:
    """The base saved with a model, whose configuration is `saved`, or else, checked by its hash, the one its head was trained on.

    Raises:
        OSError, ValueError: one sentence: neither is there, truncated weights, another base than at training time.
    """
    if saved is not None:
        model_class = model_class_named(saved["_class_name"])
        return load_part(model_class, name, BASE_FOLDER, f"the base of {name}", torch_dtype=dtype, variant=variant, **kwargs)
    reference = config.base_reference
    if reference is None:
        raise OSError(f"{name} holds no base model (no {BASE_FOLDER}/config.json): pass base= with the one it was trained on.")
    source, model_class = reference["name_or_path"], model_class_named(reference["class_name"])
    kwargs |= {"revision": reference["revision"], "variant": reference["variant"]}
    # As it was then, checked and cast; from float32 cast while it is read, where the reference has a hash of that.
    then = getattr(torch, reference["dtype"])
    kwargs["torch_dtype"] = dtype if then == torch.float32 and _key(dtype) in reference else then
    try:
        model = load_part(model_class, source, reference["subfolder"], f"the base {source}", **kwargs)
    except OSError as error:
        raise OSError(
            f"the base that {name} was trained on, {source}, cannot be loaded ({' '.join(str(error).split())}): pass base= with a copy of it."
        ) from error
    check_reference(model, config)
    return model if kwargs["torch_dtype"] == dtype else model.to(dtype)


def load_part(model_class: type[ModelMixin], name: str | os.PathLike, folder: str | None, what: str, **kwargs) -> ModelMixin:
    """A diffusers model whose weights fit its configuration perfectly. Raises as `check_loaded`."""
    kwargs |= {"subfolder": folder, "use_safetensors": True, "low_cpu_mem_usage": False, "output_loading_info": True}
    return check_loaded(lambda: model_class.from_pretrained(name, **kwargs), what)


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
