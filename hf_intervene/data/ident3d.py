"""ident3d: rendered scenes after 3DIdent, whose concepts are three hues (METHOD section 4;
arXiv:2507.04754).

A teapot-like object floats over a coloured ground under a coloured spotlight. The latents are those
of 3DIdent (Zimmermann, Sharma, Schneider, Bethge, Brendel: Contrastive learning inverts the data
generating process. ICML 2021); renderer, object and ranges are our own.

    latents (n, 10) --normal CDF--> levels in [0, 1] (n, 10) --ranges--> scene (n, 10) --ray casting--> uint8 (n, resolution, resolution, 3)

Ten standardised latents, in the order of `LATENTS`; what they set, at levels 0 and 1 (`RANGES`):

    background, object, spotlight        hue of ground, object and light, in degrees: an arc of 300 with the middle at 120 (green), 0 (red), 60 (yellow)
    position_x, position_y, position_z   centre of the object: to the right -0.7 to 0.7, away -0.7 to 0.7, height 1.0 to 1.6
    phi, theta, psi                      its rotations about the vertical (-90 to 90 degrees), its depth and its long axis (-45 to 45 each)
    spotlight_position                   of the light on an arc over the scene, from -40 (left) to 40 degrees; it always points at the centre

In the observational context every latent is N(0, 1). The level of a hue is that of two thirds of
its latent, so that hues gather around the middle of their arcs; the others are uniform.
`variant="independent"` has no edges; `"dependent"` is a linear Gaussian causal model (`_EDGES`)
whose noise keeps all variances at 1. An intervention on a hue cuts its incoming edges and draws it
from `_INTERVENED`. Every image is a function of (variant, seed, context, its row), whatever the
number of images.

The renderer casts rays: an ellipsoid and capsules in closed form, a ground plane; ambient light,
Lambert and a specular highlight, hard shadows, a cone of light with a soft edge; four rays a pixel.
It uses nothing but arithmetic and square roots, image by image. The card is
model_cards/datasets/ident3d.md."""  # noqa: E501

import math
from collections.abc import Iterator, Sequence

import numpy as np
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from scipy.special import ndtr
from tqdm.auto import tqdm

from ..contexts import OBS, Context, context_name
from .raycast import Scene, cast
from .requests import Shard, checked_request, generated, generator, intervened, png


CONCEPTS = ("background", "object", "spotlight")
LATENTS = (
    *CONCEPTS,
    "position_x",
    "position_y",
    "position_z",
    "phi",
    "theta",
    "psi",
    "spotlight_position",
)
VARIANTS = ("dependent", "independent")
TRAIN_CONTEXTS = (OBS, *CONCEPTS)
# The pairs no training image ever carries.
HELD_OUT = ("background+object", "background+spotlight", "object+spotlight")

# of what is drawn, at levels 0 and 1: degrees and units of the scene, in the order of LATENTS
RANGES = np.array(
    [
        *((middle - 150, middle + 150) for middle in (120, 0, 60)),
        *((-0.7, 0.7), (-0.7, 0.7), (1.0, 1.6)),
        *((-90, 90), (-45, 45), (-45, 45), (-40, 40)),
    ],
    dtype=np.float64,
)
_HUE_SPREAD = 2 / 3  # of a hue's latent before the normal CDF
_EDGES = {  # (from, to): weight, among standardised latents
    ("spotlight_position", "spotlight"): 0.7,
    ("position_x", "object"): -0.5,
    ("spotlight", "object"): 0.6,
    ("object", "background"): -0.6,
    ("position_y", "background"): 0.5,
}
_CAUSAL_ORDER = [
    LATENTS.index(name) for name in (*LATENTS[3:], "spotlight", "object", "background")
]
_INTERVENED = {
    "background": (1.6, 0.6),
    "object": (-1.6, 0.6),
    "spotlight": (1.6, 0.6),
}  # mean and standard deviation

_RENDERER = 1  # part of the cache's key: raise it when an image would change
_GROUND_SATURATION, _OBJECT_SATURATION, _SPOTLIGHT_SATURATION = 0.65, 0.8, 0.65


