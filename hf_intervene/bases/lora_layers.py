"""LoRA that was trained with a head, at work on a denoiser that stays as it is."""

from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from peft import get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .lora import PREFIX, read_lora


class LoraLayers(nn.Module):
    """LoRA layers beside a model: hooks of its layers add what they compute (`injection.py`).

    PEFT puts layers into the model, where they act in every call of it. These act in those calls
    alone for which a head is active. Other threads and other pipelines on the same model do not
    see them, and the model stays as it is.

    Args:
        weights: by PEFT's names, `layer.lora_A.weight` and `layer.lora_B.weight`.
        scale: factor of what they add, alpha / rank.
    """

    def __init__(self, weights: dict[str, torch.Tensor], scale: float):
        super().__init__()
        self.scale = scale
        self.names = tuple(sorted({name.rpartition(".lora_")[0] for name in weights}))
        self.down, self.up = (
            nn.ParameterList(
                nn.Parameter(weights[f"{name}.lora_{side}.weight"].detach(), False)
                for name in self.names
            )
            for side in "AB"
        )
        self._numbers = {name: number for number, name in enumerate(self.names)}

    @classmethod
    def from_folder(cls, folder: Path, what: str) -> "LoraLayers":
        """Those that were saved in a folder. Errors as of `load_lora`."""
        config, saved = read_lora(folder, what)
        weights = {name.removeprefix(PREFIX): value for name, value in saved.items()}
        return cls._checked(weights, config.lora_alpha / config.r, what)

    @classmethod
    def from_model(cls, model: ModelMixin) -> "LoraLayers":
        """Those that a model carries; the weights are shared."""
        config = model.peft_config["default"]
        weights = get_peft_model_state_dict(model)
        return cls._checked(weights, config.lora_alpha / config.r, "the LoRA of this model")

    @classmethod
    def _checked(cls, weights: dict[str, torch.Tensor], scale: float, what: str) -> "LoraLayers":
        names = {name.rpartition(".lora_")[0] for name in weights}
        if weights.keys() != {f"{name}.lora_{side}.weight" for name in names for side in "AB"}:
            raise ValueError(
                f"{what} cannot be used: its weights are not pairs of lora_A and "
                "lora_B; fetch it again."
            )
        return cls(weights, scale)

    def check_fit(self, model: nn.Module, what: str) -> None:
        """Raise a ValueError unless a model has these layers, as linear maps or convolutions, in
        these sizes."""
        for name, down, up in zip(self.names, self.down, self.up):
            try:
                layer = _plain(model.get_submodule(name))
            except AttributeError:
                layer = None
            wanted = (len(up), *down.shape[1:])
            found: tuple[int, ...] | None = None
            if isinstance(layer, nn.Linear):  # not by its weight, which may be quantised
                found = (layer.out_features, layer.in_features)
            elif isinstance(layer, nn.Conv2d):
                found = tuple(layer.weight.shape)
            if found != wanted:
                raise ValueError(
                    f"{what} does not fit this {type(model).__name__}: its {name} is missing or of "
                    "another size."
                )

    def add(
        self, name: str, module: nn.Module, x: torch.Tensor, output: torch.Tensor
    ) -> torch.Tensor:
        """Output of a layer with its LoRA.

        Args:
            name: of the layer.
            module: the layer, a linear map or a convolution.
            x: its input, (B, ..., in) or (B, in, h, w).
            output: of the same, of x.
        """
        number, layer = self._numbers[name], _plain(module)
        down, up = self.down[number], self.up[number]
        x = x.to(down)
        if isinstance(layer, nn.Conv2d):
            hidden = nn.functional.conv2d(x, down, stride=layer.stride, padding=layer.padding)
            return (output + self.scale * nn.functional.conv2d(hidden, up)).to(output.dtype)
        return (output + self.scale * nn.functional.linear(nn.functional.linear(x, down), up)).to(
            output.dtype
        )


def _plain(layer: Any) -> Any:
    """A layer without LoRA of others around it."""
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
