"""avatars: faces in pixel art by another project's generator, with the true answer of every edit.

It is a stored set of images, not a simulator: nothing is random, and the number of images is fixed
(`available`). Four concepts are intervened on, each independent of the others:

    glasses, beard, hat   5, 5 and 3 of 100 faces have them in the observational context, all of
                          them under an intervention
    smile                 all mouths are sad in the observational context, happy under an
                          intervention

Everything else about a face (`ATTRIBUTES`) stays as it is; a hat covers hair.

    cells uint8 (n, 16, 16, 3) --each one repeated--> images uint8 (n, resolution, resolution, 3)

The split `"train"` has 4,000 images in the observational context and in the context of each
concept. No person appears twice. The split `"holdout"` has 1,400 other persons, who appear in every
context: image i of `"glasses+hat"` is image i of `"obs"` after that intervention (`twins`).

Source: avatar style "Pixel Art" by DiceBear, CC0 1.0; data/avatar_faces/README.md describes the
files. The card is model_cards/datasets/avatars.md.
"""

import io
import json
import lzma
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, IterableDataset, Value

from ..contexts import OBS, Context
from .requests import Shard, checked_contexts, generated, intervened, png, whole_numbers


CONCEPTS = ("glasses", "beard", "hat", "smile")
TRAIN_CONTEXTS = (OBS, *CONCEPTS)
# Combinations that no training image has: all pairs, one triple, all four.
HELD_OUT = (
    *("+".join(pair) for pair in combinations(CONCEPTS, 2)),
    "glasses+beard+hat",
    "+".join(CONCEPTS),
)
ATTRIBUTES = (  # parts of a face; `None` means that the part was not drawn
    *("glasses", "beard", "hat", "mouth", "hair", "hair_color", "skin_color", "eyes"),
    *("clothing", "clothing_color", "accessories", "background_color"),
)
SPLITS = ("train", "holdout")
SIDE = 32  # default side of the images in pixels

_GRID = 16  # cells per side of a face
_VERSION = 1  # part of the cache's key: raise it when an image or an attribute would change
_FOLDER = Path(__file__).parent / "avatar_faces"

Attributes = Mapping[str, Sequence[str | None]]


def available(split: str = "train") -> tuple[tuple[str, ...], int]:
    """Return the contexts of a split, `"train"` or `"holdout"`, and the number of images in each.

    Raises:
        ValueError: there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"avatars has no split {split!r}; choose one of {', '.join(SPLITS)}.")
    cells, attributes = _stored(split)
    return tuple(attributes), cells.shape[1]


def concepts_present(attributes: Attributes) -> np.ndarray:
    """Return which concepts faces show, with or without an intervention.

    Args:
        attributes: columns by name, at least glasses, beard, hat and mouth, of n entries each. They
            come from `attributes_by_context`, or are rows of `load_avatars`, as in `data[:100]`.

    Returns:
        bool array (n, 4), columns in the order of `CONCEPTS`.

    Raises:
        ValueError: a column is missing.
    """
    for name in ("glasses", "beard", "hat", "mouth"):
        if name not in attributes:
            raise ValueError(
                f"the attributes lack {name!r}: give the columns glasses, beard, hat and mouth."
            )
    drawn = [[value is not None for value in attributes[name]] for name in CONCEPTS[:3]]
    smiles = [str(mouth).startswith("happy") for mouth in attributes["mouth"]]
    return np.array([*drawn, smiles], dtype=bool).T


def images_of(
    persons: Sequence[int] | np.ndarray,
    contexts: Sequence[Context] = TRAIN_CONTEXTS,
    resolution: int = SIDE,
    split: str = "train",
) -> dict[str, np.ndarray]:
    """Return some images of each context.

    Args:
        persons: numbers (n,) of the images within a context, from 0 on. In the split `"holdout"` a
            number is the same person in every context.
        contexts, resolution, split: as in `load_avatars`.

    Returns:
        uint8 images (n, resolution, resolution, 3) by canonical context name.

    Raises:
        ValueError, TypeError: an argument is out of range or unknown.
        IndexError: there is no image with such a number.
    """
    names, _, resolution = _checked(contexts, None, resolution, split)
    cells, attributes = _stored(split)
    index, repeats = list(attributes), resolution // _GRID
    return {
        name: cells[index.index(name), persons].repeat(repeats, 1).repeat(repeats, 2)
        for name in names
    }


def images_by_context(
    contexts: Sequence[Context] = TRAIN_CONTEXTS,
    images_per_context: int | None = None,
    resolution: int = SIDE,
    split: str = "train",
) -> dict[str, np.ndarray]:
    """Return images as arrays: uint8 (n, resolution, resolution, 3) by canonical context name.

    Arguments and errors are those of `load_avatars`.
    """
    _, images, _ = _checked(contexts, images_per_context, resolution, split)
    return images_of(np.arange(images), contexts, resolution, split)


def attributes_by_context(
    contexts: Sequence[Context] = TRAIN_CONTEXTS,
    images_per_context: int | None = None,
    split: str = "train",
) -> dict[str, dict[str, np.ndarray]]:
    """Return the attributes of the images of `images_by_context`.

    Args:
        contexts, images_per_context, split: as in `load_avatars`.

    Returns:
        Arrays of objects (n,), strings or `None`, by canonical context name and attribute, in the
        order of `ATTRIBUTES`.

    Raises:
        ValueError, TypeError: an argument is out of range or unknown.
    """
    names, images, _ = _checked(contexts, images_per_context, SIDE, split)
    stored = _stored(split)[1]
    return {
        name: {key: np.array(rows[:images], dtype=object) for key, rows in stored[name].items()}
        for name in names
    }


def twins(
    contexts: Sequence[Context] = (*TRAIN_CONTEXTS, *HELD_OUT), resolution: int = SIDE
) -> dict[str, np.ndarray]:
    """Return the 1,400 held-out persons in several contexts: the true answers of edits.

    A person who has glasses, a beard or a hat in the observational context keeps the same ones
    under that intervention. Every mouth changes under `smile`.

    Args:
        contexts, resolution: as in `load_avatars`.

    Returns:
        uint8 images (1400, resolution, resolution, 3) by canonical context name. Image i shows the
        same person in all contexts. `attributes_by_context(contexts, split="holdout")` returns
        their attributes.

    Raises:
        ValueError, TypeError: an argument is out of range or unknown.
    """
    return images_by_context(contexts, None, resolution, "holdout")


def load_avatars(
    contexts: Sequence[Context] = TRAIN_CONTEXTS,
    images_per_context: int | None = None,
    split: str = "train",
    resolution: int = SIDE,
    cache_dir: str | None = None,
    num_proc: int | None = None,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Load the faces as a data set of the `datasets` library, which keeps them in its cache.

    Args:
        contexts: a list of contexts, each in any form of `contexts.parse_context`. Rows are grouped
            by context, in this order. The split `"train"` has the contexts `TRAIN_CONTEXTS`, the
            split `"holdout"` also has those of `HELD_OUT`.
        images_per_context: number of rows of each context. `None` means all: 4,000 in `"train"`,
            1,400 in `"holdout"`.
        split: `"train"`, where no person appears twice, or `"holdout"`, where every context has the
            same persons, none of whom is in `"train"`.
        resolution: side of the images in pixels, a multiple of 16: each cell of a face is repeated.
        cache_dir, num_proc, streaming: see `requests.generated`. They do not change the rows.

    Returns:
        Columns `image` (PNG), `context` (canonical name), `person` (number of the person in the
        split) and those of `ATTRIBUTES` (strings, `None` for parts that were not drawn).

    Raises:
        ValueError, TypeError: an argument is out of range or unknown, the split has no such
            context, or fewer images.
        OSError: the cache cannot be written.
    """
    names, images, resolution = _checked(contexts, images_per_context, resolution, split)
    features = {"image": Image(), "context": Value("string"), "person": Value("int32")}
    features = Features(features | {name: Value("string") for name in ATTRIBUTES})
    arguments = {"contexts": names, "images_per_context": images}
    arguments |= {"resolution": resolution, "split": split}
    key = (_VERSION, sorted(arguments.items()))
    return generated(_rows, features, arguments, "avatars", key, cache_dir, num_proc, streaming)


