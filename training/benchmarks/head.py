"""Benchmarks of the head alone, of mixtures of contexts, of the distances of an evaluation, and of
samples from the pipeline in the package."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
import torch

from hf_intervene import (
    InterventionConfig,
    InterventionHead,
    InterventionModel,
    InterventionPipeline,
    LightVAE,
    bundled,
)
from hf_intervene.metrics.transport import directions, project, sliced_w2
from hf_intervene.trainer.sections import HeadSettings, fast_bf16
from hf_intervene.training.benchmarks.bases import head_on
from hf_intervene.training.benchmarks.tools import Conditions, alternate, figure, summary


RANK = 16


def concepts(
    rounds: int, numbers: Sequence[int] = (2, 8, 32, 128, 512), batch_size: int = 64
) -> dict:
    """Forward and backward of the paper's heads of more and more concepts, every sample in the
    context of one of them: with full and with low-rank weights among concepts, and the posterior's
    readout.

    `slope` is d log(time) / d log(number of concepts) between the two largest numbers, 1 if the
    cost is linear."""
    functions: dict[tuple[str, int], Callable[[], None]] = {}
    for d in numbers:
        with Conditions.device:
            functions |= _functions_of(d, batch_size)
    seconds = dict(zip(functions, alternate(list(functions.values()), rounds)))
    results: dict[str, dict] = {"batch_size": batch_size, "rank": RANK}
    for (kind, d), times in seconds.items():
        results.setdefault(kind, {})[f"{d} concepts"] = figure(
            "milliseconds", [1e3 * t for t in times]
        )
    for kind in [key for key in results if isinstance(results[key], dict)]:
        few, many = (torch.tensor(seconds[kind, d]).median().item() for d in numbers[-2:])
        results[kind]["slope"] = math.log(many / few) / math.log(numbers[-1] / numbers[-2])
    results["low_rank_over_full"] = {
        f"{d} concepts": summary(seconds["low_rank", d], seconds["full", d]) for d in numbers
    }
    return results


def _functions_of(d: int, batch_size: int) -> dict[tuple[str, int], Callable[[], None]]:
    functions: dict[tuple[str, int], Callable[[], None]] = {}
    names = [f"c{j}" for j in range(d)]
    targets = torch.cat([torch.zeros(1, d + 1), torch.eye(d, d + 1)])[
        torch.arange(batch_size) % (d + 1)
    ]
    z = torch.randn(batch_size, d + 1, HeadSettings.noise_width, requires_grad=True)
    for kind, rank in (("full", None), ("low_rank", RANK)):
        head = InterventionHead(InterventionConfig(concepts=names, intervention_rank=rank))
        forward = partial(_embedding, head, z, targets)
        functions[kind, d] = _gradients(forward, [z, *_of_the_way_to_e(head)])
        if fast_bf16():
            functions[f"{kind}_bf16", d] = _gradients(
                _under_bf16(forward), [z, *_of_the_way_to_e(head)]
            )
    features = torch.randn(batch_size, head.config.feature_width, requires_grad=True)
    functions["posterior", d] = _gradients(
        lambda: torch.cat(head.posterior(features, targets)),
        [features, *head.encoder_readout.parameters()],
    )
    return functions


def _embedding(head: InterventionHead, z: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return head(z, targets).embedding


def _of_the_way_to_e(head: InterventionHead) -> list[torch.nn.Parameter]:
    return [
        parameter
        for name, parameter in head.named_parameters()
        if not name.startswith("encoder_readout")
    ]


def _gradients(
    forward: Callable[[], torch.Tensor], inputs: Iterable[torch.Tensor]
) -> Callable[[], None]:
    inputs = list(inputs)
    gradient = torch.randn_like(forward())
    return lambda: torch.autograd.grad(forward(), inputs, gradient) and None


def _under_bf16(forward: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        with Conditions.autocast():
            return forward()

    return run


def contexts(rounds: int, batch_size: int = 64, resolution: int = 64) -> dict:
    """One forward and backward pass for a batch of 7 (the training contexts of quad) or 64 contexts
    (all subsets of six concepts), against one pass for each of its contexts: of the head alone, and
    of the light VAE with a head."""
    with Conditions.device:
        model = head_on(LightVAE(sample_size=resolution))
        x, z = (
            torch.rand(batch_size, 3, resolution, resolution),
            torch.randn(batch_size, *model.noise_shape),
        )
    subsets = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 6)  # (64, 6)
    results = {"batch_size": batch_size, "bf16": fast_bf16()}
    for number, rows in ((7, subsets[subsets.sum(1) <= 1]), (64, subsets)):
        targets = model.targets(rows[torch.arange(batch_size) % number])
        parts = [torch.arange(first, batch_size, number) for first in range(number)]
        for name, loss in (
            (
                "head",
                lambda rows, s=targets: (
                    model.head(z[rows], s[rows]).embedding.float().square().mean()
                ),
            ),
            ("light VAE", lambda rows, s=targets: model(x[rows], s[rows]).loss),
        ):
            mixed, single = (
                _passes(model, loss, batches) for batches in ([torch.arange(batch_size)], parts)
            )
            mixed, single = alternate([mixed, single], rounds)
            results[f"{name}, {number} contexts"] = summary(single, mixed, "speedup")
    return results


def _passes(
    model: InterventionModel, loss: Callable, batches: Sequence[torch.Tensor]
) -> Callable[[], None]:
    """A forward and a backward pass for each batch of rows."""

    def run() -> None:
        for rows in batches:
            with Conditions.autocast():
                part = loss(rows)
            part.backward()
        model.zero_grad()

    return run


def evaluation(rounds: int, number: int = 10_000, num_projections: int = 500) -> dict:
    """The sliced Wasserstein distance of two sets of so many 3x64x64 images, uint8 as an evaluation
    has them, for the same directions: ours against POT's (NumPy and torch; images converted to
    float first), and what comes after the projection against POT's."""
    import ot

    rng = np.random.default_rng(0)
    sets = [rng.integers(0, high, (number, 64, 64, 3), dtype=np.uint8) for high in (256, 250)]
    axes = directions(sets[0][0].size, num_projections)
    found: dict[str, float] = {}

    def ours() -> None:
        found["ours"] = sliced_w2(*(project(x, axes) for x in sets))

    def pot(backend: Callable) -> None:
        a, b = (backend(x.reshape(number, -1).astype(np.float32) / 255) for x in sets)
        found["pot"] = float(ot.sliced_wasserstein_distance(a, b, projections=backend(axes), p=2))

    projected = [project(x, axes) for x in sets]
    seconds = alternate(
        [
            ours,
            lambda: pot(np.asarray),
            lambda: pot(torch.from_numpy),
            lambda: sliced_w2(*projected),
            lambda: ot.wasserstein_1d(*projected, p=2),
        ],
        rounds,
    )
    exact = float(
        np.sqrt(ot.wasserstein_1d(*(x.astype(np.float64) for x in projected), p=2).mean())
    )
    return {
        "images": number,
        "projections": num_projections,
        "difference": abs(found["ours"] - found["pot"]),
        "difference_of_float64": abs(found["ours"] - exact),
        "ours": figure("seconds", seconds[0]),
        "over POT": summary(seconds[1], seconds[0], "speedup"),
        "over POT with torch": summary(seconds[2], seconds[0], "speedup"),
        "projected, over POT": summary(seconds[4], seconds[3], "speedup"),
    }


def few_steps(rounds: int, num_images: int = 8, steps: int = 10) -> dict:
    """Images of `bundled("avatars")` under two concepts, from the call to PIL images: as they come,
    without guidance, and in 50 steps."""
    pipe = InterventionPipeline.from_pretrained(bundled("avatars")).to(Conditions.device)
    draw = partial(pipe, ["glasses", "hat"], num_images)
    guided, plain, many = alternate(
        [
            partial(draw, num_inference_steps=steps),
            partial(draw, num_inference_steps=steps, guidance_scale=1.0),
            partial(draw, num_inference_steps=50),
        ],
        rounds,
    )
    return {
        "images": num_images,
        "steps": steps,
        "as they come": figure("seconds", guided),
        "guided over unguided": summary(guided, plain),
        "50 steps over these": summary(many, guided),
    }
