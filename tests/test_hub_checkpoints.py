"""Checkpoints on the Hub that are refused, and the head without this package.

The real client of the Hub talks to a server on loopback (`hub_server.py`).
"""

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import HUB
from diffusers import AutoencoderTiny
from hostile import Canary
from huggingface_hub import constants
from shared_models import (
    ALICE,
    LOADERS,
    build,
    frozen_on,
    of_kind,
    one_sentence,
    outcome,
    put_folder,
    put_vae,
)

from hf_intervene import InterventionHead, InterventionModel, InterventionPipeline


pytestmark = pytest.mark.usefixtures("waits")


# Other models, and models that are incomplete


@pytest.mark.parametrize("kind", LOADERS)
def test_other_models_are_refused(kind, tmp_path):
    HUB.put("org/bert", {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"?"})
    with pytest.raises((OSError, ValueError), match="org/bert|is not an intervention"):
        LOADERS[kind].from_pretrained("org/bert")
    HUB.put("org/empty", {"notes.txt": b""})
    with pytest.raises((OSError, ValueError), match="there is no saved model in org/empty"):
        LOADERS[kind].from_pretrained("org/empty")
    with pytest.raises(
        OSError,
        match=(
            "there is no folder .*nowhere, and it cannot be loaded from the Hub: that is not a"
            " valid name"
        ),
    ) as error:
        LOADERS[kind].from_pretrained(tmp_path / "nowhere")
    one_sentence(error)


