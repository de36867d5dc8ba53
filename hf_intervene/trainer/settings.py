"""Settings of a training run: a YAML file gives some, the command line overrides them."""

import math
import os
import reprlib
from argparse import (
    Action,
    ArgumentDefaultsHelpFormatter,
    ArgumentParser,
    RawDescriptionHelpFormatter,
)
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch
import yaml
from transformers import HfArgumentParser

from ..cards import read_yaml
from ..data.digits import BUNDLED
from ..data.identity import SPLITS
from ..data.schedule import SCHEDULES
from ..hub import MAX_SIZE
from ..options import READING, READING_DEFAULTS


REGIMES = ("end-to-end", "fine-tune", "frozen", "lora")
PRECISIONS = ("auto", "no", "bf16", "fp16")
_LARGE = 1e30  # of a weight in the loss, which is computed in float32
_MANY = 2**40  # more than any run needs, and torch can still count them
# Least and greatest value of a setting, of each entry of a list.
_RANGES = dict.fromkeys(("data_seed", "seed", "warmup_steps", "prior_steps"), (0, _MANY))
_RANGES |= dict.fromkeys(
    ("hidden_width", "latent_width", "block_out_channels", "num_tokens"), (1, MAX_SIZE)
)
_RANGES |= dict.fromkeys(
    ("images_per_context", "validation_images", "batch_size", "gradient_accumulation_steps"),
    (1, _MANY),
)
_RANGES |= dict.fromkeys(("max_steps", "patience", "keep_checkpoints"), (1, _MANY))
_RANGES |= dict.fromkeys(
    ("eval_every", "log_every", "sample_every", "checkpoint_every"), (1, _MANY)
)
_RANGES |= {
    "class_label": (0, MAX_SIZE),
    "resolution": (1, 2**14),
    "residual_layers": (0, 1000),
    "intervention_rank": (1, MAX_SIZE),
    "lora_rank": (0, MAX_SIZE),
}
ABLATIONS = ("none", "base", "base-pooled", "head-pooled")
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")  # modes of torch.compile that record them
OPTIMIZERS = ("auto", "adamw", "muon")
COMPILE_MODES = ("default", *CUDA_GRAPHS)


