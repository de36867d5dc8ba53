"""The true factors of quad, read off the pixels, and what edits do to them (METHOD sections 4 and
5; arXiv:2507.04754).

`read_factors` compares every image with what the renderer would draw. No network is trained.

- The colour of a quadrant is that of the block at its outer corner, which no shape reaches. The
  colour of the shape is that of the pixels at the centre, which every shape covers. The level u of
  a colour is the nearest point on the palette.
- Kind, size and orientation are those of the drawn shape with the smallest squared error. All
  shapes of a grid of kinds, sizes and angles are tried, and those that fit about as well are
  averaged. So a blurred shape is read too.

A shape whose colour is that of a quadrant cannot be seen there, and of the smallest shapes the kind
cannot always be told. `read_error` measures the error on real images: at 64 pixels no kind is wrong
and u of the size is off by 0.006 in the mean; at 32 pixels 1 % and 0.010. `intervention_effects`
compares what is read before and after an edit with what the simulator says would have happened.

What an image shows of a latent, u in [0, 1] being its normal CDF, and in which units it changes:

    quad1 to quad4, color   u, as a colour; read exactly up to rounding size                    u
    shape                   only its kind, round(3u), of `KINDS`; the change is the total variation
    distance between the
                            probabilities of the kinds, 1 for another kind
    orientation             the angle 2 pi u up to the symmetry of the kind; the change is the angle
    between the two, in periods of
                            that symmetry (a quarter turn of a square, a third of a triangle, half
                            of an ellipse), 0.5 at most. A circle has none, and none is compared
                            across kinds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from scipy.special import ndtr
from torch.nn import functional as F

from ..contexts import OBS, Context, parse_context
from ..data import quad, shapes
from ..data.quad import LATENTS
from ..data.shapes import render
from .networks import MAX_SIDE, pixel_values, unit


KINDS = ("circle", "square", "triangle", "ellipse")
LEVELS = (
    "quad1",
    "quad2",
    "quad3",
    "quad4",
    "size",
    "color",
)  # the factors that are visible as u itself
# Mean change between images that have nothing to do with each other, of observational or
# independent latents.
CHANCE = dict.fromkeys(LEVELS, 1 / 3) | {"shape": 13 / 18, "orientation": 1 / 4}
_SYMMETRY = np.array(
    [0, 4, 3, 2]
)  # positions in a full turn that look the same, of each kind; 0: all
_SIZES, _TURN = 49, 64  # of the grid: sizes, and angles in a full turn
# squared error, in pixels of full contrast, within which shapes count as fitting equally well
_TEMPERATURE = 0.1
_BATCH = 256


@dataclass
class Factors:
    """The visible factors of n images.

    Args:
        levels: u of `LEVELS`, (n, 6).
        kinds: probability of each of `KINDS`, (n, 4).
        phases: orientation in periods, mod 1, if the shape were a square, a triangle, an ellipse,
            (n, 3).
    """

    levels: np.ndarray
    kinds: np.ndarray
    phases: np.ndarray


def true_factors(latents: np.ndarray) -> Factors:
    """The visible factors of quad's latents (n, 8)."""
    u = ndtr(np.asarray(latents, dtype=np.float64))
    columns = [LATENTS.index(name) for name in LEVELS]
    # Rounded as the renderer does.
    kinds = np.eye(len(KINDS))[np.rint(3 * u[:, LATENTS.index("shape")]).astype(int)]
    return Factors(
        u[:, columns], kinds, u[:, LATENTS.index("orientation"), None] * _SYMMETRY[1:] % 1
    )


def factor_changes(before: Factors, after: Factors, kinds: np.ndarray) -> np.ndarray:
    """Mean absolute change of each factor, in the units of the module docstring.

    Args:
        before, after: factors of n images and of n others, pair by pair.
        kinds: index in `KINDS` (n,) by which the orientations are compared; none is for 0, the
            circle.

    Returns:
        (8,), in the order of `LATENTS`; NaN for orientation if none is compared.
    """
    rows = np.flatnonzero(kinds)
    turn = (after.phases - before.phases)[rows, kinds[rows] - 1] % 1
    changes = dict(zip(LEVELS, np.abs(after.levels - before.levels).mean(0)))
    changes["shape"] = np.abs(after.kinds - before.kinds).sum(1).mean() / 2
    changes["orientation"] = np.minimum(turn, 1 - turn).mean() if len(rows) else math.nan
    return np.array([changes[name] for name in LATENTS])


