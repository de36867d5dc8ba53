"""MNIST concepts: what interventions do to real digits, measured on the images alone; the sources
of digits; training and evaluation.
"""

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
from scipy import ndimage

from hf_intervene import evaluation, trainer
from hf_intervene.data import load_digits, load_mnist, mnist
from hf_intervene.data.digits import read_idx
from hf_intervene.trainer import simulated
from hf_intervene.trainer.parsing import shared_settings
from hf_intervene.training import pretrain


ALL = mnist.TRAIN_CONTEXTS + mnist.HELD_OUT
Y, X = np.mgrid[:28, :28] + 0.5


def column(latents, name):
    return latents[:, mnist.LATENTS.index(name)]


def measures(images):
    """Of images (n, 28, 28, 1), by name, each (n,): area, thickness (twice the area over the length
    of the contour), centre of mass, slant (x over y), size, and the radius of the largest disk
    inside."""
    x = images[..., 0] / 255
    area = x.sum((1, 2))
    gradient = np.gradient(np.pad(x, ((0, 0), (1, 1), (1, 1))), axis=(1, 2))
    mean_x, mean_y = ((x * axis).sum((1, 2)) / area for axis in (X, Y))
    dx, dy = X - mean_x[:, None, None], Y - mean_y[:, None, None]
    xx, yy, xy = ((x * product).sum((1, 2)) / area for product in (dx * dx, dy * dy, dx * dy))
    return {
        "area": area,
        "thickness": 2 * area / np.hypot(*gradient).sum((1, 2)),
        "x": mean_x,
        "y": mean_y,
        "slant": xy / yy,
        "size": np.sqrt(xx + yy),
        "widest": np.array(
            [ndimage.distance_transform_edt(np.pad(image > 0.5, 1)).max() for image in x]
        ),
    }


@pytest.fixture(scope="module")
def contexts():
    """200 images of every context."""
    return mnist.images_by_context(ALL, 200, load_digits())


@pytest.fixture(scope="module")
def measured(contexts):
    return {name: measures(images) for name, images in contexts.items()}


@pytest.fixture(scope="module")
def paired():
    """The same 200 digits without an intervention, and a function that draws them under one:
    latents, measures before and after.
    """
    digits = load_digits().images[::2]
    before = measures(mnist.render(digits, mnist.sample_latents("obs", len(digits))))

    def intervened(context):
        latents = mnist.sample_latents(context, len(digits))
        return latents, before, measures(mnist.render(digits, latents))

    return intervened


def test_images_are_functions_of_digits_seed_context_and_row(contexts):
    digits = load_digits()
    alone = mnist.images_by_context(["thin+shift"], 8, digits)
    assert list(alone) == ["shift+thin"] and np.array_equal(
        alone["shift+thin"], contexts["shift+thin"][:8]
    )
    assert alone["shift+thin"].dtype == np.uint8 and alone["shift+thin"].shape == (8, 28, 28, 1)
    rows, latents = (
        mnist.sample_rows("shift+thin", 8, len(digits)),
        mnist.sample_latents("shift+thin", 8),
    )
    assert np.array_equal(alone["shift+thin"], mnist.render(digits.images[rows], latents))
    other = mnist.images_by_context(["shift+thin"], 8, digits, seed=1)["shift+thin"]
    assert not np.array_equal(other, alone["shift+thin"])
    assert not np.isin(
        column(mnist.sample_latents("thin", 8), "thin"), column(latents, "thin")
    ).any()


def test_every_digit_is_taken_once_before_any_is_taken_again():
    rows = mnist.sample_rows("swell", 25, 10, seed=3)
    assert sorted(rows[:10]) == sorted(rows[10:20]) == list(range(10)) and len(set(rows[20:])) == 5
    assert np.array_equal(mnist.sample_rows("swell", 7, 10, seed=3), rows[:7])
    assert not np.array_equal(mnist.sample_rows("thin", 25, 10, seed=3), rows)


@pytest.mark.parametrize("context", ALL)
def test_only_what_is_intervened_on_is_drawn(context):
    latents = mnist.sample_latents(context, 2000)
    for k, (name, (concept, neutral, low, high)) in enumerate(mnist._PARAMETERS.items()):
        if concept in context.split("+"):
            assert low <= latents[:, k].min() and latents[:, k].max() <= high, name
            assert latents[:, k].mean() == pytest.approx(
                (low + high) / 2, abs=0.05 * (high - low)
            ), name
            assert latents[:, k].std() == pytest.approx((high - low) / 12**0.5, rel=0.05), name
            assert not low <= neutral <= high or concept == "swell", name
        else:
            assert (latents[:, k] == neutral).all(), name


