"""Configuration of the intervention head (METHOD section 2; arXiv:2507.04754)."""

import os
import re
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from .contexts import validate_concepts
from .hub import MAX_SIZE


INTERVENTIONS = ("perfect", "soft")
MECHANISMS = ("flow", "mlp")
NORMS = ("layer", "batch", "none")
POSTERIORS = ("whitened", "centered", "conditional", "unconditional")
CENTERED = ("whitened", "centered")  # the means of z over the training contexts are taken out
ABLATIONS = (None, "base", "base-pooled", "head-pooled")
DTYPES = ("float32", "float16", "bfloat16", "float64")
MAX_DEPTH = 1000  # paths and layers: more than any head has, and few enough to be followed
_KEPT = (
    "model_type",
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_commit_hash",
)
# What a reference must hold, and how: it may come from somebody else, and names files, revisions
# and classes.
_REFERENCE = {
    "class_name": r"[A-Za-z_]\w*",
    "name_or_path": r"[^\x00-\x1f]+",
    "subfolder": r"(?!.*\.\.)[\w.-]+(/[\w.-]+)*",
    "revision": r"(?!.*\.\.)[\w.-]+(/[\w.-]+)*",
    "variant": r"\w[\w.-]*",
    "dtype": "|".join(DTYPES),
    "sha256": r"[0-9a-f]{64}",
}

# Of saved configurations. It is raised when a package that knows only the former one would misread
# a new configuration: a field that changes what is computed, other weights, another meaning.
# Versions before the first one that was written down count as 0.
FORMAT_VERSION = 2
# EARLIER[v]: what fields that a configuration of format v does not have stood for then, where that
# is not today's default.
EARLIER: tuple[dict[str, Any], ...] = ({"initial_posterior_std": 1.0}, {"mechanism": "mlp"})


