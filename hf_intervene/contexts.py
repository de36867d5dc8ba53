"""The vocabulary of interventions: it turns what a user writes into targets `s` (METHOD section 2).

A *context* is a set of intervened concepts, each with a strength in (0, 1]. Every way of naming one
is parsed here and nowhere else:

    "obs"  or  None  or  []               nothing is intervened on
    "quad1"                               one concept
    ["quad1", "size"] or "quad1+size"     several at once
    {"quad1": 1.0, "size": 0.5} or "quad1+size=0.5"   with strengths
    {"size": Quantile(0.9)} or "size@0.9"   at a chosen value: a point on the concept's learnt range
    {"quad1": image}                      at the value that the concept has in a reference image
                                          (PIL, array or tensor), or a list of one image per sample
    [["quad1"], "obs", {"size": 0.5}]     one context per sample: a list that holds at least one
                                          list, tuple, dict or None
    a tensor of targets                   used as it is, after checks

This file does not look into chosen values or reference images. `values.py` turns them into input
of the head.

This file travels with a checkpoint, so it imports only torch. It has more than 400 lines because
every form is read here, and each file more would travel too.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import index
from reprlib import Repr
from typing import TYPE_CHECKING, Any, TypeAlias, cast


if TYPE_CHECKING:
    import torch  # otherwise where tensors are made: names are checked without it


OBS = "obs"
_MOST_IMAGES = 10**9
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
# Contexts are written with these characters, or paths are: names become folder and file names.
_RESERVED = "+=,@/\\"


def shown(value: Any) -> str:
    """Return the text of a value for a message: one line, and shortened if it is long."""
    return " ".join(_SHORT.repr(value).split())


@dataclass(frozen=True)
class Quantile:
    """A chosen value of a concept: the point at quantile q of its learnt range.

    Args:
        q: a number between 0 and 1, both excluded. See `values.quantile_value`.

    Raises:
        ValueError: q is not such a number.
    """

    q: float

    def __post_init__(self) -> None:
        try:
            q = float(self.q)
        except (TypeError, ValueError):
            q = math.nan
        if not 0.0 < q < 1.0:  # NaN fails the comparison
            raise ValueError(
                f"a quantile must be a number between 0 and 1, both excluded, not {shown(self.q)}."
            )
        object.__setattr__(self, "q", q)


Value = float | Quantile | Any  # a strength, a point on the learnt range, or reference image(s)
Context = str | Sequence[str] | Mapping[str, Value] | None
Interventions: TypeAlias = "Context | Sequence[Context] | torch.Tensor"


def validate_concepts(concepts: Sequence[str]) -> tuple[str, ...]:
    """Check the concept names of a model or data set and return them as a tuple.

    Raises:
        ValueError: there is no name, a name is empty or repeated, a name is `obs`, or a name holds
            one of `+ = , @ / \\` or a character that cannot be printed.
    """
    if isinstance(concepts, str) or not isinstance(concepts, Sequence):
        raise ValueError(f"concepts must be a list of names, not {shown(concepts)}.")
    if not concepts:
        raise ValueError("concepts is empty: name at least one concept.")
    seen = set()
    for name in concepts:
        if not isinstance(name, str) or not name or name != name.strip():
            raise ValueError(
                "concept names must be non-empty strings without surrounding spaces, not"
                f" {shown(name)}."
            )
        if name.lower() == OBS:
            raise ValueError(
                f"{name!r} is reserved for the observational context and cannot name a concept."
            )
        if not name.isprintable() or name in (".", ".."):
            raise ValueError(
                f"concept name {name!r} cannot be printed, or is the name of a folder; rename it."
            )
        if any(character in name for character in _RESERVED):
            raise ValueError(
                f"concept name {name!r} contains one of the reserved characters"
                f" {' '.join(_RESERVED)}; rename it."
            )
        if name in seen:
            raise ValueError(f"concept {name!r} is named twice; concept names must be unique.")
        seen.add(name)
    return tuple(concepts)


def parse_context(context: Context, concepts: Sequence[str]) -> dict[str, float]:
    """Parse one context.

    Args:
        context: any single-context form of the module docstring.
        concepts: the known concept names.

    Returns:
        The strength in (0, 1] of every intervened concept, in the order of `concepts`. It is empty
        for the observational context.

    Raises:
        ValueError: a name is unknown (the known ones are listed) or repeated, `obs` stands beside a
            concept, a strength is outside [0, 1], or a value was chosen.
        TypeError: the context has none of the forms.
    """
    values = parse_values(context, concepts)
    strengths = {name: value for name, value in values.items() if isinstance(value, float)}
    _refuse_values([name for name in values if name not in strengths])
    return strengths


def _refuse_values(names: Sequence[str]) -> None:
    if names:
        raise ValueError(
            f"a value was chosen for {', '.join(map(repr, names))}, but here only names and"
            " strengths can be given."
        )


def parse_values(context: Context, concepts: Sequence[str]) -> dict[str, Value]:
    """Parse one context that may choose values of concepts.

    Args, order and errors are those of `parse_context`.

    Returns:
        For every intervened concept the strength, the `Quantile`, or the reference image(s) as they
        were given.
    """
    if context is None:
        return {}
    if isinstance(context, str):
        items = [_split_value(part) for part in context.split("+")]
    elif isinstance(context, Mapping):
        items = list(context.items())
    elif isinstance(context, Sequence) and all(isinstance(name, str) for name in context):
        items = [_split_value(part) for name in context for part in name.split("+")]
    else:
        raise TypeError(
            f"cannot read {shown(context)} as a context: give a concept name, a list of names, or"
            " a dict of name to strength."
        )
    values: dict[str, Value] = {}
    for name, value in items:
        if isinstance(name, str) and name not in concepts:
            name = unicodedata.normalize("NFC", name)  # letters that were typed on another system
        if name in values:
            raise ValueError(f"concept {shown(name)} is named twice in one context.")
        if name == OBS and len(items) > 1:
            raise ValueError(
                f"{OBS!r} cannot be combined with concepts; for one context per sample wrap each:"
                f" [['obs'], ['{concepts[0]}']]."
            )
        if name != OBS and name not in concepts:
            several = " (several are joined with +)" if re.search(r"[,;\s]", str(name)) else ""
            raise ValueError(
                f"unknown concept {shown(name)}{several}; the known ones are {OBS},"
                f" {', '.join(concepts)}."
            )
        if isinstance(value, Quantile) or _is_reference(value):
            if name == OBS:
                raise ValueError(
                    f"a value was chosen for {OBS!r}, where nothing is intervened on: name a"
                    " concept."
                )
            values[name] = value
            continue
        # NaN fails the comparison.
        if not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
            raise ValueError(
                f"strength of {shown(name)} must be a number in [0, 1] (or its value a Quantile or"
                f" an image), not {shown(value)}."
            )
        values[name] = float(value)
    return {
        name: values[name]
        for name in concepts
        if name in values and not (isinstance(values[name], float) and values[name] == 0.0)
    }


def _is_reference(value: Any) -> bool:
    """Whether a value is an image, or a list or an array of images."""
    if isinstance(value, (list, tuple)):
        return len(value) > 0 and all(map(_is_image, value))
    return _is_image(value) or getattr(value, "ndim", 0) == 4


def _is_image(value: Any) -> bool:
    """Whether a value is an image of PIL, or an array or tensor of two or three dimensions."""
    return hasattr(value, "getbands") or getattr(value, "ndim", 0) in (2, 3)


def _is_several(value: Any) -> bool:
    """Whether a chosen value is a list or an array of images."""
    return isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) == 4


def _split_value(text: str) -> tuple[str, float | Quantile | str]:
    """Split "size=0.5", "size@0.9" or "size" into name and value.

    A strength that is not a number is returned as text, so that the message can show it.
    """
    name, separator, strength = text.partition("=")
    if separator:
        try:
            return name.strip(), float(strength)
        except ValueError:
            return name.strip(), strength.strip()
    name, separator, quantile = text.partition("@")
    # Quantile also reads a number that is text.
    return name.strip(), Quantile(quantile.strip()) if separator else 1.0  # type: ignore[arg-type]


def named_concepts(context: str | Sequence[str]) -> list[str]:
    """Return the names in a context, `obs` included. It collects concept names from data."""
    parts = [context] if isinstance(context, str) else context
    return [name.partition("=")[0].strip() for part in parts for name in part.split("+")]


def context_name(context: Context, concepts: Sequence[str]) -> str:
    """Return the canonical name of a context.

    The forms are `"obs"`, `"quad1"`, `"quad1+size"`, `"size=0.5"` and `"size@0.9"`, with concepts
    in the order of `concepts`.

    Raises:
        ValueError, TypeError: see `parse_context`; or the context holds a reference image, which
            has no name.
    """
    names = []
    for name, value in parse_values(context, concepts).items():
        if isinstance(value, Quantile):
            names.append(f"{name}@{value.q!r}")
        elif isinstance(value, float):
            names.append(name if value == 1.0 else f"{name}={value!r}")
        else:
            raise ValueError(f"a context with a reference image, here of {name!r}, has no name.")
    return "+".join(names) or OBS


def is_per_sample(interventions: Interventions) -> bool:
    """Whether `interventions` lists one context per sample (see the module docstring)."""
    return (
        isinstance(interventions, Sequence)
        and not isinstance(interventions, str)
        and any(not isinstance(item, str) for item in interventions)
    )


def parse_interventions(
    interventions: Interventions,
    concepts: Sequence[str],
    num_images: int | None = None,
    free_blocks: int = 0,
) -> torch.Tensor:
    """Turn any form of interventions into targets `s` (METHOD section 2).

    Args:
        interventions: see the module docstring. A tensor has shape (d,), (D,), (batch, d) or
            (batch, D) and entries in [0, 1].
        concepts: the `d` known concept names, in block order.
        num_images: the number of rows. One context is repeated. A list of contexts, or a tensor
            with several rows, must have this many entries. `None` gives one row for one context,
            else one row per entry.
        free_blocks: `f`, the number of blocks that are never intervened on. Their columns are 0.

    Returns:
        float32 tensor of shape (num_images, D), D = d + f, on the CPU. A tensor of targets stays
        on its device.

    Raises:
        ValueError, TypeError: the interventions cannot be read, or have another number of rows, or
            choose values (see `parse_choices`). The message says what was expected.
    """
    targets, choices = parse_choices(interventions, concepts, num_images, free_blocks)
    _refuse_values(sorted({name for row in choices for name in row}))
    return targets


def parse_choices(
    interventions: Interventions,
    concepts: Sequence[str],
    num_images: int | None = None,
    free_blocks: int = 0,
) -> tuple[torch.Tensor, list[dict[str, Value]]]:
    """Parse interventions that may choose values of concepts.

    Args and errors are those of `parse_interventions`.

    Returns:
        targets: (num_images, D). The entry of a concept with a chosen value is 1.
        choices: for each sample a dict from concept to its `Quantile` or its one reference image.
            The list has a single entry if all samples share one context, and is empty if no value
            is chosen.
    """
    width, blocks = len(concepts), len(concepts) + free_blocks
    if num_images is not None:
        try:
            num_images = index(num_images)
        except TypeError:
            raise TypeError(
                f"the number of samples must be a whole number, not {shown(num_images)}"
                " (several concepts are one list, or joined with +)."
            ) from None
    if num_images is not None and abs(num_images) > _MOST_IMAGES:
        raise ValueError(f"the number of samples must be at most {_MOST_IMAGES}.")
    if num_images is not None and num_images < 1:
        raise ValueError(f"the number of samples must be at least 1, not {num_images}.")
    import torch

    if isinstance(interventions, torch.Tensor):
        targets, choices = _check_targets(interventions, width, blocks), []
    else:
        contexts = cast(
            Sequence[Context], interventions if is_per_sample(interventions) else [interventions]
        )
        rows = [parse_values(context, concepts) for context in contexts]
        rows = _one_reference_each(rows, num_images)
        choices = [
            {name: value for name, value in row.items() if not isinstance(value, float)}
            for row in rows
        ]
        strengths = [row | dict.fromkeys(chosen, 1.0) for row, chosen in zip(rows, choices)]
        targets = torch.tensor(
            [[row.get(name, 0.0) for name in concepts] for row in strengths], dtype=torch.float32
        )
        choices = choices if any(choices) else []
    targets = torch.nn.functional.pad(targets, (0, blocks - targets.shape[1]))
    if num_images is None or targets.shape[0] == num_images:
        return targets, choices
    if targets.shape[0] != 1:
        raise ValueError(
            f"{targets.shape[0]} contexts were given for {num_images} samples: give one context"
            " for all, or one per sample."
        )
    # Repeated, not expanded: torch.compile makes another graph for other strides.
    return targets.repeat(num_images, 1), choices


def _one_reference_each(rows: list[dict[str, Any]], num_images: int | None) -> list[dict[str, Any]]:
    """Give each row one reference image.

    A single context that holds several images, one per sample, becomes that many rows.
    """
    lengths = [
        (name, len(value))
        for row in rows
        for name, value in row.items()
        if _is_several(value) and len(value) != 1
    ]
    wanted = 1 if len(rows) > 1 else num_images or max((length for _, length in lengths), default=1)
    for name, length in lengths:
        if length != wanted:
            raise ValueError(
                f"{length} reference images of {name!r} were given for {wanted}"
                f" sample{'s' * (wanted > 1)}: give one for all, or one per sample."
            )
    rows = rows * wanted if lengths else rows
    return [
        {
            name: value[number % len(value)] if _is_several(value) else value
            for name, value in row.items()
        }
        for number, row in enumerate(rows)
    ]


def _check_targets(targets: torch.Tensor, width: int, blocks: int) -> torch.Tensor:
    targets = targets[None] if targets.ndim == 1 else targets
    if targets.ndim != 2 or targets.shape[1] not in (width, blocks):
        raise ValueError(
            f"targets must have shape (batch, {width}) or (batch, {blocks}), not"
            f" {tuple(targets.shape)}."
        )
    targets = targets.float()
    if not bool(((targets >= 0) & (targets <= 1)).all()):
        raise ValueError(
            "targets must lie in [0, 1] (0 = not intervened on, 1 = intervened on); some do not, or"
            " are NaN."
        )
    if bool((targets[:, width:] != 0).any()):
        raise ValueError(
            "targets of the free blocks must be 0: free blocks are never intervened on."
        )
    return targets


__all__ = [
    "OBS",
    "Context",
    "Interventions",
    "Quantile",
    "Value",
    "context_name",
    "parse_choices",
    "parse_context",
    "parse_interventions",
    "parse_values",
    "validate_concepts",
]
