"""A small convolutional network that labels images, and its training.

The detector of concepts and the two-sample test of images use it.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm


MAX_SIDE = 64  # larger images are averaged down to this side
_BATCH = 96
_MAX_WEIGHT = 10.0  # the largest weight of an image; with balanced labels every weight is 1
FEATURES = 128  # penultimate activations


class SmallNetwork(nn.Module):
    """Four convolutions with batch norm, and two linear layers.

    There is no global pooling, so that positions in the image matter.

    Args:
        shape: (channels, height, width) of the images of `prepared`.
        outputs: number of logits, K.
        seed: seed of the weights.
    """

    def __init__(self, shape: tuple[int, ...], outputs: int, seed: int):
        super().__init__()
        channels, *size = shape
        strides = (2, 1 if max(size) <= 32 else 2, 2, 2)
        layers: list[nn.Module] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for number, (stride, after) in enumerate(zip(strides, (32, 32, 64, 64))):
                kernel = 3 if number else 4
                layers += [nn.Conv2d(channels, after, kernel, stride, 1, bias=False)]
                layers += [nn.BatchNorm2d(after), nn.ReLU()]
                channels, size = after, [(n + 2 - kernel) // stride + 1 for n in size]
            hidden = nn.Linear(channels * math.prod(size), FEATURES)
            layers += [nn.Flatten(), hidden, nn.BatchNorm1d(FEATURES), nn.ReLU()]
            self.body = nn.Sequential(*layers)
            self.head = nn.Linear(FEATURES, outputs)

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the penultimate activations (B, 128) of images (B, C, H, W) in [0, 1]."""
        return self.body(2 * pixel_values - 1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, K) of images (B, C, H, W) in [0, 1]."""
        return self.head(self.features(pixel_values))


def pixel_values(images: np.ndarray) -> torch.Tensor:
    """Return uint8 or float images (n, H, W, C) as a tensor (n, C, H, W).

    uint8 images stay uint8. `unit` scales a batch of them.

    Raises:
        ValueError: the images have another shape, or floats are outside [0, 1] or NaN.
    """
    images = np.asarray(images)
    if images.ndim != 4:
        raise ValueError(
            f"images must have shape (n, height, width, channels), not {images.shape}."
        )
    if images.dtype != np.uint8 and images.size and not (images.min() >= 0 and images.max() <= 1):
        raise ValueError("pixel values must lie in [0, 1] (or be uint8); some do not, or are NaN.")
    x = torch.from_numpy(np.require(images, requirements=("C", "W"))).permute(0, 3, 1, 2)
    return x if x.dtype == torch.uint8 else x.float()


def prepared(images: np.ndarray) -> torch.Tensor:
    """Return `pixel_values` of images. Sides above 64 pixels are averaged down to 64."""
    x = pixel_values(images)
    size = (min(x.shape[2], MAX_SIDE), min(x.shape[3], MAX_SIDE))
    if tuple(x.shape[2:]) == size:
        return x
    return torch.cat([F.adaptive_avg_pool2d(unit(part), size) for part in x.split(256)])


def unit(batch: torch.Tensor) -> torch.Tensor:
    """Return a batch of `prepared` as float32 in [0, 1]."""
    return batch.float() / 255 if batch.dtype == torch.uint8 else batch


def blurred(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Blur each image with a Gaussian of its own width.

    Rows of the kernel matrix sum to one, so that the border is not darkened.

    Args:
        x: images (B, C, H, W).
        sigma: standard deviation of each image's kernel in pixels, (B,). 0 does not blur.
    """
    kernels = [_kernel(n, sigma) for n in x.shape[2:]]
    return kernels[0][:, None] @ x @ kernels[1][:, None].mT


def _kernel(size: int, sigma: torch.Tensor) -> torch.Tensor:
    """Return the matrices that blur an axis of `size` pixels, (B, size, size)."""
    position = torch.arange(size, dtype=torch.float32)
    distance = (position[:, None] - position) / sigma.clamp(min=1e-3)[:, None, None]
    return (-distance.square() / 2).softmax(-1)


def balanced_weights(labels: torch.Tensor) -> torch.Tensor:
    """Return weights, (n, K), with which each label is 1 as often as 0, for any other labels.

    Images of single contexts rarely have two concepts at once. A network that is trained on them
    without weights learns that one concept makes another one unlikely, and misses them together. So
    the weight of an image is the inverse of the share of its label among the images with the same
    other labels (inverse propensity weights), with a bound. If all of these have the same label,
    there is nothing to balance, and the weight is 0.

    Args:
        labels: float32 (n, K): 1, 0, or NaN for labels to ignore. NaN counts as 0 when it is one of
            the other labels.
    """
    weights = torch.zeros_like(labels)
    for k in range(labels.shape[1]):
        others = labels.nan_to_num()
        others[:, k] = 0
        known = ~labels[:, k].isnan()
        group = others[known].unique(dim=0, return_inverse=True)[1]
        answer = labels[known, k]
        share = (torch.bincount(group, answer) / torch.bincount(group).clamp(min=1))[group].to(
            answer.dtype
        )
        own = torch.where(answer > 0, share, 1 - share)
        weights[known, k] = torch.where(own < 1, (0.5 / own).clamp(max=_MAX_WEIGHT), 0.0)
    return weights


@torch.enable_grad()  # evaluation calls it with gradients switched off
def fit(
    network: SmallNetwork,
    images: torch.Tensor,
    labels: torch.Tensor,
    steps: int,
    seed: int,
    max_blur: float = 0.0,
    max_noise: float = 0.0,
    what: str = "training a network",
) -> SmallNetwork:
    """Train a network on labelled images, with binary cross-entropy and `balanced_weights`.

    Args:
        network: a new network. It is trained in place.
        images: images of `prepared`, (n, C, H, W).
        labels: float32 (n, K): 1, 0, or NaN for labels to ignore.
        steps: number of batches of 96.
        seed: seed of batches and augmentation.
        max_blur: largest standard deviation of the blur, in pixels. Each image is blurred by this
            times u^2 with a uniform u.
        max_noise: largest standard deviation of the noise that is added to pixels in [0, 1].
        what: text of the progress bar.

    Returns:
        The network, in evaluation mode and without gradients.
    """
    if len(images) < 2:  # too few for a batch that can be normalised
        return network.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed + 1)
    answers = labels.nan_to_num()
    weights = balanced_weights(labels)
    weights = weights / weights.mean(0).clamp(min=1e-12)
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=max(steps, 2))
    network.train()
    order = torch.empty(0, dtype=torch.long)
    size = min(_BATCH, len(images))
    for _ in tqdm(range(steps), what, disable=None, delay=2):
        if len(order) < size:
            order = torch.randperm(len(images), generator=generator)
        rows, order = order[:size], order[size:]
        x = unit(images[rows])
        if max_blur:
            draws = torch.rand(len(x), generator=generator)
            x = blurred(x, max_blur * draws.square())
        if max_noise:
            spread = max_noise * torch.rand(len(x), 1, 1, 1, generator=generator)
            x = x + spread * torch.randn(x.shape, generator=generator)
        loss = F.binary_cross_entropy_with_logits(network(x), answers[rows], weights[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval().requires_grad_(False)


@torch.no_grad()
def apply(function: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """Apply a function of batches (B, C, H, W) in [0, 1] to all images. Return (n, ...)."""
    return torch.cat([function(unit(batch)) for batch in images.split(256)])
