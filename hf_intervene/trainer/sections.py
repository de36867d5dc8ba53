"""The sections of the settings of a training run: what can be set, its default and its
checks (see `setting_checks.py`)."""

import os
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict

from ..configuration_intervention import InterventionConfig
from ..data.digits import BUNDLED
from ..data.identity import SPLITS
from ..data.schedule import SCHEDULES
from ..hub import MAX_SIZE
from ..options import READING
from .setting_checks import between, decay, finite, one_of, positive, rate, setting, share, weight


REGIMES = ("end-to-end", "fine-tune", "frozen", "lora")
ABLATIONS = ("none", "base", "base-pooled", "head-pooled")
PRECISIONS = ("auto", "no", "bf16", "fp16")
OPTIMIZERS = ("auto", "adamw", "muon")
LIGHT_VAE = "light-vae"  # the base that is made anew


@strict
@dataclass
class DataSettings:
    """Which images, and how they are drawn or read."""

    title: ClassVar[str] = "data (which images)"

    dataset: str = setting(
        "quad",
        "`quad`, `mnist`, `ident3d`, `avatars`, an image folder, a saved data set or a Hub name.",
    )
    variant: str = setting("dependent", "quad, ident3d: `dependent` or `independent`.")
    images_per_context: int = setting(
        4000, "Simulated data and avatars: training images of each context.", between(1)
    )
    validation_images: int = setting(
        400, "Simulated data and avatars: validation images of each context.", between(1)
    )
    mnist_digits: str = setting(
        BUNDLED,
        "mnist: `bundled` (few), a folder with its files or a saved data set, or a Hub name.",
    )
    validation_fraction: float = setting(
        0.1,
        "Own data: share of the images held out for validation; mnist: share of the digits;"
        " avatars: of the persons.",
    )
    data_seed: int = setting(
        0, "Seed of the data (if simulated) or of the split (own data, avatars).", between(0)
    )
    split: str = setting("train", f"Own data: {READING['split']}.")
    image_column: str = setting("image", f"Own data: {READING['image_column']}.")
    context_column: str = setting("context", f"Own data: {READING['context_column']}.")
    split_by: str = setting(
        "image", "How own data are split: by `image`, or `position` as before 0.2.", one_of(SPLITS)
    )
    resolution: int | None = setting(64, "Side of the images in pixels.", between(1, 2**14))
    channels: int = setting(3, "3 (RGB) or 1 (grey).")
    frames: int | None = setting(
        None,
        "Own data: frames of a clip, for a pipeline that makes clips; default: images.",
        between(1, 2**12),
    )
    concepts: list[str] | None = setting(None, "Own data: the concepts; default: all.")
    image_cache: str | None = setting(
        None,
        "Own data: folder to decode the images into, once, and to read them from by memory map.",
    )
    schedule: str = setting(
        "balanced",
        f"Which contexts a batch is of: {', '.join(SCHEDULES)}.",
        one_of(SCHEDULES),
    )

    @property
    def reading(self) -> dict[str, str]:
        """How own data are read: arguments of `load_contexts`."""
        return {name: getattr(self, name) for name in READING}


