"""How a head meets a pretrained model: the protocol every base family implements, and the registry that finds the family.

    pixels (B, C, H, W) in [0, 1] --encode--> features (B, feature_width)
    embedding (B, *embedding_shape) --decode--> decoded --to_pixels--> pixels (B, C, H, W) in [0, 1]

A third party adds a family without touching this package:

    @register_base(MyAutoencoder)
    class MyBase(Base):
        ...
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .. import hub
from ..modeling_intervention import check_loaded


class Base(nn.Module):
    """A pretrained model as a head sees it. Sub-classes set `feature_width` and `embedding_shape` and implement the five methods.

    Args:
        model: the pretrained diffusers model; it is used and trained in place.
    """

    feature_width: int  # width of the encoder features the head's posterior reads
    embedding_shape: tuple[int, ...]  # what `decode` takes, without the batch dimension
    image_shape: tuple[int, int, int]  # (C, H, W)
    adapter: ModelMixin | None  # a network of the family's own between head and model, trained and saved with the head
    adapter_class: type[ModelMixin] | None = None  # its class; the constructor then takes it as `adapter=`

    def __init__(self, model: ModelMixin):
        super().__init__()
        self.model, self.adapter = model, None

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Features (B, feature_width) of images (B, C, H, W) in [0, 1]."""
        raise NotImplementedError

    def posterior(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The base's own q(z | x), for the ablations without a head: mean and log-variance, each (B, *embedding_shape)."""
        raise NotImplementedError

    def decode(self, embedding: torch.Tensor) -> torch.Tensor:
        """Parameters of p(x | e), (B, C, H, W), from an embedding (B, *embedding_shape)."""
        raise NotImplementedError

    def reconstruction_loss(self, decoded: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """-log p(x | e) of each image in nats, shape (B,)."""
        raise NotImplementedError

    def to_pixels(self, decoded: torch.Tensor) -> torch.Tensor:
        """The mean image of p(x | e), (B, C, H, W) in [0, 1]."""
        raise NotImplementedError

    def encoder_modules(self) -> Iterable[nn.Module]:
        """The modules of the encoder, which no sample from the prior passes."""
        return ()

    def freeze_unused(self) -> None:
        """Take the weights that a head replaces (the base's own posterior) out of training."""

    def trainable(self, flag: bool) -> None:
        """Make the weights of the pretrained model that a head uses trainable, or freeze them all. An adapter stays trainable."""
        self.model.requires_grad_(flag)
        self.freeze_unused()


_REGISTRY: dict[type[ModelMixin], type[Base]] = {}


def register_base(model_class: type[ModelMixin]) -> Callable[[type[Base]], type[Base]]:
    """Class decorator: use the decorated `Base` for `model_class` and its sub-classes."""

    def register(base_class: type[Base]) -> type[Base]:
        _REGISTRY[model_class] = base_class
        return base_class

    return register


def wrap_base(model: ModelMixin | Base, **options) -> Base:
    """Wrap a pretrained model in the base family registered for its class (the nearest in its method resolution order).

    Args:
        model: the model; a `Base` is returned as it is.
        **options: of the family, such as `sample_size` and `adapter` of `AutoencoderBase`.

    Raises:
        TypeError: no family is registered for the class; the message names the registered ones.
    """
    return model if isinstance(model, Base) else base_family(model)(model, **options)


def base_family(model: ModelMixin) -> type[Base]:
    """The family registered for a model's class. Raises as `wrap_base`."""
    for model_class in type(model).__mro__:
        if model_class in _REGISTRY:
            return _REGISTRY[model_class]
    raise TypeError(
        f"no base is registered for {type(model).__name__}; the supported classes are {_names()}. "
        "Register another one with hf_intervene.bases.register_base."
    )


def load_model_config(folder: Path) -> dict | None:
    """The configuration of a saved diffusers model of any class, or `None` if there is none."""
    file = folder / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError as error:
        raise OSError(f"{file} is not valid JSON: {error}.") from error
    return found if "_class_name" in found else None


def base_folder(name_or_path: str | os.PathLike, subfolder: str | None = None, **options) -> Path:
    """The folder of a saved diffusers model, from a folder or the Hub: of a repository, its files alone. See `hub.folder`."""
    weights = "diffusion_pytorch_model"
    files = ("config.json", f"{weights}.safetensors", f"{weights}-*-of-*.safetensors", f"{weights}.safetensors.index.json")
    path = hub.folder(name_or_path, [f"{subfolder}/{file}" if subfolder else file for file in files], **options)
    return path / (subfolder or "")


def load_base(name_or_path: str | os.PathLike, sample_size: int, subfolder: str | None = None) -> Base:
    """Load a pretrained model of any registered class, from a folder or the Hub, and wrap it for images of `sample_size` pixels.

    Raises:
        OSError, ValueError: one sentence: nothing there, a class that is not registered, another image size.
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
    return family(model) if family.adapter_class is None else family(model, sample_size=sample_size)


def load_part(model_class: type[ModelMixin], path: Path, what: str, **kwargs) -> ModelMixin:
    """Load a diffusers model from a folder, strictly: safetensors only, and weights that fit its configuration."""
    hub.check_weights(path, what)
    options = {"use_safetensors": True, "low_cpu_mem_usage": False, "output_loading_info": True}
    return check_loaded(lambda: model_class.from_pretrained(path, **options, **kwargs), what)


def weight_hash(model: nn.Module) -> str:
    """SHA-256 of a model's weights: their names, types and bytes; LoRA layers on it are passed over."""
    weights = {name.replace(".base_layer.", "."): v for name, v in model.state_dict().items() if ".lora_" not in name}
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def model_class_named(name: str) -> type[ModelMixin]:
    """The registered model class of a name, as stored in a saved base's `_class_name`.

    Raises:
        ValueError: no registered class has that name. Nothing is imported by name, so a checkpoint cannot choose what code runs.
    """
    for model_class in _REGISTRY:
        if model_class.__name__ == name:
            return model_class
    raise ValueError(f"the base is a {name!r}, which is not registered; the supported classes are {_names()}.")


def _names() -> str:
    return ", ".join(sorted(model_class.__name__ for model_class in _REGISTRY))
