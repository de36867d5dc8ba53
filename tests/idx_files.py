"""IDX files of digits, as MNIST has them."""

import gzip
import struct

import numpy as np

from hf_intervene.data import load_digits


def idx(array, kind=8):
    """Return the bytes of an IDX file with an array."""
    return (
        struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape)
        + array.astype(np.uint8).tobytes()
    )


def write_idx(folder, gzipped=False, dot="-"):
    """Write the bundled digits as the four files of MNIST."""
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
