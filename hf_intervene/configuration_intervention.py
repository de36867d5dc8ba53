"""Configuration of the intervention head (METHOD section 2; arXiv:2507.04754)."""

import os
import re
from math import inf
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
CENTERED = ("whitened", "centered")  # the mean of z over each training context is subtracted
ABLATIONS = (None, "base", "base-pooled", "head-pooled")
DTYPES = ("float32", "float16", "bfloat16", "float64")
MAX_DEPTH = 1000  # of paths and layers: more than any head has, and few enough to compute
_KEPT = (
    "model_type",
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_commit_hash",
)
# The entries of a reference, and what each must look like. A reference may come from a stranger,
# and names files, revisions and classes.
_REFERENCE = {
    "class_name": r"[A-Za-z_]\w*",
    "name_or_path": r"[^\x00-\x1f]+",
    "subfolder": r"(?!.*\.\.)[\w.-]+(/[\w.-]+)*",
    "revision": r"(?!.*\.\.)[\w.-]+(/[\w.-]+)*",
    "variant": r"\w[\w.-]*",
    "dtype": "|".join(DTYPES),
    "sha256": r"[0-9a-f]{64}",
}

# The version of saved configurations. It goes up by one when a package that knows only the former
# version would misread a new configuration: a field changes what is computed, the weights differ,
# or an entry has another meaning. A configuration without a version counts as 0.
FORMAT_VERSION = 3
# EARLIER[v] holds the values of fields that a configuration of version v does not have, if today's
# default differs from what the package computed then.
EARLIER: tuple[dict[str, Any], ...] = (
    {"initial_posterior_std": 1.0},
    {"mechanism": "mlp"},
    {},
)


