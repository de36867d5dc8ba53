"""`ContextImages`: images from several contexts as one uint8 tensor, in memory or on disk.

The images are checked once, so that a training step needs no Python code for each sample.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..contexts import (
    OBS,
    Context,
    context_name,
    parse_context,
    parse_interventions,
    shown,
    validate_concepts,
)
from .columns import in_order, read_contexts, read_prompts, undecoded
from .decoding import decode, in_memory, on_disk
from .identity import SPLITS, between_copies, fingerprints, places
from .mapped import MappedFile
from .requests import whole_numbers


logger = logging.getLogger(__name__)
MIN_IMAGES = 8  # below this a context can neither be learnt nor split


@dataclass
class ContextImages:
    """Images and the context of each.

    Args:
        stored: images, uint8, (M, C, H, W), or clips, (M, C, T, H, W). Parts of a set share one
            such tensor.
        context_ids: context of each image, int64, (N,).
        contexts: canonical names of the contexts. Image n has context `contexts[context_ids[n]]`.
        concepts: names of the concepts.
        rows: position of each image in `stored`, int64, (N,), on the same device. `None`: `stored`
            holds these images and no others.
        mapped: whether `stored` is a file that is read when it is used.
        marks: fingerprints of the stored images, int64 (M,), on the CPU (see `identity.py`).
            `None`: they are computed from the pixels.
        file: the file that `stored` maps. Images are read from it and not through the map, so that
            a file that another program cuts raises an OSError (see `mapped.py`).
        prompts: the different prompts of the images; `None` if they have none.
        prompt_ids: number of the prompt of each image, int64, (N,).
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
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W), of clips (C, T, H, W)."""
        return tuple(self.stored.shape[1:])

    @property
    def pixels(self) -> torch.Tensor:
        """All images, uint8, (N, C, H, W), or clips, (N, C, T, H, W): a copy if `stored` holds
        other images too."""
        if self.file is not None:
            return self.images(torch.arange(len(self)))
        return self.stored if self.rows is None else self.stored.index_select(0, self.rows)

    def _read(self, rows: torch.Tensor) -> torch.Tensor:
        """Return some rows of `stored`, whose images may be those of other parts too."""
        if self.file is None:
            return self.stored.index_select(0, rows)
        return torch.from_numpy(self.file.rows(rows.numpy(), self.stored.shape, np.uint8))

    def images(self, index: torch.Tensor) -> torch.Tensor:
        """Return the images of an index, (n,) integers, as uint8 (n, C, H, W), on their device."""
        index = index.to(self.stored.device)
        return self._read(index if self.rows is None else self.rows[index])

    def on(self, device: torch.device | str) -> "ContextImages":
        """Return a copy whose images are on a device. `context_ids` stay on the CPU."""
        stored = self.stored if self.file is None else self._read(torch.arange(len(self.stored)))
        rows = None if self.rows is None else self.rows.to(device)
        return replace(self, stored=stored.to(device), rows=rows, mapped=False, file=None)

    def _part(self, index: torch.Tensor, **changes: Any) -> "ContextImages":
        rows = index.to(self.stored.device)
        if self.prompt_ids is not None:
            changes["prompt_ids"] = self.prompt_ids[index]
        return replace(self, rows=rows if self.rows is None else self.rows[rows], **changes)

    def subset(self, index: torch.Tensor) -> "ContextImages":
        """Return the images of an index, (n,) integers. Contexts keep their numbers."""
        return self._part(index, context_ids=self.context_ids[index])

    def targets(self, free_blocks: int = 0) -> torch.Tensor:
        """Return the targets of each context, (contexts, D). Image n has row `context_ids[n]`."""
        return torch.cat(
            [
                parse_interventions(name, self.concepts, free_blocks=free_blocks)
                for name in self.contexts
            ]
        )

    def select(self, contexts: Sequence[Context]) -> "ContextImages":
        """Return the images of some contexts.

        Args:
            contexts: a list of contexts, each in any form of `contexts.parse_context`.

        Returns:
            The images, whose contexts are numbered in the order of the list.

        Raises:
            ValueError: the list is empty, there is no such context, or it is named twice.
        """
        if isinstance(contexts, str):
            raise ValueError(f"give a list of contexts, such as [{contexts!r}], not {contexts!r}.")
        names: list[str] = []
        for context in contexts:
            try:
                name: Any = context_name(context, self.concepts)
            except ValueError:
                name = context  # a concept is unknown, so that the data have no such context
            if name not in self.contexts:
                raise ValueError(
                    f"there is no context {name!r}; the data have {', '.join(self.contexts)}."
                )
            if name in names:
                raise ValueError(f"context {name!r} is selected twice.")
            names.append(name)
        if not names:
            raise ValueError("no context is selected: name at least one.")
        keep = [
            torch.nonzero(self.context_ids == self.contexts.index(name))[:, 0] for name in names
        ]
        ids = torch.cat([torch.full((len(rows),), number) for number, rows in enumerate(keep)])
        return self._part(torch.cat(keep), context_ids=ids, contexts=names)

    def fingerprints(self) -> torch.Tensor:
        """Return the fingerprint of each image, int64 (N,), on the CPU; see `identity.py`."""
        if self.marks is None:
            blocks = torch.arange(len(self.stored), device=self.stored.device).split(1024)
            self.marks = fingerprints(self._read(rows) for rows in blocks)
        return self.marks if self.rows is None else self.marks[self.rows.cpu()]

    def fingerprints_by_context(self) -> dict[str, torch.Tensor]:
        """Return the fingerprints, int64 (n,), of the images of each context."""
        marks = self.fingerprints()
        return {
            name: marks[self.context_ids == number] for number, name in enumerate(self.contexts)
        }

    def split(
        self, validation_fraction: float, seed: int = 0, by: str = "image"
    ) -> tuple["ContextImages", "ContextImages"]:
        """Split into training and validation images, with the same fraction of every context.

        Args:
            validation_fraction: share of the images for validation. At least two of each context
                are used.
            seed: seed of the split.
            by: `"image"`: by the fingerprint of each image. Then new images do not move a
                validation image into training (unless fewer than two of a context would be held
                out), and copies of one image are on the same side (unless a context has nothing
                else, which a warning says). `"position"`: exactly the fraction, by the order of the
                images, as before version 3 of the settings.

        Raises:
            ValueError: the fraction is not between 0 and 1, or `by` is unknown.
        """
        is_number = isinstance(validation_fraction, (int, float))
        if not is_number or not 0 < validation_fraction < 1:
            raise ValueError(
                "validation_fraction must be a number between 0 and 1, not"
                f" {shown(validation_fraction)}."
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
                least = 2 if len(rows) >= MIN_IMAGES else 1  # one image is too few to measure on
                held_out = min(
                    max(least, int((order[rows] < validation_fraction).sum())), len(rows) - 1
                )
                apart = between_copies(order[rows], held_out)
                if apart is None and held_out:
                    logger.warning(
                        "all %d images of context %r are copies of one, so that what is held out is"
                        " trained on too: add other images.",
                        len(rows),
                        self.contexts[number],
                    )
                held_out = held_out if apart is None else apart
            parts[0].append(np.sort(rows[held_out:]))
            parts[1].append(np.sort(rows[:held_out]))
        training, validation = (
            self._part(rows, context_ids=self.context_ids[rows])
            for rows in (torch.from_numpy(np.concatenate(part)) for part in parts)
        )
        return training, validation

    def by_context(self) -> dict[str, np.ndarray]:
        """Return the uint8 images (n, H, W, C), or clips (n, T, H, W, C), of each context."""
        rows = {
            name: torch.nonzero(self.context_ids == number)[:, 0]
            for number, name in enumerate(self.contexts)
        }
        return {
            name: self.images(index).movedim(1, -1).cpu().numpy() for name, index in rows.items()
        }

    @classmethod
    def from_arrays(
        cls, images: Mapping[str, np.ndarray], concepts: Sequence[str]
    ) -> "ContextImages":
        """Make a set from arrays.

        Args:
            images: images of each context, by its name: uint8, (n, H, W, C), with the same H, W and
                C in all contexts.
            concepts: the concepts.

        Raises:
            ValueError: an array has another dtype or shape, or the contexts do not pass `checked`.
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
        frames: int | None = None,
    ) -> "ContextImages":
        """Decode and check a data set with the columns `image` and `context`.

        Args:
            dataset: `image` holds images (PIL, a path, or an `Image` feature), or clips: files with
                several frames, or lists of images. `context` holds names (`"obs"`, `"quad1"`,
                `"quad1+size"`), lists of concept names, or class labels. A column `prompt` is
                optional and holds the text of each image.
            concepts: the concepts. Images whose context names other concepts are left out. `None`
                means all concepts that the contexts name, in alphabetical order.
            resolution: crop images at the centre to a square and resize it to this many pixels a
                side. `None`: all images must be square and have one size.
            channels: 3 (RGB) or 1 (grey).
            complete: whether to apply `checked` (`metrics.check` describes what is missing).
            cache_dir: folder for the decoded images. They are decoded once, and the file is read by
                memory map, so that the set may be larger than memory. `None`: they are decoded into
                memory.
            frames: frames of each clip, which are taken evenly spaced from the first to the last;
                `None`: they are images.

        Raises:
            OSError: the cache cannot be written.
            ValueError: a column is missing, an image has no context or cannot be read or has 16
                bits, images have several sizes, or the contexts do not pass `checked`.
        """
        if resolution is not None and whole_numbers(resolution=resolution)["resolution"] < 1:
            raise ValueError(f"resolution must be at least 1 pixel, not {resolution}.")
        if frames is not None and whole_numbers(frames=frames)["frames"] < 1:
            raise ValueError(f"frames must be at least 1, not {frames}.")
        dataset, names, concepts = read_contexts(dataset, concepts)
        dataset = undecoded(dataset, frames is not None)
        files = ", ".join(file["filename"] for file in dataset.cache_files)
        decoded = decode(dataset["image"], names, resolution, channels, files, frames)
        file = None
        if cache_dir is None:
            pixels, marks = in_memory(decoded, len(names))
        else:
            pixels, marks, file = on_disk(decoded, dataset, resolution, channels, cache_dir, frames)
        contexts = in_order(names, concepts)
        ids = torch.tensor([contexts.index(name) for name in names])
        prompts, prompt_ids = read_prompts(dataset)
        images = cls(
            pixels,
            ids,
            contexts,
            concepts,
            mapped=cache_dir is not None,
            marks=marks,
            file=file,
            prompts=prompts,
            prompt_ids=prompt_ids,
        )
        images._warn_of_copies()
        return images.checked() if complete else images

    def _warn_of_copies(self) -> None:
        """Warn if the same image is in several contexts, as after a folder was copied."""
        pairs = np.unique(np.stack([self.fingerprints().numpy(), self.context_ids.numpy()]), axis=1)
        marks, counts = np.unique(pairs[0], return_counts=True)
        shared = np.isin(pairs[0], marks[counts > 1])
        if shared.any():
            logger.warning(
                "%d images are the same in several contexts (%s): check whether files were copied"
                " by mistake.",
                int((counts > 1).sum()),
                ", ".join(self.contexts[number] for number in np.unique(pairs[1][shared])),
            )

    def checked(self) -> "ContextImages":
        """Return the set itself, if a model can be trained on it.

        Raises:
            ValueError: there is no observational context, a concept has no context of its own, or a
                context has fewer than `MIN_IMAGES` images.
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


__all__ = ["MIN_IMAGES", "ContextImages"]