@dataclass
class TrainArguments:
    """Settings of a run. Batch sizes are totals over all processes."""

    output_dir: str = field(default="outputs/run", metadata={"help": "Folder of the run."})
    # Data
    dataset: str = field(
        default="quad",
        metadata={
            "help": (
                "`quad`, `mnist`, `ident3d`, `avatars`, an image folder, a saved data set or a "
                "Hub name."
            )
        },
    )
    variant: str = field(
        default="dependent", metadata={"help": "quad, ident3d: `dependent` or `independent`."}
    )
    images_per_context: int = field(
        default=4000,
        metadata={"help": "Simulated data and avatars: training images of each context."},
    )
    validation_images: int = field(
        default=400,
        metadata={"help": "Simulated data and avatars: validation images of each context."},
    )
    mnist_digits: str = field(
        default=BUNDLED,
        metadata={
            "help": (
                "mnist: `bundled` (few), a folder with its files or a saved data set, or a Hub"
                " name."
            )
        },
    )
    validation_fraction: float = field(
        default=0.1,
        metadata={
            "help": (
                "Own data: share of the images held out for validation; mnist: share of the "
                "digits; avatars: of the persons."
            )
        },
    )
    data_seed: int = field(
        default=0,
        metadata={"help": "Seed of the data (if simulated) or of the split (own data, avatars)."},
    )
    split: str = field(default="train", metadata={"help": f"Own data: {READING['split']}."})
    image_column: str = field(
        default="image", metadata={"help": f"Own data: {READING['image_column']}."}
    )
    context_column: str = field(
        default="context", metadata={"help": f"Own data: {READING['context_column']}."}
    )
    split_by: str = field(
        default="image",
        metadata={"help": "How own data are split: by `image`, or `position` as before 0.2."},
    )
    resolution: int | None = field(default=64, metadata={"help": "Side of the images in pixels."})
    channels: int = field(default=3, metadata={"help": "3 (RGB) or 1 (grey)."})
    concepts: list[str] | None = field(
        default=None, metadata={"help": "Own data: the concepts; default: all."}
    )
    image_cache: str | None = field(
        default=None,
        metadata={
            "help": (
                "Own data: folder to decode the images into, once, and to read them from by memory"
                " map."
            )
        },
    )
    # Base
    base: str = field(
        default="light-vae",
        metadata={"help": "`light-vae` (new), or folder or Hub name of a model or pipeline."},
    )
    base_subfolder: str | None = field(
        default=None, metadata={"help": "Its sub-folder there, such as `vae`."}
    )
    block_out_channels: list[int] = field(default_factory=lambda: [32, 64, 128, 256])
    hidden_width: int = field(default=128, metadata={"help": "Width of the base's features."})
    latent_width: int = field(
        default=128, metadata={"help": "Width of the head's embedding (light VAE, denoiser)."}
    )
    likelihood: str = field(
        default="gaussian",
        metadata={
            "help": "Light VAE: `gaussian`, with a learnt variance, or `bernoulli`, the paper's."
        },
    )
    base_norm: str = field(
        default="group", metadata={"help": "Norm of a new base: `group`, `batch` or `none`."}
    )
    image_encoder: str | None = field(
        default=None,
        metadata={
            "help": "Denoiser: folder or Hub name of the frozen vision model to read z from."
        },
    )
    num_tokens: int = field(
        default=4, metadata={"help": "Denoiser with cross-attention: tokens of the embedding."}
    )
    prompt: str = field(
        default="",
        metadata={
            "help": (
                "Pipeline with a text: the prompt of images without one of their own (column"
                " `prompt` or `text`)."
            )
        },
    )
    prompt_dropout: float = field(
        default=0.0,
        metadata={
            "help": "Share of the images that are trained with `prompt` instead of their own."
        },
    )
    class_label: int | None = field(
        default=None, metadata={"help": "UNet2DModel with classes: the class of all images."}
    )
    min_snr_gamma: float | None = field(
        default=None, metadata={"help": "Denoiser: bound of the weights by signal to noise."}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Trade time for memory in the base."}
    )
    residual_layers: int = field(
        default=0, metadata={"help": "Pretrained base: couplings of the prior of residual latents."}
    )
    # Head: fields of InterventionConfig
    mechanism: str = field(
        default="flow",
        metadata={
            "help": "`flow`: invertible, one posterior for all contexts; `mlp`: the paper's head."
        },
    )
    free_blocks: int = field(default=8)
    concept_width: int = field(default=4)
    flow_depth: int = field(
        default=4, metadata={"help": "Mechanism `flow`: couplings of each concept."}
    )
    flow_width: int = field(
        default=32, metadata={"help": "Mechanism `flow`: width of their networks."}
    )
    concept_edges: bool = field(
        default=False, metadata={"help": "Mechanism `flow`: whether concepts may cause each other."}
    )
    noise_width: int = field(
        default=32, metadata={"help": "Mechanism `mlp`, as the settings up to `posterior`."}
    )
    depth: int = field(default=2)
    norm: str = field(default="layer")
    intervention: str = field(default="perfect")
    propagation_steps: int = field(default=3)
    intervention_rank: int | None = field(
        default=None, metadata={"help": "Of the weights among many concepts; default: full."}
    )
    posterior: str = field(
        default="centered", metadata={"help": "`centered`, `conditional` or `unconditional`."}
    )
    initial_posterior_std: float = field(
        default=0.25, metadata={"help": "Of q(z | x, s) before training; 1: that of the prior."}
    )
    # Objective and regime
    regime: str = field(default="end-to-end", metadata={"help": ", ".join(REGIMES)})
    lora_rank: int = field(
        default=8, metadata={"help": "regime `lora`: rank of the layers on the base."}
    )
    ablation: str = field(
        default="none", metadata={"help": "`none`, `base`, `base-pooled` or `head-pooled`."}
    )
    schedule: str = field(default="balanced", metadata={"help": ", ".join(SCHEDULES)})
    beta: float = field(default=1.0, metadata={"help": "Weight of the KL."})
    beta_warmup: float = field(
        default=0.02, metadata={"help": "Share of the steps over which beta rises from 0."}
    )
    residual_weight: float = field(
        default=1.0, metadata={"help": "Weight of the KL of the residual latents."}
    )
    context_prediction: float = field(
        default=300.0,
        metadata={"help": "Weight of hf_intervene/terms/context_prediction.py, mechanism `flow`."},
    )
    edit_consistency: float = field(
        default=0.3,
        metadata={
            "help": (
                "That of hf_intervene/terms/edit_consistency.py, mechanism `flow`; not for"
                " denoisers."
            )
        },
    )
    free_invariance: float = field(
        default=100.0,
        metadata={"help": "That of hf_intervene/terms/free_invariance.py, mechanism `flow`."},
    )
    group_lasso: float = field(
        default=0.0, metadata={"help": "Penalty on the norms of the blocks of W."}
    )
    l2: float = field(default=0.0, metadata={"help": "Penalty on the squares of W."})
    # Optimisation
    epochs: float = field(default=12.0, metadata={"help": "Passes over the training images."})
    max_steps: int | None = field(
        default=None, metadata={"help": "Optimiser steps; overrides epochs."}
    )
    batch_size: int = field(
        default=64, metadata={"help": "Images per optimiser step, over all processes."}
    )
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Micro-batches a process makes of its share."}
    )
    optimizer: str = field(
        default="auto",
        metadata={"help": "`adamw`, `muon`, or `auto`: muon for the matrices of a new light VAE."},
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    base_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": (
                "That of the base's own weights; default: the same. Less spares a pretrained base."
            )
        },
    )
    warmup_steps: int = field(default=200)
    final_learning_rate: float = field(
        default=0.01, metadata={"help": "Share of the peak at the end of the cosine."}
    )
    weight_decay: float = field(default=0.0)
    max_grad_norm: float = field(
        default=1000.0, metadata={"help": "Gradient norms above are clipped."}
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": (
                "Decay of the averaged weights, at step t at most 1 - (1 + t)^(-2/3); none by"
                " default."
            )
        },
    )
    mixed_precision: str = field(
        default="auto", metadata={"help": "`no`, `bf16`, `fp16`, or `auto`: bf16 where fast."}
    )
    compile: bool = field(default=False, metadata={"help": "torch.compile the model."})
    compile_mode: str = field(default="default", metadata={"help": ", ".join(COMPILE_MODES)})
    channels_last: bool = field(
        default=False, metadata={"help": "Run the base's convolutions with the channels last."}
    )
    prior_steps: int | None = field(
        default=None,
        metadata={
            "help": (
                "Mechanism `flow`: steps that fit the prior of the finished model, see prior.py;"
                " default: 4/3 of all."
            )
        },
    )
    seed: int = field(default=0)
    # Running
    eval_every: int | None = field(
        default=None, metadata={"help": "Steps between validations; default: an epoch."}
    )
    patience: int = field(
        default=20, metadata={"help": "Validations without improvement before stopping."}
    )
    log_every: int = field(default=50)
    sample_every: int | None = field(
        default=None, metadata={"help": "Steps between sample grids; default: eval_every."}
    )
    checkpoint_every: int | None = field(
        default=None, metadata={"help": "Steps between checkpoints; default: eval_every."}
    )
    keep_checkpoints: int = field(default=2)
    resume: str = field(
        default="none",
        metadata={"help": "`none`, `auto` (newest checkpoint of output_dir) or a checkpoint."},
    )
    tracker: str = field(
        default="tensorboard", metadata={"help": "A tracker of Accelerate, or `none`."}
    )

    def __post_init__(self):
        if self.regime == "lora" and (self.base == "light-vae" or self.lora_rank < 1):
            raise ValueError(
                "regime lora needs a pretrained base (--base) and a lora_rank of at least 1."
            )
        if self.regime == "frozen" and self.base == "light-vae":
            raise ValueError(
                "regime frozen needs a pretrained base (--base): a new light VAE would stay as"
                " random as it starts."
            )
        if self.posterior == "whitened":
            raise ValueError(
                "posterior whitened is no longer trained with: choose centered, conditional or "
                "unconditional (models that have it still load)."
            )
        if self.residual_layers and self.base == "light-vae":
            raise ValueError("residual latents need a pretrained autoencoder (--base).")
        choices_of = {"regime": REGIMES, "ablation": ABLATIONS, "schedule": SCHEDULES}
        choices_of |= {
            "optimizer": OPTIMIZERS,
            "split_by": SPLITS,
            "mixed_precision": PRECISIONS,
            "compile_mode": COMPILE_MODES,
        }
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}."
                )
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            for number in value if isinstance(value, list) else [value]:
                if number is not None and not least <= number <= most:
                    bound = f"at least {least}" if number < least else f"at most {most}"
                    raise ValueError(f"{name} must be {bound}, not {number}.")
        if (
            self.compile
            and self.compile_mode in CUDA_GRAPHS
            and self.gradient_accumulation_steps > 1
        ):
            raise ValueError(
                f"compile_mode {self.compile_mode} replays CUDA graphs, whose gradients do not last"
                " from one micro-batch to the next: leave gradient_accumulation_steps at 1, or"
                " choose the compile_mode default."
            )
        for name in ("beta_warmup", "final_learning_rate", "prompt_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], not {getattr(self, name)}.")
        for name in (
            "beta",
            "residual_weight",
            "context_prediction",
            "edit_consistency",
            "free_invariance",
            "group_lasso",
            "l2",
            "weight_decay",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative: {getattr(self, name)}.")
            if getattr(self, name) > _LARGE:
                raise ValueError(f"{name} must be at most {_LARGE:g}, not {getattr(self, name)}.")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), not {self.ema_decay}.")
        for name in (
            "learning_rate",
            "base_learning_rate",
            "epochs",
            "max_grad_norm",
            "min_snr_gamma",
        ):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}.")
        if math.isinf(self.epochs):
            raise ValueError("epochs must be finite: patience or Ctrl-C ends a run before.")

    @property
    def reading(self) -> dict[str, str]:
        """How own data are read: arguments of `load_contexts`."""
        return {name: getattr(self, name) for name in READING}

    @property
    def precision(self) -> str:
        """`mixed_precision`; `auto` is what a launcher was told, or decided for this machine."""
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION")  # "no" is what it sets by itself
        if self.mixed_precision == "auto" and launched in ("bf16", "fp16"):
            return launched
        return (
            ("bf16" if fast_bf16() else "no")
            if self.mixed_precision == "auto"
            else self.mixed_precision
        )

    def total_steps(self, images: int) -> int:
        """Optimiser steps of a run over so many training images."""
        return self.max_steps or max(1, round(self.epochs * images / self.batch_size))

    def head_options(self) -> dict:
        """Those settings that are fields of `InterventionConfig`."""
        names = (
            "mechanism",
            "free_blocks",
            "concept_width",
            "flow_depth",
            "flow_width",
            "concept_edges",
            "noise_width",
            "depth",
            "norm",
        )
        names += (
            "intervention",
            "propagation_steps",
            "intervention_rank",
            "posterior",
            "initial_posterior_std",
        )
        return {name: getattr(self, name) for name in names} | {
            "lora_rank": self.lora_rank if self.regime == "lora" else 0
        }


