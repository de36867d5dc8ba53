"""quad: a simulated set of images whose concepts form a linear Gaussian causal model (METHOD
section 4; arXiv:2507.04754).

Four coloured quadrants and a coloured shape at the centre. Eight latent variables, in the order of
`LATENTS`, follow a linear Gaussian structural causal model (`variant="dependent"`) or are
independent (`variant="independent"`). Six of them are concepts, each with a context in which it
alone was intervened on.

    latents (n, 8) --standardise, normal CDF--> levels in [0, 1] (n, 8) --render--> uint8 images (n, resolution, resolution, 3)

What each latent sets: quad1 to quad4 the colours of the quadrants (bottom left, bottom right, top
left, top right); size, color, shape and orientation those of the shape at the centre. color and
shape are never intervened on. Every image is a function of (variant, seed, context, its row),
whatever the number of images; training and held-out sets differ by their seeds. The card is
model_cards/datasets/quad.md."""  # noqa: E501

from collections.abc import Iterator, Sequence

import numpy as np
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from scipy.special import ndtr

from ..contexts import OBS, Context, context_name
from .requests import Shard, checked_request, generated, generator, intervened, png


LATENTS = ("quad1", "quad2", "quad3", "quad4", "size", "color", "shape", "orientation")
CONCEPTS = ("quad1", "quad2", "quad3", "quad4", "size", "orientation")
VARIANTS = ("dependent", "independent")
# The pairs no training image ever carries.
HELD_OUT = tuple(f"quad1+{c}" for c in ("quad2", "quad3", "quad4", "size", "orientation")) + tuple(
    f"quad2+{c}" for c in ("quad3", "quad4", "size", "orientation")
)
TRAIN_CONTEXTS = (OBS, *CONCEPTS)

_EDGES = {  # (from, to): weight
    ("quad2", "quad1"): -1.23,
    ("quad3", "quad2"): 1.56,
    ("quad4", "quad1"): 1.34,
    ("quad4", "quad3"): -0.72,
    ("color", "quad1"): -0.95,
    ("color", "size"): 1.67,
    ("shape", "quad2"): 0.58,
    ("shape", "color"): -1.34,
    ("orientation", "quad1"): 1.12,
    ("orientation", "size"): -0.81,
    ("orientation", "shape"): 1.45,
}
_NOISE_VARIANCE = np.array(
    [1.3855493, 1.16426732, 1.00502177, 1.95646855, 1.27482347, 1.42, 1.31, 1.18]
)
_INTERVENED_MEAN = np.array(
    [1.16920556, 1.47496736, -1.60596209, -1.96578519, 1.0117071, -0.85, 1.23, -0.67]
)
_INTERVENED_VARIANCE = np.array(
    [1.94878138, 1.35886756, 1.57343313, 1.1021785, 1.30511067, 1.52, 1.41, 1.26]
)

PALETTE = np.array(  # red, yellow, green, cyan, blue, magenta
    [[255, 0, 0], [255, 255, 0], [0, 255, 0], [0, 255, 255], [0, 0, 255], [255, 0, 255]],
    dtype=np.float32,
)
_RENDERER = 1  # part of the cache's key: raise it when an image would change
_CHUNK = 128  # images rendered at once: the working set stays in the cache


def weights(variant: str = "dependent") -> np.ndarray:
    """Edge weights of the causal model, shape (8, 8): `weights[i, j]` is the effect of latent j on
    latent i.
    """
    if variant not in VARIANTS:
        raise ValueError(f"quad has no variant {variant!r}; choose one of {', '.join(VARIANTS)}.")
    matrix = np.zeros((len(LATENTS), len(LATENTS)))
    if variant == "dependent":
        for (source, effect), weight in _EDGES.items():
            matrix[LATENTS.index(effect), LATENTS.index(source)] = weight
    return matrix


def sample_latents(
    context: Context, size: int, variant: str = "dependent", seed: int = 0
) -> np.ndarray:
    """Draw the latents of `size` images of one context.

    An intervened latent is drawn from its own N(mean, variance), its incoming edges cut; the others
    follow the causal model. All are divided by the standard deviation that the observational
    distribution has by its weights (its mean is 0), so that every context and every split share one
    scale whatever their sizes.

    Args:
        context: `"obs"`, a concept, or several (`"quad1+size"`, `["quad1", "size"]`). Every concept
            of `LATENTS` may be named.
        size: number of images.
        variant: `"dependent"` or `"independent"`.
        seed: the draw is a function of (seed, context, variant) and, row by row, independent of
            `size` up to truncation: fewer rows are the first of more.

    Returns:
        float64 array of shape (size, 8), columns in the order of `LATENTS`.
    """
    matrix, cut = weights(variant), intervened(context, LATENTS, "quad")
    rng = generator(seed, context_name(context, LATENTS), variant)
    return _solve(rng.standard_normal((size, len(LATENTS))), cut, matrix)


