"""Presence: the share of images that show the wanted concepts, by a `Detector`.

The *floor* of a share is the same share of real images of the context: a detector misses some
concepts in real images too. If concepts are independent, composition is perfect when the share of
images with both concepts of a pair is the product of the shares of the single concepts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .detector import Share, proportion


CLEAR = 0.9  # a concept is clear from this share of the rate in real images on
_DRIFT = 0.02  # the verdict mentions a larger excess in obs over real images, beyond the intervals
_RESAMPLES = 2000


@dataclass
class Presence:
    """Result of `presence_shares`. A concept is usable if the detector is reliable for it.

    Args:
        all_wanted: share of the images with every wanted concept, whatever else they show. `None`
            if one of them is not usable, or no concept is wanted.
        exact: share of the images with every wanted concept and no other usable one. `None` if a
            wanted concept is not usable.
        unwanted: share of the images with at least one usable concept that is not wanted. `None` if
            there is no such concept.
        rates: for each usable concept, the share of the images with it.
        images: number of images.
    """

    all_wanted: Share | None
    exact: Share | None
    unwanted: Share | None
    rates: dict[str, Share]
    images: int

    def to_dict(self) -> dict:
        """As JSON holds it."""
        shares = {name: getattr(self, name) for name in ("all_wanted", "exact", "unwanted")}
        found = {name: None if share is None else share.to_dict() for name, share in shares.items()}
        return found | {
            "rates": {name: share.to_dict() for name, share in self.rates.items()},
            "images": self.images,
        }


def presence_shares(
    found: np.ndarray, wanted: Sequence[str], concepts: Sequence[str], usable: np.ndarray
) -> Presence:
    """Compute the shares of the images of one context.

    Args:
        found: which concepts were found in each image, bool (n, K), from `Detector.present`.
        wanted: the wanted concepts.
        concepts: names of the K columns.
        usable: for which concepts the detector is reliable, bool (K,), from `Detector.usable`.

    Raises:
        ValueError: a wanted concept is not in `concepts`, or a shape is wrong.
    """
    found, usable = np.asarray(found, dtype=bool), np.asarray(usable, dtype=bool)
    if found.ndim != 2 or found.shape[1] != len(concepts) or usable.shape != (len(concepts),):
        raise ValueError(
            f"found must have shape (n, {len(concepts)}) and usable ({len(concepts)},)."
        )
    unknown = [name for name in wanted if name not in concepts]
    if unknown:
        raise ValueError(
            f"the detector knows no concept {unknown[0]!r}; it knows {', '.join(concepts)}."
        )
    asked = np.isin(concepts, list(wanted))
    told = bool(usable[asked].all())
    all_wanted = np.asarray(found[:, asked].all(1))
    others = np.asarray(found[:, ~asked & usable].any(1))
    return Presence(
        proportion(all_wanted) if told and asked.any() else None,
        proportion(all_wanted & ~others) if told else None,
        proportion(others) if (~asked & usable).any() else None,
        {name: proportion(found[:, k]) for k, name in enumerate(concepts) if usable[k]},
        len(found),
    )


@dataclass
class CompositionRatio:
    """Result of `composition_ratio`.

    Args:
        product: the product of the rates of the single concepts.
        ratio: share of images with all concepts, divided by the product; 1 is perfect composition
            of independent concepts.
        interval: 95 % interval of the ratio.
    """

    product: float
    ratio: float
    interval: tuple[float, float]


def composition_ratio(
    together: Share, images: int, singles: Sequence[tuple[Share, int]], seed: int = 0
) -> CompositionRatio | None:
    """Compare the rate of several concepts together with the product of their single rates.

    Args:
        together: share of the images of a composition that show all its concepts.
        images: the number of these images.
        singles: for each concept the share of the images of its own context that show it, and the
            number of these images.
        seed: seed of the bootstrap.

    Returns:
        The ratio with a percentile bootstrap interval, or `None` if the product is 0. The number of
        hits in a resample of n images is binomial, so that resamples are drawn from a binomial
        distribution.
    """
    product = math.prod(share.value for share, _ in singles)
    if not product > 0:
        return None
    rng = np.random.default_rng(seed)
    drawn, *others = (
        rng.binomial(n, s.value, _RESAMPLES) / n for s, n in [(together, images), *singles]
    )
    below = np.prod(others, axis=0)
    ratios = drawn / np.where(below > 0, below, np.nan)
    low, high = np.nanpercentile(ratios, [2.5, 97.5])
    return CompositionRatio(product, together.value / product, (float(low), float(high)))


def verdict(generated: Share, real: Share, generated_obs: Share, real_obs: Share) -> str:
    """Describe in words how well a model shows one concept.

    Args:
        generated: share of the samples of its context in which it is found.
        real: share of the real images of its context in which it is found.
        generated_obs: share of the observational samples.
        real_obs: share of the real observational images.

    Returns:
        "not to be told from obs" if the share in the samples of its context is not above that in
        observational images, real or sampled, beyond the intervals; "clear" from 0.9 of the real
        share on; "partly (49 % of 96 %)" between. If observational samples show the concept more
        often than real ones, beyond the intervals, the text says so too.
    """
    obs = max(generated_obs, real_obs, key=lambda share: share.value)
    if generated.interval[0] <= obs.interval[1]:
        words = "not to be told from obs"
    elif generated.value >= CLEAR * real.value:
        words = "clear"
    else:
        words = f"partly ({generated.value:.0%} of {real.value:.0%})"
    if generated_obs.interval[0] > real_obs.interval[1] + _DRIFT:
        words += (
            f", but found in {generated_obs.value:.0%} of obs samples (real ones:"
            f" {real_obs.value:.0%})"
        )
    return words.replace("%", " %")
