"""`ContextImages`: images from several contexts as one uint8 tensor, in memory or on disk, checked once, so that a step needs no per-sample
Python."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from datasets import Image as ImageFeature
from datasets.utils.file_utils import is_local_path
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from ..contexts import OBS, Context, context_name, named_concepts, parse_context, parse_interventions, validate_concepts
from ..image_files import decode_image, flat_image, open_regular, printable, upright


MIN_IMAGES = 8  # below this a context can neither be learnt nor split


@dataclass
class ContextImages:
    """
    Args:
        stored: images, uint8, (M, C, H, W); a part of a set shares them with the other parts.
        context_ids: context of each image, int64, (N,).
        contexts: canonical names of the contexts; `contexts[context_ids[n]]` is that of image n.
        concepts: names of the concepts.
        rows: where in `stored` each image is, int64, (N,), on the same device; `None`: there are no others.
        mapped: whether `stored` is a file that is read as it is used.
    """

    stored: torch.Tensor
    context_ids: torch.Tensor
    contexts: list[str]
    concepts: tuple[str, ...] = field(default_factory=tuple)
    rows: torch.Tensor | None = None
    mapped: bool = False

    def __len__(self) -> int:
        return len(self.context_ids)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.stored.shape[1:]
        return channels, height, width

    @property
    def pixels(self) -> torch.Tensor:
        """All images, uint8, (N, C, H, W): a copy in memory if others are stored with them."""
        return self.stored if self.rows is None else self.stored.index_select(0, self.rows)

    def images(self, index: torch.Tensor) -> torch.Tensor:
        """Some of the images, uint8, (n, C, H, W), on the device where they are stored, by an index (n,) of integers."""
        index = index.to(self.stored.device)
        return self.stored.index_select(0, index if self.rows is None else self.rows[index])

    def on(self, device: torch.device | str) -> "ContextImages":
        """The images stored on a device; their contexts stay where they are."""
        rows = None if self.rows is None else self.rows.to(device)
        return replace(self, stored=self.stored.to(device), rows=rows, mapped=False)

    def _part(self, index: torch.Tensor, **changes: Any) -> "ContextImages":
        rows = index.to(self.stored.device)
        return replace(self, rows=rows if self.rows is None else self.rows[rows], **changes)

    def targets(self, free_blocks: int = 0) -> torch.Tensor:
        """Targets of each context, (contexts, D): those of image n are row `context_ids[n]`."""
        return torch.cat([parse_interventions(name, self.concepts, free_blocks=free_blocks) for name in self.contexts])

    def select(self, contexts: Sequence[Context]) -> "ContextImages":
        """The images of a list of contexts, in the order given, each in any form of `contexts.parse_context`."""
        if isinstance(contexts, str):
            raise ValueError(f"give a list of contexts, such as [{contexts!r}], not {contexts!r}.")
        names: list[str] = []
        for context in contexts:
            try:
                name: Any = context_name(context, self.concepts)
            except ValueError:
                name = context  # of unknown concepts: the data have no such context either
            if name not in self.contexts:
                raise ValueError(f"there is no context {name!r}; the data have {', '.join(self.contexts)}.")
            if name in names:
                raise ValueError(f"context {name!r} is selected twice.")
            names.append(name)
        keep = [torch.nonzero(self.context_ids == self.contexts.index(name))[:, 0] for name in names]
        ids = torch.cat([torch.full((len(rows),), number) for number, rows in enumerate(keep)])
        return self._part(torch.cat(keep), context_ids=ids, contexts=names)

    def split(self, validation_fraction: float, seed: int = 0) -> tuple["ContextImages", "ContextImages"]:
        """Training and validation images, the fraction taken from every context alike."""
        if not 0 < validation_fraction < 1:
            raise ValueError(f"validation_fraction must lie between 0 and 1, not {validation_fraction}.")
        rng = np.random.default_rng(seed)
        parts: tuple[list, list] = ([], [])
        for number in range(len(self.contexts)):
            rows = rng.permutation(torch.nonzero(self.context_ids == number)[:, 0].numpy())
            held_out = min(max(1, round(validation_fraction * len(rows))), len(rows) - 1)
            parts[0].append(np.sort(rows[held_out:]))
            parts[1].append(np.sort(rows[:held_out]))
        training, validation = (
            self._part(rows, context_ids=self.context_ids[rows])
            for rows in (torch.from_numpy(np.concatenate(part)) for part in parts)
        )
        return training, validation

    def by_context(self) -> dict[str, np.ndarray]:
        """uint8 images (n, H, W, C) of each context."""
        rows = {name: torch.nonzero(self.context_ids == number)[:, 0] for number, name in enumerate(self.contexts)}
        return {name: self.images(index).permute(0, 2, 3, 1).cpu().numpy() for name, index in rows.items()}

    @classmethod
    def from_arrays(cls, images: Mapping[str, np.ndarray], concepts: Sequence[str]) -> "ContextImages":
        """From arrays, without the way through files.

        Args:
            images: context (in any string form) to its images, uint8, (n, H, W, C) with one H, W and C for all.
            concepts: the concepts.

        Raises:
            ValueError: one sentence: arrays of another kind, images of several sizes, or what `from_dataset` says of contexts.
        """
        concepts = validate_concepts(concepts)
        if not images:
            raise ValueError("there are no images: give arrays of at least the observational context and one for each concept.")
        names = [context_name(name, concepts) for name in images]
        arrays = [np.asarray(array) for array in images.values()]
        for name, array in zip(names, arrays):
            if names.count(name) > 1:
                raise ValueError(f"context {name!r} is given twice: join its arrays.")
            if array.ndim != 4 or array.dtype != np.uint8:
                raise ValueError(f"images of context {name!r} must be uint8 (n, H, W, C), not {array.dtype} {array.shape}.")
            if array.shape[1:] != arrays[0].shape[1:]:
                raise ValueError(
                    f"images of context {name!r} have the shape {array.shape[1:]}, those of {names[0]!r} {arrays[0].shape[1:]}: "
                    "bring all to one size."
                )
        pixels = torch.cat([torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2))) for array in arrays])
        ids = torch.repeat_interleave(torch.arange(len(names)), torch.tensor([len(array) for array in arrays]))
        return cls(pixels, ids, names, concepts).checked()

    @classmethod
    def from_dataset(
        cls,
        dataset: Dataset,
        concepts: Sequence[str] | None = None,
        resolution: int | None = None,
        channels: int = 3,
        complete: bool = True,
        cache_dir: str | os.PathLike | None = None,
    ) -> "ContextImages":
        """Decode and check a data set with an `image` and a `context` column.

        Args:
            dataset: `image` holds images (PIL, a path, or an `Image` feature), `context` a name (`"obs"`, `"quad1"`, `"quad1+size"`), a
                list of concept names, or a class label.
            concepts: the concepts; `None`: all that the contexts name, in alphabetical order. Images whose context names others are
                left out.
            resolution: centre-crop to a square and resize to this many pixels; `None`: all images must be square and of one size.
            channels: 3 (RGB) or 1 (grey).
            complete: whether to refuse contexts that nothing can be trained on (`metrics.check` says what they lack).
            cache_dir: folder to decode the images into, as uint8, once: they are found there the next time, and read by memory map, so
                that the set may be larger than memory. `None`: they are decoded into memory.

        Raises:
            OSError: one sentence: the cache cannot be written.
            ValueError: one sentence: a missing column, an image without a context, no observational context, a concept that
                no context names, or none by itself, an unreadable or 16-bit image, images of several sizes, too few in a context.
        """
        for column in ("image", "context"):
            if column not in dataset.column_names:
                raise ValueError(
                    f"the data set has no column {column!r}, only {', '.join(dataset.column_names)}: rename or add it."
                )
        if resolution is not None and resolution < 1:
            raise ValueError(f"resolution must be at least 1 pixel, not {resolution}.")
        raw = [_as_context(row, value, dataset.features["context"]) for row, value in enumerate(dataset["context"])]
        named = [set(named_concepts(value)) - {OBS} for value in raw]
        found = sorted(set().union(*named))
        if concepts is None:
            concepts = found
            if not concepts:
                raise ValueError(
                    "the data set has no context but the observational one: nothing was intervened on, nothing can be learnt."
                )
        concepts = validate_concepts(concepts)
        if missing := [name for name in concepts if name not in found]:
            raise ValueError(f"no context names the concept {missing[0]!r}; the concepts of the data set are {', '.join(found)}.")
        kept = [row for row, names_of_row in enumerate(named) if names_of_row <= set(concepts)]
        if len(kept) < len(raw):
            dataset, raw = dataset.select(kept), [raw[row] for row in kept]
        cache: dict[str, str] = {}
        names = []
        for value in raw:
            key = repr(value)
            if key not in cache:
                cache[key] = context_name(value, concepts)
            names.append(cache[key])
        contexts = sorted(set(names), key=lambda name: _order(name, concepts))

        if not isinstance(dataset.features["image"], ImageFeature):
            try:
                dataset = dataset.cast_column("image", ImageFeature())
            except (TypeError, ValueError, NotImplementedError) as error:  # pyarrow's are of these kinds
                raise ValueError(f"the image column holds {dataset.features['image']}, not images or paths of images.") from error
        dataset = dataset.cast_column("image", ImageFeature(decode=False))
        files = ", ".join(file["filename"] for file in dataset.cache_files)
        decoded = _decode(dataset["image"], names, resolution, channels, files)
        pixels = (
            _in_memory(decoded, len(names)) if cache_dir is None else _on_disk(decoded, dataset, resolution, channels, cache_dir)
        )
        ids = torch.tensor([contexts.index(name) for name in names])
        images = cls(pixels, ids, contexts, concepts, mapped=cache_dir is not None)
        return images.checked() if complete else images

    def checked(self) -> "ContextImages":
        """The set itself, if something can be learnt from it.

        Raises:
            ValueError: one sentence: no observational context, a concept without a context of its own, too few images in a context.
        """
        if OBS not in self.contexts:
            raise ValueError(
                f"there are no observational images: add images whose context is {OBS!r} (the contexts are {', '.join(self.contexts)})."
            )
        single = {name for name in self.contexts if len(parse_context(name, self.concepts)) == 1}
        for concept in self.concepts:
            if concept not in single:
                raise ValueError(
                    f"concept {concept!r} has no context in which it alone was intervened on: add such images, or leave the concept out."
                )
        counts = torch.bincount(self.context_ids, minlength=len(self.contexts)).tolist()
        for name, count in zip(self.contexts, counts):
            if count < MIN_IMAGES:
                raise ValueError(f"context {name!r} has {count} images; at least {MIN_IMAGES} are needed.")
        return self


def _as_context(row: int, value: Any, feature: Any) -> str | list[str]:
    """A cell of the context column as a name or a list of names."""
    inner = getattr(feature, "feature", None)  # of a list
    if isinstance(feature, ClassLabel) and value is not None and value >= 0:  # -1: without a label
        return feature.int2str(value)
    if isinstance(inner, ClassLabel) and value is not None:
        return [inner.int2str(label) for label in value]
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return value
    # Not taken as observational: a gap in a table would quietly mix intervened images into that context.
    kind = "no context" if value is None or value == -1 or not str(value).strip() else f"the context {value!r}"
    raise ValueError(f"image {row} has {kind}: give a name ({OBS!r} for observational images), a list of names or a class label.")


def _order(name: str, concepts: Sequence[str]) -> tuple:
    strengths = parse_context(name, concepts)
    positions = [concepts.index(concept) for concept in strengths]
    return len(positions), positions, list(strengths.values())


def _decode(
    column: Sequence[dict], contexts: Sequence[str], resolution: int | None, channels: int, files: str
) -> Iterator[np.ndarray]:
    """The images one by one, uint8, (C, H, W), all of one shape; `files` are those that they are in where they have no path."""
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (RGB), not {channels}.")
    first = None
    for row, (item, context) in enumerate(zip(tqdm(column, "reading images", disable=None, delay=2), contexts)):
        file = (item or {}).get("path") or files
        where = f"image {row}{f' ({printable(file)})' if file else ''} of context {context!r}"
        image = flat_image(_opened(item, where), channels, where)
        if resolution is not None:
            if image.size != (resolution, resolution):
                image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
        elif image.width != image.height or (first is not None and image.size != first):
            expected = "square" if first is None else f"{first[0]}x{first[1]} like the others"
            raise ValueError(
                f"{where} is {image.width}x{image.height}, not {expected}: give a resolution to crop and resize all images to."
            )
        first = image.size
        yield np.asarray(image).reshape(image.height, image.width, channels).transpose(2, 0, 1)


def _opened(item: dict | None, where: str) -> Image.Image:
    """The image of a cell of the image column, decoded; `where` is what to call it in a message.

    Raises:
        ValueError: one sentence: there is none, or it cannot be read.
    """
    item = item or {}
    if item.get("bytes") is not None:
        return decode_image(item["bytes"], where)
    path = item.get("path")
    if not path:
        raise ValueError(f"{where} is not there: the cell is empty.")
    if not is_local_path(path):  # `datasets` knows how to fetch it
        return upright(ImageFeature().decode_example(item), where)
    try:
        with open_regular(path) as file:
            return decode_image(file, where)
    except OSError as error:
        raise ValueError(f"{where} cannot be read ({error.strerror}): replace or remove it.") from error


def _in_memory(decoded: Iterator[np.ndarray], count: int) -> torch.Tensor:
    pixels = None
    for row, image in enumerate(decoded):
        if pixels is None:
            pixels = np.empty((count, *image.shape), dtype=np.uint8)
        pixels[row] = image
    return torch.from_numpy(pixels)


def _on_disk(
    decoded: Iterator[np.ndarray], dataset: Dataset, resolution: int | None, channels: int, cache_dir: str | os.PathLike
) -> torch.Tensor:
    """The images as a file in `cache_dir`, written whole or not at all if it is not there, by memory map."""
    path = Path(cache_dir, f"{_fingerprint(dataset, resolution, channels)}.npy")
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.writing")
    try:
        cached = _cached(path, len(dataset), channels)
        if cached is None:  # or it is broken
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(temporary, "wb") as file:
                    for row, image in enumerate(decoded):
                        if row == 0:
                            header = {"descr": "|u1", "fortran_order": False, "shape": (len(dataset), *image.shape)}
                            np.lib.format.write_array_header_1_0(file, header)
                        file.write(image.tobytes())  # and not into a memory map: a full disk would kill the process
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
            cached = np.load(path, mmap_mode="c", allow_pickle=False)
        return torch.from_numpy(cached)
    except OSError as error:
        raise OSError(
            f"the decoded images cannot be kept in {cache_dir} ({error.strerror or error}): choose another folder."
        ) from error


def _cached(path: Path, count: int, channels: int) -> np.ndarray | None:
    """The images (count, channels, H, W) in a file of the cache, by memory map; `None` if it is not there or not whole."""
    try:
        found = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError, OverflowError):  # truncated, or with a header that is none
        return None
    return found if found.ndim == 4 and found.shape[:2] == (count, channels) and found.dtype == np.uint8 else None


def _fingerprint(dataset: Dataset, resolution: int | None, channels: int) -> str:
    """Of the images of a data set, whose image column is not decoded; it changes when a file that they are in does."""
    digest = hashlib.sha256(f"{dataset._fingerprint} {resolution} {channels}".encode())
    for item in dataset["image"]:
        if item and item.get("bytes") is None and item.get("path") and os.path.exists(item["path"]):
            found = os.stat(item["path"])
            digest.update(f"{item['path']} {found.st_size} {found.st_mtime_ns}".encode())
    return digest.hexdigest()[:32]


__all__ = ["MIN_IMAGES", "ContextImages"]