def test_observational_images_are_the_digits_themselves():
    digits = load_digits("bundled", "test").images
    images = mnist.render(digits, mnist.sample_latents("obs", len(digits)))[..., 0]
    assert np.abs(images.astype(int) - digits).mean() < 3
    assert images.sum() / digits.sum() == pytest.approx(1, abs=0.03)


def slow_render(digit, p):
    """One digit: a set of points on the fine grid, dilated or eroded by a disk of points, then
    looked up point by point.
    """
    shape = (
        np.asarray(ndimage.zoom(digit.astype(float), 4, order=3, mode="nearest", grid_mode=True))
        > digit.max() / 2
    )
    inside = ndimage.distance_transform_edt(shape) - 0.5
    radius = (p["thicken"] - p["thin"]) * 2 * inside[shape].mean()
    reach = int(abs(radius)) + 1
    i, j = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = np.hypot(i, j) <= abs(radius) + 0.5  # the contour runs half-way between two points
    if radius > 0:
        moved = ndimage.binary_dilation(shape, disk)
    else:
        moved = ~ndimage.binary_dilation(~shape, disk, border_value=1) if radius < 0 else shape
    axis = np.argwhere(mnist._medial_axis(ndimage.distance_transform_edt(shape)))
    cy, cx = (axis[int(p["swell_position"] * len(axis))] + 0.5) / 4
    fine = np.zeros((112, 112))
    for row in range(112):
        for col in range(112):
            # Backwards: shift, then scale and shear about (14.5, 14.5), then the swelling.
            x, y = (col + 0.5) / 4 - p["shift_x"] - 14.5, (row + 0.5) / 4 - p["shift_y"] - 14.5
            y = y / p["scale"] + 14.5
            x = x / p["scale"] - p["shear"] * (y - 14.5) + 14.5
            r = np.hypot(x - cx, y - cy)
            if 0 < r < p["swell_radius"]:
                towards = p["swell_radius"] * (r / p["swell_radius"]) ** p["swell_strength"] / r
                x, y = cx + (x - cx) * towards, cy + (y - cy) * towards
            i, j = int(np.floor(y * 4)), int(np.floor(x * 4))
            fine[row, col] = moved[i, j] if 0 <= i < 112 and 0 <= j < 112 else 0
    return fine.reshape(28, 4, 28, 4).mean((1, 3))


@pytest.mark.parametrize("context", ALL)
def test_rendering_against_a_per_point_reference(context):
    digits = load_digits().images[[0, 7]]
    latents = mnist.sample_latents(context, 2)
    for image, digit, row in zip(mnist.render(digits, latents)[..., 0] / 255, digits, latents):
        expected = slow_render(digit, dict(zip(mnist.LATENTS, row)))
        # The reference knows whole points only: its edges are hard, and off by up to half a point,
        # an eighth of a pixel.
        assert (
            np.abs(image - expected).sum() < 0.16 * np.abs(np.gradient(np.pad(expected, 1))).sum()
        )
        assert np.abs(image - expected).max() < 0.5


def test_affine_interventions_do_what_their_parameters_say(paired):
    latents, before, after = paired("scale")
    np.testing.assert_allclose(after["size"] / before["size"], column(latents, "scale"), atol=0.02)
    np.testing.assert_allclose(
        after["area"] / before["area"], column(latents, "scale") ** 2, atol=0.05
    )
    latents, before, after = paired("shear")
    # Contours that leave the image, and the blur of pixels, cost a little of the slant.
    np.testing.assert_allclose(
        after["slant"] - before["slant"], column(latents, "shear"), atol=0.15
    )
    assert np.median(np.abs(after["slant"] - before["slant"] - column(latents, "shear"))) < 0.02
    np.testing.assert_allclose(after["area"] / before["area"], 1, atol=0.06)
    latents, before, after = paired("shift")
    for axis in "xy":
        moved = after[axis] - before[axis] - column(latents, f"shift_{axis}")
        assert np.median(np.abs(moved)) < 0.02 and np.abs(moved).max() < 0.6
    np.testing.assert_allclose(after["slant"], before["slant"], atol=0.25)


