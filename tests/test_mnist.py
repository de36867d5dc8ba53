"""MNIST concepts: sources of digits, bad input, training and evaluation."""

import gzip
import json
import struct

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_intervene import evaluation, trainer
from hf_intervene.data import load_digits, load_mnist, mnist
from hf_intervene.data.digits import read_idx
from hf_intervene.trainer import simulated
from hf_intervene.trainer.parsing import shared_settings
from hf_intervene.training import pretrain


ALL = mnist.TRAIN_CONTEXTS + mnist.HELD_OUT


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mnist.images_by_context(["rotate"], 4), "unknown concept 'rotate'"),
        (
            lambda: mnist.images_by_context(["scale=0.5"], 4),
            "mnist simulates full interventions only",
        ),
        (lambda: mnist.images_by_context("scale", 4), "list of at least one context"),
        (lambda: mnist.images_by_context(["thin", "thin"], 4), "named twice"),
        (lambda: load_mnist(["thin"], 0), "at least 1"),
        (lambda: load_mnist(["thin"], 1.5), "whole number"),
        (lambda: mnist.render(np.zeros((2, 28, 28)), np.zeros((2, 9))), "uint8"),
        (
            lambda: mnist.render(np.zeros((2, 28, 28), np.uint8), np.zeros((2, 8))),
            r"shape \(2, 9\)",
        ),
        (
            lambda: mnist.render(np.zeros((2, 28, 28), np.uint8), np.zeros((2, 9))),
            "scale and swell_strength positive",
        ),
        (lambda: load_digits(split="validation"), "no split 'validation'"),
        (lambda: load_digits("./nowhere"), "no folder ./nowhere"),
        (
            lambda: load_digits("ylecun/mnist"),
            "neither a folder here nor a data set that could be reached",
        ),
        (lambda: load_digits().split(0.001), "cannot be held out of 400 digits"),
    ],
)
def test_bad_input_is_one_sentence(call, message):
    with pytest.raises((ValueError, TypeError, OSError), match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_dataset_holds_the_rendered_images_and_is_cached(tmp_path):
    arguments = {
        "contexts": ["obs", "scale+thin"],
        "images_per_context": 6,
        "split": "test",
        "cache_dir": str(tmp_path),
    }
    data = load_mnist(**arguments)
    assert data.column_names == ["image", "context", "label", "latents"]
    assert data["context"][:] == ["obs"] * 6 + ["scale+thin"] * 6
    digits, rows = load_digits("bundled", "test"), mnist.sample_rows("scale+thin", 6, 400)
    assert data["label"][6:] == digits.labels[rows].tolist()
    np.testing.assert_allclose(
        data[6:]["latents"], mnist.sample_latents("scale+thin", 6), rtol=1e-6
    )
    expected = mnist.images_by_context(["scale+thin"], 6, digits)["scale+thin"]
    assert np.array_equal(
        np.stack([np.asarray(image) for image in data[6:]["image"]]), expected[..., 0]
    )
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.arrow")}
    load_mnist(**arguments)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.arrow")} == files
    assert load_mnist(**arguments | {"split": "train"})["label"][:] != data["label"][:]


# Sources of digits


def idx(array, kind=8):
    return (
        struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape)
        + array.astype(np.uint8).tobytes()
    )


def write_idx(folder, gzipped=False, dot="-"):
    folder.mkdir()
    for split, stem in (("train", "train"), ("test", "t10k")):
        digits = load_digits("bundled", split)
        for kind, array in (("images", digits.images), ("labels", digits.labels)):
            data = idx(array)
            name = f"{stem}-{kind}{dot}idx{array.ndim}-ubyte"
            (folder / (name + ".gz" * gzipped)).write_bytes(
                gzip.compress(data) if gzipped else data
            )
    return folder


def save_digits(folder):
    features = Features({"image": ImageFeature(), "label": ClassLabel(num_classes=10)})
    splits = {}
    for split in ("train", "test"):
        digits = load_digits("bundled", split)
        rows = {
            "image": [Image.fromarray(image) for image in digits.images],
            "label": digits.labels.tolist(),
        }
        splits[split] = Dataset.from_dict(rows, features)
    DatasetDict(splits).save_to_disk(folder)
    return folder


@pytest.mark.parametrize(
    "write",
    [write_idx, lambda f: write_idx(f, True), lambda f: write_idx(f, True, "."), save_digits],
    ids="idx gz dots saved".split(),
)
def test_every_source_gives_the_same_digits(tmp_path, write):
    folder = write(tmp_path / "digits")
    for split in ("train", "test"):
        digits, expected = load_digits(folder, split), load_digits("bundled", split)
        assert np.array_equal(digits.images, expected.images) and np.array_equal(
            digits.labels, expected.labels
        )


def test_bundled_digits():
    train, test = load_digits(), load_digits("bundled", "test")
    for digits in (train, test):
        assert np.bincount(digits.labels).tolist() == [40] * 10 and digits.images.shape == (
            400,
            28,
            28,
        )
    assert not {x.tobytes() for x in train.images} & {x.tobytes() for x in test.images}


