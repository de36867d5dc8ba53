"""Code that the simulated data sets share: checks of arguments, seeds, shards and the cache."""

import hashlib
import io
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypedDict

import datasets
import numpy as np
from datasets import Dataset, Features, IterableDataset
from datasets.exceptions import DatasetGenerationError
from datasets.io.generator import GeneratorDatasetInputStream
from PIL import Image as PILImage

from ..contexts import Context, context_name, parse_context


Shard = tuple[str, int, int]  # context, its first row and the one after its last
SHARD_ROWS = 1024
MAX_SHARDS = 64  # of one context: each shard also draws the random numbers of the rows before it


class Request(TypedDict):
    """Arguments of a simulator, checked and in canonical form."""

    contexts: list[str]
    variant: str
    images_per_context: int
    resolution: int
    seed: int


def checked_contexts(contexts: Sequence[Context], concepts: Sequence[str]) -> list[str]:
    """Return the canonical names of a list of contexts.

    Args:
        contexts: each in any form of `contexts.parse_context`.
        concepts: the known concepts.

    Raises:
        ValueError: it is not a list, the list is empty, a context is named twice, or it cannot be
            read.
    """
    if isinstance(contexts, str) or not isinstance(contexts, Sequence) or not contexts:
        raise ValueError(
            f"contexts must be a list of at least one context, such as ['obs', '{concepts[0]}'],"
            f" not {contexts!r}."
        )
    names = [context_name(context, concepts) for context in contexts]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"context {name!r} is named twice; its images would be the same ones.")
    return names


def whole_numbers(**numbers: int) -> dict[str, int]:
    """Return the numbers as `int`, by name.

    Raises:
        TypeError: one is not a whole number.
        ValueError: `images_per_context` is less than 1.
    """
    for name, value in numbers.items():
        try:
            numbers[name] = operator.index(value)
        except TypeError as error:
            raise TypeError(f"{name} must be a whole number, not {value!r}.") from error
    if numbers.get("images_per_context", 1) < 1:
        raise ValueError(
            f"images_per_context must be at least 1, not {numbers['images_per_context']}."
        )
    return numbers


