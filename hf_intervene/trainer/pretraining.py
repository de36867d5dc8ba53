"""Plain models on observational images: a pretrained base to add a head to, where none can be
downloaded.

Models, losses and saved folders are diffusers'; of this package only the images. Nothing of the
contexts is seen. The recipe is `training/pretrain.py`."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from ..bases.autoencoder import latents_of
from ..bases.denoising import noised
from ..bases.schedulers import prediction_type, training_scheduler
from ..contexts import OBS
from ..data import ContextImages, load_contexts
from ..data.digits import BUNDLED
from .distributed import process_state
from .optimizer import MuonAdamW
from .sections import fast_bf16
from .settings import check_reading
from .simulated import SIMULATED


def observational_images(
    dataset: str,
    images: int,
    resolution: int,
    mnist_digits: str = BUNDLED,
    reading: Mapping[str, Any] | None = None,
) -> torch.Tensor:
    """uint8 images of the observational context, (N, 3, resolution, resolution); `reading`:
    arguments of `load_contexts` of own data.
    """
    if dataset in SIMULATED:
        check_reading(dataset, reading or {})
        pixels = SIMULATED[dataset](resolution, 3, mnist_digits=mnist_digits).observational(images)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return (
        ContextImages.from_dataset(load_contexts(dataset, **reading or {}), None, resolution, 3)
        .select([OBS])
        .pixels
    )


def halvings(resolution: int) -> int:
    """How often the autoencoder halves images of this side: down to about 16."""
    return max(1, round(math.log2(resolution / 16)))


def new_autoencoder(resolution: int) -> AutoencoderKL:
    """The layers of the Stable Diffusion autoencoder, narrow, with latents of about (8, 16, 16)."""
    levels = 1 + halvings(resolution)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=[16 << level for level in range(levels)],
        latent_channels=8,
        norm_num_groups=8,
        sample_size=resolution,
    )


def mosaic(images: torch.Tensor) -> torch.Tensor:
    """Images (B, C, S, S) of four pieces each, cut at random points out of four images, some of
    them mirrored, upside down or turned.

    An autoencoder of whole faces draws what it has not seen as what it knows: smiles as the sad
    mouths of the observational images. Of mosaics it learns to keep what is there.
    """
    side, rows = images.shape[-1], len(images)

    def one_of_two(changed: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.rand(rows, 1, 1, 1, device=images.device) < 0.5, changed, plain)

    pieces = []
    for _ in range(4):
        piece = images[torch.randperm(rows, device=images.device)]
        piece = one_of_two(piece.flip(2), piece)
        piece = one_of_two(piece.flip(3), piece)
        pieces.append(one_of_two(piece.transpose(2, 3), piece))
    places = torch.arange(side, device=images.device)
    top, left = (
        places.view(shape) < torch.randint(0, side, (rows, 1, 1, 1), device=images.device)
        for shape in ((side, 1), (1, side))
    )
    upper = torch.where(left, pieces[0], pieces[1])
    lower = torch.where(left, pieces[2], pieces[3])
    return torch.where(top, upper, lower)


def blended(images: torch.Tensor) -> torch.Tensor:
    """Mosaics of images (B, C, S, S), half of them mixed with another mosaic in random shares.

    Beards are drawn half transparent, in colours that no observational image has. An autoencoder
    that sees few colours draws others as the nearest it knows.
    """
    share = torch.rand(len(images), 1, 1, 1, device=images.device)
    mixed = torch.rand_like(share) < 0.5
    return torch.lerp(mosaic(images), mosaic(images), share * mixed)


def pretrain(
    pixels: torch.Tensor,
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    kl_weight: float = 1e-2,
    seed: int = 0,
) -> AutoencoderKL:
    """Train an autoencoder on blended mosaics of uint8 images (N, 3, S, S); its `scaling_factor`
    makes the latents' standard deviation 1.
    """
    torch.manual_seed(seed)
    device = process_state().device
    vae = new_autoencoder(pixels.shape[-1]).to(device)
    log_variance = torch.nn.Parameter(torch.zeros((), device=device))

    def loss(x: torch.Tensor, autocast: Callable) -> torch.Tensor:
        x = blended(x)
        with autocast():
            posterior = vae.encode(x).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        squares = (decoded.float() - x).square().flatten(1).sum(1)
        nll = 0.5 * (
            squares / log_variance.exp() + x[0].numel() * (log_variance + math.log(2 * math.pi))
        )
        return (nll + kl_weight * posterior.kl()).mean()

    options = pixels, steps, batch_size, learning_rate
    _fit(vae, [*vae.parameters(), log_variance], loss, *options, muon=True)
    vae.register_to_config(
        scaling_factor=round(vae.config.scaling_factor / latents(vae, pixels[:256]).std().item(), 4)
    )
    return vae


@torch.no_grad()
def latents(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Scaled latents (N, c, h, h), float32, of uint8 images (N, 3, S, S)."""
    means = [latents_of(vae, signed(x.to(vae.device)))[0].cpu() for x in pixels.split(256)]
    return torch.cat(means) * vae.config.scaling_factor


