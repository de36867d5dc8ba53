"""Arrays in files, read row by row.

If a file is cut while a process reads it through a memory map, the process is killed (SIGBUS)
without a message. So the rows of these files are read with ordinary reads, which raise an error.
The memory map gives only the shape and the type of the array.
"""

import math
import os
from pathlib import Path
from threading import Lock

import numpy as np


class MappedFile:
    """A file that holds an array.

    It stays open, so that the array can still be read after another file takes its place.

    Args:
        path: the file.
        remedy: what to do if the file is cut, for the message.
        offset: position of the first row in bytes.
    """

    def __init__(self, path: str | os.PathLike, remedy: str, offset: int = 0):
        self._path, self._remedy, self._offset = Path(path), remedy, offset
        self._file = open(path, "rb", buffering=0)
        self._size = os.fstat(self._file.fileno()).st_size
        self._lock = Lock()

    def __reduce__(self) -> tuple:
        return MappedFile, (self._path, self._remedy, self._offset)

    def check(self) -> None:
        """Raise an OSError if the file was cut."""
        if os.fstat(self._file.fileno()).st_size < self._size:
            raise OSError(f"{self._path} was cut while it was being read: {self._remedy}.")

    def rows(self, index: np.ndarray, shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
        """Read some rows.

        Args:
            index: numbers of the rows, integers (n,).
            shape: shape of the whole array, (N, ...).
            dtype: type of its entries.

        Returns:
            A new array (n, ...).

        Raises:
            IndexError: there is no such row.
            OSError: the file was cut.
        """
        if len(index) and not (0 <= index.min() and index.max() < shape[0]):
            raise IndexError(
                f"rows from {index.min()} to {index.max()} of {shape[0]} are not there."
            )
        found = np.empty((len(index), *shape[1:]), dtype)
        size = math.prod(shape[1:]) * found.itemsize
        content = found.view(np.uint8).reshape(len(found), size)
        for row, number in zip(content, index.tolist()):
            self._fill(row.data, self._offset + number * size)
        return found

    def _fill(self, buffer: memoryview, position: int) -> None:
        """Fill a buffer from a position of the file. Threads and forked processes may do so too."""
        while len(buffer):
            if hasattr(os, "preadv"):
                done = os.preadv(self._file.fileno(), [buffer], position)
            else:  # on Windows
                with self._lock:
                    self._file.seek(position)
                    done = self._file.readinto(buffer) or 0
            if not done:
                raise OSError(f"{self._path} was cut while it was being read: {self._remedy}.")
            buffer, position = buffer[done:], position + done


def open_array(path: str | os.PathLike, remedy: str) -> tuple[np.ndarray, MappedFile]:
    """Open a saved array (`.npy`).

    Returns:
        A memory map of the array, for its shape and type; and the file, to read rows.

    Raises:
        OSError, ValueError, EOFError: see `numpy.load`; or the rows are not stored one by one.
    """
    array = np.load(path, mmap_mode="c", allow_pickle=False)
    if not array.flags.c_contiguous:
        raise ValueError(f"{path} is an array in Fortran order, whose rows cannot be read.")
    return array, MappedFile(path, remedy, array.offset)
