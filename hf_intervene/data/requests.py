"""What the simulated data sets share: checks of a request before anything is drawn, the seed of a
context, shards, the cache.
"""

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
MAX_SHARDS = 64  # of one context: a shard draws the numbers of the rows before it anew


class Request(TypedDict):
    """What is asked of a simulator, checked and in one form."""

    contexts: list[str]
    variant: str
    images_per_context: int
    resolution: int
    seed: int


def checked_contexts(contexts: Sequence[Context], concepts: Sequence[str]) -> list[str]:
    """Canonical names of a list of contexts, each in any form of `contexts.parse_context`.

    Raises:
        ValueError: one sentence: no list, an empty one, a context named twice, or what
            `context_name` says of one.
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
    """The numbers as `int`, by name; a TypeError of one sentence for what is none."""
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
    """Row numbers 0 to `count` - 1 in two parts without a common one, each in random order.

    Args:
        count: how many there are.
        fraction: share of the second part.
        seed: of the order.
        what: what the rows are, for the message.

    Returns:
        int64 arrays; the second has `round(fraction * count)` entries, the first the others.

    Raises:
        ValueError: one sentence: a fraction that leaves one of the two empty.
    """
    second = round(fraction * count) if 0 < fraction < 1 else 0
    if not 0 < second < count:
        raise ValueError(f"a share of {fraction} cannot be held out of {count} {what}.")
    rows = np.random.default_rng(seed).permutation(count)
    return rows[second:], rows[:second]


def intervened(context: Context, concepts: Sequence[str], dataset: str) -> np.ndarray:
    """Which of the concepts a context intervenes on, bool (concepts,).

    Raises:
        ValueError: an unknown concept, or one with a strength: the simulators know full
            interventions only.
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
    """The arguments of a request by name, checked and in one form, so that equal requests share a
    cache entry and bad ones fail before anything is drawn: one image of each context is, and
    complains in the simulator's own words."""
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


def png(image: np.ndarray) -> dict[str, bytes]:
    """An image, uint8 (H, W) or (H, W, 3), as a row of the `datasets` library keeps it."""
    file = io.BytesIO()
    PILImage.fromarray(image).save(file, "PNG", compress_level=1)
    return {"bytes": file.getvalue()}


def shards(contexts: Sequence[str], images_per_context: int) -> list[Shard]:
    """The rows of all contexts in order, in pieces that can be drawn apart: `SHARD_ROWS`, more
    where a context would have more than `MAX_SHARDS` pieces."""
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
    """The rows of a simulated data set, in shards; the same ones in the same order whichever way.

    Args:
        rows: generator of the rows of a list of shards, its first argument `shards`.
        features: of the rows.
        arguments: its others, and `contexts`, of which `shards` is made.
        name, key: what tells the data set from all others in the cache.
        cache_dir: folder of the cache; `None`: that of `datasets`.
        num_proc: processes that draw shards into the cache; `None`: this one.
        streaming: whether to write nothing and draw rows as they are read, anew in every pass: an
            `IterableDataset`, whose shards the workers of a `DataLoader` and
            `datasets.distributed.split_dataset_by_node` share out.

    Raises:
        TypeError, ValueError: one sentence: a number of processes that is none.
        OSError: one sentence: the cache cannot be written or is corrupt, a process has died.
    """
    if num_proc is not None and whole_numbers(num_proc=num_proc)["num_proc"] < 1:
        raise ValueError(f"num_proc must be at least 1, not {num_proc}.")
    others = {key: value for key, value in arguments.items() if key != "contexts"}
    others = {"shards": shards(arguments["contexts"], arguments["images_per_context"]), **others}
    if streaming:
        # As IterableDataset.from_generator, which would make a cache that it does not use, where
        # that may not be possible.
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
        cache = cache_dir or datasets.config.HF_DATASETS_CACHE
        if isinstance(
            error, RuntimeError
        ):  # the arguments are checked: what is left to fail are the processes, ...
            raise OSError(
                f"one of the {num_proc} processes that draw images has died, perhaps for lack of"
                " memory: try a smaller num_proc."
            ) from error
        if isinstance(error, ValueError) or (
            isinstance(error, OSError) and error.errno is None
        ):  # ... the reading, ...
            entry = next(Path(cache).glob(f"generator/*{fingerprint}*"), cache)
            raise OSError(
                f"the images in the cache are corrupt: remove {entry}, and they are drawn again."
            ) from error
        why = re.search(
            r"^[\w.]+: (.*)", str(error.__cause__ or error), re.M
        )  # ... and the writing, in whichever process
        raise OSError(
            f"the images could not be written to the cache {cache}"
            f" ({why[1] if why else error.__cause__ or error}): free some space or give another"
            " cache_dir."
        ) from error


def generator(*key: object) -> np.random.Generator:
    """A generator that is a function of the key alone, independent of that of any other key."""
    text = "/".join(map(str, key))
    return np.random.default_rng(
        np.frombuffer(hashlib.sha256(text.encode()).digest(), dtype=np.uint32)
    )
