"""Runs that are asked to stop: a signal to the launcher, to one of several processes, to a group,
before a long validation.
"""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import TINY
from diffusion_models import save_pipeline
from PIL import Image
from runs import start_words

from hf_intervene import evaluation, trainer
from hf_intervene.data import decoding
from hf_intervene.trainer import prepared, run_folder, state, stopping
from hf_intervene.trainer.checkpoints import checkpoints, newest_checkpoint
from hf_intervene.trainer.distributed import warn_of_launcher
from hf_intervene.trainer.prepared import DiffusionBase, PreparedImages
from hf_intervene.trainer.settings import TrainArguments
from hf_intervene.trainer.stopping import Stop
from hf_intervene.training import pretrain


ROOT = Path(__file__).parents[1]
LONG = {
    "max_steps": 100_000,
    "log_every": 1,
    "eval_every": 100_000,
    "checkpoint_every": 100_000,
    "warmup_steps": 1,
}


def script(tmp_path, **settings):
    config = tmp_path / "settings.yaml"
    config.write_text(
        yaml.safe_dump(TINY | LONG | {"output_dir": str(tmp_path / "run")} | settings)
    )
    return ["training/train.py", "--config", str(config), "--resume", "auto"]


def launched(command):
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(found, seconds=180):
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "it hangs"
        time.sleep(0.05)


def rows(tmp_path):
    history = tmp_path / "run" / "history.jsonl"
    return len(history.read_text().splitlines()) if history.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("to", ["launcher", "group", "one"])
def test_sigterm_leaves_a_checkpoint_and_the_same_command_goes_on(tmp_path, processes, to):
    command, step = start_words(processes) + script(tmp_path), 0
    for _ in range(2):
        process, before = launched(command), rows(tmp_path)
        wait_for(
            lambda process=process, before=before: (
                rows(tmp_path) > before + 2 or process.poll() is not None
            )
        )
        assert process.poll() is None, process.stderr.read()[-3000:]
        if to == "group":
            os.killpg(process.pid, signal.SIGTERM)
        elif to == "one":
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(children[-1]), signal.SIGTERM)
        else:
            process.terminate()
        told = time.monotonic()
        wait_for(lambda step=step: newest_step(tmp_path) > step, 15)
        assert time.monotonic() - told < 15
        step = newest_step(tmp_path)
        if to != "launcher":
            process.wait(60)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_in_a_long_validation_leaves_a_checkpoint(tmp_path, processes):
    """And the next command validates, and goes on with the best model as if nothing had been."""
    long = {
        "images_per_context": 8,
        "validation_images": 6000,
        "validation_fraction": 0.99,
        "batch_size": 2 * processes,
        "eval_every": 2,
        "max_steps": 2,
    }
    (tmp_path / "whole").mkdir()
    assert launched(start_words(processes) + script(tmp_path / "whole", **long)).wait(600) == 0
    process = launched(start_words(processes) + script(tmp_path, **long))
    wait_for(lambda: rows(tmp_path) == 2 or process.poll() is not None)
    time.sleep(2)
    assert rows(tmp_path) == 2 and process.poll() is None  # it validates
    told = time.monotonic()
    os.killpg(process.pid, signal.SIGTERM)
    wait_for(lambda: newest_step(tmp_path) == 2, 10)
    process.wait(30)
    assert time.monotonic() - told < 30 and rows(tmp_path) == 2
    assert newest_checkpoint(tmp_path / "run" / "checkpoints")[2]["owed"][0] == "validate"
    assert launched(start_words(processes) + script(tmp_path, **long)).wait(600) == 0
    found, whole = left_by(tmp_path / "run"), left_by(tmp_path / "whole" / "run")
    assert found[:2] == whole[:2]


def newest_step(tmp_path):
    found = newest_checkpoint(tmp_path / "run" / "checkpoints")
    return found[2]["step"] if found else 0


