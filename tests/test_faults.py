"""Faults outside the method: dead processes, infinite losses, clocks, caches, a read-only home."""

import os
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import datasets
import harm
import numpy as np
import pytest
import torch
from conftest import TINY
from diffusion_models import save_pipeline
from PIL import Image
from runs import arguments_of, assert_same, error_of, last_state, options, run, stop_in_step

from hf_intervene import InterventionModel, trainer
from hf_intervene.data import ContextImages, load_contexts, load_quad, quad
from hf_intervene.trainer import checkpoints, feeding
from hf_intervene.trainer.prepared import DiffusionBase


ROOT = Path(__file__).parents[1]


# Processes


def test_a_process_that_draws_images_dies(tmp_path):
    assert harm.run(harm.draw_and_die, str(tmp_path / "cache"), str(tmp_path / "error")) == 1
    assert "one of the 2 processes that draw images has died" in (tmp_path / "error").read_text()


def test_a_worker_of_a_loader_dies():
    """The workers are torch's. If one dies, the error must appear at once."""
    with pytest.MonkeyPatch.context() as patch:
        # The function is in another module: `datasets` pickles everything that it refers to.
        patch.setattr(quad, "_rows", partial(harm.dying_rows, quad._rows, os.getpid()))
        images = load_quad(images_per_context=8, resolution=8, streaming=True)
        loader = torch.utils.data.DataLoader(images, batch_size=None, num_workers=1, timeout=60)
        with pytest.raises(RuntimeError, match="DataLoader worker"):
            list(loader)


@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_processes_dies(tiny, tmp_path, victim):
    argv = arguments_of(tiny | {"max_steps": 100_000, "checkpoint_every": 2})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    errors = [str(tmp_path / f"errors-{rank}") for rank in (0, 1)]
    both = [harm.start(harm.trainer_rank, argv, errors[rank], rank, 2, port) for rank in (0, 1)]
    try:
        deadline = time.monotonic() + 600
        while not (tmp_path / "run" / "checkpoints" / "step-00000004").exists():
            assert all(process.is_alive() for process in both) and time.monotonic() < deadline
            time.sleep(0.01)
        both[victim].kill()
        survivor = both[1 - victim]
        survivor.join(60)
        assert survivor.exitcode == 1, "the other one waits for ever"
        assert (
            Path(errors[1 - victim])
            .read_text()
            .splitlines()[-1]
            .startswith("error: another process of this run has ended")
        )
        assert checkpoints.newest_checkpoint(tmp_path / "run" / "checkpoints")[2]["step"] >= 4
    finally:
        for process in both:
            process.kill()


# Losses that are not finite


def folder_of_images(path, side=16):
    """Make ten grey images of each of two contexts.

    Image n has the grey value 10 n, and 5 more in the context `hat`.
    """
    for number, context in enumerate(("obs", "hat")):
        (path / context).mkdir(parents=True)
        for value in range(10):
            Image.new("RGB", (side, side), (10 * value + 5 * number,) * 3).save(
                path / context / f"{value}.png"
            )
    return path


def test_an_image_whose_loss_is_not_finite_is_named(tiny, tmp_path, monkeypatch, capsys):
    """The base overflows on one image of the data."""
    settings = tiny | {
        "dataset": str(folder_of_images(tmp_path / "images")),
        "batch_size": 4,
        "max_steps": 40,
        "log_every": 7,
    }
    settings |= {"checkpoint_every": 3, "eval_every": 6, "split_by": "position"}
    original, poisoned, steps = feeding.Feed._inputs, 65 / 255, []  # image 6 of the context `hat`

    def inputs(*arguments):
        found = original(*arguments)
        wrong = found["pixel_values"][:, 0, 0, 0] == torch.tensor(poisoned)
        found["pixel_values"][wrong] = torch.nan
        steps.append(wrong.any())
        return found

    monkeypatch.setattr(feeding.Feed, "_inputs", inputs)
    error = error_of(capsys, options(settings))
    first = [bool(step) for step in steps].index(True)
    data = trainer.load_data(trainer.TrainArguments(**settings))[0]
    row = int((data.pixels[:, 0, 0, 0] == 65).nonzero()[0, 0])
    assert (
        f"the loss of step {first} is not finite for 1 of its 4 images (training images {row}"
        " ('hat');" in error
    )
    assert np.asarray(Image.open(tmp_path / "run" / "not_finite.png")).shape == (16, 16, 3)
    assert (np.asarray(Image.open(tmp_path / "run" / "not_finite.png")) == 65).all()
    last = first // 3 * 3  # every third step has a checkpoint, except the one after the bad step
    assert ("the last good state is" in error) == bool(last)
    if last:
        _, tensors, state = checkpoints.newest_checkpoint(tmp_path / "run" / "checkpoints")
        assert state["step"] == last and all(
            value.isfinite().all() for value in tensors["model"].values()
        )
    assert not (tmp_path / "run" / "model").exists()


