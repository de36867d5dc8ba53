"""Fingerprints of images in splits, checkpoints and models."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY
from PIL import Image

from hf_intervene import evaluation, trainer
from hf_intervene.data import ContextImages, load_contexts
from hf_intervene.data.identity import changes, fingerprints, load_images, places
from hf_intervene.trainer.checkpoints import checkpoints, load_checkpoint
from hf_intervene.trainer.settings import TrainArguments


def fill(folder, count, seed):
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    start = len(list(folder.iterdir()))
    for number in range(start, start + count):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(
            folder / f"{number}.png"
        )


@pytest.fixture
def data(tmp_path):
    for seed, name in enumerate(("obs", "apple", "hat")):
        fill(tmp_path / "data" / name, 30, seed)
    return tmp_path / "data"


def read(folder, **options):
    return ContextImages.from_dataset(load_contexts(folder), None, 16, **options)


def marks(images):
    return set(images.fingerprints().tolist())


# The split


@pytest.mark.parametrize("seed", range(20))
def test_new_images_move_no_held_out_image_into_training(seed):
    rng = np.random.default_rng(seed)
    arrays = {name: rng.integers(0, 255, (60, 4, 4, 3), dtype=np.uint8) for name in ("obs", "hat")}
    train_then, held_out_then = (
        marks(part) for part in ContextImages.from_arrays(arrays, ["hat"]).split(0.2, seed)
    )
    more = rng.integers(0, 255, (7, 4, 4, 3), dtype=np.uint8)
    arrays = {
        "obs": arrays["obs"][::-1],
        "hat": np.concatenate([more[:3], arrays["hat"], more[3:]]),
    }
    train_now, held_out_now = (
        marks(part) for part in ContextImages.from_arrays(arrays, ["hat"]).split(0.2, seed)
    )
    assert (
        held_out_then <= held_out_now and train_then <= train_now and not train_now & held_out_now
    )
    assert 8 <= len(held_out_then) <= 45  # about a fifth of 120


def test_copies_of_an_image_are_on_one_side():
    image = np.random.default_rng(0).integers(0, 255, (40, 4, 4, 3), dtype=np.uint8)
    part, held_out = ContextImages.from_arrays({"obs": image, "hat": image}, ["hat"]).split(0.3)
    assert not marks(part) & marks(held_out)


@pytest.mark.parametrize("copies", [2, 5, 9])
def test_copies_are_not_parted_where_few_images_are_held_out(copies):
    """Ten images a context, of which the same one is there several times."""
    rng = np.random.default_rng(copies)
    for seed in range(20):
        arrays = {n: rng.integers(0, 255, (10, 4, 4, 3), dtype=np.uint8) for n in ("obs", "hat")}
        arrays["hat"][:copies] = arrays["hat"][0]
        train, held_out = ContextImages.from_arrays(arrays, ["hat"]).split(0.1, seed)
        assert not marks(train) & marks(held_out)
        assert all(len(part.by_context()["hat"]) for part in (train, held_out))


def test_a_context_of_copies_of_one_image_is_warned_of(caplog):
    rng = np.random.default_rng(0)
    arrays = {n: rng.integers(0, 255, (10, 4, 4, 3), dtype=np.uint8) for n in ("obs", "hat")}
    arrays["hat"][:] = arrays["hat"][0]
    ContextImages.from_arrays(arrays, ["hat"]).split(0.1)
    assert "all 10 images of context 'hat' are copies of one, so that what is held" in caplog.text
    assert "obs" not in caplog.text


def test_every_context_has_images_on_both_sides():
    same = np.zeros((8, 4, 4, 3), np.uint8)
    part, held_out = ContextImages.from_arrays({"obs": same, "hat": same + 1}, ["hat"]).split(0.01)
    assert [len(images) for side in (part, held_out) for images in side.by_context().values()] == [
        6,
        6,
        2,
        2,
    ]


def test_places_are_uniform_and_depend_on_the_seed():
    found = fingerprints(torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1).split(100))
    assert len(set(found.tolist())) == 256
    many = np.random.default_rng(0).integers(-(2**63), 2**63, 20_000)
    first, second = places(many, 0), places(many, 1)
    counts = np.histogram(first, 20, (0, 1))[0]
    assert (
        (counts - 1000) ** 2 / 1000
    ).sum() < 50  # chi square with 19 degrees of freedom: p > 1e-4
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05 and 0 <= first.min() and first.max() < 1


def test_the_same_files_are_the_same_images_in_any_folder(data, tmp_path):
    expected = read(data).fingerprints_by_context()
    shutil.copytree(data, tmp_path / "elsewhere")
    load_contexts(data).save_to_disk(tmp_path / "saved")
    for images in (
        read(tmp_path / "elsewhere"),
        read(tmp_path / "saved"),
        *(read(data, cache_dir=tmp_path / "c") for _ in "ab"),
    ):
        assert changes(expected, images.fingerprints_by_context()) is None
    part = read(data).select(["hat", "obs"])
    assert {k: v.tolist() for k, v in part.fingerprints_by_context().items()} == {
        k: expected[k].tolist() for k in ("hat", "obs")
    }


# Resuming a run


@pytest.fixture
def settings(data, tmp_path):
    own = {
        "dataset": str(data),
        "validation_fraction": 0.25,
        "max_steps": 4,
        "eval_every": 2,
        "output_dir": str(tmp_path / "run"),
    }
    return {
        k: v for k, v in TINY.items() if k not in ("images_per_context", "validation_images")
    } | own


def go_on(settings, **changed):
    return trainer.train(TrainArguments(**settings | {"resume": "auto", "max_steps": 4} | changed))


def rename(data):
    (data / "apple").rename(data / "zebra")


def swap(data):
    (data / "apple").rename(data / "x")
    (data / "hat").rename(data / "apple")
    (data / "x").rename(data / "hat")


def remove(data):
    (data / "hat" / "3.png").unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename, "context 'zebra' now has the images that 'apple' had"),
        (swap, "context '(apple|hat)' now has the images that '(apple|hat)' had"),
        (remove, "of 'hat', which had .* 0 are new and 1 are gone"),
        (lambda data: fill(data / "hat", 2, 9), "of 'hat', which had .* are new and 0 are gone"),
        (lambda data: fill(data / "shoe", 9, 9), "the context 'shoe' is new"),
        (lambda data: shutil.rmtree(data / "hat"), "the context 'hat' is gone"),
    ],
)
def test_other_images_are_noticed_when_a_run_goes_on(settings, data, change, message):
    trainer.train(TrainArguments(**settings))
    change(data)
    with pytest.raises(ValueError, match=f"was trained on other images: .*{message}") as error:
        go_on(settings)
    assert "train/" not in str(error.value) and "validation/" not in str(error.value)


def test_data_that_were_moved_are_recognised(settings, data, tmp_path):
    trainer.train(TrainArguments(**settings))
    data.rename(tmp_path / "elsewhere")
    assert go_on(settings, dataset=str(tmp_path / "elsewhere")).step == 4


def test_an_older_checkpoint_keeps_the_older_split(settings, tmp_path):
    settings |= {"context_prediction": 0.0, "mechanism": "mlp"}
    trainer.train(TrainArguments(**settings | {"split_by": "position"}))
    (path,) = checkpoints(tmp_path / "run" / "checkpoints")[-1:]
    state = json.loads((path / "state.json").read_text())
    del state["settings"]["split_by"], state["precision"], state["settings"]["context_prediction"]
    state["settings"] |= {"moment_matching": 0.0, "prior_matching": 0.0}
    state["files"].remove("images")
    (path / "state.json").write_text(json.dumps(state | {"settings_version": 2}))
    assert go_on(settings).step == 4
    assert (
        yaml.safe_load((tmp_path / "run" / "training_arguments.yaml").read_text())["split_by"]
        == "position"
    )


def test_a_resumed_run_keeps_the_precision_of_auto(settings, tmp_path, monkeypatch, capsys):
    settings |= {"mixed_precision": "auto"}
    monkeypatch.setattr("hf_intervene.trainer.sections.fast_bf16", lambda: False)
    trainer.train(TrainArguments(**settings))
    monkeypatch.setattr("hf_intervene.trainer.sections.fast_bf16", lambda: True)
    assert go_on(settings).step == 4
    assert "going on in the precision no" in capsys.readouterr().err
    (path,) = checkpoints(tmp_path / "run" / "checkpoints")[-1:]
    assert load_checkpoint(path)[1]["precision"] == "no"


def test_another_way_from_a_checkpoint_that_is_named(settings, tmp_path):
    trainer.train(TrainArguments(**settings | {"checkpoint_every": 2, "keep_checkpoints": 9}))
    folder = tmp_path / "run" / "checkpoints"
    state = json.loads((folder / "step-00000002" / "state.json").read_text())
    assert state["step"] == 2
    with pytest.raises(ValueError, match="other settings .learning_rate"):
        go_on(settings, learning_rate=1e-4)
    way = {"resume": str(folder / "step-00000002"), "learning_rate": 1e-4, "max_grad_norm": 1.0}
    assert go_on(settings, **way, output_dir=str(tmp_path / "other")).step == 4
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000004"]
    go_on(settings, **way)
    assert "earlier-step-00000004" in {path.name for path in folder.iterdir()}
    assert load_checkpoint(folder / "step-00000004")[1]["settings"]["learning_rate"] == 1e-4


def test_another_split_is_another_setting_and_no_other_context(settings):
    trainer.train(TrainArguments(**settings))
    for changed in ({"data_seed": 5}, {"validation_fraction": 0.5}):
        (name, value), *_ = changed.items()
        with pytest.raises(ValueError, match=f"other settings .{name} was .*, is {value}"):
            go_on(settings, **changed)


@pytest.mark.parametrize("name", ["", "best", "model"])
def test_a_folder_that_is_no_checkpoint_is_not_to_be_removed(settings, tmp_path, name):
    trainer.train(TrainArguments(**settings))
    with pytest.raises(OSError, match="is no checkpoint: give auto, or the folder") as error:
        go_on(settings, resume=str(tmp_path / "run" / name))
    advised = "checkpoints/step-00000004." if name == "" else "checkpoints/step-00000100."
    assert str(error.value).endswith(advised) and "remove" not in str(error.value)


# Measuring


def test_images_that_were_trained_on_are_not_measured_on(settings, data, tmp_path, capsys):
    trainer.train(TrainArguments(**settings))
    model, trained = tmp_path / "run" / "model", load_images(tmp_path / "run" / "model")
    split, _ = trainer.load_data(TrainArguments(**settings))
    assert changes(trained, split.fingerprints_by_context()) is None
    assert changes(trained, load_images(tmp_path / "run" / "best")) is None
    arguments = (str(data), ("apple", "hat"), 99, 0, 16, 3, "dependent")
    for split_then, said in (
        (evaluation.training_split(model), False),
        ((0.4, 1, "image"), True),
        (None, True),
    ):
        halves = evaluation.held_out_images(*arguments, split_then, trained=trained)
        seen = {image.tobytes() for images in split.by_context().values() for image in images}
        measured = {
            image.tobytes() for half in halves for images in half.values() for image in images
        }
        assert measured and not measured & seen
        assert ("were trained on and are left out" in capsys.readouterr().err) == said
    assert not load_images(tmp_path / "nowhere")
    (model / "training_images.safetensors").write_bytes(b"x")
    with pytest.raises(OSError, match="training_images.safetensors is truncated or corrupt"):
        load_images(model)
