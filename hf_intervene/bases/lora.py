"""LoRA adapters of PEFT on a base: added in place, saved in PEFT's own format, merged for those who
want a plain model.
"""

import copy
import os
from pathlib import Path

import torch
from diffusers.models.modeling_utils import ModelMixin
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..hub import check_weights, read_config


# Settings of a LoraConfig by which its layers would compute something else.
_OTHERWISE: tuple[str, ...] = (
    "use_rslora",
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "rank_pattern",
    "alpha_pattern",
    "bias",
    "lora_bias",
)
_OTHERWISE += (
    "fan_in_fan_out",
    "modules_to_save",
    "layers_to_transform",
    "target_parameters",
    "trainable_token_indices",
)
PREFIX = "base_model.model."  # of the names in a file that PeftModel.from_pretrained reads


def add_lora(model: ModelMixin, rank: int) -> None:
    """Add LoRA layers of a rank to the linear maps and convolutions of a model; everything else of
    it is frozen.

    Layers that are frozen already, those that a head does not use (`Base.freeze_unused`), get none.
    Nor do convolutions with groups, dilation or another padding than zeros: what PEFT adds to them
    cannot be merged.

    Raises:
        ValueError: one sentence: there is no layer left to add any to.
    """
    kinds = (nn.Linear, nn.Conv2d)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, kinds)}
    names = [name for name, m in layers.items() if m.weight.requires_grad and _is_plain(m)]
    if not names:
        raise ValueError(
            f"this {type(model).__name__} has no linear map or convolution that is not frozen: thaw"
            " it before adding LoRA (trainable(True))."
        )
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
    inject_adapter_in_model(config, model)
    model.peft_config = {"default": config}


def _is_plain(layer: nn.Module) -> bool:
    if not isinstance(layer, nn.Conv2d):
        return True
    return layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"


def has_lora(model: nn.Module) -> bool:
    """Whether a model carries LoRA layers."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def lora_rank(model: ModelMixin) -> int:
    return model.peft_config["default"].r


def save_lora(model: ModelMixin, folder: str | os.PathLike) -> None:
    """Save the LoRA layers alone; `peft.PeftModel.from_pretrained(model, folder)` reads them."""
    os.makedirs(folder, exist_ok=True)
    weights = {
        PREFIX + name: value.contiguous()
        for name, value in get_peft_model_state_dict(model).items()
    }
    save_file(weights, os.path.join(folder, "adapter_model.safetensors"), metadata={"format": "pt"})
    model.peft_config["default"].save_pretrained(folder)


def load_lora(model: ModelMixin, folder: Path, what: str) -> None:
    """Add saved LoRA layers to a model, in place.

    Raises:
        OSError, ValueError: one sentence: there are none, they are pickled or cannot be read; the
            model is left as it was.
    """
    config, saved = read_lora(folder, what)
    try:
        model.peft_config = PeftModel.from_pretrained(model, folder, config=config).peft_config
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"{what} does not fit the base: {' '.join(str(error).split())[:300]}"
        ) from error
    missing = get_peft_model_state_dict(model).keys() - {
        name.removeprefix(PREFIX) for name in saved
    }
    if missing:  # PEFT only warns
        raise OSError(
            f"{what} does not fit the base: weights of {', '.join(sorted(missing)[:3])} are"
            " missing; fetch it again."
        )


def read_lora(folder: Path, what: str) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """Configuration and weights of saved LoRA layers. Errors as of `load_lora`."""
    check_weights(folder, what, "adapter_model")
    file = folder / "adapter_model.safetensors"
    if not file.is_file():  # PEFT would go on to a pickle file, then to the Hub, with a token
        raise OSError(f"{what} is in shards, which PEFT does not read: {file} is missing.")
    try:
        saved = load_file(file)  # PEFT reads them after it has changed the model
    except SafetensorError as error:
        raise OSError(
            f"{what} cannot be read: its weights are truncated or corrupt; fetch it again."
        ) from error
    return _saved_config(folder, saved, what), saved


def _saved_config(folder: Path, saved: dict[str, torch.Tensor], what: str) -> LoraConfig:
    """The configuration of saved LoRA layers as far as `add_lora` makes one. PEFT would follow it
    further: to modules it imports, to patterns it searches for, to ranks that no weights are there
    for."""
    file = folder / "adapter_config.json"
    found = read_config(file)
    rank, alpha, names = found.get("r"), found.get("lora_alpha"), found.get("target_modules")
    ranks = {value.shape[0] for name, value in saved.items() if ".lora_A." in name and value.ndim}
    listed = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    more = [key for key in _OTHERWISE if found.get(key) not in (None, False, "none", [], {})]
    if (
        more
        or found.get("peft_type") != "LORA"
        or not listed
        or type(rank) is not int
        or ranks != {rank}
        or type(alpha) is not int
    ):
        raise ValueError(
            f"{file} is no configuration of {what}: it is corrupt, or was not saved by this"
            " package."
        )
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=names)


def merged(model: ModelMixin) -> ModelMixin:
    """A copy of a model with its LoRA layers merged into the weights: a plain diffusers model;
    without LoRA, the model itself.
    """
    if not has_lora(model):
        return model
    model = copy.deepcopy(model)
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]:
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    del model.peft_config
    return model


__all__ = ["add_lora", "has_lora", "merged"]
