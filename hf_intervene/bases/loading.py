"""The parts of a saved model on disk, and by what a frozen base that is not among them is known
again.
"""

import os
import re
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import AutoConfig, AutoModel

# from `transformers`, older ones want torchvision
from transformers.models.auto.image_processing_auto import (
    AutoImageProcessor,
)

from .. import hub
from ..checks import check_fit, check_loaded
from ..origins import origin
from .hashes import running_hash, weight_hash
from .limits import check_finite, check_types, entries, read_part


_MAX_SIDE = 1024  # of the latents of a transformer, which keeps a table of all positions
_ATTENTION = (None, "eager", "sdpa", "flex_attention")  # of transformers and torch themselves
VISION_FILES = ("*.json", "model*.safetensors")


def load_model_config(folder: Path) -> dict | None:
    """The configuration of a saved diffusers model of any class, or `None` if there is none."""
    file = folder / "config.json"
    found = read_part(file) if file.exists() else {}
    return found if "_class_name" in found else None


def model_files(subfolder: str | None = None, variant: str | None = None) -> list[str]:
    """Patterns of the files of a saved diffusers model in a repository."""
    weights, dotted = "diffusion_pytorch_model", f".{variant}" if variant else ""
    files = [
        "config.json",
        f"{weights}{dotted}.safetensors",
        f"{weights}{dotted}-*-of-*.safetensors",
    ]
    files += [f"{weights}.safetensors.index{dotted}.json"]
    return [f"{subfolder}/{file}" if subfolder else file for file in files]


def base_folder(
    name_or_path: str | os.PathLike,
    subfolder: str | None = None,
    variant: str | None = None,
    **options: Any,
) -> Path:
    """The folder of a saved diffusers model, from a folder or the Hub: of a repository, its files
    alone. See `hub.folder`.
    """
    return hub.folder(name_or_path, model_files(subfolder, variant), **options) / (subfolder or "")


