"""Train a plain AutoencoderKL on observational images: a pretrained base to add a head to, where none can be downloaded.

    python training/pretrain.py --output outputs/vae --resolution 32

The model, its loss (as in latent diffusion: Gaussian pixels with a learnt variance, a small KL) and its saved folder are diffusers'; of
this package only the images. Nothing of the contexts is seen.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from tqdm.auto import tqdm

from hf_intervene.contexts import OBS
from hf_intervene.data import ContextImages, load_contexts, quad
from hf_intervene.training.checkpoints import atomic_folder, check_empty
from hf_intervene.training.train import fast_bf16


PRETRAINING_SEED = 500_000  # quad images that neither training (from 0) nor evaluation (from 1,000,000) sees


def observational_images(dataset: str, images: int, resolution: int) -> torch.Tensor:
    """uint8 images of the observational context, (N, 3, resolution, resolution)."""
    if dataset == "quad":
        pixels = quad.images_by_context((OBS,), images, resolution, "dependent", PRETRAINING_SEED)[OBS]
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return ContextImages.from_dataset(load_contexts(dataset), None, resolution, 3).select([OBS]).pixels


def new_autoencoder(resolution: int) -> AutoencoderKL:
    """The layers of the Stable Diffusion autoencoder, three levels of them and narrow: latents of (4, resolution / 4, resolution / 4)."""
    channels = (16, 32, 64)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=channels,
        norm_num_groups=8,
        sample_size=resolution,
    )


def pretrain(
    pixels: torch.Tensor, steps: int, batch_size: int = 64, learning_rate: float = 1e-3, kl_weight: float = 1e-2, seed: int = 0
) -> AutoencoderKL:
    """Train an autoencoder on uint8 images (N, 3, S, S); its `scaling_factor` makes the latents' standard deviation 1."""
    accelerator = Accelerator(mixed_precision="bf16" if fast_bf16() else "no")
    torch.manual_seed(seed)
    vae = new_autoencoder(pixels.shape[-1])
    log_variance = torch.nn.Parameter(torch.tensor(0.0))
    optimizer = torch.optim.AdamW([*vae.parameters(), log_variance], learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.05)
    vae, optimizer = accelerator.prepare(vae, optimizer)
    bar = tqdm(range(steps), desc="pretraining", disable=None)
    for _ in bar:
        x = pixels[torch.randint(len(pixels), (batch_size,))].to(accelerator.device).float() / 127.5 - 1
        with accelerator.autocast():
            posterior = vae.encode(x).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        squares = (decoded.float() - x).square().flatten(1).sum(1)
        pixels_per_image = x[0].numel()
        nll = 0.5 * (squares / log_variance.exp() + pixels_per_image * (log_variance + math.log(2 * math.pi)))
        loss = (nll + kl_weight * posterior.kl()).mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(vae.parameters(), 1000.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(rmse=f"{(squares.mean() / pixels_per_image).sqrt().item() / 2:.4f}")
    vae = accelerator.unwrap_model(vae).eval()
    if not all(bool(torch.isfinite(p).all()) for p in vae.parameters()):
        raise FloatingPointError("the autoencoder's weights are not finite: lower the learning rate.")
    with torch.no_grad():
        latents = vae.encode(pixels[:256].to(accelerator.device).float() / 127.5 - 1).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    return vae


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="folder for the autoencoder")
    parser.add_argument("--dataset", default="quad", help="quad, an image folder, a saved data set or a Hub name")
    parser.add_argument("--images", type=int, default=10_000, help="quad only: number of images (default 10,000)")
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    try:
        out = Path(arguments.output).resolve()
        check_empty(out)
        if arguments.resolution % 4 or min(arguments.resolution, arguments.batch_size, arguments.steps) < 1:
            raise ValueError("resolution must be a multiple of 4, batch size and steps at least 1.")
        pixels = observational_images(arguments.dataset, arguments.images, arguments.resolution)
        vae = pretrain(pixels, arguments.steps, arguments.batch_size, seed=arguments.seed)
        with atomic_folder(out) as folder:
            vae.save_pretrained(folder)
    except (OSError, ValueError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"autoencoder in {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
