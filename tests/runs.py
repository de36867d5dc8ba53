"""Runs of the trainer, in this process and in others, and what they leave."""

import os
import subprocess
import sys
from itertools import count
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from hf_intervene import trainer
from hf_intervene.trainer import TrainArguments, checkpoints
from hf_intervene.trainer.command import main
from hf_intervene.trainer.stopping import Stop


ROOT = Path(__file__).parents[1]


def run(settings, **overrides):
    return trainer.train(TrainArguments(**settings | overrides))


def stop_in_step(monkeypatch, number):
    """Have runs told to stop in the so manieth step of theirs."""
    steps = count(1)
    monkeypatch.setattr(
        Stop,
        "agreed",
        lambda self, accelerator, kind="step": kind == "step" and next(steps) >= number,
    )


def weights(folder):
    return load_file(Path(folder) / "model.safetensors") | {
        f"base.{k}": v
        for k, v in load_file(Path(folder) / "base" / "diffusion_pytorch_model.safetensors").items()
    }


def start_words(processes):
    """The words before a script that start it in so many processes, as users do."""
    if processes == 1:
        words = ["accelerate.commands.launch", "--cpu", "--num_processes", "1"]
        return [sys.executable, "-m", *words, "--num_machines", "1"]
    words = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, "-m", *words]


def launch(launcher, settings, script="training/train.py", name=None):
    """Train in processes of a launcher (words after `python -m`), on CPUs, with a file of settings
    of this name; what they print.
    """
    config = Path(settings["output_dir"]).with_name(
        f"{name or Path(settings['output_dir']).name}.yaml"
    )
    config.write_text(yaml.safe_dump(settings))
    done = subprocess.run(
        [sys.executable, "-m", *launcher, str(script), "--config", str(config)],
        cwd=ROOT,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-9000:]
    return done.stdout


def last_state(settings):
    folder = checkpoints.checkpoints(Path(settings["output_dir"]) / "checkpoints")[-1]
    return checkpoints.load_checkpoint(folder)


def assert_same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for key in a:
        if tolerance:
            torch.testing.assert_close(
                a[key], b[key], msg=lambda m, key=key: f"{key}: {m}", **tolerance
            )
        else:
            assert torch.equal(a[key], b[key]), key


def error_of(capsys, argv):
    assert main(argv) == 1
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(err) == 1
    return err[0]


def options(settings):
    words = []
    for key, value in settings.items():
        words += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


def arguments_of(settings):
    """Options of the script for settings; a file, so that lists and `None` need no care."""
    config = Path(settings["output_dir"]).with_suffix(".yaml")
    config.write_text(yaml.safe_dump(settings))
    return ["--config", str(config), "--resume", "auto"]
