"""How a head meets a pretrained model: the protocol every base family implements, and the registry
that finds the family.

    pixels (B, C, H, W) in [0, 1] --encode--> features (B, feature_width)
    embedding (B, *embedding_shape) --decode--> decoded --to_pixels--> pixels (B, C, H, W) in [0, 1]

A third party adds a family without touching this package:

    @register_base(MyAutoencoder)
    class MyBase(Base):
        ...
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import diffusers
import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


class Base(nn.Module):
    """A pretrained model as a head sees it. Sub-classes set `feature_width`, `embedding_shape` and
    `image_shape` and implement the methods.

    Head and model may be in different precisions: `encode` and `decode` cast what they are given to
    the model's.

    Args:
        model: the pretrained diffusers model; it is used and trained in place.
    """

    feature_width: int  # width of the encoder features the head's posterior reads
    embedding_shape: tuple[int, ...]  # what `decode` takes, without the batch dimension
    image_shape: tuple[int, int, int]  # (C, H, W)
    adapter: (
        ModelMixin | None
    )  # a network of the family's own between head and model, trained and saved with the head
    adapter_class: type[ModelMixin] | None = (
        None  # its class; the constructor then takes it as `adapter=`
    )
    companion_names: tuple[str, ...] = ()  # of the family's `companions`
    residual_shape: tuple[int, ...] | None = (
        None  # of one sample's noise beside z: of residual latents (residual.py), of a denoiser
    )
    denoises = (
        False  # whether it is a denoiser, with a loss and a decoder of its own (see diffusion.py)
    )

    def __init__(self, model: ModelMixin):
        super().__init__()
        self.model, self.adapter = model, None
        self.under_head = True  # the ablations without a head use the base's own posterior

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Features (B, feature_width) of images (B, C, H, W) in [0, 1]."""
        raise NotImplementedError

    def posterior(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The base's own q(z | x), for the ablations without a head: mean and log-variance, each
        (B, *embedding_shape).
        """
        raise NotImplementedError

    def decode(self, embedding: torch.Tensor) -> torch.Tensor:
        """Parameters of p(x | e), (B, C, H, W), from an embedding (B, *embedding_shape)."""
        raise NotImplementedError

    def reconstruction_loss(
        self, decoded: torch.Tensor, pixel_values: torch.Tensor
    ) -> torch.Tensor:
        """-log p(x | e) of each image in nats, shape (B,)."""
        raise NotImplementedError

    def to_pixels(self, decoded: torch.Tensor) -> torch.Tensor:
        """The mean image of p(x | e), (B, C, H, W) in [0, 1]."""
        raise NotImplementedError

    # Only of bases with residual latents; their `decode` takes residual noise, (B,
    # *residual_shape), as a second argument.

    def encode_latents(
        self, pixel_values: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Features (B, feature_width), latents r (B, *residual_shape) drawn from q(r | x) with
        standard normal noise of the same shape (0: the mean), and log q(r | x) in nats, (B,), of
        images (B, C, H, W) in [0, 1]: one pass of the encoder."""
        raise NotImplementedError

    def residual(
        self, latents: torch.Tensor, embedding: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual noise of latents r under an embedding, (B, *residual_shape), and log p(r |
        c) in nats, (B,).
        """
        raise NotImplementedError

    def residual_noise(self, latents: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """The first of what `residual` returns."""
        return self.residual(latents, embedding)[0]

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Parameters of p(x | r), (B, C, H, W), of latents r (B, *residual_shape)."""
        raise NotImplementedError

    def residual_reconstruction_loss(
        self, decoded: torch.Tensor, pixel_values: torch.Tensor
    ) -> torch.Tensor:
        """-log p(x | r) of each image in nats, (B,)."""
        raise NotImplementedError

    # Only of denoisers, which see images at many levels of noise (see `DiffusionBase`).

    def prepare(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the frozen parts make of images (B, C, H, W) in [0, 1]: `x0`, (B, *residual_shape),
        what is denoised, and whatever `features` needs."""
        raise NotImplementedError

    def features(self, prepared: dict[str, torch.Tensor]) -> torch.Tensor:
        """Features (B, feature_width) of prepared images."""
        raise NotImplementedError

    def denoising_loss(
        self,
        embedding: torch.Tensor,
        x0: torch.Tensor,
        noise: torch.Tensor,
        time: torch.Tensor,
        prompts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Loss of each image in place of -log p(x | e), (B,), of x_0 and noise (B, *residual_shape)
        at times (B,) in [0, 1). `prompts`: of a family whose images have their own, the number of
        each, (B,) int64."""
        raise NotImplementedError

    # Of any base

    def companions(self) -> dict[str, Any]:
        """Frozen models, schedulers and processors that it needs beside the model, by the
        constructor's names for them.
        """
        return {}

    def companion_models(self) -> dict[str, nn.Module]:
        """Those of the `companions` that are models."""
        return {
            name: part for name, part in self.companions().items() if isinstance(part, nn.Module)
        }

    def encoder_modules(self) -> Iterable[nn.Module]:
        """The modules of the encoder, which no sample from the prior passes."""
        return ()

    def freeze_unused(self) -> None:
        """Take the weights that a head replaces (the base's own posterior) out of training."""

    def trainable(self, flag: bool) -> None:
        """Make the weights of the pretrained model trainable that are in use, or freeze them all.
        An adapter stays trainable.
        """
        self.model.requires_grad_(flag)
        if self.under_head:
            self.freeze_unused()


_REGISTRY: dict[type[ModelMixin], type[Base]] = {}
_RECORDED: list[
    type[Base]
] = []  # the family of those whose adapter has a recording, once it is imported


def register_base(model_class: type[ModelMixin]) -> Callable[[type[Base]], type[Base]]:
    """Class decorator: use the decorated `Base` for `model_class` and its sub-classes."""

    def register(base_class: type[Base]) -> type[Base]:
        _REGISTRY[model_class] = base_class
        return base_class

    return register


def wrap_base(model: ModelMixin | Base, **options: Any) -> Base:
    """Wrap a pretrained model in the base family registered for its class (the nearest in its
    method resolution order).

    Args:
        model: the model; a `Base` is returned as it is.
        **options: of the family, such as `sample_size` and `adapter` of `AutoencoderBase`.

    Raises:
        TypeError: no family is registered for the class; the message names the registered ones.
    """
    return model if isinstance(model, Base) else base_family(model)(model, **options)


def base_family(model: ModelMixin, adapter: Mapping[str, Any] | None = None) -> type[Base]:
    """The family of a model: that of recorded pipelines if the configuration of its adapter has a
    recording, otherwise the one registered for its class. Raises as `wrap_base`."""
    if adapter is not None and adapter.get("recording") is not None:
        return _RECORDED[0]
    for model_class in type(model).__mro__:
        if model_class in _REGISTRY:
            return _REGISTRY[model_class]
    raise TypeError(
        f"no base is registered for {type(model).__name__}; the supported classes are {_names()}."
        " For the denoiser of a pipeline use PipelineBase.from_pipeline(pipe); register another"
        " class with hf_intervene.bases.register_base."
    )


def register_recorded(base_class: type[Base]) -> type[Base]:
    """Class decorator: the decorated `Base` is the family of models whose adapter has a recording."""  # noqa: E501
    _RECORDED[:] = [base_class]
    return base_class


def plain(value: Any) -> Any:
    """A value as configurations keep it: tuples as lists."""
    return list(value) if isinstance(value, (list, tuple)) else value


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a model by their names without LoRA layers on it."""
    return {
        name.replace(".base_layer.", "."): v
        for name, v in model.state_dict().items()
        if ".lora_" not in name
    }


def weight_hash(model: nn.Module, dtype: torch.dtype | None = None) -> str:
    """SHA-256 of a model's weights: the digests of their names, types, shapes and bytes; LoRA
    layers on it are passed over.

    Args:
        model: the model.
        dtype: type that floating-point weights are cast to first; `None`: as they are.
    """
    weights = base_weights(model)

    def digest(name: str) -> bytes:
        value = weights[name].detach()
        if dtype is not None and value.is_floating_point():
            value = value.to(dtype)
        found = hashlib.sha256(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return found.digest()

    with (
        ThreadPoolExecutor() as pool
    ):  # hashlib lets go of the GIL; the order is that of the names, whoever is done first
        return hashlib.sha256(b"".join(pool.map(digest, sorted(weights)))).hexdigest()


def running_hash(model: nn.Module) -> str:
    """SHA-256 of a model's weights one after the other, as the first references have it (`hash` in
    them is `"running"`).
    """
    found = hashlib.sha256()
    for name, value in sorted(base_weights(model).items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def model_class_named(name: str | None) -> type[ModelMixin]:
    """The model class of a name, as stored in a saved model's `_class_name`: a registered one, one
    of diffusers, or one that has been imported already.

    Raises:
        ValueError: there is none. Nothing is imported by name, so a checkpoint cannot choose what
            code runs.
    """
    of_diffusers: Any = getattr(diffusers, str(name), None)
    known: list[type[ModelMixin]] = [
        *_REGISTRY,
        *([of_diffusers] if _is_model(of_diffusers) else []),
        *_imported(ModelMixin),
    ]
    for model_class in known:
        if model_class.__name__ == name:
            return model_class
    raise ValueError(
        f"the base is a {name!r}, which is not registered and no model of diffusers: import its"
        f" class first; the registered classes are {_names()}."
    )


def registered_family(name: str | None) -> type[Base] | None:
    """The family registered for the class of a name, if there is one."""
    return next(
        (family for model_class, family in _REGISTRY.items() if model_class.__name__ == name), None
    )


def _is_model(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, ModelMixin)


def _imported(model_class: type[ModelMixin]) -> Iterator[type[ModelMixin]]:
    """The sub-classes of a class that there are in this process."""
    for found in model_class.__subclasses__():
        yield found
        yield from _imported(found)


def _names() -> str:
    return ", ".join(sorted(model_class.__name__ for model_class in _REGISTRY))
