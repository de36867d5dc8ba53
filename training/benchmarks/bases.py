"""Bases with a head over the same bases without: training steps, sampling, loading."""

import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from torch import nn

from hf_intervene import InterventionModel, LightVAE
from hf_intervene.bases import DiffusionBase
from hf_intervene.bases.lora import add_lora
from hf_intervene.data import ContextImages, quad
from hf_intervene.data.images import MIN_IMAGES
from hf_intervene.trainer.building import build_objective
from hf_intervene.trainer.pretraining import new_autoencoder, new_unet
from hf_intervene.trainer.sections import REGIMES, BaseSettings, fast_bf16
from hf_intervene.trainer.settings import TrainArguments
from hf_intervene.training.benchmarks.tools import (
    Conditions,
    alternate,
    contest,
    figure,
    over,
    peak_gib,
    repeat,
    summary,
)


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

SAMPLING_STEPS = 5


def training_step(model: nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """A step of AdamW on a loss, as the trainer does it."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], 1e-4, fused=True
    )

    def step() -> None:
        with Conditions.autocast():
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def head_on(
    base: nn.Module, ablation: str | None = None, settings: TrainArguments | None = None
) -> InterventionModel:
    options = (settings or TrainArguments()).head.configuration() | {"ablation": ablation}
    return InterventionModel.build(base, quad.CONCEPTS, **options).train()


def mixed(model: InterventionModel, batch_size: int) -> torch.Tensor:
    """Targets (B, D) of all training contexts."""
    return model.targets(torch.eye(7)[torch.arange(batch_size) % 7, 1:])


def model_step(model: InterventionModel, batch_size: int) -> Callable[[], None]:
    x, targets = torch.rand(batch_size, *model.base.image_shape), mixed(model, batch_size)
    return training_step(model, lambda: model(x, targets).loss)


def model_sampling(model: InterventionModel, batch_size: int, **options) -> Callable[[], None]:
    model.eval()
    return lambda: model.sample(["quad1", "size"], batch_size, **options)


# The light VAE: without a head it has its own posterior and prior.


def light_step(ablation: str | None, batch_size: int, config: dict) -> Callable[[], None]:
    return model_step(head_on(LightVAE(**config), ablation), batch_size)


def light_sampling(ablation: str | None, batch_size: int, config: dict) -> Callable[[], None]:
    return model_sampling(head_on(LightVAE(**config), ablation), batch_size)


def head(rounds: int, batch_size: int = 256, config: dict | None = None) -> dict:
    arguments = {
        "head": (None, batch_size, config or {}),
        "base": ("base", batch_size, config or {}),
    }
    return {"batch_size": batch_size} | with_and_without(
        rounds, light_step, light_sampling, arguments
    )


def with_and_without(
    rounds: int, step: Callable, sampling: Callable, arguments: dict[str, tuple]
) -> dict:
    """Training steps and sampling of `"head"` over those of `"base"`; the head's own part over that
    step.
    """
    found = {}
    for what, make in (("training", step), ("sampling", sampling)):
        contestants = {name: (repeat, (make, *arguments[name])) for name in ("head", "base")}
        if what == "training":
            contestants["alone"] = repeat, (head_alone, arguments["head"][1])
        outcomes = contest(contestants, rounds)
        found[what] = over(outcomes, "head", "base")
        if what == "training":
            found["head alone, training"] = summary(
                outcomes["alone"].seconds, outcomes["base"].seconds
            )
    return found


def head_alone(batch_size: int) -> Callable[[], None]:
    """From features to the embedding and back: what the head itself adds to a training step."""
    model = head_on(LightVAE())
    targets, features = (
        mixed(model, batch_size),
        torch.randn(batch_size, model.base.feature_width, requires_grad=True),
    )

    def step() -> None:
        with Conditions.autocast():
            mean, logvar = model.head.posterior(features, targets)
            draw = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
            embedding = model.head.embed_draw(draw, targets)
            kl = model.head.kl(mean, logvar, targets, draw)
        (embedding.float().sum() + kl.sum()).backward()
        model.zero_grad()

    return step


# The terms beside the ELBO.

TERMS: dict[str, dict[str, float]] = {
    "ELBO alone": {"context_prediction": 0.0, "edit_consistency": 0.0, "free_invariance": 0.0},
    "context prediction": {"edit_consistency": 0.0, "free_invariance": 0.0},
    "edit consistency": {"context_prediction": 0.0, "free_invariance": 0.0},
    "free invariance": {"context_prediction": 0.0, "edit_consistency": 0.0},
    "all": {},  # the defaults
}


def objective_step(kind: str, batch_size: int, config: dict) -> Callable[[], None]:
    """A training step of the light VAE with these terms, at their full weights."""
    settings = TrainArguments(**TERMS[kind])
    model = head_on(LightVAE(**config), settings=settings)
    x, targets = torch.rand(batch_size, *model.base.image_shape), mixed(model, batch_size)
    images = np.zeros((MIN_IMAGES, *x.shape[2:], 3), np.uint8)  # only their contexts count
    data = ContextImages.from_arrays(dict.fromkeys(quad.TRAIN_CONTEXTS, images), quad.CONCEPTS)
    objective = build_objective(settings, model, data)
    weights = {name: torch.tensor(weight) for name, weight in objective.weights(1.0).items()}

    def loss() -> torch.Tensor:
        draws = objective.draws(batch_size, torch.default_generator)  # on the host
        noise = {name: value.to(x.device) for name, value in draws.items()}
        return objective(targets=targets, weights=weights, pixel_values=x, **noise).loss

    return training_step(objective, loss)


def terms(rounds: int, batch_size: int = 64, config: dict | None = None) -> dict:
    contestants = {
        kind: (repeat, (objective_step, kind, batch_size, config or {})) for kind in TERMS
    }
    outcomes = contest(contestants, rounds)
    first, *others = TERMS
    return {"batch_size": batch_size} | {kind: over(outcomes, kind, first) for kind in others}


# An AutoencoderKL: alone as latent diffusion trains it (see pretrain.py), with a fixed variance of
# the pixels.


def autoencoder_step(kind: str, batch_size: int, config: dict | int) -> Callable[[], None]:
    vae = _autoencoder(config).train()
    if kind == "head":
        return model_step(head_on(vae), batch_size)
    x = 2 * torch.rand(batch_size, 3, vae.config.sample_size, vae.config.sample_size) - 1

    def loss() -> torch.Tensor:
        posterior = vae.encode(x).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        return ((decoded.float() - x).square().flatten(1).sum(1) + 1e-2 * posterior.kl()).mean()

    return training_step(vae, loss)


@torch.no_grad()
def autoencoder_sampling(kind: str, batch_size: int, config: dict | int) -> Callable[[], None]:
    vae = _autoencoder(config).eval()
    if kind == "head":
        return model_sampling(head_on(vae), batch_size)
    latents = vae.encode(
        torch.zeros(1, 3, vae.config.sample_size, vae.config.sample_size)
    ).latent_dist.mean
    latents = torch.randn(batch_size, *latents.shape[1:])

    @torch.no_grad()
    def sample() -> None:
        # pixels in [0, 1], as a pipeline's
        VaeImageProcessor.denormalize(vae.decode(latents).sample)

    return sample


def _autoencoder(config: dict | int) -> AutoencoderKL:
    return new_autoencoder(config) if isinstance(config, int) else AutoencoderKL(**config)


def autoencoder(rounds: int, batch_size: int = 16, config: dict | int = 64) -> dict:
    """`config`: of diffusers, or the side of the images of the one that pretrain.py makes."""
    arguments = {kind: (kind, batch_size, config) for kind in ("head", "base")}
    return {"batch_size": batch_size} | with_and_without(
        rounds, autoencoder_step, autoencoder_sampling, arguments
    )


def full_size_head(rounds: int, config: dict = STABLE_DIFFUSION | {"sample_size": 256}) -> dict:
    """Images of 256x256, so that two models fit into the memory of a small machine; larger ones
    cost the base more, and the head the same.
    """
    return autoencoder(min(rounds, 5), 1, config)  # a minute each


# A UNet2DModel in pixels: alone as a DDPM is trained, and sampled by DDIM.


def unet_step(kind: str, batch_size: int, resolution: int) -> Callable[[], None]:
    unet, scheduler = new_unet(resolution).train(), DDIMScheduler(prediction_type="v_prediction")
    if kind == "head":
        return model_step(head_on(DiffusionBase(unet, scheduler)), batch_size)
    x = 2 * torch.rand(batch_size, 3, resolution, resolution) - 1

    def loss() -> torch.Tensor:
        noise, t = torch.randn_like(x), torch.randint(1000, (batch_size,), device=x.device)
        predicted = unet(scheduler.add_noise(x, noise, t), t).sample
        return (
            (predicted.float() - scheduler.get_velocity(x, noise, t))
            .square()
            .flatten(1)
            .sum(1)
            .mean()
        )

    return training_step(unet, loss)


def unet_sampling(kind: str, batch_size: int, resolution: int) -> Callable[[], None]:
    unet, scheduler = new_unet(resolution).eval(), DDIMScheduler(prediction_type="v_prediction")
    if kind == "head":
        return model_sampling(
            head_on(DiffusionBase(unet, scheduler)), batch_size, num_inference_steps=SAMPLING_STEPS
        )

    @torch.no_grad()
    def sample() -> None:
        x = torch.randn(batch_size, 3, resolution, resolution, device=Conditions.device)
        scheduler.set_timesteps(SAMPLING_STEPS)
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t).sample, t, x).prev_sample
        VaeImageProcessor.denormalize(x)

    return sample


def unet(rounds: int, batch_size: int = 16, resolution: int = 32) -> dict:
    arguments = {kind: (kind, batch_size, resolution) for kind in ("head", "base")}
    return {"batch_size": batch_size} | with_and_without(
        rounds, unet_step, unet_sampling, arguments
    )


# Full size


def full_size_step(
    regime: str, config: dict, threads: int, device: torch.device
) -> tuple[float, float]:
    """Peak memory of this process in GiB, and seconds of a step, as the trainer does it once
    `fine-tune` has thawed its base.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    Conditions.device = device
    with device:
        model = head_on(AutoencoderKL(**config))
        if regime == "lora":
            add_lora(model.base.model, BaseSettings.lora_rank)
        elif regime == "frozen":
            model.base.trainable(False)
        step = model_step(model, 1)
    ((seconds,),) = alternate([step], rounds=1)  # the second step: the optimiser has its state
    return peak_gib(), seconds


def full_size(rounds: int, config: dict = STABLE_DIFFUSION) -> dict:
    rounds, spawn = min(rounds, 3), multiprocessing.get_context("spawn")  # minutes each
    measured: dict[str, list[tuple[float, float]]] = {regime: [] for regime in REGIMES}
    for _ in range(rounds):
        for regime in REGIMES:
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                measured[regime].append(
                    pool.submit(
                        full_size_step, regime, config, torch.get_num_threads(), Conditions.device
                    ).result()
                )
    peaks, seconds = (
        {regime: [row[i] for row in rows] for regime, rows in measured.items()} for i in range(2)
    )
    return {
        regime: {"peak_gib": max(peaks[regime])} | summary(seconds[regime], seconds["end-to-end"])
        for regime in REGIMES
    }


@torch.no_grad()
def denoise(rounds: int, config: dict = STABLE_DIFFUSION_UNET, batch_size: int = 2) -> dict:
    """Batch 2 is one image under a text's guidance. The head is run at every step here; in sampling
    it is run once.
    """
    dtype = torch.bfloat16 if fast_bf16() else torch.float32
    with Conditions.device:
        unet = UNet2DConditionModel(**config).to(dtype).eval()
        text = torch.randn(1, 77, config["cross_attention_dim"])
        model = InterventionModel.build(
            DiffusionBase(unet, DDIMScheduler(), text=text), quad.CONCEPTS
        ).eval()
        for (
            values
        ) in model.base.adapter.projections.values:  # zero in a new head: as after training
            torch.nn.init.normal_(values.weight, std=0.02)
        x, z = (
            torch.randn(batch_size, *model.base.sample_shape),
            torch.randn(batch_size, *model.noise_shape),
        )
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
        frozen = InterventionModel.build(
            AutoencoderKL.from_pretrained(f"{folder}/vae"), quad.CONCEPTS
        )
        frozen.save_pretrained(f"{folder}/model")
        alone, together = alternate(
            [
                lambda: AutoencoderKL.from_pretrained(f"{folder}/vae"),
                lambda: InterventionModel.from_pretrained(f"{folder}/model"),
            ],
            rounds,
        )
    beyond = [b - a for a, b in zip(alone, together)]
    return {"base": figure("seconds", alone), "beyond": figure("seconds", beyond)}
