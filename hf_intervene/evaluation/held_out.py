"""The held-out images that a model is measured on, and how they are read: as in its training, where
nothing else is said."""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import pipeline
from ..data import ContextImages, load_contexts
from ..data.digits import BUNDLED
from ..logging import get_logger
from ..model import InterventionModel
from ..options import READING
from ..trainer.distributed import process_state
from ..trainer.earlier import earlier_defaults
from ..trainer.settings import TrainArguments, check_reading
from ..trainer.simulated import SIMULATED, held_out_on_demand
from ..yaml_files import read_settings


logger = get_logger(__name__)

# a side of a context: the floor of quad, 32x32, is 0.1 there; a base without a head has 0.15 over
# many
FEW_IMAGES = 100


def held_out_images(
    dataset: str,
    concepts: Sequence[str],
    images: int,
    seed: int,
    resolution: int,
    channels: int,
    variant: str,
    split: tuple[float, int, str] | None = None,
    mnist_digits: str = BUNDLED,
    trained: Mapping[str, torch.Tensor] | None = None,
    reading: Mapping[str, Any] | None = None,
    singles: bool = False,
) -> tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]:
    """Held-out real images of each context, and as many further ones for the floor.

    quad, ident3d: fresh draws, held-out pairs included. mnist: so too, of test digits, each at most
    once in a context. avatars: two halves of the held-out persons, the same persons in every
    context of a half, in the same order. Own data: each context's images in two halves (at most
    `images` each), of those only that training held out, by the fraction, seed and way of its
    `split`; `None`: all, of data that training did not see. Images whose fingerprints are among
    those of `trained` are left out in any case.

    Warns of own data with few images of a context, and of images that are left out: those trained
    on, and those of concepts that the model does not have. `reading`: how own data are read,
    arguments of `load_contexts`. `singles`: only `obs` and single concepts, so that a choice of
    settings sees no combination.

    Raises:
        ValueError: own data that lack a concept, or a context with fewer than two images.
    """
    if dataset in SIMULATED:
        simulated = SIMULATED[dataset](resolution, channels, variant, mnist_digits)
        names = simulated.contexts if singles else simulated.contexts + simulated.held_out
        if process_state().num_processes > 1:
            return held_out_on_demand(simulated, images, seed, names)
        return simulated.held_out_images(images, seed, names)
    # The model's concepts, as in training: the split depends on the order of the contexts, and it
    # may know but some of the data's.
    data = ContextImages.from_dataset(
        load_contexts(dataset, **reading or {}), concepts, resolution, channels
    )
    data = _unseen(data if split is None else data.split(*split)[1], trained or {})
    by_context = {name: x for name, x in data.by_context().items() if not (singles and "+" in name)}
    few = [name for name, a in by_context.items() if len(a) < 2]
    if few:
        raise ValueError(
            f"two held-out images of {', '.join(few)} are needed at least: hold out more"
            " (validation_fraction), or give other images than those trained on (--dataset,"
            " --all)."
        )
    smallest = min(by_context, key=lambda name: len(by_context[name]))
    side = min(len(by_context[smallest]) // 2, images)
    if side < FEW_IMAGES and process_state().is_main_process:
        logger.warning(
            "%d held-out images of %s a side: the floor of so few hides most of what models differ"
            " in; use more (--images), or hold out more (validation_fraction).",
            side,
            smallest,
        )
    half, other = (
        {name: a[k::2][: min(images, len(a) // 2)] for name, a in by_context.items()}
        for k in (0, 1)
    )
    return half, other


def _unseen(data: ContextImages, trained: Mapping[str, torch.Tensor]) -> ContextImages:
    """The images that a model was not trained on, by their fingerprints."""
    if not trained:
        return data
    unseen = ~torch.isin(data.fingerprints(), torch.cat(list(trained.values())))
    if bool(unseen.all()):
        return data
    names = [
        name
        for number, name in enumerate(data.contexts)
        if bool((~unseen & (data.context_ids == number)).any())
    ]
    logger.warning(
        "%d images of %s were trained on and are left out: they are copies of training images, or"
        " the data or their split are not those of training time.",
        int((~unseen).sum()),
        ", ".join(names),
    )
    return data.subset(torch.nonzero(unseen)[:, 0])


def training_split(folder: str) -> tuple[float, int, str]:
    """The fraction, the seed and the way by which the training of a model held images out, as
    `training_arguments.yaml` beside it says.
    """
    saved = trained_with(folder)
    return tuple(saved[name] for name in ("validation_fraction", "data_seed", "split_by"))


def trained_with(folder: str) -> dict:
    """The settings of the run that a model is of, as far as they are beside it; otherwise the
    defaults.
    """
    saved = read_settings(folder)
    if saved:
        saved = earlier_defaults(saved.get("settings_version", 0), folder) | saved
    return TrainArguments().flat() | saved


def reading_of(arguments: argparse.Namespace) -> tuple[dict[str, str], bool]:
    """How own data are to be read: as options say, and otherwise as in training; and whether they
    are another split than the training's."""
    saved = trained_with(arguments.model)
    trained = {name: saved[name] for name in READING}
    given = {
        name: getattr(arguments, name) for name in READING if getattr(arguments, name) is not None
    }
    if arguments.dataset in SIMULATED:
        check_reading(arguments.dataset, given)
        return {}, False
    reading = trained | given
    return reading, reading["split"] != trained["split"]


def load_model(folder: str | os.PathLike) -> InterventionModel:
    """The model in a folder; see `hf_intervene.pipeline.load_model`."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"there is no model folder {folder}.")
    return pipeline.load_model(folder)
