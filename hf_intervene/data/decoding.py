"""From the cells of an image column to one uint8 tensor, in memory or in a file on the disk that is
read as it is used.
"""

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from datasets.utils.file_utils import is_local_path
from filelock import FileLock
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from ..errors import NO_LOCKS
from ..image_files import FRAMES, decode_image, flat_image, open_regular, printable, upright
from .identity import fingerprint
from .mapped import MappedFile, open_array


logger = logging.getLogger(__name__)


def decode(
    column: Sequence[dict],
    contexts: Sequence[str],
    resolution: int | None,
    channels: int,
    files: str,
) -> Iterator[tuple[np.ndarray, int]]:
    """The images one by one, uint8, (C, H, W), all of one shape, and their fingerprints; `files`
    are those that they are in where they have no path.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (RGB), not {channels}.")
    first, moving = None, 0
    for row, (item, context) in enumerate(
        zip(tqdm(column, "reading images", disable=None, delay=2), contexts)
    ):
        file = (item or {}).get("path") or files
        where = f"image {row}{f' ({printable(file)})' if file else ''} of context {context!r}"
        image, mark = _opened(item, where)
        moving += image.info.get(FRAMES, 1) > 1
        image = flat_image(image, channels, where)
        if resolution is not None:
            if image.size != (resolution, resolution):
                image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
        elif image.width != image.height or (first is not None and image.size != first):
            expected = "square" if first is None else f"{first[0]}x{first[1]} like the others"
            raise ValueError(
                f"{where} is {image.width}x{image.height}, not {expected}: give a resolution to"
                " crop and resize all images to."
            )
        first = image.size
        yield (
            np.asarray(image).reshape(image.height, image.width, channels).transpose(2, 0, 1),
            mark,
        )
    if moving:
        logger.warning(
            "%d images have several frames: the first of each is used, the others are left out.",
            moving,
        )


def _opened(item: dict | None, where: str) -> tuple[Image.Image, int]:
    """The image of a cell of the image column, decoded, and its fingerprint; `where` is what to
    call it in a message.

    Raises:
        ValueError: one sentence: there is none, or it cannot be read.
    """
    item = item or {}
    content, path = item.get("bytes"), item.get("path")
    if content is None:
        if not path:
            raise ValueError(f"{where} is not there: the cell is empty.")
        if not is_local_path(path):  # `datasets` knows how to fetch it
            try:
                image = ImageFeature().decode_example(item)
            except Exception as error:  # of a connection or of a decoder
                raise ValueError(
                    f"{where} cannot be fetched or read: replace or remove it."
                ) from error
            image = upright(image, where)
            return image, fingerprint(image.tobytes())
        try:
            with open_regular(path) as file:
                content = file.read()
        except OSError as error:
            raise ValueError(
                f"{where} cannot be read ({error.strerror}): replace or remove it."
            ) from error
    return decode_image(content, where), fingerprint(content)


def in_memory(
    decoded: Iterator[tuple[np.ndarray, int]], count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    pixels, marks = None, torch.empty(count, dtype=torch.int64)
    for row, (image, mark) in enumerate(decoded):
        if pixels is None:
            pixels = np.empty((count, *image.shape), dtype=np.uint8)
        pixels[row], marks[row] = image, mark
    return torch.from_numpy(pixels), marks


def on_disk(
    decoded: Iterator[tuple[np.ndarray, int]],
    dataset: Dataset,
    resolution: int | None,
    channels: int,
    cache_dir: str | os.PathLike,
) -> tuple[torch.Tensor, torch.Tensor, MappedFile]:
    """The images as a file in `cache_dir`, written whole or not at all if it is not there, by
    memory map; their fingerprints; and the file.

    Raises:
        OSError: one sentence: the folder cannot be written.
        ValueError: one sentence: an image cannot be used.
    """
    path = Path(cache_dir, f"{_fingerprint(dataset, resolution, channels)}.npy")
    try:
        cached = _cached(path, len(dataset), channels)
        if cached is None:  # or it is broken
            path.parent.mkdir(parents=True, exist_ok=True)
            with _alone(path):
                cached = _cached(
                    path, len(dataset), channels
                )  # another process may have written it meanwhile
                if cached is None:
                    _write(decoded, path, len(dataset))
                    cached = _cached(path, len(dataset), channels)
        if cached is None:
            raise OSError(f"{path.name} was changed as soon as it was written")
        return torch.from_numpy(cached[0]), torch.from_numpy(cached[1]), cached[2]
    except OSError as error:
        raise OSError(
            f"the decoded images cannot be kept in {cache_dir} ({error.strerror or error}): choose"
            " another folder."
        ) from error


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Inside, no other process writes this file of the cache, where the file system has locks; what
    a process that was killed left of it is removed."""
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    else:
        for leftover in path.parent.glob(f".{path.name}.*.part"):
            leftover.unlink(missing_ok=True)
    try:
        yield
    finally:
        lock.release()


def _write(decoded: Iterator[tuple[np.ndarray, int]], path: Path, count: int) -> None:
    temporary = [
        path.with_name(f".{path.name}.{uuid4().hex}.{kind}.part") for kind in ("images", "marks")
    ]
    try:
        marks = np.empty(count, np.int64)
        with open(temporary[0], "wb") as file:
            for row, (image, marks[row]) in enumerate(decoded):
                if row == 0:
                    header = {
                        "descr": "|u1",
                        "fortran_order": False,
                        "shape": (count, *image.shape),
                    }
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(
                    image.tobytes()
                )  # and not into a memory map: a full disk would kill the process
        with open(temporary[1], "wb") as file:
            np.save(file, marks, allow_pickle=False)
        temporary[1].replace(_marks_of(path))
        temporary[0].replace(path)
    finally:
        for part in temporary:
            part.unlink(missing_ok=True)


def _marks_of(path: Path) -> Path:
    return path.with_name(f"{path.stem}.marks")


def _cached(
    path: Path, count: int, channels: int
) -> tuple[np.ndarray, np.ndarray, MappedFile] | None:
    """The images (count, channels, H, W) in a file of the cache, by memory map, their fingerprints
    (count,), and the file; `None` if they are not there or not whole."""
    try:
        found, mapped = open_array(
            path, "do not change the image cache while it is in use; go on with --resume auto"
        )
        with open(_marks_of(path), "rb") as file:
            marks = np.load(file, allow_pickle=False)
    except (
        OSError,
        ValueError,
        EOFError,
        MemoryError,
        OverflowError,
    ):  # truncated, or with a header that is none
        return None
    whole = found.ndim == 4 and found.shape[:2] == (count, channels) and found.dtype == np.uint8
    return (
        (found, marks, mapped)
        if whole and marks.shape == (count,) and marks.dtype == np.int64
        else None
    )


def _fingerprint(dataset: Dataset, resolution: int | None, channels: int) -> str:
    """Of the images of a data set, whose image column is not decoded; it changes when a file that
    they are in does.
    """
    digest = hashlib.sha256(f"{dataset._fingerprint} {resolution} {channels}".encode())
    for item in dataset["image"]:
        if item and item.get("bytes") is None and item.get("path") and os.path.exists(item["path"]):
            found = os.stat(item["path"])
            digest.update(f"{item['path']} {found.st_size} {found.st_mtime_ns}".encode())
    return digest.hexdigest()[:32]
