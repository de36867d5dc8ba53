"""hf-intervene: teach a pretrained generative model to be intervened on, concept by concept, and
compose the interventions.

The method is that of Markham et al., "Intervening to learn and compose (causally) disentangled
representations", arXiv:2507.04754."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import wrapt

from .pretrained import bundled


if TYPE_CHECKING:
    from .attaching import attach, detach, intervene
    from .bases import (
        Base,
        DiffusionAdapter,
        DiffusionBase,
        Encoded,
        LatentAdapter,
        LightVAE,
        PipelineBase,
        load_base,
        register_base,
        wrap_base,
    )
    from .configuration_intervention import InterventionConfig
    from .contexts import OBS, Quantile, context_name, parse_interventions
    from .model import InterventionModel, InterventionModelOutput
    from .modeling_intervention import InterventionHead, InterventionHeadOutput
    from .pipeline import InterventionPipeline
    from .pipeline_support import Support, support

__version__ = "0.1.0"

__all__ = [
    "OBS",
    "Base",
    "DiffusionAdapter",
    "DiffusionBase",
    "Encoded",
    "InterventionConfig",
    "InterventionHead",
    "InterventionHeadOutput",
    "InterventionModel",
    "InterventionModelOutput",
    "InterventionPipeline",
    "LatentAdapter",
    "LightVAE",
    "PipelineBase",
    "Quantile",
    "Support",
    "attach",
    "bundled",
    "context_name",
    "detach",
    "intervene",
    "load_base",
    "parse_interventions",
    "register_base",
    "support",
    "wrap_base",
]

_DEFINED_IN: tuple[str, ...] = (
    "attaching",
    "bases",
    "configuration_intervention",
    "contexts",
    "model",
    "modeling_intervention",
    "pipeline",
)
_DEFINED_IN += ("pipeline_support",)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Imports make millions of objects and hardly any garbage: looking for it in between takes a
    fifth of their time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _import_all() -> None:
    """All public names, after which transformers and diffusers know every class of the package (see
    the ends of `model.py` and `pipeline.py`)."""
    modules = [import_module(f".{module}", __name__) for module in _DEFINED_IN]
    globals().update(
        {n: getattr(module, n) for n in __all__ for module in modules if hasattr(module, n)}
    )


def _make_known(_: object) -> None:
    if not any(
        f"{__name__}.{module}" in sys.modules for module in _DEFINED_IN
    ):  # or this is the import of one of them
        with _no_collection():
            _import_all()


# Whoever imports this package and transformers or diffusers, in any order, can load what it saved
# by their Auto classes and pipelines.
for _library in ("transformers", "diffusers"):
    wrapt.register_post_import_hook(_make_known, _library)


if not TYPE_CHECKING:  # or a type checker would take any name

    def __getattr__(name: str) -> Any:
        """The public names and the modules, imported when first asked for (PEP 562): torch and the
        Hugging Face libraries take seconds, which neither the command line's help nor the page has
        to wait for."""
        with _no_collection():
            if name in __all__:
                _import_all()
                return globals()[name]
            if not name.startswith("_") and find_spec(f".{name}", __name__):
                return import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
