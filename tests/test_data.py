"""Your own images: folders, data sets, and the errors for bad ones."""

import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_intervene.data import ContextImages, load_contexts


CONTEXTS = {"obs": 10, "smile": 9, "glasses": 8, "glasses+smile": 8}


def image(value, size=(12, 12)):
    return Image.new("RGB", size, (value, 0, 0))


@pytest.fixture
def folder(tmp_path):
    value = 0
    for context, count in CONTEXTS.items():
        (tmp_path / context).mkdir()
        for number in range(count):
            image(value).save(tmp_path / context / f"{number:03d}.png")
            value += 1
    (tmp_path / "obs" / "notes.txt").write_text("not an image")
    return tmp_path


def check(data):
    assert data.contexts == ["obs", "glasses", "smile", "glasses+smile"] and data.concepts == (
        "glasses",
        "smile",
    )
    assert data.pixels.shape == (35, 3, 12, 12) and data.pixels.dtype == torch.uint8
    assert data.targets(1).tolist() == [[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]]
    reds = {name: sorted(a[:, 0, 0, 0].tolist()) for name, a in data.by_context().items()}
    assert reds == {
        "obs": [*range(10)],
        "smile": [*range(10, 19)],
        "glasses": [*range(19, 27)],
        "glasses+smile": [*range(27, 35)],
    }


def test_a_folder_of_contexts(folder):
    check(ContextImages.from_dataset(load_contexts(folder)))


def test_an_image_folder_with_metadata(folder, tmp_path):
    rows = ["file_name,context"] + [
        f"{c}/{n:03d}.png,{c}" for c, count in CONTEXTS.items() for n in range(count)
    ]
    (folder / "metadata.csv").write_text("\n".join(rows))
    check(ContextImages.from_dataset(load_contexts(folder)))


@pytest.mark.parametrize("as_lists", [False, True])
def test_a_saved_data_set_with_names_or_lists(folder, tmp_path, as_lists):
    data = load_contexts(folder)
    contexts = (
        [[] if c == "obs" else c.split("+") for c in data["context"]]
        if as_lists
        else data["context"][:]
    )
    columns = {"picture": data["image"][:], "group": contexts}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "saved")
    check(
        ContextImages.from_dataset(
            load_contexts(tmp_path / "saved", image_column="picture", context_column="group")
        )
    )
    with pytest.raises(ValueError, match="no column 'image'.*picture, group"):
        load_contexts(tmp_path / "saved")


def test_class_labels_and_arrays(folder):
    data = load_contexts(folder).class_encode_column("context")
    decoded = ContextImages.from_dataset(data)
    check(decoded)
    check(ContextImages.from_arrays(decoded.by_context(), decoded.concepts))


def test_contexts_of_several_strengths_have_an_order():
    """The order of a set would change from process to process."""
    names = ["obs", "a=0.25", "a=0.5", "a", "b=0.125", "b=0.75", "b", "a=0.5+b", "a+b=0.5", "a+b"]
    for shuffled in (names, names[::-1], names[::3] + names[1::3] + names[2::3]):
        data = datasets.Dataset.from_dict({"image": [image(0)] * len(names), "context": shuffled})
        assert ContextImages.from_dataset(data, complete=False).contexts == names


def test_resolution_crops_and_resizes(folder):
    image(5, (30, 20)).save(folder / "obs" / "wide.png")
    data = ContextImages.from_dataset(load_contexts(folder), resolution=8)
    assert data.pixels.shape == (36, 3, 8, 8)
    assert ContextImages.from_dataset(
        load_contexts(folder), resolution=8, channels=1
    ).pixels.shape == (36, 1, 8, 8)


