"""Load your own images, with the columns `image` and `context`.

The source is a folder, a data set that `datasets` saved, or a data set on the Hub.
"""

import errno
import logging
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Image, List, load_dataset, load_from_disk

from ..contexts import OBS
from ..image_files import READABLE, printable
from ..sources import check_source


# Usual folder names of splits, which are not contexts.
_SPLITS = ("train", "test", "val", "valid", "validation", "dev", "eval", "holdout", "held_out")
PROMPT_COLUMNS = ("prompt", "text")  # the first that exists is used
# Folders that systems and disk stations make in folders of images: copies in small, waste baskets.
_OF_SYSTEMS = {
    "__macosx",
    "@eadir",
    "#recycle",
    "#snapshot",
    "@recycle",
    "$recycle.bin",
    "lost+found",
    "system volume information",
}
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
logger = logging.getLogger(__name__)


def load_contexts(
    source: str | os.PathLike,
    split: str = "train",
    image_column: str = "image",
    context_column: str = "context",
    frames: int | None = None,
) -> Dataset:
    """Load images, or short clips, and the context of each.

    `source` is one of these, tried in this order:

    1. a folder written by `save_to_disk` of a `Dataset` or `DatasetDict`;
    2. a folder with a `metadata.csv`, `.jsonl` or `.parquet` that has a context column (the
       `imagefolder` format of `datasets`);
    3. a folder with a sub-folder for each context, named like the context: `obs/`, `size/`,
       `quad1+size/`. The images may be in sub-folders of these. Hidden files and folders are
       ignored, and folders that systems make for themselves, such as `@eaDir` and `__MACOSX`. A
       warning reports what else is left out: files that are not images, links to folders, images
       outside the sub-folders, and sub-folders without images;
    4. a folder with the sub-folder `split`, which is a folder of kind 2 or 3. If there is also a
       folder `obs`, the sub-folder `split` is a context of that name;
    5. the name of a data set on the Hub.

    Args:
        source: see above. A path is never looked up on the Hub, where names are `user/name`. A path
            is an `os.PathLike`, or a string that is absolute, starts with `.` or `~`, ends with a
            slash, has no slash or several, or begins with a folder that exists.
        split: the split to load. A folder or data set without splits counts as `"train"`.
        image_column: name of the image column.
        context_column: name of the context column.
        frames: frames of a clip; `None`: the data are images. With it, in a folder of kind 3 each
            file of a context is a clip (GIF, animated WebP or PNG), and so is each folder inside,
            whose images are its frames, in the order of their names.

    Returns:
        A data set with the columns `image` and `context`, and `prompt` if the source has a column
        `prompt` or `text`. `ContextImages.from_dataset` checks and decodes it. Of clips in a folder
        of kind 3 the column `image` holds lists of images.

    Raises:
        OSError: there is no such folder (FileNotFoundError), or it cannot be read.
        ValueError: there are no images in it, or no such column or split.
    """
    path = Path(source).expanduser()
    if not check_source(source):
        dataset = from_hub(source, split)
    elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        dataset = read_saved(path, split)
    else:
        folder = _of_split(path, split)
        _warn_of_others(path, folder, split)
        if not _has_metadata(folder):
            return _folder_of_contexts(folder, frames is not None)
        _refuse_pipes(folder)
        dataset = _folder_with_metadata(folder)
        _warn_of_rows(folder, dataset)
    for column, name in ((image_column, "image"), (context_column, "context")):
        if column not in dataset.column_names:
            raise ValueError(
                f"{source} has no column {column!r} to take the {name} from; its columns are"
                f" {', '.join(dataset.column_names)}: give {name}_column."
            )
    names = {image_column: "image", context_column: "context"}
    prompt_column = next(
        (name for name in PROMPT_COLUMNS if name in dataset.column_names and name not in names),
        None,
    )
    if prompt_column is not None:
        names[prompt_column] = "prompt"
    dataset = dataset.select_columns(list(names))
    return dataset.rename_columns({a: b for a, b in names.items() if a != b})