# Of saved settings (`training_arguments.yaml`, checkpoints), which may leave out what is a default.
# It is raised when a default changes. Files before the first one that was written down count as 0.
SETTINGS_VERSION = 5
# EARLIER[v]: defaults of version v, and what settings stood for that it did not have, where that is
# not today's default.
EARLIER: tuple[dict[str, object], ...] = (
    {"moment_matching": 100.0, "initial_posterior_std": 1.0, "posterior": "centered"},
    {"prior_matching": 0.0},
    {"split_by": "position"},
    {
        "mechanism": "mlp",
        "likelihood": "bernoulli",
        "free_blocks": 1,
        "concept_width": 8,
        "posterior": None,  # whitened, or centered where there were many concepts
        "beta": 4.0,
        "beta_warmup": 0.0,
        "moment_matching": 10.0,
        "prior_matching": 1.0,
        "sample_matching": 0.0,
        "context_prediction": 0.0,
        "moment_warmup": 0.5,
        "edit_consistency": 0.0,
    },
    {"free_invariance": 0.0, "prior_steps": 0, "optimizer": "adamw"},
)
# Weights of terms that only versions before 4 trained with. The context prediction of then was
# another term.
FORMER = ("moment_matching", "prior_matching", "sample_matching", "context_prediction")
_NAMES_OF_THEN = {*FORMER[:3], "moment_warmup"}  # settings that there are no more

