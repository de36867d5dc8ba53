# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] # Notebook: composing interventions  What does an intervention change, what does it
# leave alone, and what do two of them do together? With the small pipeline that comes with the
# package, so there is nothing to train and nothing to download.  *The source is
# `docs/notebooks/compose.py`; `python docs/notebooks/make.py` runs it and stores the outputs.*

# %%
# %matplotlib inline
import numpy as np
import torch

import hf_intervene
from hf_intervene import InterventionPipeline
from hf_intervene.data import quad
from hf_intervene.metrics import compare
from hf_intervene.plots import strips, to_uint8


pipe = InterventionPipeline.from_pretrained(hf_intervene.bundled("quad"))
print(pipe.concepts)

# %% [markdown] ## Under the same noise  `noise` says everything about an image but the
# interventions. Each column below has the same noise.

# %%
noise = torch.randn(6, *pipe.model.noise_shape, generator=torch.Generator().manual_seed(0))


def samples(interventions):
    return to_uint8(pipe(interventions, noise=noise, output_type="np").images)


strips({name: samples(name) for name in ("obs", "quad1", "quad2", "quad1+quad2")})

# %% [markdown] `quad1` is the quadrant at the bottom left, `quad2` that at the bottom right. The
# last row has both interventions, which no training image had.  ## What changes where  The mean
# change of each pixel, brighter is more, by intervening on `quad1`, `quad2`, `quad4`, and `quad1`
# with `quad2`. `quad4` (top right) is a cause of all other quadrants, `quad1` (bottom left) of
# none.

# %%
many = torch.randn(128, *pipe.model.noise_shape, generator=torch.Generator().manual_seed(1))
obs = pipe("obs", noise=many, output_type="np").images


def change(interventions):
    difference = np.abs(pipe(interventions, noise=many, output_type="np").images - obs).mean(
        axis=(0, 3)
    )  # (64, 64)
    return to_uint8(np.repeat(np.clip(2 * difference, 0, 1)[None, ..., None], 3, axis=-1))


strips(
    {
        "change": np.concatenate(
            [change(name) for name in ("quad1", "quad2", "quad4", "quad1+quad2")]
        )
    }
)

# %% [markdown]
# ## Strength
#
# Between nothing and a whole intervention:

# %%
strips({f"quad2={strength:g}": samples({"quad2": strength}) for strength in (0.25, 0.5, 1.0)})

# %% [markdown] ## Is it the right distribution?  Real images of the pair can be simulated, so they
# can be compared with the generated ones: sliced Wasserstein distance, beside its floor (the
# distance of real images from real ones), and beside what other contexts score that would be
# mistakes. A ratio of 1 would be perfect.

# %%
pair = "quad1+quad2"
real, other = (
    quad.images_by_context([pair], 256, 64, seed=seed)[pair] for seed in (9_000_000, 9_000_001)
)
for context in ("quad1+quad2", "quad1", "quad2", "obs"):
    generated = pipe(
        context, num_images=256, generator=torch.Generator().manual_seed(0), output_type="np"
    ).images
    result = compare(real, other, generated, num_projections=200)
    print(
        f"{context:12} distance {result.distance:.3f}  floor {result.floor:.3f}  ratio"
        f" {result.ratio:.1f}"
    )

# %% [markdown] The samples of the pair are nearest. They are not at the floor: shapes are blurred,
# as they are in everything that this small model makes.  ## Editing a real image  The noise behind
# an image is inferred, the interventions are replaced, and the image is drawn again.

# %%
images = quad.images_by_context(["obs"], 6, 64, seed=9_000_002)["obs"]
rows = {
    "real": images,
    "nothing changed": to_uint8(pipe.edit(images, "obs", output_type="np").images),
}
rows |= {
    name: to_uint8(pipe.edit(images, name, output_type="np").images)
    for name in ("quad2", "quad1+quad2")
}
strips(rows)
