"""Simulated data in shards: one process, several processes and streaming give the same rows."""

import hashlib

import numpy as np
import pytest
from datasets import Image
from datasets.distributed import split_dataset_by_node

from hf_intervene.data import (
    load_avatars,
    load_ident3d,
    load_mnist,
    load_quad,
    mnist,
    quad,
    requests,
)


LOADERS = {
    "quad": lambda **options: load_quad(["obs", "quad1+size"], 40, 8, **options),
    "ident3d": lambda **options: load_ident3d(["obs", "background+object"], 40, 8, **options),
    "mnist": lambda **options: load_mnist(["obs", "scale+thin"], 40, **options),
    "avatars": lambda **options: load_avatars(["obs", "smile"], 40, **options),
}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(requests, "SHARD_ROWS", 16)


def rows(dataset):
    """Return the rows with the stored bytes of the images."""
    dataset = dataset.cast_column("image", Image(decode=False))
    return [{**row, "image": hashlib.sha256(row["image"]["bytes"]).hexdigest()} for row in dataset]


@pytest.mark.parametrize("name", LOADERS)
def test_streamed_rows_are_the_mapped_ones(name, tmp_path, monkeypatch):
    load = LOADERS[name]
    streamed = load(streaming=True)
    assert streamed.n_shards == 6
    expected = rows(load(cache_dir=str(tmp_path / "a")))
    assert len(expected) == 80 and len({row["image"] for row in expected}) > 70
    assert rows(streamed) == expected == rows(streamed)  # also in a second pass
    nodes = [rows(split_dataset_by_node(streamed, rank, 2)) for rank in range(2)]
    assert sorted(map(str, nodes[0] + nodes[1])) == sorted(map(str, expected))
    monkeypatch.setattr(requests, "SHARD_ROWS", 1024)
    assert rows(load(cache_dir=str(tmp_path / "b"))) == expected


def test_several_processes_write_the_same_rows(tmp_path):
    load = LOADERS["ident3d"]
    assert rows(load(cache_dir=str(tmp_path / "a"), num_proc=2)) == rows(load(streaming=True))


def test_images_are_decoded_when_read():
    row = next(iter(LOADERS["quad"](streaming=True)))
    assert row["image"].size == (8, 8) and row["context"] == "obs" and len(row["latents"]) == 8


def test_shards_cover_all_rows_once_and_are_not_too_many(monkeypatch):
    monkeypatch.setattr(requests, "SHARD_ROWS", 1024)
    for images in (1, 1023, 1024, 1025, 70_000, 1_000_000):
        shards = requests.shards(["obs", "a"], images)
        for context in ("obs", "a"):
            starts, stops = zip(*[(start, stop) for name, start, stop in shards if name == context])
            assert starts[0] == 0 and stops[-1] == images and starts[1:] == stops[:-1]
            assert len(starts) <= requests.MAX_SHARDS and all(a < b for a, b in zip(starts, stops))


def test_seeds_give_the_same_images_as_before():
    images = quad.images_by_context(["quad1+size"], 20, 16, seed=3)["quad1+size"]
    data = load_quad(["quad1+size"], 20, 16, seed=3, streaming=True)
    assert np.array_equal(np.stack([np.asarray(row["image"]) for row in data]), images)
    digits = mnist.images_by_context(["swell"], 20, seed=3)["swell"]
    data = load_mnist(["swell"], 20, seed=3, streaming=True)
    assert np.array_equal(np.stack([np.asarray(row["image"]) for row in data]), digits[..., 0])
