"""Names of data: whether one is a path, and what is wrong with it.

This file imports no large library, so that a wrong name is said at once.
"""

import os
from pathlib import Path

from .errors import printable


def is_local(source: str | os.PathLike) -> bool:
    """Whether a source is a path, which is never looked up on the Hub; see `data.load_contexts`."""
    text = str(source)
    if (
        isinstance(source, os.PathLike)
        or text.startswith((".", "~", os.sep))
        or text.endswith("/")
        or "\\" in text
    ):
        return True
    return text.count("/") != 1 or Path(text).parent.is_dir()


def check_source(source: str | os.PathLike) -> bool:
    """Check the name of a data set, before anything large is imported for it.

    Args:
        source: see `data.load_contexts`.

    Returns:
        Whether it is a folder here. If not, it may be on the Hub.

    Raises:
        OSError: there is no such folder (FileNotFoundError), or it cannot be read.
        ValueError: it is empty, or a file.
    """
    if not str(source).strip():
        raise ValueError(
            "the name of the data is empty: give an image folder ('.' is the one you are in), a"
            " saved data set or a Hub name, user/name."
        )
    path, name = Path(source).expanduser(), printable(str(source))
    try:
        there = path.exists()
    except OSError as error:  # the name is too long, or may not be looked at
        raise OSError(f"{name[:80]} cannot be read ({error.strerror}).") from error
    if not there and is_local(source):
        raise FileNotFoundError(
            f"there is no folder {name}: give an image folder, a saved data set or a Hub name,"
            " user/name."
        )
    if path.is_file():
        raise ValueError(f"{name} is a file: give the folder that holds the images.")
    return there
