"""Settings from YAML files and command lines, and back to YAML."""

import reprlib
from argparse import (
    Action,
    ArgumentDefaultsHelpFormatter,
    ArgumentParser,
    RawDescriptionHelpFormatter,
)
from collections.abc import Sequence
from dataclasses import field, fields, make_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import yaml
from huggingface_hub.dataclasses import type_validator
from transformers import HfArgumentParser

from ..errors import printable
from ..yaml_files import read_yaml
from .earlier import SETTINGS_VERSION, of_today
from .settings import KIND_OF, SECTIONS, TrainArguments, as_float, did_you_mean, type_name


# Settings that may change between an interrupted run and its resumption.
RUNNING = {
    "output_dir",
    "resume",
    "tracker",
    "log_every",
    "keep_checkpoints",
    "checkpoint_every",
    "sample_every",
    "gradient_accumulation_steps",
    "image_cache",
}
_SHARED = "# hf-intervene "  # how the settings that are published with a model begin


def saved_settings(arguments: TrainArguments) -> str:
    """All settings of a run, as YAML that `--config` reads."""
    return yaml.safe_dump(
        {"settings_version": SETTINGS_VERSION} | arguments.flat(), sort_keys=False
    )


def shared_settings(arguments: TrainArguments) -> str:
    """What is published with a model, as YAML that `--config` reads: the settings that differ from
    the defaults, and the seed.

    Not where and how it ran (`RUNNING`); of a folder on this machine the name alone.
    """
    default = TrainArguments().flat()
    changed = {
        name: value
        for name, value in arguments.flat().items()
        if name not in RUNNING and (value != default[name] or name == "seed")
    }
    for name in ("dataset", "base", "mnist_digits"):
        if name in changed and Path(changed[name]).exists():
            changed[name] = Path(changed[name]).resolve().name
    shared = {"settings_version": SETTINGS_VERSION} | changed
    return f"{_SHARED}{version('hf-intervene')}\n" + yaml.safe_dump(shared, sort_keys=False)


class RecipeParser(ArgumentParser):
    """Takes names of options with `-` or `_`, as `HfArgumentParser` takes those of train.py."""

    def add_argument(self, *names: str, **options: Any) -> Action:
        long = [name[2:] for name in names if name.startswith("--")]
        other = [f"--{name.replace(*swap)}" for swap in ("-_", "_-") for name in long]
        return super().add_argument(*dict.fromkeys([*names, *other]), **options)

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


class _Formatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Defaults of the options, examples as they are written."""


def _options_of(section: Any) -> Any:
    """A copy of a section for `HfArgumentParser`, which changes the types of the fields that it is
    given, and takes their metadata for options of argparse. Each section is a group of the help."""
    copies = [
        (
            f.name,
            KIND_OF[f.name],
            field(
                default=f.default,
                default_factory=f.default_factory,
                metadata={"help": f.metadata["help"]},
            ),
        )
        for f in fields(section)
    ]
    return make_dataclass(
        section.__name__, copies, namespace={"_argument_group_name": section.title}
    )


def make_parser() -> HfArgumentParser:
    """The parser of the settings."""
    examples = """examples:
  accelerate launch training/train.py --config training/configs/quad.yaml --output_dir outputs/quad
  hf-intervene train --dataset my-images --resolution 64 --output_dir outputs/mine
  hf-intervene train --dataset my-images --resolution 64 --output_dir outputs/mine --resume auto

--config FILE.yaml gives settings, these options override it. --json prints the result as JSON."""
    return HfArgumentParser(
        map(_options_of, SECTIONS.values()),
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
    given, rest = parser.parse_known_args(argv)
    if rest:
        hint = did_you_mean(rest[0].lstrip("-").replace("-", "_"), "--") or "see --help."
        raise ValueError(f"unknown option {rest[0]}: {hint}")
    return TrainArguments(**vars(given))


def read_config(path: str) -> dict[str, Any]:
    """Settings of a YAML file, in sections or not, by their names alone, their types checked; of a
    file that a run saved, with the defaults of then.

    Raises:
        OSError, ValueError: one sentence.
    """
    saved = read_yaml(path)
    # A file without a version was either saved by a run before there were any, or written by hand,
    # for the defaults of today. By hand nobody writes all the settings that there were.
    by_a_run = Path(path).read_text(encoding="utf-8").startswith(_SHARED) or len(saved) > 40
    known = saved.pop("settings_version", 0 if by_a_run else SETTINGS_VERSION)
    settings = of_today(saved, known, path)
    for name, value in settings.items():
        settings[name] = as_float(value, KIND_OF[name])
        try:
            type_validator(name, settings[name], KIND_OF[name])
        except TypeError:
            raise ValueError(
                f"{path}: {name} must be of type {type_name(name)}, not {reprlib.repr(value)}."
            ) from None
    return settings


__all__ = ["parse_arguments", "read_config", "shared_settings"]