def from_hub(source: str | os.PathLike, split: str) -> Dataset:
    """Load one split of a data set on the Hub.

    Raises:
        OSError: there is no such data set, or no connection.
    """
    try:
        return load_dataset(str(source), split=split)
    except (FileNotFoundError, ConnectionError) as error:
        raise type(error)(
            f"{source} is neither a folder here nor a data set that could be reached on the Hub"
            f" ({error})."
        ) from error


def read_saved(path: Path, split: str) -> Dataset:
    """Load one split of a data set that `save_to_disk` wrote.

    Raises:
        OSError: the data set is incomplete or corrupt.
        ValueError: it has no such split, or holds a pipe or a device.
    """
    _refuse_pipes(path)
    try:
        dataset = load_from_disk(str(path))
        for part in dataset.values() if isinstance(dataset, dict) else (dataset,):
            # Offsets that point outside a damaged file would end the process when a row is read.
            part.data.table.validate(full=True)
    except Exception as error:  # readers of JSON and Arrow raise errors of many types
        raise OSError(
            f"the saved data set {path} cannot be read: it is incomplete or corrupt; save it again."
        ) from error
    if isinstance(dataset, dict):
        if split not in dataset:
            raise ValueError(f"{path} has no split {split!r}, only {', '.join(dataset)}.")
        return dataset[split]
    if split != "train" and str(dataset.split) != split:
        raise ValueError(
            f"{path} has no split {split!r}: it is a single data set; load it without a split."
        )
    return dataset


def _of_split(path: Path, split: str) -> Path:
    inside = path / split
    if inside.is_dir() and (
        (inside / OBS).is_dir() or _has_metadata(inside) or not (path / OBS).is_dir()
    ):
        return inside
    if split != "train":  # training images must not be used as a test split that is missing
        raise ValueError(f"{path} has no split {split!r}: there is no such sub-folder.")
    return path


def _has_metadata(folder: Path) -> bool:
    return any((folder / name).exists() and not (folder / name).is_dir() for name in _METADATA)


def _refuse_pipes(folder: Path) -> None:
    """Raise a ValueError if a folder holds a pipe or a device: reading it may never end."""
    for file in folder.rglob("*"):
        if file.exists() and not file.is_file() and not file.is_dir():
            raise ValueError(f"{printable(file)} is a pipe or a device, not a file: remove it.")


def _folder_with_metadata(folder: Path) -> Dataset:
    def load(mode: str | None) -> Dataset:
        return load_dataset("imagefolder", data_dir=str(folder), split="train", download_mode=mode)

    try:
        return load(None)
    except Exception:  # its entry in the cache may be corrupt
        try:
            return load("force_redownload")
        except Exception as error:  # readers of tables raise errors of many types
            if isinstance(error, OSError) and error.errno in (
                errno.EACCES,
                errno.EROFS,
                errno.ENOTDIR,
                errno.ENOSPC,
            ):
                where = datasets.config.HF_DATASETS_CACHE
                raise OSError(
                    f"the cache of data sets {where} cannot be written ({error.strerror}): set"
                    " HF_DATASETS_CACHE to a folder that can."
                ) from error
            reason = " ".join(str(error.__cause__ or error).split()).rstrip(".")
            raise ValueError(f"the metadata file of {folder} cannot be used: {reason}.") from error


def _warn_of_rows(folder: Path, dataset: Dataset) -> None:
    """Warn of images that no row of a metadata file names, and of those that several name."""
    columns = [name for name, kind in dataset.features.items() if isinstance(kind, Image)]
    named: Counter[str] = Counter()
    for column in columns:
        cells = dataset.cast_column(column, Image(decode=False))[column]
        named.update(os.path.realpath(cell["path"]) for cell in cells if cell and cell["path"])
    left_out = sum(
        _is_image(file) and os.path.realpath(file) not in named for file in folder.rglob("*")
    )
    if left_out:
        logger.warning(
            "%s: %d images that the metadata file does not name are left out.",
            printable(folder),
            left_out,
        )
    again = [path for path, count in named.items() if count > 1]
    if again:
        logger.warning(
            "%s: the metadata file names %d images more than once, and each counts as often (%s).",
            printable(folder),
            len(again),
            printable(Path(again[0]).name),
        )


