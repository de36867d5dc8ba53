"""Train a plain model on observational images: a pretrained base to add a head to, where none can
be downloaded.

    python training/pretrain.py --output outputs/vae --resolution 32
    python training/pretrain.py --model unet --output outputs/ddpm --resolution 32
    python training/pretrain.py --model dit --autoencoder outputs/vae --output outputs/dit --resolution 32

`autoencoder`: an AutoencoderKL, with the loss of latent diffusion's (Gaussian pixels with a learnt
variance, a small KL). `unet`: a DDPMPipeline of a UNet2DModel and its scheduler. `dit`: a
DiTPipeline of a DiTTransformer2DModel, on pixels, or on the latents of an `--autoencoder`. Models,
losses and saved folders are diffusers'; of this package only the images. Nothing of the contexts is
seen."""  # noqa: E501

import sys
from collections.abc import Sequence
from pathlib import Path

from diffusers import AutoencoderKL

from hf_intervene.bases.loading import load_part
from hf_intervene.data.digits import BUNDLED
from hf_intervene.errors import spoken
from hf_intervene.options import READING, add_reading_options, seed, whole_number
from hf_intervene.trainer.checkpoints import atomic_folder, check_empty
from hf_intervene.trainer.parsing import RecipeParser
from hf_intervene.trainer.pretraining import (
    halvings,
    observational_images,
    pretrain,
    pretrain_diffusion,
)
from hf_intervene.trainer.stopping import stops_at_once


@spoken
@stops_at_once()
def main(argv: Sequence[str] | None = None) -> int:
    parser = RecipeParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="folder for the model")
    parser.add_argument("--model", choices=["autoencoder", "unet", "dit"], default="autoencoder")
    parser.add_argument(
        "--autoencoder",
        help="dit: folder of the AutoencoderKL whose latents it is to denoise; without one, pixels",
    )
    parser.add_argument(
        "--dataset",
        default="quad",
        help="quad, mnist, ident3d, avatars, an image folder, a saved data set or a Hub name",
    )
    parser.add_argument(
        "--images",
        type=whole_number(1),
        default=10_000,
        help="simulated data: number of images (default 10,000); avatars has 4,000 at most",
    )
    parser.add_argument(
        "--mnist-digits", default=BUNDLED, help="mnist: bundled, a folder, or a Hub name"
    )
    add_reading_options(parser)
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument(
        "--steps", "--max-steps", type=int, default=3000, help="optimiser steps (default 3000)"
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=seed, default=0)
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    out = Path(arguments.output).resolve()
    check_empty(out)
    if arguments.autoencoder is not None and arguments.model != "dit":
        raise ValueError("--autoencoder FOLDER is for --model dit: leave it out.")
    if min(arguments.resolution, arguments.batch_size, arguments.steps) < 1:
        raise ValueError("resolution, batch size and steps must be at least 1.")
    # The UNet halves three times; a DiT on pixels has 8 x 8 tokens, one on latents tokens of 2 x 2
    # latents at least.
    multiple = 8
    if arguments.model == "autoencoder" or arguments.autoencoder is not None:
        multiple = 2 ** (halvings(arguments.resolution) + (arguments.model == "dit"))
    if arguments.resolution % multiple:
        raise ValueError(
            f"the resolution must be a multiple of {multiple}, not {arguments.resolution}."
        )
    reading = {name: getattr(arguments, name) for name in READING}
    pixels = observational_images(
        arguments.dataset, arguments.images, arguments.resolution, arguments.mnist_digits, reading
    )
    options = (pixels, arguments.steps, arguments.batch_size)
    if arguments.model == "autoencoder":
        model = pretrain(*options, seed=arguments.seed)
    else:
        folder = arguments.autoencoder
        vae = (
            None
            if folder is None
            else load_part(AutoencoderKL, Path(folder), f"the autoencoder {folder}").eval()
        )
        is_dit = arguments.model == "dit"
        model = pretrain_diffusion(*options, seed=arguments.seed, is_dit=is_dit, autoencoder=vae)
    with atomic_folder(out) as folder:
        model.save_pretrained(folder)
    print(f"{arguments.model} in {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
