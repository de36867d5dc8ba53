"""Your own images: a folder, a saved `datasets` data set or a Hub data set, brought to the columns `image` and `context`."""

import os
from pathlib import Path

from datasets import Dataset, Image, load_dataset, load_from_disk
from PIL import Image as PILImage


def load_contexts(
    source: str | os.PathLike, split: str = "train", image_column: str = "image", context_column: str = "context"
) -> Dataset:
    """Load images and the context each came from.

    `source` is one of:

    - a folder with a sub-folder for each context, named like the context: `obs/`, `size/`, `quad1+size/`;
    - a folder with a `metadata.csv` or `metadata.jsonl` that has a context column (the `imagefolder` format of `datasets`);
    - a folder written by `Dataset.save_to_disk`;
    - the name of a data set on the Hub.

    Args:
        source: see above. What exists as a path, or looks like one (absolute, or starting with `.` or `~`), is never looked up on the Hub.
        split: split of a data set that has several.
        image_column: name of its image column.
        context_column: name of its context column.

    Returns:
        A data set with the columns `image` and `context`; `ContextImages.from_dataset` checks and decodes it.

    Raises:
        FileNotFoundError, ValueError: one sentence: no such folder, no images in it, no such column or split.
    """
    path = Path(source).expanduser()
    if not path.exists():
        if str(source).startswith((".", "~", os.sep)) or str(source).count("/") > 1:
            raise FileNotFoundError(f"there is no folder {source}: give an image folder, a saved data set or a Hub name.")
        dataset = load_dataset(str(source), split=split)
    elif path.is_file():
        raise ValueError(f"{source} is a file: give the folder that holds the images.")
    elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        dataset = load_from_disk(str(path))
        if isinstance(dataset, dict):
            if split not in dataset:
                raise ValueError(f"{source} has no split {split!r}, only {', '.join(dataset)}.")
            dataset = dataset[split]
    elif any((path / name).exists() for name in ("metadata.csv", "metadata.jsonl", "metadata.parquet")):
        dataset = load_dataset("imagefolder", data_dir=str(path), split="train")
    else:
        return _folder_of_contexts(path)
    for column, name in ((image_column, "image"), (context_column, "context")):
        if column not in dataset.column_names:
            raise ValueError(
                f"{source} has no column {column!r} to take the {name} from; its columns are {', '.join(dataset.column_names)}."
            )
    dataset = dataset.select_columns([image_column, context_column])
    return dataset.rename_columns({a: b for a, b in ((image_column, "image"), (context_column, "context")) if a != b})


def _folder_of_contexts(path: Path) -> Dataset:
    extensions = PILImage.registered_extensions()
    images, contexts = [], []
    for folder in sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith(".")):
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in extensions)
        images += map(str, files)
        contexts += [folder.name] * len(files)
    if not images:
        raise ValueError(
            f"{path} holds no images in sub-folders: make one sub-folder for each context (obs/, size/, ...), or add a "
            "metadata.csv with the columns file_name and context."
        )
    return Dataset.from_dict({"image": images, "context": contexts}).cast_column("image", Image())
