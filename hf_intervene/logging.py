"""Log messages of the package and their level, with the functions that transformers has.

`set_verbosity_info()` and the others set the level, or HF_INTERVENE_VERBOSITY=info does (debug,
warning, error, critical). Messages go to standard error. By default only warnings and errors are
shown.
"""

import logging
import os
import sys
from logging import CRITICAL, DEBUG, ERROR, INFO, WARNING
from typing import TextIO


LEVELS = {"debug": DEBUG, "info": INFO, "warning": WARNING, "error": ERROR, "critical": CRITICAL}
_ROOT = __name__.partition(".")[0]


class _Handler(logging.StreamHandler):
    """Write to the `sys.stderr` of the moment when a message is logged, which may have changed."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self.setFormatter(_Formatter("%(levelname)s: %(message)s"))

    @property
    def stream(self) -> TextIO:
        return sys.stderr


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text.replace(record.levelname, record.levelname.lower(), 1)


def get_logger(name: str = _ROOT) -> logging.Logger:
    """Return the logger of a module of the package. `set_verbosity` sets its level."""
    root = logging.getLogger(_ROOT)
    if not root.handlers:  # the first call
        root.addHandler(_Handler())
        root.propagate = False
        try:
            set_verbosity(os.environ.get("HF_INTERVENE_VERBOSITY") or WARNING)
        except ValueError as error:
            set_verbosity(WARNING)
            root.warning("HF_INTERVENE_VERBOSITY: %s", error)
    return logging.getLogger(name)


def get_verbosity() -> int:
    """Return the level, one of those of Python's logging."""
    return get_logger().getEffectiveLevel()


def set_verbosity(level: int | str) -> None:
    """Show messages of this level and above.

    Args:
        level: a level of Python's logging, or a key of `LEVELS`.

    Raises:
        ValueError: there is no such level.
    """
    if isinstance(level, str):
        if level.lower() not in LEVELS:
            raise ValueError(f"verbosity must be one of {', '.join(LEVELS)}, not {level!r}.")
        level = LEVELS[level.lower()]
    logging.getLogger(_ROOT).setLevel(level)


def set_verbosity_debug() -> None:
    set_verbosity(DEBUG)


def set_verbosity_info() -> None:
    set_verbosity(INFO)


def set_verbosity_warning() -> None:
    set_verbosity(WARNING)


def set_verbosity_error() -> None:
    set_verbosity(ERROR)


def disable_progress_bars() -> None:
    """Show no progress bars of diffusers and transformers: loading takes less than two seconds."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (transformers_logging, diffusers_logging):
        library.disable_progress_bar()


def bars_on_terminals_only() -> None:
    """Show no progress bars of libraries, if standard error is a file or a pipe."""
    if sys.stderr.isatty():
        return
    import datasets

    disable_progress_bars()
    datasets.disable_progress_bars()
