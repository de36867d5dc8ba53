"""MNIST concepts: real handwritten digits with interventions on single concepts.

The images are grey, 28 x 28 pixels. See METHOD section 4. Three concepts are affine: `scale`,
`shear`, `shift`. Three are morphological: `swell`, `thicken`, `thin`, after Morpho-MNIST (Castro,
Tan, Kainz, Konukoglu, Glocker: Morpho-MNIST: Quantitative assessment and diagnostics for
representation learning. JMLR 20, 2019). They are implemented from their mathematical definitions.
The observational context is the original handwriting, whose slant, thickness and size vary by
nature. An intervention draws its parameters (`LATENTS`) for every image:

    scale     scale: the digit is shrunk to 0.6 to 0.85 of its size
    shear     shear: x grows by 0.4 to 0.8 of y, the digit leans to the left (by nature most lean a
              little to the right)
    shift     shift_x, shift_y: 2 to 4.5 pixels to the left, 1 to 3 upwards (where MNIST has more
              space)
    swell     the plane is warped around a point of the digit's medial axis,
              r -> R (r / R)^(1 / strength) for r < R: swell_position, the point on the axis, from
              top (0) to bottom (1); swell_radius, R of 5 to 8 pixels; swell_strength, 2.5 to 4
    thicken   thicken: dilated by a disk of radius 0.6 to 1.2 half thicknesses of the stroke
    thin      thin: eroded by a disk of radius 0.3 to 0.6 half thicknesses

All ranges are uniform. Several concepts are applied in this order: thickness, swelling, scale and
shear, shift.

    digits (n, 28, 28) --4 x finer grid, half of the white--> signed distance to the contour
        (n, 112, 112) --minus the disk's radius, read at the source points of the warps--> coverage
        (n, 112, 112) --mean of 4 x 4--> images (n, 28, 28, 1)

A dilation or erosion by a disk is a level set of the distance to the contour, so that its radius
may be any number. The observational context is drawn in the same way, so that the drawing does not
reveal the context. The thickness of a stroke is four times the mean distance of its points to the
contour. (Morpho-MNIST takes twice the mean distance along the skeleton. Over digits of MNIST the
two have a correlation of 0.99.)

Every image depends only on (digits, seed, context, its row), not on the number of images. A context
uses every digit once before it uses one again. The card is model_cards/datasets/mnist.md.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence

import numpy as np
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from scipy import ndimage
from tqdm.auto import tqdm

from ..contexts import OBS, Context, context_name
from .digits import BUNDLED, SIDE, Digits, load_digits
from .requests import Shard, checked_contexts, generated, generator, intervened, png, whole_numbers


AFFINE = ("scale", "shear", "shift")
MORPHOLOGICAL = ("swell", "thicken", "thin")
CONCEPTS = AFFINE + MORPHOLOGICAL
# Pairs that no training image has.
HELD_OUT = tuple(f"{a}+{m}" for a in AFFINE for m in MORPHOLOGICAL)
TRAIN_CONTEXTS = (OBS, *CONCEPTS)

# For each latent: its concept, its value without an intervention, its range with one.
_PARAMETERS = {
    "scale": ("scale", 1.0, 0.6, 0.85),
    "shear": ("shear", 0.0, 0.4, 0.8),
    "shift_x": ("shift", 0.0, -4.5, -2.0),
    "shift_y": ("shift", 0.0, -3.0, -1.0),
    "swell_position": ("swell", 0.5, 0.0, 1.0),
    "swell_radius": ("swell", 0.0, 5.0, 8.0),
    "swell_strength": ("swell", 1.0, 2.5, 4.0),
    "thicken": ("thicken", 0.0, 0.6, 1.2),
    "thin": ("thin", 0.0, 0.3, 0.6),
}
LATENTS = tuple(_PARAMETERS)

_RENDERER = 1  # part of the cache's key: raise it when an image would change
_FINE = 4  # points of the fine grid per pixel, in each direction
# Width of an edge from black to white, in points. With 1, digits that are not moved had sharper
# edges than the others, because they lie on the points: 52 % of their pixels with ink were grey,
# but 66 % of those of shifted digits. With 3 it is 81 and 82 %.
_EDGE = 3
_CHUNK = 64  # images drawn at once: the working set stays small
# In MNIST the centre of mass is on pixel (14, 14), half a pixel from the centre of the image. Scale
# and shear keep it there.
_CENTRE = 0.5
# Spline interpolation onto the fine grid is linear and separable: a product with this matrix
# (112, 28) from the left, and with its transpose from the right.
_UPSAMPLING = ndimage.zoom(np.eye(SIDE), (_FINE, 1), order=3, mode="nearest", grid_mode=True)
# The distance to the contour rises by up to 1 per step towards the medial axis. On the axis it
# rises in no direction, and in shapes of pixels by less than this.
_AXIS_SLOPE = 0.6


def sample_latents(context: Context, size: int, seed: int = 0) -> np.ndarray:
    """Draw the parameters of `size` images of one context.

    Args:
        context: `"obs"`, a concept, or several (`"scale+thin"`, `["scale", "thin"]`).
        size: number of images.
        seed: the draw depends on (seed, context). A row does not depend on `size`: fewer rows are
            the first rows of a larger draw.

    Returns:
        float64 array of shape (size, 9), columns in the order of `LATENTS`. Concepts without an
        intervention have the values that change nothing.

    Raises:
        ValueError: the context is unknown, or a concept has a strength.
    """
    on = dict(zip(CONCEPTS, intervened(context, CONCEPTS, "mnist")))
    u = generator(seed, context_name(context, CONCEPTS), "latents").uniform(
        size=(size, len(LATENTS))
    )
    columns = [
        low + (high - low) * u[:, k] if on[concept] else np.full(size, neutral)
        for k, (concept, neutral, low, high) in enumerate(_PARAMETERS.values())
    ]
    return np.stack(columns, axis=1)


def sample_rows(context: Context, size: int, digits: int, seed: int = 0) -> np.ndarray:
    """Choose the digits of the images of a context.

    Each digit is used once, in random order, before any is used again.

    Args:
        context, size, seed: as in `sample_latents`.
        digits: the number of digits.

    Returns:
        int64 array (size,) of numbers of digits.
    """
    rng = generator(seed, context_name(context, CONCEPTS), "digits")
    passes = [rng.permutation(digits) for _ in range(-(-size // digits))]
    return np.concatenate(passes)[:size]


def render(digits: np.ndarray, latents: np.ndarray) -> np.ndarray:
    """Draw digits with given parameters.

    Args:
        digits: white on black, uint8, (n, 28, 28).
        latents: parameters (n, 9), as `sample_latents` returns them.

    Returns:
        uint8 array of shape (n, 28, 28, 1).

    Raises:
        ValueError: digits or latents have a wrong shape, or a parameter cannot be drawn.
    """
    digits, latents = np.asarray(digits), np.asarray(latents, dtype=np.float64)
    if digits.ndim != 3 or digits.shape[1:] != (SIDE, SIDE) or digits.dtype != np.uint8:
        raise ValueError(
            f"digits must be uint8 (n, {SIDE}, {SIDE}), not {digits.dtype} {digits.shape}."
        )
    if latents.shape != (len(digits), len(LATENTS)):
        raise ValueError(
            f"latents must have shape ({len(digits)}, {len(LATENTS)}), not {latents.shape}."
        )
    if (
        not np.isfinite(latents).all()
        or not (latents[:, [LATENTS.index("scale"), LATENTS.index("swell_strength")]] > 0).all()
    ):
        raise ValueError(
            "latents must be finite, scale and swell_strength positive: there is no image to draw."
        )
    images = np.empty((len(digits), SIDE, SIDE, 1), dtype=np.uint8)
    for start in tqdm(
        range(0, len(digits), _CHUNK), "drawing digits", disable=None, delay=2, leave=False
    ):
        rows = slice(start, start + _CHUNK)
        images[rows] = _render_chunk(digits[rows], latents[rows])
    return images


def _render_chunk(digits: np.ndarray, latents: np.ndarray) -> np.ndarray:
    fine = _UPSAMPLING @ digits.astype(np.float64) @ _UPSAMPLING.T  # (n, 112, 112)
    white = fine > digits.max((1, 2), keepdims=True) / 2
    # A border of background, so that every point has a distance to the background.
    white[:, [0, -1]] = white[:, :, [0, -1]] = False
    # Far from any contour, so that a blank digit stays blank.
    distances = np.full(fine.shape, SIDE * _FINE, dtype=np.float32)
    centres = np.zeros((len(digits), 2))
    for k, (shape, row) in enumerate(zip(white, latents)):
        p = dict(zip(LATENTS, row))
        if not shape.any():
            continue
        inside = ndimage.distance_transform_edt(shape)
        # The contour runs half-way between two points.
        distance = np.where(shape, 0.5 - inside, ndimage.distance_transform_edt(~shape) - 0.5)
        half_thickness = -2 * distance[shape].mean()
        distances[k] = distance - (p["thicken"] - p["thin"]) * half_thickness
        axis = np.argwhere(_medial_axis(inside))  # from top to bottom
        centres[k] = axis[min(int(p["swell_position"] * len(axis)), len(axis) - 1)]
    # In pixels from the centre of mass, (x, y).
    centres = ((centres + 0.5) / _FINE - SIDE / 2 - _CENTRE)[:, ::-1]
    x, y = _sources(latents, centres)
    coverage = np.empty(fine.shape, dtype=np.float32)
    for k, distance in enumerate(distances):
        points = (np.stack([y[k], x[k]]) + SIDE / 2 + _CENTRE) * _FINE - 0.5
        # Outside the grid, the distance to the border is added to the distance at the border.
        within = np.clip(points, 0, SIDE * _FINE - 1)
        coverage[k] = ndimage.map_coordinates(
            distance, within, order=1, prefilter=False
        ) + np.hypot(*(points - within))
    np.clip(0.5 - coverage / _EDGE, 0, 1, out=coverage)
    means = coverage.reshape(len(digits), SIDE, _FINE, SIDE, _FINE).mean((2, 4))
    return np.rint(255 * means).astype(np.uint8)[..., None]


def _sources(latents: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the source points of the fine grid under the warps.

    A warp moves a point away from the centre (n, 2) of the swelling, then scales, shears and shifts
    it. This function computes the inverse.

    Returns:
        x and y, each (n, 112, 112), in pixels from the centre of mass.
    """
    p = {name: column[:, None, None] for name, column in zip(LATENTS, latents.T.astype(np.float32))}
    axis = ((np.arange(SIDE * _FINE) + 0.5) / _FINE - SIDE / 2 - _CENTRE).astype(np.float32)
    y = (axis[None, :, None] - p["shift_y"]) / p["scale"]
    x = (axis[None, None, :] - p["shift_x"]) / p["scale"] - p["shear"] * y
    x, y = np.broadcast_arrays(x, y)
    swollen = np.flatnonzero(latents[:, LATENTS.index("swell_radius")] > 0)
    if len(swollen):
        x, y = x.copy(), y.copy()
        cx, cy = (c[swollen, None, None].astype(np.float32) for c in centres.T)
        radius, strength = p["swell_radius"][swollen], p["swell_strength"][swollen]
        dx, dy = x[swollen] - cx, y[swollen] - cy
        shrink = np.minimum(np.hypot(dx, dy) / radius, 1) ** (strength - 1)
        x[swollen], y[swollen] = cx + dx * shrink, cy + dy * shrink
    return x, y


