"""Identifiability with the head itself: does a model that is trained on simulated contexts have the
concepts in their blocks (METHOD section 6)?

    python training/studies/head_identifiability.py --output outputs/head-identifiability

The problems are those of `identifiability.py`, whose estimator is another one. Here an encoder and a
decoder of a few linear layers stand in for the base, and everything else is the library's: head,
ELBO, terms, order of the concepts. Concepts are given in a random order. Every row is a problem with
several seeds; an untrained model stands beside it. A finished job is not run again. Writes
`head-identifiability.json` and `head-identifiability.md`."""  # noqa: E501

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from hf_intervene import InterventionModel
from hf_intervene.bases.base import Base, Encoded
from hf_intervene.bases.likelihoods import gaussian_loss
from hf_intervene.errors import spoken
from hf_intervene.metrics.block_scores import measure_blocks
from hf_intervene.metrics.recovery import score
from hf_intervene.metrics.recovery_data import Simulation, simulate
from hf_intervene.objective import Objective
from hf_intervene.trainer.checkpoints import write_whole
from hf_intervene.trainer.prior import ORDERED, order_by_codes
from hf_intervene.training.studies.rows import run_rows
from hf_intervene.training.studies.seeds import mean_cell, run_name


SAMPLES = 10_000
ROWS: dict[str, dict] = {
    f"{SAMPLES:,} samples a context": {},
    "1,000 samples a context": {"samples": 1000},
    "3 concepts": {"d": 3},
    "12 concepts": {"d": 12},
    "concepts of 2 dimensions": {"d": 3, "width": 2},
    "noise of 0.1": {"noise": 0.1},
    "one concept without a context": {"broken": "missing"},
    "one context that changes nothing": {"broken": "unchanged"},
    "soft interventions": {"broken": "soft"},
    "dependent rows": {"broken": "dependent-rows"},
    "a decoder that is not injective": {"broken": "folded"},
}
MEASURES = ("mcc", "untrained_mcc", "floor", "own_block", "other_block", "untrained_own_block")
SCORED = 800  # samples of the scores of blocks


@dataclass(frozen=True)
class Recipe:
    """
    Args:
        steps, batch_size, learning_rate: of Adam, with one cycle of its learning rate.
        hidden_width: of encoder and decoder, which have three linear layers.
        context_prediction: weight of that term.
        beta_warmup: share of the steps over which the KL gets its weight.
    """

    steps: int = 6000
    batch_size: int = 512
    learning_rate: float = 3e-3
    hidden_width: int = 128
    context_prediction: float = 10.0
    beta_warmup: float = 0.2


class VectorVAE(ModelMixin, ConfigMixin):
    """An encoder and a decoder of vectors, with residual linear maps beside their networks.

    Args:
        size: numbers of a vector.
        latent_width: of the embedding.
        hidden_width: of the networks and of the features.
    """

    @register_to_config
    def __init__(self, size: int, latent_width: int, hidden_width: int):
        super().__init__()
        self.encoder = _network(size, hidden_width, hidden_width)
        self.skip = nn.Linear(size, hidden_width)
        self.decoder = _network(latent_width, hidden_width, size)
        self.log_variance = nn.Parameter(torch.tensor(-2.0))


def _network(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.GELU(),
        nn.Linear(hidden, hidden),
        nn.GELU(),
        nn.Linear(hidden, outputs),
    )


