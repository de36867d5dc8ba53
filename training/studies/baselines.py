"""Baselines on the encoder, decoder, data, steps and optimiser of the light VAE, trained and
measured in one job (METHOD section 5).

    python training/studies/baselines.py --baseline beta-tcvae --config training/configs/ablation.yaml --output_dir outputs/tc --weight 6
    python training/studies/baselines.py --explain quad --resolution 64

Every setting of `TrainArguments` holds here too; those of the head, its penalties and anything but
a new light VAE do not apply. As in train.py the weights of the best validation ELBO are kept. A
finished job is not run again. Writes `model/`, `metrics/metrics.json` and `metrics/metrics.md`.
`--explain` trains nothing: it prints what images without any content score, to read published
figures by.

How a baseline samples a context:

- `conditional-vae`: z from N(0, I), with the multi-hot vector of the context; of a composition, the
  sum of its concepts'.
- The others know no contexts when they decode. After training, the aggregate posterior of each
  context's training images is taken as a Gaussian, N(mu_k, S_k), and z comes from it. Of a
  composition of a and b: mu_obs + (mu_a - mu_obs) + (mu_b - mu_obs), covariances alike, negative
  eigenvalues raised to 0: the additive arithmetic that a practitioner would try first.

Their ELBO, in bits per pixel, is under the prior of their objective, N(0, I).
"""  # noqa: E501

import copy
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from hf_intervene.contexts import OBS
from hf_intervene.data import ContextImages, ContextSchedule
from hf_intervene.errors import spoken
from hf_intervene.evaluation import evaluate, held_out_images, table, versions, write
from hf_intervene.evaluation.setup import content_options
from hf_intervene.metrics.reconstruction import bits_per_pixel
from hf_intervene.metrics.transport import PROTOCOLS, directions, project, sliced_w2
from hf_intervene.trainer.building import build_model, lay_out, load_data
from hf_intervene.trainer.checkpoints import atomic_folder, check_writable
from hf_intervene.trainer.distributed import Weights, new_accelerator
from hf_intervene.trainer.optimizer import build_optimizer
from hf_intervene.trainer.parsing import RecipeParser, parse_arguments
from hf_intervene.trainer.schedules import beta_of, learning_rate_factor
from hf_intervene.trainer.settings import TrainArguments
from hf_intervene.trainer.simulated import SIMULATED
from hf_intervene.trainer.validation import model_inputs, step_noise, validation_loss
from hf_intervene.training.studies.baseline_losses import beta_tcvae
from hf_intervene.training.studies.baseline_model import BASELINES, WEIGHTS, Baseline


# Settings of train.py that a baseline has no use for: any other value than the default is an error.
FIXED = (
    "base",
    "base_norm",
    "regime",
    "ablation",
    "gradient_accumulation_steps",
    "ema_decay",
    "resume",
    "residual_layers",
)