def _mechanisms(variant: str) -> tuple[np.ndarray, np.ndarray]:
    """Edge weights (10, 10), `[i, j]` the effect of latent j on latent i, and the standard
    deviations (10,) of the noise.
    """
    if variant not in VARIANTS:
        raise ValueError(
            f"ident3d has no variant {variant!r}; choose one of {', '.join(VARIANTS)}."
        )
    weights, noise, covariance = np.zeros((10, 10)), np.ones(10), np.eye(10)
    if variant == "dependent":
        for (source, effect), weight in _EDGES.items():
            weights[LATENTS.index(effect), LATENTS.index(source)] = weight
    for i in _CAUSAL_ORDER:  # what the parents leave of a variance of 1
        if weights[i].any():
            covariance[i] = covariance[:, i] = weights[i] @ covariance
            noise[i], covariance[i, i] = np.sqrt(1 - weights[i] @ covariance @ weights[i]), 1
    return weights, noise


def weights(variant: str = "dependent") -> np.ndarray:
    """Edge weights of the causal model among standardised latents, (10, 10): `weights[i, j]` is the
    effect of latent j on latent i.
    """
    return _mechanisms(variant)[0]


def sample_latents(
    context: Context, size: int, variant: str = "dependent", seed: int = 0
) -> np.ndarray:
    """Draw the latents of `size` images of one context.

    Args:
        context: `"obs"`, a concept, or several (`"background+object"`, `["background", "object"]`).
        size: number of images.
        variant: `"dependent"` or `"independent"`.
        seed: the draw is a function of (seed, context, variant) and, row by row, independent of
            `size`: fewer rows are the first of more.

    Returns:
        float64 array of shape (size, 10), columns in the order of `LATENTS`, standardised: N(0, 1)
        in the observational context.
    """
    _mechanisms(variant)
    on = intervened(context, CONCEPTS, "ident3d")
    noise = generator(seed, "ident3d", context_name(context, CONCEPTS), variant).standard_normal(
        (size, len(LATENTS))
    )
    return _solve(noise, on, variant)


def counterfactual_latents(
    latents: np.ndarray, context: Context, variant: str = "dependent"
) -> np.ndarray:
    """What observational latents would have been under interventions: the same noise, the
    intervened latents replaced, everything downstream following the causal model.

    An intervened latent keeps the standard normal draw behind it and takes mean and standard
    deviation of the intervention; a choice, as in `quad.counterfactual_latents`.

    Args:
        latents: observational latents (n, 10), as `sample_latents` returns them for `"obs"`.
        context, variant: as there.

    Returns:
        float64 array (n, 10), row by row the counterfactual of `latents`.
    """
    matrix, scale = _mechanisms(variant)
    latents = _checked(latents)
    return _solve(
        (latents - latents @ matrix.T) / scale, intervened(context, CONCEPTS, "ident3d"), variant
    )


def _solve(noise: np.ndarray, on: np.ndarray, variant: str) -> np.ndarray:
    """Latents (n, 10) of standard normal noise (n, 10), the concepts `on` (3,) intervened on.
    Column by column, so that no row's last bit depends on how many there are."""
    matrix, scale = _mechanisms(variant)
    latents = np.empty_like(noise)
    for i in _CAUSAL_ORDER:
        if i < len(CONCEPTS) and on[i]:
            mean, deviation = _INTERVENED[LATENTS[i]]
            latents[:, i] = mean + deviation * noise[:, i]
        else:
            latents[:, i] = scale[i] * noise[:, i]
            for j in np.flatnonzero(matrix[i]):
                latents[:, i] += matrix[i, j] * latents[:, j]
    return latents


def scenes(latents: np.ndarray) -> np.ndarray:
    """What latents (n, 10) set: hues and angles in degrees, positions in units of the scene, (n,
    10), within `RANGES`.
    """
    levels = _checked(latents).copy()
    levels[:, : len(CONCEPTS)] *= _HUE_SPREAD
    return RANGES[:, 0] + (RANGES[:, 1] - RANGES[:, 0]) * ndtr(levels)


def colour(hue: float, saturation: float) -> np.ndarray:
    """Of a hue in degrees, at full value: RGB in [0, 1], float32 (3,)."""
    ramps = (abs((hue / 60 - shift) % 6 - 3) - 1 for shift in (0, 2, 4))
    return np.array(
        [1 - saturation * (1 - min(max(ramp, 0), 1)) for ramp in ramps], dtype=np.float32
    )


