"""The folder of a run: whose it is, one run in it at a time, and what a run that was killed left
half done in it.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from filelock import FileLock, Timeout

from ..cards import CARD_FILE, FLOORS_FILE, SAMPLES_FILE, is_generated
from ..contexts import shown
from ..data.identity import IMAGES_FILE
from ..errors import NO_LOCKS
from ..logging import get_logger
from ..push import MODEL_FILES
from ..yaml_files import SETTINGS_FILE, read_yaml


logger = get_logger(__name__)
PATIENCE = 120.0  # seconds that a run which goes on waits for the end of the one before it
LOCK_FILE = ".hf-intervene.lock"
HISTORY = "history.jsonl"
# What a run writes and may replace or remove: folders, then files; and of what is being replaced
# the names for the meantime.
FOLDERS = ("model", "best", "checkpoints", "prepared", "drawn", "samples")
FILES = (HISTORY, SETTINGS_FILE, "curves.png", "not_finite.png")
PASSING = (".*.previous", ".*.writing", ".*.removing")
REPLACED = ("step-*", "train", "validation", *FOLDERS, *FILES)


def check_own(out: str | os.PathLike) -> None:
    """Refuse a folder where a run would replace what no run of ours wrote; nothing in it is
    touched.

    Raises:
        OSError, ValueError: one sentence: it has no name, or holds files of somebody's.
    """
    out = named_folder(out)
    if (out / LOCK_FILE).exists() or _is_settings(out / SETTINGS_FILE):
        return
    found = [out / name for name in FOLDERS if _holds_something(out / name)]
    found += [out / name for name in FILES if os.path.lexists(out / name)]
    if out.is_dir():
        found += [path for pattern in PASSING for path in sorted(out.glob(pattern))]
    if found:
        raise ValueError(
            f"{found[0]} was not written by a run, and a run in {out} would replace it: choose"
            " another output_dir, or move it away."
        )


def named_folder(folder: str | os.PathLike) -> Path:
    """A folder to write in, as a path.

    Raises:
        OSError: one sentence: the system takes no such name.
        ValueError: one sentence: the name is empty, which would be the folder one is in, or is no
            text, which files of weights need.
    """
    if not str(folder).strip():
        raise ValueError(
            "the output folder is an empty text: give the name of a folder ('.' is the one you are"
            " in)."
        )
    path = Path(folder)
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the name of the output folder {str(path)} has bytes that are not UTF-8: give another"
            " one."
        ) from error
    if "\0" in str(path):
        raise ValueError(
            f"the name of the output folder {str(path)} holds a character that no name may have:"
            " give another one."
        )
    try:
        path.exists()
    except OSError as error:  # it is too long
        raise OSError(
            f"the output folder {shown(str(path))} cannot be made ({error.strerror}): give another"
            " one."
        ) from error
    return path


def _is_settings(path: Path) -> bool:
    with suppress(OSError, ValueError):
        # The first runs wrote no version, but all settings.
        return path.is_file() and not {"settings_version", "output_dir"}.isdisjoint(read_yaml(path))
    return False


def _holds_something(path: Path) -> bool:
    with suppress(OSError):
        return any(path.iterdir()) if path.is_dir() else os.path.lexists(path)
    return True  # it cannot be looked into


class Lock:
    """The lock of a run's folder. The system releases that of a process that dies.

    Args:
        out: the folder.
    """

    def __init__(self, out: Path):
        self._out, self._file = out, FileLock(out / LOCK_FILE)
        self._taken: os.stat_result | None = None

    def take(self, patience: float = 0) -> None:
        """Take it; from then on no other run can.

        Args:
            patience: seconds to wait for another run to end, which may have been told to.

        Raises:
            OSError: one sentence: there is another run, or the folder cannot be written.
        """
        out = self._out
        try:
            try:
                self._file.acquire(timeout=0)
            except Timeout:
                if not patience:
                    raise
                logger.warning(
                    "another run is writing in %s: waiting %.0f seconds at most for its end.",
                    out,
                    patience,
                )
                self._file.acquire(timeout=patience)
            self._taken = os.stat(out / LOCK_FILE)
        except Timeout as error:
            raise OSError(
                f"another run is writing in {out}: wait for its end, or choose another output_dir."
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise OSError(
                    f"{out / LOCK_FILE} cannot be written ({error.strerror}): choose another"
                    " output_dir."
                ) from error
            logger.warning(
                "the file system of %s has no locks (%s): see to it that no other run writes"
                " there.",
                out,
                error.strerror,
            )

    def lost(self) -> bool:
        """Whether somebody removed the folder, and the lock with it. It is made and locked again.

        Raises:
            OSError: one sentence: another run has it now, or the folder cannot be made.
        """
        if self._taken is None:
            return False
        try:
            if os.path.samestat(os.stat(self._out / LOCK_FILE), self._taken):
                return False
        except OSError:
            pass  # it is not there
        self.release()
        self._out.mkdir(parents=True, exist_ok=True)
        self.take()
        logger.warning(
            "%s was removed while a run was writing in it: it is made again, without what was"
            " in it.",
            self._out,
        )
        return True

    def release(self) -> None:
        self._file.release()


@contextmanager
def sole_run(out: Path, main_process: bool = True, patience: float = 0) -> Iterator[Lock | None]:
    """Inside, no other run writes in the folder `out`, and what a killed one left half done in it
    is tidied up. Of the processes of one run the main one holds the lock, for all.

    Args:
        out: the folder.
        main_process: whether this is the main process.
        patience: seconds to wait for another run to end, which may have been told to.

    Raises:
        OSError: one sentence: there is another run, or the folder cannot be written.
    """
    lock = Lock(out) if main_process else None
    try:
        if lock is not None:
            lock.take(patience)
            for folder in (out, out / "checkpoints", out / "prepared"):
                tidy(folder)
        yield lock
    finally:
        if lock is not None:
            lock.release()


def tidy(folder: str | os.PathLike) -> None:
    """Mend what a process that was killed left in a folder: what was to be replaced is put back,
    what was half written or half removed is removed. Only names that runs write are looked at."""
    for pattern in PASSING:
        for leftover in sorted(Path(folder).glob(pattern)):
            name = leftover.name[1:].removesuffix(pattern.removeprefix(".*"))
            if not any(fnmatch(name, known) for known in REPLACED):
                continue
            path = leftover.with_name(name)
            if pattern == ".*.previous" and not os.path.lexists(path):
                leftover.rename(path)
            else:
                remove(leftover)


def remove(path: Path) -> None:
    """Remove a file, a link (not what it leads to) or a folder with all that is in it, if it is
    there.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def keep_foreign(before: Path, after: Path, own: Sequence[str]) -> None:
    """Copy to a folder that is to take the place of another one what that one holds beside the
    files that are written anew.

    Args:
        before: the folder that is to be replaced; it need not be there.
        after: the one that takes its place.
        own: patterns of names, relative to the folder, of what a run writes in it.
    """
    for file in sorted(before.rglob("*")) if before.is_dir() else ():
        name = file.relative_to(before).as_posix()
        if (
            any(fnmatch(name, pattern) for pattern in own)
            or (after / name).exists()
            or not (file.is_file() or file.is_symlink())
        ):
            continue
        (after / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, after / name, follow_symlinks=False)


def model_files(folder: Path) -> tuple[str, ...]:
    """Patterns of the files in the folder of a model that belong to the weights in it: not a card
    that somebody has edited.
    """
    own = (*MODEL_FILES, SETTINGS_FILE, IMAGES_FILE)
    with suppress(OSError, ValueError):
        if is_generated(folder / CARD_FILE):
            own += (CARD_FILE, SAMPLES_FILE, FLOORS_FILE)
    return own
