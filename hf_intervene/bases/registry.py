"""Which base family a pretrained model belongs to, by its class or by the name of its class."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import diffusers
from diffusers.models.modeling_utils import ModelMixin

from .base import Base


_REGISTRY: dict[type[ModelMixin], type[Base]] = {}
# The family of those whose adapter has a recording, once it is imported.
_RECORDED: list[type[Base]] = []


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
        ValueError: an option that the family does not have.
    """
    family = type(model) if isinstance(model, Base) else base_family(model)
    known = () if isinstance(model, Base) else inspect.signature(family).parameters
    if wrong := [name for name in options if name not in known]:
        raise ValueError(f"a {type(model).__name__} takes no {wrong[0]}: leave it out.")
    return model if isinstance(model, Base) else family(model, **options)


def base_family(model: ModelMixin, adapter: Mapping[str, Any] | None = None) -> type[Base]:
    """The family of a model: that of recorded pipelines if the configuration of its adapter has a
    recording, otherwise the one registered for its class. Raises as `wrap_base`."""
    if adapter is not None and adapter.get("recording") is not None:
        return _RECORDED[0]
    for model_class in type(model).__mro__:
        if model_class in _REGISTRY:
            return _REGISTRY[model_class]
    check_compiled(model)
    raise TypeError(
        f"no base is registered for {type(model).__name__}; the supported classes are {_names()}."
        " For the denoiser of a pipeline use PipelineBase.from_pipeline(pipe); register another"
        " class with hf_intervene.bases.register_base."
    )


def check_compiled(model: Any) -> None:
    """Raise a TypeError for what `torch.compile` returns, which is of a class of its own."""
    if hasattr(model, "_orig_mod"):
        name = type(model._orig_mod).__name__
        raise TypeError(
            f"torch.compile has made a compiled copy of a {name}, which is none itself: compile it"
            " in place, with its method compile()."
        )


def register_recorded(base_class: type[Base]) -> type[Base]:
    """Class decorator: the decorated `Base` is the family of models whose adapter has a recording."""  # noqa: E501
    _RECORDED[:] = [base_class]
    return base_class


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