def test_a_launcher_that_has_ended_stops_the_run(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    ours, calls, getppid = threading.get_ident(), count(), os.getppid

    def parent():  # of the loop's own thread, from its fourth step on, another one
        return 2 if threading.get_ident() == ours and next(calls) >= 3 else getppid()

    monkeypatch.setattr(stopping.os, "getppid", parent)
    result = trainer.train(TrainArguments(**tiny))
    assert result.interrupted and result.step == 4 and newest_step(tmp_path) == 4
    # without a launcher, as under nohup, parents come and go
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND")
    assert not trainer.train(TrainArguments(**tiny | {"resume": "auto"})).interrupted


@pytest.mark.parametrize(
    ("seconds", "expected"), [(5.0, [1, 1, 1]), (0.5, [1, 2, 2]), (0.01, [1, 10, 10])]
)
def test_processes_agree_after_a_second_or_a_step(monkeypatch, seconds, expected):
    """Steps between agreements, by how long a step takes."""
    clock = SimpleNamespace(now=0.0, agreements=[])
    monkeypatch.setattr(stopping.time, "monotonic", lambda: clock.now)

    def reduce(told, how):
        clock.agreements.append(clock.now)
        return 2 * told  # two processes that have the same to say

    monkeypatch.setattr(stopping, "reduce", reduce)
    stop, accelerator = Stop(), SimpleNamespace(num_processes=2, device="cpu")
    for _ in range(40):
        clock.now += seconds
        assert not stop.agreed(accelerator)
    steps = torch.tensor([0.0, *clock.agreements]).div(seconds).round().diff()[:3].tolist()
    assert steps == expected
    stop.asked = True
    assert any(stop.agreed(accelerator) for _ in range(10))


def stop_at(monkeypatch, number):
    """Ask runs to stop when they look for that for the so manieth time, in every command."""
    looked = count(1)
    monkeypatch.setattr(
        Stop, "asked", property(lambda self: next(looked) == number, lambda self, value: None)
    )
    return looked


def left_by(folder):
    """All that a run says and makes, as far as it does not depend on the clock."""
    saved = {
        str(path.relative_to(folder)): path.read_bytes()
        for pattern in ("model/*.safetensors", "best/*.safetensors", "samples/*", "*.jsonl")
        for path in folder.glob(pattern)
    }
    tensors, state = newest_checkpoint(folder / "checkpoints")[1:]
    kept = {name: state[name] for name in ("step", "best", "waited", "owed", "schedule")}
    weights = {f"{file} {name}": t for file in tensors for name, t in tensors[file].items()}
    return saved, kept, weights


def test_a_run_that_is_stopped_anywhere_ends_like_one_that_is_not(tiny, tmp_path, monkeypatch):
    """In steps, batches of a validation, rows of a grid of samples, batches of codes that concepts
    are ordered by, steps of the fit of the prior: wherever a run looks whether it is to stop."""
    more = {
        "validation_images": 8,  # of each context: several batches
        "batch_size": 8,
        "concept_edges": True,
        "ema_decay": 0.9,
        "log_every": 1,
        "prior_steps": 20,
        "eval_every": 4,
        "sample_every": 4,
        "checkpoint_every": 8,
    }
    settings, kinds, check = tiny | more, [], Stop.check

    def told(self, accelerator, kind="step"):
        kinds.append(kind)
        return check(self, accelerator, kind)

    monkeypatch.setattr(Stop, "check", told)
    looked = stop_at(monkeypatch, None)
    assert trainer.train(TrainArguments(**settings)).step == 8
    whole, looks = left_by(tmp_path / "run"), next(looked) - 1
    assert {"step", "validation", "codes"} == set(kinds) and looks > len(kinds) + 30
    # Before step 2 is ordered; in a validation; in a grid; in the fit, twice; in the last grid.
    again, left = settings | {"output_dir": str(tmp_path / "again"), "resume": "auto"}, []
    for number in (3, 8, 12, 62, 9, 20, None):
        stop_at(monkeypatch, number)
        result = trainer.train(TrainArguments(**again))
        if result.interrupted:
            fit = newest_checkpoint(tmp_path / "again" / "checkpoints" / "prior")
            owed = newest_checkpoint(tmp_path / "again" / "checkpoints")[2]["owed"]
            left.append((result.step, owed, fit and fit[2]["step"]))
    both = ["validate", "draw samples"]
    assert left[:3] == [(2, [], None), (4, both, None), (4, both[1:], None)]
    assert [step for step, *_ in left[3:]] == [8, 8, 8] and not any(owed for _, owed, _ in left[3:])
    assert 0 < left[3][2] < left[4][2] < left[5][2] == 20
    found = left_by(tmp_path / "again")
    assert found[1] == whole[1] and found[0].keys() == whole[0].keys()
    for name in whole[2]:
        assert torch.equal(found[2][name], whole[2][name]), name
    for name in whole[0]:
        assert found[0][name] == whole[0][name], name
    assert not (tmp_path / "again" / "checkpoints" / "prior").exists()


def test_a_requeued_run_waits_for_the_end_of_the_one_before(tmp_path):
    hold = f"""if True:
        import time
        from pathlib import Path
        from filelock import FileLock
        with FileLock({str(tmp_path / run_folder.LOCK_FILE)!r}):
            print("held", flush=True)
            time.sleep(1)"""
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(OSError, match="another run is writing in"),
            run_folder.sole_run(tmp_path),
        ):
            pass
        with run_folder.sole_run(tmp_path, patience=30):
            pass