class Pairs:
    """Batches of Ada-GVAE from two schedules: B / 2 observational images, then B / 2 of the other
    contexts.
    """

    def __init__(self, data: ContextImages, kind: str, batch_size: int, seed: int):
        if batch_size % 2:
            raise ValueError(
                f"ada-gvae trains on pairs: batch_size must be even, not {batch_size}."
            )
        observational = data.context_ids == data.contexts.index(OBS)
        self.parts = []
        for number, chosen in enumerate((observational, ~observational)):
            rows = torch.nonzero(chosen)[:, 0]
            ids = data.context_ids[rows].unique(return_inverse=True)[1]
            self.parts.append(
                (rows, ContextSchedule(ids, kind, batch_size // 2, 2 * seed + number))
            )

    def next_batch(self) -> torch.Tensor:
        return torch.cat([rows[schedule.next_batch()] for rows, schedule in self.parts])


def new_baseline(a: TrainArguments, baseline: str, data: ContextImages) -> Baseline:
    """A baseline on the light VAE of these settings."""
    return Baseline(build_model(a, data).base.model.requires_grad_(True), data.concepts, baseline)


def train_baseline(
    a: TrainArguments,
    baseline: str,
    weight: float,
    on_validation: Callable[[int, Baseline], None] | None = None,
) -> Baseline:
    """Train a baseline.

    Args:
        a: the settings.
        baseline: one of `BASELINES`.
        weight: of the total correlation (beta-tcvae) or the triplets (tvae), nats.
        on_validation: called after each validation with the steps done and the model.

    Raises:
        ValueError, FloatingPointError: one sentence: settings or data that do not fit, a loss that
            is not finite.
    """
    given, default = a.flat(), TrainArguments().flat()
    for name in FIXED:
        if given[name] != default[name]:
            raise ValueError(
                f"a baseline is a new light VAE, trained end to end: leave {name} at"
                f" {default[name]!r}."
            )
    data, validation = load_data(a)
    missing = [name for name in (OBS, *data.concepts) if name not in data.contexts]
    if missing:
        raise ValueError(
            f"the data have no images of {', '.join(missing)} alone, which a baseline samples these"
            " contexts by."
        )
    accelerator = new_accelerator(mixed_precision=a.run.precision)
    torch.manual_seed(a.optimization.seed)
    model = new_baseline(a, baseline, data).to(accelerator.device)
    lay_out(model.base.model, accelerator.device, a.run.precision)
    targets = data.targets().to(accelerator.device)  # (contexts, d)
    pairs = baseline == "ada-gvae"
    schedule = (Pairs if pairs else ContextSchedule)(
        data if pairs else data.context_ids,
        a.data.schedule,
        a.optimization.batch_size,
        a.optimization.seed,
    )
    per_epoch = max(1, round(len(data) / a.optimization.batch_size))
    total = a.optimization.total_steps(len(data))
    eval_every = a.run.eval_every or per_epoch
    optimizer = build_optimizer(
        a, Weights(accelerator, model), list(model.parameters()), set(model.base.parameters())
    )
    optimizer = accelerator.prepare_optimizer(optimizer)
    best, waited, kept = math.inf, 0, None
    for step in tqdm(range(total), disable=None, desc=baseline):
        model.train()
        rows = schedule.next_batch()
        noise = step_noise(model, a.optimization.seed, step, a.optimization.batch_size)["noise"].to(
            accelerator.device
        )
        x = model_inputs(data, None, rows, accelerator.device)["pixel_values"]
        ids = data.context_ids[rows].to(accelerator.device)
        beta = beta_of(a, step, total)
        for group in optimizer.param_groups:
            group["lr"] = a.optimization.learning_rate * learning_rate_factor(a, step, total)
        with accelerator.autocast():
            loss = model.objective(x, targets[ids], ids, noise, beta, weight, len(data))
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), a.optimization.max_grad_norm)
        optimizer.step()
        if (step + 1) % eval_every == 0 or step + 1 == total:
            score = validation_loss(model, validation, None, a.optimization.seed + 1, accelerator)
            if not math.isfinite(score):
                raise FloatingPointError(
                    f"the loss at step {step + 1} is not finite: lower the learning rate or the"
                    " weights."
                )
            if on_validation is not None:
                on_validation(step + 1, model)
            waited += 1
            if score < best:
                best, waited, kept = score, 0, copy.deepcopy(model.state_dict())
            if waited >= a.run.patience:
                break
    model.load_state_dict(kept)
    if not model.conditional:
        model.fit_contexts(data)
    return model.eval()


def references(a: TrainArguments, images: int) -> str:
    """Markdown table of what images without content score: to tell by published figures whether a
    model had learnt anything.

    Distances are means over the contexts of each kind. Bits per pixel are the Bernoulli negative
    log-likelihood of the held-out images of all training contexts, without a KL: of real images
    their entropy, which no model comes below; of the mean training image what a collapsed VAE ends
    at. The last row is the best that a decoder can do whose output passes a sigmoid twice (an easy
    mistake with losses that take logits, by which no pixel falls below 0.5 or rises above 0.73).

    Args:
        a: the settings: data and light VAE.
        images: of each context, a side.
    """
    simulated = SIMULATED[a.data.dataset](
        a.data.resolution, a.data.channels, a.data.variant, a.data.mnist_digits
    )
    real, other = simulated.held_out_images(images, 0)
    data, _ = load_data(a)
    shape = next(iter(real.values())).shape[1:]
    mean = (
        data.pixels.double().mean(0).permute(1, 2, 0).numpy().astype(np.float32) / 255
    )  # (H, W, C)
    torch.manual_seed(a.optimization.seed)
    model = new_baseline(a, "tvae", data).eval()
    untrained = model.sample(OBS, images, torch.Generator().manual_seed(0), output_type="np")
    rng = np.random.default_rng(0)
    low, high = 0.5, 1 / (1 + math.exp(-1))
    makers = {
        "real images": lambda name: other[name] / np.float32(255),
        "mean training image": lambda name: mean[None],
        "grey 0.5": lambda name: np.full((1, *shape), 0.5, np.float32),
        "untrained decoder": lambda name: untrained,
        "uniform noise": lambda name: rng.random((images, *shape), dtype=np.float32),
        "real images in the range of two sigmoids": lambda name: np.clip(
            other[name] / np.float32(255), low, high
        ),
    }
    axes = directions(math.prod(shape), 500, 0)
    lines = [
        (
            "| images | concept, paper's | composition, paper's | concept | composition | bits per"
            " pixel |"
        ),
        "| --- " * 6 + "|",
    ]
    truth = {name: project(x, axes) for name, x in real.items()}
    for label, make in makers.items():
        distances, bits = {}, []
        for name, x in real.items():
            made = make(name)
            projected, kind = project(made, axes), "composition" if "+" in name else "concept"
            distances.setdefault((kind, "paper"), []).append(
                sliced_w2(truth[name][:1280], projected[:64])
            )
            distances.setdefault((kind, "independent"), []).append(
                sliced_w2(truth[name], projected)
            )
            if kind == "concept":
                x = x / np.float32(255)
                p = (
                    x
                    if label == "real images"
                    else np.clip(x, low, high)
                    if label.startswith("real")
                    else made[: len(x)]
                )
                bits.append(bernoulli_bits(x, p))
        cells = [
            np.mean(distances[kind, p])
            for p in ("paper", "independent")
            for kind in ("concept", "composition")
        ]
        lines.append(
            f"| {label} | " + " | ".join(f"{value:.3f}" for value in (*cells, np.mean(bits))) + " |"
        )
    return "\n".join(lines) + "\n"