def _warn_of_others(path: Path, read: Path, split: str) -> None:
    """Warn of what is not read: other sub-folders than the split, and images outside sub-folders.

    Args:
        path: the folder that the user named.
        read: the folder that is read: `path`, or its sub-folder `split`.
        split: name of the split.
    """
    if read != path:
        others = [
            child.name
            for child in _subfolders(path)
            if child != read and child.name.lower() not in _SPLITS
        ]
        if others:
            logger.warning(
                "%s: only the split %r is read; these folders are left out: %s.",
                printable(path),
                split,
                ", ".join(map(printable, others)),
            )
    loose = Counter[str](
        file.suffix.lower()
        for file in read.iterdir()
        if _is_image(file) and not _has_metadata(read)
    )
    if loose:
        logger.warning(
            "%s: images outside the sub-folders of contexts are left out (%s).",
            printable(read),
            _counted(loose),
        )


def _subfolders(path: Path) -> list[Path]:
    """Return the sub-folders that are not hidden, and that no system made for itself."""
    return sorted(
        child for child in path.iterdir() if child.is_dir() and not _is_hidden(child.name)
    )


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _OF_SYSTEMS


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in READABLE and not _is_hidden(file.name) and file.is_file()


def _counted(kinds: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())


def _clips(folder: Path, files: list[Path]) -> list[list[str]]:
    """Group the files of a context: each file in the folder itself, and those of a folder inside,
    `img2` before `img10`."""
    found: dict[Path, list[Path]] = {}
    for file in files:
        found.setdefault(file if file.parent == folder else file.parent, []).append(file)
    return [list(map(str, sorted(group, key=_by_number))) for group in found.values()]


def _by_number(file: Path) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", file.name)
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts]


def _folder_of_contexts(path: Path, clips: bool = False) -> Dataset:
    images: list[Any] = []
    contexts: list[str] = []
    for folder in _subfolders(path):
        files, others = [], Counter[str]()
        for file in sorted(folder.rglob("*")):
            if any(_is_hidden(part) for part in file.relative_to(folder).parts):
                continue
            if file.is_dir():
                if file.is_symlink():  # it could lead back to a folder that contains it
                    others["link to a folder"] += 1
            elif file.exists() and not file.is_file():
                others["pipe or device"] += 1
            elif file.suffix.lower() not in READABLE:
                others[file.suffix.lower() or "no ending"] += 1
            else:  # a link without a target raises an error when it is read
                try:
                    str(file).encode("utf-8")
                except UnicodeEncodeError:
                    raise ValueError(
                        f"the name of {printable(file)} has bytes that are not UTF-8: rename it."
                    ) from None
                files.append(file)
        left_out = _counted(others)
        if not files:
            logger.warning(
                "%s holds no images%s and is left out.",
                printable(folder),
                f" that can be read ({left_out})" * bool(others),
            )
        elif others:
            logger.warning(
                "%s: files that cannot be read as images are left out (%s).",
                printable(folder),
                left_out,
            )
        found = _clips(folder, files) if clips else list(map(str, files))
        images += found
        contexts += [folder.name] * len(found)
    if not images:
        raise ValueError(
            f"{path} holds no images in sub-folders: make one sub-folder for each context (obs/,"
            " size/, ...), or add a metadata.csv with the columns file_name and context."
        )
    kind = List(Image()) if clips else Image()
    return Dataset.from_dict({"image": images, "context": contexts}).cast_column("image", kind)