@strict
class InterventionConfig(PreTrainedConfig):
    r"""
    Args:
        concepts: names of the `d` concepts, in block order. Each had a context of its own in the
            training data.
        free_blocks: `f`, number of further blocks that are never intervened on, for nuisance
            factors. D = d + f.
        noise_width: width of each block of the exogenous noise `z`, shape (batch, D, noise_width).
        concept_width: width of each block of the concepts `c`, shape (batch, D, concept_width).
        mechanism: how each concept comes about (see `modeling_intervention.py`): `"flow"`,
            invertible, with one posterior q(c | x) for all contexts; or `"mlp"`, the paper's. What
            is said of `"mlp"` below has no effect with flows.
        flow_depth, flow_width: couplings of each flow, and the width of their networks and of the
            message from a block's causes (see `flow.py`).
        concept_edges: `"flow"`: whether concepts may depend on free blocks and on the concepts
            before them, in the order that `OrderedInterventionLayer.order` says. Set it where
            concepts cause each other; where they do not, edges that are there all the same are cut
            by an intervention, and tell the decoder of it.
        depth: `"mlp"`: number of (linear, norm, GELU) layers of each block's expressive MLP.
        norm: normalisation inside the expressive layers: `"layer"` (over each block's own units),
            `"batch"` (the paper's) or `"none"`.
        intervention: `"perfect"` cuts all incoming edges of an intervened concept, `"soft"` keeps
            them.
        propagation_steps: 1: the reduced form of the paper; k > 1: the structural form, one W for
            all contexts, effects followed along directed paths of up to k edges (see
            `InterventionLayer`).
        intervention_rank: rank of the weights among concepts, for many of them: the intervention
            layer's cost is then linear in D (see `LowRankInterventionLayer`); `None`: full
            matrices.
        posterior: `"centered"`: q(z | x, s), the encoder is told the targets, and the mean of z
            over each training context is taken out (see `InterventionHead.center_posterior`);
            `"conditional"`: told the targets only; `"unconditional"`: q(z | x), the paper's;
            `"whitened"`: its covariance is taken out too, of models of version 0.1 (see
            `posterior.py`).
        initial_posterior_std: about the standard deviation of q(z | x, s) before training: the
            posterior starts out sure of what it says, and the decoder has something to learn from;
            1 starts at the prior.
        feature_width: width of the encoder features, shape (batch, feature_width), that the
            posterior reads.
        embedding_shape: shape of one sample's representation `e`: what the decoder takes.
        initializer_range: standard deviation of the initial W_obs and W_int.
        ablation: `None`, or what a model that embeds the head leaves out (METHOD section 3):
            `"base"` and `"base-pooled"` have no head, `"head-pooled"` ignores the context.
        base_reference: the pretrained model that a head was added to: `class_name`, `name_or_path`,
            `subfolder`, `revision`, `variant`, its `dtype` then, and the `sha256` of its weights,
            as they were and cast to the types of half precision (see `bases/loading.py`); `None`
            for a base that was made anew.
        companion_references: the same of the frozen models beside a denoiser, by name: `vae` and
            `image_encoder`.
        lora_rank: rank of the LoRA layers that were trained on the base; 0: none.
        format_version: of the configuration as it is saved; see `from_dict`.
    """

    model_type = "intervention"

    concepts: list[str] | tuple[str, ...] = ("concept",)
    free_blocks: int = 1
    noise_width: int = 32
    concept_width: int = 8
    mechanism: str = "mlp"
    flow_depth: int = 4
    flow_width: int = 32
    concept_edges: bool = False
    depth: int = 2
    norm: str = "layer"
    intervention: str = "perfect"
    propagation_steps: int = 3
    intervention_rank: int | None = None
    posterior: str = "centered"
    initial_posterior_std: float = 0.25
    feature_width: int = 128
    embedding_shape: list[int] | tuple[int, ...] = (128,)
    initializer_range: float = 0.02
    ablation: str | None = None
    base_reference: dict[str, str | None] | None = None
    companion_references: dict[str, dict[str, str | None]] | None = None
    lora_rank: int = 0
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs: Any) -> None:
        self.concepts = list(validate_concepts(self.concepts))
        self.embedding_shape = list(self.embedding_shape)
        for name, least, most in (
            ("free_blocks", 0, MAX_SIZE),
            ("noise_width", 1, MAX_SIZE),
            ("concept_width", 1, MAX_SIZE),
            ("depth", 1, MAX_DEPTH),
            ("flow_depth", 0, MAX_DEPTH),
            ("flow_width", 1, MAX_SIZE),
            ("propagation_steps", 1, MAX_DEPTH),
            ("feature_width", 1, MAX_SIZE),
            ("lora_rank", 0, MAX_SIZE),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}.")
            if getattr(self, name) > most:
                raise ValueError(f"{name} must be at most {most}, not {getattr(self, name)}.")
        rank = self.intervention_rank
        if rank is not None and not 1 <= rank <= MAX_SIZE:
            raise ValueError(
                f"intervention_rank must lie between 1 and {MAX_SIZE}, or be None for full"
                f" matrices, not {rank}."
            )
        if not 0 < self.initial_posterior_std <= 1:
            raise ValueError(
                f"initial_posterior_std must lie in (0, 1], not {self.initial_posterior_std}."
            )
        if (
            not self.embedding_shape
            or min(self.embedding_shape) < 1
            or max(self.embedding_shape) > MAX_SIZE
        ):
            raise ValueError(
                f"embedding_shape must hold positive sizes of at most {MAX_SIZE}, not"
                f" {self.embedding_shape}."
            )
        references = {"base_reference": self.base_reference} | (self.companion_references or {})
        for name, reference in references.items():
            if reference is not None:
                _check_reference(name, reference)
        for name, choices in (
            ("mechanism", MECHANISMS),
            ("norm", NORMS),
            ("intervention", INTERVENTIONS),
            ("posterior", POSTERIORS),
            ("ablation", ABLATIONS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(str, choices))}, not"
                    f" {getattr(self, name)!r}."
                )
        if self.mechanism == "flow":
            # An invertible map keeps the width; one entry more says whether a concept is there by
            # itself.
            self.noise_width, self.posterior = self.concept_width + 1, "unconditional"
            if self.intervention != "perfect" or rank is not None:
                raise ValueError(
                    'mechanism="flow" has perfect interventions and full matrices: choose'
                    ' mechanism="mlp" for others.'
                )
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers; another model's configuration is not taken for one of this class,
        with its defaults.

        Raises:
            OSError, ValueError: one sentence: it is no JSON object, or not an intervention model's.
        """
        try:
            found, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
            is_ours = found.get("model_type") == cls.model_type
        except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise OSError(
                f"the configuration of {pretrained_model_name_or_path} is no valid JSON object: it"
                " is truncated or corrupt; fetch it again."
            ) from error
        if not is_ours:
            raise ValueError(
                f"{pretrained_model_name_or_path} is not an intervention model: it has no"
                f" config.json with the model_type {cls.model_type!r} (a pipeline is loaded with"
                " InterventionPipeline.from_pretrained)."
            )
        # Nothing else is taken over: of what transformers knows to do by a configuration, a head
        # needs nothing.
        return {
            key: value for key, value in found.items() if key in {*cls.__annotations__, *_KEPT}
        }, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "InterventionConfig":
        """As in transformers; a configuration that an earlier version of this package saved has the
        meaning that it had then.

        Raises:
            ValueError: one sentence: a later version saved it, an entry of another type, or what
                cannot be.
        """
        config_dict = _of_today(config_dict)
        for name in ("dtype", "torch_dtype"):
            if config_dict.get(name) not in (None, *DTYPES):
                raise ValueError(
                    f"{name} of a configuration must be one of {', '.join(DTYPES)}, not"
                    f" {config_dict[name]!r}."
                )
        try:
            return super().from_dict(config_dict, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(
                "a configuration has an entry of a wrong type:"
                f" {str(error).splitlines()[-1].strip()}."
            ) from error

    @property
    def num_blocks(self) -> int:
        """D = d + f."""
        return len(self.concepts) + self.free_blocks


def _of_today(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved configuration in the format of today."""
    version = saved.get("format_version", 0)
    if not isinstance(version, int) or version < 0:
        raise ValueError(f"format_version must be a whole number, not {version!r}.")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"the configuration has the format {version}, and this hf-intervene knows those up to"
            f" {FORMAT_VERSION}: a later one saved it; upgrade with `pip install --upgrade"
            " hf-intervene`."
        )
    then = {name: value for fields in reversed(EARLIER[version:]) for name, value in fields.items()}
    found = then | saved | {"format_version": FORMAT_VERSION}
    reference = found.get("base_reference")
    if (
        isinstance(reference, dict) and "dtype" not in reference
    ):  # the first references, all of models in float32
        found["base_reference"] = reference | {
            "variant": None,
            "dtype": "float32",
            "hash": "running",
        }
    return found


def _check_reference(name: str, reference: dict[str, str | None]) -> None:
    for key, pattern in _REFERENCE.items():
        value = reference.get(key, "")
        if value is None and key in ("subfolder", "revision", "variant"):
            continue
        if value is None or not re.fullmatch(pattern, value):
            raise ValueError(
                f"{name} of a configuration must hold a {key}, and not {value!r}: it is corrupt, or"
                " made to do harm."
            )


# The head's code travels with every checkpoint, for AutoModel.from_pretrained(...,
# trust_remote_code=True) without this package.
InterventionConfig.register_for_auto_class()

__all__ = ["InterventionConfig"]
