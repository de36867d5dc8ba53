"""Open files that others made: only regular ones, since a pipe or a device may never end. Write
files whole.

This file imports no large library.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a regular file for reading.

    Raises:
        OSError: see `open`.
        ValueError: it is a pipe or a device.
    """
    no_waiting = getattr(os, "O_NONBLOCK", 0)
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | no_waiting))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError(f"{path} is a pipe or a device, not a file: give an ordinary file.")
    return file


def read_text(path: str | os.PathLike, most: int) -> str:
    """Return the text of a regular file in UTF-8.

    Args:
        path: the file.
        most: the largest size, in bytes.

    Raises:
        OSError: see `open`.
        ValueError: it is a pipe or a device, is larger, or is no UTF-8.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{Path(path).name} has more than {most} bytes: it is no such file.")
    return content.decode("utf-8")


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A file to write, which then takes the place of another one: `path` is there whole or as it
    was before. Where it is a link, the link is replaced, and not what it leads to.

    Raises:
        OSError: it cannot be written.
    """
    temporary = Path(path).with_name(f".{Path(path).name}.writing")
    temporary.unlink(missing_ok=True)  # it may be a link, too
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