def _rows(
    shards: list[Shard], images_per_context: int, resolution: int, split: str
) -> Iterator[dict[str, object]]:
    contexts, stored = available(split)
    for context, start, stop in shards:
        # In "train" every context has its own persons: numbers continue from context to context.
        first = contexts.index(context) * stored if split == "train" else 0
        attributes = _stored(split)[1][context]
        images = images_of(np.arange(start, stop), [context], resolution, split)[context]
        for number, image in zip(range(start, stop), images):
            drawn = {name: attributes[name][number] for name in ATTRIBUTES}
            yield {"image": png(image), "context": context, "person": first + number, **drawn}


def _checked(
    contexts: Sequence[Context], images_per_context: int | None, resolution: int, split: str
) -> tuple[list[str], int, int]:
    """Check arguments. Return canonical context names, images of each, and the resolution.

    Raises:
        ValueError, TypeError: an argument is out of range or unknown.
    """
    known, most = available(split)
    images = most if images_per_context is None else images_per_context
    numbers = whole_numbers(images_per_context=images, resolution=resolution)
    names = checked_contexts(contexts, CONCEPTS)
    for name in names:
        intervened(name, CONCEPTS, "avatars")  # raises an error for a strength
        if name not in known:
            advice = "take split='holdout'" if name in HELD_OUT else "choose among those"
            raise ValueError(
                f"avatars has no images of {name!r} in its split {split!r}, only of "
                f"{', '.join(known)}: {advice}."
            )
    if numbers["images_per_context"] > most:
        raise ValueError(
            f"avatars has {most} images of each context in its split {split!r}, not {images}: ask "
            "for no more than those."
        )
    if numbers["resolution"] < _GRID or numbers["resolution"] % _GRID:
        raise ValueError(
            f"avatars images need a resolution that is a multiple of {_GRID} pixels, such as "
            f"{SIDE} or 64, not {resolution}."
        )
    return names, numbers["images_per_context"], numbers["resolution"]


@cache
def _stored(split: str) -> tuple[np.ndarray, dict[str, dict[str, list[str | None]]]]:
    """Read the files of a split.

    Returns:
        The cells of all faces, uint8 (contexts, n, 16, 16, 3), read-only; and the attributes by
        context and name, with contexts in the same order.
    """
    content = lzma.decompress((_FOLDER / f"{split}.npy.xz").read_bytes())
    cells = np.load(io.BytesIO(content), allow_pickle=False)
    cells.flags.writeable = False
    return cells, json.loads(lzma.decompress((_FOLDER / f"{split}.json.xz").read_bytes()))
