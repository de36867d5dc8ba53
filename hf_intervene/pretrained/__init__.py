"""Trained pipelines that come with the package. How each was trained, and how good it is, says its model card."""

from pathlib import Path


def bundled(name: str) -> str:
    """Folder of a pipeline that comes with the package: `InterventionPipeline.from_pretrained(bundled("quad"))`, without network.

    Raises:
        ValueError: there is none of that name; the message lists them.
    """
    folder = Path(__file__).parent
    names = sorted(path.parent.name for path in folder.glob("*/model_index.json"))
    if name not in names:
        raise ValueError(f"no pipeline {name!r} comes with the package; there is {', '.join(names)}.")
    return str(folder / name)
