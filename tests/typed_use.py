"""What a user's type checker makes of the package: read by mypy (`test_types.py`), never run.

Each `type: ignore` marks a mistake that must be seen; one that is not seen any more is an error
(`warn_unused_ignores`)."""

from typing import assert_type

import torch

import hf_intervene
from hf_intervene import (
    InterventionConfig,
    InterventionHead,
    InterventionModel,
    InterventionPipeline,
    LightVAE,
    Quantile,
    attach,
    intervene,
)
from hf_intervene.data import ContextImages, load_contexts
from hf_intervene.metrics import CheckResult, check


def sample_and_edit() -> None:
    pipe = InterventionPipeline.from_pretrained(hf_intervene.bundled("quad"))
    assert_type(pipe, InterventionPipeline)
    assert_type(pipe.model, InterventionModel)
    assert_type(pipe.head, InterventionHead)
    images = pipe(interventions=["quad1", "size"], num_images=8, generator=torch.Generator()).images
    pipe.edit(images[0], {"quad1": 0.5, "size": Quantile(0.9)})
    pipe([["quad1"], None, {"size": 0.5}])
    pipe(interventions=3)  # type: ignore[arg-type]
    pipe.edit(images[0], "quad1", strength=2)  # type: ignore[call-arg]
    attach(pipe, 3)  # type: ignore[arg-type]
    with intervene(pipe, "quad1", guidance_scale=2.0):
        pass


def build_and_save() -> None:
    model = InterventionModel.build(
        LightVAE(sample_size=64), concepts=["quad1", "size"], free_blocks=1
    )
    assert_type(model, InterventionModel)
    assert_type(model.targets([["quad1"], "obs"]), torch.Tensor)
    assert_type(model.head, InterventionHead | None)
    model.save_pretrained("folder", save_base=True)
    model.push_to_hub("user/name", private=True, license="apache-2.0")
    assert_type(
        InterventionModel.from_pretrained("folder", torch_dtype=torch.bfloat16), InterventionModel
    )
    assert_type(InterventionHead.from_pretrained("folder", subfolder="head"), InterventionHead)
    assert_type(InterventionConfig(concepts=["a"], free_blocks=2).num_blocks, int)
    InterventionConfig(concept=["a"])  # type: ignore[call-arg]
    model.sample("quad1", num_images="8")  # type: ignore[arg-type]


def measure() -> None:
    data = ContextImages.from_dataset(load_contexts("my-images"), resolution=64)
    result = check(data.by_context())
    assert_type(result, CheckResult)
    assert_type(result.passed, bool)
