"""The trainer under the shipped configurations of accelerate, with two processes on CPUs."""

import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from runs import assert_same, error_of, last_state, launch, options, run, weights

from hf_intervene import InterventionModel
from hf_intervene.trainer import checkpoints, distributed


ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "training" / "configs" / "accelerate"


def launch_with(name, settings):
    """Train with two processes under a shipped configuration."""
    configuration = str(CONFIGS / f"{name}.yaml")
    launch(
        ["accelerate.commands.launch", "--config_file", configuration, "--main_process_port", "0"],
        settings,
    )


def skip_without_deepspeed(name):
    if name == "zero2":
        pytest.importorskip(
            "deepspeed", reason="ZeRO needs the extra `deepspeed`, which is not part of `test`"
        )


def assert_same_run(settings, other, **tolerance):
    (a, state_a), (b, state_b) = last_state(settings), last_state(other)
    assert (state_a["processes"], state_b["processes"]) == (1, 2)
    assert state_a["best"] == pytest.approx(state_b["best"], rel=1e-4)
    for name in a:
        assert_same(a[name], b[name], **tolerance)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero2"])
def test_two_processes_give_the_result_of_one_and_resume(tiny, tmp_path, name):
    """Weights, average and optimiser state; the second half of the run resumed, on another number
    of processes than the first.
    """
    skip_without_deepspeed(name)
    settings = tiny | {
        "ema_decay": 0.9,
        "base_norm": "none",
        "l2": 0.1,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
    }
    settings |= {"eval_every": 3, "validation_images": 11}
    # Context prediction as in test_train.py, and small steps: Adam makes steps of gradients that
    # are rounding.
    settings |= {"context_prediction": 1.0, "free_invariance": 1.0, "warmup_steps": 50}
    if name != "ddp":
        settings["optimizer"] = "adamw"  # muon wants whole matrices
    if name == "fsdp":
        settings |= {"edit_consistency": 0.0, "free_invariance": 0.0}  # they are left out there
    run(settings)
    two = settings | {"output_dir": str(tmp_path / "two")}
    launch_with(name, two)
    assert_same_run(settings, two, rtol=1e-3, atol=1e-5)
    assert_same(
        weights(tmp_path / "run" / "model"),
        weights(tmp_path / "two" / "model"),
        rtol=1e-3,
        atol=1e-5,
    )
    assert InterventionModel.from_pretrained(tmp_path / "two" / "model").sample(
        "quad1", 2
    ).shape == (2, 3, 16, 16)

    one_first, two_first = (
        str(tmp_path / run / "checkpoints" / "step-00000003") for run in ("run", "two")
    )
    resumed = settings | {"output_dir": str(tmp_path / "resumed"), "resume": one_first}
    launch_with(name, resumed)
    assert_same_run(settings, resumed, rtol=1e-3, atol=1e-5)
    alone = settings | {"output_dir": str(tmp_path / "alone"), "resume": two_first}
    run(alone)
    # Sharded weights are not laid out as whole ones are, and Adam makes whole steps, of 1e-4 here,
    # of gradients that are rounding.
    atol = 3e-4 if name == "fsdp" else 1e-5
    assert_same(
        last_state(alone)[0]["model"], last_state(settings)[0]["model"], rtol=1e-3, atol=atol
    )


