"""avatars: stored faces, their attributes and twins; no person is in both splits."""

import hashlib
import json
import re

import numpy as np
import pytest

from hf_intervene import evaluation, trainer
from hf_intervene.data import avatars, load_avatars
from hf_intervene.trainer import simulated
from hf_intervene.training import pretrain


ALL = (*avatars.TRAIN_CONTEXTS, *avatars.HELD_OUT)
CONCEPT_COLUMNS = ("glasses", "beard", "hat", "mouth")
DIGESTS = {  # SHA-256 of the generator's images, in the order of the names of contexts
    "train": "60a3a834db53200e169534f216b3740424e11d4a4b59128c4414895d6e347065",
    "holdout": "6cd10ec4ec2c49320491de25f0087af068da09a4f303cb7b7051a793501d1211",
}
PERSONAL = [name for name in avatars.ATTRIBUTES if name not in CONCEPT_COLUMNS]


def images_seen(images):
    """Return the images of several arrays (n, H, W, C) as a list of bytes."""
    return [image.tobytes() for array in images for image in array]


# The files


def test_images_are_those_of_the_generator():
    """The digest is of the original 32x32 images, which the package stores as 16x16 cells."""
    for split, expected in DIGESTS.items():
        contexts, _ = avatars.available(split)
        stored = avatars.images_by_context(contexts, split=split)
        digest = hashlib.sha256()
        for name in sorted(stored):
            digest.update(stored[name].tobytes())
        assert digest.hexdigest() == expected, split


def test_splits_have_their_contexts_and_numbers():
    assert avatars.available("train") == (avatars.TRAIN_CONTEXTS, 4000)
    assert avatars.available("holdout") == (ALL, 1400)
    assert len(avatars.HELD_OUT) == 6 + 2 and avatars.HELD_OUT[-1] == "glasses+beard+hat+smile"
    for split in avatars.SPLITS:
        columns = avatars.attributes_by_context(avatars.available(split)[0], split=split)
        for attributes in columns.values():
            assert tuple(attributes) == avatars.ATTRIBUTES
            assert {len(column) for column in attributes.values()} == {avatars.available(split)[1]}


def test_no_person_of_the_training_images_is_held_out():
    training = images_seen(avatars.images_by_context(resolution=16).values())
    held_out = images_seen(avatars.twins(resolution=16).values())
    assert len(set(training)) == 20_000 and not set(training) & set(held_out)


@pytest.mark.parametrize("split", avatars.SPLITS)
def test_interventions_make_their_concepts_certain_and_leave_the_others(split):
    contexts, number = avatars.available(split)
    natural = np.array([0.05, 0.05, 0.03, 0.0])
    error = np.sqrt(natural * (1 - natural) / number)
    for name, attributes in avatars.attributes_by_context(contexts, split=split).items():
        on = np.isin(avatars.CONCEPTS, name.split("+"))
        rates = avatars.concepts_present(attributes).mean(0)
        assert (rates[on] == 1).all()
        assert (np.abs(rates - natural) <= 4 * error)[~on].all()
        accessories = np.mean([value is not None for value in attributes["accessories"]])
        assert abs(accessories - 0.1) < 4 * np.sqrt(0.09 / number)


def test_twins_differ_only_in_what_was_intervened_on():
    columns = avatars.attributes_by_context(ALL, split="holdout")
    images, obs = avatars.twins(), avatars.twins(["obs"])["obs"]
    present = avatars.concepts_present(columns["obs"])
    assert tuple(images) == ALL
    for name in ALL[1:]:
        on = np.isin(avatars.CONCEPTS, name.split("+"))
        for column, intervened in zip(CONCEPT_COLUMNS, on):
            same = columns[name][column] == columns["obs"][column]
            kept = present[:, CONCEPT_COLUMNS.index(column)]
            # A concept that was there stays as it is; of two mouths one is sad and one happy.
            assert np.array_equal(same, kept) if intervened else same.all()
        for column in PERSONAL:
            assert np.array_equal(columns[name][column], columns["obs"][column])
        changed = (images[name] != obs).any((1, 2, 3))
        assert np.array_equal(changed, ~present[:, on].all(1)), name
    smiling = (images["smile"] != obs).any(-1).mean((1, 2)) * 16**2
    assert 1 <= smiling.min() and smiling.max() < 20  # only the cells of the mouth


