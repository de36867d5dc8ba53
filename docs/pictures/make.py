"""The pictures of the guides, from the pipeline that comes with the package: `python
docs/pictures/make.py` (about ten seconds). `ident3d.png` is the last grid of samples that the
README's training on ident3d writes."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

import hf_intervene
from hf_intervene.data import avatars, quad
from hf_intervene.metrics import block_effects, total_effect_operator
from hf_intervene.metrics.causal import head_draws, head_readout
from hf_intervene.plots import contexts_grid, edit_strips, plot_matrices, strips, to_uint8


HERE = Path(__file__).parent
IMAGES = 6  # in a strip


def save(figure: Figure, name: str) -> None:
    """As a PNG of 256 colours: a quarter of the size, and the eye sees no difference."""
    path = HERE / f"{name}.png"
    figure.savefig(path, dpi=110, bbox_inches="tight")
    picture = Image.open(path).convert("RGB")
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE).save(
        path, optimize=True
    )
    print(path, f"{path.stat().st_size / 1000:.0f} KB")


def main() -> None:
    pipe = hf_intervene.InterventionPipeline.from_pretrained(hf_intervene.bundled("quad"))
    noise = torch.randn(IMAGES, *pipe.model.noise_shape, generator=torch.Generator().manual_seed(0))

    def samples(context):
        return to_uint8(pipe(context, noise=noise, output_type="np").images)

    contexts = ("obs", "quad1", "quad2", "quad4", "quad1+quad2", "quad2+quad4")
    real = quad.images_by_context(contexts, IMAGES, 64, seed=1_000_000)
    generated = {name: samples(name) for name in contexts}
    save(contexts_grid(real, generated, unseen=quad.HELD_OUT, images=IMAGES), "contexts")

    def edited(context):
        return to_uint8(pipe.edit(real["obs"], context, output_type="np").images)

    edits = {"nothing changed": edited("obs")} | {
        name: edited(name) for name in ("quad1", "quad2", "quad4", "quad2+quad4")
    }
    save(edit_strips(real["obs"], edits), "edits")
    save(
        strips({f"quad2={s:g}": samples({"quad2": s}) for s in (0.0, 0.25, 0.5, 0.75, 1.0)}),
        "strength",
    )

    faces = avatars.twins((*avatars.TRAIN_CONTEXTS, *avatars.HELD_OUT), 64)
    save(strips({name: x[:IMAGES] for name, x in faces.items()}), "avatars")

    concepts = [quad.LATENTS.index(name) for name in quad.CONCEPTS]
    eps, _ = head_draws(pipe.head, ["obs"], 4096)
    learnt = block_effects(
        total_effect_operator(pipe.head.intervention), eps[0], head_readout(pipe.head)
    )
    matrices = {
        "truth": np.abs(quad.total_effects()[np.ix_(concepts, concepts)]),
        "weights": learnt[:6, :6],
    }
    for matrix in matrices.values():
        np.fill_diagonal(
            matrix, np.nan
        )  # what everything does to itself would be all there is to see
    save(
        plot_matrices(
            matrices, quad.CONCEPTS, quad.CONCEPTS, "cause (column) and effect (row)", shared=False
        ),
        "causes",
    )


if __name__ == "__main__":
    main()