def test_split_is_stratified_disjoint_and_reproducible(folder):
    data = ContextImages.from_dataset(load_contexts(folder))
    train, validation = data.split(0.25, seed=3, by="position")
    for name, count in (("obs", 2), ("smile", 2), ("glasses", 2), ("glasses+smile", 2)):
        assert len(validation.by_context()[name]) == count
    reds = [set(part.pixels[:, 0, 0, 0].tolist()) for part in (train, validation)]
    assert not reds[0] & reds[1] and reds[0] | reds[1] == set(range(35))
    assert torch.equal(validation.pixels, data.split(0.25, seed=3, by="position")[1].pixels)
    obs = data.select(["obs"])
    assert len(obs) == 10 and obs.contexts == ["obs"] and obs.concepts == data.concepts


def remove(context):
    def act(folder):
        for path in (folder / context).iterdir():
            path.unlink()

    return act


@pytest.mark.parametrize(
    ("harm", "options", "message"),
    [
        (remove("obs"), {}, "no observational images"),
        (remove("smile"), {}, "'smile' has no context in which it alone"),
        (
            None,
            {"concepts": ["hat"]},
            "no context names the concept 'hat'; the concepts of the data set are glasses, smile",
        ),
        (
            lambda f: (f / "smile" / "000.png").write_bytes(b"\x89PNG nothing"),
            {},
            "000.png.*of context 'smile' cannot be read",
        ),
        (
            lambda f: image(1, (12, 13)).save(f / "smile" / "000.png"),
            {},
            "is 12x13, not .*give a resolution",
        ),
        (
            lambda f: image(1, (13, 13)).save(f / "smile" / "000.png"),
            {},
            "is 13x13, not 12x12 like the others",
        ),
        (
            lambda f: [(f / "smile" / f"00{n}.png").unlink() for n in range(2)],
            {},
            "'smile' has 7 images; at least 8",
        ),
        (None, {"channels": 4}, "channels must be 1"),
    ],
)
def test_what_is_wrong_with_the_images(folder, harm, options, message):
    if harm is not None:
        harm(folder)
    with pytest.raises(ValueError, match=message):
        ContextImages.from_dataset(load_contexts(folder), **options)


def test_some_of_the_concepts(folder):
    """Images with other interventions are left out, also those of pairs."""
    data = ContextImages.from_dataset(load_contexts(folder), ["smile"])
    everything = ContextImages.from_dataset(load_contexts(folder)).by_context()
    assert data.concepts == ("smile",) and data.contexts == ["obs", "smile"]
    for name, images in data.by_context().items():
        assert np.array_equal(images, everything[name])


def test_missing_columns():
    with pytest.raises(ValueError, match="no column 'context', only image"):
        ContextImages.from_dataset(datasets.Dataset.from_dict({"image": [image(0)]}))


def test_a_row_without_a_context():
    data = datasets.Dataset.from_dict({"image": [image(0)] * 2, "context": ["obs", None]})
    with pytest.raises(ValueError, match="image 1 has no context"):
        ContextImages.from_dataset(data)


def test_nothing_but_observations(folder):
    for context in list(CONTEXTS)[1:]:
        remove(context)(folder)
    with pytest.raises(ValueError, match="nothing was intervened on"):
        ContextImages.from_dataset(load_contexts(folder))


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load_contexts(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load_contexts("./nowhere")
    with pytest.raises(ValueError, match="holds no images"):
        load_contexts(tmp_path)
    (tmp_path / "file").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="is a file"):
        load_contexts(tmp_path / "file")


def test_no_context_is_selected(folder):
    data = ContextImages.from_dataset(load_contexts(folder), None, 12)
    with pytest.raises(ValueError, match="no context is selected: name at least one"):
        data.select([])


def test_bad_fraction_and_context(folder):
    data = ContextImages.from_dataset(load_contexts(folder))
    with pytest.raises(ValueError, match="validation_fraction"):
        data.split(1.0)
    with pytest.raises(ValueError, match="no context 'hat'"):
        data.select(["hat"])
    assert np.array_equal(
        data.select(["smile"]).pixels, data.pixels[data.context_ids == data.contexts.index("smile")]
    )
