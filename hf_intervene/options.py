"""Options that several commands share. Nothing heavy is imported: the help of a command comes at
once.
"""

import argparse
from collections.abc import Callable


# How own data are read: the arguments of `data.load_contexts` of these names.
READING = {
    "split": "split of a data set that has several",
    "image_column": "name of its image column",
    "context_column": "name of its context column",
}
READING_DEFAULTS = {"split": "train", "image_column": "image", "context_column": "context"}


def add_reading_options(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add the options of `READING`.

    Args:
        parser: gets them.
        default: in words, where they are `None` unless given; `None`: `READING_DEFAULTS`.
    """
    for name, text in READING.items():
        value = None if default else READING_DEFAULTS[name]
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            default=value,
            metavar="NAME",
            help=f"own data: {text} (default {default or value})",
        )


def whole_number(least: int, most: int = 2**40) -> Callable[[str], int]:
    """What reads a whole number between two bounds, both included, for the `type` of an option."""

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


seed = whole_number(0, 2**32 - 1)  # what all random generators take
