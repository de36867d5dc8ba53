"""Presence: is what was asked for in the image? A detector of concepts, its error, and shares of
images by it.

A distance between sets of images does not see a concept of few pixels; a detector does. It is a
small convolutional network with one logit for each concept, trained on real images. Two ways:

- `train_detector`: the true attributes of every image are known. A logit says whether the concept
  is there.
- `train_context_detector`: only the context of every image is known. The logit of concept k is
  trained on observational images against those of the single context k alone. It says whether an
  image looks like the images of context k. Three limits follow. Where some observational images
  have the concept already (say 5 % wear glasses), the detector is told that they have not, and its
  stated false-positive rate counts them as errors. It has seen no images of other contexts, and may
  take another concept for its own. And a concept whose distribution is only shifted by the
  intervention, as a colour, is seen only as far as single images tell.

Training images are blurred by random amounts and a little noise is added, so that blurred samples
of a VAE are judged by what they show. Thresholds are chosen by balanced accuracy on held-out real
images; the error is measured on others, sharp and blurred. A concept is not `usable`, and gets no
presence, where its context is small or where the lower end of the interval of balanced accuracy on
sharp images is below 0.75.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from scipy.stats import binomtest

from ..contexts import OBS
from .networks import SmallNetwork, apply, balanced_weights, blurred, fit, prepared


MIN_IMAGES = 100  # of a context: fewer train no detector
MIN_ACCURACY = 0.75  # balanced, lower end of its interval
STEPS = 1000
_MAX_BLUR, _TEST_BLUR = (
    1.5,
    1.0,
)  # standard deviations in pixels, for images of 32 pixels; in proportion for others
_MAX_NOISE = 0.005  # of pixels in [0, 1]: a faint beard differs from skin by 0.01
_CALIBRATION, _TEST = 0.15, 0.15  # shares of the images of each set that are held out


@dataclass
class DetectorError:
    """Error of one concept's detector on held-out real images.

    Args:
        true_positive: share of the images with the concept in which it is found.
        false_positive: share of the images without it in which it is found.
        balanced_accuracy: mean of `true_positive` and 1 - `false_positive`.
        interval: 95 % interval of the balanced accuracy (Newcombe's, of Wilson's intervals of the
            two rates).
        with_concept, without: numbers of those images.
    """

    true_positive: float
    false_positive: float
    balanced_accuracy: float
    interval: tuple[float, float]
    with_concept: int
    without: int


class Detector:
    """Says which concepts images show. Made by `train_detector` or `train_context_detector`.

    Attributes:
        concepts: their names, K.
        kind: `"attributes"` or `"contexts"`: what it was trained on.
        thresholds: of the logits, float64 (K,).
        errors: by concept, `"sharp"` and `"blurred"`: a `DetectorError`; empty for a concept that
            was not trained.
        unusable: by concept that gets no presence, why, in one sentence.
    """

    def __init__(
        self, network: SmallNetwork, concepts: Sequence[str], kind: str, shape: tuple[int, ...]
    ):
        self.network, self.concepts, self.kind, self.shape = network, tuple(concepts), kind, shape
        self.thresholds = np.zeros(len(self.concepts))
        self.errors: dict[str, dict[str, DetectorError]] = {}
        self.unusable: dict[str, str] = {}

    @property
    def usable(self) -> np.ndarray:
        """Which concepts can be told on real images, bool (K,)."""
        return np.array([name not in self.unusable for name in self.concepts])

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Logits less thresholds, float64 (n, K), above 0 where the concept is found, of images (n,
        H, W, C), uint8 or in [0, 1].

        Raises:
            ValueError: images of another shape than those of the training, or pixels out of [0, 1].
        """
        network = self.network.eval()  # one of too few images was never trained
        return apply(network, self._checked(images)).double().numpy() - self.thresholds

    def present(self, images: np.ndarray) -> np.ndarray:
        """Which concepts are found, bool (n, K), in images as for `logits`."""
        return self.logits(images) > 0

    def features(self, images: np.ndarray) -> np.ndarray:
        """Penultimate activations, float32 (n, 128), of images as for `logits`."""
        return apply(self.network.features, self._checked(images)).numpy()

    def _checked(self, images: np.ndarray) -> torch.Tensor:
        if tuple(np.shape(images)[1:]) != self.shape:
            raise ValueError(
                f"the detector was trained on images of shape {self.shape}, not "
                f"{np.shape(images)[1:]}."
            )
        return prepared(images)

    def to_dict(self) -> dict:
        """Kind, errors and what is unusable, as JSON holds it."""
        errors = {
            name: {blur: asdict(e) for blur, e in found.items()}
            for name, found in self.errors.items()
        }
        return {"kind": self.kind, "errors": errors, "unusable": self.unusable}


