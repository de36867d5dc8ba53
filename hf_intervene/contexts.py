"""The vocabulary of interventions: from what a user says to the target tensor `s` of METHOD section 2.

A *context* is a set of intervened concepts, each with a strength in (0, 1]. Every way of naming one is parsed here and nowhere else:

    "obs"  or  None  or  []          nothing is intervened on
    "quad1"                          one concept
    ["quad1", "size"] or "quad1+size"   several at once
    {"quad1": 1.0, "size": 0.5} or "quad1+size=0.5"   with strengths
    [["quad1"], "obs", {"size": 0.5}]   one context per sample: a list holding at least one list, tuple, dict or None
    a tensor of targets              used as it is, after checks

This file imports torch alone, so that it can travel with a checkpoint.
"""

import math
from collections.abc import Mapping, Sequence

import torch


OBS = "obs"
_RESERVED = "+=,"

Context = str | Sequence[str] | Mapping[str, float] | None
Interventions = Context | Sequence[Context] | torch.Tensor


def validate_concepts(concepts: Sequence[str]) -> tuple[str, ...]:
    """Check the concept names of a model or data set and return them as a tuple.

    Raises:
        ValueError: no name, an empty or repeated name, the reserved name `obs`, or a character of `+ = ,` in a name.
    """
    if isinstance(concepts, str) or not isinstance(concepts, Sequence):
        raise ValueError(f"concepts must be a list of names, not {concepts!r}.")
    if not concepts:
        raise ValueError("concepts is empty: name at least one concept.")
    seen = set()
    for name in concepts:
        if not isinstance(name, str) or not name or name != name.strip():
            raise ValueError(f"concept names must be non-empty strings without surrounding spaces, not {name!r}.")
        if name.lower() == OBS:
            raise ValueError(f"{name!r} is reserved for the observational context and cannot name a concept.")
        if any(character in name for character in _RESERVED):
            raise ValueError(f"concept name {name!r} holds one of the reserved characters {' '.join(_RESERVED)}; rename it.")
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
        Strength in (0, 1] of every intervened concept, in the order of `concepts`; empty for the observational context.

    Raises:
        ValueError: unknown or repeated name (the known ones are listed), `obs` beside a concept, strength out of [0, 1].
        TypeError: not one of the forms.
    """
    if context is None:
        return {}
    if isinstance(context, str):
        items = [_split_strength(part) for part in context.split("+")]
    elif isinstance(context, Mapping):
        items = list(context.items())
    elif isinstance(context, Sequence) and all(isinstance(name, str) for name in context):
        items = [_split_strength(part) for name in context for part in name.split("+")]
    else:
        raise TypeError(
            f"cannot read {context!r} as a context: give a concept name, a list of names, or a dict of name to strength."
        )
    strengths: dict[str, float] = {}
    for name, strength in items:
        if name in strengths:
            raise ValueError(f"concept {name!r} is named twice in one context.")
        if name == OBS and len(items) > 1:
            raise ValueError(
                f"{OBS!r} cannot be combined with concepts; for one context per sample wrap each: [['obs'], ['{concepts[0]}']]."
            )
        if name != OBS and name not in concepts:
            raise ValueError(f"unknown concept {name!r}; the known ones are {OBS}, {', '.join(concepts)}.")
        if not isinstance(strength, (int, float)) or not 0.0 <= strength <= 1.0:  # NaN fails the comparison
            raise ValueError(f"strength of {name!r} must be a number in [0, 1], not {strength!r}.")
        strengths[name] = float(strength)
    strengths.pop(OBS, None)
    return {name: strengths[name] for name in concepts if strengths.get(name, 0.0) > 0.0}


def _split_strength(text: str) -> tuple[str, float]:
    name, separator, strength = text.partition("=")
    if not separator:
        return name.strip(), 1.0
    try:
        return name.strip(), float(strength)
    except ValueError:
        return name.strip(), math.nan


def named_concepts(context: str | Sequence[str]) -> list[str]:
    """The names in a context, `obs` included, before it is known which concepts there are: to collect them from data."""
    parts = [context] if isinstance(context, str) else context
    return [_split_strength(name)[0] for part in parts for name in part.split("+")]


def context_name(context: Context, concepts: Sequence[str]) -> str:
    """The canonical name of a context: `"obs"`, `"quad1"`, `"quad1+size"`, `"size=0.5"`; concepts in the order of `concepts`."""
    strengths = parse_context(context, concepts)
    if not strengths:
        return OBS
    return "+".join(name if value == 1.0 else f"{name}={value!r}" for name, value in strengths.items())


def is_per_sample(interventions: Interventions) -> bool:
    """Whether `interventions` lists one context per sample (see the module docstring)."""
    return (
        isinstance(interventions, Sequence)
        and not isinstance(interventions, str)
        and any(not isinstance(item, str) for item in interventions)
    )


def parse_interventions(
    interventions: Interventions, concepts: Sequence[str], num_samples: int | None = None, free_blocks: int = 0
) -> torch.Tensor:
    """Turn any user-facing description of interventions into targets `s` (METHOD section 2).

    Args:
        interventions: see the module docstring. A tensor has shape (d,), (D,), (batch, d) or (batch, D), entries in [0, 1].
        concepts: the `d` known concept names, in block order.
        num_samples: number of rows wanted. One context is repeated; a list of contexts (or rows of a tensor) must have that
            many entries. `None`: one row for one context, else a row per entry.
        free_blocks: `f`, the number of blocks never intervened on; their columns are 0.

    Returns:
        float32 tensor of shape (num_samples, D), D = d + f, on the CPU (a tensor keeps its device).

    Raises:
        ValueError, TypeError: one sentence saying what is wrong and what was expected.
    """
    width, blocks = len(concepts), len(concepts) + free_blocks
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"the number of samples must be at least 1, not {num_samples}.")
    if isinstance(interventions, torch.Tensor):
        targets = _check_targets(interventions, width, blocks)
    else:
        contexts = interventions if is_per_sample(interventions) else [interventions]
        parsed = [parse_context(context, concepts) for context in contexts]
        targets = torch.tensor([[row.get(name, 0.0) for name in concepts] for row in parsed], dtype=torch.float32)
    targets = torch.nn.functional.pad(targets, (0, blocks - targets.shape[1]))
    if num_samples is None or targets.shape[0] == num_samples:
        return targets
    if targets.shape[0] != 1:
        raise ValueError(
            f"{targets.shape[0]} contexts were given for {num_samples} samples: give one context for all, or one per sample."
        )
    return targets.expand(num_samples, -1)


def _check_targets(targets: torch.Tensor, width: int, blocks: int) -> torch.Tensor:
    targets = targets[None] if targets.ndim == 1 else targets
    if targets.ndim != 2 or targets.shape[1] not in (width, blocks):
        raise ValueError(f"targets must have shape (batch, {width}) or (batch, {blocks}), not {tuple(targets.shape)}.")
    targets = targets.to(torch.float32)
    if not bool(((targets >= 0) & (targets <= 1)).all()):
        raise ValueError("targets must lie in [0, 1] (0 = not intervened on, 1 = intervened on); some do not, or are NaN.")
    if bool((targets[:, width:] != 0).any()):
        raise ValueError("targets of the free blocks must be 0: free blocks are never intervened on.")
    return targets


def context_names(targets: torch.Tensor, concepts: Sequence[str]) -> list[str]:
    """Inverse of `parse_interventions`: the canonical context name of every row of targets, shape (batch, >= d)."""
    return [context_name({name: float(value) for name, value in zip(concepts, row)}, concepts) for row in targets.tolist()]
