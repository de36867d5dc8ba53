"""The data sets that `--dataset` knows by name: what training, pretraining and evaluation draw of each, never the same images."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

import numpy as np

from hf_intervene.contexts import OBS, Context
from hf_intervene.data import ident3d, load_digits, mnist, quad
from hf_intervene.data.digits import SIDE, Digits
from hf_intervene.training.arguments import TrainArguments


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
        held_out: contexts that no training image comes from.
    """

    resolution: int
    channels: int
    variant: str = TrainArguments.variant
    mnist_digits: str = TrainArguments.mnist_digits

    concepts = held_out = ()

    def training(self, images: int, validation_images: int, validation_fraction: float, seed: int) -> tuple[Images, Images]:
        """So many training and validation images of each training context."""
        raise NotImplementedError

    def observational(self, images: int) -> np.ndarray:
        """Images (n, H, W, C) for the pretraining of a base."""
        raise NotImplementedError

    def held_out_images(self, images: int, seed: int) -> tuple[Images, Images]:
        """So many images of each context, pairs included, and as many others."""
        raise NotImplementedError


@dataclass(frozen=True)
class Drawn(Simulated):
    """Fresh draws, with seeds of their own; always in colour."""

    source: ClassVar[ModuleType]  # of `hf_intervene.data`

    def _draw(self, contexts: Sequence[Context], images: int, seed: int) -> Images:
        return self.source.images_by_context(contexts, images, self.resolution, self.variant, seed)

    def training(self, images, validation_images, validation_fraction, seed):
        return tuple(self._draw(self.source.TRAIN_CONTEXTS, n, 2 * seed + k) for k, n in enumerate((images, validation_images)))

    def observational(self, images):
        return self._draw((OBS,), images, PRETRAINING_SEED)[OBS]

    def held_out_images(self, images, seed):
        contexts = self.source.TRAIN_CONTEXTS + self.source.HELD_OUT
        return tuple(self._draw(contexts, images, HELD_OUT_SEED + 2 * seed + k) for k in (0, 1))


class Quad(Drawn):
    source, concepts, held_out = quad, quad.CONCEPTS, quad.HELD_OUT


class Ident3d(Drawn):
    source, concepts, held_out = ident3d, ident3d.CONCEPTS, ident3d.HELD_OUT


@dataclass(frozen=True)
class Mnist(Simulated):
    """Training images of MNIST's training digits, `validation_fraction` of them for validation; held-out images of its test digits, no
    digit twice in a context: of few digits there are fewer images than were asked for. Drawn into the cache of `datasets` and found there by
    the next run: drawing what a model is measured on takes longer than many a training."""

    concepts, held_out = mnist.CONCEPTS, mnist.HELD_OUT

    def __post_init__(self):
        if self.resolution != SIDE:
            raise ValueError(f"mnist images have {SIDE} x {SIDE} pixels: give the resolution {SIDE}, not {self.resolution}.")
        if self.channels not in (1, 3):
            raise ValueError(f"mnist images have 1 channel (grey), or 3 for a base that takes colours, not {self.channels}.")

    def _draw(self, contexts: Sequence[Context], images: int, digits: Digits, seed: int) -> Images:
        data = mnist.load_mnist(contexts, images, digits, seed=seed)
        pixels = np.stack([np.asarray(image) for image in data["image"]])[..., None].repeat(self.channels, -1)
        return dict(zip(data["context"][::images], pixels.reshape(-1, images, *pixels.shape[1:])))

    def training(self, images, validation_images, validation_fraction, seed):
        parts = load_digits(self.mnist_digits, "train").split(validation_fraction, seed)
        sizes = images, validation_images
        return tuple(self._draw(mnist.TRAIN_CONTEXTS, n, part, 2 * seed + k) for k, (n, part) in enumerate(zip(sizes, parts)))

    def observational(self, images):
        return self._draw((OBS,), images, load_digits(self.mnist_digits, "train"), PRETRAINING_SEED)[OBS]

    def held_out_images(self, images, seed):
        digits = load_digits(self.mnist_digits, "test")
        half = min(images, len(digits) // 2)
        drawn = self._draw(mnist.TRAIN_CONTEXTS + mnist.HELD_OUT, 2 * half, digits, HELD_OUT_SEED + seed)
        return {name: x[:half] for name, x in drawn.items()}, {name: x[half:] for name, x in drawn.items()}


SIMULATED: dict[str, type[Simulated]] = {"quad": Quad, "mnist": Mnist, "ident3d": Ident3d}