@strict
@dataclass
class BaseSettings:
    """The model that the head is added to, and what of it is trained."""

    title: ClassVar[str] = "base (the model that the head is added to)"

    base: str = setting(
        LIGHT_VAE, "`light-vae` (new), or folder or Hub name of a model or pipeline."
    )
    base_subfolder: str | None = setting(None, "Its sub-folder there, such as `vae`.")
    regime: str = setting(
        "end-to-end", f"What of it is trained: {', '.join(REGIMES)}.", one_of(REGIMES)
    )
    lora_rank: int = setting(
        8, "regime `lora`: rank of the layers on the base.", between(0, MAX_SIZE)
    )
    block_out_channels: list[int] = setting(
        [32, 64, 128, 256], "Light VAE: channels of its convolutions.", between(1, MAX_SIZE)
    )
    hidden_width: int = setting(128, "Width of the base's features.", between(1, MAX_SIZE))
    latent_width: int = setting(
        128, "Width of the head's embedding (light VAE, denoiser).", between(1, MAX_SIZE)
    )
    likelihood: str = setting(
        "gaussian", "Light VAE: `gaussian`, with a learnt variance, or `bernoulli`, the paper's."
    )
    base_norm: str = setting("group", "Norm of a new base: `group`, `batch` or `none`.")
    image_encoder: str | None = setting(
        None, "Denoiser: folder or Hub name of the frozen vision model to read z from."
    )
    num_tokens: int = setting(
        4, "Denoiser with cross-attention: tokens of the embedding.", between(1, MAX_SIZE)
    )
    prompt: str = setting(
        "",
        "Pipeline with a text: the prompt of images without one of their own (column `prompt` or"
        " `text`).",
    )
    prompt_dropout: float = setting(
        0.0, "Share of the images that are trained with `prompt` instead of their own.", share
    )
    class_label: int | None = setting(
        None, "UNet2DModel with classes: the class of all images.", between(0, MAX_SIZE)
    )
    min_snr_gamma: float | None = setting(
        None, "Denoiser: bound of the weights by signal to noise.", positive
    )
    gradient_checkpointing: bool = setting(False, "Trade time for memory in the base.")
    residual_layers: int = setting(
        0,
        "Pretrained base: couplings of the prior of residual latents.",
        between(0, 1000),
    )

    @property
    def is_new(self) -> bool:
        """Whether the base is made anew, and not loaded."""
        return self.base == LIGHT_VAE

    def validate_regime(self) -> None:
        """
        Raises:
            ValueError: one sentence: the base and the regime do not go together.
        """
        if self.regime == "lora" and (self.is_new or self.lora_rank < 1):
            raise ValueError(
                "regime lora needs a pretrained base (--base) and a lora_rank of at least 1."
            )
        if self.regime == "frozen" and self.is_new:
            raise ValueError(
                "regime frozen needs a pretrained base (--base): a new light VAE would stay as"
                " random as it starts."
            )
        if self.residual_layers and self.is_new:
            raise ValueError("residual latents need a pretrained autoencoder (--base).")


@strict
@dataclass
class HeadSettings:
    """The configuration of the head: fields of `InterventionConfig`, which checks them."""

    title: ClassVar[str] = "head (the intervention head)"

    mechanism: str = setting(
        "flow", "`flow`: invertible, one posterior for all contexts; `mlp`: the paper's head."
    )
    free_blocks: int = setting(8, "Blocks that are never intervened on.")
    concept_width: int = setting(4, "Width of each block of the concepts.")
    flow_depth: int = setting(2, "Mechanism `flow`: hidden layers of its networks.")
    flow_width: int = setting(128, "Mechanism `flow`: width of these layers.")
    flow_components: int = setting(8, "Mechanism `flow`: components of each entry's mixture.")
    concept_edges: bool = setting(False, "Mechanism `flow`: whether concepts may cause each other.")
    noise_width: int = setting(32, "Mechanism `mlp`: width of each block of the noise.")
    depth: int = setting(2, "Mechanism `mlp`: layers of each block's network.")
    norm: str = setting("layer", "Mechanism `mlp`: `layer`, `batch` or `none`.")
    intervention: str = setting(
        "perfect", "Mechanism `mlp`: `perfect` cuts the edges into a concept, `soft` keeps them."
    )
    propagation_steps: int = setting(
        3, "Mechanism `mlp`: edges of the paths that effects follow; 1: the paper's."
    )
    intervention_rank: int | None = setting(
        None, "Mechanism `mlp`: rank of the weights among many concepts; default: full."
    )
    posterior: str = setting(
        "centered", "Mechanism `mlp`: `centered`, `conditional` or `unconditional`."
    )
    initial_posterior_std: float = setting(
        0.25, "Of q(z | x, s) before training; 1: that of the prior."
    )
    ablation: str = setting(
        "none",
        "What is left out: `none`, `base`, `base-pooled` or `head-pooled`.",
        one_of(ABLATIONS),
    )

    def configuration(self) -> dict[str, Any]:
        """The same as arguments of `InterventionConfig`."""
        return asdict(self) | {"ablation": None if self.ablation == "none" else self.ablation}

    def validate_configuration(self) -> None:
        """
        Raises:
            ValueError: one sentence: there is no head of this configuration, or none that can be
                trained.
        """
        if self.posterior == "whitened":
            raise ValueError(
                "posterior whitened is no longer trained with: choose centered, conditional or "
                "unconditional (models that have it still load)."
            )
        InterventionConfig(**self.configuration())