@pytest.mark.parametrize("number", ["ENOLCK", "EOPNOTSUPP"])
def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys, number):
    code = getattr(errno, number)

    def no_lock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", no_lock)
    with run_folder.sole_run(tmp_path):
        (tmp_path / "x").write_text("")
    assert "has no locks" in capsys.readouterr().err


# What defaults do


def test_what_the_launcher_was_told_about_precision(monkeypatch):
    monkeypatch.setattr("hf_intervene.trainer.sections.fast_bf16", lambda: False)
    for launched_with, setting, expected in (
        ("bf16", "auto", "bf16"),
        ("fp16", "auto", "fp16"),
        ("no", "auto", "no"),
        ("bf16", "no", "no"),
    ):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched_with)
        assert TrainArguments(mixed_precision=setting).run.precision == expected


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MIXED_PRECISION", "bf16", "told mixed_precision bf16, .* otherwise: it is no"),
        ("MIXED_PRECISION", "fp8", "told mixed_precision fp8, .* otherwise: it is no"),
        ("MIXED_PRECISION", "no", None),
        ("GRADIENT_ACCUMULATION_STEPS", "4", "accumulation_steps 4, .* otherwise: it is 1"),
        ("GRADIENT_ACCUMULATION_STEPS", "1", None),
        ("DYNAMO_BACKEND", "INDUCTOR", "told dynamo_backend, .* otherwise: nothing is compiled"),
        ("DYNAMO_BACKEND", "NO", None),
    ],
)
def test_what_a_launcher_was_told_and_is_not_done_is_said(
    monkeypatch, capsys, name, value, message
):
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    warn_of_launcher("no", 1)
    said = capsys.readouterr().err
    assert re.search(message, said) if message else not said


@pytest.mark.parametrize(("warmup", "warned"), [(200, True), (3, False)])
def test_a_run_that_is_shorter_than_its_warm_up_is_warned_of(tiny, capsys, warmup, warned):
    trainer.train(TrainArguments(**tiny | {"warmup_steps": warmup, "max_steps": 4}))
    assert ("the run has 4 steps, fewer than its warm-up" in capsys.readouterr().err) == warned


def test_a_tracker_that_fails_does_not_end_a_run(tiny, capsys, monkeypatch):
    def no_login(*_, **__):
        raise RuntimeError("api_key not configured (no-tty).\n call wandb.login")

    monkeypatch.setattr(Accelerator, "init_trackers", no_login)
    assert trainer.train(TrainArguments(**tiny | {"tracker": "tensorboard"})).step == 8
    error = capsys.readouterr().err
    assert (
        "the tracker cannot write (api_key not configured (no-tty). call wandb.login) and is"
        " left out" in error
    )


def test_history_of_a_stopped_run_is_json(tiny, tmp_path, monkeypatch):
    calls = count(1)
    monkeypatch.setattr(
        Stop, "asked", property(lambda self: next(calls) >= 3, lambda self, value: None)
    )
    assert trainer.train(TrainArguments(**tiny | {"log_every": 1})).interrupted
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()
    ]
    assert steps[-1] == 3 and checkpoints(tmp_path / "run" / "checkpoints")