def _medial_axis(inside: np.ndarray) -> np.ndarray:
    """Return the medial axis of a shape, bool (H, W).

    These are the points from which the distance to the background, (H, W), rises by less than
    `_AXIS_SLOPE` per step to every neighbour.
    """
    padded = np.pad(inside, 1)
    height, width = inside.shape
    axis = inside > 0
    for i in (0, 1, 2):
        for j in (0, 1, 2):
            if (i, j) != (1, 1):
                axis &= padded[i : i + height, j : j + width] < inside + _AXIS_SLOPE * np.hypot(
                    i - 1, j - 1
                )
    return axis


def images_by_context(
    contexts: Sequence[Context] = TRAIN_CONTEXTS,
    images_per_context: int = 4000,
    digits: Digits | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Return the images of each context as arrays.

    Their parameters are `sample_latents(context, images_per_context, seed)`, their digits are those
    of `sample_rows`.

    Args:
        contexts: a list of contexts, each in any form of `contexts.parse_context`.
        images_per_context: number of images of each context.
        digits: the digits; `None` means the training digits that come with this package.
        seed: seed of the parameters and of the choice of digits.

    Returns:
        uint8 images (n, 28, 28, 1) by canonical context name.

    Raises:
        ValueError, TypeError: an argument is out of range or unknown.
    """
    names, numbers = _arguments(contexts, images_per_context, seed)
    digits = load_digits() if digits is None else digits
    images = {}
    for name in names:
        rows = sample_rows(name, numbers["images_per_context"], len(digits), numbers["seed"])
        images[name] = render(digits.images[rows], sample_latents(name, len(rows), numbers["seed"]))
    return images


def load_mnist(
    contexts: Sequence[Context] = TRAIN_CONTEXTS,
    images_per_context: int = 4000,
    source: str | os.PathLike | Digits = BUNDLED,
    split: str = "train",
    seed: int = 0,
    cache_dir: str | None = None,
    num_proc: int | None = None,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Load the MNIST concepts as a data set of the `datasets` library, which keeps it in its cache.

    Args:
        contexts: a list of contexts, each in any form of `contexts.parse_context`. Rows are grouped
            by context, in this order.
        images_per_context: number of rows of each context.
        source: the digits, or a source of digits for `load_digits`.
        split: split of the digits if they are loaded: `"train"` or `"test"`.
        seed: seed of the parameters and of the choice of digits.
        cache_dir, num_proc, streaming: see `requests.generated`. They do not change the rows.

    Returns:
        Columns `image` (PNG), `context` (canonical name), `label` (the digit) and `latents` (9
        values in the order of `LATENTS`).

    Raises:
        ValueError, TypeError: an argument is out of range or unknown.
        OSError: the digits cannot be read, or the cache cannot be written.
    """
    names, numbers = _arguments(contexts, images_per_context, seed)
    digits = source if isinstance(source, Digits) else load_digits(source, split)
    content = hashlib.sha256(digits.images.tobytes() + digits.labels.tobytes()).hexdigest()
    key = (_RENDERER, names, sorted(numbers.items()), content)
    features = Features(
        {
            "image": Image(),
            "context": Value("string"),
            "label": Value("uint8"),
            "latents": List(Value("float32"), length=len(LATENTS)),
        }
    )
    arguments = {"contexts": names, **numbers, "digits": digits}
    return generated(_rows, features, arguments, "mnist", key, cache_dir, num_proc, streaming)


def _arguments(
    contexts: Sequence[Context], images_per_context: int, seed: int
) -> tuple[list[str], dict[str, int]]:
    numbers = whole_numbers(images_per_context=images_per_context, seed=seed)
    names = checked_contexts(contexts, CONCEPTS)
    for name in names:
        intervened(name, CONCEPTS, "mnist")  # raises an error for a strength
    return names, numbers


def _rows(
    shards: list[Shard], images_per_context: int, seed: int, digits: Digits
) -> Iterator[dict[str, object]]:
    for context, start, stop in shards:
        rows = sample_rows(context, stop, len(digits), seed)[start:]
        latents = sample_latents(context, stop, seed)[start:]
        for first in range(0, len(rows), 1024):
            chunk = slice(first, first + 1024)
            images = render(digits.images[rows[chunk]], latents[chunk])
            for image, label, row in zip(
                images[..., 0], digits.labels[rows[chunk]], latents[chunk]
            ):
                yield {
                    "image": png(image),
                    "context": context,
                    "label": int(label),
                    "latents": row.astype(np.float32).tolist(),
                }