def load_scheduler(folder: Path, what: str) -> SchedulerMixin:
    """A saved scheduler of any class of diffusers; its name is looked up there and nowhere else.

    Raises:
        OSError, ValueError: one sentence.
    """
    file = folder / "scheduler_config.json"
    if not file.exists():
        raise OSError(
            f"{what} has no scheduler ({file.name} is missing): it is incomplete; fetch it again."
        )
    name = read_part(file).get("_class_name")
    found: type[Any] | None = getattr(diffusers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        raise ValueError(
            f"{file} is of a {name!r}, which is no scheduler of this version of diffusers."
        )
    try:
        return found.from_pretrained(folder)
    except Exception as error:  # whatever it says to values that it was not made for
        raise ValueError(f"{file} is no configuration of a {name}: {one_line(error)}") from error


def load_vision(
    name_or_path: str | os.PathLike,
    processor: Path | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> dict[str, Any]:
    """A vision model of transformers and its image processor, from one folder or repository, as
    options of `DiffusionBase`.

    Args:
        name_or_path: folder or repository.
        processor: folder of the image processor; `None`: that of the model.
        dtype: precision of the model; `None`: float32.
        **options: of `hub.folder`.

    Raises:
        OSError, ValueError: one sentence.
    """
    path = hub.folder(name_or_path, VISION_FILES, **options)
    try:
        model, report = load_transformers(
            AutoModel, path, "the model", dtype=dtype or torch.float32, output_loading_info=True
        )
        missing = sorted(report["missing_keys"])
        if missing and all(name.startswith("pooler.") for name in missing):
            model.pooler = (
                None  # saved without, as part of a classifier: it would be drawn anew in every load
            )
        elif missing:
            raise ValueError(f"its weights lack {', '.join(missing[:3])}.")
        check_finite(model, "the model")
        found = load_processor(processor or path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name_or_path} is no vision model with an image processor: {error}"
        ) from error
    return {
        "image_encoder": (
            getattr(model, "vision_model", model) if hasattr(model, "text_model") else model
        ),
        "image_processor": found,
    }


def load_processor(folder: Path) -> Any:
    """A saved image processor of transformers.

    Raises:
        OSError, ValueError: one sentence.
    """
    check_processor(folder)
    return load_transformers(AutoImageProcessor, folder, "the image processor", weights=False)


def check_processor(folder: Path) -> None:
    """Refuse a saved image processor that makes images of an absurd size or no numbers.

    Raises:
        OSError, ValueError: one sentence.
    """
    for name in (
        "preprocessor_config.json",
        "processor_config.json",
        "image_processor_config.json",
    ):
        if (folder / name).exists():
            read_part(folder / name)


def load_transformers(
    auto: Any, path: Path, what: str, weights: bool = True, **options: Any
) -> Any:
    """Something of transformers from a folder; no code that came with it is run, and nothing else
    is fetched or loaded, whatever its configuration asks for.

    Raises:
        OSError, ValueError: one sentence.
    """
    _refuse_elsewhere(path, what)
    if weights:
        check_transformers(auto, path, what)
        options["use_safetensors"] = True
    try:
        return auto.from_pretrained(path, trust_remote_code=False, local_files_only=True, **options)
    except Exception as error:  # whatever it says to values that it was not made for
        raise ValueError(f"{what} cannot be loaded: {one_line(error)}") from error


def _refuse_elsewhere(path: Path, what: str) -> None:
    """Refuse a folder by which transformers would fetch or load something else: the repository on
    the Hub that is called as a folder that is not there, a LoRA and its base, kernels that compute
    attention or quantised weights.

    Raises:
        OSError, ValueError: one sentence.
    """
    if not path.is_dir():
        raise OSError(f"{what} is not there: {path} is missing; fetch it again.")
    if (path / "adapter_config.json").exists():
        raise ValueError(
            f"{what} has a LoRA beside it (adapter_config.json), which is not loaded: merge it into"
            " the weights, or remove its files."
        )
    if not (path / "config.json").exists():  # nothing here makes layers
        return
    for name, value in entries(read_part(path / "config.json")):
        if name == "quantization_config" and value is not None:
            raise ValueError(f"{what} is quantised: load the weights that it was made of.")
        if name.strip("_") == "attn_implementation" and value not in _ATTENTION:
            raise ValueError(
                f"the configuration of {what} asks for the attention {str(value)[:80]!r}, which is"
                " code from elsewhere: remove that entry."
            )


def check_transformers(model_class: Any, path: Path, what: str) -> None:
    """Refuse a model of transformers in a folder, of a class or of `AutoModel`, by what can be seen
    without weights in memory.

    Raises:
        OSError, ValueError: one sentence.
    """
    files = hub.check_weights(path, what, "model")
    read_part(path / "config.json")

    def build() -> nn.Module:
        if model_class is AutoModel:
            return AutoModel.from_config(
                AutoConfig.from_pretrained(path, trust_remote_code=False), trust_remote_code=False
            )
        return model_class(model_class.config_class.from_pretrained(path))

    check_fit(build, files, what)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def base_reference(
    model: ModelMixin | PreTrainedModel,
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
) -> dict[str, str | None] | None:
    """Where a pretrained model came from, and the hash of its weights; `None` for one that was not
    loaded.

    `sha256` is of the weights as they are, `sha256_bfloat16` and `sha256_float16` are of the same
    weights cast, for whoever loads or saves the model in half precision."""
    name = getattr(model.config, "_name_or_path", None)
    if not name:
        return None
    found = {"class_name": type(model).__name__} | origin(str(name), revision, subfolder)
    dtype = _precision(model)
    found |= {"variant": variant, "dtype": _name(dtype), "sha256": weight_hash(model)}
    return found | {
        type_key(cast): weight_hash(model, cast)
        for cast in (torch.bfloat16, torch.float16)
        if cast != dtype
    }


def is_referenced(model: ModelMixin, reference: dict[str, str | None]) -> bool:
    """Whether a model has exactly the weights that a reference is of, in whatever precision it is
    now.
    """
    now, then = _precision(model), getattr(torch, str(reference["dtype"]))
    if now == then:
        return (running_hash if reference.get("hash") == "running" else weight_hash)(
            model
        ) == reference["sha256"]
    if type_key(now) in reference:
        return weight_hash(model, now) == reference[type_key(now)]
    # In a wider type than then: the weights must still be values of the narrower one, or they have
    # been trained since.
    floats = (value for value in model.state_dict().values() if value.is_floating_point())
    return (
        all(torch.equal(v, v.to(then).to(v.dtype)) for v in floats)
        and weight_hash(model, then) == reference["sha256"]
    )


def check_reference(model: ModelMixin, reference: dict[str, str | None] | None) -> None:
    """Raise a ValueError if a model is not the one that a head was trained on, by its reference."""
    if reference is not None and not is_referenced(model, reference):
        raise ValueError(
            f"this {type(model).__name__} is not the base that the head was trained on: its weights"
            f" differ from those of {reference['class_name']} {reference['name_or_path']} at"
            f" training time; load that one, in {reference['dtype']}."
        )


def load_part(
    model_class: type[ModelMixin], path: Path, what: str, variant: str | None = None, **kwargs: Any
) -> ModelMixin:
    """Load a diffusers model from a folder, strictly: safetensors only, and weights that fit its
    configuration.

    Raises:
        OSError, ValueError: one sentence.
    """
    check_part(model_class, path, what, variant)
    options: dict[str, Any] = {
        "use_safetensors": True,
        "output_loading_info": True,
        "variant": variant,
    }
    # which diffusers wants it for
    options["low_cpu_mem_usage"] = bool(getattr(model_class, "_keep_in_fp32_modules", None))
    model = check_loaded(lambda: model_class.from_pretrained(path, **options, **kwargs), what)
    check_finite(model, what)
    return model


def check_part(
    model_class: type[ModelMixin], path: Path, what: str, variant: str | None = None
) -> nn.Module:
    """The diffusers model in a folder on the meta device, after all checks that need no weights in
    memory. Errors as of `load_part`.
    """
    files = hub.check_weights(path, what, "diffusion_pytorch_model", variant)
    config = read_part(path / "config.json")
    if config.get("quantization_config") is not None:
        raise ValueError(f"{what} is quantised: load the weights that it was made of.")
    side = config.get("pos_embed_max_size") or config.get("sample_size")
    # a table of its square is made
    if "patch_size" in config and isinstance(side, int) and side > _MAX_SIDE:
        raise ValueError(
            f"the configuration of {what} cannot be used: a side of {side} is more than"
            f" {_MAX_SIDE}."
        )

    def build() -> nn.Module:
        check_types(model_class, config)
        return model_class.from_config(model_class.load_config(path))

    return check_fit(build, files, what)


def remove_weights(folder: str | os.PathLike, variant: str | None) -> None:
    """Remove a variant's weights from a folder before it is saved there anew.

    Both libraries leave the old index beside a new single file, or the old file beside new shards,
    and would then read what is old."""
    if not os.path.isdir(folder):
        return
    dotted = f".{re.escape(variant)}" if variant else ""
    shard, index = r"(-\d{5}-of-\d{5})?\.safetensors", rf"\.safetensors\.index{dotted}\.json"
    for file in os.listdir(folder):
        if re.fullmatch(rf"(model|diffusion_pytorch_model)({dotted}{shard}|{index})", file):
            os.remove(os.path.join(folder, file))


def _precision(model: ModelMixin) -> torch.dtype:
    """The narrowest floating-point type of a model's weights, LoRA layers aside: some models keep a
    few layers in float32.
    """
    weights = (
        value
        for name, value in model.state_dict().items()
        if ".lora_" not in name and value.is_floating_point()
    )
    return min(
        {value.dtype for value in weights},
        key=lambda dtype: (dtype.itemsize, str(dtype)),
        default=torch.float32,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def type_key(dtype: torch.dtype) -> str:
    """The entry of a reference that has the hash of the weights in a type."""
    return f"sha256_{_name(dtype)}"
