"""Models on the Hub, read as folders: every loader reads one snapshot of one commit.

Every error is one sentence. This file imports only huggingface_hub, so that it can travel with a
checkpoint.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # the HTTP client's own
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects
from huggingface_hub.utils.sha import sha_fileobj

from .files import read_text


OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
# Files of a saved model or pipeline. Pickle files are not even fetched.
SAVED_FILES = ("*.json", "*.safetensors")
NO_PICKLES = (
    "safe_serialization=False would write pickle files, which are never loaded: leave it out."
)
MAX_SIZE = 1 << 20  # the largest size that a configuration may name
_MAX_JSON = 1 << 26  # bytes
_Raised = TypeVar("_Raised", bound=BaseException)
_LOGIN = "log in with `hf auth login`, or pass token="


def pop_options(kwargs: dict) -> dict:
    """Remove the options of `folder` from the keyword arguments of a `from_pretrained`."""
    return {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}


def folder(name: str | os.PathLike, files: Sequence[str] = SAVED_FILES, **options: Any) -> Path:
    """Return the folder of a saved model.

    It is `name` itself if that is a folder, else a snapshot of that Hub repository in the local
    cache. All that a loader reads comes from this folder, and so from one commit. Files that are in
    the cache are not fetched again. Nothing is fetched offline (`HF_HUB_OFFLINE=1` or
    `local_files_only=True`).

    Args:
        name: folder, or repository on the Hub.
        files: patterns of the files that are needed.
        **options: `revision`, `token`, `cache_dir`, `local_files_only` and `force_download` of
            `from_pretrained`.

    Raises:
        OSError: there is no such repository or revision, access is denied, the Hub or the
            connection fails, a file is not in the cache when offline, the contents differ from what
            was uploaded, or a link leads out of the folder.
        TypeError: the name or the revision is of another type.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise TypeError(
            f"a saved model is named by its folder or Hub name, not by a {type(name).__name__}."
        )
    if not isinstance(options.get("revision") or "", str):
        raise TypeError(f"revision must be a text, not {options['revision']!r}.")
    if not str(name).strip():
        raise OSError("the name of the model is empty: give a folder or a Hub name, user/name.")
    if os.path.isfile(name):
        raise NotADirectoryError(f"{name} is a file: give the folder of the saved model.")
    if os.path.isdir(name):
        shown = os.fspath(name).encode("utf-8", "backslashreplace").decode()
        if shown.encode() != os.fsencode(name):  # safetensors cannot open files in it
            raise OSError(
                f"the name of the folder {shown} has bytes that are not UTF-8: rename it."
            )
        check_links(Path(name), files)
        return Path(name)
    failed = f"there is no folder {name}, and it cannot be loaded from the Hub"
    with clear_errors(failed, str(name), options.get("revision")):
        path = Path(snapshot_download(str(name), allow_patterns=list(files), **options))
    if not path.is_dir():
        raise OSError(
            f"there is no saved model in {name} on the Hub: it has none of the files"
            f" {', '.join(files)}."
        )
    _check_contents(path, files, name)
    return path


def subfolder(path: Path, name: str | None, of: object) -> Path:
    """Return the sub-folder `name` of a folder of `folder`; `None` gives the folder itself.

    Args:
        path: the folder.
        name: name of the sub-folder.
        of: name of the model, for the message.

    Raises:
        OSError: there is no such sub-folder, or its name leads out of the folder.
        TypeError: the name is of another type.
    """
    if name is not None and not isinstance(name, (str, os.PathLike)):
        raise TypeError(f"subfolder must be a text, not a {type(name).__name__}.")
    found = path / (name or "")
    if os.path.isabs(name or "") or ".." in Path(name or "").parts or not found.is_dir():
        raise OSError(f"{of} has no sub-folder {name!r}: give the name of one that is in it.")
    return found


