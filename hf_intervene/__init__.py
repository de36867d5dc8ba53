"""hf-intervene: teach a pretrained generative model to be intervened on, concept by concept, and
compose the interventions.

The method is that of Markham et al., "Intervening to learn and compose (causally) disentangled
representations", arXiv:2507.04754.

Importing the package registers its classes with transformers and diffusers: whoever imports it, in
whatever order, can load what it saved by their Auto classes and pipelines (see the ends of
`model.py` and `pipeline.py`)."""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .pretrained import bundled


# The command `hf-intervene` checks names and words before it imports torch, which takes seconds.
if TYPE_CHECKING or [Path(word).stem for word in sys.argv[:1]] != ["hf-intervene"]:
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
else:

    def __getattr__(name: str) -> Any:
        """The public names, for code that a command runs (PEP 562)."""
        if name in __all__:
            modules = ("attaching", "bases", "contexts", "modeling_intervention", "model")
            for module in (*modules, "pipeline", "pipeline_support"):
                found = getattr(import_module(f".{module}", __name__), name, None)
                if found is not None:
                    return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
