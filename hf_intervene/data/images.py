"""`ContextImages`: images from several contexts as one uint8 tensor, in memory or on disk, checked
once, so that a step needs no per-sample Python."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from datasets import Image as ImageFeature

from ..contexts import (
    OBS,
    Context,
    context_name,
    named_concepts,
    parse_context,
    parse_interventions,
    validate_concepts,
)
from .decoding import decode, in_memory, on_disk
from .identity import SPLITS, fingerprints, places
from .mapped import MappedFile


logger = logging.getLogger(__name__)
MIN_IMAGES = 8  # below this a context can neither be learnt nor split


@dataclass
class ContextImages:
    """
    Args:
        stored: images, uint8, (M, C, H, W); a part of a set shares them with the other parts.
        context_ids: context of each image, int64, (N,).
        contexts: canonical names of the contexts; `contexts[context_ids[n]]` is that of image n.
        concepts: names of the concepts.
        rows: where in `stored` each image is, int64, (N,), on the same device; `None`: there are no
            others.
        mapped: whether `stored` is a file that is read as it is used.
        marks: fingerprints of the stored images, int64 (M,), on the CPU (see `identity.py`);
            `None`: of their pixels.
        file: that of `stored`, if somebody may cut it meanwhile (see `mapped.py`): each reading of
            images looks at it, and raises an OSError of one sentence.
        prompts: the different prompts of the images; `None`: they have none.
        prompt_ids: which of them is that of each image, int64, (N,).
    """

    stored: torch.Tensor
    context_ids: torch.Tensor
    contexts: list[str]
    concepts: tuple[str, ...] = field(default_factory=tuple)
    rows: torch.Tensor | None = None
    mapped: bool = False
    marks: torch.Tensor | None = None
    file: MappedFile | None = None
    prompts: list[str] | None = None
    prompt_ids: torch.Tensor | None = None

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
        self._check()
        return self.stored if self.rows is None else self.stored.index_select(0, self.rows)

    def _check(self) -> None:
        if self.file is not None:
            self.file.check()

    def images(self, index: torch.Tensor) -> torch.Tensor:
        """Some of the images, uint8, (n, C, H, W), on the device where they are stored, by an index
        (n,) of integers.
        """
        self._check()
        index = index.to(self.stored.device)
        return self.stored.index_select(0, index if self.rows is None else self.rows[index])

    def on(self, device: torch.device | str) -> "ContextImages":
        """The images stored on a device; their contexts stay where they are."""
        self._check()
        rows = None if self.rows is None else self.rows.to(device)
        return replace(self, stored=self.stored.to(device), rows=rows, mapped=False, file=None)

    def _part(self, index: torch.Tensor, **changes: Any) -> "ContextImages":
        rows = index.to(self.stored.device)
        if self.prompt_ids is not None:
            changes["prompt_ids"] = self.prompt_ids[index]
        return replace(self, rows=rows if self.rows is None else self.rows[rows], **changes)

    def subset(self, index: torch.Tensor) -> "ContextImages":
        """Some of the images, by an index (n,) of integers; contexts keep their numbers."""
        return self._part(index, context_ids=self.context_ids[index])

    def targets(self, free_blocks: int = 0) -> torch.Tensor:
        """Targets of each context, (contexts, D): those of image n are row `context_ids[n]`."""
        return torch.cat(
            [
                parse_interventions(name, self.concepts, free_blocks=free_blocks)
                for name in self.contexts
            ]
        )

    def select(self, contexts: Sequence[Context]) -> "ContextImages":
        """The images of a list of contexts, in the order given, each in any form of
        `contexts.parse_context`.
        """
        if isinstance(contexts, str):
            raise ValueError(f"give a list of contexts, such as [{contexts!r}], not {contexts!r}.")
        names: list[str] = []
        for context in contexts:
            try:
                name: Any = context_name(context, self.concepts)
            except ValueError:
                name = context  # of unknown concepts: the data have no such context either
            if name not in self.contexts:
                raise ValueError(
                    f"there is no context {name!r}; the data have {', '.join(self.contexts)}."
                )
            if name in names:
                raise ValueError(f"context {name!r} is selected twice.")
            names.append(name)
        keep = [
            torch.nonzero(self.context_ids == self.contexts.index(name))[:, 0] for name in names
        ]
        ids = torch.cat([torch.full((len(rows),), number) for number, rows in enumerate(keep)])
        return self._part(torch.cat(keep), context_ids=ids, contexts=names)

    def fingerprints(self) -> torch.Tensor:
        """A fingerprint of each image, int64 (N,), on the CPU; see `identity.py`."""
        if self.marks is None:
            self.marks = fingerprints(self.stored)
        return self.marks if self.rows is None else self.marks[self.rows.cpu()]

    def fingerprints_by_context(self) -> dict[str, torch.Tensor]:
        """The fingerprints, int64 (n,), of the images of each context."""
        marks = self.fingerprints()
        return {
            name: marks[self.context_ids == number] for number, name in enumerate(self.contexts)
        }

    def split(
        self, validation_fraction: float, seed: int = 0, by: str = "image"
    ) -> tuple["ContextImages", "ContextImages"]:
        """Training and validation images, about the fraction taken from every context alike.

        Args:
            validation_fraction: share of the images that are held out, of each context two at
                least.
            seed: another one holds out other images.
            by: `"image"`: by the fingerprint of each image, so that images that are added move no
                held-out image into training (but where a context is so small that fewer than two
                would be held out), and copies of one image are on the same side; `"position"`:
                exactly the fraction, by the order of the images, as before version 3 of the
                settings.
        """
        if not 0 < validation_fraction < 1:
            raise ValueError(
                f"validation_fraction must lie between 0 and 1, not {validation_fraction}."
            )
        if by not in SPLITS:
            raise ValueError(f"data are split by {' or '.join(SPLITS)}, not by {by!r}.")
        rng = np.random.default_rng(seed)
        order = places(self.fingerprints().numpy(), seed) if by == "image" else None
        parts: tuple[list, list] = ([], [])
        for number in range(len(self.contexts)):
            rows = torch.nonzero(self.context_ids == number)[:, 0].numpy()
            if order is None:
                rows = rng.permutation(rows)
                held_out = min(max(1, round(validation_fraction * len(rows))), len(rows) - 1)
            else:
                rows = rows[np.argsort(order[rows], kind="stable")]
                least = 2 if len(rows) >= MIN_IMAGES else 1  # nothing can be measured on one image
                held_out = min(
                    max(least, int((order[rows] < validation_fraction).sum())), len(rows) - 1
                )
            parts[0].append(np.sort(rows[held_out:]))
            parts[1].append(np.sort(rows[:held_out]))
        training, validation = (
            self._part(rows, context_ids=self.context_ids[rows])
            for rows in (torch.from_numpy(np.concatenate(part)) for part in parts)
        )
        return training, validation

    def by_context(self) -> dict[str, np.ndarray]:
        """uint8 images (n, H, W, C) of each context."""
        rows = {
            name: torch.nonzero(self.context_ids == number)[:, 0]
            for number, name in enumerate(self.contexts)
        }
        return {
            name: self.images(index).permute(0, 2, 3, 1).cpu().numpy()
            for name, index in rows.items()
        }

    @classmethod
    def from_arrays(
        cls, images: Mapping[str, np.ndarray], concepts: Sequence[str]
    ) -> "ContextImages":
        """From arrays, without the way through files.

        Args:
            images: context (in any string form) to its images, uint8, (n, H, W, C) with one H, W
                and C for all.
            concepts: the concepts.

        Raises:
            ValueError: one sentence: arrays of another kind, images of several sizes, or what
                `from_dataset` says of contexts.
        """
        concepts = validate_concepts(concepts)
        if not images:
            raise ValueError(
                "there are no images: give arrays of at least the observational context and one for"
                " each concept."
            )
        names = [context_name(name, concepts) for name in images]
        arrays = [np.asarray(array) for array in images.values()]
        for name, array in zip(names, arrays):
            if names.count(name) > 1:
                raise ValueError(f"context {name!r} is given twice: join its arrays.")
            if array.ndim != 4 or array.dtype != np.uint8:
                raise ValueError(
                    f"images of context {name!r} must be uint8 (n, H, W, C), not {array.dtype}"
                    f" {array.shape}."
                )
            if array.shape[1:] != arrays[0].shape[1:]:
                raise ValueError(
                    f"images of context {name!r} have the shape {array.shape[1:]}, those of"
                    f" {names[0]!r} {arrays[0].shape[1:]}: bring all to one size."
                )
        pixels = torch.cat(
            [
                torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))
                for array in arrays
            ]
        )
        ids = torch.repeat_interleave(
            torch.arange(len(names)), torch.tensor([len(array) for array in arrays])
        )
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
            dataset: `image` holds images (PIL, a path, or an `Image` feature), `context` a name
                (`"obs"`, `"quad1"`, `"quad1+size"`), a list of concept names, or a class label;
                `prompt`, if there is one, the text of each image.
            concepts: the concepts; `None`: all that the contexts name, in alphabetical order.
                Images whose context names others are left out.
            resolution: centre-crop to a square and resize to this many pixels; `None`: all images
                must be square and of one size.
            channels: 3 (RGB) or 1 (grey).
            complete: whether to refuse contexts that nothing can be trained on (`metrics.check`
                says what they lack).
            cache_dir: folder to decode the images into, as uint8, once: they are found there the
                next time, and read by memory map, so that the set may be larger than memory.
                `None`: they are decoded into memory.

        Raises:
            OSError: one sentence: the cache cannot be written.
            ValueError: one sentence: a missing column, an image without a context, no observational
                context, a concept that no context names, or none by itself, an unreadable or 16-bit
                image, images of several sizes, too few in a context.
        """
        for column in ("image", "context"):
            if column not in dataset.column_names:
                raise ValueError(
                    f"the data set has no column {column!r}, only"
                    f" {', '.join(dataset.column_names)}: rename or add it."
                )
        if resolution is not None and resolution < 1:
            raise ValueError(f"resolution must be at least 1 pixel, not {resolution}.")
        raw = [
            _as_context(row, value, dataset.features["context"])
            for row, value in enumerate(dataset["context"])
        ]
        named = [set(named_concepts(value)) - {OBS} for value in raw]
        found = sorted(set().union(*named))
        if concepts is None:
            concepts = found
            if not concepts:
                raise ValueError(
                    "the data set has no context but the observational one: nothing was intervened"
                    " on, nothing can be learnt."
                )
        concepts = validate_concepts(concepts)
        if missing := [name for name in concepts if name not in found]:
            raise ValueError(
                f"no context names the concept {missing[0]!r}; the concepts of the data set are"
                f" {', '.join(found)}."
            )
        kept = [row for row, names_of_row in enumerate(named) if names_of_row <= set(concepts)]
        if len(kept) < len(raw):
            others = sorted(set().union(*named) - set(concepts))
            logger.warning(
                "%d of %d images are left out, whose contexts name other concepts (%s) than %s.",
                len(raw) - len(kept),
                len(raw),
                ", ".join(others),
                ", ".join(concepts),
            )
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
            except (
                TypeError,
                ValueError,
                NotImplementedError,
            ) as error:  # pyarrow's are of these kinds
                raise ValueError(
                    f"the image column holds {dataset.features['image']}, not images or paths of"
                    " images."
                ) from error
        dataset = dataset.cast_column("image", ImageFeature(decode=False))
        files = ", ".join(file["filename"] for file in dataset.cache_files)
        decoded = decode(dataset["image"], names, resolution, channels, files)
        file = None
        if cache_dir is None:
            pixels, marks = in_memory(decoded, len(names))
        else:
            pixels, marks, file = on_disk(decoded, dataset, resolution, channels, cache_dir)
        ids = torch.tensor([contexts.index(name) for name in names])
        prompts, prompt_ids = _prompts(dataset)
        mapped = cache_dir is not None
        images = cls(
            pixels,
            ids,
            contexts,
            concepts,
            mapped=mapped,
            marks=marks,
            file=file,
            prompts=prompts,
            prompt_ids=prompt_ids,
        )
        images._warn_of_copies()
        return images.checked() if complete else images

    def _warn_of_copies(self) -> None:
        """Say that the same image is in several contexts, as after a folder was copied."""
        pairs = np.unique(np.stack([self.fingerprints().numpy(), self.context_ids.numpy()]), axis=1)
        marks, counts = np.unique(pairs[0], return_counts=True)
        shared = np.isin(pairs[0], marks[counts > 1])
        if shared.any():
            logger.warning(
                "%d images are the same in several contexts (%s): look whether files were copied by"
                " mistake.",
                int((counts > 1).sum()),
                ", ".join(self.contexts[number] for number in np.unique(pairs[1][shared])),
            )

    def checked(self) -> "ContextImages":
        """The set itself, if something can be learnt from it.

        Raises:
            ValueError: one sentence: no observational context, a concept without a context of its
                own, too few images in a context.
        """
        if OBS not in self.contexts:
            raise ValueError(
                f"there are no observational images: add images whose context is {OBS!r} (the"
                f" contexts are {', '.join(self.contexts)})."
            )
        single = {name for name in self.contexts if len(parse_context(name, self.concepts)) == 1}
        for concept in self.concepts:
            if concept not in single:
                raise ValueError(
                    f"concept {concept!r} has no context in which it alone was intervened on: add"
                    " such images, or leave the concept out."
                )
        counts = torch.bincount(self.context_ids, minlength=len(self.contexts)).tolist()
        for name, count in zip(self.contexts, counts):
            if count < MIN_IMAGES:
                raise ValueError(
                    f"context {name!r} has {count} images; at least {MIN_IMAGES} are needed."
                )
        return self


