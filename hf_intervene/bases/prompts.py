"""Prompts of images: what the arguments of a denoiser are for each prompt, encoded once and kept in
files.

A pipeline encodes a prompt into some of the constants of its recording (see `replay.Recording`):
embeddings, masks, positions."""

import hashlib
import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from .recording import NotRecordable, Recorder
from .replay import Recording


_AT_HAND = 256  # prompts that are kept in memory


class Prompts:
    """The constants that belong to each of several prompts.

    Args:
        recording: of the pipeline; its own constants are those of the prompt that it was recorded
            with, which is number -1.
        files: one for each prompt, with the constants that differ, by their numbers.
    """

    def __init__(self, recording: Recording, files: Sequence[Path]):
        self.files = list(files)
        read = [load_file(file) for file in self.files]
        numbers = sorted({int(name) for found in read for name in found})
        self.default = {number: recording.constants[number].cpu() for number in numbers}
        self.shapes = {_shapes(self.default | _numbered(found)) for found in read} | {
            _shapes(self.default)
        }
        self._load = lru_cache(_AT_HAND)(lambda file: self.default | _numbered(load_file(file)))

    def __getitem__(self, number: int) -> dict[int, torch.Tensor]:
        """By number the constants of a prompt, on the CPU; of -1 those of the recording."""
        return self.default if number < 0 else self._load(self.files[number])

    def groups(self, numbers: Sequence[int]) -> list[list[int]]:
        """Which rows of a batch have constants of the same shapes: those can be denoised together.

        Args:
            numbers: of the prompt of each row.
        """
        found: dict[Any, list[int]] = {}
        for row, number in enumerate(numbers):
            found.setdefault(_shapes(self[number]), []).append(row)
        return list(found.values())


def record_prompts(
    recorder: Recorder, recording: Recording, prompts: Sequence[str], folder: str | os.PathLike
) -> Prompts:
    """Encode prompts with a pipeline, each once; those that are in the folder already are not
    encoded again.

    Raises:
        NotRecordable: one sentence: a prompt changes more than tensors, or the pipeline is called
            with embeddings.
        OSError: the folder cannot be written.
    """
    if any("prompt_embeds" in name for name in recorder.extra):
        raise NotRecordable(
            "prompts of images need the pipeline's text encoders, but it is called with"
            " prompt_embeds: leave them out."
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    known = hashlib.sha256(json.dumps(recording.config, sort_keys=True).encode())
    for constant in recording.constants:
        known.update(constant.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    files = []
    for prompt in prompts:
        digest = known.copy()
        digest.update(prompt.encode())
        files.append(folder / f"{digest.hexdigest()}.safetensors")
        if not _is_whole(files[-1]):
            found = text_of(recorder, recording, prompt)
            temporary = files[-1].with_suffix(f".{os.getpid()}")
            save_file(
                {str(number): value.contiguous() for number, value in found.items()}, temporary
            )
            temporary.replace(files[-1])
    return Prompts(recording, files)


def _is_whole(file: Path) -> bool:
    try:
        with safe_open(file, "pt"):
            return True
    except (OSError, SafetensorError):  # it is not there, or was damaged
        return False


def text_of(recorder: Recorder, recording: Recording, prompt: str) -> dict[int, torch.Tensor]:
    """By number the constants of a recording that are other ones for a prompt, on the CPU."""
    seen = recorder.first_arguments(prompt)
    found: dict[int, torch.Tensor] = {}
    for name, node in recording.config["arguments"].items():
        found |= _differing(name, node, seen[name], recording.constants)
    return found


def _differing(
    path: str, node: dict[str, Any], value: Any, constants: list[torch.Tensor]
) -> dict[int, torch.Tensor]:
    if "constant" in node:
        kept = constants[node["constant"]]
        value = value.detach().to(kept.device, kept.dtype)
        return (
            {}
            if kept.shape == value.shape and torch.equal(kept, value)
            else {node["constant"]: value.cpu()}
        )
    if "each" in node:
        return _differing(path, node["each"], value[0], constants)
    inner: list[tuple[Any, dict[str, Any]]] = []
    if "dict" in node:
        inner = list(node["dict"].items())
    elif "list" in node or "tuple" in node:
        inner = list(enumerate(node["list"] if "list" in node else node["tuple"]))
    elif "value" in node and value != node["value"]:
        raise NotRecordable(
            f"the argument {path!r} of the denoiser depends on the prompt and is no tensor: give"
            " one prompt for all images."
        )
    found: dict[int, torch.Tensor] = {}
    for key, part in inner:
        found |= _differing(f"{path}[{key!r}]", part, value[key], constants)
    return found


def _numbered(found: dict[str, torch.Tensor]) -> dict[int, torch.Tensor]:
    return {int(name): value for name, value in found.items()}


def _shapes(constants: dict[int, torch.Tensor]) -> tuple:
    return tuple((number, tuple(constants[number].shape)) for number in sorted(constants))


__all__ = ["Prompts", "record_prompts"]
