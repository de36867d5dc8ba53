"""Draw the images of `quad`: coloured quadrants, and a coloured shape at the centre.

    latents (n, 8) --normal CDF--> levels in [0, 1] (n, 8) --render--> uint8 (n, side, side, 3)

Columns: the colours of the four quadrants, then size, colour, kind and orientation of the shape.
"""

import numpy as np
from scipy.special import ndtr

from .requests import checked_latents


PALETTE = np.array(  # red, yellow, green, cyan, blue, magenta
    [[255, 0, 0], [255, 255, 0], [0, 255, 0], [0, 255, 255], [0, 0, 255], [255, 0, 255]],
    dtype=np.float32,
)
_CHUNK = 128  # images drawn at once: the working set stays in the processor's cache


def palette(levels: np.ndarray) -> np.ndarray:
    """Map levels in [0, 1], shape (...), to piecewise-linear colours, uint8 RGB (..., 3)."""
    position = np.clip(levels, 0.0, 1.0) * (len(PALETTE) - 1)
    lower = np.minimum(position.astype(int), len(PALETTE) - 2)
    fraction = (position - lower)[..., None].astype(np.float32)
    return np.rint(PALETTE[lower] * (1 - fraction) + PALETTE[lower + 1] * fraction).astype(np.uint8)


def render(latents: np.ndarray, resolution: int = 64) -> np.ndarray:
    """Draw the images of given latents.

    Args:
        latents: standardised latents, shape (n, 8), as `sample_latents` returns them.
        resolution: side of the image in pixels; even, at least 8.

    Returns:
        uint8 array of shape (n, resolution, resolution, 3).

    Raises:
        ValueError: the resolution or the shape of the latents is wrong, or latents are NaN.
    """
    if resolution < 8 or resolution % 2:
        raise ValueError(
            f"quad images need an even resolution of at least 8 pixels, not {resolution}."
        )
    levels = ndtr(checked_latents(latents, 8))
    images = np.empty((len(levels), resolution, resolution, 3), dtype=np.uint8)
    for start in range(0, len(levels), _CHUNK):
        _render_chunk(levels[start : start + _CHUNK], images[start : start + _CHUNK])
    return images


def _render_chunk(levels: np.ndarray, out: np.ndarray) -> None:
    resolution = out.shape[1]
    half = resolution // 2
    flat = out.reshape(-1, 3)
    colours = palette(levels[:, [0, 1, 2, 3, 5]])
    # Whole rows of pixels are copied: this is faster than writing three bytes at a time.
    out[:, half:] = np.repeat(colours[:, [0, 1]], half, axis=1)[:, None]
    out[:, :half] = np.repeat(colours[:, [2, 3]], half, axis=1)[:, None]

    radius = _radius(levels[:, 4])
    angle = (2 * np.pi * levels[:, 7]).astype(np.float32)
    kind = np.rint(3 * levels[:, 6]).astype(int)
    for shape in range(len(_SHAPES)):
        rows = np.flatnonzero(kind == shape)
        if len(rows):
            hits = np.flatnonzero(_inside(shape, radius[rows], angle[rows], resolution))
            image = rows[hits // resolution**2]
            flat[image * resolution**2 + hits % resolution**2] = colours[image, 4]


def shape_masks(
    kind: np.ndarray, size: np.ndarray, turn: np.ndarray, resolution: int = 64
) -> np.ndarray:
    """Return the pixels that shapes cover.

    Args:
        kind: (n,): 0 circle, 1 square, 2 triangle, 3 ellipse.
        size: (n,): level in [0, 1].
        turn: (n,): orientation in full turns.
        resolution: side of the images in pixels.

    Returns:
        bool array (n, resolution, resolution).
    """
    masks = np.empty((len(kind), resolution, resolution), dtype=bool)
    angle = (2 * np.pi * np.asarray(turn)).astype(np.float32)
    for shape in range(len(_SHAPES)):
        rows = np.flatnonzero(np.asarray(kind) == shape)
        masks[rows] = _inside(shape, _radius(np.asarray(size)[rows]), angle[rows], resolution)
    return masks


def _radius(size: np.ndarray) -> np.ndarray:
    """Return half of the shape's side, in units of the image's side, for levels of size (n,)."""
    return (0.75 * (0.2 + 0.8 * size) / 2).astype(np.float32)


def _inside(shape: int, radius: np.ndarray, angle: np.ndarray, resolution: int) -> np.ndarray:
    """Return the pixels that shapes of one kind cover, bool (n, resolution, resolution)."""
    # Centres of pixels, measured from the centre of the image in units of its side.
    axis = ((np.arange(resolution, dtype=np.float32) + 0.5) / resolution - 0.5).astype(np.float32)
    r, a = radius[:, None, None], angle[:, None, None]
    return _SHAPES[shape](axis[None, None, :], axis[None, :, None], r, np.cos(a), np.sin(a))


def _circle(
    x: np.ndarray, y: np.ndarray, r: np.ndarray, cos: np.ndarray, sin: np.ndarray
) -> np.ndarray:
    return x * x + y * y <= r * r


def _square(
    x: np.ndarray, y: np.ndarray, r: np.ndarray, cos: np.ndarray, sin: np.ndarray
) -> np.ndarray:
    return (np.abs(x * cos + y * sin) <= r) & (np.abs(y * cos - x * sin) <= r)


def _triangle(
    x: np.ndarray, y: np.ndarray, r: np.ndarray, cos: np.ndarray, sin: np.ndarray
) -> np.ndarray:
    # Three half-planes at distance r/2 from the centre of the circumscribed circle of radius r.
    u, v = x * cos + y * sin, y * cos - x * sin
    slant = np.float32(np.sqrt(3) / 2) * u
    return (v <= r / 2) & (slant - v / 2 <= r / 2) & (-slant - v / 2 <= r / 2)


def _ellipse(
    x: np.ndarray, y: np.ndarray, r: np.ndarray, cos: np.ndarray, sin: np.ndarray
) -> np.ndarray:
    u, v = x * cos + y * sin, y * cos - x * sin
    return u * u + 4 * v * v <= r * r


_SHAPES = (_circle, _square, _triangle, _ellipse)  # by kind