def _prompts(dataset: Dataset) -> tuple[list[str] | None, torch.Tensor | None]:
    """The different prompts of a data set, and which of them each image has; of one without them,
    `None` twice.
    """
    if "prompt" not in dataset.column_names:
        return None, None
    texts = dataset["prompt"]
    for row, text in enumerate(texts):
        if text is not None and not isinstance(text, str):
            raise ValueError(
                f"the prompt of image {row} is {text!r}, which is no text: leave it empty, or write"
                " it as one."
            )
    texts = [text or "" for text in texts]
    prompts = sorted(set(texts))
    number = {text: n for n, text in enumerate(prompts)}
    return prompts, torch.tensor([number[text] for text in texts])


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
    # Not taken as observational: a gap in a table would quietly mix intervened images into that
    # context.
    kind = (
        "no context"
        if value is None or value == -1 or not str(value).strip()
        else f"the context {value!r}"
    )
    raise ValueError(
        f"image {row} has {kind}: give a name ({OBS!r} for observational images), a list of names"
        " or a class label."
    )


def _order(name: str, concepts: Sequence[str]) -> tuple:
    strengths = parse_context(name, concepts)
    positions = [concepts.index(concept) for concept in strengths]
    return len(positions), positions, list(strengths.values())


__all__ = ["MIN_IMAGES", "ContextImages"]
