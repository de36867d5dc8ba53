"""Sources of MNIST digits: the package, IDX files and data sets."""

import gzip
import struct

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from hypothesis import given, settings
from hypothesis import strategies as st
from idx_files import idx, write_idx
from PIL import Image

from hf_intervene.data import load_digits
from hf_intervene.data.digits import read_idx


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
