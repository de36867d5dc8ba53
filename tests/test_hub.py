"""Pushing to the Hub and loading from it, with and without failures.

The real client of the Hub talks to a server on loopback (`hub_server.py`).
"""

import pytest
import torch
from conftest import HUB
from diffusers import AutoencoderTiny, DiffusionPipeline
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError
from shared_models import ALICE, LOADERS, build, frozen_on, of_kind, one_sentence, outcome, put_vae

from hf_intervene import InterventionHead, InterventionModel, InterventionPipeline
from hf_intervene.bases import load_base


pytestmark = pytest.mark.usefixtures("waits")


# Push and load


@pytest.mark.parametrize("kind", LOADERS)
def test_pushed_in_one_commit_and_loaded_again(kind):
    saved = of_kind(kind, build())
    commit = saved.push_to_hub("alice/thing", **ALICE)
    repo = HUB.repos["alice/thing"]
    assert commit.oid == repo.refs["main"] and len(repo.commits) == 2  # the Hub made the first
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


def test_a_name_without_a_user_is_completed():
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
    # Otherwise the base of the earlier model would be loaded with this one.
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
    put_vae(seed=5, tmp_path=tmp_path)  # the base changes; the model keeps its commit
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
    """Like `pipe.vae` of a diffusers pipeline, which keeps only a path in the cache."""
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
    InterventionHead.from_pretrained("alice/m")  # this fetches no base
    with pytest.raises(OSError, match="not, or not whole, in the local cache"):
        InterventionModel.from_pretrained("alice/m", local_files_only=True)
    assert InterventionModel.from_pretrained("alice/m").concepts == ("a", "b")


def test_the_cache_is_used_while_the_hub_is_down():
    build().push_to_hub("alice/m", **ALICE)
    InterventionModel.from_pretrained("alice/m")
    HUB.fail("GET", "/api/models/alice/m", 503)
    assert InterventionModel.from_pretrained("alice/m").concepts == ("a", "b")


# Failures of the Hub and of the connection


def test_a_cut_download_continues_where_it_stopped(waits, monkeypatch):
    # A download is saved in pieces of this size; the default is 10 MB.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
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
    # A partial download is not found in the cache.
    with pytest.raises(OSError, match="not, or not whole, in the local cache"):
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
def test_errors_of_the_hub_while_loading(kind, status, message):
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
    if status == "cut":  # the commit was made completely, and only the answer is lost
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