def _check_contents(path: Path, patterns: Sequence[str], name: str | os.PathLike) -> None:
    """Check that weights have the hash with which they were uploaded.

    The cache names files by this hash, but nothing compares it while they are downloaded.
    """
    weights = [file.relative_to(path).as_posix() for file in path.rglob("*.safetensors")]
    # The same selection as that of snapshot_download.
    for file in filter_repo_objects(weights, allow_patterns=list(patterns)):
        blob = (path / file).resolve()
        if len(blob.name) != 64:  # not a SHA-256: the cache has no symbolic links
            continue
        with open(blob, "rb") as opened:
            if sha_fileobj(opened).hex() != blob.name:
                raise OSError(
                    f"{file} of {name} is corrupt, it differs from the file that was uploaded:"
                    " load with force_download=True to fetch it again."
                )


def check_links(path: Path, patterns: Sequence[str]) -> None:
    """Refuse a folder whose links would make a loader read other files of this machine.

    Args:
        path: the folder. Links into `blobs` are allowed in the Hub's cache.
        patterns: patterns of the names of the files that are read.

    Raises:
        OSError: such a file, or a folder that holds one, is a link that leads out of the folder, or
            is a pipe or a device.
    """
    root, kept = os.path.realpath(path), list(patterns)
    for parent in Path(root).parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            root = str(parent.parent)

    def leads_out(entry: str) -> bool:
        return not os.path.realpath(entry).startswith(root + os.sep)

    for place, folders, names in os.walk(path):
        at = os.path.relpath(place, path)
        files = [os.path.normpath(os.path.join(at, name)) for name in names]
        for name in filter_repo_objects(files, allow_patterns=kept):
            entry = os.path.join(path, name)
            if leads_out(entry):
                raise OSError(
                    f"{entry} is a link to outside of its folder, which is not followed: replace it"
                    " by the file itself."
                )
            if os.path.exists(entry) and not os.path.isfile(entry):
                raise OSError(
                    f"{entry} is a pipe or a device, not a file: replace it by the file itself."
                )
        for name in folders:
            entry = os.path.join(place, name)
            if not os.path.islink(entry) or not leads_out(entry):  # `walk` does not follow links
                continue
            inside = [os.path.normpath(os.path.join(at, name, file)) for file in os.listdir(entry)]
            if any(filter_repo_objects(inside, allow_patterns=kept)):
                raise OSError(
                    f"{entry} is a link to outside of its folder, which is not followed: replace it"
                    " by a folder with the files themselves."
                )


def read_json(path: Path) -> dict:
    """Return the object in a JSON file.

    Raises:
        OSError: the file cannot be read, is not a JSON object, is truncated, is nested too deeply,
            or names a key twice.
    """
    try:
        found = json.loads(read_text(path, _MAX_JSON), object_pairs_hook=_object)
        if not isinstance(found, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise OSError(
            f"{path} is not a valid JSON object: it is truncated or corrupt; fetch it again."
        ) from error
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):  # two readers could use different ones
        raise ValueError("a key is named twice")
    return found


def read_config(path: Path) -> dict:
    """Return the configuration in a JSON file, and check the sizes in it.

    A model is built from these sizes before any weights are read.

    Raises:
        OSError: see `read_json`.
        ValueError: it names a size that no model has.
    """
    found, values = read_json(path), []
    pending: list[Any] = [found]
    while pending:
        value = pending.pop()
        pending += (
            value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
        )
        values += [value] if isinstance(value, int) else []
    if any(abs(value) > MAX_SIZE for value in values):
        raise ValueError(
            f"{path} names the size {max(values, key=abs)}, which no model has: it is corrupt, or"
            " made to do harm."
        )
    return found