def split_rows(count: int, fraction: float, seed: int, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Split the row numbers 0 to `count` - 1 at random into two parts.

    Args:
        count: the number of rows.
        fraction: share of the second part.
        seed: seed of the split.
        what: name of the rows, for the message.

    Returns:
        Two int64 arrays in random order. The second has `round(fraction * count)` entries, the
        first has the others.

    Raises:
        ValueError: one of the two parts would be empty.
    """
    second = round(fraction * count) if 0 < fraction < 1 else 0
    if not 0 < second < count:
        raise ValueError(f"a share of {fraction} cannot be held out of {count} {what}.")
    rows = np.random.default_rng(seed).permutation(count)
    return rows[second:], rows[:second]


def intervened(context: Context, concepts: Sequence[str], dataset: str) -> np.ndarray:
    """Return which of the concepts a context intervenes on, bool (concepts,).

    Raises:
        ValueError: a concept is unknown, or has a strength: the simulators have only full
            interventions.
    """
    strengths = parse_context(context, concepts)
    if any(strength != 1.0 for strength in strengths.values()):
        raise ValueError(
            f"{dataset} simulates full interventions only: give concept names without a strength."
        )
    return np.array([name in strengths for name in concepts])


def checked_request(
    sample_latents: Callable[..., np.ndarray],
    render: Callable[..., np.ndarray],
    concepts: Sequence[str],
    contexts: Sequence[Context],
    images_per_context: int,
    resolution: int,
    variant: str,
    seed: int,
) -> Request:
    """Check the arguments of a simulator, and bring them to canonical form.

    Equal requests then have one entry in the cache. One image of each context is drawn, so that
    other bad arguments raise the simulator's own error before the work begins.
    """
    numbers = whole_numbers(images_per_context=images_per_context, resolution=resolution, seed=seed)
    names = checked_contexts(contexts, concepts)
    for name in names:
        render(sample_latents(name, 1, variant, numbers["seed"]), numbers["resolution"])
    return {
        "contexts": names,
        "variant": variant,
        "images_per_context": numbers["images_per_context"],
        "resolution": numbers["resolution"],
        "seed": numbers["seed"],
    }


def drawn_images(
    sample_latents: Callable[..., np.ndarray], render: Callable[..., np.ndarray], request: Request
) -> dict[str, np.ndarray]:
    """Return the uint8 images (n, H, W, C) of a request, by canonical context name."""
    images = {}
    for context in request["contexts"]:
        size, seed = request["images_per_context"], request["seed"]
        latents = sample_latents(context, size, request["variant"], seed)
        images[context] = render(latents, request["resolution"])
    return images


def checked_latents(latents: np.ndarray, width: int) -> np.ndarray:
    """Return latents (n, width) as an array.

    Raises:
        ValueError: they have another shape, or hold NaN.
    """
    latents = np.asarray(latents)
    if latents.ndim != 2 or latents.shape[1] != width:
        raise ValueError(f"latents must have shape (n, {width}), not {latents.shape}.")
    if np.isnan(latents).any():
        raise ValueError("latents hold NaN: there is no image to draw.")
    return latents


def png(image: np.ndarray) -> dict[str, bytes]:
    """Return an image, uint8 (H, W) or (H, W, 3), as a cell of a `datasets` image column."""
    file = io.BytesIO()
    PILImage.fromarray(image).save(file, "PNG", compress_level=1)
    return {"bytes": file.getvalue()}


def shards(contexts: Sequence[str], images_per_context: int) -> list[Shard]:
    """Divide the rows of all contexts, in order, into pieces that can be drawn separately.

    A piece has `SHARD_ROWS` rows, or more if a context would have more than `MAX_SHARDS` pieces.
    """
    rows = max(SHARD_ROWS, -(-images_per_context // MAX_SHARDS))
    starts = range(0, images_per_context, rows)
    return [
        (context, start, min(start + rows, images_per_context))
        for context in contexts
        for start in starts
    ]


def generated(
    rows: Callable[..., Iterator[dict]],
    features: Features,
    arguments: Mapping[str, Any],
    name: str,
    key: tuple,
    cache_dir: str | None = None,
    num_proc: int | None = None,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Make a simulated data set in shards. Rows and their order do not depend on the options.

    Args:
        rows: generator of the rows of a list of shards, which is its first argument `shards`.
        features: features of the rows.
        arguments: the other arguments of `rows`, and `contexts`, from which `shards` is made.
        name, key: together they distinguish the data set from all others in the cache.
        cache_dir: folder of the cache; `None` means that of `datasets`.
        num_proc: number of processes that draw shards into the cache; `None` means this process.
        streaming: if true, nothing is written, and rows are drawn when they are read, again in
            every pass. The result is an `IterableDataset`. Workers of a `DataLoader` and
            `datasets.distributed.split_dataset_by_node` divide its shards among themselves.

    Raises:
        TypeError, ValueError: `num_proc` is not a positive whole number.
        OSError: the cache cannot be written or is corrupt, or a process has died.
    """
    if num_proc is not None and whole_numbers(num_proc=num_proc)["num_proc"] < 1:
        raise ValueError(f"num_proc must be at least 1, not {num_proc}.")
    others = {key: value for key, value in arguments.items() if key != "contexts"}
    others = {"shards": shards(arguments["contexts"], arguments["images_per_context"]), **others}
    if streaming:
        # This is what IterableDataset.from_generator does. That function would also create a cache
        # folder that it does not use, which may not be possible.
        with TemporaryDirectory() as nowhere:
            return GeneratorDatasetInputStream(
                rows, features, nowhere, streaming=True, gen_kwargs=others
            ).read()
    num_proc = num_proc and min(num_proc, len(others["shards"]))
    fingerprint = f"{name}-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}"
    try:
        return Dataset.from_generator(
            rows,
            features=features,
            cache_dir=cache_dir,
            gen_kwargs=others,
            num_proc=num_proc,
            fingerprint=fingerprint,
        )
    except (OSError, ValueError, RuntimeError, DatasetGenerationError) as error:
        # The arguments are checked, so that a process, the reading or the writing has failed.
        cache = cache_dir or datasets.config.HF_DATASETS_CACHE
        if isinstance(error, RuntimeError):
            raise OSError(
                f"one of the {num_proc} processes that draw images has died, perhaps for lack of"
                " memory: try a smaller num_proc."
            ) from error
        if isinstance(error, ValueError) or (isinstance(error, OSError) and error.errno is None):
            entry = next(Path(cache).glob(f"generator/*{fingerprint}*"), cache)
            raise OSError(
                f"the images in the cache are corrupt: remove {entry}, and they are drawn again."
            ) from error
        # The error of another process arrives as text, with its class before a colon.
        why = re.search(r"^[\w.]+: (.*)", str(error.__cause__ or error), re.M)
        raise OSError(
            f"the images could not be written to the cache {cache}"
            f" ({why[1] if why else error.__cause__ or error}): free some space or give another"
            " cache_dir."
        ) from error


def generator(*key: object) -> np.random.Generator:
    """Return a random generator that depends only on the key. Other keys give independent ones."""
    text = "/".join(map(str, key))
    return np.random.default_rng(
        np.frombuffer(hashlib.sha256(text.encode()).digest(), dtype=np.uint32)
    )
