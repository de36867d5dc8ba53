"""The trainer against the textbook: a plain PyTorch loop over a plain data set, one context a
batch, with dense masked matrices.

The loop trains the paper's head by the ELBO. Everything around that is what one writes first:
float32, a `Dataset` that turns one image at a time into a tensor, `DataLoader`, Adam. The light
VAE, the sizes of the head, the batch and the images are ours. So there are two things to compare it
with: the trainer with the same head, objective and optimiser (`SAME`), and the trainer as it is by
default, whose steps do more: flows, three terms beside the ELBO, an edited image decoded and read
for every second image, Muon. By default the trainer computes in bf16 where that is fast."""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from hf_intervene import LightVAE
from hf_intervene.bases.likelihoods import gaussian_loss
from hf_intervene.contexts import parse_context
from hf_intervene.data import quad
from hf_intervene.evaluation import load_model
from hf_intervene.metrics import bits_per_pixel
from hf_intervene.metrics.transport import sliced_wasserstein
from hf_intervene.trainer.loop import train
from hf_intervene.trainer.parsing import read_config
from hf_intervene.trainer.sections import BaseSettings, HeadSettings
from hf_intervene.trainer.settings import TrainArguments
from hf_intervene.trainer.simulated import Quad
from hf_intervene.training.benchmarks.bases import head_on, mixed
from hf_intervene.training.benchmarks.tools import (
    Conditions,
    Turns,
    contest,
    figure,
    rate,
    repeat,
    summary,
)


NEVER = 10**9
SETTINGS = {
    "dataset": "quad",
    "images_per_context": 1000,
    "validation_images": 8,
    "tracker": "none",
}
# What the loop trains: the paper's head, one posterior, the ELBO alone, Adam.
SAME = {
    "mechanism": "mlp",
    "posterior": "unconditional",
    "propagation_steps": 1,
    "group_lasso": 0.0,
    "l2": 0.0,
    "optimizer": "adamw",
}
FLOAT32 = {"mixed_precision": "no"}
BLOCKS = len(quad.CONCEPTS) + HeadSettings.free_blocks


