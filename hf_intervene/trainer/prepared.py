"""What the frozen parts in front of a denoiser make of the training images, kept on disk: latents
and features of a vision model.

They are the same at every step, so they are computed once, in float32, and read back by memory map.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..bases import DiffusionBase
from ..bases.hashes import weight_hash
from ..data import ContextImages
from ..data.mapped import open_array
from .checkpoints import remove_whole, write_whole
from .run_folder import remove
from .stopping import by_main_process


KEY = "key.json"  # what the files of a folder were made of
KEPT_EVERY = 10.0  # seconds between two notes of how many images are prepared


class PreparedImages:
    """Rows of `DiffusionBase.prepare` of a set of images, from a folder that is written when it is
    not there or is of other images or other weights.

    Args:
        folder: of this set.
        base: the base; on its device the images are prepared.
        images: the images.
        accelerator: the main process writes, the others wait.
        batch_size: images at once. What is done when a run is stopped is kept, and gone on from.

    Raises:
        OSError, ValueError: one sentence: the folder cannot be written, or what is made of an image
            is not finite.
    """

    def __init__(
        self,
        folder: Path,
        base: DiffusionBase,
        images: ContextImages,
        accelerator: Accelerator,
        batch_size: int = 64,
    ):
        digest = hashlib.sha256()
        # not all at once: they may be more than memory holds
        for rows in torch.arange(len(images)).split(1024):
            digest.update(images.images(rows).numpy().tobytes())
        key = {"images": digest.hexdigest()}
        key |= {name: weight_hash(model) for name, model in base.companion_models().items()}

        def write(check: Callable[[], None]) -> None:
            found = _read_key(folder)
            if not (found and found.get("key") == key and _is_whole(folder, found, len(images))):
                partial = folder.with_name(f"{folder.name}.partial")
                self._write(partial, key, base, images, batch_size, check)
                remove_whole(folder)
                partial.rename(folder)

        by_main_process(accelerator, write)
        remedy = "do not change the folder of a run; go on with --resume auto"
        self._arrays = {file.stem: open_array(file, remedy) for file in folder.glob("*.npy")}
        self._prompt_ids = images.prompt_ids if getattr(base, "prompts", None) is not None else None

    @staticmethod
    def _write(
        folder: Path,
        key: dict,
        base: DiffusionBase,
        images: ContextImages,
        batch_size: int,
        check: Callable[[], None],
    ) -> None:
        """Prepare the images in a folder, from where an earlier run with this key was stopped."""
        (done, files), since = _begun(folder, key, len(images)), time.monotonic()

        def keep() -> None:
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
            state = {"key": key, "rows": done, "files": sorted(files)}
            write_whole(folder / KEY, json.dumps(state))

        left = torch.arange(done, len(images))
        batches = left.split(batch_size) if len(left) else ()  # or one that is empty
        try:
            for rows in tqdm(batches, "preparing images", disable=None, delay=2):
                x = images.images(rows).to(base.model.device).float() / 255
                for name, value in base.prepare(x).items():
                    for row in rows[~torch.isfinite(value).flatten(1).all(1).cpu()].tolist():
                        context = images.contexts[images.context_ids[row]]
                        raise ValueError(
                            f"the {name} of image {row} ({context!r}) are not finite: look at it,"
                            " or use another base."
                        )
                    if name not in files:
                        # Not a memory map: there a full disk would kill the process.
                        files[name] = open(folder / f"{name}.npy", "w+b")
                        shape = (len(images), *value.shape[1:])
                        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                        np.lib.format.write_array_header_1_0(files[name], header)
                    files[name].write(value.cpu().numpy().astype("<f4").tobytes())
                done = int(rows[-1]) + 1
                if time.monotonic() - since > KEPT_EVERY:
                    keep()
                    since = time.monotonic()
                check()
            keep()
        except OSError as error:
            if error.errno is None:  # of the images that are read, in a sentence of its own
                keep()
                raise
            raise OSError(
                f"cannot write {folder}: {error.strerror or error}; what is prepared so far is"
                " kept."
            ) from error
        except BaseException:
            keep()
            raise
        finally:
            for file in files.values():
                with suppress(OSError):
                    file.close()

    def __getitem__(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """The prepared images of an index (n,), on the CPU; with `prompts`, the numbers of theirs,
        if they are trained with them.

        Raises:
            OSError: one sentence: a file was cut meanwhile.
        """
        found = {
            name: torch.from_numpy(file.rows(rows.numpy(), array.shape, array.dtype))
            for name, (array, file) in self._arrays.items()
        }
        return found if self._prompt_ids is None else found | {"prompts": self._prompt_ids[rows]}


def _read_key(folder: Path) -> dict | None:
    try:
        found = json.loads((folder / KEY).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _is_whole(folder: Path, found: dict, count: int) -> bool:
    """Whether all files of a folder are there, and as long as their headers say."""
    try:
        for name in found["files"]:
            with open(folder / f"{name}.npy", "rb") as file:
                shape, row = _read_header(file)
                size = file.tell() + shape[0] * row
                if shape[0] != count or os.fstat(file.fileno()).st_size != size:
                    return False
        return bool(found["files"]) and found["rows"] == count
    except (OSError, ValueError, LookupError, TypeError, SyntaxError):
        return False


def _read_header(file: BinaryIO) -> tuple[tuple[int, ...], int]:
    """The shape of a file's array, and the bytes of a row of it.

    Raises:
        ValueError: it is no such file.
    """
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("of another version")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    return shape, math.prod(shape[1:]) * dtype.itemsize


def _begun(folder: Path, key: dict, count: int) -> tuple[int, dict[str, BinaryIO]]:
    """How many images were prepared in a folder, and the files of what was made of them, where the
    next one is to be written; the folder is emptied where that cannot be used."""
    found = _read_key(folder)
    try:
        if found is not None and found["key"] == key and 0 < found["rows"] <= count:
            names = found["files"]
            files = {name: _continued(folder / f"{name}.npy", found["rows"]) for name in names}
            if files:
                return found["rows"], files
    except (OSError, ValueError, LookupError, TypeError):
        pass  # it is damaged
    remove(folder)
    folder.mkdir(parents=True)
    return 0, {}


def _continued(path: Path, rows: int) -> BinaryIO:
    """The file of an array whose first rows are written, behind them.

    Raises:
        OSError, ValueError: it is not such a file, or is shorter.
    """
    file = open(path, "r+b")
    _, row = _read_header(file)
    end = file.tell() + rows * row
    if os.fstat(file.fileno()).st_size < end:
        raise ValueError("it was cut")
    file.truncate(end)
    file.seek(end)
    return file
