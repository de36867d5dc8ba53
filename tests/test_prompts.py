"""Images with prompts of their own: what a pipeline makes of each prompt is kept, and each image is
trained with its own.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import recorded
import torch
from PIL import Image
from safetensors.torch import load_file, save
from test_recording import generator, unheard, with_head

from hf_intervene.bases import PipelineBase
from hf_intervene.data import ContextImages, load_contexts
from hf_intervene.trainer import TrainArguments, build_model, load_data, train


PROMPTS = ["abc", "abcdef", "", "xyz"]


@pytest.fixture
def base(tmp_path):
    return PipelineBase.from_pipeline(
        unheard(), "abc", prompts=PROMPTS, prompt_folder=tmp_path / "prompts"
    )


def test_rows_with_prompts_of_other_lengths_are_denoised_as_each_alone(base):
    assert base.prompts.groups([0, 1, 2, 3, -1]) == [[0, 3, 4], [1], [2]]  # 3, 6, 0 and 3 letters
    with_head(base)
    numbers = torch.tensor([1, 0, 2, 3, -1, 1])
    x, t = (
        torch.randn(6, 4, 8, 8, generator=generator()),
        torch.tensor([100.0, 200.0, 300.0, 400.0, 500.0, 600.0]),
    )
    embedding = torch.randn(6, *base.embedding_shape, generator=generator(1))
    with torch.no_grad():
        together = base.denoise(x, t, embedding, prompts=numbers)
        for row, number in enumerate(numbers.tolist()):
            alone = PipelineBase.from_pipeline(unheard(), "abc" if number < 0 else PROMPTS[number])
            alone.model.load_state_dict(base.model.state_dict())
            alone.adapter.projections.load_state_dict(base.adapter.projections.state_dict())
            one = slice(row, row + 1)
            assert torch.allclose(
                alone.denoise(x[one], t[one], embedding[one]), together[one], atol=1e-5
            )
        assert not torch.allclose(base.denoise(x, t, embedding), together, atol=1e-3)


def test_gradients_reach_what_enters_whatever_the_lengths(base):
    model = with_head(base)
    prepared = base.prepare(torch.rand(3, 3, 16, 16)) | {"prompts": torch.tensor([0, 1, 2])}
    model(None, model.targets([["a"], ["b"], []]), prepared=prepared).loss.backward()
    assert all(parameter.grad is not None for parameter in base.adapter.projections.parameters())


def test_a_prompt_is_encoded_once(tmp_path, monkeypatch):
    folder = tmp_path / "prompts"
    PipelineBase.from_pipeline(unheard(), prompts=PROMPTS, prompt_folder=folder)
    pipe, seen = unheard(), []
    call = type(pipe).__call__

    def counted(self, prompt=None, num_images_per_prompt=1, num_inference_steps=10, generator=None):
        seen.append(prompt)
        return call(self, prompt, num_images_per_prompt, num_inference_steps, generator)

    monkeypatch.setattr(type(pipe), "__call__", counted)
    PipelineBase.from_pipeline(pipe, prompts=[*PROMPTS, "new"], prompt_folder=folder)
    assert seen[3:] == ["new"]  # after the three runs of the recording


def test_embeddings_in_place_of_a_prompt_leave_no_room_for_prompts(tmp_path):
    pipe, call = recorded.pipeline("flux")
    with pytest.raises(ValueError, match="prompts of images need the pipeline's text encoders"):
        PipelineBase.from_pipeline(pipe, call=call, prompts=["a"], prompt_folder=tmp_path)
    with pytest.raises(ValueError, match="give prompt_folder"):
        PipelineBase.from_pipeline(unheard(), prompts=["a"])


@pytest.fixture
def captioned(tmp_path):
    """A folder of images with a table, as data sets for text-to-image have it."""
    folder, rng = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    lines = ["file_name,context,text"]
    for number in range(48):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(
            folder / f"{number}.png"
        )
        lines.append(
            f"{number}.png,{('obs', 'a', 'b')[number % 3]},{('a', 'a b', 'b')[number % 2]}"
        )
    (folder / "metadata.csv").write_text("\n".join(lines))
    return folder


def test_prompts_stay_with_their_images(captioned):
    images = ContextImages.from_dataset(load_contexts(captioned), resolution=16)
    assert images.prompts == ["a", "a b"]
    pixels = {
        row.numpy().tobytes(): int(n)
        for row, n in zip(images.images(torch.arange(48)), images.prompt_ids)
    }
    for part in (
        *images.split(0.25),
        images.select(["b", "obs"]),
        images.subset(torch.tensor([5, 2, 7])),
    ):
        for row, number in zip(part.images(torch.arange(len(part))), part.prompt_ids):
            assert pixels[row.numpy().tobytes()] == int(number)


def test_training_with_prompts(captioned, tmp_path, tiny):
    """A pipeline of a folder, each image with its own prompt, and with the other one in half of its
    steps.
    """
    pipe, _ = recorded.sdxl_with_text()
    pipe.save_pretrained(tmp_path / "pipe")
    settings = {
        key: value
        for key, value in tiny.items()
        if key not in ("images_per_context", "validation_images")
    }
    settings |= {
        "dataset": str(captioned),
        "base": str(tmp_path / "pipe"),
        "regime": "frozen",
        "max_steps": 4,
    }
    arguments = TrainArguments(**settings, prompt_dropout=0.5, validation_fraction=0.25)
    data, _ = load_data(arguments)
    base = build_model(replace(arguments, output_dir=str(tmp_path / "other")), data).base
    own = [
        PipelineBase.from_pipeline(pipe, prompt).adapter.recorded.constants
        for prompt in data.prompts
    ]
    for number, constants in enumerate(own):
        for index, value in base.prompts[number].items():
            assert torch.allclose(value, constants[index], atol=1e-5)
    assert train(arguments).step == 4
    assert len(list((tmp_path / "run" / "prepared" / "prompts").iterdir())) == 2
    # What is beside the base is not exchanged meanwhile.
    table, pipe = captioned / "metadata.csv", tmp_path / "pipe"
    weights = pipe / "vae" / "diffusion_pytorch_model.safetensors"
    schedule = pipe / "scheduler" / "scheduler_config.json"
    scaled = {name: value * 0.9 for name, value in load_file(weights).items()}
    for file, content, name in (
        (table, table.read_text().replace("7.png,a,a b", "7.png,a,a").encode(), "prompts"),
        (weights, save(scaled, metadata={"format": "pt"}), "vae"),
        (
            schedule,
            json.dumps(json.loads(schedule.read_text()) | {"beta_end": 0.03}).encode(),
            "scheduler beta_end",
        ),
    ):
        before = file.read_bytes()
        assert content != before
        file.write_bytes(content)
        message = rf"trained with something else beside the base \(the {name}\): go on with"
        with pytest.raises(ValueError, match=message):
            train(replace(arguments, resume="auto"))
        file.write_bytes(before)
    assert train(replace(arguments, resume="auto")).step == 4
    # What was made of the images and prompts is made again where it was damaged.
    kept = [*(tmp_path / "run" / "prepared").rglob("*.npy")]
    kept += (tmp_path / "run" / "prepared" / "prompts").iterdir()
    contents = {file: file.read_bytes() for file in kept}
    damages = (
        lambda file, whole: file.write_bytes(b""),
        lambda file, whole: file.write_bytes(whole[: len(whole) // 2]),
        lambda file, whole: file.write_bytes(b"x" * len(whole)),
        lambda file, whole: file.unlink(),
    )
    assert len(contents) == len(damages)
    for damage, (file, whole) in zip(damages, contents.items()):
        damage(file, whole)
    assert train(replace(arguments, resume="auto")).step == 4
    assert {file: file.read_bytes() for file in kept} == contents