def signed(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 images in [-1, 1], float32."""
    return pixels.float() / 127.5 - 1


def new_unet(resolution: int) -> UNet2DModel:
    """The layers of the DDPM's network, four levels of them and narrow, with attention at the
    lowest: 11 M parameters.
    """
    plain = ("DownBlock2D", "UpBlock2D")
    return UNet2DModel(
        sample_size=resolution,
        block_out_channels=(32, 64, 128, 256),
        layers_per_block=1,
        down_block_types=(plain[0],) * 3 + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + (plain[1],) * 3,
        norm_num_groups=16,
        attention_head_dim=32,
    )


NOBODY = 1  # the number of no class, of a denoiser with one class


def new_dit(channels: int, size: int, patch_size: int) -> DiTTransformer2DModel:
    """A DiT of four blocks on what is denoised, (channels, size, size), for the images of no class:
    2.2 M parameters."""
    return DiTTransformer2DModel(
        num_attention_heads=5,
        attention_head_dim=32,
        in_channels=channels,
        out_channels=channels,
        num_layers=4,
        sample_size=size,
        patch_size=patch_size,
        num_embeds_ada_norm=NOBODY,
    )


def pretrain_diffusion(
    pixels: torch.Tensor,
    steps: int,
    batch_size: int = 64,
    seed: int = 0,
    is_dit: bool = False,
    autoencoder: AutoencoderKL | None = None,
) -> DiffusionPipeline:
    """Train a denoiser on uint8 images (N, 3, S, S): a UNet that predicts v, or a DiT of a flow
    (Lipman et al., arXiv:2210.02747), on pixels in 8 x 8 tokens, or on what an autoencoder makes of
    them, in 4 x 4 where that fits. The DiT predicts the clean image: a token can have more
    entries than the DiT has channels, too few to pass noise on (Li and He, arXiv:2511.13720). The
    pipeline has the averaged weights."""
    torch.manual_seed(seed)
    images = pixels if autoencoder is None else latents(autoencoder, pixels)
    channels, size = images.shape[1:3]
    if is_dit:
        tokens = 8 if autoencoder is None else 4
        denoiser = new_dit(channels, size, size // tokens if size % tokens == 0 else 2)
        rate = 5e-3  # Muon's
        # A solver of order two: ten steps are enough.
        scheduler = UniPCMultistepScheduler(
            prediction_type="sample", use_flow_sigmas=True, flow_shift=1.0
        )
    else:
        denoiser, rate = new_unet(size), 5e-4
        # v rather than the noise itself: what decides a flat region's colour are the noisiest
        # steps, where the noise says little of it. Pixels end at 1.
        scheduler = DDPMScheduler(prediction_type="v_prediction", timestep_spacing="trailing")
    denoiser.to(process_state().device)  # before its weights are copied to be averaged
    noising, kind = training_scheduler(scheduler), prediction_type(scheduler)
    ema = EMAModel(denoiser.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)

    def loss(x: torch.Tensor, autocast: Callable) -> torch.Tensor:
        noise, time = torch.randn_like(x), torch.rand(len(x), device=x.device)
        noisy, t, target, weight = noised(noising, kind, x, noise, time)
        no_class = {"class_labels": torch.full_like(t, NOBODY, dtype=torch.long)} if is_dit else {}
        with autocast():
            found = denoiser(noisy, t, **no_class).sample
        return (weight * (found.float() - target).square().flatten(1).mean(1)).mean()

    weights = list(denoiser.parameters())
    _fit(denoiser, weights, loss, images, steps, batch_size, rate, ema, muon=is_dit)
    ema.copy_to(denoiser.parameters())
    return (
        DiTPipeline(denoiser, autoencoder, scheduler)
        if is_dit
        else DDPMPipeline(denoiser, scheduler)
    )


def _fit(
    model: torch.nn.Module,
    parameters: list[torch.nn.Parameter],
    loss: Callable[[torch.Tensor, Callable], torch.Tensor],
    images: torch.Tensor,
    steps: int,
    batch_size: int,
    learning_rate: float,
    ema: EMAModel | None = None,
    muon: bool = False,
) -> None:
    """Minimise the loss of batches of images, in [-1, 1] if they are uint8 and as they are
    otherwise, over the parameters, in place; `muon`: by Muon those that are matrices.
    """
    accelerator = Accelerator(mixed_precision="bf16" if fast_bf16() else "no")
    model.train()
    groups = [
        {"params": [p for p in parameters if (muon and p.ndim > 1) == large], "muon": large}
        for large in (False, True)
    ]
    optimizer = MuonAdamW(groups, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.05
    )
    bar = tqdm(range(steps), desc="pretraining", disable=None)
    for _ in bar:
        x = images[torch.randint(len(images), (batch_size,))].to(accelerator.device)
        value = loss(signed(x) if x.dtype == torch.uint8 else x, accelerator.autocast)
        accelerator.backward(value)
        torch.nn.utils.clip_grad_norm_(parameters, 1000.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if ema is not None:
            ema.step(parameters)
        bar.set_postfix(loss=f"{value.item():.4f}")
    model.eval()
    if not all(bool(torch.isfinite(p).all()) for p in parameters):
        raise FloatingPointError("the model's weights are not finite: lower the learning rate.")
