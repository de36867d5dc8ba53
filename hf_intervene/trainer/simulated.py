"""The data sets that `--dataset` knows by name: what training, pretraining and evaluation draw of
each, never the same images.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..contexts import OBS, Context
from ..data import ContextImages, avatars, ident3d, load_digits, mnist, quad
from ..data.digits import SIDE, Digits
from ..data.mapped import MappedFile
from ..data.requests import split_rows, whole_numbers
from .sections import DataSettings


# Training and validation use the seeds from 0 on.
PRETRAINING_SEED = 500_000
HELD_OUT_SEED = 1_000_000

Images = dict[str, np.ndarray]  # uint8 (n, H, W, C) by context


@dataclass(frozen=True)
class Simulated:
    """
    Args:
        resolution: side of the images in pixels.
        channels: of the images.
        variant, mnist_digits: the settings of this name of `TrainArguments`.

    Attributes:
        concepts: the concepts; each has a training context of its own.
        contexts: the training contexts.
        held_out: contexts that no training image comes from.
    """

    resolution: int
    channels: int
    variant: str = DataSettings.variant
    mnist_digits: str = DataSettings.mnist_digits

    concepts: ClassVar[tuple[str, ...]] = ()
    contexts: ClassVar[tuple[str, ...]] = ()
    held_out: ClassVar[tuple[str, ...]] = ()

    def training(
        self,
        images: int,
        validation_images: int,
        validation_fraction: float,
        seed: int,
        contexts: Sequence[Context] | None = None,
    ) -> tuple[Images, Images]:
        """So many training and validation images of each training context, or of some of them: the
        same images.
        """
        raise NotImplementedError

    def observational(self, images: int) -> np.ndarray:
        """Images (n, H, W, C) for the pretraining of a base."""
        raise NotImplementedError

    def held_out_images(
        self, images: int, seed: int, contexts: Sequence[Context] | None = None
    ) -> tuple[Images, Images]:
        """So many images of each context, pairs included, or of some of them, and as many others."""  # noqa: E501
        raise NotImplementedError

    def labelled(self, images: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Training images (n, H, W, C), at most so many of each context, and which of `concepts`
        each shows, bool (n, concepts); `None` where attributes are not known or are not a matter of
        yes and no."""
        return None

    def twins(self, images: int, seed: int) -> Images | None:
        """So many held-out individuals in every context, row by row the same; `None` where there
        are none.
        """
        return None


class Drawn(Simulated):
    """Fresh draws, with seeds of their own; always in colour."""

    source: ModuleType  # of `hf_intervene.data`

    def _draw(self, contexts: Sequence[Context], images: int, seed: int) -> Images:
        return self.source.images_by_context(contexts, images, self.resolution, self.variant, seed)

    def training(self, images, validation_images, validation_fraction, seed, contexts=None):
        contexts = self.contexts if contexts is None else contexts
        return tuple(
            self._draw(contexts, n, 2 * seed + k) for k, n in enumerate((images, validation_images))
        )

    def observational(self, images):
        return self._draw((OBS,), images, PRETRAINING_SEED)[OBS]

    def held_out_images(self, images, seed, contexts=None):
        contexts = self.contexts + self.held_out if contexts is None else contexts
        return tuple(self._draw(contexts, images, HELD_OUT_SEED + 2 * seed + k) for k in (0, 1))


class Quad(Drawn):
    source = quad
    concepts, contexts, held_out = quad.CONCEPTS, quad.TRAIN_CONTEXTS, quad.HELD_OUT

    def twins(self, images, seed):
        return quad.twins(
            self.contexts + self.held_out,
            images,
            self.resolution,
            self.variant,
            HELD_OUT_SEED + 2 * seed,
        )


class Ident3d(Drawn):
    source = ident3d
    concepts, contexts, held_out = ident3d.CONCEPTS, ident3d.TRAIN_CONTEXTS, ident3d.HELD_OUT


