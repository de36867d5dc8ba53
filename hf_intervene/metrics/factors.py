"""Effects of edits on the true factors of quad: does an edit change its concept and leave the others? (METHOD section 5)

A small regressor, trained on real images whose latents are known, reads the factors off any image. `intervention_effects` compares what
it reads before and after an edit with what the simulator says would have happened.

What an image shows of a latent, u in [0, 1] being its normal CDF, and in which units it changes:

    quad1 to quad4, color   u, as a colour; read almost exactly
    size                    u; read almost exactly (at 32 pixels a pixel of diameter is 0.05)
    shape                   only its kind, round(3u), of `KINDS`; the change is the total variation distance between the probabilities of
                            the kinds, 1 for another kind. Small shapes are told apart less well, the smaller the image the less.
    orientation             the angle 2 pi u up to the symmetry of the kind; the change is the angle between the two, in periods of that
                            symmetry (a quarter turn of a square, a third of a triangle, half of an ellipse), 0.5 at most.
                            A circle has none, and none is compared across kinds. It is the factor that is read worst.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import ndtr, ndtri
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..contexts import Context, parse_context
from ..data.quad import LATENTS, render


KINDS = ("circle", "square", "triangle", "ellipse")
LEVELS = ("quad1", "quad2", "quad3", "quad4", "size", "color")  # the factors that are visible as u itself
# Mean change between images that have nothing to do with each other, of observational or independent latents.
CHANCE = dict.fromkeys(LEVELS, 1 / 3) | {"shape": 13 / 18, "orientation": 1 / 4}
_SYMMETRY = np.array([0, 4, 3, 2])  # positions in a full turn that look the same, of each kind; 0: all
_SIDE = 32  # larger images are averaged to this side: their factors are as visible, at a fraction of the time


@dataclass
class Factors:
    """The visible factors of n images.

    Args:
        levels: u of `LEVELS`, (n, 6).
        kinds: probability of each of `KINDS`, (n, 4).
        phases: orientation in periods, mod 1, if the shape were a square, a triangle, an ellipse, (n, 3).
    """

    levels: np.ndarray
    kinds: np.ndarray
    phases: np.ndarray


def true_factors(latents: np.ndarray) -> Factors:
    """The visible factors of quad's latents (n, 8)."""
    u = ndtr(np.asarray(latents, dtype=np.float64))
    columns = [LATENTS.index(name) for name in LEVELS]
    # Rounded as the renderer does.
    kinds = np.eye(len(KINDS))[np.rint(3 * u[:, LATENTS.index("shape")]).astype(int)]
    return Factors(u[:, columns], kinds, u[:, LATENTS.index("orientation"), None] * _SYMMETRY[1:] % 1)


def factor_changes(before: Factors, after: Factors, kinds: np.ndarray) -> np.ndarray:
    """Mean absolute change of each factor, in the units of the module docstring.

    Args:
        before, after: factors of n images and of n others, pair by pair.
        kinds: index in `KINDS` (n,) by which the orientations are compared; none is for 0, the circle.

    Returns:
        (8,), in the order of `LATENTS`; NaN for orientation if none is compared.
    """
    rows = np.flatnonzero(kinds)
    turn = (after.phases - before.phases)[rows, kinds[rows] - 1] % 1
    changes = dict(zip(LEVELS, np.abs(after.levels - before.levels).mean(0)))
    changes["shape"] = np.abs(after.kinds - before.kinds).sum(1).mean() / 2
    changes["orientation"] = np.minimum(turn, 1 - turn).mean() if len(rows) else math.nan
    return np.array([changes[name] for name in LATENTS])


