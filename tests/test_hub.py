"""Sharing, with the real client of the Hub against a server on loopback (`hub_server.py`), in fair
weather and foul.
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
from diffusers import AutoencoderTiny, DiffusionPipeline
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError
from shared_models import ALICE, build, frozen_on, of_kind, outcome, put_folder, put_vae

from hf_intervene import InterventionHead, InterventionModel, InterventionPipeline
from hf_intervene.bases import load_base


pytestmark = pytest.mark.usefixtures("waits")
LOADERS = {"head": InterventionHead, "model": InterventionModel, "pipeline": InterventionPipeline}


def one_sentence(error):
    """The message of an error of ours: a sentence, with what the client raised as its cause."""
    message = str(error.value)
    assert "\n" not in message and message.rstrip(")").endswith(".") and "http" not in message, (
        message
    )
    assert error.value.__cause__ is not None
    return message


# There and back


@pytest.mark.parametrize("kind", LOADERS)
def test_pushed_in_one_commit_and_loaded_again(kind):
    saved = of_kind(kind, build())
    commit = saved.push_to_hub("alice/thing", **ALICE)
    repo = HUB.repos["alice/thing"]
    assert commit.oid == repo.refs["main"] and len(repo.commits) == 2  # the first is the Hub's own
    assert HUB.asked("PUT", "/lfs/") and not any(
        "pickle" in path or path.endswith(".bin") for path in HUB.files("alice/thing")
    )
    assert ("samples.png" in HUB.files("alice/thing")) == (kind != "head")
    loaded = LOADERS[kind].from_pretrained("alice/thing")
    assert torch.equal(outcome(loaded), outcome(saved))
    assert b"alice/thing" in HUB.files("alice/thing")["README.md"]


def test_plain_diffusers_loads_a_pipeline():
    pipe = of_kind("pipeline", build())
    pipe.push_to_hub("alice/pipe", **ALICE)
    loaded = DiffusionPipeline.from_pretrained("alice/pipe")
    assert type(loaded) is InterventionPipeline and torch.equal(outcome(loaded), outcome(pipe))


def test_a_name_without_a_user_is_the_own_one():
    assert build().push_to_hub("thing", private=True, **ALICE).repo_url.repo_id == "alice/thing"
    assert HUB.repos["alice/thing"].private
    assert b'"alice/thing"' in HUB.files("alice/thing")["README.md"]


def test_revisions():
    first, second, third = (build(seed) for seed in (1, 2, 3))
    old = first.push_to_hub("alice/m", **ALICE).oid
    HfApi(token="hf_alice").create_tag("alice/m", tag="v1")
    new = second.push_to_hub("alice/m", **ALICE).oid
    third.push_to_hub("alice/m", revision="dev", **ALICE)
    request = third.push_to_hub("alice/m", create_pr=True, token="hf_bob")
    assert HUB.repos["alice/m"].refs["main"] == new and request.pr_revision == "refs/pr/1"
    for revision, model in (
        (old, first),
        ("v1", first),
        (new, second),
        (None, second),
        ("dev", third),
        ("refs/pr/1", third),
    ):
        loaded = InterventionModel.from_pretrained("alice/m", revision=revision)
        assert torch.equal(outcome(loaded), outcome(model)), revision
    with pytest.raises(OSError, match="has no revision 'v9'") as error:
        InterventionModel.from_pretrained("alice/m", revision="v9")
    one_sentence(error)


def test_a_push_replaces_what_is_ours_and_keeps_what_is_not(tmp_path):
    build().push_to_hub("alice/m", **ALICE)
    HUB.put(
        "alice/m",
        HUB.files("alice/m")
        | {
            "notes.txt": b"mine",
            "README.md": b"---\nlibrary_name: x\n---\nmy own words",
        },
    )
    put_vae(tmp_path=tmp_path)
    model = frozen_on(AutoencoderTiny.from_pretrained("org/vae"))
    commits = len(HUB.repos["alice/m"].commits)
    model.push_to_hub("alice/m", **ALICE)
    files = HUB.files("alice/m")
    assert len(HUB.repos["alice/m"].commits) == commits + 1
    # The base of the earlier model would be taken for this one's.
    assert not any(path.startswith("base/") for path in files) and "adapter/config.json" in files
    assert files["notes.txt"] == b"mine" and files["README.md"].endswith(b"my own words")
    assert torch.equal(outcome(InterventionModel.from_pretrained("alice/m")), outcome(model))


def test_pushing_the_same_again_makes_no_commit():
    commits = [build().head.push_to_hub("alice/m", **ALICE).oid for _ in range(2)]
    assert commits[0] == commits[1] and len(HUB.repos["alice/m"].commits) == 2


def test_save_pretrained_does_not_push_half(tmp_path):
    with pytest.raises(ValueError, match="use push_to_hub"):
        build().save_pretrained(tmp_path / "m", push_to_hub=True)
    assert HUB.repos == {} and not (tmp_path / "m").exists()


# A base in a repository of its own


@pytest.mark.parametrize("regime", ["frozen", "lora"])
def test_a_base_on_the_hub_is_pinned_to_its_commit(tmp_path, regime):
    commit = put_vae(tmp_path=tmp_path)
    model = frozen_on(
        AutoencoderTiny.from_pretrained("org/vae"), lora_rank=2 if regime == "lora" else 0
    )
    assert model.config.base_reference["revision"] == commit
    model.push_to_hub("alice/m", **ALICE)
    assert ("lora/adapter_model.safetensors" in HUB.files("alice/m")) == (regime == "lora")
    put_vae(
        seed=5, tmp_path=tmp_path
    )  # the base moves on; the model stays with the one that it knows
    constants.HF_HUB_CACHE += "-empty"
    torch.testing.assert_close(
        outcome(InterventionModel.from_pretrained("alice/m")), outcome(model), rtol=0, atol=1e-6
    )
    del HUB.repos["org/vae"]
    constants.HF_HUB_CACHE += "-too"
    with pytest.raises(
        OSError,
        match="the base that alice/m was trained on, org/vae, cannot be loaded .* pass base=",
    ) as error:
        InterventionModel.from_pretrained("alice/m")
    one_sentence(error)


def test_the_commit_of_a_base_out_of_a_folder_of_a_repository(tmp_path):
    """As `pipe.vae` of a diffusers pipeline has it: all that is kept is a path in the cache."""
    commit = put_vae("org/pipe", subfolder="vae", tmp_path=tmp_path)
    base = load_base("org/pipe", 16, "vae")
    reference = InterventionModel.build(base, ["a"]).config.base_reference
    assert {key: reference[key] for key in ("name_or_path", "subfolder", "revision")} == {
        "name_or_path": "org/pipe",
        "subfolder": "vae",
        "revision": commit,
    }
    with pytest.raises(OSError, match="there is no pretrained base 'org/none'.*no such repository"):
        load_base("org/none", 16)


# Offline


def test_offline_from_the_cache(monkeypatch):
    models = {kind: of_kind(kind, build()) for kind in LOADERS}
    for kind, saved in models.items():
        saved.push_to_hub(f"alice/{kind}", **ALICE)
    for kind in ("model", "pipeline"):
        LOADERS[kind].from_pretrained(f"alice/{kind}")
    InterventionHead.from_pretrained("alice/head")
    HUB.requests.clear()
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        options = {} if offline else {"local_files_only": True}
        for kind, saved in models.items():
            assert torch.equal(
                outcome(LOADERS[kind].from_pretrained(f"alice/{kind}", **options)), outcome(saved)
            )
            with pytest.raises(OSError, match="not, or not whole, in the local cache") as error:
                LOADERS[kind].from_pretrained("alice/other", **options)
            one_sentence(error)
    assert HUB.requests == []


def test_offline_with_part_of_it_in_the_cache():
    build().push_to_hub("alice/m", **ALICE)
    InterventionHead.from_pretrained("alice/m")  # fetches no base
    with pytest.raises(OSError, match="not, or not whole, in the local cache"):
        InterventionModel.from_pretrained("alice/m", local_files_only=True)
    assert InterventionModel.from_pretrained("alice/m").concepts == ("a", "b")


def test_a_hub_that_is_down_leaves_the_cache():
    build().push_to_hub("alice/m", **ALICE)
    InterventionModel.from_pretrained("alice/m")
    HUB.fail("GET", "/api/models/alice/m", 503)
    assert InterventionModel.from_pretrained("alice/m").concepts == ("a", "b")


# Foul weather


def test_a_cut_download_goes_on_where_it_stopped(waits, monkeypatch):
    monkeypatch.setattr(
        constants, "DOWNLOAD_CHUNK_SIZE", 1024
    )  # what has arrived is kept in pieces of this size, 10 MB elsewhere
    model = build()
    model.push_to_hub("alice/m", **ALICE)
    HUB.fail("GET", "/cdn/", "cut", times=1)
    HUB.requests.clear()
    loaded = InterventionModel.from_pretrained("alice/m")
    assert torch.equal(outcome(loaded), outcome(model)) and waits == [1]
    ranges = [headers["range"] for headers in HUB.asked("GET", "/cdn/") if "range" in headers]
    sizes = [
        len(data) for path, data in HUB.files("alice/m").items() if path.endswith(".safetensors")
    ]
    assert ranges in [[f"bytes={size // 2 // 1024 * 1024}-"] for size in sizes]


@pytest.mark.parametrize("kind", LOADERS)
def test_a_connection_that_never_recovers(kind):
    saved = of_kind(kind, build())
    saved.push_to_hub("alice/m", **ALICE)
    HUB.fail("GET", "/cdn/", "cut")
    with pytest.raises(OSError, match="the connection failed or was cut") as error:
        LOADERS[kind].from_pretrained("alice/m")
    one_sentence(error)
    with pytest.raises(
        OSError, match="not, or not whole, in the local cache"
    ):  # nothing half-loaded stays to be found
        LOADERS[kind].from_pretrained("alice/m", local_files_only=True)
    HUB.faults.clear()
    assert torch.equal(outcome(LOADERS[kind].from_pretrained("alice/m")), outcome(saved))


@pytest.mark.parametrize("kind", LOADERS)
def test_a_corrupted_download_is_not_loaded(kind):
    saved = of_kind(kind, build())
    saved.push_to_hub("alice/m", **ALICE)
    HUB.fail("GET", "/cdn/", "corrupt")
    with pytest.raises(OSError, match="of alice/m is corrupt, .* force_download=True"):
        LOADERS[kind].from_pretrained("alice/m")
    HUB.faults.clear()
    assert torch.equal(
        outcome(LOADERS[kind].from_pretrained("alice/m", force_download=True)), outcome(saved)
    )


def test_the_client_tries_again(waits):
    HUB.fail("POST", "/info/lfs/objects/batch", 503, times=2)
    HUB.fail("PUT", "/lfs/", 500, times=1)
    model = build()
    model.push_to_hub("alice/m", **ALICE)
    assert waits == [1, 2, 1]
    assert torch.equal(outcome(InterventionModel.from_pretrained("alice/m")), outcome(model))


def test_private_repositories():
    model = build()
    model.push_to_hub("alice/m", private=True, **ALICE)
    for token in (False, "hf_bob", "hf_nobody"):
        for loader in (InterventionModel, InterventionHead):
            with pytest.raises(
                OSError, match="no such repository, or it is private: .*hf auth login.*token="
            ) as error:
                loader.from_pretrained("alice/m", token=token)
            one_sentence(error)
    assert torch.equal(
        outcome(InterventionModel.from_pretrained("alice/m", **ALICE)), outcome(model)
    )


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "no such repository, or it is private"),
        (403, "access is denied"),
        (404, "no such repository, or it is private"),
        (409, "changed by somebody else"),
        (500, r"the Hub is not available \(it answered 500\)"),
        (503, r"the Hub is not available \(it answered 503\)"),
    ],
)
def test_what_the_hub_answers_to_a_load(kind, status, message):
    HUB.put("alice/m", {})
    HUB.fail("GET", "/api/models/alice/m", status)
    with pytest.raises(
        OSError,
        match=f"^there is no folder alice/m, and it cannot be loaded from the Hub: .*{message}",
    ) as error:
        LOADERS[kind].from_pretrained("alice/m")
    one_sentence(error)
    chain = [error.value]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    assert isinstance(chain[-1], HfHubHTTPError) or any(
        isinstance(e, HfHubHTTPError) for e in chain
    )


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/api/models/alice/m/tree", 401, "no such repository, or it is private"),
        ("POST", "/api/repos/create", 500, "not available"),
        ("POST", "/preupload/", 403, "access is denied"),
        ("POST", "/objects/batch", 404, "no such repository"),
        ("PUT", "/lfs/", 500, "not available"),
        ("PUT", "/lfs/", 403, "access is denied"),
        ("POST", "/commit/", 409, "changed by somebody else"),
        ("POST", "/commit/", 503, "not available"),
        ("POST", "/commit/", "cut", "connection failed or was cut"),
    ],
)
def test_a_push_that_fails_changes_nothing(method, path, status, message):
    first, second = build(1).head, build(2).head
    first.push_to_hub("alice/m", **ALICE)
    before = HUB.files("alice/m")
    if (
        status == "cut"
    ):  # the answer to a commit that has happened is lost: then it has happened, whole
        before = None
    HUB.fail(method, path, status)
    with pytest.raises(OSError, match=f"cannot push to alice/m.*{message}") as error:
        second.push_to_hub("alice/m", **ALICE)
    one_sentence(error)
    HUB.faults.clear()
    assert before is None or HUB.files("alice/m") == before
    loaded = InterventionHead.from_pretrained("alice/m")
    assert torch.equal(outcome(loaded), outcome(second if before is None else first))


def test_a_push_to_somebody_elses_repository():
    build(1).head.push_to_hub("alice/m", **ALICE)
    before = HUB.files("alice/m")
    for token, message in (
        ("hf_bob", "access is denied"),
        (False, "no such repository, or it is private"),
    ):
        with pytest.raises(OSError, match=message):
            build(2).head.push_to_hub("alice/m", token=token)
    assert HUB.files("alice/m") == before


# What is not one of ours, or not whole


@pytest.mark.parametrize("kind", LOADERS)
def test_what_is_not_ours(kind, tmp_path):
    HUB.put("org/bert", {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"?"})
    with pytest.raises((OSError, ValueError), match="org/bert|is not an intervention"):
        LOADERS[kind].from_pretrained("org/bert")
    HUB.put("org/empty", {"notes.txt": b""})
    with pytest.raises((OSError, ValueError), match="there is no saved model in org/empty"):
        LOADERS[kind].from_pretrained("org/empty")
    with pytest.raises(
        OSError,
        match=(
            "there is no folder .*nowhere, and it cannot be loaded from the Hub: that is not a name"
            " there"
        ),
    ) as error:
        LOADERS[kind].from_pretrained(tmp_path / "nowhere")
    one_sentence(error)


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


class Canary:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


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
        if part == "frozen base":  # the reference names the commit before: let it name this one
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
    # What was saved there is a checkpoint like any other, and with the package here its own code is
    # run, not the checkpoint's.
    (tmp_path / "again" / "modeling_intervention.py").write_text(
        "raise AssertionError('remote code was run')"
    )
    head = AutoModel.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert type(head) is InterventionHead and torch.equal(outcome(head), outcome(model.head))