@pytest.fixture(scope="module")
def idx_file(tmp_path_factory):
    return tmp_path_factory.mktemp("idx") / "file"


@given(
    shape=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    seed=st.integers(0, 99),
    gzipped=st.booleans(),
)
@settings(deadline=None, max_examples=50)
def test_idx_files_come_back(idx_file, shape, seed, gzipped):
    array = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    idx_file.write_bytes(gzip.compress(idx(array)) if gzipped else idx(array))
    read = read_idx(idx_file)
    assert read.shape == array.shape and read.dtype == np.uint8 and np.array_equal(read, array)


def read_or_sentence(file):
    """Return the array, or `None` if it is refused with one sentence that names the file."""
    try:
        return read_idx(file)
    except ValueError as error:
        assert str(file) in str(error) and "\n" not in str(error) and str(error).endswith(".")


@given(
    data=st.binary(max_size=60)
    | st.binary(max_size=40).map(lambda b: b"\0\0\x08" + b)
    | st.binary(max_size=40).map(lambda b: b"\x1f\x8b" + b)
)
@settings(deadline=None, max_examples=200)
def test_anything_else_is_refused_in_one_sentence(idx_file, data):
    idx_file.write_bytes(data)
    read = read_or_sentence(idx_file)
    assert read is None or idx(read) == data


@given(
    cut=st.integers(1, 200), seed=st.integers(0, 99), gzipped=st.booleans(), longer=st.booleans()
)
@settings(deadline=None, max_examples=100)
def test_damaged_idx_files_are_refused(idx_file, cut, seed, gzipped, longer):
    data = idx(np.random.default_rng(seed).integers(0, 256, (3, 8, 8)).astype(np.uint8))
    whole = gzip.compress(data) if gzipped else data
    idx_file.write_bytes(
        gzip.compress(data + b"x" * cut)
        if longer and gzipped
        else data + b"x" * cut
        if longer
        else whole[:-cut]
    )
    assert read_or_sentence(idx_file) is None


@given(place=st.integers(0, 10_000), bit=st.integers(0, 7))
@settings(deadline=None, max_examples=100)
def test_a_flipped_bit_of_a_gzip_file_is_seen(idx_file, place, bit):
    array = np.random.default_rng(0).integers(0, 256, (3, 8, 8)).astype(np.uint8)
    data = bytearray(gzip.compress(idx(array), mtime=0))
    data[place % len(data)] ^= 1 << bit
    idx_file.write_bytes(bytes(data))
    read = read_or_sentence(idx_file)
    assert read is None or np.array_equal(read, array)  # some bits of the header have no meaning


def test_header_that_names_too_much_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "file").write_bytes(struct.pack(">HBB3I", 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1))
    with pytest.raises(ValueError, match="which no file of MNIST has"):
        read_idx(tmp_path / "file")


def test_folders_that_hold_other_things(tmp_path):
    folder = write_idx(tmp_path / "digits")
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(7)))
    with pytest.raises(ValueError, match="one label from 0 to 9 for each of its 400 images"):
        load_digits(folder, "test")
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx(np.zeros((5, 8, 8))))
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(5)))
    with pytest.raises(ValueError, match=r"have the shape \(5, 8, 8\)"):
        load_digits(folder, "test")
    (folder / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(
        FileNotFoundError, match="no file train-labels-idx1-ubyte or train-labels-idx1-ubyte.gz"
    ):
        load_digits(folder)
    features = Features({"image": ImageFeature(), "label": ClassLabel(num_classes=10)})
    colours = {"image": [Image.new("RGB", (28, 28))], "label": [1]}
    Dataset.from_dict(colours, features).save_to_disk(tmp_path / "colours")
    with pytest.raises(ValueError, match=r"uint8 \(28, 28, 3\): digits must be grey"):
        load_digits(tmp_path / "colours")
    with pytest.raises(ValueError, match="no split 'test'"):
        load_digits(tmp_path / "colours", "test")


def test_a_damaged_image_of_a_saved_data_set(tmp_path):
    features = Features({"image": ImageFeature(), "label": ClassLabel(num_classes=10)})
    cells = {"image": [{"bytes": b"\x89PNG", "path": None}], "label": [1]}
    Dataset.from_dict(cells, features).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="an image of .*saved cannot be read"):
        load_digits(tmp_path / "saved")


# Training and evaluation

SETTINGS = {"dataset": "mnist", "resolution": 28, "channels": 1, "validation_images": 16}


@pytest.fixture
def used(monkeypatch):
    """The digits that each request for images may be made of, as bytes."""
    used, draw = [], mnist.load_mnist

    def spy(contexts, images_per_context, digits, **options):
        used.append({image.tobytes() for image in digits.images})
        return draw(contexts, images_per_context, digits, **options)

    monkeypatch.setattr(mnist, "load_mnist", spy)
    return used


def test_training_validation_and_held_out_digits_are_never_mixed(tiny, used):
    data, validation = trainer.load_data(trainer.TrainArguments(**tiny | SETTINGS))
    assert data.pixels.shape == (7 * 32, 1, 28, 28) and len(validation) == 7 * 16
    assert data.contexts == list(mnist.TRAIN_CONTEXTS)
    real, other = evaluation.held_out_images("mnist", mnist.CONCEPTS, 12, 0, 28, 1, "dependent")
    training, validating, held_out = used
    assert (len(training), len(validating), len(held_out)) == (360, 40, 400)
    assert not training & validating and not (training | validating) & held_out
    assert list(real) == list(other) == list(ALL) and {
        len(x) for x in (*real.values(), *other.values())
    } == {12}
    for name in ALL:  # all distinct, the floor's images too
        assert len({image.tobytes() for image in (*real[name], *other[name])}) == 24


def test_of_few_digits_there_are_few_held_out_images(monkeypatch):
    monkeypatch.setattr(simulated.Mnist, "contexts", ("obs",))
    monkeypatch.setattr(simulated.Mnist, "held_out", ("scale+thin",))
    real, other = evaluation.held_out_images("mnist", mnist.CONCEPTS, 1280, 0, 28, 3, "dependent")
    assert {x.shape for x in (*real.values(), *other.values())} == {(200, 28, 28, 3)}
    other_seed = simulated.Mnist(28, 1).held_out_images(200, 1)[0]
    assert not np.array_equal(other_seed["obs"], real["obs"][..., :1])


def test_held_out_images_are_drawn_once(monkeypatch):
    monkeypatch.setattr(simulated.Mnist, "held_out", ("scale+thin",))
    drawn = simulated.Mnist(28, 1).held_out_images(3, 5)
    digits = load_digits(split="test")
    expected = mnist.images_by_context(
        (*mnist.TRAIN_CONTEXTS, "scale+thin"), 6, digits, simulated.HELD_OUT_SEED + 5
    )
    monkeypatch.setattr(mnist, "render", lambda *_: pytest.fail("drawn again"))
    for images in (drawn, simulated.Mnist(28, 1).held_out_images(3, 5)):
        assert list(images[0]) == list(expected)
        for name, x in expected.items():
            assert np.array_equal(np.concatenate([part[name] for part in images]), x)


def test_training_and_evaluation_end_to_end(tiny, tmp_path, capsys):
    folder = write_idx(tmp_path / "digits", gzipped=True)
    settings = tiny | SETTINGS | {"mnist_digits": str(folder)}
    result = trainer.train(trainer.TrainArguments(**settings))
    grids = sorted((tmp_path / "run" / "samples").glob("*.png"))
    width, height = Image.open(grids[-1]).size
    assert width > 8 * 28 and height == len(ALL) * 28  # names, and held-out pairs
    argv = ["--model", str(result.model_dir), "--output", str(tmp_path / "m"), "--dataset", "mnist"]
    argv += ["--images", "20", "--projections", "10", "--detector-images", "0", "--mnist-digits"]
    assert evaluation.main([*argv, str(folder), "--edits"]) == 0
    metrics = json.loads((tmp_path / "m" / "metrics.json").read_text())
    assert set(metrics["contexts"]) == set(ALL) and metrics["means"]["composition"]["contexts"] == 9
    assert "factor_effects" not in metrics  # those of quad
    assert evaluation.main([*argv, str(tmp_path / "nowhere")]) == 1
    assert f"error: there is no folder {tmp_path / 'nowhere'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolution": 64}, "28 x 28 pixels: give the resolution 28, not 64"),
        ({"channels": 2}, "1 channel"),
        ({"mnist_digits": "./nowhere"}, "no folder ./nowhere"),
        ({"validation_fraction": 0.0}, "cannot be held out"),
        ({"images_per_context": 0}, "at least 1"),
    ],
)
def test_bad_settings(tiny, change, message):
    with pytest.raises((ValueError, OSError), match=message):
        trainer.load_data(trainer.TrainArguments(**tiny | SETTINGS | change))


def test_what_is_published_names_no_folder_of_this_machine(tiny, tmp_path):
    (tmp_path / "digits").mkdir()
    text = shared_settings(
        trainer.TrainArguments(**tiny | SETTINGS | {"mnist_digits": str(tmp_path / "digits")})
    )
    assert "mnist_digits: digits" in text and str(tmp_path) not in text


def test_a_base_is_pretrained_on_observational_digits():
    pixels = pretrain.observational_images("mnist", 6, 28)
    assert pixels.shape == (6, 3, 28, 28)
    digits = load_digits().images
    rows = mnist.sample_rows("obs", 6, 400, simulated.PRETRAINING_SEED)
    assert np.array_equal(
        pixels[:, 0].numpy(), mnist.render(digits[rows], mnist.sample_latents("obs", 6))[..., 0]
    )