@strict
@dataclass
class ObjectiveSettings:
    """The weights of what is minimised; see `hf_intervene/objective.py` and `terms/`."""

    title: ClassVar[str] = "objective (what is minimised)"

    beta: float = setting(1.0, "Weight of the KL.", weight)
    beta_warmup: float = setting(0.02, "Share of the steps over which beta rises from 0.", share)
    residual_weight: float = setting(1.0, "Weight of the KL of the residual latents.", weight)
    context_prediction: float = setting(
        300.0,
        "Weight of hf_intervene/terms/context_prediction.py, mechanism `flow`.",
        weight,
    )
    edit_consistency: float = setting(
        0.3,
        "That of hf_intervene/terms/edit_consistency.py, mechanism `flow`.",
        weight,
    )
    free_invariance: float = setting(
        100.0, "That of hf_intervene/terms/free_invariance.py, mechanism `flow`.", weight
    )
    group_lasso: float = setting(0.0, "Penalty on the norms of the blocks of W.", weight)
    l2: float = setting(0.0, "Penalty on the squares of W.", weight)


@strict
@dataclass
class OptimizationSettings:
    """How it is minimised."""

    title: ClassVar[str] = "optimization (how it is minimised)"

    epochs: float = setting(12.0, "Passes over the training images.", positive, finite)
    max_steps: int | None = setting(None, "Optimiser steps; overrides epochs.", between(1))
    batch_size: int = setting(64, "Images per optimiser step, over all processes.", between(1))
    gradient_accumulation_steps: int = setting(
        1, "Micro-batches a process makes of its share.", between(1)
    )
    optimizer: str = setting(
        "auto",
        "`adamw`, `muon`, or `auto`: muon for the matrices of networks that are trained from"
        " scratch, a light VAE or the adapter of a pretrained base.",
        one_of(OPTIMIZERS),
    )
    learning_rate: float = setting(1e-3, "Peak learning rate.", rate)
    base_learning_rate: float | None = setting(
        None,
        "That of the base's own weights; default: the same. Less spares a pretrained base.",
        rate,
    )
    warmup_steps: int = setting(200, "Steps over which the learning rate rises.", between(0))
    final_learning_rate: float = setting(0.01, "Share of the peak at the end of the cosine.", share)
    weight_decay: float = setting(0.0, "Weight decay of AdamW and Muon.", weight)
    max_grad_norm: float = setting(1000.0, "Gradient norms above are clipped.", positive)
    ema_decay: float | None = setting(
        None,
        "Decay of the averaged weights, at step t at most 1 - (1 + t)^(-2/3); none by default.",
        decay,
    )
    prior_steps: int | None = setting(
        None,
        "Mechanism `flow`: steps that fit the prior of the finished model, see prior.py; default:"
        " 2/3 of all.",
        between(0),
    )
    seed: int = setting(0, "Seed of the weights and of all draws.", between(0))

    def total_steps(self, images: int) -> int:
        """Optimiser steps of a run over so many training images."""
        return self.max_steps or max(1, round(self.epochs * images / self.batch_size))


@strict
@dataclass
class RunSettings:
    """Where and how it runs."""

    title: ClassVar[str] = "run (where and how it runs)"

    output_dir: str = setting("outputs/run", "Folder of the run.")
    resume: str = setting(
        "none", "`none`, `auto` (newest checkpoint of output_dir) or a checkpoint."
    )
    mixed_precision: str = setting(
        "auto", "`no`, `bf16`, `fp16`, or `auto`: bf16 where fast.", one_of(PRECISIONS)
    )
    eval_every: int | None = setting(
        None, "Steps between validations; default: an epoch.", between(1)
    )
    patience: int = setting(20, "Validations without improvement before stopping.", between(1))
    log_every: int = setting(50, "Steps between rows of the history.", between(1))
    sample_every: int | None = setting(
        None, "Steps between sample grids; default: eval_every.", between(1)
    )
    checkpoint_every: int | None = setting(
        None, "Steps between checkpoints; default: eval_every.", between(1)
    )
    keep_checkpoints: int = setting(2, "Checkpoints to keep, the newest.", between(1))
    tracker: str = setting("tensorboard", "A tracker of Accelerate, or `none`.")

    @property
    def precision(self) -> str:
        """`mixed_precision`; `auto` is what a launcher was told, or decided for this machine."""
        if self.mixed_precision != "auto":
            return self.mixed_precision
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION")  # "no" is what it sets by itself
        if launched in ("bf16", "fp16"):
            return launched
        return "bf16" if fast_bf16() else "no"


def fast_bf16() -> bool:
    """Whether this machine computes bf16 in hardware."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


__all__ = [
    "BaseSettings",
    "DataSettings",
    "HeadSettings",
    "ObjectiveSettings",
    "OptimizationSettings",
    "RunSettings",
]
