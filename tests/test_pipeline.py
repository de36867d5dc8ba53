"""The pipeline: diffusers' own save and load, sampling and editing."""

import subprocess
import sys

import pytest
import torch
from conftest import generator
from diffusers import DiffusionPipeline

from hf_intervene import InterventionModel, InterventionPipeline, LightVAE


@pytest.fixture
def pipe():
    torch.manual_seed(0)
    base = LightVAE(3, 16, block_out_channels=(8, 8), hidden_width=16, latent_width=12)
    model = InterventionModel.build(base, ["quad1", "size"], noise_width=4, initializer_range=0.5)
    return InterventionPipeline.from_model(model)


@pytest.mark.parametrize("pipeline_class", [InterventionPipeline, DiffusionPipeline])
def test_round_trip(pipe, tmp_path, pipeline_class):
    pipe.save_pretrained(tmp_path)
    loaded = pipeline_class.from_pretrained(tmp_path)
    assert type(loaded) is InterventionPipeline
    assert loaded.concepts == ("quad1", "size")
    call = {"interventions": ["quad1", "size"], "num_images": 8, "output_type": "pt"}
    images = pipe(generator=generator(), **call).images
    assert images.shape == (8, 3, 16, 16)
    assert torch.equal(images, loaded(generator=generator(), **call).images)
    assert all(
        path.suffix in (".json", ".safetensors", ".py")
        for path in tmp_path.rglob("*")
        if path.is_file()
    )


@pytest.mark.parametrize(
    "imports",
    [
        (
            "import hf_intervene; from transformers import AutoModel; from diffusers import"
            " DiffusionPipeline"
        ),
        (
            "from diffusers import DiffusionPipeline; from transformers import AutoModel; import"
            " hf_intervene"
        ),
        (
            "from transformers import AutoModel; import hf_intervene.contexts; from diffusers"
            " import DiffusionPipeline"
        ),
    ],
)
def test_importing_the_package_makes_its_classes_known(pipe, tmp_path, imports):
    """In any order, and without one of its names."""
    pipe.save_pretrained(tmp_path)
    code = f"""if True:
        {imports}
        print(type(AutoModel.from_pretrained({str(tmp_path / "head")!r})).__name__)
        print(type(DiffusionPipeline.from_pretrained({str(tmp_path)!r})).__name__)
    """
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.split() == ["InterventionHead", "InterventionPipeline"], found.stderr[
        -2000:
    ]


def test_output_types(pipe):
    pil = pipe("quad1", num_images=2, generator=generator()).images
    array = pipe("quad1", num_images=2, generator=generator(), output_type="np").images
    assert pil[0].size == (16, 16) and array.shape == (2, 16, 16, 3)
    assert (
        pipe("quad1", num_images=2, generator=generator(), return_dict=False)[0][0].tobytes()
        == pil[0].tobytes()
    )


def test_edit_of_pil_images(pipe):
    images = pipe("obs", num_images=2, generator=generator()).images
    edited = pipe.edit(images, [["quad1"], {"size": 0.5}]).images
    assert [image.size for image in edited] == [(16, 16)] * 2
    assert edited[0].tobytes() != pipe.edit(images[0], "obs").images[0].tobytes()


def test_unknown_concept(pipe):
    with pytest.raises(ValueError, match="known ones are obs, quad1, size"):
        pipe(["quad1", "quad7"], num_images=1)


def test_a_model_without_a_head_is_no_pipeline():
    base = LightVAE(3, 16, block_out_channels=(8, 8))
    with pytest.raises(ValueError, match="no head"):
        InterventionPipeline.from_model(InterventionModel.build(base, ["a"], ablation="base"))
