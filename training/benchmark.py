"""Benchmarks: ratios of two things measured in turn in one run, medians of several rounds.

    python training/benchmark.py --output benchmark.json

- `render`: quad images of 64x64 drawn a second, one core.
- `head`: a light VAE's training step at batch 256 with the head, over the same step without it.
- `textbook`: time per image of a training step written the textbook way (float32, one context a batch, dense masked matrices), over ours.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from hf_intervene import InterventionModel, LightVAE
from hf_intervene.data import quad
from hf_intervene.training.train import TrainArguments, fast_bf16


def alternate(functions: Sequence[Callable[[], None]], rounds: int) -> list[list[float]]:
    """Seconds of each function, called in turn, after one round of warm-up."""
    seconds: list[list[float]] = [[] for _ in functions]
    for number in range(rounds + 1):
        for function, record in zip(functions, seconds):
            start = time.perf_counter()
            function()
            if number:
                record.append(time.perf_counter() - start)
    return seconds


def summary(numerator: Sequence[float], denominator: Sequence[float]) -> dict:
    """Median and quartiles of the ratios, round by round."""
    ratios = torch.tensor([a / b for a, b in zip(numerator, denominator)])
    quartiles = torch.quantile(ratios, torch.tensor([0.25, 0.5, 0.75])).tolist()
    return {"ratio": quartiles[1], "quartiles": [quartiles[0], quartiles[2]], "rounds": len(ratios)}


def render(rounds: int) -> dict:
    latents = quad.sample_latents("obs", 2048)
    (seconds,) = alternate([lambda: quad.render(latents, 64)], rounds)
    return {"images_per_second": 2048 / torch.tensor(seconds).median().item()}


def training_step(model: InterventionModel, x: torch.Tensor, targets: torch.Tensor, autocast: bool) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(x, targets).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def build(ablation: str | None = None) -> InterventionModel:
    return InterventionModel.build(LightVAE(), quad.CONCEPTS, ablation=ablation, **TrainArguments().head_options).train()


def head(rounds: int, batch_size: int = 256) -> dict:
    x = torch.rand(batch_size, 3, 64, 64)
    with_head, without = build(), build("base")
    targets = with_head.targets(torch.eye(7)[torch.arange(batch_size) % 7, 1:])
    autocast = fast_bf16()
    steps = [training_step(model, x, targets, autocast) for model in (with_head, without)]
    return {"batch_size": batch_size, "bf16": autocast} | summary(*alternate(steps, rounds))


class DenseMaskedHead(nn.Module):
    """The head as one would write it first: dense matrices under 0/1 masks, one context per forward pass."""

    def __init__(self, blocks: int, noise_width: int, width: int, embedding: int):
        super().__init__()
        middle = (noise_width + width) // 2
        self.obs, self.int = (nn.Linear(blocks * noise_width, blocks * noise_width) for _ in range(2))
        self.layers = nn.ModuleList(nn.Linear(blocks * a, blocks * b) for a, b in ((noise_width, middle), (middle, width)))
        self.edges_obs, self.edges_int = (nn.Linear(blocks * width, blocks * width) for _ in range(2))
        self.unpool = nn.Linear(blocks * width, embedding)
        self.blocks, self.sizes = blocks, (noise_width, middle, width)

    def forward(self, z: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        def masked(layer: nn.Linear, mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, layer.weight * mask, layer.bias)

        eye, (n, m, w) = torch.eye(self.blocks), self.sizes
        diagonal = torch.kron(eye, torch.ones(n, n))
        rows = context.repeat_interleave(n)
        x = nn.functional.gelu((1 - rows) * masked(self.obs, diagonal, z) + rows * masked(self.int, diagonal, z))
        for layer, (a, b) in zip(self.layers, ((n, m), (m, w))):
            x = masked(layer, torch.kron(eye, torch.ones(b, a)), x)
            x = nn.functional.gelu(nn.functional.layer_norm(x.view(-1, self.blocks, b), (b,)).flatten(1))
        off = torch.kron((1 - eye) * (1 - context)[:, None], torch.ones(w, w))
        source = context.repeat_interleave(w)
        x = x + masked(self.edges_obs, off * (1 - source), x) + masked(self.edges_int, off * source, x)
        return self.unpool(x)


def textbook(rounds: int, batch_size: int = 64) -> dict:
    ours = build()
    targets = ours.targets(torch.eye(7)[torch.arange(batch_size) % 7, 1:])
    x = torch.rand(batch_size, 3, 64, 64)
    step = training_step(ours, x, targets, fast_bf16())

    vae, blocks, n = LightVAE(), 7, 32
    dense = DenseMaskedHead(blocks, n, 8, 128)
    readout = nn.Linear(128, 2 * blocks * n)
    optimizer = torch.optim.Adam([*vae.parameters(), *dense.parameters(), *readout.parameters()], 1e-4)

    def plain() -> None:
        mean, logvar = readout(vae.encoder(x)).chunk(2, 1)
        z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        logits = vae.decode(dense(z, torch.eye(blocks)[0])).sample
        loss = nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        loss = (loss + 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum()) / batch_size
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return {"batch_size": batch_size} | summary(*alternate([plain, step], rounds))


BENCHMARKS = {"render": render, "head": head, "textbook": textbook}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmarks", nargs="*", choices=[*BENCHMARKS, []], help="default: all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", help="JSON file")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    results = {"threads": arguments.threads, "torch": torch.__version__}
    for name in arguments.benchmarks or BENCHMARKS:
        results[name] = BENCHMARKS[name](arguments.rounds)
        print(name, json.dumps(results[name]), flush=True)
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