def train_detector(
    images: np.ndarray,
    labels: np.ndarray,
    concepts: Sequence[str],
    seed: int = 0,
    steps: int = STEPS,
    kind: str = "attributes",
) -> Detector:
    """Train a detector on images whose attributes are known.

    70 % of the images train the network, 15 % choose the thresholds, 15 % measure the error.

    Args:
        images: (n, H, W, C), uint8 or float in [0, 1]. More than 64 pixels a side are averaged down
            to 64.
        labels: (n, K), bool, or float with NaN where it is not known.
        concepts: names of the K columns.
        seed: of weights, split, batches and blur; the result is a function of the arguments (and of
            the number of threads).
        steps: batches of 96 images; 1,000 take about 40 seconds on one core at 32x32.
        kind: what the labels are; `train_context_detector` says `"contexts"`.

    Raises:
        ValueError: labels that do not fit the images or concepts, or no images.
    """
    labels = np.asarray(labels, dtype=np.float32)
    if labels.shape != (len(images), len(concepts)) or not len(images):
        raise ValueError(
            f"labels must have shape ({len(images)}, {len(concepts)}), a row for each image and a "
            "column for each concept, "
            f"not {labels.shape}, and there must be an image."
        )
    x, y = prepared(images), torch.from_numpy(labels)
    detector = Detector(
        SmallNetwork(x.shape[1:], len(concepts), seed), concepts, kind, tuple(np.shape(images)[1:])
    )
    for k, name in enumerate(concepts):
        fewest = min(int((labels[:, k] == answer).sum()) for answer in (0, 1))
        if fewest < MIN_IMAGES:
            detector.unusable[name] = (
                f"there are only {fewest} images with or without {name} to train a detector on; "
                f"{MIN_IMAGES} are needed."
            )
            y[:, k] = math.nan
    if not detector.usable.any():
        return detector
    order = np.random.default_rng(seed).permutation(len(x))
    sizes = [round(len(x) * share) for share in (_CALIBRATION, _TEST)]
    calibration, test, train = np.split(order, np.cumsum(sizes))
    scale = max(x.shape[2:]) / 32
    blur, what = _MAX_BLUR * scale, "training the detector"
    fit(detector.network, x[train], y[train], steps, seed, blur, _MAX_NOISE, what)

    def at(rows: np.ndarray, blur: float) -> np.ndarray:
        sigma = blur * scale
        return (
            apply(lambda z: detector.network(blurred(z, torch.full((len(z),), sigma))), x[rows])
            .double()
            .numpy()
        )

    # Half of the images that choose the threshold are blurred: it has to serve both.
    chosen = np.concatenate([at(calibration, 0), at(calibration, _TEST_BLUR)])
    twice = np.tile(labels[calibration], (2, 1))
    weights = np.tile(balanced_weights(y[calibration]).numpy(), (2, 1))
    tests = {"sharp": at(test, 0), "blurred": at(test, _TEST_BLUR)}
    for k, name in enumerate(concepts):
        if name in detector.unusable:
            continue
        detector.thresholds[k] = best_threshold(chosen[:, k], twice[:, k], weights[:, k])
        detector.errors[name] = {
            blur: detector_error(logits[:, k] > detector.thresholds[k], labels[test, k])
            for blur, logits in tests.items()
        }
        sharp = detector.errors[name]["sharp"]
        if not sharp.interval[0] >= MIN_ACCURACY:
            detector.unusable[name] = (
                f"on held-out real images {name} is told with a balanced accuracy of "
                f"{sharp.balanced_accuracy:.2f} "
                f"[{sharp.interval[0]:.2f}, {sharp.interval[1]:.2f}]; at least {MIN_ACCURACY} is "
                "needed."
            )
    return detector


