"""Read settings in YAML, which others may have written."""

import os
from pathlib import Path

import yaml

from .files import read_text
from .hub import check_links


SETTINGS_FILE = "training_arguments.yaml"  # of the run, in a saved model's folder
_MAX_DEPTH = 10
_MAX_SIZE = 1 << 20  # bytes
_MAX_EVENTS = 20_000  # names, values, and ends of lists: a second
_MAX_PLAIN = 4000  # characters of a value without quotes


def read_yaml(path: str | os.PathLike) -> dict:
    """The `setting: value` lines of a YAML file.

    Raises:
        OSError, ValueError: one sentence: it cannot be read, is not valid YAML, or holds something
            else.
    """
    try:
        text, depth = read_text(path, _MAX_SIZE), 0
        # Checked event by event, before any object is made.
        for number, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
            if number > _MAX_EVENTS:
                raise ValueError(f"it has more than {_MAX_EVENTS} names and values")
            if isinstance(event, yaml.ScalarEvent):
                event.value.encode()  # an escape may stand for what no file can hold
                # Without quotes it may be a number, and one of so many digits takes seconds.
                if event.implicit[0] and len(event.value) > _MAX_PLAIN:
                    raise ValueError(f"it has a value of {len(event.value)} characters")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(
                event, yaml.CollectionEndEvent
            )
            if depth > _MAX_DEPTH or isinstance(event, yaml.AliasEvent):
                raise ValueError("it is nested deeply or has aliases")
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        _refuse_twice(node)
        found = None if node is None else loader.construct_document(node)
    except OSError as error:
        raise type(error)(
            f"cannot read the configuration {str(path)!r}: {error.strerror}."
        ) from error
    except (
        yaml.YAMLError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
    ) as error:  # of a constructor: a date that is none
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if found is not None and not isinstance(found, dict):
        raise ValueError(f"{path} must hold `setting: value` lines.")
    return found or {}


def read_settings(folder: str | os.PathLike) -> dict:
    """The settings in `training_arguments.yaml` of a saved model's folder; none if it is not there.

    Raises:
        OSError, ValueError: one sentence: it is a link that leads out of the folder, is not valid
            YAML, or holds something else.
    """
    check_links(Path(folder), [SETTINGS_FILE])
    path = Path(folder, SETTINGS_FILE)
    return read_yaml(path) if path.exists() else {}


def _refuse_twice(node: yaml.Node | None) -> None:
    """Raise a ValueError if a mapping has a name twice: YAML would take the last, silently."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise ValueError(f"{key.value} is given twice")
                seen.add(key.value)
            _refuse_twice(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_twice(value)
