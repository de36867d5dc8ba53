"""One thread and no network for every test; for those of the Hub, one on loopback."""

import os
import signal
import tempfile

from hub_server import HubServer


# The libraries read these once, when they are imported.
os.environ["HF_ENDPOINT"] = (HUB := HubServer()).url
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_DATASETS_CACHE"] = (
    CACHE := tempfile.TemporaryDirectory()
).name  # nothing is left in the user's own

import time

import pytest
import torch
from accelerate.state import AcceleratorState
from huggingface_hub import constants


torch.set_num_threads(1)
# A script that starts its commands in the background has them, and their children, ignore Ctrl-C,
# of which some tests want to see what it does.
signal.signal(signal.SIGINT, signal.default_int_handler)


TINY = {
    "resolution": 16,
    "images_per_context": 32,
    "validation_images": 8,
    "block_out_channels": [8, 8],
    "hidden_width": 16,
    "latent_width": 16,
    "noise_width": 4,
    "concept_width": 4,
    "free_blocks": 1,
    "flow_width": 8,
    "batch_size": 16,
    "max_steps": 8,
    "prior_steps": 4,
    "eval_every": 4,
    "sample_every": 8,
    "warmup_steps": 3,
    "log_every": 2,
    "mixed_precision": "no",
    "tracker": "none",
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps the precision of a process's first run; every test is a first run."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def tiny(tmp_path):
    """Settings of a training run of seconds."""
    return TINY | {"output_dir": str(tmp_path / "run")}


@pytest.fixture(scope="session")
def grey(tmp_path_factory):
    """The page of a tiny model of grey images."""
    from pages import grey_page  # the package is imported where it is used

    return grey_page(tmp_path_factory.mktemp("saved") / "digits")


@pytest.fixture
def waits(tmp_path, monkeypatch):
    """An empty Hub and an empty cache, nobody logged in; the client's waits before it tries again,
    which take no time.
    """
    HUB.reset()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited
