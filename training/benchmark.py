"""Benchmarks: ratios of two things measured in turn in one run, medians of several rounds.

    python training/benchmark.py --output benchmark.json

- `render`: quad images of 64x64 drawn a second, one core.
- `head`: a light VAE's training step at batch 256 with the head, over the same step without it.
- `textbook`: time per image of a training step written the textbook way (float32, one context a batch, dense masked matrices), over ours.
- `full-size`: a training step on the Stable Diffusion autoencoder (random weights) at 512x512, batch 1, in each regime: peak memory of a
  process that does nothing else, and time over that of `end-to-end`.
- `denoise`: a denoising step of a UNet of Stable Diffusion's size (random weights) at 64x64 latents, batch 2, with the head, its projections
  and hooks, over the UNet alone.
- `load`: seconds to load a saved head on that autoencoder, frozen, beyond those to load the autoencoder alone.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn

from hf_intervene import InterventionModel, LightVAE
from hf_intervene.bases import DiffusionBase
from hf_intervene.bases.lora import add_lora
from hf_intervene.data import quad
from hf_intervene.training.arguments import REGIMES, TrainArguments, fast_bf16


# The published configuration of the Stable Diffusion 1 and 2 autoencoders.
STABLE_DIFFUSION = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}

# That of its UNet, version 1; what is not named has this value by default.
STABLE_DIFFUSION_UNET = {"sample_size": 64, "cross_attention_dim": 768}


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


def full_size_step(regime: str, config: dict, threads: int) -> tuple[float, float]:
    """Peak memory of this process in GiB, and seconds of a step, as the trainer does it once `fine-tune` has thawed its base."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = InterventionModel.build(AutoencoderKL(**config), quad.CONCEPTS, **TrainArguments().head_options).train()
    if regime == "lora":
        add_lora(model.base.model, TrainArguments().lora_rank)
    elif regime == "frozen":
        model.base.trainable(False)
    x = torch.rand(1, *model.base.image_shape)
    step = training_step(model, x, model.targets("quad1"), fast_bf16())
    ((seconds,),) = alternate([step], rounds=1)  # the second step: the optimiser has its state
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, seconds


def full_size(rounds: int, config: dict = STABLE_DIFFUSION) -> dict:
    rounds, spawn = min(rounds, 3), multiprocessing.get_context("spawn")  # minutes each
    measured: dict[str, list[tuple[float, float]]] = {regime: [] for regime in REGIMES}
    for _ in range(rounds):
        for regime in REGIMES:
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                measured[regime].append(pool.submit(full_size_step, regime, config, torch.get_num_threads()).result())
    peaks, seconds = ({regime: [row[i] for row in rows] for regime, rows in measured.items()} for i in range(2))
    return {"bf16": fast_bf16()} | {
        regime: {"peak_gib": max(peaks[regime])} | summary(seconds[regime], seconds["end-to-end"]) for regime in REGIMES
    }


@torch.no_grad()
def denoise(rounds: int, config: dict = STABLE_DIFFUSION_UNET, batch_size: int = 2) -> dict:
    """Batch 2 is one image under a text's guidance. The head is run at every step here; in sampling it is run once."""
    dtype = torch.bfloat16 if fast_bf16() else torch.float32
    unet = UNet2DConditionModel(**config).to(dtype).eval()
    text = torch.randn(1, 77, config["cross_attention_dim"])
    model = InterventionModel.build(DiffusionBase(unet, DDIMScheduler(), text=text), quad.CONCEPTS).eval()
    for values in model.base.adapter.projections.values:  # zero in a new head: as after training
        torch.nn.init.normal_(values.weight, std=0.02)
    x, z = torch.randn(batch_size, *model.base.residual_shape), torch.randn(batch_size, *model.noise_shape)
    targets, t = model.targets(["quad1", "size"], batch_size), torch.tensor(500)
    texts = text.to(dtype).expand(batch_size, -1, -1)

    def with_head() -> None:
        model.base.denoise(x, t, model.embed(z, targets))

    def without() -> None:
        model.base.injection.remove()
        unet(x.to(dtype), t, encoder_hidden_states=texts)

    parameters = sum(p.numel() for p in unet.parameters())
    return {"batch_size": batch_size, "dtype": str(dtype), "parameters": parameters} | summary(
        *alternate([with_head, without], rounds)
    )


def load(rounds: int, config: dict = STABLE_DIFFUSION) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        AutoencoderKL(**config).save_pretrained(f"{folder}/vae")
        frozen = InterventionModel.build(AutoencoderKL.from_pretrained(f"{folder}/vae"), quad.CONCEPTS)
        frozen.save_pretrained(f"{folder}/model")
        alone, together = alternate(
            [
                lambda: AutoencoderKL.from_pretrained(f"{folder}/vae"),
                lambda: InterventionModel.from_pretrained(f"{folder}/model"),
            ],
            rounds,
        )
    beyond = torch.quantile(torch.tensor(together) - torch.tensor(alone), torch.tensor([0.25, 0.5, 0.75])).tolist()
    base = torch.tensor(alone).median().item()
    return {"base_seconds": base, "beyond_seconds": beyond[1], "quartiles": [beyond[0], beyond[2]], "rounds": rounds}


BENCHMARKS = {"render": render, "head": head, "textbook": textbook, "full-size": full_size, "denoise": denoise, "load": load}


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
