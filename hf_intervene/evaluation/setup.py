"""What evaluate.py needs before it measures the content of images: a detector of concepts, and
twins.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..data import ContextImages, load_contexts
from ..metrics.detector import train_context_detector, train_detector
from ..trainer.sections import DataSettings
from ..trainer.simulated import SIMULATED


# Of each context, unless said otherwise: by default the images of the training, which may be in a
# cache.
DETECTOR_IMAGES, TWIN_IMAGES = DataSettings.images_per_context, 256


def content_options(
    dataset: str,
    concepts: Sequence[str],
    resolution: int,
    channels: int,
    variant: str,
    mnist_digits: str,
    split: tuple[float, int, str] | None,
    other_real: Mapping[str, np.ndarray],
    seed: int,
    detector_images: int = DETECTOR_IMAGES,
    twin_images: int | None = None,
    reading: Mapping[str, Any] | None = None,
) -> dict:
    """The arguments of `evaluate` for the content of images: a detector, trained here, twins, and
    the variant of quad.

    The detector learns on training images: with their true attributes where the data set knows
    them, otherwise "do k or obs" from the contexts. Of own data that training did not see
    (`split=None`) it learns on `other_real`, which the presence in real images does not use.

    Args:
        dataset, concepts, resolution, channels, variant, mnist_digits, split: see
            `held_out_images`.
        other_real: what that returned second.
        seed: of the detector.
        detector_images: of each context, at most; 0: no detector.
        twin_images: of each context; `None`: some where the data set has twins; 0: none.
        reading: see `held_out_images`.

    Raises:
        ValueError: one sentence: twins asked of data that have none.
    """
    simulated = (
        SIMULATED[dataset](resolution, channels, variant, mnist_digits)
        if dataset in SIMULATED
        else None
    )
    twins = None
    if twin_images != 0:
        twins = None if simulated is None else simulated.twins(twin_images or TWIN_IMAGES, seed)
        if twins is None and twin_images:
            raise ValueError(
                f"{dataset} has no twins, the same individuals in several contexts, so edits have "
                "no true answer: leave --twins out."
            )
    detector, images = None, other_real
    if detector_images:
        labelled = None if simulated is None else simulated.labelled(detector_images)
        if simulated is not None and labelled is not None:
            unknown = [name for name in concepts if name not in simulated.concepts]
            if unknown:
                raise ValueError(
                    f"{dataset} has no concept {unknown[0]!r}; it has"
                    f" {', '.join(simulated.concepts)}."
                )
            columns = [simulated.concepts.index(name) for name in concepts]  # in the model's order
            pixels, labels = labelled
            detector = train_detector(pixels, labels[:, columns], concepts, seed)
        else:
            if simulated is not None:
                images = simulated.training(
                    detector_images, 1, DataSettings.validation_fraction, 0
                )[0]
            elif split is not None:
                data = ContextImages.from_dataset(
                    load_contexts(dataset, **reading or {}), concepts, resolution, channels
                )
                images = data.split(*split)[0].by_context()
            detector = train_context_detector(
                {name: x[:detector_images] for name, x in images.items()}, concepts, seed
            )
    return {
        "detector": detector,
        "twins": twins,
        "quad_variant": variant if dataset == "quad" else None,
    }
