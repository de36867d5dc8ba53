"""ident3d: rendered scenes after 3DIdent, whose concepts are three hues.

See METHOD section 4 and arXiv:2507.04754.

An object like a teapot is above a coloured ground, under a coloured spotlight. The latents are
those of 3DIdent (Zimmermann, Sharma, Schneider, Bethge, Brendel: Contrastive learning inverts the
data generating process. ICML 2021). The renderer, the object and the ranges are our own.

    latents (n, 10) --normal CDF--> levels in [0, 1] (n, 10) --ranges--> scene (n, 10)
        --ray casting--> uint8 (n, resolution, resolution, 3)

The ten standardised latents, in the order of `LATENTS`, and what they set at levels 0 and 1
(`RANGES`):

    background, object, spotlight        hue of ground, object and light, in degrees: an arc of 300
                                         with its middle at 120 (green), 0 (red), 60 (yellow)
    position_x, position_y, position_z   centre of the object: to the right -0.7 to 0.7, away from
                                         the camera -0.7 to 0.7, height 1.0 to 1.6
    phi, theta, psi                      rotations of the object, in degrees: about the vertical
                                         -90 to 90, about its depth and its long axis -45 to 45
    spotlight_position                   position of the light on an arc above the scene, from -40
                                         (left) to 40 degrees; it always points at the centre

In the observational context every latent is N(0, 1). The latent of a hue is multiplied by two
thirds before the normal CDF, so that hues are denser in the middle of their arcs. The other levels
are uniform. `variant="independent"` has no edges. `"dependent"` is a linear Gaussian causal model
(`_EDGES`) whose noise keeps all variances at 1. An intervention on a hue cuts its incoming edges
and draws it from `_INTERVENED`. Every image depends only on (variant, seed, context, its row), not
on the number of images.

The renderer (`raycast.py`) casts rays: an ellipsoid and capsules in closed form, a ground plane;
ambient light, Lambert and a specular highlight, hard shadows, a cone of light with a soft edge;
four rays per pixel. The card is model_cards/datasets/ident3d.md.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from scipy.special import ndtr
from tqdm.auto import tqdm

from ..contexts import OBS, Context, context_name
from .raycast import Scene, cast
from .requests import (
    Shard,
    checked_latents,
    checked_request,
    drawn_images,
    generated,
    generator,
    intervened,
    png,
)


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
# Pairs that no training image has.
HELD_OUT = ("background+object", "background+spotlight", "object+spotlight")

# Values in the scene at levels 0 and 1, in degrees and units of the scene, in the order of LATENTS.
RANGES = np.array(
    [
        *((middle - 150, middle + 150) for middle in (120, 0, 60)),
        *((-0.7, 0.7), (-0.7, 0.7), (1.0, 1.6)),
        *((-90, 90), (-45, 45), (-45, 45), (-40, 40)),
    ],
    dtype=np.float64,
)
_HUE_SPREAD = 2 / 3  # factor of a hue's latent before the normal CDF
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
# Mean and standard deviation of a latent that is intervened on.
_INTERVENED = {"background": (1.6, 0.6), "object": (-1.6, 0.6), "spotlight": (1.6, 0.6)}

_RENDERER = 1  # part of the cache's key: raise it when an image would change
_GROUND_SATURATION, _OBJECT_SATURATION, _SPOTLIGHT_SATURATION = 0.65, 0.8, 0.65


def _mechanisms(variant: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the edge weights (10, 10) and the standard deviations (10,) of the noise.

    `weights[i, j]` is the effect of latent j on latent i.
    """
    if variant not in VARIANTS:
        raise ValueError(
            f"ident3d has no variant {variant!r}; choose one of {', '.join(VARIANTS)}."
        )
    weights, noise, covariance = np.zeros((10, 10)), np.ones(10), np.eye(10)
    if variant == "dependent":
        for (source, effect), weight in _EDGES.items():
            weights[LATENTS.index(effect), LATENTS.index(source)] = weight
    for i in _CAUSAL_ORDER:  # the noise has the rest of a variance of 1
        if weights[i].any():
            covariance[i] = covariance[:, i] = weights[i] @ covariance
            noise[i], covariance[i, i] = np.sqrt(1 - weights[i] @ covariance @ weights[i]), 1
    return weights, noise


def weights(variant: str = "dependent") -> np.ndarray:
    """Return the edge weights of the causal model among standardised latents, (10, 10).

    `weights[i, j]` is the effect of latent j on latent i.
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
        seed: the draw depends on (seed, context, variant). A row does not depend on `size`: fewer
            rows are the first rows of a larger draw.

    Returns:
        float64 array of shape (size, 10), columns in the order of `LATENTS`. In the observational
        context each is N(0, 1).

    Raises:
        ValueError: the context or variant is unknown, or a concept has a strength.
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
    """Return the values that observational latents would have had under interventions.

    The noise stays the same, the intervened latents are replaced, and their effects follow the
    causal model. An intervened latent keeps its standard normal draw and takes the mean and
    standard deviation of the intervention. That is a choice; see `quad.counterfactual_latents`.

    Args:
        latents: observational latents (n, 10), as `sample_latents` returns them for `"obs"`.
        context, variant: as in `sample_latents`.

    Returns:
        float64 array (n, 10): row i is the counterfactual of row i of `latents`.
    """
    matrix, scale = _mechanisms(variant)
    latents = checked_latents(latents, len(LATENTS)).astype(np.float64)
    return _solve(
        (latents - latents @ matrix.T) / scale, intervened(context, CONCEPTS, "ident3d"), variant
    )


def _solve(noise: np.ndarray, on: np.ndarray, variant: str) -> np.ndarray:
    """Return latents (n, 10) for noise (n, 10), with the concepts `on` (3,) intervened on.

    Columns are computed one by one, so that the last bits of a row do not depend on the number of
    rows.
    """
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
    """Return the values in the scene for latents (n, 10), as (n, 10) within `RANGES`.

    Hues and angles are in degrees, positions in units of the scene.
    """
    levels = checked_latents(latents, len(LATENTS)).astype(np.float64)
    levels[:, : len(CONCEPTS)] *= _HUE_SPREAD
    return RANGES[:, 0] + (RANGES[:, 1] - RANGES[:, 0]) * ndtr(levels)


def colour(hue: float, saturation: float) -> np.ndarray:
    """Return the colour of a hue in degrees, at full value: RGB in [0, 1], float32 (3,)."""
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
    """Return the scene for one row of `scenes`."""
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


def images_by_context(
    contexts: Sequence[Context] = TRAIN_CONTEXTS,
    images_per_context: int = 4000,
    resolution: int = 64,
    variant: str = "dependent",
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Return images as arrays: uint8 (n, resolution, resolution, 3) by canonical context name.

    Arguments and errors are those of `load_ident3d`.
    """
    request = checked_request(
        sample_latents, render, CONCEPTS, contexts, images_per_context, resolution, variant, seed
    )
    return drawn_images(sample_latents, render, request)


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
    """Load the scenes as a data set of the `datasets` library, which keeps them in its cache.

    Args:
        contexts: a list of contexts, each in any form of `contexts.parse_context`. Rows are grouped
            by context, in this order.
        images_per_context: number of rows of each context.
        resolution: side of the images in pixels.
        variant: `"dependent"` or `"independent"`.
        seed: seed of the images. Use another one for held-out images.
        cache_dir, num_proc, streaming: see `requests.generated`. They do not change the rows.

    Returns:
        Columns `image` (PNG), `context` (canonical name) and `latents` (10 standardised values in
        the order of `LATENTS`).

    Raises:
        ValueError, TypeError: an argument is out of range or unknown.
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
