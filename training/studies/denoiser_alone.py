"""How near samples of a pretrained denoiser without a head come to real images.

    python training/studies/denoiser_alone.py --base outputs/dit --output outputs/alone.json

Samples of the denoiser without a head are compared with held-out observational images, as
`evaluate.py` compares those of a head. Writes a JSON file."""

import sys
from collections.abc import Sequence

import numpy as np
import torch

from hf_intervene.bases import load_base
from hf_intervene.bases.base import Base
from hf_intervene.contexts import OBS
from hf_intervene.errors import spoken
from hf_intervene.evaluation.held_out import held_out_images
from hf_intervene.metrics.transport import sliced_wasserstein
from hf_intervene.metrics.two_sample import image_two_sample_test
from hf_intervene.pixels import to_uint8
from hf_intervene.training.studies.columns import study_parser, write_columns


BATCH = 100
COLUMNS = ["held-out images", "told from real images", "floor", "distance", "floor"]


@torch.no_grad()
def samples(base: Base, images: int, steps: int, seed: int) -> np.ndarray:
    """Images of the denoiser without a head, uint8, (n, S, S, 3).

    Args:
        base: a denoiser with a new adapter, which changes nothing; it then starts from noise alone.
        images: n.
        steps: of denoising.
        seed: of the noise.
    """
    base.adapter.register_to_config(start=1.0)
    generator, found = torch.Generator().manual_seed(seed), []
    for start in range(0, images, BATCH):
        draws = base.draws(min(BATCH, images - start), generator)
        embedding = torch.zeros(len(draws["residual_noise"]), *base.embedding_shape)
        made = base.generate(embedding, draws, num_inference_steps=steps)
        found.append(to_uint8(made.permute(0, 2, 3, 1).numpy()))
    return np.concatenate(found)


@spoken
def main(argv: Sequence[str] | None = None) -> int:
    parser = study_parser(__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, help="folder of the denoiser's pipeline")
    parser.add_argument("--num-inference-steps", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of held-out images too")
    a = parser.parse_args(argv)
    base = load_base(a.base, a.resolution)
    if base.passes < 2:
        raise ValueError(f"{a.base} has no denoiser: it makes an image in one pass.")
    rows: list[list] = []
    for seed in a.seeds:
        data = a.dataset, [], a.images, seed, a.resolution, 3, "dependent"
        real, other = (found[OBS] for found in held_out_images(*data, singles=True))
        generated = samples(base.eval(), len(real), a.num_inference_steps, seed)
        told = [image_two_sample_test(real, x, seed).accuracy for x in (generated, other)]
        distances = [sliced_wasserstein(real, x) for x in (generated, other)]
        rows.append([f"seed {seed}", *map(float, (*told, *distances))])
        print(*rows[-1])
    write_columns(a.output, COLUMNS, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