# While data are prepared


def interrupted_while(monkeypatch, module, name, happening):
    """Have something happen when a function is called first; afterwards it takes ten seconds, if it
    is not ended.
    """
    original, calls = getattr(module, name), count()

    def slow(*arguments, **options):
        if next(calls) == 0:
            happening()
            time.sleep(10)
        return original(*arguments, **options)

    monkeypatch.setattr(module, name, slow)


@pytest.mark.parametrize("how", ["sigterm", "ctrl-c", "launcher"])
def test_a_run_that_prepares_data_ends_at_once_and_goes_on(
    tiny, tmp_path, monkeypatch, capsys, how
):
    ended = threading.Event()
    monkeypatch.setattr(stopping, "orphaned", ended.is_set)
    happens = {
        "sigterm": lambda: os.kill(os.getpid(), signal.SIGTERM),
        "ctrl-c": lambda: os.kill(os.getpid(), signal.SIGINT),
        "launcher": ended.set,
    }
    interrupted_while(monkeypatch, state, "load_data", happens[how])
    argv = script(tmp_path, max_steps=2)[1:]
    began = time.monotonic()
    assert trainer.main(argv) == 130
    assert time.monotonic() - began < 6
    assert "stopped: the same command goes on from here" in capsys.readouterr().err
    ended.clear()
    assert trainer.main(argv) == 0  # the lock is free, and nothing half done stands in its way


@pytest.mark.parametrize("command", ["evaluate", "pretrain"])
def test_a_signal_ends_measuring_and_pretraining_with_nothing_half_written(
    tmp_path, monkeypatch, capsys, command
):
    module = {"evaluate": evaluation.command, "pretrain": pretrain}[command]
    name = {"evaluate": "load_model", "pretrain": "observational_images"}[command]
    interrupted_while(monkeypatch, module, name, lambda: os.kill(os.getpid(), signal.SIGTERM))
    argv = ["--output", str(tmp_path / "out")] + (
        ["--model", "nowhere"] if command == "evaluate" else []
    )
    # a test of a page in this process may have left another than the default
    before = signal.getsignal(signal.SIGTERM)
    assert module.main(argv) == 130 and not list((tmp_path / "out").iterdir())
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("damage", ["nothing", "cut", "gone"])
def test_images_that_are_half_prepared_are_gone_on_from(tiny, tmp_path, monkeypatch, damage):
    """What a frozen autoencoder made of images until SIGTERM is not made again, unless it was
    damaged meanwhile."""
    own = {"base": str(save_pipeline("dit", tmp_path / "dit")), "regime": "frozen", "max_steps": 1}
    prepare, done = DiffusionBase.prepare, []

    def counted(self, x):
        done.append(len(x))
        if stopping_at == len(done):
            os.kill(os.getpid(), signal.SIGTERM)
        return prepare(self, x)

    def arrays(name):
        return {file.name: np.load(file) for file in tmp_path.glob(f"{name}/prepared/*/*.npy")}

    monkeypatch.setattr(DiffusionBase, "prepare", counted)
    stopping_at = 2
    argv = script(tmp_path, **own)[1:]
    assert trainer.main(argv) == 130 and done == [64, 64]
    partial = tmp_path / "run" / "prepared" / "train.partial"
    if damage == "cut":
        (partial / "x0.npy").write_bytes((partial / "x0.npy").read_bytes()[:-1])
    elif damage == "gone":
        (partial / "x0.npy").unlink()
    stopping_at = None
    done.clear()
    assert trainer.main(argv) == 0
    assert sum(done) == 7 * (32 + 8) - (64 if damage == "nothing" else 0)
    assert not partial.exists()
    trainer.main(script(tmp_path, **own, output_dir=str(tmp_path / "whole"))[1:])
    whole, found = arrays("whole"), arrays("run")
    assert whole and all(np.array_equal(found[name], whole[name]) for name in whole)


