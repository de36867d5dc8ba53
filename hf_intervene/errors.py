"""What can go wrong without a mistake in the program, in one place. Every command turns it into one
sentence (`spoken`); whatever else it meets is a mistake of ours and is shown with its traceback.
"""

import errno
import os
import sys
from collections.abc import Callable, Sequence
from functools import wraps


# Files and connections, values, kinds of values, missing libraries, divergence, memory. All but the
# last are raised with a message of one sentence.
EXPECTED = (OSError, ValueError, TypeError, ImportError, FloatingPointError, MemoryError)
# Of libraries that a command may not have imported: package and class.
_BY_NAME = {
    ("httpx", "HTTPError"),
    ("httpx2", "HTTPError"),
    ("safetensors", "SafetensorError"),
    ("datasets", "DatasetsError"),
    ("pyarrow", "ArrowException"),
    ("yaml", "YAMLError"),
}
INTERRUPTED = 130  # exit status of a command that Ctrl-C or SIGTERM ended
_LONGEST = 2000  # characters of a message: some values that it may show are megabytes
# Of a file system that has no locks.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
NO_MEMORY = (
    "DefaultCPUAllocator",
    "could not create a primitive",
    "could not create a memory",
    "Cannot allocate memory",
    "bad_alloc",
    "out of memory",
    "can't start new thread",
    "failed to map segment",  # of a library that is imported only now
)


def is_expected(error: BaseException) -> bool:
    """Whether an error is said in a sentence and not shown with a traceback."""
    if isinstance(error, EXPECTED) or is_out_of_memory(error) or is_lost_process(error):
        return True
    return any(
        (kind.__module__.partition(".")[0], kind.__name__) in _BY_NAME
        for kind in type(error).__mro__
    )


def sentence(error: BaseException) -> str:
    """The message of an error in one line, cut where it is absurdly long, and with nothing that a
    terminal cannot print.
    """
    if isinstance(error, MemoryError) or is_out_of_memory(error):
        return (
            "there is not enough memory: ask for fewer or smaller images, or in training for a"
            " lower batch_size, resolution or widths."
        )
    if is_lost_process(error):
        return (
            "another process of this run has ended: see what it says; training goes on with "
            "--resume auto."
        )
    text = " ".join(str(error).split()) or type(error).__name__
    text = text.encode("utf-8", "backslashreplace").decode()
    return (
        text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a RuntimeError or ImportError says that memory is used up, in torch's words or the
    system's.
    """
    return isinstance(error, (RuntimeError, ImportError)) and any(
        words in str(error) for words in NO_MEMORY
    )


def is_lost_process(error: BaseException) -> bool:
    """Whether a RuntimeError is torch's way to say that another process of the run has ended."""
    return isinstance(error, RuntimeError) and (
        "gloo" in str(error) or any(kind.__name__ == "DistError" for kind in type(error).__mro__)
    )


def spoken(main: Callable[[Sequence[str] | None], int], failed: int = 1) -> Callable[..., int]:
    """The `main` of a command, of which what goes wrong is one sentence on standard error.

    Args:
        main: takes the words of the command line, `None` for those of this process, and returns the
            exit status.
        failed: exit status where something went wrong.
    """

    @wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except BrokenPipeError:  # whoever reads the output has seen enough, as `head` does
            # Or Python would complain at its end.
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