def test_morphological_interventions_do_what_their_parameters_say(paired):
    for name, sign in (("thicken", 1), ("thin", -1)):
        latents, before, after = paired(name)
        factor = 1 + sign * column(latents, name)
        # The dilated area of a stroke grows like its thickness, but where strokes meet or the image
        # ends.
        ratio = after["area"] / before["area"]
        assert np.corrcoef(ratio, factor)[0, 1] > 0.8
        assert np.abs(ratio - factor).mean() < 0.15
        assert (sign * (after["thickness"] - before["thickness"]) > 0).all()
        for axis in "xy":
            assert np.abs(after[axis] - before[axis]).mean() < 0.4
        assert np.abs(after["slant"] - before["slant"]).mean() < 0.1
    latents, before, after = paired("swell")
    assert (
        np.mean(after["widest"] > before["widest"] + 0.5) > 0.95
        and np.mean(after["area"] > before["area"]) > 0.98
    )


def test_swelling_is_local():
    digits = load_digits().images[:60]
    latents = mnist.sample_latents("swell", 60)
    plain, swollen = (
        mnist.render(digits, x)[..., 0].astype(int)
        for x in (mnist.sample_latents("obs", 60), latents)
    )
    changed = np.abs(plain - swollen) > 20
    assert changed.any((1, 2)).all()
    for mask, radius in zip(changed, column(latents, "swell_radius")):
        # All that changed lies in a disk, so no two changed pixels are farther apart than its
        # diameter.
        y, x = np.nonzero(mask)
        assert np.hypot(y[:, None] - y, x[:, None] - x).max() <= 2 * radius + 1
    # The position runs along the axis from top to bottom.
    rows = [np.nonzero(mask)[0].mean() for mask in changed]
    assert np.corrcoef(rows, column(latents, "swell_position"))[0, 1] > 0.8


EFFECTS = {  # concept: (measure, direction)
    "scale": ("size", -1),
    "shear": ("slant", 1),
    "shift": ("x", -1),
    "swell": ("widest", 1),
    "thicken": ("thickness", 1),
    "thin": ("thickness", -1),
}


def order(lower, higher):
    """Share of pairs of independent images in the order named (0.5 by chance)."""
    return np.mean(lower[:, None] < higher) + 0.5 * np.mean(lower[:, None] == higher)


@pytest.mark.parametrize("context", [name for name in ALL if name != "obs"])
def test_contexts_differ_from_obs_in_their_concepts(measured, context):
    obs, here = measured["obs"], measured[context]
    for concept in context.split("+"):
        name, sign = EFFECTS[concept]
        # Smaller digits have thinner strokes too, so they are compared with their like.
        like = measured["scale"] if "scale" in context and concept != "scale" else obs
        assert order(*(like[name], here[name])[::sign]) > 0.85, concept
    for concept, (
        name,
        _,
    ) in EFFECTS.items():  # what has nothing to do with the context is as in obs
        if concept in ("shear", "shift") and concept not in context:
            assert 0.35 < order(obs[name], here[name]) < 0.65, concept


def test_no_context_is_told_by_how_it_was_drawn(contexts):
    obs, *others = (
        contexts[name] for name in ("obs", "shear", "shift")
    )  # of strokes of the same thickness
    assert len(np.unique(obs)) > 150

    def grey_share(images):
        return np.mean((images > 0) & (images < 255)) / np.mean(images > 0)

    for images in others:
        assert grey_share(images) == pytest.approx(grey_share(obs), rel=0.05)


def test_strokes_end_where_the_digit_did():
    digit = np.zeros((1, 28, 28), np.uint8)
    digit[:, :, 12:16] = 255  # from rim to rim
    latents = mnist.sample_latents("scale+thicken", 1)
    latents[:, mnist.LATENTS.index("scale")] = 0.5
    image = mnist.render(digit, latents)[0, ..., 0]
    assert image[14].max() == 255 and image[:4].max() == image[-4:].max() == 0


def test_a_blank_digit_stays_blank_and_a_full_one_is_drawn():
    digits = np.stack([np.zeros((28, 28), np.uint8), np.full((28, 28), 255, np.uint8)])
    for context in ALL:
        images = mnist.render(digits, mnist.sample_latents(context, 2))
        assert images[0].max() == 0 and images[1].max() == 255


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


def test_dataset_holds_what_was_rendered_and_is_cached(tmp_path):
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
    """The array, or `None` where it is refused, in one sentence that names the file."""
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
    assert read is None or np.array_equal(
        read, array
    )  # of the header there are bits that mean nothing


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
