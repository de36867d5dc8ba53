"""The pictures of the documents, of the pipelines that come with the package; a minute.

    python docs/pictures/make.py

`ident3d.png` is the last grid of samples that a training on ident3d writes.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

import hf_intervene
from hf_intervene.data import avatars, quad
from hf_intervene.grids import labelled_grid
from hf_intervene.metrics import block_effects, total_effect_operator
from hf_intervene.metrics.causal import head_draws, head_readout
from hf_intervene.plots import plot_matrices, to_uint8


HERE = Path(__file__).parent
PERSONS = 8
STEPS = {"num_inference_steps": 10}  # as in the tables of results
PAIRS = (
    "glasses+beard",
    "glasses+hat",
    "glasses+smile",
    "beard+hat",
    "beard+smile",
    "hat+smile",
)


def save(picture: Figure | Image.Image, name: str) -> None:
    """As a PNG of 256 colours: a quarter of the size, and the eye sees no difference."""
    path = HERE / f"{name}.png"
    if isinstance(picture, Figure):
        picture.savefig(path, dpi=110, bbox_inches="tight")
        picture = Image.open(path).convert("RGB")
    kind = Image.Quantize.MAXCOVERAGE
    picture.quantize(256, kind, kmeans=2, dither=Image.Dither.NONE).save(path, optimize=True)
    print(path, f"{path.stat().st_size / 1000:.0f} KB")


def grid(rows: Mapping[str, np.ndarray]) -> Image.Image:
    """Labelled rows of uint8 images (n, H, W, 3)."""
    return labelled_grid(
        {name: list(map(Image.fromarray, images)) for name, images in rows.items()}
    )


def draw_avatars() -> None:
    """Samples, edits, strengths, and real images beside samples, of the pipeline `avatars`."""
    pipe = hf_intervene.InterventionPipeline.from_pretrained(hf_intervene.bundled("avatars"))
    side = pipe.model.base.image_shape[-1]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(PERSONS, *pipe.model.noise_shape, generator=generator)

    def samples(context):
        again = torch.Generator().manual_seed(0)
        return to_uint8(
            pipe(context, noise=noise, generator=again, output_type="np", **STEPS).images
        )

    shown = {"as is": "obs"} | {name: name for name in (*pipe.concepts, "glasses+hat", "hat+smile")}
    shown |= {"all four": "+".join(pipe.concepts)}
    save(grid({label: samples(context) for label, context in shown.items()}), "people")
    save(grid({name: samples(name) for name in ("obs", *pipe.concepts, *PAIRS)}), "gallery")
    strengths = {f"glasses={s:g}": samples({"glasses": s}) for s in (0.0, 0.25, 0.5, 0.75, 1.0)}
    save(grid(strengths), "strength")

    faces = avatars.twins(["obs"], side)["obs"][:PERSONS]
    edits = {
        name: to_uint8(pipe.edit(faces, name, output_type="np", **STEPS).images)
        for name in ("obs", "glasses", "hat", "glasses+hat")
    }
    save(grid({"given": faces, "unchanged": edits.pop("obs")} | edits), "edits")

    names = ("obs", "glasses", "glasses+hat")
    real = avatars.twins(names, side)
    rows = {}
    for name in names:
        rows |= {f"{name}, real": real[name][-PERSONS:], f"{name}, sample": samples(name)}
    save(grid(rows), "contexts")
    twins = avatars.twins((*avatars.TRAIN_CONTEXTS, *avatars.HELD_OUT), side)
    save(grid({name: x[:PERSONS] for name, x in twins.items()}), "avatars")


def draw_quad() -> None:
    """Images of quad and their edits, and what its weights say of causes."""
    pipe = hf_intervene.InterventionPipeline.from_pretrained(hf_intervene.bundled("quad"))
    images = quad.images_by_context(["obs"], PERSONS, 64, seed=1_000_000)["obs"]
    edits = {
        name: to_uint8(pipe.edit(images, name, output_type="np").images)
        for name in ("quad1", "quad2", "quad4", "quad2+quad4")
    }
    save(grid({"given": images} | edits), "quad")
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
        np.fill_diagonal(matrix, np.nan)  # or the effects on itself would be all there is to see
    title = "cause (column) and effect (row)"
    save(plot_matrices(matrices, quad.CONCEPTS, quad.CONCEPTS, title, shared=False), "causes")


if __name__ == "__main__":
    draw_avatars()
    draw_quad()