def read_factors(images: np.ndarray) -> Factors:
    """The factors that images of quad show.

    Args:
        images: uint8 or float in [0, 1], (n, S, S, 3). Meant for S of 32 or more; of smaller ones
            the shape is read poorly.

    Returns:
        `Factors` of n images; see `hf_intervene.metrics.factors`.

    Raises:
        ValueError: images of another shape, or pixels out of [0, 1].
    """
    images = np.asarray(images)
    if (
        images.ndim != 4
        or images.shape[3] != 3
        or images.shape[1] != images.shape[2]
        or images.shape[1] < 8
    ):
        raise ValueError(
            f"images of quad have the shape (n, S, S, 3), S at least 8, not {images.shape}."
        )
    parts = [_read_batch(unit(batch)) for batch in pixel_values(images).split(_BATCH)]
    return Factors(*(np.concatenate(arrays) for arrays in zip(*parts)))


def palette_levels(colours: np.ndarray) -> np.ndarray:
    """The level u in [0, 1] of colours (..., 3) in [0, 1]: the nearest point on the
    piecewise-linear palette, (...)."""
    corners = shapes.PALETTE / 255  # (6, 3)
    start, step = corners[:-1], np.diff(corners, axis=0)  # (5, 3)
    away = np.asarray(colours, dtype=np.float64)[..., None, :] - start  # (..., 5, 3)
    along = np.clip((away * step).sum(-1) / np.square(step).sum(-1), 0, 1)  # (..., 5)
    distance = np.square(away - along[..., None] * step).sum(-1)
    segment = distance.argmin(-1)
    return (segment + np.take_along_axis(along, segment[..., None], -1)[..., 0]) / len(step)


def read_error(resolution: int, images: int = 1000, seed: int = 0) -> dict[str, float]:
    """How far the factors read off real images are from the truth, for independent uniform factors.

    Args:
        resolution: side of the images.
        images: how many.
        seed: of the latents.

    Returns:
        By factor of `LATENTS`: mean absolute error of u (colours and size); share of wrong kinds
        (`shape`); mean angle, in periods of the shape's symmetry, between what is read and the
        truth, 0.25 by chance (`orientation`; without circles).
    """
    latents = quad.sample_latents(OBS, images, "independent", seed)
    truth, read = true_factors(latents), read_factors(quad.render(latents, resolution))
    errors = dict(zip(LEVELS, np.abs(truth.levels - read.levels).mean(0)))
    kinds = truth.kinds.argmax(1)
    errors["shape"] = float((read.kinds.argmax(1) != kinds).mean())
    rows = np.flatnonzero(kinds)
    turn = (truth.phases - read.phases)[rows, kinds[rows] - 1] % 1
    errors["orientation"] = np.minimum(turn, 1 - turn).mean()
    return {name: float(errors[name]) for name in LATENTS}


def intervention_effects(
    before: np.ndarray,
    after: np.ndarray,
    latents: np.ndarray,
    counterfactual: np.ndarray,
    concepts: Context,
    visible: Sequence[str] = LATENTS,
) -> dict:
    """What an edit did to each factor, beside what it should have done, both read off images.

    Give as `before` the model's own images, edited to nothing: with real ones, all that the model
    cannot draw would count as change. What is read of a factor that it cannot draw means nothing,
    though: leave such out of `visible`. They are those that `factor_changes` finds far from the
    real images.

    `moved` rests on the simulator's pairing of noise and intervened values
    (`quad.counterfactual_latents`), which unpaired contexts do not determine: a model may move a
    concept more or less than that and fit its data. Nor does it see the direction. `leak` rests on
    the graph alone.

    Args:
        before, after: images and the same edited, pair by pair, (n, S, S, 3), uint8 or in [0, 1].
        latents: that belong to `before`, (n, 8).
        counterfactual: what they would have been under the intervention, (n, 8).
        concepts: the intervened concepts, one at least.
        visible: factors that count for `moved` and `leak`.

    Returns:
        `factors`: for each of `LATENTS` the mean `change` by the edit and the mean `true_change`,
        read off the simulator's images, in the units of the module docstring. Orientations are
        compared where truth keeps a kind that has one; NaN if it nowhere does.
        `moved`: change / true change, summed over the visible intervened factors; 1 is right.
        `leak`: mean change of the visible factors that truth leaves as they are.
        `leak_floor`: mean true change of those, which is the reader's own error. NaN without any
        such factor.
    """
    kinds, kinds_after = (true_factors(x).kinds.argmax(1) for x in (latents, counterfactual))
    kinds = np.where(kinds == kinds_after, kinds, 0)
    pairs = (before, after), (render(x, before.shape[1]) for x in (latents, counterfactual))
    change, true_change = (
        factor_changes(read_factors(a), read_factors(b), kinds) for a, b in pairs
    )
    valid = np.isin(LATENTS, list(visible)) & ~np.isnan(true_change)
    moving = valid & np.isin(LATENTS, list(parse_context(concepts, LATENTS)))
    still = valid & np.isclose(latents, counterfactual, rtol=0, atol=1e-6).all(
        0
    )  # equal up to rounding
    return {
        "factors": {
            name: {"change": float(a), "true_change": float(b)}
            for name, a, b in zip(LATENTS, change, true_change)
        },
        "moved": float(change[moving].sum() / true_change[moving].sum())
        if moving.any()
        else math.nan,
        "leak": float(change[still].mean()) if still.any() else math.nan,
        "leak_floor": float(true_change[still].mean()) if still.any() else math.nan,
    }


