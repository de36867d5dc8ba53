"""quad: simulated images whose concepts form a linear Gaussian causal model.

See METHOD section 4 and arXiv:2507.04754.

An image has four coloured quadrants and a coloured shape at the centre. Eight latent variables, in
the order of `LATENTS`, follow a linear Gaussian structural causal model (`variant="dependent"`) or
are independent (`variant="independent"`). Six of them are concepts, each with a context in which
only this concept was intervened on.

    latents (n, 8) --standardise, normal CDF--> levels in [0, 1] (n, 8)
        --render--> uint8 images (n, resolution, resolution, 3)

quad1 to quad4 set the colours of the quadrants (bottom left, bottom right, top left, top right).
size, color, shape and orientation describe the shape at the centre. color and shape are never
intervened on. Every image depends only on (variant, seed, context, its row), not on the number of
images. Training and held-out sets have different seeds. `shapes.py` draws the images. The card is
model_cards/datasets/quad.md.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from datasets import Dataset, Features, Image, IterableDataset, List, Value

from ..contexts import OBS, Context, context_name
from .requests import (
    Shard,
    checked_request,
    drawn_images,
    generated,
    generator,
    intervened,
    png,
)
from .shapes import render as render


LATENTS = ("quad1", "quad2", "quad3", "quad4", "size", "color", "shape", "orientation")
CONCEPTS = ("quad1", "quad2", "quad3", "quad4", "size", "orientation")
VARIANTS = ("dependent", "independent")
# The pairs that the paper reports, and the other six. No training image has any of them. Images do
# not depend on the order.
PAPER_PAIRS = tuple(
    f"quad1+{c}" for c in ("quad2", "quad3", "quad4", "size", "orientation")
) + tuple(f"quad2+{c}" for c in ("quad3", "quad4", "size", "orientation"))
OTHER_PAIRS = ("quad3+quad4", "quad3+size", "quad3+orientation") + (
    "quad4+size",
    "quad4+orientation",
    "size+orientation",
)
HELD_OUT = PAPER_PAIRS + OTHER_PAIRS
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

_RENDERER = 1  # part of the cache's key: raise it when an image would change


def weights(variant: str = "dependent") -> np.ndarray:
    """Return the edge weights of the causal model, (8, 8).

    `weights[i, j]` is the effect of latent j on latent i.

    Raises:
        ValueError: there is no such variant.
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

    An intervened latent has no incoming edges and is drawn from its own N(mean, variance). The
    others follow the causal model. All latents are divided by their exact standard deviation in the
    observational distribution, whose means are 0. So every context and every split has the same
    scale, whatever its size.

    Args:
        context: `"obs"`, a concept, or several (`"quad1+size"`, `["quad1", "size"]`). Every latent
            of `LATENTS` may be named.
        size: number of images.
        variant: `"dependent"` or `"independent"`.
        seed: the draw depends on (seed, context, variant). A row does not depend on `size`: fewer
            rows are the first rows of a larger draw.

    Returns:
        float64 array of shape (size, 8), columns in the order of `LATENTS`.

    Raises:
        ValueError: the context or variant is unknown, or a concept has a strength.
    """
    matrix, cut = weights(variant), intervened(context, LATENTS, "quad")
    rng = generator(seed, context_name(context, LATENTS), variant)
    return _solve(rng.standard_normal((size, len(LATENTS))), cut, matrix)


def counterfactual_latents(
    latents: np.ndarray, context: Context, variant: str = "dependent"
) -> np.ndarray:
    """Return the values that observational latents would have had under interventions.

    The exogenous noise stays the same, the intervened latents are replaced, and their effects
    follow the causal model. An intervened latent keeps its standard normal draw and takes the mean
    and variance of the intervention. That is a choice: unpaired contexts do not determine how
    values before and after the intervention correspond. A latent that is no effect of an intervened
    one stays as it is (up to rounding) for any such choice.

    Args:
        latents: observational latents (n, 8), as `sample_latents` returns them for `"obs"`.
        context: the interventions, as in `sample_latents`.
        variant: the variant of the latents.

    Returns:
        float64 array (n, 8): row i is the counterfactual of row i of `latents`.
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
    """Return the same images in several contexts: the true answers of edits.

    Image i has the same exogenous noise in every context. The observational images are those of
    `images_by_context` for the same seed. How the intervened value depends on the noise is a
    choice; see `counterfactual_latents`.

    Args:
        contexts: in any form of `contexts.parse_context`. The result always has `"obs"` too.
        size: number of images of each context.
        resolution: side of the images in pixels.
        variant: `"dependent"` or `"independent"`.
        seed: seed of the noise.

    Returns:
        uint8 arrays (size, resolution, resolution, 3) by canonical name, `"obs"` first.
    """
    latents = sample_latents(OBS, size, variant, seed)
    names = dict.fromkeys([OBS, *(context_name(context, LATENTS) for context in contexts)])
    return {
        name: render(counterfactual_latents(latents, name, variant), resolution) for name in names
    }


