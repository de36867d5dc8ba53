"""Where a model came from, and configurations without the paths of the machine that made them."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError


def origin(name_or_path: str, revision: str | None, subfolder: str | None) -> dict[str, str | None]:
    """Return where a model came from: `name_or_path`, `subfolder`, and the commit as `revision`.

    A diffusers model keeps the name with which it was loaded, but no revision. A model of a
    pipeline keeps a path in the cache, `models--user--name/snapshots/COMMIT/vae`, from which all
    three entries can be read. A folder has no revision.
    """
    parts = Path(name_or_path).parts
    if len(parts) > 2 and "snapshots" in parts[:-1]:
        at = parts.index("snapshots")
        if parts[at - 1].startswith("models--"):
            inside = "/".join([*parts[at + 2 :], *([subfolder] if subfolder else [])])
            name = parts[at - 1].removeprefix("models--").replace("--", "/")
            return {"name_or_path": name, "subfolder": inside or None, "revision": parts[at + 1]}
    if os.path.isdir(name_or_path):
        # From another working directory a relative path would look like a repository.
        name_or_path = os.path.abspath(name_or_path)
    else:
        try:  # the cache resolves a revision to the commit of the last load
            revision = Path(
                snapshot_download(
                    name_or_path, revision=revision, local_files_only=True, allow_patterns=[]
                )
            ).name
        except (LocalEntryNotFoundError, HFValidationError):
            pass
    return {"name_or_path": name_or_path, "subfolder": subfolder, "revision": revision}


def is_on_hub(name_or_path: str, revision: str | None, **_: object) -> bool:
    """Whether an `origin` is a repository on the Hub, not a folder."""
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name_or_path):
        return False
    return revision is not None or ("/" in name_or_path and not os.path.exists(name_or_path))


def without_path(text: str) -> str:
    """Return the JSON of a configuration without the path of its model. A name on the Hub stays."""
    try:
        found = json.loads(text)
        name = found.get("_name_or_path")
    except (ValueError, AttributeError, RecursionError):
        return text
    if name is None or (isinstance(name, str) and is_on_hub(name, None)):
        return text
    del found["_name_or_path"]
    return json.dumps(found, indent=2, sort_keys=True) + "\n"


def without_folders(text: str) -> str:
    """Return the JSON of a configuration as it is shared: without the path of its model, and with
    the last part alone of the folders that its base and the models beside it were loaded from."""
    text = without_path(text)
    try:
        found = json.loads(text)
        references = [
            found.get("base_reference"),
            *(found.get("companion_references") or {}).values(),
        ]
        local = [
            reference
            for reference in references
            if reference and not is_on_hub(str(reference["name_or_path"]), reference["revision"])
        ]
        for reference in local:
            # Whoever loads it passes a copy as `base=`. With the dot it is no name on the Hub.
            reference["name_or_path"] = f"./{Path(str(reference['name_or_path'])).name}"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return text
    return json.dumps(found, indent=2, sort_keys=True) + "\n" if local else text


def forget_paths(
    folder: str | os.PathLike, parts: Sequence[str] = ("",), shared: bool = False
) -> None:
    """Apply `without_path`, or if it is `shared` `without_folders`, to the configurations in the
    sub-folders `parts` of a saved folder."""
    forget = without_folders if shared else without_path
    for part in parts:
        for file in Path(folder, part).glob("*config.json"):
            text = file.read_text(encoding="utf-8")
            if (changed := forget(text)) != text:
                file.write_text(changed, encoding="utf-8")
        index = Path(folder, part, "model_index.json")
        if index.exists():
            index.write_text(without_path(index.read_text(encoding="utf-8")), encoding="utf-8")