def bernoulli_bits(images: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean negative log-likelihood, in bits per pixel, of images in [0, 1], (n, H, W, C), under
    Bernoulli probabilities, (n or 1, H, W, C), which are kept 1e-6 from 0 and 1."""
    x, p = torch.from_numpy(images), torch.from_numpy(probabilities).clamp(1e-6, 1 - 1e-6)
    nats = nn.functional.binary_cross_entropy(p.expand_as(x), x, reduction="sum").item() / len(x)
    return bits_per_pixel(nats, *images.shape[1:3])


def run(
    a: TrainArguments,
    baseline: str,
    weight: float | None,
    images: int,
    held_out_seed: int,
    singles: bool = False,
) -> dict:
    """Train and measure; the metrics, those on the disk if the job is finished. `singles`: on
    `obs` and single concepts only.

    Raises:
        OSError, ValueError, FloatingPointError, ImportError: one sentence.
    """
    if weight is not None and baseline not in WEIGHTS:
        raise ValueError(f"{baseline} has no weight of its own: leave --weight out.")
    if weight is not None and not weight >= 0:
        raise ValueError(f"weight must not be negative: {weight}.")
    weight = WEIGHTS.get(baseline, 0.0) if weight is None else weight
    out = Path(a.run.output_dir)
    settings = {
        "baseline": baseline,
        "weight": weight,
        "images": images,
        "held_out_seed": held_out_seed,
        "singles": singles,
    }
    settings |= {key: value for key, value in a.flat().items() if key != "output_dir"}
    finished = out / "metrics" / "metrics.json"
    if finished.exists():
        metrics = json.loads(finished.read_text())
        changed = [key for key in settings if metrics["settings"].get(key) != settings[key]]
        if changed:
            raise ValueError(
                f"{out} holds a job with another {changed[0]}: choose another output_dir."
            )
        return metrics
    for folder in ("model", "metrics"):
        check_writable(out / folder)
    if baseline == "beta-tcvae":
        beta_tcvae()  # now, not after the data are drawn
    split = (a.data.validation_fraction, a.data.data_seed, a.data.split_by)
    started = time.perf_counter()
    model = train_baseline(a, baseline, weight)
    seconds = time.perf_counter() - started
    with atomic_folder(out / "model", ("*.json", "*.safetensors")) as folder:
        model.save(folder)
    channels, side, _ = model.base.image_shape
    data, digits = (side, channels, a.data.variant), a.data.mnist_digits
    real, other_real = held_out_images(
        a.data.dataset,
        model.concepts,
        images,
        held_out_seed,
        *data,
        split,
        digits,
        singles=singles,
    )
    # Presence by a detector of true attributes, where the data set knows them.
    simulated = SIMULATED.get(a.data.dataset)
    known = simulated is not None and simulated(*data, digits).labelled(1) is not None
    content = content_options(
        a.data.dataset,
        model.concepts,
        *data,
        digits,
        split,
        other_real,
        held_out_seed,
        a.data.images_per_context if known else 0,
    )
    metrics = evaluate(model, real, other_real, PROTOCOLS, seed=held_out_seed, **content)
    metrics |= {"settings": settings, "seconds": seconds}
    metrics["versions"] = versions()
    write(metrics, out / "metrics")
    return metrics


@spoken
def main(argv: Sequence[str] | None = None) -> int:
    parser = RecipeParser(
        description=__doc__.splitlines()[0],
        epilog="and any setting of train.py",
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--baseline", choices=BASELINES)
    what.add_argument(
        "--explain",
        choices=SIMULATED,
        help="print what images without content score on this data set",
    )
    parser.add_argument(
        "--weight", type=float, help="beta-tcvae: of the total correlation; tvae: of the triplets"
    )
    parser.add_argument(
        "--images", type=int, default=1280, help="images a side of each distance (default 1280)"
    )
    parser.add_argument(
        "--held_out_seed", type=int, default=0, help="of held-out images, noise and directions"
    )
    parser.add_argument(
        "--singles", action="store_true", help="measure obs and single concepts only, for tuning"
    )
    own, rest = parser.parse_known_args(argv)
    if own.explain:
        print(references(parse_arguments([*rest, "--dataset", own.explain]), own.images))
    else:
        print(
            table(
                run(
                    parse_arguments(rest),
                    own.baseline,
                    own.weight,
                    own.images,
                    own.held_out_seed,
                    own.singles,
                )
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
