"""Write the page of a pipeline (see `app.py`) as a Space: a folder that `python app.py` serves."""

import os
import shutil
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from pathlib import Path

import yaml
from huggingface_hub.utils import filter_repo_objects
from packaging.requirements import Requirement

from . import hub
from .image_files import printable
from .origins import forget_paths
from .page import FILES, NO_GRADIO
from .pipeline import InterventionPipeline
from .pretrained import located
from .push import CARD_FILES, MODEL_FILES, PARTS


APP = '''\
"""The page of a pipeline; see README.md."""

from pathlib import Path

from hf_intervene.app import launch


HERE = Path(__file__).parent

if __name__ == "__main__":
    launch({arguments})
'''
README = """\
---
{metadata}---

# {title}

Switch concepts on, alone or together, and see what changes and what stays as it was. Made by `hf-intervene app --export` with
hf-intervene {version}, whose sources are in `hf_intervene/`. It runs elsewhere too: `pip install -r requirements.txt && python app.py`.
"""  # noqa: E501


def export(name: str, folder: str | os.PathLike) -> Path:
    """Write the page of a pipeline as a Space.

    The Space consists of app.py, requirements.txt, README.md and the pipeline's files. A pipeline
    on the Hub is not copied: app.py holds its name and commit. The sources of this package are
    copied too, so that the Space needs only packages that are on PyPI.

    Args:
        name: folder or Hub name of a saved pipeline, or name of one that comes with this package.
        folder: the folder to write; it must be empty or not exist.

    Returns:
        The folder.

    Raises:
        ImportError: Gradio is not installed.
        OSError: there is no such pipeline, or the folder cannot be written.
        ValueError: the folder is not empty, or `name` is not a pipeline.
    """
    if not str(folder).strip():
        raise ValueError("the name of the folder to export to is empty: give a name.")
    folder, source = Path(folder), hub.folder(located(name), FILES + tuple(CARD_FILES))
    try:
        gradio = version("gradio")
    except PackageNotFoundError as error:
        raise ImportError(NO_GRADIO) from error
    InterventionPipeline.from_pretrained(source)  # raises an error if it is not a pipeline
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(
            f"{folder} already holds something: choose another folder to export to, or remove it."
        )
    is_new = not folder.exists()
    try:
        _write(name, source, folder, gradio)
    except BaseException:  # a full disk: the same command can be given again
        shutil.rmtree(folder, ignore_errors=True)
        if not is_new:
            folder.mkdir()
        raise
    return folder


def _write(name: str, source: Path, folder: Path, gradio: str) -> None:
    """Write the files of a Space; see `export`.

    Args:
        name: of the pipeline.
        source: its folder.
        folder: of the Space, empty.
        gradio: its version.
    """
    title = " ".join(printable(Path(name).resolve().name).split())
    metadata = {
        "title": title,
        "sdk": "gradio",
        "sdk_version": gradio,
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
        "app_file": "app.py",
        "pinned": False,
        "tags": ["hf-intervene"],
    }
    if not os.path.isdir(located(name)):  # on the Hub: the cache names its folder by the commit
        arguments = f"{str(name)!r}, revision={source.name!r}"
        metadata |= {"models": [str(name)]}
    else:
        arguments = f"HERE / {('pipelines/' + title)!r}"
        files = [
            file.relative_to(source).as_posix() for file in source.rglob("*") if file.is_file()
        ]
        target = folder / "pipelines" / title
        _copy(source, filter_repo_objects(files, allow_patterns=MODEL_FILES + CARD_FILES), target)
        forget_paths(target, ("", *PARTS), shared=True)
    package = Path(__file__).parent
    _copy(
        package,
        [file.relative_to(package) for file in package.rglob("*.py")],
        folder / package.name,
    )
    for file in distribution("hf-intervene").files or []:
        licence = Path(file.locate())
        if file.name == "LICENSE" and licence.exists():
            shutil.copy(licence, folder / package.name / file.name)
    text = {"title": title, "arguments": arguments, "version": version("hf-intervene")}
    text["metadata"] = yaml.safe_dump(metadata, sort_keys=False)
    (folder / "app.py").write_text(APP.format(**text), encoding="utf-8")
    (folder / "README.md").write_text(README.format(**text), encoding="utf-8")
    (folder / "requirements.txt").write_text(_requirements())


def _copy(source: Path, files: Iterable[str | Path], folder: Path) -> None:
    for file in files:
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / file, target)


def _requirements() -> str:
    """Return the requirements of this package, and Gradio, at the installed versions.

    The part of a version after "+" names a local build and is left out: it is not on PyPI.
    """
    parsed = [Requirement(line) for line in requires("hf-intervene") or []]
    names = ["gradio", *(requirement.name for requirement in parsed if requirement.marker is None)]
    return "".join(f"{name}=={version(name).partition('+')[0]}\n" for name in names)
