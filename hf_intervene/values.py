"""Chosen values of concepts, do(c_j = v): from what a context says (`contexts.parse_choices`) to
what the head takes.

The value of concept j is its representation c_j, (concept_width,), in the intervention layer. It is
chosen

- from a reference image: abduct it under its context and take c_j of its posterior mean;
- as a `Quantile`: a point on the range that was learnt, the distribution of c_j under its own
  intervention (s_j = 1, z from the prior). Draws are ordered along its leading principal component,
  and the value at q is the mean of those nearest to that quantile, so that it stays where the draws
  are.

Nothing in the data says which end of a range is "large": the direction is not identified, only
fixed (the component's largest entry is positive). A concept whose range is not a curve, such as an
angle, is followed along its main direction only. And nothing but context prediction, while
training, asks the model to put a concept into its own block. One that training left empty has no
value worth choosing, which is warned of; whether what another one holds is its concept can only be
seen in images (`plots.traversal`)."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .contexts import Quantile, Value
from .modeling_intervention import InterventionHead


DRAWS, NEAREST = 4096, 64
# influence below which a block counts as empty; those measured were below 0.01 or above 0.02
EMPTY = 0.01


class Values(NamedTuple):
    """The last two arguments of the head: `values` (B, D, concept_width) of the concepts where
    `chosen`, bool (B, D).
    """

    values: torch.Tensor
    chosen: torch.Tensor

    def split(self, size: int) -> list["Values"]:
        return [Values(*parts) for parts in zip(self.values.split(size), self.chosen.split(size))]


def each_alone(
    targets: torch.Tensor, values: Values | None
) -> list[tuple[torch.Tensor, Values | None]]:
    """Targets and chosen values with one concept at a time, for each that any row is intervened on.

    Args:
        targets: (B, D).
        values: of the same rows.
    """
    alone: list[tuple[torch.Tensor, Values | None]] = []
    for k in (targets != 0).any(0).nonzero().flatten().tolist():
        only = torch.zeros_like(targets)
        only[:, k] = targets[:, k]
        chosen = None if values is None else Values(values.values, values.chosen & (only != 0))
        alone.append((only, chosen))
    return alone


@torch.no_grad()
def learnt_range(
    head: InterventionHead, concept: str, draws: int = DRAWS, seed: int = 0
) -> torch.Tensor:
    """Draws of c_j under its own intervention, (draws, concept_width), float32, ordered along their
    leading principal component.
    """
    block = head.config.concepts.index(concept)
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(draws, head.config.num_blocks, head.config.noise_width, generator=generator).to(
        head.device
    )
    # embeddings may be large
    parts = [
        head(part, head.targets(concept, len(part))).concepts[:, block] for part in z.split(256)
    ]
    c = torch.cat(parts).float()  # (draws, w)
    centred = (c - c.mean(0)).double().cpu()
    component = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1]  # (w,)
    component = component * component[component.abs().argmax()].sign()
    return c[(centred @ component).argsort(stable=True).to(c.device)]


@torch.no_grad()
def influence(head: InterventionHead, concept: str, draws: int = 256, seed: int = 0) -> float:
    """How much of the embedding, under a concept's own intervention, its own noise z_j decides: the
    mean squared change when only z_j is drawn anew, over that when all of z is."""
    block, shape = (
        head.config.concepts.index(concept),
        (draws, head.config.num_blocks, head.config.noise_width),
    )
    generator = torch.Generator().manual_seed(seed)
    z, other = (torch.randn(shape, generator=generator).to(head.device) for _ in range(2))
    own = z.clone()
    own[:, block] = other[:, block]
    targets = head.targets(concept, draws)
    before, after, all_after = (head(noise, targets).embedding.float() for noise in (z, own, other))
    return (
        (after - before).square().sum() / (all_after - before).square().sum().clamp(min=1e-30)
    ).item()


def quantile_value(ordered: torch.Tensor, q: float, nearest: int = NEAREST) -> torch.Tensor:
    """The point at quantile q of a `learnt_range` (draws, w): the mean of the draws whose ranks are
    nearest, (w,).
    """
    first = min(max(round(q * len(ordered) - nearest / 2), 0), len(ordered) - nearest)
    return ordered[first : first + nearest].mean(0)


def head_values(
    head: InterventionHead,
    choices: Sequence[dict[str, Value]],
    num_images: int,
    encode: Callable[[list[int], list[str], list[Any]], torch.Tensor],
) -> Values | None:
    """The chosen values of samples; `None` where nothing is chosen.

    Args:
        head: whose concepts they are.
        choices: those of each sample, or of all, as `parse_choices` returns them.
        num_images: B.
        encode: c (R, D, concept_width) of R reference images: their positions in `choices`, the
            concepts they are for, the images.
    """
    if not choices:
        return None
    config, ranges, references = head.config, {}, []
    values = torch.zeros(len(choices), config.num_blocks, config.concept_width, device=head.device)
    chosen = torch.zeros(len(choices), config.num_blocks, dtype=torch.bool, device=head.device)
    for row, choice in enumerate(choices):
        for name, value in choice.items():
            block = config.concepts.index(name)
            chosen[row, block] = True
            if not isinstance(value, Quantile):
                references.append((row, name, value))
                continue
            if name not in ranges:
                ranges[name] = learnt_range(head, name)
            values[row, block] = quantile_value(ranges[name], value.q)
    for name in {name: None for choice in choices for name in choice}:
        if (share := influence(head, name)) < EMPTY:
            warnings.warn(
                f"the block of {name!r} decides next to nothing in this model (influence"
                f" {share:.4f}): so does a value chosen for it.",
                stacklevel=2,
            )
    if references:
        rows, names, images = map(list, zip(*references))
        for row, name, c in zip(rows, names, encode(rows, names, images)):
            block = config.concepts.index(name)
            values[row, block] = c[block]
    return Values(values.expand(num_images, -1, -1), chosen.expand(num_images, -1))


__all__ = ["each_alone", "influence", "learnt_range", "quantile_value"]
