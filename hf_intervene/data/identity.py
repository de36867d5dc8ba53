"""Which images a split, a checkpoint and a model were made of: a fingerprint of 8 bytes for each
image.

A fingerprint is of the file as it is on the disk, or of the pixels where there is none. So it does
not depend on names, folders, order or versions of decoders: data that were moved elsewhere are
recognised, and images that were added change nothing of the others."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


SPLITS = ("image", "position")  # by what data are split into training and validation images
IMAGES_FILE = "training_images.safetensors"  # beside a model


def fingerprint(content: bytes) -> int:
    """64 bits of BLAKE2b of the contents of an image, as a signed integer."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def fingerprints(pixels: torch.Tensor) -> torch.Tensor:
    """Fingerprints, int64 (M,), of images that came from no files, uint8 (M, C, H, W)."""
    found = torch.empty(len(pixels), dtype=torch.int64)
    for rows in torch.arange(len(pixels)).split(
        1024
    ):  # not all at once: they may be more than memory holds
        block = pixels[rows.to(pixels.device)].cpu().numpy()
        found[rows] = torch.tensor([fingerprint(image.tobytes()) for image in block])
    return found


def places(marks: np.ndarray, seed: int) -> np.ndarray:
    """A place in [0, 1) for each fingerprint, int64 (N,), uniform, other for another seed, and not
    depending on the other images.
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


def changes(before: Mapping[str, torch.Tensor], now: Mapping[str, torch.Tensor]) -> str | None:
    """In words what is different in two sets of images, fingerprints (n,) by the context they are
    of; `None`: nothing.
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
            if other != name and len(here) and np.isin(here, marks[0][other]).mean() > 0.5:
                return f"the images of {name!r} are those that {other!r} had"
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
    """Write the fingerprints of training images, int64 (n,) by context, beside a model; none of
    data that are drawn anew.
    """
    if marks:
        save_file(
            {name: values.sort().values.contiguous() for name, values in marks.items()},
            folder / IMAGES_FILE,
        )


def load_images(folder: Path) -> dict[str, torch.Tensor]:
    """What `save_images` wrote beside a model; empty if it did not.

    Raises:
        OSError: one sentence: the file is corrupt.
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
