"""What an autoencoder keeps of each concept: no head on a denoiser of its latents can show more.

    python training/studies/autoencoder.py --autoencoder outputs/vae --output outputs/kept.json

Held-out real images of each context go through the autoencoder and back. A detector of concepts
says in how many of them the concept is present, before and after. An autoencoder that was trained
on the observational images alone may lose what it has never seen. Writes a JSON file."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from hf_intervene.bases.autoencoder import images_of, latents_of
from hf_intervene.bases.loading import load_part
from hf_intervene.data.digits import BUNDLED
from hf_intervene.errors import spoken
from hf_intervene.evaluation.held_out import held_out_images
from hf_intervene.evaluation.setup import content_options
from hf_intervene.trainer.pretraining import signed
from hf_intervene.trainer.simulated import SIMULATED
from hf_intervene.training.studies.columns import study_parser, write_columns


BATCH = 100
COLUMNS = ["context", "concept in real images", "after the autoencoder", "error of a pixel"]


@torch.no_grad()
def returned(autoencoder: AutoencoderKL, images: np.ndarray) -> np.ndarray:
    """Images (n, S, S, 3), uint8, after the autoencoder: float32 in [0, 1], (n, S, S, 3)."""
    found = []
    for start in range(0, len(images), BATCH):
        x = signed(torch.from_numpy(images[start : start + BATCH]).permute(0, 3, 1, 2))
        decoded = images_of(autoencoder, latents_of(autoencoder, x)[0])
        found.append((decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())
    return np.concatenate(found)


@spoken
def main(argv: Sequence[str] | None = None) -> int:
    parser = study_parser(__doc__.splitlines()[0])
    parser.add_argument("--autoencoder", required=True, help="folder of an AutoencoderKL")
    parser.add_argument("--seed", type=int, default=0, help="of held-out images and the detector")
    a = parser.parse_args(argv)
    autoencoder = load_part(AutoencoderKL, Path(a.autoencoder), f"the autoencoder {a.autoencoder}")
    concepts = SIMULATED[a.dataset](a.resolution, 3, "independent", BUNDLED).concepts
    data = a.dataset, concepts, a.images, a.seed, a.resolution, 3, "independent"
    real, other = held_out_images(*data, singles=True)
    options = a.dataset, concepts, a.resolution, 3, "independent", BUNDLED, None, other, a.seed
    detector = content_options(*options, twin_images=0)["detector"]
    rows: list[list] = []
    for at, context in enumerate(concepts):
        before = real[context] / np.float32(255)
        after = returned(autoencoder.eval(), real[context])
        error = float(np.sqrt(np.mean((after - before) ** 2)))
        if context in detector.unusable:
            shares: list[float | str] = ["not detected"] * 2
        else:
            shares = [float(detector.present(x)[:, at].mean()) for x in (before, after)]
        rows.append([f"`{context}`", *shares, error])
        print(*rows[-1])
    write_columns(a.output, COLUMNS, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