def test_a_pair_changes_what_its_single_interventions_change():
    """Glasses and mouths have no common pixel, so that their changes add up."""
    images = {name: x.astype(int) for name, x in avatars.twins(resolution=16).items()}
    edits = {name: x - images["obs"] for name, x in images.items()}
    apart = ((edits["glasses"] != 0) & (edits["smile"] != 0)).any((1, 2, 3))
    assert not apart.any()
    assert np.array_equal(edits["glasses+smile"], edits["glasses"] + edits["smile"])


# Requests


def test_resolutions_repeat_pixels():
    small, native, large = (
        avatars.images_by_context(["hat"], 5, side)["hat"] for side in (16, 32, 64)
    )
    assert native.shape == (5, 32, 32, 3) and native.dtype == np.uint8
    for factor, images in ((2, native), (4, large)):
        for i in range(factor):
            for j in range(factor):
                assert np.array_equal(images[:, i::factor, j::factor], small)
    default = avatars.images_by_context(["hat"], 5)["hat"]
    assert np.array_equal(default, native)
    default[:] = 0  # a copy, so that the stored images do not change
    assert np.array_equal(avatars.images_by_context(["hat"], 5)["hat"], native)


def test_concepts_present_reads_columns():
    attributes = {
        "glasses": [None, "dark01", None],
        "beard": [None, None, None],
        "hat": ["variant01", None, None],
        "mouth": ["sad01", "happy13", "happy01"],
    }
    expected = [[0, 0, 1, 0], [1, 0, 0, 1], [0, 0, 0, 1]]
    present = avatars.concepts_present(attributes)
    assert present.dtype == bool and present.tolist() == expected
    with pytest.raises(ValueError, match="lack 'hat'"):
        avatars.concepts_present({k: v for k, v in attributes.items() if k != "hat"})


