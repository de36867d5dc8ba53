"""Presence: the shares of images in which what was asked for is there, by a `Detector`, and a
verdict in words.

Beside every share stands the same share of real images of the context, its *floor*: a detector
misses some concepts in real images too. Where concepts are independent, composition is perfect if a
pair is there as often as the product of its single rates says.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .detector import Share, proportion


CLEAR = 0.9  # of the rate in real images
_DRIFT = 0.02  # more than this above the real share, beyond both intervals, is worth a word
_RESAMPLES = 2000


@dataclass
class Presence:
    """
    Args:
        all_wanted: share of the images with every wanted concept, the others ignored; `None` where
            one of them cannot be told, or none is wanted.
        exact: share with every wanted concept and no other, those that cannot be told ignored;
            `None` where a wanted one cannot be.
        unwanted: share with at least one concept that was not asked for; `None` if none can be
            told.
        rates: by concept that can be told, the share of the images with it.
        images: how many.
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
    """Shares of the images of one context.

    Args:
        found: which concepts were found in each image, bool (n, K), as `Detector.present` says.
        wanted: the concepts that were asked for.
        concepts: names of the K columns.
        usable: which concepts can be told on real images, bool (K,), as `Detector.usable` says.

    Raises:
        ValueError: a wanted concept is not among `concepts`, or `found` does not fit.
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
    """
    Args:
        product: the product of the rates of the single concepts.
        ratio: share of images with all of them over the product; 1 is perfect composition of
            independent concepts.
        interval: 95 % interval of the ratio.
    """

    product: float
    ratio: float
    interval: tuple[float, float]


def composition_ratio(
    together: Share, images: int, singles: Sequence[tuple[Share, int]], seed: int = 0
) -> CompositionRatio | None:
    """How often concepts are there together, over the product of how often each is there alone.

    Args:
        together: share of the images of a composition with all its concepts.
        images: how many images that is a share of.
        singles: for each of the concepts its share of the images of its own context, and their
            number.
        seed: of the bootstrap.

    Returns:
        The ratio with a percentile bootstrap interval; `None` if the product is 0. The number of
        hits in a resample of n images is binomial, so the resamples are drawn as that.
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
    """What became of one concept, in words.

    Args:
        generated: share of the samples of its context in which it is found.
        real: share of real images of its context.
        generated_obs: share of the observational samples.
        real_obs: share of real observational images.

    Returns:
        "not to be told from obs" if the share in its context's samples is not above that in
        observational images, real or sampled, beyond the intervals; "clear" from 0.9 of the real
        share on; "partly (49 % of 96 %)" between. Where observational samples have it more often
        than real ones beyond the intervals, that is said too.
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
