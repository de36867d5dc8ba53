"""Trained pipelines that come with the package. How each was trained, and how good it is, says its
model card.
"""

import os
from pathlib import Path


def bundled(name: str) -> str:
    """Folder of a pipeline that comes with the package:
    `InterventionPipeline.from_pretrained(bundled("quad"))`, without network.

    Raises:
        ValueError: there is none of that name; the message lists them.
    """
    if name not in bundled_names():
        raise ValueError(
            f"no pipeline {name!r} comes with the package; there is {', '.join(bundled_names())}."
        )
    return str(Path(__file__).parent / name)


def bundled_names() -> list[str]:
    """Names of the pipelines that come with the package."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/model_index.json"))


def located(name: str | os.PathLike) -> str | os.PathLike:
    """The folder of a pipeline that comes with the package if `name` is one and there is nothing
    else of that name, else `name`.
    """
    return (
        bundled(name)
        if isinstance(name, str) and name in bundled_names() and not Path(name).exists()
        else name
    )


__all__ = ["bundled", "bundled_names"]
