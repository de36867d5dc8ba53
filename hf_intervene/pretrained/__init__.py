"""Trained pipelines that come with the package. A pipeline's card says how it was trained and how
good it is.
"""

import os
from pathlib import Path


def bundled(name: str) -> str:
    """Folder of a pipeline that comes with the package:
    `InterventionPipeline.from_pretrained(bundled("avatars"))`, without network.

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


def not_bundled(name: str | os.PathLike) -> str | os.PathLike:
    """The name of a folder or of a repository on the Hub, as it was given.

    Raises:
        OSError: there is no such folder, and a pipeline of that name comes with the package.
    """
    if located(name) != name:
        raise OSError(
            f"there is no folder {name}; the pipeline that comes with the package is loaded with"
            f" from_pretrained(hf_intervene.bundled({str(name)!r}))."
        )
    return name


def concepts_of(name: str | os.PathLike) -> tuple[str, ...]:
    """Concepts of a saved pipeline or model, read from its configuration: no weights, no torch.

    Args:
        name: folder, repository on the Hub, or name of a pipeline that comes with the package.

    Raises:
        OSError, ValueError: one sentence: there is none, or it names no concepts.
    """
    from .. import hub

    folder = hub.folder(located(name), ("*.json",))
    files = (folder / "head" / "config.json", folder / "config.json")
    config = next((hub.read_config(file) for file in files if file.exists()), {})
    concepts = config.get("concepts")
    named = isinstance(concepts, list) and all(isinstance(concept, str) for concept in concepts)
    if not named or not concepts:
        raise ValueError(
            f"{name} is not an intervention pipeline or model: it has no config.json that names"
            " concepts."
        )
    return tuple(concepts)


__all__ = ["bundled", "bundled_names"]
