"""The settings of a training run, in six sections; `sections.py` lists them.

Every setting has one name, which no other section has. So it can be given in its section, as the
recipes in `training/configs` do, or by its name alone, as options of a command line:

    TrainArguments(data={"dataset": "quad"}, optimization={"max_steps": 100})
    TrainArguments(dataset="quad", max_steps=100)

`parsing.py` reads YAML files and command lines.
"""

import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any, cast, get_type_hints

from huggingface_hub.errors import StrictDataclassError, StrictDataclassFieldValidationError

from ..options import READING_DEFAULTS
from .sections import (
    BaseSettings,
    DataSettings,
    HeadSettings,
    ObjectiveSettings,
    OptimizationSettings,
    RunSettings,
)


SECTIONS: dict[str, type] = {
    "data": DataSettings,
    "base": BaseSettings,
    "head": HeadSettings,
    "objective": ObjectiveSettings,
    "optimization": OptimizationSettings,
    "run": RunSettings,
}
# The section and the type of every setting.
SECTION_OF = {f.name: name for name, kind in SECTIONS.items() for f in fields(kind)}
KIND_OF = {f.name: get_type_hints(kind)[f.name] for kind in SECTIONS.values() for f in fields(kind)}


@dataclass(init=False)
class TrainArguments:
    """The settings of a run. Batch sizes are totals over all processes.

    Args:
        **given: sections by their names, each a dictionary or a section, and settings by theirs,
            which come before those of sections. What is not given has its default.

    Raises:
        ValueError: one sentence: a setting that there is not, or a value that cannot be.
    """

    data: DataSettings
    base: BaseSettings
    head: HeadSettings
    objective: ObjectiveSettings
    optimization: OptimizationSettings
    run: RunSettings

    def __init__(self, **given: Any):
        values = flat(given)
        for name, kind in SECTIONS.items():
            own = {key: value for key, value in values.items() if SECTION_OF[key] == name}
            setattr(self, name, _section(kind, own))

    def flat(self) -> dict[str, Any]:
        """Every setting by its name."""
        return flat(asdict(self))


def flat(given: Mapping[str, Any], source: str = "") -> dict[str, Any]:
    """Settings by their names alone, of settings and sections by theirs.

    Args:
        given: sections, as dictionaries or dataclasses, and settings.
        source: of the settings, for messages.

    Raises:
        ValueError: one sentence: a setting that there is not, or in another section.
    """
    found: dict[str, Any] = {}
    alone: dict[str, Any] = {}
    for name, value in given.items():
        kind = SECTIONS.get(name)
        # `base` is a section and a setting of it
        if kind is None or not isinstance(value, (Mapping, kind)):
            alone[name] = value
            continue
        inside: Mapping = value if isinstance(value, Mapping) else asdict(cast(Any, value))
        for key in inside:
            if SECTION_OF.get(key, name) != name:
                raise ValueError(
                    f"{_of(source)}{key} is a setting of the section {SECTION_OF[key]}, not of"
                    f" {name}."
                )
        found |= inside
    found |= alone
    for name in found:
        if name in SECTIONS and name not in SECTION_OF:
            raise ValueError(f"{_of(source)}{name} is a section, and must hold settings.")
        if name not in SECTION_OF:
            hint = did_you_mean(str(name)) or f"the settings are {', '.join(SECTION_OF)}."
            has = f"{source} has an" if source else "there is an"
            raise ValueError(f"{has} unknown setting {name!r}: {hint}")
    return found


def _of(source: str) -> str:
    return f"{source}: " if source else ""


def _section(kind: type, values: dict[str, Any]) -> Any:
    """A section of these values, or a ValueError of one sentence."""
    values = {name: as_float(value, KIND_OF[name]) for name, value in values.items()}
    try:
        return kind(**values)
    except StrictDataclassFieldValidationError as error:
        cause = error.__cause__
        name = str(error).split("'")[1]
        if isinstance(cause, TypeError):
            raise ValueError(
                f"{name} must be of type {type_name(name)}, not {reprlib.repr(values[name])}."
            ) from error
        raise ValueError(f"{name} {cause}") from error
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__)) from error


def as_float(value: Any, kind: Any) -> Any:
    """A whole number, or a text such as 1e-3, which YAML reads as a text, as a float where one is
    meant.
    """
    if kind not in (float, float | None) or type(value) not in (int, str):
        return value
    try:
        return float(value)
    except (ValueError, OverflowError):
        return value  # its type is wrong, which is said where types are checked


def type_name(name: str) -> str:
    """The type of a setting, in words."""
    kind = KIND_OF[name]
    return kind.__name__ if isinstance(kind, type) else str(kind).removesuffix(" | None")


# Settings that there were: of terms that are no longer trained with, and of what made no run
# faster.
FORMER_TERMS = ("moment_matching", "prior_matching", "sample_matching", "moment_warmup")
FORMER = {*FORMER_TERMS, "compile", "compile_mode", "channels_last"}


def did_you_mean(name: str, prefix: str = "") -> str:
    """What to do about a setting that there is not: those nearest to it; empty if none is near."""
    if name in FORMER:
        return "versions before 0.2 had it: leave it out."
    near = get_close_matches(name, SECTION_OF, 3)
    return f"did you mean {' or '.join(prefix + found for found in near)}?" if near else ""


def check_reading(dataset: str, reading: Mapping[str, str]) -> None:
    """Refuse what says how own data are read for data that are drawn, where it would do nothing.

    Raises:
        ValueError: one sentence.
    """
    for name, value in reading.items():
        if value != READING_DEFAULTS[name]:
            raise ValueError(f"{dataset} is drawn, and has no {name} to choose: leave {name} out.")


__all__ = ["TrainArguments", "check_reading", "flat"]