def train_context_detector(
    images: Mapping[str, np.ndarray], concepts: Sequence[str], seed: int = 0, steps: int = STEPS
) -> Detector:
    """Train a detector where only contexts are known: for each concept "do k or obs". Its limits:
    see the module docstring.

    Args:
        images: by context, (n, H, W, C), uint8 or float in [0, 1]; contexts with several concepts
            are not used.
        concepts: names of the K concepts.
        seed, steps: see `train_detector`.

    Raises:
        ValueError: there are no observational images.
    """
    if OBS not in images or not len(images[OBS]):
        raise ValueError(
            "a detector of contexts needs observational images to compare with: there are none."
        )
    used = [OBS, *(name for name in concepts if name in images)]
    labels = np.full((sum(len(images[name]) for name in used), len(concepts)), np.nan, np.float32)
    labels[: len(images[OBS])] = 0
    start = len(images[OBS])
    for name in used[1:]:
        stop = start + len(images[name])
        labels[start:stop, concepts.index(name)] = 1
        start = stop
    together = np.concatenate([images[name] for name in used])
    return train_detector(together, labels, concepts, seed, steps, "contexts")


def best_threshold(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    """The threshold with the highest weighted balanced accuracy, the middle between the two logits
    that it parts.

    Args:
        logits: (n,).
        labels: 1, 0, or NaN where the weight is 0, (n,).
        weights: (n,). If all of one answer are 0, the threshold is 0.
    """
    known = weights > 0  # other logits must not pull the threshold to their side of the gap
    logits, labels, weights = logits[known], labels[known], weights[known]
    shares = [weights * (labels == answer) for answer in (1, 0)]
    if not all(share.sum() > 0 for share in shares):
        return 0.0
    values, index = np.unique(logits, return_inverse=True)
    # Below each threshold: what is missed of the images with the concept, what is rightly rejected
    # of those without.
    missed, rejected = (np.append(0, np.cumsum(np.bincount(index, x / x.sum()))) for x in shares)
    edges = np.concatenate([[values[0] - 1], (values[:-1] + values[1:]) / 2, [values[-1] + 1]])
    return float(edges[np.argmax(rejected - missed)])


def detector_error(found: np.ndarray, labels: np.ndarray) -> DetectorError:
    """`DetectorError` of what was found, bool (n,), against labels (n,), NaN where they do not
    count."""
    with_concept, without = labels == 1, labels == 0
    rates, bounds = [], []
    for rows in (with_concept, without):
        share = proportion(found[rows])
        rates.append(share.value)
        bounds.append(share.interval)
    (tp, fp), (tp_low, tp_high), (fp_low, fp_high) = rates, *bounds
    accuracy = (tp + 1 - fp) / 2
    # Newcombe (1998), method 10: the interval of a difference of two rates from Wilson's intervals
    # of both.
    low = accuracy - math.hypot(tp - tp_low, fp_high - fp) / 2
    high = accuracy + math.hypot(tp_high - tp, fp - fp_low) / 2
    return DetectorError(tp, fp, accuracy, (low, high), int(with_concept.sum()), int(without.sum()))


@dataclass
class Share:
    """A share of images.

    Args:
        value: the share; NaN of no images.
        interval: its 95 % interval (Wilson's).
    """

    value: float
    interval: tuple[float, float]

    def to_dict(self) -> dict:
        """As JSON holds it."""
        return asdict(self)


def proportion(hits: np.ndarray) -> Share:
    """The share of true entries in `hits`, bool (n,), with Wilson's interval."""
    if not len(hits):
        return Share(math.nan, (math.nan, math.nan))
    interval = binomtest(int(np.sum(hits)), len(hits)).proportion_ci(0.95, "wilson")
    return Share(float(np.mean(hits)), (float(interval.low), float(interval.high)))