def render(latents: np.ndarray, resolution: int = 64) -> np.ndarray:
    """Draw the images of given latents.

    Args:
        latents: standardised latents, shape (n, 10), as `sample_latents` returns them.
        resolution: side of the image in pixels, at least 8.

    Returns:
        uint8 array of shape (n, resolution, resolution, 3).
    """
    if resolution < 8:
        raise ValueError(
            f"ident3d images need a resolution of at least 8 pixels, not {resolution}."
        )
    rows = scenes(latents)
    images = np.empty((len(rows), resolution, resolution, 3), dtype=np.uint8)
    for image, row in zip(
        images, tqdm(rows.tolist(), "drawing scenes", disable=None, delay=2, leave=False)
    ):
        image[:] = cast(scene(row), resolution)
    return images


def scene(row: Sequence[float]) -> Scene:
    """The scene of one row of `scenes`."""
    background, object_hue, spotlight, x, y, z, *angles = row
    phi, theta, psi, position = map(math.radians, angles)
    turns = [
        [[math.cos(phi), -math.sin(phi), 0], [math.sin(phi), math.cos(phi), 0], [0, 0, 1]],
        [[math.cos(theta), 0, math.sin(theta)], [0, 1, 0], [-math.sin(theta), 0, math.cos(theta)]],
        [[1, 0, 0], [0, math.cos(psi), -math.sin(psi)], [0, math.sin(psi), math.cos(psi)]],
    ]
    return Scene(
        centre=np.array([x, y, z]),
        rotation=np.array(turns[0]) @ np.array(turns[1]) @ np.array(turns[2]),
        light=np.array([5 * math.sin(position), -1.0, 1 + 5 * math.cos(position)]),
        ground=colour(background, _GROUND_SATURATION),
        object=colour(object_hue, _OBJECT_SATURATION),
        spotlight=colour(spotlight, _SPOTLIGHT_SATURATION),
    )


def _checked(latents: np.ndarray) -> np.ndarray:
    latents = np.asarray(latents, dtype=np.float64)
    if latents.ndim != 2 or latents.shape[1] != len(LATENTS):
        raise ValueError(f"latents must have shape (n, {len(LATENTS)}), not {latents.shape}.")
    if np.isnan(latents).any():
        raise ValueError("latents hold NaN: there is no image to draw.")
    return latents


def images_by_context(
    contexts: Sequence[Context] = TRAIN_CONTEXTS,
    images_per_context: int = 4000,
    resolution: int = 64,
    variant: str = "dependent",
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """uint8 images (n, resolution, resolution, 3) by canonical context name, without the way
    through files. Arguments: `load_ident3d`.
    """
    a = checked_request(
        sample_latents, render, CONCEPTS, contexts, images_per_context, resolution, variant, seed
    )
    return {
        context: render(
            sample_latents(context, a["images_per_context"], variant, a["seed"]), a["resolution"]
        )
        for context in a["contexts"]
    }


def load_ident3d(
    contexts: Sequence[Context] = TRAIN_CONTEXTS,
    images_per_context: int = 4000,
    resolution: int = 64,
    variant: str = "dependent",
    seed: int = 0,
    cache_dir: str | None = None,
    num_proc: int | None = None,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """The scenes as a data set of the `datasets` library, drawn into its cache and found there the
    next time, or drawn as they are read.

    Args:
        contexts: a list of contexts, each in any form of `contexts.parse_context`; rows are grouped
            by them, in this order.
        images_per_context: rows of each context.
        resolution: side of the images in pixels.
        variant: `"dependent"` or `"independent"`.
        seed: use another one for held-out images.
        cache_dir, num_proc, streaming: see `requests.generated`; the rows are the same.

    Returns:
        Columns `image` (PNG), `context` (canonical name) and `latents` (10 standardised values in
        the order of `LATENTS`).

    Raises:
        ValueError, TypeError: one sentence: an argument that is out of range or unknown.
        OSError: the cache cannot be written.
    """
    arguments = checked_request(
        sample_latents, render, CONCEPTS, contexts, images_per_context, resolution, variant, seed
    )
    features = Features(
        {
            "image": Image(),
            "context": Value("string"),
            "latents": List(Value("float32"), length=len(LATENTS)),
        }
    )
    key = (_RENDERER, sorted(arguments.items()))
    return generated(_rows, features, arguments, "ident3d", key, cache_dir, num_proc, streaming)


def _rows(
    shards: list[Shard], images_per_context: int, resolution: int, variant: str, seed: int
) -> Iterator[dict[str, object]]:
    for context, start, stop in shards:
        for row in sample_latents(context, stop, variant, seed)[start:]:
            image = render(row[None], resolution)[0]
            yield {
                "image": png(image),
                "context": context,
                "latents": row.astype(np.float32).tolist(),
            }