def check_weights(path: Path, what: str, stem: str, variant: str | None = None) -> list[Path]:
    """Return the files of the weights in a folder.

    Args:
        path: the folder.
        what: the model, for the message.
        stem: the name that a library gives the files, without its ending.
        variant: `None`, or a variant such as `"fp16"`.

    Raises:
        OSError: weights are missing, incomplete, pickled, or in another folder.
        TypeError: the variant is of another type, or empty.
    """
    if variant is not None and not (isinstance(variant, str) and variant):
        raise TypeError(
            "variant must be a text such as 'fp16': leave it out for weights that are named without"
            " one."
        )
    dotted = f".{variant}" if variant else ""
    single = path / f"{stem}{dotted}.safetensors"
    index = path / f"{stem}.safetensors.index{dotted}.json"
    needed = {single.name} if single.is_file() or not index.exists() else set()
    if index.exists():
        try:
            names = set(read_json(index)["weight_map"].values())
            if not names or not all(isinstance(name, str) for name in names):
                raise TypeError("no names")
        except (OSError, LookupError, AttributeError, TypeError) as error:
            raise OSError(
                f"{what} cannot be read: {index.name} is truncated or corrupt; fetch it again."
            ) from error
        needed |= names
    if strange := sorted(
        name for name in needed if Path(name).name != name or not name.endswith(".safetensors")
    ):
        raise OSError(
            f"{what} has no whole weights in safetensors format: {index.name} names {strange[0]!r},"
            " which is not such a file in the same folder; pickle files are never loaded, and other"
            " folders are not searched."
        )
    missing = sorted(name for name in needed if not (path / name).is_file())
    if missing:
        raise OSError(
            f"{what} has no whole weights in safetensors format ({', '.join(missing[:3])} missing):"
            " its folder, repository or download is incomplete, or holds pickle files, which are"
            " never loaded."
        )
    return [path / name for name in sorted(needed)]


@contextmanager
def clear_errors(failed: str, repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turn errors of the Hub's client in the body into an OSError of one sentence.

    Args:
        failed: what failed, the beginning of the message. The reason follows.
        repo_id: the repository.
        revision: the revision that was asked for.

    Raises:
        OSError: the body raised an error, which is the cause of this one.
    """
    try:
        yield
    # A RuntimeError comes from an upload in a thread.
    except (OSError, HTTPError, HFValidationError, RuntimeError) as error:
        raise OSError(f"{failed}: {_reason(error, repo_id, revision)}") from error


def _reason(error: BaseException, repo_id: str, revision: str | None) -> str:
    chain = [error]
    while (
        cause := chain[-1].__cause__ or chain[-1].__context__
    ) is not None and cause not in chain:
        chain.append(cause)

    def raised(kind: type[_Raised]) -> _Raised | None:
        return next((e for e in chain if isinstance(e, kind)), None)

    if raised(HFValidationError):
        return "that is not a valid name of a repository, user/name."
    if raised(GatedRepoError):
        return f"{repo_id} is gated: ask for access on its page, then {_LOGIN}."
    if raised(RevisionNotFoundError):
        return f"it has no revision {revision!r}: give one of its branches, tags or commits."
    answer = raised(HfHubHTTPError)
    if answer is not None:
        status = answer.response.status_code
        if status in (401, 404):
            return (
                "there is no such repository, or it is private: check the name and, if it is"
                f" private, {_LOGIN}."
            )
        if status == 403:
            return f"access is denied (403): use a token that has the permission; {_LOGIN}."
        if status in (409, 412):
            return (
                f"the repository was changed or is being changed by somebody else ({status}): try"
                " again."
            )
        if status == 429 or status >= 500:
            return f"the Hub is not available (it answered {status}): try again later."
        return f"the Hub answered {status}: {_one_line(answer.server_message or answer)}"
    if isinstance(chain[-1], (OfflineModeIsEnabled, LocalEntryNotFoundError)):
        return (
            "it is not, or not whole, in the local cache, and this is offline: load it once with"
            " a connection."
        )
    if raised(HTTPError) or raised(ConnectionError):
        return (
            "the connection failed or was cut: try again; what is in the local cache loads with"
            " HF_HUB_OFFLINE=1."
        )
    return _one_line(error)


def _one_line(value: object) -> str:
    return " ".join(str(value).split())