class FactorRegressor(nn.Module):
    """Three strided convolutions and two linear layers, from images of one resolution to their factors.

    It is shown where to look: how far each pixel is from the colour at its quadrant's outer corner, which no shape reaches, and the five
    colours themselves.

    Attributes:
        scores: how well it reads held-out images, by factor; see `score_regressor`. Empty before `train_regressor` fills it.
    """

    def __init__(self, resolution: int, width: int = 32):
        super().__init__()
        self.resolution = resolution
        self.side = side = min(resolution, _SIDE)
        channels = [4, width, 2 * width, 2 * width]
        layers = []
        for before, after in zip(channels, channels[1:]):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GELU()]
            side = (side + 1) // 2
        self.convolutions = nn.Sequential(*layers, nn.Flatten())
        self.hidden = nn.Sequential(nn.Linear(channels[-1] * side**2 + 15, 8 * width), nn.GELU())
        self.head = nn.Linear(8 * width, len(LEVELS) + len(KINDS) + 2 * (len(KINDS) - 1))
        self.scores: dict[str, float] = {}

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images (B, 3, S, S) in [0, 1] to levels (B, 6), logits of the kinds (B, 4) and, for each kind with an orientation, the cosine
        and sine of its phase (B, 3, 2), of length 1 only where the regressor is sure of it."""
        x = F.adaptive_avg_pool2d(pixel_values, self.side)
        block, half = max(1, self.side // 8), self.side // 2
        outer = torch.cat([x[..., :block], x[..., -block:]], 3)
        corners = F.adaptive_avg_pool2d(torch.cat([outer[..., :block, :], outer[..., -block:, :]], 2), 2)
        centre = x[..., half - 1 : half + 1, half - 1 : half + 1].mean((2, 3))
        distance = (x - F.interpolate(corners, self.side)).abs().sum(1, keepdim=True)
        features = self.convolutions(torch.cat([x, distance], 1))
        features = self.hidden(torch.cat([features, corners.flatten(1), centre], 1))
        levels, logits, phases = self.head(features).split([len(LEVELS), len(KINDS), 2 * (len(KINDS) - 1)], 1)
        return levels, logits, phases.unflatten(1, (-1, 2))

    @torch.no_grad()
    def read(self, images: np.ndarray, batch_size: int = 256) -> Factors:
        """The factors of images, uint8 or float in [0, 1], (n, S, S, 3).

        Raises:
            ValueError: images of another resolution, or not of three channels.
        """
        images = np.asarray(images)
        if images.shape[1:] != (self.resolution, self.resolution, 3):
            raise ValueError(f"the regressor reads images (n, {self.resolution}, {self.resolution}, 3), not {images.shape}.")
        batches = [self(_pixel_values(images[k : k + batch_size])) for k in range(0, len(images), batch_size)]
        levels, logits, phases = (torch.cat(parts).double() for parts in zip(*batches))
        turns = torch.atan2(phases[..., 1], phases[..., 0]) / (2 * torch.pi) % 1
        return Factors(levels.clamp(0, 1).numpy(), logits.softmax(1).numpy(), turns.numpy())


def train_regressor(resolution: int, seed: int = 0, steps: int = 1500, batch_size: int = 64) -> FactorRegressor:
    """Train a regressor on fresh images of independent factors, and score it on others.

    Every factor is drawn uniformly over its range, whatever the others: there is no correlation to read one off another by, and
    combinations that no context shows are as familiar as the rest. Images are blurred by random amounts, because those of a model are.

    Args:
        resolution: side of the images, even, at least 8.
        seed: of weights, images and blur; the result is a function of the arguments (and of the number of threads).
        steps: of Adam.
        batch_size: images a step.
    """
    rng = np.random.default_rng((seed, 0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        regressor = FactorRegressor(resolution)
    optimizer = torch.optim.Adam(regressor.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in tqdm(range(steps), "training the regressor", disable=None, delay=2):
        latents = _independent_latents(batch_size, rng)
        x = F.adaptive_avg_pool2d(_pixel_values(render(latents, resolution)), regressor.side)
        blur = F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
        # The square: most images are nearly sharp.
        x = torch.lerp(x, blur, torch.from_numpy(rng.uniform(size=(len(x), 1, 1, 1)).astype(np.float32)) ** 2)
        optimizer.zero_grad()
        _loss(regressor(x), true_factors(latents)).backward()
        optimizer.step()
        schedule.step()
    regressor.requires_grad_(False)
    regressor.scores = score_regressor(regressor, seed=seed)
    return regressor


def score_regressor(regressor: FactorRegressor, images: int = 2000, seed: int = 0) -> dict[str, float]:
    """How well a regressor reads fresh images of independent factors that no training used.

    Returns:
        By factor: R^2 of u (`LEVELS`); share of right kinds (`shape`); R^2 of the phase as a unit vector, where there is one
        (`orientation`).
    """
    latents = _independent_latents(images, np.random.default_rng((seed, 1)))
    truth, read = true_factors(latents), regressor.read(render(latents, regressor.resolution))
    scores = dict(zip(LEVELS, _r2(truth.levels, read.levels)))
    kinds = truth.kinds.argmax(1)
    scores["shape"] = float((read.kinds.argmax(1) == kinds).mean())
    rows = np.flatnonzero(kinds)
    true, estimated = (
        np.exp(2j * np.pi * factors.phases[rows, kinds[rows] - 1]).view(np.float64).reshape(-1, 2) for factors in (truth, read)
    )
    scores["orientation"] = float(1 - np.square(true - estimated).sum() / np.square(true - true.mean(0)).sum())
    return {name: float(scores[name]) for name in LATENTS}


def intervention_effects(
    regressor: FactorRegressor,
    before: np.ndarray,
    after: np.ndarray,
    latents: np.ndarray,
    counterfactual: np.ndarray,
    concepts: Context,
    visible: Sequence[str] = LATENTS,
) -> dict:
    """What an edit did to each factor, beside what it should have done, both read off images by the regressor.

    Give as `before` the model's own images, edited to nothing: with real ones, all that the model cannot draw would count as change. What
    is read of a factor that it cannot draw means nothing, though: leave such out of `visible`. They are those that `factor_changes` finds
    far from the real images.

    `moved` rests on the simulator's pairing of noise and intervened values (`quad.counterfactual_latents`), which unpaired contexts do
    not determine: a model may move a concept more or less than that and fit its data. Nor does it see the direction. `leak` rests on
    the graph alone.

    Args:
        regressor: of the images' resolution.
        before, after: images and the same edited, pair by pair, (n, S, S, 3), uint8 or in [0, 1].
        latents: that belong to `before`, (n, 8).
        counterfactual: what they would have been under the intervention, (n, 8).
        concepts: the intervened concepts, one at least.
        visible: factors that count for `moved` and `leak`.

    Returns:
        `factors`: for each of `LATENTS` the mean `change` by the edit and the mean `true_change`, read off the simulator's images, in the
        units of the module docstring. Orientations are compared where truth keeps a kind that has one; NaN if it nowhere does.
        `moved`: change / true change, summed over the visible intervened factors; 1 is right.
        `leak`: mean change of the visible factors that truth leaves as they are. `leak_floor`: mean true change of those, which is the
        regressor's own error. NaN without any such factor.
    """
    kinds, kinds_after = (true_factors(x).kinds.argmax(1) for x in (latents, counterfactual))
    kinds = np.where(kinds == kinds_after, kinds, 0)
    pairs = (before, after), (render(x, regressor.resolution) for x in (latents, counterfactual))
    change, true_change = (factor_changes(regressor.read(a), regressor.read(b), kinds) for a, b in pairs)
    valid = np.isin(LATENTS, list(visible)) & ~np.isnan(true_change)
    moving = valid & np.isin(LATENTS, list(parse_context(concepts, LATENTS)))
    still = valid & np.isclose(latents, counterfactual, rtol=0, atol=1e-6).all(0)  # equal up to rounding
    return {
        "factors": {name: {"change": float(a), "true_change": float(b)} for name, a, b in zip(LATENTS, change, true_change)},
        "moved": float(change[moving].sum() / true_change[moving].sum()) if moving.any() else math.nan,
        "leak": float(change[still].mean()) if still.any() else math.nan,
        "leak_floor": float(true_change[still].mean()) if still.any() else math.nan,
    }


def _independent_latents(size: int, rng: np.random.Generator) -> np.ndarray:
    return ndtri(rng.uniform(size=(size, len(LATENTS))))


def _pixel_values(images: np.ndarray) -> torch.Tensor:
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    return x.float() / 255 if x.dtype == torch.uint8 else x.float()


def _loss(output: tuple[torch.Tensor, torch.Tensor, torch.Tensor], truth: Factors) -> torch.Tensor:
    levels, logits, phases = output
    kinds = torch.from_numpy(truth.kinds.argmax(1))
    rows = kinds.nonzero()[:, 0]
    angle = 2 * torch.pi * torch.from_numpy(truth.phases).float()[rows, kinds[rows] - 1]
    error = phases[rows, kinds[rows] - 1] - torch.stack([angle.cos(), angle.sin()], 1)
    # Levels are weighed by the inverse of their variance, 1/12.
    return (
        12 * F.mse_loss(levels, torch.from_numpy(truth.levels).float()) + F.cross_entropy(logits, kinds) + error.square().mean()
    )


def _r2(true: np.ndarray, read: np.ndarray) -> np.ndarray:
    return 1 - np.square(true - read).sum(0) / np.square(true - true.mean(0)).sum(0)