def counterfactual_latents(
    latents: np.ndarray, context: Context, variant: str = "dependent"
) -> np.ndarray:
    """What observational latents would have been under interventions: the same exogenous noise, the
    intervened latents replaced, everything downstream following the causal model.

    An intervened latent keeps the standard normal draw behind it and takes mean and variance of the
    intervention. That is a choice: unpaired contexts do not say how its values before and after
    belong together. What is not downstream of an intervention stays as it is (up to rounding)
    whatever the choice.

    Args:
        latents: observational latents (n, 8), as `sample_latents` returns them for `"obs"`.
        context: the interventions, as in `sample_latents`.
        variant: that of the latents.

    Returns:
        float64 array (n, 8), row by row the counterfactual of `latents`.
    """
    return _solve(
        exogenous_noise(latents, variant), intervened(context, LATENTS, "quad"), weights(variant)
    )


def twins(
    contexts: Sequence[Context],
    size: int,
    resolution: int = 64,
    variant: str = "dependent",
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """The same images in several contexts: row i of each has the same exogenous noise, so that an
    edit has a true answer.

    The observational images are those of `images_by_context` for the same seed. How the intervened
    value goes with the noise is a choice; see `counterfactual_latents`.

    Args:
        contexts: in any form of `contexts.parse_context`; `"obs"` is always among the results.
        size: number of images of each context.
        resolution: side of the images in pixels.
        variant: `"dependent"` or `"independent"`.
        seed: of the noise.

    Returns:
        uint8 arrays (size, resolution, resolution, 3) by canonical name, `"obs"` first.
    """
    latents = sample_latents(OBS, size, variant, seed)
    names = dict.fromkeys([OBS, *(context_name(context, LATENTS) for context in contexts)])
    return {
        name: render(counterfactual_latents(latents, name, variant), resolution) for name in names
    }


def exogenous_noise(latents: np.ndarray, variant: str = "dependent") -> np.ndarray:
    """The standard normal draws (n, 8) behind observational latents (n, 8)."""
    matrix = weights(variant)
    noise = (np.asarray(latents, dtype=np.float64) * _scale(matrix)) @ (
        np.eye(len(LATENTS)) - matrix
    ).T
    return noise / np.sqrt(_NOISE_VARIANCE)


def total_effects(variant: str = "dependent") -> np.ndarray:
    """Total effects of the causal model, (8, 8): `[i, j]` is the change of latent i, in
    observational standard deviations, when latent j is set one of its own higher, along all
    directed paths; 1 on the diagonal. Whatever else is left out, an entry stays as it is: the
    effects among the six concepts are this matrix without the rows and columns of color and
    shape."""
    matrix = weights(variant)
    scale = _scale(matrix)
    return np.linalg.inv(np.eye(len(LATENTS)) - matrix) * scale / scale[:, None]


def moments(context: Context, variant: str = "dependent") -> tuple[np.ndarray, np.ndarray]:
    """Means (8,) and standard deviations (8,) that the latents have in a context, exactly; 0 and 1
    in the observational one.
    """
    matrix, cut = weights(variant), intervened(context, LATENTS, "quad")
    mixing = (
        np.linalg.inv(np.eye(len(LATENTS)) - np.where(cut[:, None], 0.0, matrix))
        / _scale(matrix)[:, None]
    )
    return mixing @ (cut * _INTERVENED_MEAN), np.sqrt(
        mixing**2 @ np.where(cut, _INTERVENED_VARIANCE, _NOISE_VARIANCE)
    )


def _scale(matrix: np.ndarray) -> np.ndarray:
    """Standard deviations (8,) of the observational distribution."""
    return np.sqrt((np.linalg.inv(np.eye(len(LATENTS)) - matrix) ** 2) @ _NOISE_VARIANCE)


def _solve(noise: np.ndarray, cut: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Standardised latents (n, 8) of standard normal noise (n, 8) with the latents `cut` intervened
    on.
    """
    noise = np.where(
        cut,
        _INTERVENED_MEAN + np.sqrt(_INTERVENED_VARIANCE) * noise,
        np.sqrt(_NOISE_VARIANCE) * noise,
    )
    total_effect = np.linalg.inv(np.eye(len(LATENTS)) - np.where(cut[:, None], 0.0, matrix))
    return noise @ total_effect.T / _scale(matrix)


def palette(levels: np.ndarray) -> np.ndarray:
    """Piecewise-linear colours: levels in [0, 1], shape (...), to uint8 RGB of shape (..., 3)."""
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
    """
    if resolution < 8 or resolution % 2:
        raise ValueError(
            f"quad images need an even resolution of at least 8 pixels, not {resolution}."
        )
    latents = np.asarray(latents)
    if latents.ndim != 2 or latents.shape[1] != len(LATENTS):
        raise ValueError(f"latents must have shape (n, {len(LATENTS)}), not {latents.shape}.")
    if np.isnan(latents).any():
        raise ValueError("latents hold NaN: there is no image to draw.")
    levels = ndtr(latents)
    images = np.empty((len(levels), resolution, resolution, 3), dtype=np.uint8)
    for start in range(0, len(levels), _CHUNK):
        _render_chunk(levels[start : start + _CHUNK], images[start : start + _CHUNK])
    return images


def _render_chunk(levels: np.ndarray, out: np.ndarray) -> None:
    resolution = out.shape[1]
    half = resolution // 2
    flat = out.reshape(-1, 3)
    colours = palette(levels[:, [0, 1, 2, 3, 5]])
    # One row of pixels each, repeated: long runs of memory instead of three bytes at a time.
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
    """Which pixels shapes cover.

    Args:
        kind: 0 circle, 1 square, 2 triangle, 3 ellipse, (n,).
        size: level in [0, 1], (n,).
        turn: orientation in full turns, (n,).
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
    """Half of side 48 * size of 64, in units of the image's side, of the level of size (n,)."""
    return (0.75 * (0.2 + 0.8 * size) / 2).astype(np.float32)


def _inside(shape: int, radius: np.ndarray, angle: np.ndarray, resolution: int) -> np.ndarray:
    """Which pixels shapes of one kind cover, bool (n, resolution, resolution)."""
    # Pixel centres relative to the centre of the image, in units of the image's side.
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


def images_by_context(
    contexts: Sequence[Context] = TRAIN_CONTEXTS,
    images_per_context: int = 4000,
    resolution: int = 64,
    variant: str = "dependent",
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """uint8 images (n, resolution, resolution, 3) by canonical context name, without the way
    through files. Arguments: `load_quad`.
    """
    a = checked_request(
        sample_latents, render, LATENTS, contexts, images_per_context, resolution, variant, seed
    )
    return {
        context: render(
            sample_latents(context, a["images_per_context"], variant, a["seed"]), a["resolution"]
        )
        for context in a["contexts"]
    }


def load_quad(
    contexts: Sequence[Context] = TRAIN_CONTEXTS,
    images_per_context: int = 4000,
    resolution: int = 64,
    variant: str = "dependent",
    seed: int = 0,
    cache_dir: str | None = None,
    num_proc: int | None = None,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """The quad set as a data set of the `datasets` library, drawn into its cache and found there
    the next time, or drawn as it is read.

    Args:
        contexts: a list of contexts, each in any form of `contexts.parse_context`; rows are grouped
            by them, in this order.
        images_per_context: rows of each context.
        resolution: side of the images in pixels.
        variant: `"dependent"` or `"independent"`.
        seed: use another one for held-out images.
        cache_dir, num_proc, streaming: see `requests.generated`; the rows are the same.

    Returns:
        Columns `image` (PNG), `context` (canonical name) and `latents` (8 standardised values in
        the order of `LATENTS`).

    Raises:
        ValueError, TypeError: one sentence: an argument that is out of range or unknown.
        OSError: the cache cannot be written.
    """
    arguments = checked_request(
        sample_latents, render, LATENTS, contexts, images_per_context, resolution, variant, seed
    )
    features = Features(
        {"image": Image(), "context": Value("string"), "latents": List(Value("float32"), length=8)}
    )
    key = (_RENDERER, sorted(arguments.items()))
    return generated(_rows, features, arguments, "quad", key, cache_dir, num_proc, streaming)


def _rows(
    shards: list[Shard], images_per_context: int, resolution: int, variant: str, seed: int
) -> Iterator[dict[str, object]]:
    for context, start, stop in shards:
        latents = sample_latents(context, images_per_context, variant, seed)[
            start:stop
        ]  # all: the last bits depend on how many
        for first in range(0, len(latents), 1024):
            chunk = latents[first : first + 1024]
            for row, image in zip(chunk, render(chunk, resolution)):
                yield {
                    "image": png(image),
                    "context": context,
                    "latents": row.astype(np.float32).tolist(),
                }
