"""A detector of concepts in images, and its error.

A distance between sets of images hardly changes with a concept of few pixels. A detector finds such
concepts. It is a small convolutional network with one logit for each concept, trained on real
images in one of two ways:

- `train_detector`: the true attributes of every image are known. A logit says whether the image
  shows the concept.
- `train_context_detector`: only the context of every image is known. The logit of concept k is
  trained on observational images against images of the single context k. It says whether an image
  looks like those of context k. This has three limits. If some observational images show the
  concept (5 % wear glasses, for example), their labels are wrong, and the measured false-positive
  rate counts them as errors. The detector has seen no images of other contexts, and may confuse
  concepts. And if an intervention only shifts the distribution of a concept, such as a colour,
  single images often do not show it.

Training images are blurred by random amounts, and a little noise is added, so that a blurred sample
of a VAE is judged by its concepts. Thresholds are chosen by balanced accuracy on held-out real
images. The error is measured on others, sharp and blurred. A concept is not `usable`, and has no
presence, if its context is small, or if the lower end of the interval of the balanced accuracy on
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
from .results import Result


MIN_IMAGES = 100  # with fewer images of a context no detector is trained
MIN_ACCURACY = 0.75  # lower end of the interval of the balanced accuracy
STEPS = 1000
# Standard deviations in pixels for images of 32 pixels, and in proportion for others.
_MAX_BLUR, _TEST_BLUR = 1.5, 1.0
_MAX_NOISE = 0.005  # of pixels in [0, 1]: a faint beard differs from skin by 0.01
_CALIBRATION, _TEST = 0.15, 0.15  # shares of the images that are held out


@dataclass
class DetectorError:
    """Error of one concept's detector on held-out real images.

    Args:
        true_positive: share of the images with the concept in which it is found.
        false_positive: share of the images without the concept in which it is found.
        balanced_accuracy: mean of `true_positive` and 1 - `false_positive`.
        interval: 95 % interval of the balanced accuracy (Newcombe's, from Wilson's intervals of the
            two rates).
        with_concept, without: numbers of images with and without the concept.
    """

    true_positive: float
    false_positive: float
    balanced_accuracy: float
    interval: tuple[float, float]
    with_concept: int
    without: int


class Detector:
    """A detector of concepts. `train_detector` and `train_context_detector` make one.

    Attributes:
        concepts: names of the K concepts.
        kind: `"attributes"` or `"contexts"`: the labels of its training.
        thresholds: thresholds of the logits, float64 (K,).
        errors: for each trained concept a `DetectorError` on `"sharp"` and on `"blurred"` images.
        unusable: for each concept that is not usable the reason, one sentence.
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
        """For which concepts the detector is reliable on real images, bool (K,)."""
        return np.array([name not in self.unusable for name in self.concepts])

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Return logits minus thresholds, float64 (n, K): above 0 if the concept is found.

        Args:
            images: (n, H, W, C), uint8 or float in [0, 1].

        Raises:
            ValueError: the images have another shape than those of the training, or pixels are
                outside [0, 1].
        """
        network = self.network.eval()  # with too few images the network was not trained
        return apply(network, self._checked(images)).double().numpy() - self.thresholds

    def present(self, images: np.ndarray) -> np.ndarray:
        """Return which concepts are found, bool (n, K). See `logits` for the images."""
        return self.logits(images) > 0

    def features(self, images: np.ndarray) -> np.ndarray:
        """Return the penultimate activations, float32 (n, 128). See `logits` for the images."""
        return apply(self.network.features, self._checked(images)).numpy()

    def _checked(self, images: np.ndarray) -> torch.Tensor:
        if tuple(np.shape(images)[1:]) != self.shape:
            raise ValueError(
                f"the detector was trained on images of shape {self.shape}, not "
                f"{np.shape(images)[1:]}."
            )
        return prepared(images)

    def to_dict(self) -> dict:
        """Return kind, errors and unusable concepts as JSON has them."""
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

    70 % of the images are for training, 15 % for the thresholds, 15 % for the error.

    Args:
        images: (n, H, W, C), uint8 or float in [0, 1]. Sides above 64 pixels are averaged down to
            64.
        labels: (n, K), bool, or float with NaN for unknown labels.
        concepts: names of the K columns.
        seed: seed of weights, split, batches and blur. The result depends only on the arguments
            (and on the number of threads).
        steps: batches of 96 images; 1,000 take about 40 seconds on one core at 32x32.
        kind: the kind of labels; `train_context_detector` passes `"contexts"`.

    Raises:
        ValueError: the labels do not fit the images or concepts, or there are no images.
    """
    labels = np.asarray(labels, dtype=np.float32)
    if labels.shape != (len(images), len(concepts)) or not len(images):
        raise ValueError(
            f"labels must have shape ({len(images)}, {len(concepts)}), a row for each image and a"
            f" column for each concept, not {labels.shape}, and there must be an image."
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

    # The threshold is for sharp and blurred images, so that it is chosen on both.
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
                f"on held-out real images {name} is detected with a balanced accuracy of"
                f" {sharp.balanced_accuracy:.2f} [{sharp.interval[0]:.2f},"
                f" {sharp.interval[1]:.2f}]; at least {MIN_ACCURACY} is needed."
            )
    return detector


def train_context_detector(
    images: Mapping[str, np.ndarray], concepts: Sequence[str], seed: int = 0, steps: int = STEPS
) -> Detector:
    """Train a detector if only contexts are known: for each concept, its context or obs.

    The module docstring describes its limits.

    Args:
        images: images by context, (n, H, W, C), uint8 or float in [0, 1]. Contexts with several
            concepts are not used.
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
    """Return the threshold with the highest weighted balanced accuracy.

    It is the middle of the two logits that it separates.

    Args:
        logits: (n,).
        labels: 1, 0, or NaN where the weight is 0, (n,).
        weights: (n,). If all weights of one label are 0, the threshold is 0.
    """
    known = weights > 0  # other logits must not change the middle of the gap
    logits, labels, weights = logits[known], labels[known], weights[known]
    shares = [weights * (labels == answer) for answer in (1, 0)]
    if not all(share.sum() > 0 for share in shares):
        return 0.0
    values, index = np.unique(logits, return_inverse=True)
    # Below each threshold: the share of the images with the concept that are missed, and the share
    # of those without it that are rejected correctly.
    missed, rejected = (np.append(0, np.cumsum(np.bincount(index, x / x.sum()))) for x in shares)
    edges = np.concatenate([[values[0] - 1], (values[:-1] + values[1:]) / 2, [values[-1] + 1]])
    return float(edges[np.argmax(rejected - missed)])


def detector_error(found: np.ndarray, labels: np.ndarray) -> DetectorError:
    """Compute the error of detections `found`, bool (n,), against labels (n,); NaN is ignored."""
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
class Share(Result):
    """A share of images.

    Args:
        value: the share; NaN without images.
        interval: its 95 % interval (Wilson's).
    """

    value: float
    interval: tuple[float, float]


def proportion(hits: np.ndarray) -> Share:
    """Return the share of true entries in `hits`, bool (n,), with Wilson's interval."""
    if not len(hits):
        return Share(math.nan, (math.nan, math.nan))
    interval = binomtest(int(np.sum(hits)), len(hits)).proportion_ci(0.95, "wilson")
    return Share(float(np.mean(hits)), (float(interval.low), float(interval.high)))