class DenseMaskedHead(nn.Module):
    """The head as one would write it first: dense matrices under 0/1 masks, one context per forward
    pass.
    """

    def __init__(self, blocks: int, noise_width: int, width: int, embedding: int):
        super().__init__()
        middle = (noise_width + width) // 2
        self.obs, self.int = (
            nn.Linear(blocks * noise_width, blocks * noise_width) for _ in range(2)
        )
        self.layers = nn.ModuleList(
            nn.Linear(blocks * a, blocks * b) for a, b in ((noise_width, middle), (middle, width))
        )
        self.edges_obs, self.edges_int = (
            nn.Linear(blocks * width, blocks * width) for _ in range(2)
        )
        self.unpool = nn.Linear(blocks * width, embedding)
        self.blocks, self.sizes = blocks, (noise_width, middle, width)

    def forward(self, z: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """z (B, D * noise_width), context (D,) -> embedding (B, embedding)."""

        def masked(layer: nn.Linear, mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, layer.weight * mask, layer.bias)

        eye, (n, m, w) = torch.eye(self.blocks, device=z.device), self.sizes
        diagonal = torch.kron(eye, z.new_ones(n, n))
        rows = context.repeat_interleave(n)
        x = nn.functional.gelu(
            (1 - rows) * masked(self.obs, diagonal, z) + rows * masked(self.int, diagonal, z)
        )
        for layer, (a, b) in zip(self.layers, ((n, m), (m, w))):
            x = masked(layer, torch.kron(eye, z.new_ones(b, a)), x)
            x = nn.functional.gelu(
                nn.functional.layer_norm(x.view(-1, self.blocks, b), (b,)).flatten(1)
            )
        off = torch.kron((1 - eye) * (1 - context)[:, None], z.new_ones(w, w))
        source = context.repeat_interleave(w)
        x = (
            x
            + masked(self.edges_obs, off * (1 - source), x)
            + masked(self.edges_int, off * source, x)
        )
        return self.unpool(x)


class TextbookVAE(nn.Module):
    def __init__(
        self, resolution: int, noise_width: int = 32, width: int = HeadSettings.concept_width
    ):
        super().__init__()
        self.vae = LightVAE(sample_size=resolution, likelihood=BaseSettings.likelihood)
        self.vae.quant.requires_grad_(False)  # the readout stands in its place
        self.readout = nn.Linear(self.vae.config.hidden_width, 2 * BLOCKS * noise_width)
        self.head = DenseMaskedHead(BLOCKS, noise_width, width, self.vae.config.latent_width)
        self.noise = BLOCKS * noise_width

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Negative log-likelihood and KL of a batch of one context, sums in nats."""
        mean, logvar = self.readout(self.vae.encoder(x)).chunk(2, 1)
        z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        logits = self.vae.decode(self.head(z, context)).sample
        loss = gaussian_loss(logits.sigmoid(), x, self.vae.log_variance).sum()
        return loss, 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum()

    @torch.no_grad()
    def sample(self, name: str, count: int) -> np.ndarray:
        z = torch.randn(count, self.noise, device=Conditions.device)
        logits = self.vae.decode(self.head(z, context_vector(name))).sample
        return logits.sigmoid().permute(0, 2, 3, 1).cpu().numpy()


def context_vector(name: str) -> torch.Tensor:
    vector = torch.zeros(BLOCKS)
    vector[[quad.CONCEPTS.index(concept) for concept in parse_context(name, quad.CONCEPTS)]] = 1
    return vector.to(Conditions.device)


class ImageDataset(Dataset):
    """Images that are decoded already, one at a time."""

    def __init__(self, images: dict[str, np.ndarray]):
        self.images = [Image.fromarray(image) for array in images.values() for image in array]
        self.contexts = [name for name, array in images.items() for _ in array]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        x = torch.from_numpy(np.array(self.images[index])).permute(2, 0, 1).float() / 255
        return x, self.contexts[index]


def batches(data: ImageDataset, batch_size: int) -> Iterator[list[int]]:
    """Batches of one context each, for ever."""
    contexts = np.array(data.contexts)
    names = list(dict.fromkeys(data.contexts))
    while True:
        rows = [np.random.permutation(np.flatnonzero(contexts == name)) for name in names]
        full = [
            part[i : i + batch_size]
            for part in rows
            for i in range(0, len(part) - batch_size + 1, batch_size)
        ]
        for number in np.random.permutation(len(full)):
            yield full[number].tolist()


class Textbook:
    """The loop, a step at a time."""

    def __init__(
        self, images: dict[str, np.ndarray], batch_size: int, beta: float, total: int | None = None
    ):
        data = ImageDataset(images)
        self.loader = iter(DataLoader(data, batch_sampler=batches(data, batch_size)))
        self.model = TextbookVAE(data.images[0].size[0]).to(Conditions.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.decay = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, total or NEVER)
        self.beta, self.running = beta, 0.0

    def step(self) -> None:
        x, names = next(self.loader)
        nll, kl = self.model(x.to(Conditions.device), context_vector(names[0]))
        loss = (nll + self.beta * kl) / len(x)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.decay.step()
        self.running += loss.item()


def plain_loop(turns: Turns, settings: dict, steps: int) -> None:
    """A contestant: so many steps of the textbook a round."""
    a = TrainArguments(**settings)
    loop = Textbook(training_images(a)[0], a.optimization.batch_size, a.objective.beta)
    loop.step()
    while True:
        turns.next()
        for _ in range(steps):
            loop.step()


def trainer(turns: Turns, settings: dict, steps: int) -> None:
    """A contestant: so many steps of `train.py` a round, with all that it does in them."""
    with tempfile.TemporaryDirectory() as folder:
        train(
            TrainArguments(
                **settings
                | {
                    "output_dir": folder,
                    "log_every": steps,
                    "eval_every": NEVER,
                    "max_steps": NEVER,
                }
            ),
            on_log=lambda row: turns.next(),
        )


def training_images(a: TrainArguments) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Those of the trainer, by context."""
    return Quad(a.data.resolution, 3, a.data.variant).training(
        a.data.images_per_context,
        a.data.validation_images,
        a.data.validation_fraction,
        a.data.data_seed,
    )


def textbook(rounds: int, steps: int = 3, **settings) -> dict:
    """Images a second, and the loop's time over that of the trainer: `gain` where both do the same,
    and with what the trainer does by default.
    """
    settings = SETTINGS | settings
    contestants = {
        "textbook": (plain_loop, (settings, steps)),
        "trainer, same": (trainer, (settings | FLOAT32 | SAME, steps)),
        "trainer, float32": (trainer, (settings | FLOAT32, steps)),
        "trainer": (trainer, (settings, steps)),
    }
    found = contest(contestants, rounds)
    images = steps * TrainArguments(**settings).optimization.batch_size
    speed = {
        name: rate(images, outcome.seconds) | {"peak_gib": outcome.peak_gib}
        for name, outcome in found.items()
    }
    loop = found["textbook"].seconds
    return speed | {
        "gain": summary(loop, found["trainer, same"].seconds, "speedup"),
        "gain, defaults in float32": summary(loop, found["trainer, float32"].seconds, "speedup"),
        "gain, defaults": summary(loop, found["trainer"].seconds, "speedup"),
    }


def utilisation(rounds: int, steps: int = 3, side: int | None = None, **settings) -> dict:
    """What `train.py` computes a second, as a share of what a matrix product of `side` by `side`
    does in the same precision: 2048, or on a device 16384, which takes it some milliseconds.
    Counted is what the loss and its gradient multiply and add, and of that the convolutions and
    matrix products only."""
    settings = SETTINGS | settings
    side = side or (2048 if Conditions.device.type == "cpu" else 16384)
    a = TrainArguments(**settings)
    contestants = {
        "trainer": (trainer, (settings, steps)),
        "product": (repeat, (_product, side, a.run.precision == "bf16")),
    }
    found = contest(contestants, rounds)
    images, gflop_an_image = steps * a.optimization.batch_size, _operations(a) / 1e9
    work = {"trainer": images * gflop_an_image, "product": 2 * side**3 / 1e9}
    # seconds of a gigaflop
    each = {name: [s / work[name] for s in outcome.seconds] for name, outcome in found.items()}
    return {
        "trainer": rate(images, found["trainer"].seconds) | {"peak_gib": found["trainer"].peak_gib},
        "gflop_an_image": gflop_an_image,
        **{f"{name}, speed": rate(1, seconds, "gflops") for name, seconds in each.items()},
        "share": summary(each["product"], each["trainer"], "utilisation"),
    }


def _product(side: int, bf16: bool) -> Callable[[], None]:
    x = torch.randn(side, side, dtype=torch.bfloat16 if bf16 else torch.float32)

    def multiply() -> None:
        x @ x

    return multiply


def _operations(a: TrainArguments) -> float:
    """Floating-point operations of the loss of an image and its gradient."""
    model = head_on(LightVAE(sample_size=a.data.resolution), settings=a)
    x, targets = (
        torch.rand(a.optimization.batch_size, *model.base.image_shape),
        mixed(model, a.optimization.batch_size),
    )
    with FlopCounterMode(display=False) as counter:
        model(x, targets).loss.backward()
    return counter.get_total_flops() / a.optimization.batch_size


RECIPE = Path(__file__).parents[1] / "configs" / "reproduce" / "quad.yaml"


def quality(rounds: int, steps: int = 1312, images: int = 1280, **settings) -> dict:
    """The loop, the trainer with its recipe, and that for half of the steps: how good they are
    after it on held-out images, and what it took. Rounds are seeds."""
    settings = read_config(str(RECIPE)) | {"tracker": "none"} | settings
    runs = {"trainer": steps, "trainer, half of the images": steps // 2}
    rows: dict[str, list[tuple[float, ...]]] = {name: [] for name in ("textbook", *runs)}
    for seed in range(min(rounds, 3)):
        seeds = {"data_seed": seed, "seed": seed}
        a = TrainArguments(**settings | seeds)
        torch.manual_seed(seed)
        np.random.seed(seed)
        train_images, validation = training_images(a)
        started = Conditions.now()
        loop = Textbook(train_images, a.optimization.batch_size, a.objective.beta, steps)
        for _ in range(steps):
            loop.step()
        taken = Conditions.now() - started
        rows["textbook"].append(
            (
                taken,
                _textbook_loss(loop.model, validation),
                *_distances(loop.model.sample, a, images),
            )
        )
        for name, number in runs.items():
            with tempfile.TemporaryDirectory() as folder:
                started = Conditions.now()
                result = train(
                    TrainArguments(**settings | seeds | {"output_dir": folder, "max_steps": number})
                )
                taken = Conditions.now() - started
                ours = load_model(result.model_dir).eval()
            sample = partial(ours.sample, output_type="np")
            rows[name].append((taken, result.validation, *_distances(sample, a, images)))
    kinds = {
        "time": "seconds",
        "likelihood": "bits_per_pixel",
        "concepts": "distance",
        "compositions": "distance",
    }
    found: dict = {
        who: {
            name: figure(kind, [row[i] for row in measured])
            for i, (name, kind) in enumerate(kinds.items())
        }
        for who, measured in rows.items()
    }
    for who in runs:
        found[who]["time over the loop's"] = summary(
            *([row[0] for row in rows[which]] for which in (who, "textbook"))
        )
    return found | {"images": steps * a.optimization.batch_size}


@torch.no_grad()
def _textbook_loss(model: TextbookVAE, validation: dict[str, np.ndarray]) -> float:
    """The negative ELBO in bits per pixel."""
    nats, count = 0.0, 0
    for name, images in validation.items():
        x = torch.from_numpy(images).permute(0, 3, 1, 2).to(Conditions.device).float() / 255
        nats += sum(model(x, context_vector(name))).item()
        count += len(x)
    return bits_per_pixel(nats / count, *x.shape[-2:])


def _distances(
    sample: Callable[[str, int], np.ndarray], a: TrainArguments, images: int
) -> tuple[float, float]:
    """Mean sliced Wasserstein distances of samples from held-out images: of the training contexts,
    and of pairs never seen.
    """
    real, _ = Quad(a.data.resolution, 3, a.data.variant).held_out_images(images, a.data.data_seed)
    found = {name: sliced_wasserstein(x, sample(name, len(x))) for name, x in real.items()}
    return tuple(
        float(np.mean([found[name] for name in names]))
        for names in (quad.TRAIN_CONTEXTS, quad.PAPER_PAIRS)
    )
