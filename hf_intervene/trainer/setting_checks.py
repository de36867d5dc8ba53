"""A setting of a training run, and the checks of its value, or of each entry of a list. What is
`None` is left to a default.
"""

from collections.abc import Callable
from typing import Any

from huggingface_hub.dataclasses import validated_field


_LARGE = 1e30  # of a weight in the loss, which is computed in float32
_MANY = 2**40  # more than any run needs, and torch can still count them


def between(least: int, most: int = _MANY) -> Callable[[Any], None]:
    def check(value: Any) -> None:
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not least <= number <= most:
                bound = f"at least {least}" if number < least else f"at most {most}"
                raise ValueError(f"must be {bound}, not {number}.")

    return check


def one_of(choices: tuple[str, ...]) -> Callable[[Any], None]:
    def check(value: Any) -> None:
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}, not {value!r}.")

    return check


def share(value: Any) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"must lie in [0, 1], not {value}.")


def weight(value: Any) -> None:
    if not value >= 0:
        raise ValueError(f"must not be negative: {value}.")
    if value > _LARGE:
        raise ValueError(f"must be at most {_LARGE:g}, not {value}.")


def positive(value: Any) -> None:
    if value is not None and not value > 0:
        raise ValueError(f"must be positive, not {value}.")


def rate(value: Any) -> None:
    if value is not None and not 0 < value <= 1000:  # the largest floats overflow in an optimiser
        raise ValueError(f"must lie in (0, 1000], not {value}.")


def decay(value: Any) -> None:
    if value is not None and not 0 <= value < 1:
        raise ValueError(f"must lie in [0, 1), not {value}.")


def finite(value: Any) -> None:
    if value == float("inf"):
        raise ValueError("must be finite: patience or Ctrl-C ends a run before.")


def setting(default: Any, help: str, *checks: Callable[[Any], None]) -> Any:
    """A setting: its default, a word about it for `train --help`, and what must hold for it."""
    given = (
        {"default_factory": lambda: list(default)}
        if isinstance(default, list)
        else {"default": default}
    )
    return validated_field(list(checks), metadata={"help": help}, **given)
