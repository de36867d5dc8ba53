# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Notebook: composing interventions
#
# **Goal:** see what an intervention changes, what it leaves alone, and what two of them do
# together.
# **Time:** five minutes. The pipeline comes with the package, so there is nothing to train and
# nothing to download.
#
# *The source is `docs/notebooks/compose.py`. `python docs/notebooks/make.py` runs it and stores the
# outputs.*

# %%
# %matplotlib inline
import numpy as np
import torch

import hf_intervene
from hf_intervene import InterventionPipeline
from hf_intervene.data import avatars
from hf_intervene.metrics import compare
from hf_intervene.plots import strips, to_uint8


pipe = InterventionPipeline.from_pretrained(hf_intervene.bundled("avatars"))
print(pipe.concepts)

# %% [markdown]
# ## Under the same noise
#
# Noise decides everything about an image except the interventions: `noise`, which the head reads,
# and that of the ten denoising steps, which the generator draws. Each column below has the same
# noise, so it is the same person.

# %%
OPTIONS = {"num_inference_steps": 10, "output_type": "np"}
noise = torch.randn(6, *pipe.model.noise_shape, generator=torch.Generator().manual_seed(0))


def images(interventions, noise):
    generator = torch.Generator().manual_seed(0)
    return pipe(interventions, noise=noise, generator=generator, **OPTIONS).images


def samples(interventions):
    return to_uint8(images(interventions, noise))


strips({name: samples(name) for name in ("obs", "glasses", "hat", "glasses+hat")})

# %% [markdown]
# The last row has both interventions, which no training image had.
#
# ## What changes where
#
# The mean change of each pixel; brighter is more. The four pictures are for `glasses`, `beard`,
# `hat`, and `glasses` with `hat`.

# %%
many = torch.randn(128, *pipe.model.noise_shape, generator=torch.Generator().manual_seed(1))
obs = images("obs", many)


def change(interventions):
    difference = np.abs(images(interventions, many) - obs).mean(axis=(0, 3))  # (64, 64)
    return to_uint8(np.repeat(np.clip(2 * difference, 0, 1)[None, ..., None], 3, axis=-1))


names = ("glasses", "beard", "hat", "glasses+hat")
strips({"change": np.concatenate([change(name) for name in names])})

# %% [markdown]
# ## Strength
#
# Between nothing and a whole intervention:

# %%
strips({f"hat={strength:g}": samples({"hat": strength}) for strength in (0.25, 0.5, 1.0)})

# %% [markdown]
# ## Is it the right distribution?
#
# The data set has real images of the pair, which training did not see. So samples can be compared
# with them: sliced Wasserstein distance, beside its floor (the distance of real images from real
# ones), and beside what other contexts score. A ratio of 1 would be perfect.

# %%
pair = "glasses+hat"
faces = avatars.twins([pair], 64)[pair]
real, other = faces[:700], faces[700:]
others = torch.randn(700, *pipe.model.noise_shape, generator=torch.Generator().manual_seed(2))
for context in (pair, "glasses", "hat", "obs"):
    generated = images(context, others)
    result = compare(real, other, generated, num_projections=200)
    print(
        f"{context:12} distance {result.distance:.3f}  floor {result.floor:.3f}  ratio"
        f" {result.ratio:.1f}"
    )

# %% [markdown]
# The samples of the pair are nearest. They are not at the floor.
#
# ## Editing a real image
#
# The noise behind an image is inferred, the interventions are replaced, and the image is drawn
# again.

# %%
given = avatars.twins(["obs"], 64)["obs"][:6]


def edited(interventions):
    return to_uint8(pipe.edit(given, interventions, **OPTIONS).images)


contexts = {"nothing changed": "obs", "glasses": "glasses", "glasses+hat": "glasses+hat"}
strips({"real": given} | {label: edited(context) for label, context in contexts.items()})