@pytest.mark.parametrize("kind", LOADERS)
def test_names_that_are_not_names(kind, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for name, options, message in (
        (5, {}, "named by its folder or Hub name, not by a int"),
        ("", {}, "the name of the model is empty"),
        (tmp_path / "config.json", {}, "config.json is a file: give the folder"),
        ("alice/m", {"revision": 5}, "revision must be a text, not 5"),
    ):
        with pytest.raises((OSError, TypeError), match=message):
            LOADERS[kind].from_pretrained(name, **options)


def test_a_model_and_a_pipeline_are_not_mixed_up():
    for kind in ("model", "pipeline"):
        of_kind(kind, build()).push_to_hub(f"alice/{kind}", **ALICE)
    with pytest.raises(ValueError, match="InterventionPipeline.from_pretrained"):
        InterventionModel.from_pretrained("alice/pipeline")
    with pytest.raises(ValueError, match="InterventionModel.from_pretrained"):
        InterventionPipeline.from_pretrained("alice/model")
    assert InterventionHead.from_pretrained("alice/pipeline", subfolder="head").config.concepts == [
        "a",
        "b",
    ]


PARTS = {
    "head": ("model.safetensors", "pytorch_model.bin"),
    "base": ("base/diffusion_pytorch_model.safetensors", "base/diffusion_pytorch_model.bin"),
    "adapter": (
        "adapter/diffusion_pytorch_model.safetensors",
        "adapter/diffusion_pytorch_model.bin",
    ),
    "lora": ("lora/adapter_model.safetensors", "lora/adapter_model.bin"),
    "frozen base": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
}


@pytest.mark.parametrize("where", ["hub", "folder"])
@pytest.mark.parametrize("part", PARTS)
def test_weights_that_are_missing_or_pickled(part, where, tmp_path):
    put_vae(tmp_path=tmp_path)
    if part == "base":
        model = build()
    else:
        model = frozen_on(
            AutoencoderTiny.from_pretrained("org/vae"), lora_rank=2 if part == "lora" else 0
        )
    model.save_pretrained(tmp_path / "m")
    owner = tmp_path / ("org/vae" if part == "frozen base" else "m")
    safe, pickled = PARTS[part]
    (owner / safe).unlink()
    constants.HF_HUB_CACHE += "-empty"
    for step in ("missing", "pickled"):
        if step == "pickled":
            (owner / pickled).write_bytes(pickle.dumps(Canary(tmp_path / "unpickled")))
        for repo_id, folder in (("org/vae", tmp_path / "org/vae"), ("alice/m", tmp_path / "m")):
            put_folder(repo_id, folder)
        if part == "frozen base":  # the reference must name the new commit
            config = (tmp_path / "m" / "config.json").read_text()
            config = re.sub(
                r'"revision": "\w+"', f'"revision": "{HUB.repos["org/vae"].refs["main"]}"', config
            )
            (tmp_path / "m" / "config.json").write_text(config)
            put_folder("alice/m", tmp_path / "m")
        with pytest.raises(
            OSError,
            match=r"no whole weights in safetensors format .*pickle files, which are never loaded",
        ):
            InterventionModel.from_pretrained("alice/m" if where == "hub" else tmp_path / "m")
        if part == "head":
            with pytest.raises(OSError, match="the head of .* no whole weights"):
                InterventionHead.from_pretrained("alice/m" if where == "hub" else tmp_path / "m")
    assert not (tmp_path / "unpickled").exists()
    assert not HUB.asked("GET", ".bin") and not list(Path(constants.HF_HUB_CACHE).rglob("*.bin"))


@pytest.mark.parametrize("part", ["head", "base"])
def test_a_pipeline_whose_weights_are_pickled(part, tmp_path):
    of_kind("pipeline", build()).save_pretrained(tmp_path / "p")
    for file in (tmp_path / "p" / part).glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    put_folder("alice/p", tmp_path / "p")
    for name in ("alice/p", tmp_path / "p"):
        with pytest.raises(
            OSError, match=f"the {part} of .* no whole weights in safetensors format"
        ):
            InterventionPipeline.from_pretrained(name)


def test_a_shard_that_is_missing(tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "m", max_shard_size="1KB")
    assert torch.equal(outcome(InterventionModel.from_pretrained(tmp_path / "m")), outcome(model))
    shards = sorted((tmp_path / "m").glob("model-*.safetensors"))
    shards[1].unlink()
    with pytest.raises(
        OSError, match=f"no whole weights in safetensors format .{shards[1].name} missing"
    ):
        InterventionModel.from_pretrained(tmp_path / "m")


# Without this package


ELSEWHERE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_intervene":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel

def refused(load):
    try:
        load("alice/model")
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
    else:
        raise AssertionError("loaded without being trusted")

refused(AutoConfig.from_pretrained)
refused(AutoModel.from_pretrained)
assert AutoConfig.from_pretrained("alice/model", trust_remote_code=True).concepts == ["a", "b"]
places = {"model": ("alice/model", ""), "head": ("alice/head", ""), "pipeline": ("alice/pipeline", "head"), "folder": (sys.argv[1], "")}
found = {}
for place, (name, subfolder) in places.items():
    head = AutoModel.from_pretrained(name, subfolder=subfolder, trust_remote_code=True)
    assert type(head).__name__ == "InterventionHead" and type(head).__module__.startswith("transformers_modules."), type(head)
    noise = torch.randn(2, head.config.num_blocks, head.config.noise_width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found[place] = head(noise, head.targets("a+b", 2)).embedding
        values, chosen = torch.ones(2, head.config.num_blocks, head.config.concept_width), head.targets("a", 2) > 0
        assert torch.equal(head(noise, head.targets("b", 2), values, chosen).concepts[:, 0], values[:, 0])
head.save_pretrained(sys.argv[2])
save_file(found, sys.argv[2] + "/found.safetensors")
assert "hf_intervene" not in sys.modules and "diffusers" not in sys.modules
"""  # noqa: E501


def test_the_head_loads_without_the_package(tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoModel

    model = build()
    for kind in LOADERS:
        of_kind(kind, model).push_to_hub(f"alice/{kind}", **ALICE)
    of_kind("pipeline", model).save_pretrained(tmp_path / "p")
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    environment.pop("HF_TOKEN", None)
    arguments = [str(tmp_path / "p" / "head"), str(tmp_path / "again")]
    run = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    for place, embedding in load_file(tmp_path / "again" / "found.safetensors").items():
        assert torch.equal(embedding, outcome(model.head)), place
    # The saved head is an ordinary checkpoint. With this package installed, the code of the package
    # runs, not that of the checkpoint.
    (tmp_path / "again" / "modeling_intervention.py").write_text(
        "raise AssertionError('remote code was run')"
    )
    head = AutoModel.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert type(head) is InterventionHead and torch.equal(outcome(head), outcome(model.head))
