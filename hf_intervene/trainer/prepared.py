"""What the frozen parts in front of a denoiser make of the training images, kept on disk: latents
and features of a vision model.

They are the same at every step, so they are computed once, in float32, and read back by memory map.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..bases import DiffusionBase
from ..bases.base import weight_hash
from ..data import ContextImages
from ..data.mapped import open_array
from .checkpoints import atomic_folder


class PreparedImages:
    """Rows of `DiffusionBase.prepare` of a set of images, from a folder that is written when it is
    not there or is of other images or other weights.

    Args:
        folder: of this set.
        base: the base; on its device the images are prepared.
        images: the images.
        accelerator: the main process writes, the others wait.
        batch_size: images at once.

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
        if accelerator.is_main_process and _read_key(folder) != key:
            with atomic_folder(folder) as temporary:
                self._write(temporary, base, images, batch_size)
                (temporary / "key.json").write_text(json.dumps(key))
        accelerator.wait_for_everyone()
        remedy = "do not change the folder of a run; go on with --resume auto"
        self._arrays = {file.stem: open_array(file, remedy) for file in folder.glob("*.npy")}
        self._prompt_ids = images.prompt_ids if getattr(base, "prompts", None) is not None else None

    @staticmethod
    def _write(folder: Path, base: DiffusionBase, images: ContextImages, batch_size: int) -> None:
        arrays: dict[str, np.memmap] = {}
        batches = torch.arange(len(images)).split(batch_size)
        for rows in tqdm(batches, "preparing images", disable=None, delay=2):
            x = images.images(rows).to(base.model.device).float() / 255
            for name, value in base.prepare(x).items():
                for row in rows[~torch.isfinite(value).flatten(1).all(1).cpu()].tolist():
                    context = images.contexts[images.context_ids[row]]
                    raise ValueError(
                        f"the {name} of image {row} ({context!r}) are not finite: look at it, or"
                        " use another base."
                    )
                if name not in arrays:
                    shape = (len(images), *value.shape[1:])
                    arrays[name] = np.lib.format.open_memmap(
                        folder / f"{name}.npy", "w+", np.float32, shape
                    )
                arrays[name][rows.numpy()] = value.cpu().numpy()
        for array in arrays.values():
            array.flush()

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
        return json.loads((folder / "key.json").read_text())
    except (OSError, ValueError):
        return None