def test_the_best_model_is_kept_when_everything_overflows(tiny, tmp_path, capsys, monkeypatch):
    def overflow(self, step, indices, original=feeding.Feed._fetch):
        host = original(self, step, indices)
        return host if step < 5 else host | {"noise": host["noise"] * float("inf")}

    monkeypatch.setattr(feeding.Feed, "_fetch", overflow)
    error = error_of(capsys, options(tiny | {"checkpoint_every": 1, "max_steps": 20}))
    assert "step 5 is not finite for 16 of its 16 images" in error and "8 more" in error
    assert f"the last good state is {tmp_path / 'run' / 'checkpoints' / 'step-00000005'}" in error
    model = InterventionModel.from_pretrained(tmp_path / "run" / "best")
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_an_image_that_the_autoencoder_of_a_denoiser_overflows_on(
    tiny, tmp_path, monkeypatch, capsys
):
    images = folder_of_images(tmp_path / "images")
    original = DiffusionBase.prepare

    def prepare(self, pixel_values):
        found = original(self, pixel_values)
        found["x0"][pixel_values[:, 0, 0, 0] == torch.tensor(65 / 255)] = torch.inf
        return found

    monkeypatch.setattr(DiffusionBase, "prepare", prepare)
    settings = tiny | {
        "dataset": str(images),
        "base": str(save_pipeline("dit", tmp_path / "dit")),
        "regime": "frozen",
    }
    assert "('hat') are not finite: look at it" in error_of(capsys, options(settings))


# Clocks


def test_clocks_that_jump_change_nothing(tiny, tmp_path, monkeypatch):
    """The newest checkpoint is that of the latest step. Training does not depend on the clock."""
    settings = tiny | {"checkpoint_every": 2, "keep_checkpoints": 9, "ema_decay": 0.9}
    run(settings)
    other = settings | {"output_dir": str(tmp_path / "other")}
    stop_in_step(monkeypatch, 5)
    assert run(other).step == 5
    monkeypatch.undo()
    for path in (tmp_path / "other").rglob("*"):  # later steps have older times
        age = int("".join(filter(str.isdecimal, path.parent.name)) or 0)
        os.utime(path, (2**31 - 1000 * age,) * 2)
    clock = iter(range(2**40, 0, -(10**6)))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    assert run(other, resume="auto").step == 8
    monkeypatch.undo()
    (a, _), (b, _) = last_state(settings), last_state(other)
    for name in ("model", "ema", "optimizer"):
        assert_same(a[name], b[name])


