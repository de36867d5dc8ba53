"""Handwritten digits of MNIST for `mnist.py`: from the package, from files, or from the Hub.

Source: LeCun, Cortes and Burges, The MNIST database of handwritten digits.
"""

import gzip
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset
from datasets import Image as ImageFeature

from ..sources import is_local
from .folder import from_hub, read_saved
from .requests import split_rows


BUNDLED = "bundled"
SIDE = 28
SPLITS = ("train", "test")
_FILES = {"train": "train", "test": "t10k"}
_BUNDLED_FILE = Path(__file__).parent / "mnist_digits" / "digits.npz"
_GZIP = b"\x1f\x8b"
_MAX_BYTES = 1 << 30  # the largest IDX file that is read; all of MNIST is 55 MB


@dataclass(frozen=True)
class Digits:
    """Images of digits and their labels.

    Args:
        images: white on black, uint8, (n, 28, 28).
        labels: the digit that each image shows, uint8, (n,).
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def split(self, fraction: float, seed: int = 0) -> tuple["Digits", "Digits"]:
        """Split at random into two sets without a common image.

        Args:
            fraction: share of the images in the second set.
            seed: seed of the split.

        Raises:
            ValueError: one of the two sets would be empty.
        """
        parts = map(np.sort, split_rows(len(self), fraction, seed, "digits"))
        first, held_out = (Digits(self.images[part], self.labels[part]) for part in parts)
        return first, held_out


def load_digits(source: str | os.PathLike = BUNDLED, split: str = "train") -> Digits:
    """Load the digits of one split. Different people wrote the digits of MNIST's two splits.

    Args:
        source: one of these, tried in this order:

            1. `"bundled"`: 400 digits for training and 400 for testing, which come with the
               package;
            2. a folder with MNIST's four IDX files (`train-images-idx3-ubyte`,
               `t10k-labels-idx1-ubyte`, ...), gzipped or not;
            3. a folder written by `save_to_disk`, with the columns `image` and `label`;
            4. the name of such a data set on the Hub, such as `"ylecun/mnist"`.
        split: `"train"` or `"test"`.

    Raises:
        OSError: there is no such source (FileNotFoundError), or it cannot be read.
        ValueError: there is no such split, a file is not an IDX file or is damaged, an image is not
            grey with 28 x 28 pixels, or the numbers of images and labels differ.
    """
    if split not in SPLITS:
        raise ValueError(f"the digits have no split {split!r}; choose one of {', '.join(SPLITS)}.")
    if source == BUNDLED:
        with np.load(_BUNDLED_FILE, allow_pickle=False) as file:
            return _checked(file[f"{split}_images"], file[f"{split}_labels"], BUNDLED)
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return _from_dataset(read_saved(path, split), source)
        return _checked(_read(path, split, "images", 3), _read(path, split, "labels", 1), source)
    if path.exists() or is_local(source):
        raise FileNotFoundError(
            f"there is no folder {source}: give `{BUNDLED}`, a folder with MNIST's files, or a Hub"
            " name, user/name."
        )
    return _from_dataset(from_hub(source, split), source)


def read_idx(path: str | os.PathLike) -> np.ndarray:
    """Read an IDX file of bytes, gzipped or not.

    The file has two zero bytes, the type (8: unsigned byte), the number of dimensions (1 to 3),
    each dimension as a big-endian 32-bit number, and the entries in row-major order.

    Returns:
        uint8 array of the shape that the file names.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not an IDX file of bytes, or is shorter or longer than it says.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == _GZIP
        with gzip.open(path) if zipped else open(path, "rb") as file:
            head = file.read(4)
            if len(head) < 4 or head[:3] != b"\0\0\x08" or head[3] not in (1, 2, 3):
                raise ValueError(f"{path} is not an IDX file of bytes, like those of MNIST.")
            sizes = file.read(4 * head[3])
            shape = tuple(np.frombuffer(sizes[: len(sizes) // 4 * 4], ">u4").tolist())
            length = 1
            for size in shape:  # Python's integers do not overflow
                length *= size
            if len(shape) == head[3] and length > _MAX_BYTES:
                raise ValueError(f"{path} names {length} entries, which no file of MNIST has.")
            data = file.read(length + 1) if len(shape) == head[3] else b""
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is a damaged gzip file: fetch it again.") from error
    except OSError as error:
        raise type(error)(f"{path} cannot be read: {error.strerror or error}.") from error
    if len(shape) < head[3] or len(data) < length:
        raise ValueError(f"{path} ends too early: it is cut short or damaged; fetch it again.")
    if len(data) > length:
        raise ValueError(
            f"{path} has more bytes than its {length} entries: it is damaged; fetch it again."
        )
    return np.frombuffer(data, np.uint8).reshape(shape)


def _read(folder: Path, split: str, kind: str, dimensions: int) -> np.ndarray:
    """Read one of the four files, which has one of several usual names."""
    stem = f"{_FILES[split]}-{kind}"
    names = [f"{stem}{dot}idx{dimensions}-ubyte{suffix}" for dot in "-." for suffix in ("", ".gz")]
    for name in names:
        if (folder / name).is_file():
            return read_idx(folder / name)
    raise FileNotFoundError(
        f"{folder} is not a saved data set and has no file {names[0]} or {names[1]}."
    )


def _from_dataset(dataset: Dataset, source: str | os.PathLike) -> Digits:
    for column in ("image", "label"):
        if column not in dataset.column_names:
            raise ValueError(
                f"{source} has no column {column!r}, only {', '.join(dataset.column_names)}: digits"
                " need both."
            )
    if not isinstance(dataset.features["image"], ImageFeature):
        raise ValueError(
            f"the image column of {source} holds {dataset.features['image']}, not images."
        )
    try:
        images = [np.asarray(image) for image in dataset["image"]]
    except Exception as error:  # decoders raise many types of errors
        raise ValueError(
            f"an image of {source} cannot be read: it is damaged or of another kind; save the data"
            " again."
        ) from error
    odd = next(
        (image for image in images if image.shape != (SIDE, SIDE) or image.dtype != np.uint8), None
    )
    if odd is not None:
        raise ValueError(
            f"{source} has an image {odd.dtype} {odd.shape}: digits must be grey, with {SIDE} x"
            f" {SIDE} pixels."
        )
    return _checked(
        np.stack(images) if images else np.empty((0, SIDE, SIDE), np.uint8),
        dataset["label"],
        source,
    )


def _checked(images: np.ndarray, labels: Iterable, source: str | os.PathLike) -> Digits:
    if images.shape[1:] != (SIDE, SIDE) or not len(images):
        raise ValueError(
            f"the images of {source} have the shape {images.shape}, not (n, {SIDE}, {SIDE})."
        )
    labels = np.asarray(list(labels))
    if labels.shape != (len(images),) or not np.isin(labels, range(10)).all():
        raise ValueError(
            f"{source} must have one label from 0 to 9 for each of its {len(images)} images."
        )
    return Digits(images, labels.astype(np.uint8))
