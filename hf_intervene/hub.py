"""The Hub as folders: every loader reads one snapshot of one commit, and says in a sentence why it cannot.

This file imports huggingface_hub alone, so that it can travel with a checkpoint.
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
    HTTPError,  # of the HTTP client that huggingface_hub uses
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects
from huggingface_hub.utils.sha import sha_fileobj


OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
SAVED_FILES = ("*.json", "*.safetensors")  # of a saved model or pipeline; pickle files are not even fetched
_Raised = TypeVar("_Raised", bound=BaseException)
_LOGIN = "log in with `hf auth login`, or pass token="


def pop_options(kwargs: dict) -> dict:
    """Take the options of `folder` out of the keyword arguments of a `from_pretrained`."""
    return {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}


def folder(name: str | os.PathLike, files: Sequence[str] = SAVED_FILES, **options: Any) -> Path:
    """The folder of a saved model: `name` itself if it is one, else a snapshot of that Hub repository in the local cache.

    Everything that a loader reads comes from this one folder, hence from one commit. Nothing is fetched that is there already, and
    nothing at all offline (`HF_HUB_OFFLINE=1` or `local_files_only=True`).

    Args:
        name: folder, or repository on the Hub.
        files: patterns of the files needed.
        **options: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`, as everywhere.

    Raises:
        OSError: one sentence: no such repository or revision, no access, the Hub or the connection fails, not in the cache when
            offline, contents that are not those that were uploaded.
    """
    if os.path.isdir(name):
        return Path(name)
    with clear_errors(f"cannot load {name} from the Hub", str(name), options.get("revision")):
        path = Path(snapshot_download(str(name), allow_patterns=list(files), **options))
    if not path.is_dir():
        raise OSError(f"there is no saved model in {name} on the Hub: it has none of the files {', '.join(files)}.")
    _check_contents(path, files, name)
    return path


def _check_contents(path: Path, patterns: Sequence[str], name: str | os.PathLike) -> None:
    """Weights have the hash they were uploaded with: the cache names them by it, but nobody compared when they came in."""
    weights = [file.relative_to(path).as_posix() for file in path.rglob("*.safetensors")]
    for file in filter_repo_objects(weights, allow_patterns=list(patterns)):  # as snapshot_download chose them
        blob = (path / file).resolve()
        if len(blob.name) != 64:  # no SHA-256: a cache without symbolic links
            continue
        with open(blob, "rb") as opened:
            if sha_fileobj(opened).hex() != blob.name:
                raise OSError(
                    f"{file} of {name} is corrupt, it is not the file that was uploaded: "
                    "load with force_download=True to fetch it again."
                )


def check_weights(path: Path, what: str, variant: str | None = None) -> None:
    """Refuse a folder whose weights (of a variant, such as `"fp16"`) are missing, incomplete or pickled.

    Raises:
        OSError: one sentence.
    """
    dotted = f".{variant}" if variant else ""
    found = {file.name for file in path.glob(f"*{dotted}.safetensors")} | {
        file.name for file in path.glob(f"*{dotted}-*.safetensors")
    }
    needed = set()
    for index in path.glob(f"*.safetensors.index{dotted}.json"):
        try:
            needed |= set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OSError(f"{what} cannot be read: {index.name} is truncated or corrupt; fetch it again.") from error
    if not found or needed - found:
        missing = ", ".join(sorted(needed - found)[:3]) or f"*{dotted}.safetensors"
        raise OSError(
            f"{what} has no whole weights in safetensors format ({missing} missing): its folder, repository or download is "
            "incomplete, or holds pickle files, which are never loaded."
        )


def origin(name_or_path: str, revision: str | None, subfolder: str | None) -> dict[str, str | None]:
    """Where a loaded model came from: `name_or_path`, `subfolder` and, of a Hub repository, the commit as `revision`.

    A diffusers model keeps the name it was loaded by and no revision. One out of a pipeline keeps a path in the cache,
    `models--user--name/snapshots/COMMIT/vae`, which says all three.
    """
    parts = Path(name_or_path).parts
    if len(parts) > 2 and "snapshots" in parts[:-1]:
        at = parts.index("snapshots")
        if parts[at - 1].startswith("models--"):
            inside = "/".join([*parts[at + 2 :], *([subfolder] if subfolder else [])])
            name = parts[at - 1].removeprefix("models--").replace("--", "/")
            return {"name_or_path": name, "subfolder": inside or None, "revision": parts[at + 1]}
    if os.path.isdir(name_or_path):
        name_or_path = os.path.abspath(name_or_path)  # or, from another folder, it would pass for a repository
    else:
        try:  # the commit that the cache knows the revision by is the one of the last load
            revision = Path(snapshot_download(name_or_path, revision=revision, local_files_only=True, allow_patterns=[])).name
        except (LocalEntryNotFoundError, HFValidationError):
            pass
    return {"name_or_path": name_or_path, "subfolder": subfolder, "revision": revision}


def is_on_hub(name_or_path: str, revision: str | None, **_: object) -> bool:
    """Whether an `origin` is a repository on the Hub and not a folder."""
    return revision is not None or (
        name_or_path.count("/") == 1 and not os.path.exists(name_or_path) and not name_or_path.startswith((".", "/"))
    )


@contextmanager
def clear_errors(failed: str, repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turn what the Hub's client raises in the body into an OSError of one sentence, `failed` and the reason; the original is its cause.

    Raises:
        OSError: see above.
    """
    try:
        yield
    except (OSError, HTTPError, HFValidationError, RuntimeError) as error:  # RuntimeError: an upload in a thread
        raise OSError(f"{failed}: {_reason(error, repo_id, revision)}") from error


def _reason(error: BaseException, repo_id: str, revision: str | None) -> str:
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)

    def raised(kind: type[_Raised]) -> _Raised | None:
        return next((e for e in chain if isinstance(e, kind)), None)

    if raised(HFValidationError):
        return f"there is no folder {repo_id}, and it is not a name on the Hub either, user/name."
    if raised(GatedRepoError):
        return f"{repo_id} is gated: ask for access on its page, then {_LOGIN}."
    if raised(RevisionNotFoundError):
        return f"it has no revision {revision!r}: give one of its branches, tags or commits."
    answer = raised(HfHubHTTPError)
    if answer is not None:
        status = answer.response.status_code
        if status in (401, 404):
            return f"there is no such repository, or it is private: check the name and, if it is private, {_LOGIN}."
        if status == 403:
            return f"access is denied (403): use a token that has the permission; {_LOGIN}."
        if status in (409, 412):
            return f"the repository was changed or is being changed by somebody else ({status}): try again."
        if status == 429 or status >= 500:
            return f"the Hub is not available (it answered {status}): try again later."
        return f"the Hub answered {status}: {_one_line(answer.server_message or answer)}"
    if isinstance(chain[-1], (OfflineModeIsEnabled, LocalEntryNotFoundError)):
        return "it is not, or not whole, in the local cache, and this is offline: load it once with a connection."
    if raised(HTTPError) or raised(ConnectionError):
        return "the connection failed or was cut: try again, or work from the local cache with HF_HUB_OFFLINE=1."
    return _one_line(error)


def _one_line(value: object) -> str:
    return " ".join(str(value).split())
