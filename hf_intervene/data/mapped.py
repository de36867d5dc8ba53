"""Arrays on the disk that are read by memory map while others may change the file.

What lies beyond the end of a file that was cut kills a process that reads it by memory map
(SIGBUS), without a word. So the size of the file is looked at before each read."""

import os
from pathlib import Path

import numpy as np


class MappedFile:
    """A file that is in use by memory map.

    Args:
        path: the file, as it is now. That another file takes its place does no harm.
        remedy: what to do when it was cut, for the message.
    """

    def __init__(self, path: str | os.PathLike, remedy: str):
        self._path, self._remedy = Path(path), remedy
        self._then = os.stat(path)

    def check(self) -> None:
        """To be called before the file is read.

        Raises:
            OSError: one sentence: it was cut, and reading on would kill the process.
        """
        try:
            now = os.stat(self._path)
        except OSError:
            return  # it was removed: who has it open still reads all of it
        if os.path.samestat(now, self._then) and now.st_size < self._then.st_size:
            raise OSError(f"{self._path} was cut while it was being read: {self._remedy}.")


def open_array(path: str | os.PathLike, remedy: str) -> tuple[np.ndarray, MappedFile]:
    """A saved array (`.npy`) by memory map, of which changes stay in memory, and the file to check.

    Raises:
        OSError, ValueError, EOFError: what `numpy.load` raises.
    """
    return np.load(path, mmap_mode="c", allow_pickle=False), MappedFile(path, remedy)