class VectorBase(Base):
    """`VectorVAE` under a head: vectors are images of one row."""

    model: VectorVAE

    def __init__(self, model: VectorVAE):
        super().__init__(model)
        config = model.config
        self.feature_width = config.hidden_width
        self.embedding_shape = (config.latent_width,)
        self.image_shape = (1, 1, config.size)

    def encode(self, pixel_values: torch.Tensor) -> Encoded:
        x = pixel_values.flatten(1)
        features = self.model.encoder(x) + self.model.skip(x)
        return Encoded(features, {"pixel_values": pixel_values})

    def loss(
        self, embedding: torch.Tensor, encoded: Encoded, draws: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        x = encoded.kept["pixel_values"]
        mean = self.generate(embedding, draws)
        return {"reconstruction_loss": gaussian_loss(mean, x, self.model.log_variance)}

    def generate(
        self, embedding: torch.Tensor, draws: Mapping[str, torch.Tensor], **options: Any
    ) -> torch.Tensor:
        return self.model.decoder(embedding).view(-1, *self.image_shape)


@dataclass
class HeadRecovery:
    """What a model says the concepts of vectors are, as `recovery.score` wants it."""

    model: InterventionModel
    center: np.ndarray
    spread: np.ndarray
    order: np.ndarray  # block `order[j]` is that of concept j of the simulation

    @torch.no_grad()
    def encode(self, x: np.ndarray) -> np.ndarray:
        """Posterior means of the concepts of x (n, size): (n, d, width)."""
        vectors = torch.from_numpy((x - self.center) / self.spread).float()
        features = self.model.base.encode(vectors[:, None, None]).features
        nothing = torch.zeros(len(x), self.model.num_blocks)
        mean, _ = self.model.head.posterior(features, nothing)  # (n, D, width)
        return mean[:, self.order].double().numpy()


def build(size: int, d: int, width: int, free_blocks: int, recipe: Recipe) -> InterventionModel:
    """A new model for vectors of this size."""
    blocks = d + free_blocks
    base = VectorBase(VectorVAE(size, blocks * width, recipe.hidden_width))
    return InterventionModel.build(
        base,
        [f"c{j}" for j in range(d)],
        mechanism="flow",
        concept_edges=True,
        concept_width=width,
        free_blocks=free_blocks,
    )


def train(
    model: InterventionModel, contexts: Sequence[torch.Tensor | None], recipe: Recipe, seed: int
) -> None:
    """Train on vectors (n, 1, 1, size) of `obs` and of each concept, in block order; `None` for a
    concept without a context.
    """
    known = [k for k, x in enumerate(contexts) if x is not None]
    targets = torch.zeros(len(contexts), model.num_blocks)
    targets[range(1, len(contexts)), range(len(contexts) - 1)] = 1
    x = torch.cat([contexts[k] for k in known])
    s = torch.cat([targets[k].expand(len(contexts[k]), -1) for k in known])
    strengths = {"context_prediction": recipe.context_prediction}
    objective = Objective.build(model, targets[known], strengths)
    optimizer = torch.optim.Adam(objective.parameters(), recipe.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps
    )
    generator = torch.Generator().manual_seed(seed)
    ordered = {round(share * recipe.steps) for share in ORDERED}
    for step in range(recipe.steps):
        if step in ordered:
            order(model, x, s, generator)
        rows = torch.randint(len(x), (recipe.batch_size,), generator=generator)
        beta = min(1.0, (1 + step) / max(1, round(recipe.beta_warmup * recipe.steps)))
        weights = {name: torch.tensor(w) for name, w in objective.weights(1.0).items()}
        noise = torch.randn(len(rows), *model.draw_shape, generator=generator)
        loss = objective(
            targets=s[rows], weights=weights, pixel_values=x[rows], beta=beta, noise=noise
        ).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(objective.parameters(), 100.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def order(
    model: InterventionModel, x: torch.Tensor, s: torch.Tensor, generator: torch.Generator
) -> None:
    """Put the concepts in the order that their codes suggest, as the trainer does."""
    rows = torch.randperm(len(x), generator=generator)[:5000]
    mean, _ = model.head.posterior(model.base.encode(x[rows]).features, s[rows])
    order_by_codes(model.head, mean, s[rows], generator)


def scores(simulation: Simulation, recovery: HeadRecovery) -> dict:
    """`recovery.score`, and a concept from its own block and from the best other one."""
    found = score(simulation, recovery)
    x, e = simulation.sample(0, SCORED, 2_000_000)
    d, width, dimension = simulation.concepts.shape
    blocks, truth = recovery.encode(x), e @ simulation.concepts.reshape(-1, dimension).T
    measured = [
        measure_blocks(blocks, truth[:, part::width], range(d), resamples=2)
        for part in range(width)
    ]
    for name in ("own_block", "other_block"):
        found[name] = float(np.mean([of[name].value for of in measured]))
    return found


def solve(samples: int = SAMPLES, recipe: Recipe = Recipe(), **problem: Any) -> dict:  # noqa: B008
    """Draw a problem, train a model on it, and score it beside an untrained one.

    Args:
        samples: of each context.
        recipe: of the training.
        **problem: arguments of `simulate`.
    """
    simulation = simulate(**problem)
    d, width, dimension = simulation.concepts.shape
    seed = problem.get("seed", 0)
    torch.manual_seed(seed)
    drawn = [simulation.sample(k, samples, seed)[0] for k in range(d + 1)]
    everything = np.concatenate(drawn)
    center, spread = everything.mean(0), everything.std(0)
    # A random order of the blocks: the simulation's own is causal.
    places = np.random.default_rng(seed).permutation(d)
    contexts: list[torch.Tensor | None] = [None] * (d + 1)
    for k, x in enumerate(drawn):
        if simulation.broken == "missing" and k == simulation.affected + 1:
            continue
        place = 0 if k == 0 else 1 + places[k - 1]
        contexts[place] = torch.from_numpy((x - center) / spread).float()[:, None, None]
    free_blocks = max(1, -(-(dimension - d * width) // width))
    model = build(drawn[0].shape[1], d, width, free_blocks, recipe)
    recovery = HeadRecovery(model, center, spread, places)
    untrained = scores(simulation, recovery)
    train(model, contexts, recipe, seed)
    found = scores(simulation, recovery)
    return found | {
        "untrained_mcc": untrained["mcc"],
        "untrained_own_block": untrained["own_block"],
        "affected": found["correlations"][simulation.affected],
    }


def run_job(name: str, seed: int, folder: Path, recipe: Recipe) -> dict:
    """One row with one seed."""
    path = folder / "jobs" / f"{run_name(name, seed)}.json"
    told = {"problem": ROWS[name], "recipe": asdict(recipe), "seed": seed}
    if path.exists():
        known = json.loads(path.read_text())
        if known["told"] != told:
            raise ValueError(f"{path} is of another recipe: choose another --output, or remove it.")
        return known
    torch.set_num_threads(1)
    start = time.process_time()
    result = solve(recipe=recipe, seed=seed, **ROWS[name])
    result |= {"processor_seconds": time.process_time() - start, "told": told}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(result, indent=1))
    print(f"{name}, seed {seed}: MCC {result['mcc']:.3f}", flush=True)
    return result


def table(results: Mapping[str, Sequence[Mapping]]) -> str:
    """Mean over seeds +- half a 95 % t-interval, by row."""
    lines = [f"| | {' | '.join(MEASURES)} |", "| --- |" + " --- |" * len(MEASURES)]
    for name, rows in results.items():
        cells = [mean_cell([row[measure] for row in rows]) for measure in MEASURES]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def run_steps(name: str, seed: int, folder: Path, steps: int) -> dict:
    """`run_job` of the recipe with so many steps."""
    return run_job(name, seed, folder, replace(Recipe(), steps=steps))


@spoken
def main(argv: Sequence[str] | None = None) -> int:
    return run_rows(argv, __doc__, "head-identifiability", ROWS, Recipe.steps, run_steps, table)


if __name__ == "__main__":
    sys.exit(main())