def test_a_signal_after_the_last_image_was_prepared(tmp_path):
    """Nothing is left to prepare, and the run goes on."""
    made = []

    class Three(SimpleNamespace):
        contexts, context_ids = ["obs"], torch.zeros(3).long()

        def __len__(self):
            return 3

        def images(self, rows):
            return torch.ones(len(rows), 3, 4, 4, dtype=torch.uint8)

    images = Three()
    base = SimpleNamespace(
        model=SimpleNamespace(device="cpu"), prepare=lambda x: made.append(len(x)) or {"x0": x}
    )

    def stop():
        raise KeyboardInterrupt

    write = PreparedImages._write
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "partial", {"of": "these"}, base, images, 3, stop)
    write(tmp_path / "partial", {"of": "these"}, base, images, 3, lambda: None)
    assert made == [3] and np.load(tmp_path / "partial" / "x0.npy").shape == (3, 3, 4, 4)


def test_a_disk_that_is_full_while_images_are_prepared(tiny, tmp_path, monkeypatch, capsys):
    own = {"base": str(save_pipeline("dit", tmp_path / "dit")), "regime": "frozen", "max_steps": 1}
    argv = script(tmp_path, **own)[1:]

    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(prepared.os, "fsync", full)
        assert trainer.main(argv) == 1
    assert "train.partial: No space left on device; what is prepared" in capsys.readouterr().err
    assert trainer.main(argv) == 0


def test_images_half_decoded_into_a_cache_are_removed(tiny, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for name in ("obs", "hat"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(10):
            image = Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8))
            image.save(tmp_path / "data" / name / f"{number}.png")
    interrupted_while(
        monkeypatch, decoding, "flat_image", lambda: os.kill(os.getpid(), signal.SIGTERM)
    )
    own = {
        "dataset": str(tmp_path / "data"),
        "image_cache": str(tmp_path / "cache"),
        "max_steps": 2,
    }
    argv = script(tmp_path, **own)[1:]
    assert trainer.main(argv) == 130
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]
    assert trainer.main(argv) == 0


def test_what_an_orphan_is(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert not stopping.orphaned()
    monkeypatch.setattr(stopping.os, "getppid", lambda: 1)
    assert stopping.orphaned()
    # from the beginning: the launcher ended before, or is process 1 of a container
    monkeypatch.setattr(stopping, "_PARENT", 1)
    for launcher in (True, False):
        monkeypatch.setattr(stopping, "_is_launcher", lambda process, launcher=launcher: launcher)
        assert stopping.orphaned() != launcher
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND", raising=False)
    assert not stopping.orphaned()  # without a launcher, as under nohup


# The folder of a run


def removing(folder, at):
    """What removes the folder of a run after so many rows of its history."""
    rows = count(1)
    return lambda row: shutil.rmtree(folder) if next(rows) == at else None


def test_a_folder_that_is_removed_in_mid_run_is_made_and_locked_again(tiny, tmp_path, capsys):
    settings, out = (
        tiny | {"max_steps": 12, "log_every": 1, "checkpoint_every": 4},
        tmp_path / "run",
    )
    locked = []

    def look(row):
        remove(row)
        if row["step"] == 10:
            with (
                pytest.raises(OSError, match="another run is writing in"),
                run_folder.sole_run(out),
            ):
                pass
            locked.append(out)

    remove = removing(out, 6)
    assert trainer.train(TrainArguments(**settings), look).step == 12
    assert (
        f"{out} was removed while a run was writing in it: it is made again"
        in capsys.readouterr().err
    )
    assert locked and (out / "model" / "model.safetensors").exists() and newest_step(tmp_path) == 12
    run_folder.check_own(out)  # it is a run's, which goes on
    assert trainer.train(TrainArguments(**settings | {"resume": "auto"})).step == 12


def test_a_folder_that_another_run_has_taken_meanwhile_is_left_to_it(tiny, tmp_path):
    out, hold = tmp_path / "run", ExitStack()
    remove = removing(out, 3)

    def take(row):
        remove(row)
        if not out.exists():
            out.mkdir()
            hold.enter_context(run_folder.sole_run(out))
            (out / "theirs").write_text("")

    with hold, pytest.raises(OSError, match="another run is writing in"):
        trainer.train(TrainArguments(**tiny | {"max_steps": 12, "log_every": 1}), take)
    assert (out / "theirs").exists() and not (out / "model").exists()
