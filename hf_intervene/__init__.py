"""hf-intervene: teach a pretrained generative model to be intervened on, concept by concept, and compose the interventions.

The method is that of Markham et al., "Intervening to learn and compose (causally) disentangled representations", arXiv:2507.04754.
"""

import diffusers
from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, LOADABLE_CLASSES
from transformers.models.auto import AutoConfig, AutoModel

from .attach import attach, detach, intervene
from .bases import Base, DiffusionAdapter, DiffusionBase, LatentAdapter, LightVAE, load_base, register_base, wrap_base
from .configuration_intervention import InterventionConfig
from .contexts import OBS, Quantile, context_name, parse_interventions
from .model import InterventionModel, InterventionModelOutput
from .modeling_intervention import InterventionHead, InterventionHeadOutput
from .pipeline import InterventionPipeline
from .pretrained import bundled
from .push import push_to_hub


__version__ = "0.1.0"

AutoConfig.register(InterventionConfig.model_type, InterventionConfig, exist_ok=True)
AutoModel.register(InterventionConfig, InterventionHead, exist_ok=True)
# The head's code travels with every checkpoint, for AutoModel.from_pretrained(..., trust_remote_code=True) without this package...
InterventionConfig.register_for_auto_class()
InterventionHead.register_for_auto_class("AutoModel")
# ...so it cannot know of model cards; here it learns.
InterventionHead.push_to_hub = push_to_hub  # type: ignore[method-assign, assignment]  # other arguments than transformers'
# diffusers has no registry: DiffusionPipeline.from_pretrained looks a saved pipeline's class up in its own module, and those of the
# parts by these tables; a part of another library it refuses to load from the Hub.
diffusers.InterventionPipeline = InterventionPipeline
_PARTS = {
    part.__name__: ["save_pretrained", "from_pretrained"]
    for part in (InterventionHead, DiffusionAdapter, LatentAdapter, LightVAE)
}
LOADABLE_CLASSES["hf_intervene"] = _PARTS
ALL_IMPORTABLE_CLASSES.update(_PARTS)

__all__ = [
    "OBS",
    "Base",
    "DiffusionAdapter",
    "DiffusionBase",
    "InterventionConfig",
    "InterventionHead",
    "InterventionHeadOutput",
    "InterventionModel",
    "InterventionModelOutput",
    "InterventionPipeline",
    "LatentAdapter",
    "LightVAE",
    "Quantile",
    "attach",
    "bundled",
    "context_name",
    "detach",
    "intervene",
    "load_base",
    "parse_interventions",
    "register_base",
    "wrap_base",
]