def test_dataset_holds_the_stored_images_and_is_cached(tmp_path):
    arguments = {"images_per_context": 6, "split": "holdout", "cache_dir": str(tmp_path)}
    data = load_avatars(["obs", "hat+glasses"], **arguments)
    assert data.column_names == ["image", "context", "person", *avatars.ATTRIBUTES]
    assert data["context"][:] == ["obs"] * 6 + ["glasses+hat"] * 6
    assert data["person"][:] == [*range(6)] * 2
    images = avatars.twins(["glasses+hat"])["glasses+hat"]
    assert np.array_equal(np.stack([np.asarray(image) for image in data["image"][6:]]), images[:6])
    assert avatars.concepts_present(data[6:]).all(0).tolist() == [True, False, True, False]
    columns = avatars.attributes_by_context(["glasses+hat"], 6, "holdout")["glasses+hat"]
    assert all(data[6:][name] == column.tolist() for name, column in columns.items())
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.arrow")}
    load_avatars(["obs", "hat+glasses"], **arguments)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.arrow")} == files
    row = next(iter(load_avatars(["smile"], streaming=True)))
    assert row["person"] == 4 * 4000 and row["mouth"].startswith("happy")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "no split 'test'; choose one of train, holdout"),
        ({"split": ["train"]}, "no split"),
        ({"contexts": ["moustache"]}, "unknown concept 'moustache'"),
        ({"contexts": ["hat=0.5"]}, "full interventions only"),
        ({"contexts": "obs"}, "must be a list"),
        ({"contexts": ["glasses+hat"]}, "no images of 'glasses\\+hat'.*take split='holdout'"),
        ({"contexts": ["beard+hat+smile"], "split": "holdout"}, "choose among those"),
        ({"resolution": 28}, "multiple of 16 pixels"),
        ({"resolution": 0}, "multiple of 16 pixels"),
        ({"resolution": 32.5}, "whole number"),
        ({"images_per_context": 0}, "at least 1"),
        ({"images_per_context": 4001}, "has 4000 images of each context in its split 'train'"),
        ({"images_per_context": 1401, "split": "holdout"}, "has 1400 images"),
    ],
)
def test_bad_arguments_are_one_sentence(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        load_avatars(**arguments)
    assert "\n" not in str(caught.value)


# Training and measuring


def test_persons_are_for_training_or_validation_and_halves_have_the_same_ones(tiny):
    settings = tiny | {"dataset": "avatars", "images_per_context": 3000, "validation_images": 300}
    data, validation = trainer.load_data(trainer.TrainArguments(**settings))
    assert data.contexts == list(avatars.TRAIN_CONTEXTS) and data.image_shape == (3, 16, 16)
    assert len(data) == 5 * 3000 and len(validation) == 5 * 300
    trained = images_seen([data.pixels.numpy()])
    validating = images_seen([validation.pixels.numpy()])
    assert len(set(trained) | set(validating)) == 5 * 3300  # all distinct
    real, other = evaluation.held_out_images(
        "avatars", avatars.CONCEPTS, 100, 0, 16, 3, "dependent"
    )
    assert tuple(real) == tuple(other) == ALL
    measured = images_seen([*real.values(), *other.values()])
    assert not set(measured) & (set(trained) | set(validating))
    twins = avatars.twins(resolution=16)
    stored = {image.tobytes(): number for number, image in enumerate(twins["obs"])}
    persons = [[stored[image.tobytes()] for image in half["obs"]] for half in (real, other)]
    assert len({*persons[0], *persons[1]}) == 200
    for half, numbers in zip((real, other), persons):
        assert all(np.array_equal(half[name], twins[name][numbers]) for name in ALL)


def test_there_are_no_more_images_than_persons():
    faces = simulated.SIMULATED["avatars"](32, 3)
    training, validation = faces.training(5000, 5000, 0.1, 0)
    assert {len(x) for x in training.values()} == {3600}
    assert {len(x) for x in validation.values()} == {400}
    halves = faces.held_out_images(1280, 0, ["obs", "hat"])
    assert {len(x) for half in halves for x in half.values()} == {700}
    assert faces.observational(10_000).shape == (4000, 32, 32, 3)
    other_seed = faces.training(100, 10, 0.1, 1, ["obs"])[0]["obs"]
    assert not np.array_equal(other_seed, faces.training(100, 10, 0.1, 0, ["obs"])[0]["obs"])
    assert pretrain.observational_images("avatars", 3, 32).shape == (3, 3, 32, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolution": 28}, "multiple of 16 pixels"),
        ({"validation_fraction": 0.0}, "cannot be held out of 4000 persons"),
        ({"images_per_context": 0}, "images_per_context must be at least 1"),
        ({"concepts": ["hat"]}, "avatars has the concepts glasses, beard, hat, smile, all of them"),
    ],
)
def test_bad_settings_are_one_sentence(tiny, change, message):
    with pytest.raises(ValueError, match=message) as caught:
        trainer.load_data(trainer.TrainArguments(**tiny | {"dataset": "avatars"} | change))
    assert "\n" not in str(caught.value)


def test_training_and_evaluation_end_to_end(tiny, tmp_path):
    result = trainer.train(trainer.TrainArguments(**tiny | {"dataset": "avatars"}))
    argv = ["--model", str(result.model_dir), "--output", str(tmp_path / "m")]
    options = ["--dataset", "avatars", "--images", "20", "--projections", "10"]
    assert evaluation.main([*argv, *options]) == 0
    metrics = json.loads((tmp_path / "m" / "metrics.json").read_text())
    assert set(metrics["contexts"]) == set(ALL) and metrics["means"]["composition"]["contexts"] == 8
    assert re.search(r"glasses\+beard\+hat\+smile", (tmp_path / "m" / "metrics.md").read_text())