# Settings that may change between an interrupted run and its resumption.
RUNNING = {
    "output_dir",
    "resume",
    "tracker",
    "log_every",
    "keep_checkpoints",
    "checkpoint_every",
    "sample_every",
    "compile",
}
RUNNING |= {"gradient_accumulation_steps", "compile_mode", "channels_last", "image_cache"}
# Those that may change where a run goes on from a checkpoint that was named, as after a loss that
# was not finite.
STEERING = {"learning_rate", "base_learning_rate", "max_grad_norm", "mixed_precision"}
_SHARED = "# hf-intervene "  # how the settings that are published with a model begin


def earlier_defaults(version: object, source: str) -> dict[str, object]:
    """Today's defaults as they differ from those of an earlier version of the settings.

    Raises:
        ValueError: one sentence: no version, or a later one than is known here.
    """
    if not isinstance(version, int) or version < 0:
        raise ValueError(f"{source}: settings_version must be a whole number, not {version!r}.")
    if version > SETTINGS_VERSION:
        raise ValueError(
            f"{source} was written by a later version of hf-intervene (settings_version {version},"
            f" known here are those up to {SETTINGS_VERSION}): upgrade with `pip install --upgrade"
            " hf-intervene`."
        )
    return {name: value for older in reversed(EARLIER[version:]) for name, value in older.items()}