def test_concepts_are_ordered_after_a_sharded_run(tiny, tmp_path):
    settings = tiny | {"concept_edges": True, "edit_consistency": 0.0, "free_invariance": 0.0}
    launch_with("fsdp", settings)
    model = InterventionModel.from_pretrained(tmp_path / "run" / "model")
    assert sorted(model.head.intervention.order.tolist()) == list(range(len(model.concepts)))
    assert model.sample("quad1", 2).shape == (2, 3, 16, 16)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_two_machines_give_the_result_of_one_and_resume(tiny, tmp_path, launcher):
    """As docs/cluster.md starts them, one process on each, here both on this one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    settings = tiny | {
        "max_steps": 6,
        "base_norm": "none",
        "context_prediction": 1.0,
        "free_invariance": 1.0,
        "warmup_steps": 50,
        "eval_every": 3,
        "image_cache": str(tmp_path / "cache"),
    }
    run(settings)
    two = settings | {"output_dir": str(tmp_path / "two"), "checkpoint_every": 3}

    def machine(rank):
        words = {
            "accelerate": [
                "accelerate.commands.launch",
                "--multi_gpu",
                "--num_machines",
                "2",
                "--num_processes",
                "2",
            ]
            + [
                "--machine_rank",
                str(rank),
                "--main_process_ip",
                "127.0.0.1",
                "--main_process_port",
                port,
            ],
            "torchrun": [
                "torch.distributed.run",
                "--nnodes",
                "2",
                "--nproc_per_node",
                "1",
                "--rdzv_id",
                "run",
            ]
            + ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}"],
        }[launcher]
        return launch(words, two | {"resume": "auto"}, name=f"machine-{rank}")

    with ThreadPoolExecutor(2) as machines:
        said = list(machines.map(machine, range(2)))
        assert_same_run(settings, two, rtol=1e-3, atol=1e-5)
        assert "".join(said).count("trained 6 steps") == 1
        shutil.rmtree(checkpoints.checkpoints(tmp_path / "two" / "checkpoints")[-1])  # of step 6
        said = list(machines.map(machine, range(2)))
    assert all("resuming from" in words for words in said)  # each machine says so
    assert_same_run(settings, two, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["fsdp", "zero2"])
@pytest.mark.parametrize("regime", ["fine-tune", "lora"])
def test_a_sharded_pretrained_base(tiny, tmp_path, regime, name):
    """Blocks gathered one at a time, scalar parameters, weights that are frozen and that thaw."""
    skip_without_deepspeed(name)
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    }
    vae = AutoencoderKL(
        **blocks, block_out_channels=(4, 5), norm_num_groups=1, layers_per_block=1, sample_size=16
    )
    vae.save_pretrained(tmp_path / "base")
    settings = tiny | {
        "base": str(tmp_path / "base"),
        "regime": regime,
        "lora_rank": 2,
        "residual_layers": 1,
        "max_steps": 5,
        "optimizer": "adamw",  # muon wants whole matrices
    }
    settings |= {"learning_rate": 1e-4, "context_prediction": 1.0, "free_invariance": 1.0}
    if name == "fsdp":
        settings |= {"edit_consistency": 0.0, "free_invariance": 0.0}  # they are left out there
    run(settings)
    two = settings | {"output_dir": str(tmp_path / "two")}
    launch_with(name, two)
    assert_same_run(settings, two, rtol=1e-2, atol=2e-5)
    a, b = (InterventionModel.from_pretrained(tmp_path / run / "model") for run in ("run", "two"))
    noise = torch.randn(2, *a.noise_shape)
    samples = [
        model.sample("quad1", noise=noise, generator=torch.Generator().manual_seed(0))
        for model in (a, b)
    ]
    torch.testing.assert_close(*samples, rtol=0, atol=2e-2)


@pytest.mark.parametrize(
    ("variables", "precision", "message"),
    [
        ({"DEEPSPEED_ZERO_STAGE": "3"}, "no", "with zero_stage 2"),
        ({"DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "no", "without offloading"),
        (
            {"GRADIENT_CLIPPING": "1.0"},
            "no",
            "without offloading, gradient_accumulation_steps, gradient_clipping",
        ),
        ({"DEEPSPEED_CONFIG_FILE": "zero.json"}, "no", "deepspeed_config_file"),
        ({}, "fp16", "under mixed_precision fp16"),
    ],
)
def test_what_deepspeed_is_not_run_with_is_one_sentence(
    tiny, monkeypatch, capsys, variables, precision, message
):
    monkeypatch.setattr(distributed, "is_deepspeed_available", lambda: True)
    for name, value in (variables | {"USE_DEEPSPEED": "true"}).items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    assert message in error_of(capsys, options(tiny | {"mixed_precision": precision}))


def test_a_missing_deepspeed_is_one_sentence(tiny, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "is_deepspeed_available", lambda: False)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert "pip install 'hf-intervene[deepspeed]'" in error_of(capsys, options(tiny))
