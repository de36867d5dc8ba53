"""The list of errors that a user or the machine can cause.

Every command prints such an error as one sentence (`spoken`). Any other exception is a mistake in
this package and is shown with its traceback.
"""

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from unicodedata import category


# Files and connections, values, types, missing libraries, divergence, memory. All but the last are
# raised with a message of one sentence.
EXPECTED = (OSError, ValueError, TypeError, ImportError, FloatingPointError, MemoryError)
# Package and class of errors of libraries. A command may not have imported these libraries.
_BY_NAME = {
    ("httpx", "HTTPError"),
    ("httpx2", "HTTPError"),
    ("safetensors", "SafetensorError"),
    ("datasets", "DatasetsError"),
    ("pyarrow", "ArrowException"),
    ("yaml", "YAMLError"),
}
INTERRUPTED = 130  # exit status of a command that Ctrl-C or SIGTERM ended
_LONGEST = 2000  # characters of a message: some values that it may show are megabytes long
# Error numbers of a file system that has no locks.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
# Parts of the messages of torch and of the system when memory is used up.
NO_MEMORY = (
    "DefaultCPUAllocator",
    "could not create a primitive",
    "could not create a memory",
    "Cannot allocate memory",
    "bad_alloc",
    "out of memory",
    "can't start new thread",
    "failed to map segment",  # while a library is imported
)


@contextmanager
def as_ctrl_c(*numbers: int) -> Iterator[None]:
    """Inside, signals of these numbers raise KeyboardInterrupt, as Ctrl-C does. Only the main
    thread can receive signals; in others nothing changes.
    """
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.default_int_handler
    previous = {n: signal.signal(n, handler) for n in set(numbers)} if in_main else {}
    try:
        yield
    finally:
        for number, former in previous.items():
            signal.signal(number, former)


def is_expected(error: BaseException) -> bool:
    """Whether an error is printed as one sentence, without a traceback."""
    if isinstance(error, EXPECTED) or is_out_of_memory(error) or is_lost_process(error):
        return True
    return any(
        (kind.__module__.partition(".")[0], kind.__name__) in _BY_NAME
        for kind in type(error).__mro__
    )


def sentence(error: BaseException) -> str:
    """Return the message of an error as one line that a terminal can print, cut if it is long."""
    if isinstance(error, MemoryError) or is_out_of_memory(error):
        return (
            "there is not enough memory: ask for fewer or smaller images; in training, lower"
            " batch_size, resolution or widths."
        )
    if is_lost_process(error):
        return (
            "another process of this run has ended: its own message says why; --resume auto"
            " continues the training."
        )
    text = printable(" ".join(_text(error).split())) or type(error).__name__
    return (
        text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    )


def _text(error: BaseException) -> str:
    """Return the message of an error; of one of the system, the file and what is wrong with it."""
    if not isinstance(error, OSError) or not error.strerror or str(error) == error.strerror:
        return str(error)
    if not str(error).startswith("[Errno"):
        return str(error)  # somebody has written it
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    if not names:
        return f"a file cannot be read or written: {error.strerror}."
    return f"{names[-1]} cannot be read or written: {error.strerror}."


def printable(text: str) -> str:
    """Return a text with escapes for characters that a terminal would not print as they are.

    Names of files may hold control sequences, line breaks, or bytes that are not UTF-8. Spaces of
    other scripts and fonts stay as they are.
    """
    return "".join(
        character
        if character.isprintable() or category(character) == "Zs"
        else character.encode("unicode_escape").decode()
        for character in text
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a RuntimeError or ImportError has a message that says that memory is used up."""
    return isinstance(error, (RuntimeError, ImportError)) and any(
        words in str(error) for words in NO_MEMORY
    )


def is_lost_process(error: BaseException) -> bool:
    """Whether a RuntimeError of torch means that another process of the run has ended."""
    return isinstance(error, RuntimeError) and (
        "gloo" in str(error) or any(kind.__name__ == "DistError" for kind in type(error).__mro__)
    )


def spoken(main: Callable[[Sequence[str] | None], int], failed: int = 1) -> Callable[..., int]:
    """Wrap the `main` of a command: it prints expected errors as one sentence on standard error.

    Args:
        main: takes the arguments of the command line (`None`: those of this process) and returns
            the exit status.
        failed: exit status after an error.

    Returns:
        A function with the arguments and result of `main`. Its exit status is `INTERRUPTED` after
        Ctrl-C.
    """

    @wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except BrokenPipeError:  # the reader of the output has closed it, as `head` does
            # Without this Python reports the closed pipe again when it exits.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return failed
        except KeyboardInterrupt:
            print("stopped: the same command goes on from here, or begins anew.", file=sys.stderr)
            return INTERRUPTED
        except Exception as error:
            if not is_expected(error):
                raise
            print(f"error: {sentence(error)}", file=sys.stderr)
            return failed

    return run