def of_today(saved: Mapping[str, Any], version: int, source: str) -> dict[str, Any]:
    """Settings as a run saved them, with the defaults of their version and without those that there
    are no more.

    Raises:
        ValueError: one sentence: no version, a later one, or a run that was trained with what there
            is no more.
    """
    settings = earlier_defaults(version, source) | saved
    if version >= 4:
        return settings
    terms = [f"{name} {settings[name]}" for name in FORMER if settings[name]]
    if settings["posterior"] in (None, "whitened"):
        terms.append("a whitened posterior")
    if terms:
        raise ValueError(
            f"{source} is of a run with {', '.join(terms)}, which this version of hf-intervene no"
            " longer trains with: its model can be used, but to train, start anew in another"
            " output_dir with settings of today."
        )
    return {name: value for name, value in settings.items() if name not in _NAMES_OF_THEN}


def fast_bf16() -> bool:
    """Whether this machine computes bf16 in hardware."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def shared_settings(arguments: TrainArguments) -> str:
    """What is published with a model, as YAML that `--config` reads: the settings that differ from
    the defaults, and the seed.

    Not where and how it ran (`RUNNING`); of a folder on this machine the name alone.
    """
    default = asdict(TrainArguments())
    changed = {
        k: v
        for k, v in asdict(arguments).items()
        if k not in RUNNING and (v != default[k] or k == "seed")
    }
    for name in ("dataset", "base", "mnist_digits"):
        if name in changed and Path(changed[name]).exists():
            changed[name] = Path(changed[name]).resolve().name
    shared = {"settings_version": SETTINGS_VERSION} | changed
    return f"{_SHARED}{version('hf-intervene')}\n" + yaml.safe_dump(shared, sort_keys=False)


def check_reading(dataset: str, reading: Mapping[str, str]) -> None:
    """Refuse what says how own data are read for data that are drawn, where it would do nothing.

    Raises:
        ValueError: one sentence.
    """
    for name, value in reading.items():
        if value != READING_DEFAULTS[name]:
            raise ValueError(f"{dataset} is drawn, and has no {name} to choose: leave {name} out.")


class RecipeParser(ArgumentParser):
    """Takes names of options with `-` or `_`, as `HfArgumentParser` takes those of train.py."""

    def add_argument(self, *names: str, **options: Any) -> Action:
        long = [name[2:] for name in names if name.startswith("--")]
        other = [f"--{name.replace(*swap)}" for swap in ("-_", "_-") for name in long]
        return super().add_argument(*dict.fromkeys([*names, *other]), **options)


class _Formatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Defaults of the options, examples as they are written."""