def _read_batch(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Levels (B, 6), probabilities of the kinds (B, 4) and phases (B, 3) of images (B, 3, S, S)."""
    if x.shape[-1] > MAX_SIDE:
        x = F.adaptive_avg_pool2d(x, MAX_SIDE)
    side = x.shape[-1]
    half, block = side // 2, max(1, side // 8)
    outer = torch.cat([x[..., :block], x[..., -block:]], 3)
    corners = F.adaptive_avg_pool2d(
        torch.cat([outer[..., :block, :], outer[..., -block:, :]], 2), 2
    )  # (B, 3, 2, 2)
    centre = x[..., half - 1 : half + 1, half - 1 : half + 1].mean((2, 3))  # (B, 3)
    ground = corners.repeat_interleave(half, 2).repeat_interleave(half, 3)  # (B, 3, S, S)
    # Error of a shape that covers the pixels M: that of the ground alone, and over M the difference
    # of the two errors.
    difference = (x - centre[..., None, None]).square().sum(1) - (x - ground).square().sum(
        1
    )  # (B, S, S)
    masks, kinds, sizes, turns = _templates(side)
    errors = difference.flatten(1) @ masks  # (B, T)
    counts = kinds.bincount().float()[
        kinds
    ]  # all kinds are as likely, whatever the number of their shapes on the grid
    weights = (-errors / _TEMPERATURE - counts.log()).softmax(1)
    by_kind = torch.stack([weights[:, kinds == k].sum(1) for k in range(len(KINDS))], 1)  # (B, 4)
    size = weights @ sizes
    phases = []
    for kind in range(1, len(KINDS)):
        of_kind = kinds == kind
        # Within the kind alone, so that it is defined where another kind fits better.
        w = (-errors[:, of_kind] / _TEMPERATURE).softmax(1)
        angle = 2 * torch.pi * _SYMMETRY[kind] * turns[of_kind]
        phases.append(torch.atan2(w @ angle.sin(), w @ angle.cos()) / (2 * torch.pi) % 1)
    flat = corners.flatten(
        2
    ).mT.numpy()  # (B, 4, 3): top left, top right, bottom left, bottom right
    colours = np.concatenate(
        [flat[:, [2, 3, 0, 1]], centre.numpy()[:, None]], 1
    )  # quad1 to quad4, color
    levels = palette_levels(colours)
    levels = np.concatenate([levels[:, :4], size.double().numpy()[:, None], levels[:, 4:]], 1)
    return levels, by_kind.double().numpy(), torch.stack(phases, 1).double().numpy()


@lru_cache(maxsize=2)
def _templates(side: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Shapes of the grid: which pixels each covers, float32 (S * S, T), and its kind, u of its size
    and turn, each (T,)."""
    grids = []
    for kind, symmetry in enumerate(_SYMMETRY):
        angles = np.arange(_TURN // symmetry) / _TURN if symmetry else np.zeros(1)
        grids += [(kind, size, turn) for size in np.linspace(0, 1, _SIZES) for turn in angles]
    kinds, sizes, turns = np.array(grids).T
    kinds = kinds.astype(int)
    masks = shapes.shape_masks(kinds, sizes, turns, side).reshape(len(kinds), -1)
    size, turn = (torch.from_numpy(array.astype(np.float32)) for array in (sizes, turns))
    return (
        torch.from_numpy(masks.T.astype(np.float32)).contiguous(),
        torch.from_numpy(kinds),
        size,
        turn,
    )
