"""Read the true factors of quad from pixels, and measure what edits do to them.

See METHOD sections 4 and 5, and arXiv:2507.04754. `read_factors` compares every image with images
of the renderer. No network is trained.

- The colour of a quadrant is that of the block at its outer corner, which no shape reaches. The
  colour of the shape is that of the pixels at the centre, which every shape covers. The level u of
  a colour is the nearest point on the palette.
- Kind, size and orientation are those of the drawn shape with the smallest squared error. All
  shapes of a grid of kinds, sizes and angles are compared, and those that fit about equally well
  are averaged. So a blurred shape can be read too.

A shape is invisible in a quadrant of its own colour, and the kind of the smallest shapes is not
always visible. `read_error` measures the error on real images: at 64 pixels no kind is wrong, and
the mean error of u of the size is 0.006. At 32 pixels the values are 1 % and 0.010.
`intervention_effects` compares the factors before and after an edit with those of the simulator.

With u in [0, 1] the normal CDF of a latent, images show:

    quad1 to quad4, color   u, as a colour; exact up to rounding
    size                    u
    shape                   only its kind, round(3u), of `KINDS`. The change is the total variation
                            distance between the probabilities of the kinds, 1 for another kind.
    orientation             the angle 2 pi u up to the symmetry of the kind. The change is the angle
                            in periods of that symmetry (a quarter turn of a square, a third of a
                            triangle, half of an ellipse), at most 0.5. A circle has no orientation,
                            and orientations of different kinds are not compared.
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
# Factors that are visible as u itself.
LEVELS = ("quad1", "quad2", "quad3", "quad4", "size", "color")
# Mean change between two unrelated images, with observational or independent latents.
CHANCE = dict.fromkeys(LEVELS, 1 / 3) | {"shape": 13 / 18, "orientation": 1 / 4}
# For each kind, the number of rotations within a full turn that look the same; 0 means all.
_SYMMETRY = np.array([0, 4, 3, 2])
_SIZES, _TURN = 49, 64  # sizes of the grid, and angles per full turn
# Shapes whose squared errors, in pixels of full contrast, differ by less count as equally good.
_TEMPERATURE = 0.1
_BATCH = 256


@dataclass
class Factors:
    """The visible factors of n images.

    Args:
        levels: u of `LEVELS`, (n, 6).
        kinds: probability of each of `KINDS`, (n, 4).
        phases: orientation in periods, mod 1, of a square, a triangle and an ellipse, (n, 3). The
            column of the shape's kind is its orientation.
    """

    levels: np.ndarray
    kinds: np.ndarray
    phases: np.ndarray


def true_factors(latents: np.ndarray) -> Factors:
    """Return the visible factors of quad's latents (n, 8)."""
    u = ndtr(np.asarray(latents, dtype=np.float64))
    columns = [LATENTS.index(name) for name in LEVELS]
    # Rounded as in the renderer.
    kinds = np.eye(len(KINDS))[np.rint(3 * u[:, LATENTS.index("shape")]).astype(int)]
    return Factors(
        u[:, columns], kinds, u[:, LATENTS.index("orientation"), None] * _SYMMETRY[1:] % 1
    )


def factor_changes(before: Factors, after: Factors, kinds: np.ndarray) -> np.ndarray:
    """Return the mean absolute change of each factor, in the units of the module docstring.

    Args:
        before, after: factors of n pairs of images.
        kinds: index in `KINDS`, (n,), of the symmetry with which the orientations are compared.
            Orientations of kind 0, the circle, are not compared.

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
    """Read the factors that images of quad show.

    Args:
        images: uint8 or float in [0, 1], (n, S, S, 3). S should be at least 32: in smaller images
            the shape is read poorly.

    Returns:
        `Factors` of n images; see `hf_intervene.metrics.factors`.

    Raises:
        ValueError: the images have another shape, or pixels are outside [0, 1].
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
    """Return the level u in [0, 1] of colours (..., 3) in [0, 1], (...).

    It is that of the nearest point on the piecewise-linear palette.
    """
    corners = shapes.PALETTE / 255  # (6, 3)
    start, step = corners[:-1], np.diff(corners, axis=0)  # (5, 3)
    away = np.asarray(colours, dtype=np.float64)[..., None, :] - start  # (..., 5, 3)
    along = np.clip((away * step).sum(-1) / np.square(step).sum(-1), 0, 1)  # (..., 5)
    distance = np.square(away - along[..., None] * step).sum(-1)
    segment = distance.argmin(-1)
    return (segment + np.take_along_axis(along, segment[..., None], -1)[..., 0]) / len(step)