def make_parser() -> HfArgumentParser:
    """The parser of the settings."""
    examples = """examples:
  accelerate launch training/train.py --config training/configs/quad.yaml --output_dir outputs/quad
  hf-intervene train --dataset my-images --resolution 64 --output_dir outputs/mine
  hf-intervene train --dataset my-images --resolution 64 --output_dir outputs/mine --resume auto

--config FILE.yaml gives settings, these options override it. --json prints the result as JSON."""
    return HfArgumentParser(
        TrainArguments,
        description="Train an intervention head.",
        epilog=examples,
        formatter_class=_Formatter,
    )


def parse_arguments(argv: Sequence[str]) -> TrainArguments:
    """Settings from `--config FILE.yaml` overridden by the other options."""
    argv, config = list(argv), None
    for position, word in enumerate(argv):
        if word == "--config" or word.startswith("--config="):
            config = word.partition("=")[2] or (
                argv[position + 1] if position + 1 < len(argv) else ""
            )
            del argv[position : position + (1 if "=" in word else 2)]
            break
    parser = make_parser()
    if config is not None:
        parser.set_defaults(**read_config(config))
    arguments, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if rest:
        hint = _did_you_mean(rest[0].lstrip("-").replace("-", "_"), "--") or "see --help."
        raise ValueError(f"unknown option {rest[0]}: {hint}")
    return arguments


def read_config(path: str) -> dict:
    """Settings of a YAML file, its keys and types checked; of one that a run saved, with the
    defaults of then.
    """
    settings = read_yaml(path)
    # A file without a version was either saved by a run before there were any, or written by hand,
    # for the defaults of today. By hand nobody writes all the settings that there were.
    saved = Path(path).read_text(encoding="utf-8").startswith(_SHARED) or len(settings) > 40
    version = settings.pop("settings_version", 0 if saved else SETTINGS_VERSION)
    settings = of_today(settings, version, path)
    known = get_type_hints(TrainArguments)  # those of `fields` are changed by HfArgumentParser
    for name, value in settings.items():
        if name not in known:
            hint = _did_you_mean(str(name)) or f"the settings are {', '.join(known)}."
            raise ValueError(f"{path} has an unknown setting {name!r}: {hint}")
        try:
            settings[name] = _typed(value, known[name])
        except TypeError:
            kind = (
                known[name].__name__
                if isinstance(known[name], type)
                else str(known[name]).removesuffix(" | None")
            )
            raise ValueError(
                f"{path}: {name} must be of type {kind}, not {reprlib.repr(value)}."
            ) from None
    return settings


def _did_you_mean(name: str, prefix: str = "") -> str:
    """What to do about a setting that there is not: those nearest to it; empty if none is near."""
    if name in _NAMES_OF_THEN:
        return "versions before 0.2 had it, of a term that is no longer trained with: leave it out."
    near = get_close_matches(name, get_type_hints(TrainArguments), 3)
    return f"did you mean {' or '.join(prefix + found for found in near)}?" if near else ""


def _typed(value: object, kind: type) -> object:
    """A YAML value as the type of its field (`int`, `float`, `str`, `bool`, a list of those, or
    optional), or a TypeError.
    """
    if get_origin(kind) is UnionType:
        kinds = [k for k in get_args(kind) if k is not type(None)]
        return None if value is None else _typed(value, *kinds)
    if get_origin(kind) is list:
        if not isinstance(value, list):
            raise TypeError
        return [_typed(entry, *get_args(kind)) for entry in value]
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:  # YAML reads 1e-3 as a string
            return float(value)
        except (ValueError, OverflowError):
            raise TypeError from None
    if type(value) is not kind:
        raise TypeError
    return value


__all__ = ["TrainArguments", "parse_arguments", "read_config"]
