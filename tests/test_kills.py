"""Runs that are killed, at random or at every step of a write, that find the disk full, or that are
two in one folder.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import count
from pathlib import Path

import harm
import numpy as np
import pytest
import torch
import yaml
from conftest import TINY
from PIL import Image
from runs import arguments_of, error_of, last_state, start_words
from safetensors.torch import load_file

from hf_intervene import InterventionModel
from hf_intervene.trainer import checkpoints, loop, run_folder


ROOT = Path(__file__).parents[1]


def hidden(folder):
    return sorted(
        path.name for path in Path(folder).rglob(".*") if path.name != run_folder.LOCK_FILE
    )


def all_whole(out):
    """The steps of the checkpoints, every one of which was written in one go."""
    steps = []
    for path in checkpoints.checkpoints(out / "checkpoints"):
        tensors, state = checkpoints.load_checkpoint(path)
        assert (
            tensors["model"]["w"].tolist() == 8 * [state["best"]]
            and tensors["optimizer"]["0.step"] == state["best"]
        )
        steps.append(state["step"])
    return steps


def test_whatever_step_of_a_write_is_killed_what_remains_is_whole(tmp_path):
    harm.write(tmp_path / "before", 1)
    for at in count(1):
        out = tmp_path / str(at)
        shutil.copytree(tmp_path / "before", out)
        status = harm.run(harm.write_and_die, str(out), 2, at)
        assert status in (0, -signal.SIGKILL)
        assert all_whole(out)[-1] in (1, 2, 3)
        with run_folder.sole_run(out):
            assert all_whole(out)[-1] in (2, 3) and not hidden(out)
        assert set(load_file(out / "best" / "model.safetensors")["w"].tolist()) in ({1.0}, {2.0})
        assert (out / "training_arguments.yaml").read_text() in ("value: 1\n", "value: 2\n")
        harm.write(out, 2)  # nothing stands in its way
        assert [path.name for path in checkpoints.checkpoints(out / "checkpoints")] == [
            "step-00000002",
            "step-00000003",
        ]
        if status == 0:
            break
    assert at > 20


def new_rows(history, before):
    rows = len(history.read_bytes().splitlines()) if history.exists() else 0
    return rows - before


def kill_after(process, history, rows, delay):
    """SIGKILL once so many rows have come to the history since it began, and after a delay; the
    exit status.
    """
    before, deadline = new_rows(history, 0), time.monotonic() + 600
    while process.is_alive() and new_rows(history, before) < rows:
        assert time.monotonic() < deadline, "training hangs"
        time.sleep(0.005)
    time.sleep(delay)
    process.kill()
    process.join(60)
    return process.exitcode


def check_what_a_kill_left(out, before):
    """Every checkpoint loads, none is older than before, and a best model that was there is there
    still. Returns the last step.
    """
    steps = [
        checkpoints.load_checkpoint(path)[1]["step"]
        for path in checkpoints.checkpoints(out / "checkpoints")
    ]
    last = steps[-1] if steps else 0
    assert last >= before["step"] and steps == sorted(steps)
    best = next((path for path in (out / "best", out / ".best.previous") if path.exists()), None)
    assert best is not None or not before["best"]
    if best is not None:
        InterventionModel.from_pretrained(best)
    before |= {"step": last, "best": best is not None}
    return last


def files_of(folder):
    """The contents of a run's folder by name, without the place that it is in, which diffusers
    keeps.
    """
    paths, place = sorted(Path(folder).rglob("*")), str(Path(folder).parent).encode()
    return {
        path.relative_to(folder).as_posix(): path.read_bytes().replace(place, b"")
        for path in paths
        if path.is_file()
    }


def assert_the_same_run(a, b):
    """Bit by bit: the last checkpoint, best and final model, and the history."""
    (tensors, state), (others, other) = last_state(a), last_state(b)
    assert {name: sorted(values) for name, values in tensors.items()} == {
        n: sorted(v) for n, v in others.items()
    }
    for name, values in tensors.items():
        assert all(torch.equal(value, others[name][key]) for key, value in values.items()), name
    folders = Path(a["output_dir"]), Path(b["output_dir"])
    assert state | {"settings": None} == other | {"settings": None}
    for part in ("best", "model", "samples"):
        first, second = (files_of(folder / part) for folder in folders)
        assert first == second, part
    histories = [(folder / "history.jsonl").read_text() for folder in folders]
    assert histories[0] == histories[1]
    assert [p.name for p in checkpoints.checkpoints(folders[0] / "checkpoints")] == [
        p.name for p in checkpoints.checkpoints(folders[1] / "checkpoints")
    ]
    assert not hidden(folders[1])


@pytest.mark.parametrize(
    ("kills", "steps", "seed"),
    [(3, 30, 0), *(pytest.param(20, 200, seed, marks=pytest.mark.slow) for seed in range(1, 3))],
)
def test_kills_at_random_moments_change_nothing(tmp_path, kills, steps, seed):
    every = {"checkpoint_every": 1, "eval_every": 2, "sample_every": 7, "log_every": 1}
    settings = (
        TINY
        | every
        | {"max_steps": steps, "patience": 1000, "ema_decay": 0.9, "schedule": "single"}
    )
    whole, killed = (
        {**settings, "output_dir": str(tmp_path / name)} for name in ("whole", "killed")
    )
    assert harm.run(harm.training, arguments_of(whole)) == 0
    out, before, draw, died = (
        tmp_path / "killed",
        {"step": 0, "best": False},
        random.Random(seed),
        0,
    )
    while died < kills:
        process = harm.start(harm.training, arguments_of(killed))
        rows = draw.choice((0, 1, 1, 2, 2, 3, 4))
        status = kill_after(
            process, out / "history.jsonl", rows, draw.random() * (0.15 if rows else 0.6)
        )
        assert status == -signal.SIGKILL, f"ended with status {status} after {died} kills"
        died += 1
        check_what_a_kill_left(out, before)
    assert harm.run(harm.training, arguments_of(killed)) == 0
    assert_the_same_run(whole, killed)


@pytest.mark.slow
def test_the_script_itself_is_killed_and_resumed(tmp_path):
    settings = TINY | {
        "checkpoint_every": 1,
        "log_every": 1,
        "max_steps": 40,
        "output_dir": str(tmp_path / "run"),
    }
    command = [sys.executable, "training/train.py", *arguments_of(settings)]
    for _ in range(2):
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        process.is_alive, process.join, process.exitcode = (
            lambda p=process: p.poll() is None,
            process.wait,
            None,
        )
        kill_after(process, tmp_path / "run" / "history.jsonl", 3, 0.01)
        check_what_a_kill_left(tmp_path / "run", {"step": 1, "best": False})
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300).returncode == 0


def test_a_second_run_in_a_folder_is_refused_and_a_killed_one_does_not_stand_in_the_way(
    tiny, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(loop, "PATIENCE", 1)
    settings = tiny | {"max_steps": 100_000, "log_every": 1, "checkpoint_every": 2}
    argv, history = arguments_of(settings), tmp_path / "run" / "history.jsonl"
    first = harm.start(harm.training, argv)
    while not (tmp_path / "run" / "checkpoints" / "step-00000002").exists():
        assert first.is_alive()
        time.sleep(0.01)
    rows = len(history.read_text().splitlines())
    assert "another run is writing in" in error_of(capsys, argv)
    assert len(history.read_text().splitlines()) >= rows and first.is_alive()
    first.kill()
    first.join(60)
    resumed = harm.start(harm.training, argv)
    assert kill_after(resumed, history, 1, 0) == -signal.SIGKILL
    assert json.loads(history.read_text().splitlines()[-1])["step"] > 2


@pytest.mark.parametrize(("free", "status"), [(10_000, 1), (130_000, 0)])
def test_files_that_cannot_grow_leave_the_last_checkpoint(tiny, tmp_path, free, status):
    """Nothing can be written any more, or the model can and checkpoints cannot."""
    argv = arguments_of(tiny | {"max_steps": 4})
    assert harm.run(harm.training, argv) == 0
    argv = arguments_of(tiny | {"max_steps": 8})
    state = tmp_path / "run" / "checkpoints" / "step-00000004" / "state.json"
    state.write_text(state.read_text().replace('"max_steps": 4', '"max_steps": 8'))
    best = files_of(tmp_path / "run" / "best")
    assert harm.run(harm.trainer_on_full_disk, argv, str(tmp_path / "errors"), free) == status
    errors = (tmp_path / "errors").read_text()
    assert "File too large" in errors and "Traceback" not in errors
    assert len(re.findall("^error: ", errors, re.M)) == status
    assert checkpoints.newest_checkpoint(tmp_path / "run" / "checkpoints")[2]["step"] == 4
    assert (files_of(tmp_path / "run" / "best") == best) == bool(status) and not hidden(
        tmp_path / "run"
    )
    InterventionModel.from_pretrained(tmp_path / "run" / "best")
    assert harm.run(harm.training, argv) == 0  # the disk has been cleared


@pytest.mark.parametrize(
    ("tracker", "size"),
    [
        ("none", 1 << 20),
        ("tensorboard", 1 << 20),
        ("tensorboard", 1 << 16),
        ("tensorboard", 1 << 12),
    ],
)
def test_a_disk_that_fills_up_leaves_the_last_checkpoint(tiny, tmp_path, tracker, size):
    disk, errors = tmp_path / "disk", tmp_path / "errors"
    disk.mkdir()
    settings = tiny | {
        "max_steps": 40,
        "checkpoint_every": 2,
        "keep_checkpoints": 100,
        "log_every": 1,
        "tracker": tracker,
    }
    (tmp_path / "disk.yaml").write_text(
        yaml.safe_dump(settings | {"output_dir": str(disk / "run")})
    )
    argv = ["--config", str(tmp_path / "disk.yaml")]
    status = harm.run(harm.trainer_on_small_disk, argv, str(errors), str(disk), size)
    if status == 77:
        pytest.skip("mounting is not allowed here")
    text = errors.read_text()
    assert "No space left on device" in text and status in (0, 1)
    assert "Traceback" not in text
    assert ("the tracker cannot write" in text) == (tracker == "tensorboard")
    assert len(re.findall("^error: ", text, re.M)) == status
    assert int(re.search(r"newest checkpoint: (\d+)", text)[1]) >= (2 if size == 1 << 20 else 0)


# SIGTERM, as schedulers of clusters send it


def children(process):
    """The processes that a launcher has started."""
    try:
        return [
            int(word)
            for word in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ]
    except OSError:
        return []


def preempt(process, to, draw):
    """SIGTERM to a launcher, to all of its process group, or to one of the processes that it
    started; or SIGKILL to the launcher.
    """
    if to == "killed launcher":
        process.kill()
    elif to == "group":
        os.killpg(process.pid, signal.SIGTERM)
    elif to == "child" and children(process):
        os.kill(draw.choice(children(process)), signal.SIGTERM)
    else:
        process.terminate()


def waits_for(found, seconds, what):
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, what
        time.sleep(0.05)


@pytest.mark.slow
def test_twenty_preemptions_in_turns_each_go_on_by_themselves(tmp_path):
    """While data are prepared and while it trains, validates and saves; the next command comes at
    once.
    """
    draw, out, grey = random.Random(0), tmp_path / "run", np.random.default_rng(0)
    for name in ("obs", "hat", "shoe"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(30):
            image = Image.fromarray(grey.integers(0, 255, (16, 16, 3), dtype=np.uint8))
            image.save(tmp_path / "data" / name / f"{number}.png")
    own = {
        "dataset": str(tmp_path / "data"),
        "image_cache": str(tmp_path / "cache"),
        "output_dir": str(out),
    }
    often = {
        "log_every": 1,
        "eval_every": 10,
        "sample_every": 20,
        "checkpoint_every": 10**6,
        "patience": 10**6,
    }
    script = ["training/train.py", *arguments_of(TINY | own | often | {"max_steps": 10**6})]
    one, two = start_words(1), start_words(2)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": str(ROOT),
    }
    quiet = {
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.PIPE,
        "text": True,
        "start_new_session": True,
    }
    turns = [
        ("launcher", one),
        ("killed launcher", two),
        ("group", one),
        ("killed launcher", one),
        ("launcher", two),
        ("child", one),
        ("killed launcher", two),
        ("group", two),
        ("killed launcher", one),
        ("child", two),
    ]
    started, late = [], []

    def newest():
        found = checkpoints.checkpoints(out / "checkpoints")
        return int(found[-1].name[5:]) if found else 0

    try:
        for number in range(21):  # the last one shows that the twentieth goes on
            to, launcher = turns[number % len(turns)]
            history, before, step = (
                out / "history.jsonl",
                new_rows(out / "history.jsonl", 0),
                newest(),
            )
            process = subprocess.Popen([*launcher, *script], cwd=ROOT, env=environment, **quiet)
            started.append(process)
            training = number % 3 != 2 or number == 20
            if training:
                grown = lambda p=process, h=history, b=before: (  # noqa: E731
                    new_rows(h, b) > 2 or p.poll() is not None
                )
                waits_for(grown, 300, f"kill {number} ({to}): the run does not go on")
                assert process.poll() is None, f"kill {number}: {process.stderr.read()[-2000:]}"
                time.sleep(draw.random())
            else:
                waits_for(lambda p=process: children(p), 60, "nothing is launched")
                time.sleep(8 * draw.random())
            training = training or new_rows(history, before) > 2
            told = time.monotonic()
            preempt(process, to, draw)
            if training:
                waits_for(lambda s=step: newest() > s, 60, f"kill {number} ({to}): no checkpoint")
                late.append(time.monotonic() - told)
    finally:
        for process in started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(60)
            process.stderr.close()
    assert max(late) < 10, late
    with run_folder.sole_run(out, patience=60):  # the last one may have been killed at its end
        assert not hidden(out)