def test_checkpoints_are_ordered_by_their_steps(tmp_path):
    for number, step in enumerate((99_999_998, 100_000_001, 99_999_999)):
        path = checkpoints.save_checkpoint(
            tmp_path, step, {"model": {"w": torch.zeros(1)}}, {}, keep=9
        )
        os.utime(path, (10**6 * number,) * 2)
    for name in ("step-x", "step-", "step-00000001.bak"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{}")
    assert [int(path.name[5:]) for path in checkpoints.checkpoints(tmp_path)] == [
        99_999_998,
        99_999_999,
        100_000_001,
    ]


# Caches and files of images


@pytest.mark.parametrize("harm_done", ["half", "empty", "zeros", "tail", "info"])
def test_a_corrupt_cache_of_drawn_images(tmp_path, harm_done):
    load = lambda: load_quad(images_per_context=8, resolution=8, cache_dir=str(tmp_path))  # noqa: E731
    file = Path(load().cache_files[0]["filename"])
    whole = file.read_bytes()
    file.write_bytes(
        {
            "half": whole[: len(whole) // 2],
            "empty": b"",
            "zeros": bytes(len(whole)),
            "tail": whole[:-3],
        }.get(harm_done, whole)
    )
    if harm_done == "info":
        (file.parent / "dataset_info.json").write_text("{")
    with pytest.raises(
        OSError, match="the images in the cache are corrupt: remove .*quad-.*drawn again"
    ) as error:
        load()
    entry = Path(str(error.value).split("remove ")[1].split(", and")[0])
    assert entry.is_dir() and entry in file.parents
    for path in sorted(entry.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert load().num_rows == 8 * 7


def test_bytes_that_have_changed_in_a_cache(tmp_path):
    images = load_quad(images_per_context=8, resolution=8, cache_dir=str(tmp_path))
    file = Path(images.cache_files[0]["filename"])
    whole = file.read_bytes()
    at = whole.index(b"\x89PNG")
    file.write_bytes(whole[:at] + bytes(40) + whole[at + 40 :])
    with pytest.raises(ValueError, match=f"image 0 .{file}. of context 'obs' cannot be read"):
        ContextImages.from_dataset(
            load_quad(images_per_context=8, resolution=8, cache_dir=str(tmp_path)),
            list(quad.CONCEPTS),
        )


def test_a_corrupt_cache_of_a_folder_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = folder_of_images(tmp_path / "images")
    rows = [f"{context}/{n}.png,{context}" for context in ("obs", "hat") for n in range(10)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,context", *rows]))
    assert len(load_contexts(folder)) == 20
    for file in (tmp_path / "cache").rglob("*.arrow"):
        file.write_bytes(file.read_bytes()[:100])
    assert len(ContextImages.from_dataset(load_contexts(folder))) == 20


@pytest.mark.parametrize(
    "content", [None, b"", b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", 60]
)
def test_a_file_that_is_not_an_image_is_named(tiny, tmp_path, capsys, content):
    """A link without a target, an empty file, text files, the first bytes of an image."""
    file = folder_of_images(tmp_path / "images") / "hat" / "3.png"
    whole = file.read_bytes()
    file.unlink()
    if content is None:
        file.symlink_to(tmp_path / "nowhere.png")
    else:
        file.write_bytes(whole[:content] if isinstance(content, int) else content)
    error = error_of(capsys, options(tiny | {"dataset": str(tmp_path / "images")}))
    why = (
        "(No such file or directory): replace" if content is None else "as an image: it is damaged"
    )
    assert f"({file}) of context 'hat' cannot be read {why}" in error


@pytest.mark.parametrize("text", ["{", "[]", "null", "1", '{"features": 3}'])
@pytest.mark.parametrize("name", ["state.json", "dataset_info.json"])
def test_a_saved_data_set_that_is_damaged(tmp_path, name, text):
    load_contexts(folder_of_images(tmp_path / "images")).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / name).write_text(text)
    with pytest.raises(OSError, match="saved cannot be read: it is incomplete or corrupt"):
        load_contexts(tmp_path / "saved")


# A home that cannot be written


LOCAL_WORK = """
import sys, torch
from hf_intervene import InterventionModel, InterventionPipeline, bundled
from hf_intervene.cli import main
from hf_intervene.data import load_contexts, load_quad
from hf_intervene import trainer

out, images = sys.argv[1:]
pipe = InterventionPipeline.from_pretrained(bundled("quad"))
pipe.save_pretrained(out + "/pipeline")
assert len(pipe("quad1", num_images=2).images) == 2
assert main(["sample", out + "/pipeline", "--num-images", "1", "--output", out + "/a.png"]) == 0
assert main(["card", out + "/pipeline"]) == 0
settings = {settings!r} | dict(output_dir=out + "/run", dataset=images, max_steps=2, eval_every=1, tracker="tensorboard")
InterventionModel.from_pretrained(trainer.train(trainer.TrainArguments(**settings)).model_dir).sample("hat", 1)
assert len(list(load_quad(images_per_context=8, resolution=8, streaming=True))) == 56
for load, say in (
    (lambda: load_quad(images_per_context=8, resolution=8), "give another cache_dir"),
    (lambda: load_contexts(out + "/table"), "set HF_DATASETS_CACHE"),
):
    try:
        load()
    except OSError as error:
        assert say in str(error), error
    else:
        raise AssertionError("it was not read-only")
assert load_quad(images_per_context=8, resolution=8, cache_dir=out + "/cache").num_rows == 56
"""  # noqa: E501


def test_local_work_needs_no_home(tmp_path):
    """The home is below a file, so that not even root could write there."""
    (tmp_path / "file").write_text("")
    for name in ("images", "table"):
        folder_of_images(tmp_path / name)
    (tmp_path / "table" / "metadata.csv").write_text(
        "file_name,context\nobs/0.png,obs\nhat/1.png,hat\n"
    )
    home = str(tmp_path / "file" / "home")
    env = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("HF_", "XDG_", "TRANSFORMERS_", "MPLCONFIGDIR"))
    }
    env |= {
        "HOME": home,
        "HF_HOME": home + "/hf",
        "XDG_CACHE_HOME": home + "/cache",
        "HF_HUB_OFFLINE": "1",
    }
    work = LOCAL_WORK.replace("{settings!r}", repr(TINY))
    command = [sys.executable, "-c", work, str(tmp_path), str(tmp_path / "images")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
