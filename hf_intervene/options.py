"""Options that several commands share.

This file imports no large library, so that the help of a command appears at once.
"""

import argparse
from collections.abc import Callable


# How the user's own data are read. These are argument names of `data.load_contexts`.
READING = {
    "split": "split of a data set that has several",
    "image_column": "name of its image column",
    "context_column": "name of its context column",
}
READING_DEFAULTS = {"split": "train", "image_column": "image", "context_column": "context"}


def add_reading_options(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add the options of `READING` to a parser.

    Args:
        parser: the parser.
        default: a text for the help. With it, an option that is not given is `None`. Without it,
            the defaults are `READING_DEFAULTS`.
    """
    for name, text in READING.items():
        value = None if default else READING_DEFAULTS[name]
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            default=value,
            metavar="NAME",
            help=f"for your own data: {text} (default {default or value})",
        )


def whole_number(least: int, most: int = 2**40) -> Callable[[str], int]:
    """Return the `type` of an option that is a whole number between two bounds, both included."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"a whole number from {least} to {most} is needed, not {text}"
            )
        return value

    return number


seed = whole_number(0, 2**32 - 1)  # every random generator takes these