@dataclass(frozen=True)
class Mnist(Simulated):
    """Training images of MNIST's training digits, `validation_fraction` of them for validation;
    held-out images of its test digits, no digit twice in a context: of few digits there are fewer
    images than were asked for. Drawn into the cache of `datasets` and found there by the next run:
    drawing what a model is measured on takes longer than many a training."""

    concepts, contexts, held_out = mnist.CONCEPTS, mnist.TRAIN_CONTEXTS, mnist.HELD_OUT

    def __post_init__(self):
        if self.resolution != SIDE:
            raise ValueError(
                f"mnist images have {SIDE} x {SIDE} pixels: give the resolution {SIDE}, not"
                f" {self.resolution}."
            )
        if self.channels not in (1, 3):
            raise ValueError(
                "mnist images have 1 channel (grey), or 3 for a base that takes colours, not"
                f" {self.channels}."
            )

    def _draw(self, contexts: Sequence[Context], images: int, digits: Digits, seed: int) -> Images:
        data = mnist.load_mnist(contexts, images, digits, seed=seed)
        pixels = np.stack([np.asarray(image) for image in data["image"]])[..., None].repeat(
            self.channels, -1
        )
        return dict(zip(data["context"][::images], pixels.reshape(-1, images, *pixels.shape[1:])))

    def training(self, images, validation_images, validation_fraction, seed, contexts=None):
        contexts = self.contexts if contexts is None else contexts
        parts = load_digits(self.mnist_digits, "train").split(validation_fraction, seed)
        sizes = images, validation_images
        return tuple(
            self._draw(contexts, n, part, 2 * seed + k)
            for k, (n, part) in enumerate(zip(sizes, parts))
        )

    def observational(self, images):
        return self._draw(
            (OBS,), images, load_digits(self.mnist_digits, "train"), PRETRAINING_SEED
        )[OBS]

    def held_out_images(self, images, seed, contexts=None):
        contexts = self.contexts + self.held_out if contexts is None else contexts
        digits = load_digits(self.mnist_digits, "test")
        half = min(images, len(digits) // 2)
        drawn = self._draw(contexts, 2 * half, digits, HELD_OUT_SEED + seed)
        return {name: x[:half] for name, x in drawn.items()}, {
            name: x[half:] for name, x in drawn.items()
        }


@dataclass(frozen=True)
class Avatars(Simulated):
    """Faces that come with the package; always in colour. Training images are of the persons of the
    split `"train"`, of whom `validation_fraction` are for validation. Held-out images are of the
    persons of `"holdout"`, the same ones in every context of a half: image i of `obs` and image i
    of another context of that half are an image and the true answer of its edit. There are fewer
    images than were asked for where there are fewer persons."""

    concepts, contexts, held_out = avatars.CONCEPTS, avatars.TRAIN_CONTEXTS, avatars.HELD_OUT

    def _first(
        self, persons: np.ndarray, images: int, contexts: Sequence[Context], split: str
    ) -> Images:
        """Images of the first so many of the persons."""
        whole_numbers(images_per_context=images)
        return avatars.images_of(persons[:images], contexts, self.resolution, split)

    def training(self, images, validation_images, validation_fraction, seed, contexts=None):
        contexts = self.contexts if contexts is None else contexts
        _, persons = avatars.available("train")
        training, validation = split_rows(persons, validation_fraction, seed, "persons")
        return (
            self._first(training, images, contexts, "train"),
            self._first(validation, validation_images, contexts, "train"),
        )

    def observational(self, images):
        _, persons = avatars.available("train")
        return self._first(np.arange(persons), images, (OBS,), "train")[OBS]

    def held_out_images(self, images, seed, contexts=None):
        contexts = self.contexts + self.held_out if contexts is None else contexts
        _, number = avatars.available("holdout")
        persons = np.random.default_rng(seed).permutation(number)
        halves = persons[: number // 2], persons[number // 2 :]
        return tuple(self._first(half, images, contexts, "holdout") for half in halves)

    def labelled(self, images):
        images = min(images, avatars.available("train")[1])
        drawn = avatars.images_by_context(self.contexts, images, self.resolution, "train")
        attributes = avatars.attributes_by_context(self.contexts, images, "train")
        labels = [avatars.concepts_present(attributes[name]) for name in drawn]
        return np.concatenate([*drawn.values()]), np.concatenate(labels)

    def twins(self, images, seed):
        return self.held_out_images(images, seed)[0]


SIMULATED: dict[str, type[Simulated]] = {
    "quad": Quad,
    "mnist": Mnist,
    "ident3d": Ident3d,
    "avatars": Avatars,
}


def draw_together(
    simulated: Simulated, sizes: tuple[int, int, float, int], folder: Path, accelerator: Accelerator
) -> tuple[ContextImages, ContextImages]:
    """Training and validation images, of which every process draws some contexts; all read them
    from files, by memory map.

    Args:
        simulated: the data.
        sizes: the arguments of its `training`.
        folder: of the files; on a disk that all processes share.
        accelerator: its processes call this together.

    Raises:
        OSError: the files cannot be written.
    """
    own = simulated.contexts[accelerator.process_index :: accelerator.num_processes]
    train, validation = simulated.training(*sizes, contexts=own) if own else ({}, {})
    return (
        _joined(train, folder / "train.bin", simulated, accelerator),
        _joined(validation, folder / "validation.bin", simulated, accelerator),
    )


def _joined(
    own: Images, path: Path, simulated: Simulated, accelerator: Accelerator
) -> ContextImages:
    shapes: dict[str, tuple[int, ...]] = {}
    for drawn in gather_object([{name: x.shape for name, x in own.items()}]):
        shapes |= drawn
    counts = [shapes[name][0] for name in simulated.contexts]
    height, width, channels = shapes[simulated.contexts[0]][1:]
    if accelerator.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    accelerator.wait_for_everyone()
    with open(path, "r+b") as file:  # and not a memory map: a full disk would kill the process
        for name, images in own.items():
            file.seek(sum(counts[: simulated.contexts.index(name)]) * height * width * channels)
            file.write(np.ascontiguousarray(images.transpose(0, 3, 1, 2)).data)
    accelerator.wait_for_everyone()
    stored = torch.from_numpy(
        np.memmap(path, np.uint8, "c", shape=(sum(counts), channels, height, width))
    )
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    mapped = MappedFile(path, "do not change the folder of a run; go on with --resume auto")
    return ContextImages(
        stored, ids, list(simulated.contexts), simulated.concepts, mapped=True, file=mapped
    ).checked()


class OnDemand(Mapping):
    """What a function gives for some names, each when it is first asked for."""

    def __init__(self, names: Sequence[str], function: Callable[[str], np.ndarray]):
        self._names, self._function = tuple(names), function

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        return self._function(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def held_out_on_demand(
    simulated: Simulated, images: int, seed: int, names: Sequence[str]
) -> tuple[OnDemand, OnDemand]:
    """`held_out_images` of these contexts; a process draws only those that it reads."""

    @cache
    def draw(name: str) -> tuple[np.ndarray, np.ndarray]:
        half, other = simulated.held_out_images(images, seed, (name,))
        return half[name], other[name]

    return OnDemand(names, lambda name: draw(name)[0]), OnDemand(names, lambda name: draw(name)[1])