def read_error(resolution: int, images: int = 1000, seed: int = 0) -> dict[str, float]:
    """Measure the error of `read_factors` on real images, for independent uniform factors.

    Args:
        resolution: side of the images.
        images: number of images.
        seed: seed of the latents.

    Returns:
        For each factor of `LATENTS`: the mean absolute error of u (colours and size); the share of
        wrong kinds (`shape`); the mean angle between the result and the truth, in periods of the
        shape's symmetry, without circles (`orientation`; 0.25 by chance).
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
    """Compare the change of each factor by an edit with the true change, both read from images.

    `before` should be images of the model that it reconstructed without an edit. With real images,
    everything that the model cannot draw would count as change. A factor that the model cannot draw
    should not be in `visible`, because its reading means nothing. Such a factor has a large
    `factor_changes` between the reconstructed and the real images.

    `moved` depends on the simulator's choice of intervened values for given noise
    (`quad.counterfactual_latents`), which unpaired contexts do not determine: a model may move a
    concept more or less and still fit its data. `moved` also ignores the direction. `leak` depends
    only on the causal graph.

    Args:
        before, after: images and their edits, in pairs, (n, S, S, 3), uint8 or float in [0, 1].
        latents: latents of `before`, (n, 8).
        counterfactual: these latents under the intervention, (n, 8).
        concepts: the intervened concepts, at least one.
        visible: factors that are used for `moved` and `leak`.

    Returns:
        `factors`: for each of `LATENTS` the mean `change` by the edit and the mean `true_change`,
        read from the simulator's images, in the units of the module docstring. Orientations are
        compared if the true kind stays the same and has an orientation; else the entry is NaN.
        `moved`: change / true change, summed over the visible intervened factors; 1 is right.
        `leak`: mean change of the visible factors that do not truly change.
        `leak_floor`: their mean true change, the error of `read_factors`. Both are NaN if there is
        no such factor.
    """
    kinds, kinds_after = (true_factors(x).kinds.argmax(1) for x in (latents, counterfactual))
    kinds = np.where(kinds == kinds_after, kinds, 0)
    pairs = (before, after), (render(x, before.shape[1]) for x in (latents, counterfactual))
    change, true_change = (
        factor_changes(read_factors(a), read_factors(b), kinds) for a, b in pairs
    )
    valid = np.isin(LATENTS, list(visible)) & ~np.isnan(true_change)
    moving = valid & np.isin(LATENTS, list(parse_context(concepts, LATENTS)))
    # Factors that are equal up to rounding.
    still = valid & np.isclose(latents, counterfactual, rtol=0, atol=1e-6).all(0)
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
    """Return levels (B, 6), probabilities of kinds (B, 4) and phases (B, 3) of (B, 3, S, S)."""
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
    # The error of a shape is that of the ground, plus, over the pixels that it covers, the error of
    # the shape's colour minus that of the ground.
    shape_error, ground_error = (x - centre[..., None, None]).square(), (x - ground).square()
    difference = shape_error.sum(1) - ground_error.sum(1)  # (B, S, S)
    masks, kinds, sizes, turns = _templates(side)
    errors = difference.flatten(1) @ masks  # (B, T)
    # All kinds have the same prior probability, whatever their number of shapes on the grid.
    counts = kinds.bincount().float()[kinds]
    weights = (-errors / _TEMPERATURE - counts.log()).softmax(1)
    by_kind = torch.stack([weights[:, kinds == k].sum(1) for k in range(len(KINDS))], 1)  # (B, 4)
    size = weights @ sizes
    phases = []
    for kind in range(1, len(KINDS)):
        of_kind = kinds == kind
        # Only within the kind, so that it is also defined if another kind fits better.
        w = (-errors[:, of_kind] / _TEMPERATURE).softmax(1)
        angle = 2 * torch.pi * _SYMMETRY[kind] * turns[of_kind]
        phases.append(torch.atan2(w @ angle.sin(), w @ angle.cos()) / (2 * torch.pi) % 1)
    # (B, 4, 3): top left, top right, bottom left, bottom right.
    flat = corners.flatten(2).mT.numpy()
    # quad1 to quad4, color.
    colours = np.concatenate([flat[:, [2, 3, 0, 1]], centre.numpy()[:, None]], 1)
    levels = palette_levels(colours)
    levels = np.concatenate([levels[:, :4], size.double().numpy()[:, None], levels[:, 4:]], 1)
    return levels, by_kind.double().numpy(), torch.stack(phases, 1).double().numpy()


@lru_cache(maxsize=2)
def _templates(side: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the shapes of the grid.

    Returns:
        The pixels that each shape covers, float32 (S * S, T), and its kind, u of its size and its
        turn, each (T,).
    """
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
