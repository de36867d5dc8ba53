"""Fingerprints of images: which images a split, a checkpoint and a model were made of.

The fingerprint of an image has 8 bytes. It is a hash of the file's contents, or of the pixels if
there is no file. So it does not depend on names, folders, order or versions of decoders. Data that
were moved are recognised, and new images do not change the fingerprints of the others.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


SPLITS = ("image", "position")  # ways to split data into training and validation images
IMAGES_FILE = "training_images.safetensors"  # in the folder of a model


def fingerprint(content: bytes) -> int:
    """Return 64 bits of BLAKE2b of the contents of an image file, as a signed integer."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def fingerprints(blocks: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the fingerprints, int64 (M,), of images without files.

    Args:
        blocks: the images in pieces, uint8 (n, C, H, W). All together they may be larger than the
            memory.
    """
    return torch.tensor(
        [fingerprint(image.tobytes()) for block in blocks for image in block.cpu().numpy()],
        dtype=torch.int64,
    )


def places(marks: np.ndarray, seed: int) -> np.ndarray:
    """Return a number in [0, 1) for each fingerprint, int64 (N,).

    The numbers are uniformly distributed. Each depends on its fingerprint and the seed only, not on
    the other images.
    """
    with np.errstate(over="ignore"):
        mixed = _mixed(
            marks.astype(np.int64).view(np.uint64)
            ^ _mixed(np.array([seed], np.int64).view(np.uint64))
        )
    return mixed.astype(np.float64) / 2.0**64


def _mixed(x: np.ndarray) -> np.ndarray:
    # The finaliser of SplitMix64 (Steele, Lea and Flood, 2014, doi:10.1145/2660193.2660195).
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def between_copies(order: np.ndarray, count: int) -> int | None:
    """Return the number of images nearest to `count` after which no copies are parted.

    Args:
        order: the places of the images (see `places`), sorted; copies have the same.
        count: how many of the first are wanted.

    Returns:
        The number, at least 1 and less than all; `None` if all images are copies of one.
    """
    ends = np.flatnonzero(np.diff(order)) + 1
    return int(ends[np.abs(ends - count).argmin()]) if len(ends) else None


def changes(before: Mapping[str, torch.Tensor], now: Mapping[str, torch.Tensor]) -> str | None:
    """Describe a difference between two sets of images.

    Args:
        before, now: fingerprints, int64 (n,), by context.

    Returns:
        A part of a sentence, or `None` if the sets are equal.
    """
    marks = [
        {name: np.sort(np.asarray(values)) for name, values in of.items()} for of in (before, now)
    ]
    none = np.empty(0, np.int64)
    different = [
        n
        for n in sorted({*before, *now})
        if not np.array_equal(marks[0].get(n, none), marks[1].get(n, none))
    ]
    for name in different:
        for other in sorted(marks[0]):
            here = marks[1].get(name, none)
            alike = other.rpartition("/")[2] == name.rpartition("/")[2]  # of another part
            if not alike and len(here) and np.isin(here, marks[0][other]).mean() > 0.5:
                return f"context {name!r} now has the images that {other!r} had"
    for name in different:
        then, here = (of.get(name, none) for of in marks)
        if name not in now:
            return f"the context {name!r} is gone"
        if name not in before:
            return f"the context {name!r} is new"
        new, gone = int((~np.isin(here, then)).sum()), int((~np.isin(then, here)).sum())
        return (
            f"of {name!r}, which had {len(then)} images and has {len(here)}, {new} are new and"
            f" {gone} are gone"
        )
    return None


def save_images(folder: Path, marks: Mapping[str, torch.Tensor]) -> None:
    """Write the fingerprints of training images into the folder of a model.

    Args:
        folder: the folder.
        marks: fingerprints, int64 (n,), by context. Simulated data have none, and nothing is
            written.
    """
    if marks:
        save_file(
            {name: values.sort().values.contiguous() for name, values in marks.items()},
            folder / IMAGES_FILE,
        )


def load_images(folder: Path) -> dict[str, torch.Tensor]:
    """Return the fingerprints that `save_images` wrote into the folder of a model, if it did.

    Raises:
        OSError: the file is corrupt.
    """
    path = Path(folder, IMAGES_FILE)
    if not path.exists():
        return {}
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise OSError(
            f"{path} is truncated or corrupt: take it from where the model was trained, or"
            " remove it."
        ) from error