@strict
class InterventionConfig(PreTrainedConfig):
    r"""Configuration of an intervention head.

    Args:
        concepts: names of the `d` concepts, in block order. Each had a context of its own in the
            training data.
        free_blocks: `f`, number of further blocks that are never intervened on, for nuisance
            factors. D = d + f.
        noise_width: width of each block of the exogenous noise `z`, shape (batch, D, noise_width).
        concept_width: width of each block of the concepts `c`, shape (batch, D, concept_width).
        mechanism: how each concept is computed from its noise (see `modeling_intervention.py`).
            `"flow"` is invertible, with one posterior q(c | x) for all contexts. `"mlp"` is the
            paper's. The fields below that name `"mlp"` have no effect with flows.
        flow_depth: hidden layers of the network of each entry of a concept (see `flow.py`).
        flow_width: width of these layers, and of the message from a block's causes.
        flow_components: components of the mixture of each entry.
        concept_edges: for `"flow"`: whether concepts may depend on free blocks and on the concepts
            before them in `OrderedInterventionLayer.order`. Set it if concepts cause each other. If
            they do not, leave it off: an intervention cuts the learnt edges, and the decoder can
            tell the context from that.
        depth: for `"mlp"`: number of (linear, norm, GELU) layers of each block's expressive MLP.
        norm: normalisation inside the expressive layers: `"layer"` (over each block's own units),
            `"batch"` (the paper's) or `"none"`.
        intervention: `"perfect"` cuts all incoming edges of an intervened concept, `"soft"` keeps
            them.
        propagation_steps: 1 is the paper's reduced form. k > 1 is the structural form: one W for
            all contexts, and effects along directed paths of up to k edges (see
            `InterventionLayer`).
        intervention_rank: rank of the weights among concepts. With a rank, the cost of the
            intervention layer is linear in D (see `LowRankInterventionLayer`). `None` means full
            matrices.
        posterior: what the encoder's side computes. `"centered"`: q(z | x, s), the targets are an
            input of the encoder, and the mean of z over each training context is subtracted (see
            `InterventionHead.center_posterior`). `"conditional"`: q(z | x, s) without the
            subtraction. `"unconditional"`: q(z | x), the paper's. `"whitened"`: centered, and with
            identity covariance in each training context, for models of version 0.1 (see
            `posterior.py`).
        initial_posterior_std: approximate standard deviation of q(z | x, s) before training. With
            a small one, z carries information about the image from the first step, and the decoder
            can learn from it. 1 starts at the prior.
        feature_width: width of the encoder features, shape (batch, feature_width), that the
            posterior reads.
        embedding_shape: shape of one sample's representation `e`, the decoder's input.
        initializer_range: standard deviation of the initial W_obs and W_int.
        ablation: `None`, or the part that a model with the head leaves out (METHOD section 3):
            `"base"` and `"base-pooled"` have no head, `"head-pooled"` ignores the context.
        base_reference: the pretrained model that a head was added to: `class_name`, `name_or_path`,
            `subfolder`, `revision`, `variant`, the `dtype` of its weights when the head was added,
            and the `sha256` of its weights, in that dtype and cast to each half precision (see
            `bases/loading.py`). `None` for a base that was trained from scratch.
        companion_references: the same for the frozen models beside a denoiser, by name: `vae` and
            `image_encoder`.
        lora_rank: rank of the LoRA layers that were trained on the base; 0 means none.
        format_version: version of the saved configuration; see `from_dict`.

    Raises:
        ValueError: a field has a value that is not allowed; the message names the field.
    """

    model_type = "intervention"

    concepts: list[str] | tuple[str, ...] = ("concept",)
    free_blocks: int = 1
    noise_width: int = 32
    concept_width: int = 8
    mechanism: str = "mlp"
    flow_depth: int = 2
    flow_width: int = 128
    flow_components: int = 8
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
            ("flow_depth", 1, MAX_DEPTH),
            ("flow_width", 1, MAX_SIZE),
            ("flow_components", 1, MAX_SIZE),
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
        if not 0 <= self.initializer_range < inf:
            raise ValueError(
                f"initializer_range must be finite and not negative, not {self.initializer_range}."
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
            # An invertible map keeps the width. The one further entry is the noise of whether a
            # concept is present when nothing is intervened on.
            self.noise_width, self.posterior = self.concept_width + 1, "unconditional"
            if self.intervention != "perfect" or rank is not None:
                raise ValueError(
                    'mechanism="flow" has only perfect interventions and full matrices: choose'
                    ' mechanism="mlp" for soft interventions or intervention_rank.'
                )
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a saved configuration, as in transformers.

        The configuration of another model is refused: transformers would fill it up with defaults.

        Raises:
            OSError: the file is not a JSON object.
            ValueError: the configuration is not an intervention model's.
        """
        try:
            found, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
            is_ours = found.get("model_type") == cls.model_type
        except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise OSError(
                f"the configuration of {pretrained_model_name_or_path} is not a valid JSON object:"
                " it is truncated or corrupt; fetch it again."
            ) from error
        if not is_ours:
            raise ValueError(
                f"{pretrained_model_name_or_path} is not an intervention model: it has no"
                f" config.json with the model_type {cls.model_type!r} (a pipeline is loaded with"
                " InterventionPipeline.from_pretrained)."
            )
        # Other entries are dropped: a head needs none of the further things that transformers does
        # because a configuration says so.
        return {
            key: value for key, value in found.items() if key in {*cls.__annotations__, *_KEPT}
        }, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "InterventionConfig":
        """Make a configuration from a dict, as in transformers.

        A configuration that an earlier version of this package saved keeps the meaning that it had
        then.

        Raises:
            ValueError: a later version of this package saved it, or an entry has a wrong type or
                value.
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
    """Return a saved configuration in today's format."""
    version = saved.get("format_version", 0)
    if not isinstance(version, int) or version < 0:
        raise ValueError(f"format_version must be a whole number, not {version!r}.")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"the configuration has format {version}, and this hf-intervene reads formats up to"
            f" {FORMAT_VERSION}: a later version saved it; upgrade with `pip install --upgrade"
            " hf-intervene`."
        )
    then = {name: value for fields in reversed(EARLIER[version:]) for name, value in fields.items()}
    found = then | saved | {"format_version": FORMAT_VERSION}
    if version == 2 and found.get("mechanism") == "flow":
        raise ValueError(
            "the head has flows of format 2, affine couplings, which this hf-intervene no longer"
            " computes: train it anew, or install the commit that saved it."
        )
    reference = found.get("base_reference")
    # The first references had no dtype: their models were all in float32.
    if isinstance(reference, dict) and "dtype" not in reference:
        added = {"variant": None, "dtype": "float32", "hash": "running"}
        found["base_reference"] = reference | added
    return found


def _check_reference(name: str, reference: dict[str, str | None]) -> None:
    for key, pattern in _REFERENCE.items():
        value = reference.get(key, "")
        if value is None and key in ("subfolder", "revision", "variant"):
            continue
        if value is None or not re.fullmatch(pattern, value):
            raise ValueError(
                f"{name} of a configuration must hold a valid {key}, not {value!r}: it is"
                " corrupt, or made to do harm."
            )


# The head's code travels with every checkpoint, so that AutoModel.from_pretrained(...,
# trust_remote_code=True) loads it without this package.
InterventionConfig.register_for_auto_class()

__all__ = ["InterventionConfig"]
