"""Decode an image column to one uint8 tensor, in memory or in a file that is read when needed."""

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
from ..files import open_regular
from ..image_files import (
    MOVING,
    decode_frames,
    decode_image,
    flat_image,
    printable,
    upright,
)
from .identity import fingerprint
from .mapped import MappedFile, open_array


logger = logging.getLogger(__name__)


def decode(
    column: Sequence[dict],
    contexts: Sequence[str],
    resolution: int | None,
    channels: int,
    files: str,
    frames: int | None = None,
) -> Iterator[tuple[np.ndarray, int]]:
    """Decode images or clips one by one.

    Args:
        column: cells of the image column, each with `bytes` or a `path`; of a clip, also lists of
            such.
        contexts: context of each image, for messages.
        resolution: crop and resize images to this many pixels a side; `None` keeps them.
        channels: 1 (grey) or 3 (RGB).
        files: names of the files of the data set, for messages about images without a path.
        frames: of each clip, T; `None`: they are images.

    Yields:
        The image, uint8 (C, H, W), or the clip (C, T, H, W), all of one shape, and its fingerprint.

    Raises:
        ValueError: an image cannot be read, or has another size than the others.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (RGB), not {channels}.")
    first, moving = None, 0
    for row, (item, context) in enumerate(
        zip(tqdm(column, "reading images", disable=None, delay=2), contexts)
    ):
        cells = item if isinstance(item, list) else [item]
        file = next(iter(cells), None) or {}
        file = file.get("path") or files
        what = "image" if frames is None else "clip"
        where = f"{what} {row}{f' ({printable(file)})' if file else ''} of context {context!r}"
        if frames is None:
            image, mark = _opened(item, where)
            moving += image.info.get(MOVING, False)
            images = [image]
        else:
            contents = [_content(cell, where) for cell in cells]
            images, mark = decode_frames(contents, frames, where), fingerprint(b"".join(contents))
        arrays = []
        for image in images:
            image = _sized(flat_image(image, channels, where), resolution, first, where)
            first = image.size
            array = np.asarray(image).reshape(image.height, image.width, channels)
            arrays.append(array.transpose(2, 0, 1))
        yield arrays[0] if frames is None else np.stack(arrays, 1), mark
    if moving:
        logger.warning(
            "%d images have several frames: the first of each is used, the others are left out.",
            moving,
        )


def _sized(
    image: Image.Image, resolution: int | None, first: tuple[int, int] | None, where: str
) -> Image.Image:
    """Crop and resize an image; without a resolution, check that it has the size of the first.

    Raises:
        ValueError: it has another size.
    """
    if resolution is not None:
        if image.size == (resolution, resolution):
            return image
        return ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    if image.width != image.height or (first is not None and image.size != first):
        expected = "square" if first is None else f"{first[0]}x{first[1]} like the others"
        raise ValueError(
            f"{where} is {image.width}x{image.height}, not {expected}: give a resolution to crop"
            " and resize all images to."
        )
    return image


def _opened(item: dict | None, where: str) -> tuple[Image.Image, int]:
    """Decode the image of a cell of the image column.

    Args:
        item: the cell.
        where: how a message names the image.

    Returns:
        The image and its fingerprint.

    Raises:
        ValueError: the cell is empty, or the image cannot be read.
    """
    item = item or {}
    path = item.get("path")
    if item.get("bytes") is None and path and not is_local_path(path):  # `datasets` fetches it
        try:
            image = ImageFeature().decode_example(item)
        except Exception as error:  # from the connection or the decoder
            raise ValueError(f"{where} cannot be fetched or read: replace or remove it.") from error
        image = upright(image, where)
        return image, fingerprint(image.tobytes())
    content = _content(item, where)
    return decode_image(content, where), fingerprint(content)


def _content(item: dict | None, where: str) -> bytes:
    """Read the file of a cell.

    Raises:
        ValueError: the cell is empty, or the file cannot be read.
    """
    item = item or {}
    content, path = item.get("bytes"), item.get("path")
    if content is not None:
        return content
    if not path:
        raise ValueError(f"{where} is not there: the cell is empty.")
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError as error:
        raise ValueError(
            f"{where} cannot be read ({error.strerror}): replace or remove it."
        ) from error


def in_memory(
    decoded: Iterator[tuple[np.ndarray, int]], count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Collect `count` decoded images in one tensor, uint8 (count, C, H, W), and fingerprints."""
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
    frames: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, MappedFile]:
    """Keep decoded images or clips in a file in `cache_dir`, and read it by memory map.

    The file is written if it is not there: completely or not at all.

    Returns:
        The images, uint8 (N, C, H, W), or clips, (N, C, T, H, W), their fingerprints, int64 (N,),
        and the file.

    Raises:
        OSError: the folder cannot be written.
        ValueError: an image cannot be used.
    """
    settings = f"{resolution} {channels}" + ("" if frames is None else f" {frames}")
    path = Path(cache_dir, f"{_fingerprint(dataset, settings)}.npy")
    shape = (len(dataset), channels) + (() if frames is None else (frames,))
    try:
        cached = _cached(path, shape)
        if cached is None:  # the file is missing or damaged
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path):
                # Another process may have written it since.
                cached = _cached(path, shape)
                if cached is None:
                    _write(decoded, path, len(dataset))
                    cached = _cached(path, shape)
        if cached is None:
            raise OSError(f"{path.name} was changed right after it was written")
        return torch.from_numpy(cached[0]), torch.from_numpy(cached[1]), cached[2]
    except OSError as error:
        raise OSError(
            f"the decoded images cannot be kept in {cache_dir} ({error.strerror or error}): choose"
            " another folder."
        ) from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let no other process write a file of the cache, if the file system has locks.

    Parts of the file that a killed process left behind are removed.
    """
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
                # Not into a memory map: there a full disk would kill the process.
                file.write(image.tobytes())
        with open(temporary[1], "wb") as file:
            np.save(file, marks, allow_pickle=False)
        temporary[1].replace(_marks_of(path))
        temporary[0].replace(path)
    finally:
        for part in temporary:
            part.unlink(missing_ok=True)


def _marks_of(path: Path) -> Path:
    return path.with_name(f"{path.stem}.marks")


def _cached(path: Path, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, MappedFile] | None:
    """Open a file of the cache by memory map.

    Returns:
        The images, uint8 (*shape, H, W), their fingerprints, int64 (shape[0],), and the file;
        `None` if the file is missing or damaged.
    """
    try:
        found, mapped = open_array(
            path, "do not change the image cache while it is in use; go on with --resume auto"
        )
        with open(_marks_of(path), "rb") as file:
            marks = np.load(file, allow_pickle=False)
    # The file is truncated, or its header is not valid.
    except (OSError, ValueError, EOFError, MemoryError, OverflowError):
        return None
    whole = found.shape[:-2] == shape and found.dtype == np.uint8
    whole = whole and marks.shape == shape[:1] and marks.dtype == np.int64
    return (found, marks, mapped) if whole else None


def _fingerprint(dataset: Dataset, settings: str) -> str:
    """Return the cache key of the images of a data set, whose image column is not decoded, as they
    are decoded with some settings.

    It changes when a file of an image changes.
    """
    digest = hashlib.sha256(f"{dataset._fingerprint} {settings}".encode())
    for row in dataset["image"]:
        for item in row if isinstance(row, list) else [row]:
            path = item.get("path") if item and item.get("bytes") is None else None
            if path and os.path.exists(path):
                found = os.stat(path)
                # Copying programs keep the time of the last change of the contents, and some kinds
                # of files have all the same size: the time of the last change of any kind tells.
                changed = (found.st_size, found.st_mtime_ns, found.st_ctime_ns)
                digest.update(f"{path} {changed}".encode())
    return digest.hexdigest()[:32]
