"""Own data with other names of columns and several splits: every command reads them alike."""

import json

import numpy as np
import pytest
from conftest import TINY
from datasets import Dataset, DatasetDict
from PIL import Image

from hf_intervene import cli, evaluation, trainer
from hf_intervene.data import load_contexts
from hf_intervene.trainer.settings import TrainArguments
from hf_intervene.training import pretrain


OPTIONS = ["--image_column", "picture", "--context_column", "group"]


def table(count, seed):
    rng = np.random.default_rng(seed)
    images = [
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(3 * count)
    ]
    groups = [name for name in ("obs", "hat", "shoe") for _ in range(count)]
    return Dataset.from_dict({"picture": images, "group": groups, "age": list(range(3 * count))})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "data"
    DatasetDict({"train": table(20, 0), "test": table(9, 1)}).save_to_disk(folder)
    return folder


@pytest.fixture(scope="module")
def trained(saved, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    own = {
        "dataset": str(saved),
        "image_column": "picture",
        "context_column": "group",
        "validation_fraction": 0.3,
    }
    small = {"max_steps": 2, "eval_every": 2, "output_dir": str(out)}
    trainer.train(TrainArguments(**TINY | own | small))
    return out / "model"


def measured(trained, saved, out, *options):
    quick = ["--images", "99", "--projections", "5", "--no-tests", "--output", str(out)]
    assert (
        evaluation.main(
            [
                "--model",
                str(trained),
                "--dataset",
                str(saved),
                *quick,
                "--detector-images",
                "0",
                *options,
            ]
        )
        == 0
    )
    contexts = json.loads((out / "metrics.json").read_text())["contexts"]
    return {name: row["images"] for name, row in contexts.items()}


def test_evaluate_reads_the_data_as_training_did(trained, saved, tmp_path, capsys):
    found = measured(trained, saved, tmp_path, "--detector-images", "8")
    # of 60 images what was held out, in halves
    assert sum(found.values()) < 30 and set(found) == {
        "obs",
        "hat",
        "shoe",
    }
    assert "were trained on" not in capsys.readouterr().err


def test_another_split_is_measured_whole(trained, saved, tmp_path):
    assert measured(trained, saved, tmp_path, "--split", "test") == {"obs": 4, "hat": 4, "shoe": 4}


def test_columns_may_have_other_names_where_it_is_measured(trained, saved, tmp_path):
    renamed = load_contexts(saved, "test", "picture", "group")  # `image` and `context`
    renamed.save_to_disk(tmp_path / "renamed")
    options = ["--all", "--image-column", "image", "--context_column", "context"]
    assert measured(trained, tmp_path / "renamed", tmp_path / "m", *options) == {
        "obs": 4,
        "hat": 4,
        "shoe": 4,
    }


def test_check_reads_the_same(saved, capsys):
    argv = ["check", str(saved), "--resolution", "16", "--json"]
    assert cli.main([*argv, *(word.replace("_", "-") for word in OPTIONS), "--split", "test"]) in (
        0,
        1,
    )
    assert json.loads(capsys.readouterr().out)["images"] == {"obs": 9, "hat": 9, "shoe": 9}
    assert cli.main(argv) == 1
    error = capsys.readouterr().err
    assert "has no column 'image'" in error and "give image_column." in error


def test_pretrain_reads_the_same(saved):
    reading = {"split": "test", "image_column": "picture", "context_column": "group"}
    assert len(pretrain.observational_images(str(saved), 99, 16, reading=reading)) == 9


@pytest.mark.parametrize("name", ["split", "image_column", "context_column"])
def test_drawn_data_have_neither_columns_nor_splits(tiny, tmp_path, capsys, trained, name):
    with pytest.raises(
        ValueError, match=f"quad is drawn, and has no {name} to choose: leave {name} out"
    ):
        trainer.train(TrainArguments(**tiny | {name: "other"}))
    option = [f"--{name.replace('_', '-')}", "other"]
    for argv in (
        ["check", "quad"],
        ["evaluate", "--model", str(trained), "--dataset", "quad", "--output", str(tmp_path / "m")],
    ):
        assert cli.main([*argv, *option]) == 1
        assert f"leave {name} out" in capsys.readouterr().err


def test_the_grid_of_samples_shows_pairs_that_were_never_seen(trained):
    """A row of 16 pixels for obs, hat, shoe and hat+shoe."""
    (grid,) = (trained.parent / "samples").glob("*.png")
    assert Image.open(grid).height == 4 * 16


def test_evaluate_says_when_the_data_of_a_model_are_not_here(trained, tmp_path, capsys):
    argv = ["evaluate", "--model", str(trained), "--output", str(tmp_path / "m")]
    assert cli.main(argv) == 1
    assert "there is no such folder here: give --dataset." in capsys.readouterr().err


def test_a_run_goes_on_with_columns_of_other_names(saved, tmp_path):
    small = TINY | {
        "max_steps": 2,
        "eval_every": 2,
        "output_dir": str(tmp_path / "run"),
        "resume": "auto",
    }
    own = {"dataset": str(saved), "image_column": "picture", "context_column": "group"}
    trainer.train(TrainArguments(**small | own))
    load_contexts(saved, "train", "picture", "group").save_to_disk(tmp_path / "renamed")
    assert trainer.train(TrainArguments(**small | {"dataset": str(tmp_path / "renamed")})).step == 2