def exogenous_noise(latents: np.ndarray, variant: str = "dependent") -> np.ndarray:
    """Return the standard normal draws (n, 8) of observational latents (n, 8)."""
    matrix = weights(variant)
    noise = (np.asarray(latents, dtype=np.float64) * _scale(matrix)) @ (
        np.eye(len(LATENTS)) - matrix
    ).T
    return noise / np.sqrt(_NOISE_VARIANCE)


def total_effects(variant: str = "dependent") -> np.ndarray:
    """Return the total effects of the causal model, (8, 8), along all directed paths.

    `[i, j]` is the change of latent i when latent j is set one standard deviation higher, in
    observational standard deviations of i. It is 1 on the diagonal. An entry does not depend on
    which other latents are in the matrix: without the rows and columns of color and shape it holds
    the effects among the six concepts.
    """
    matrix = weights(variant)
    scale = _scale(matrix)
    return np.linalg.inv(np.eye(len(LATENTS)) - matrix) * scale / scale[:, None]


def moments(context: Context, variant: str = "dependent") -> tuple[np.ndarray, np.ndarray]:
    """Return the exact means (8,) and standard deviations (8,) of the latents in a context.

    In the observational context they are 0 and 1.
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
    """Return the standard deviations (8,) of the observational distribution."""
    return np.sqrt((np.linalg.inv(np.eye(len(LATENTS)) - matrix) ** 2) @ _NOISE_VARIANCE)


def _solve(noise: np.ndarray, cut: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Return standardised latents (n, 8) for noise (n, 8), with the latents `cut` intervened on."""
    noise = np.where(
        cut,
        _INTERVENED_MEAN + np.sqrt(_INTERVENED_VARIANCE) * noise,
        np.sqrt(_NOISE_VARIANCE) * noise,
    )
    total_effect = np.linalg.inv(np.eye(len(LATENTS)) - np.where(cut[:, None], 0.0, matrix))
    return noise @ total_effect.T / _scale(matrix)


def images_by_context(
    contexts: Sequence[Context] = TRAIN_CONTEXTS,
    images_per_context: int = 4000,
    resolution: int = 64,
    variant: str = "dependent",
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Return images as arrays: uint8 (n, resolution, resolution, 3) by canonical context name.

    Arguments and errors are those of `load_quad`.
    """
    request = checked_request(
        sample_latents, render, LATENTS, contexts, images_per_context, resolution, variant, seed
    )
    return drawn_images(sample_latents, render, request)


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
    """Load quad as a data set of the `datasets` library, which keeps it in its cache.

    Args:
        contexts: a list of contexts, each in any form of `contexts.parse_context`. Rows are grouped
            by context, in this order.
        images_per_context: number of rows of each context.
        resolution: side of the images in pixels.
        variant: `"dependent"` or `"independent"`.
        seed: seed of the images. Use another one for held-out images.
        cache_dir, num_proc, streaming: see `requests.generated`. They do not change the rows.

    Returns:
        Columns `image` (PNG), `context` (canonical name) and `latents` (8 standardised values in
        the order of `LATENTS`).

    Raises:
        ValueError, TypeError: an argument is out of range or unknown.
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
        # All rows are drawn: the last bits of a row depend on the number of rows.
        latents = sample_latents(context, images_per_context, variant, seed)[start:stop]
        for first in range(0, len(latents), 1024):
            chunk = latents[first : first + 1024]
            for row, image in zip(chunk, render(chunk, resolution)):
                yield {
                    "image": png(image),
                    "context": context,
                    "latents": row.astype(np.float32).tolist(),
                }
