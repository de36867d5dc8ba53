"""Hashes of a model's weights, by which a base is known again."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a model by their names without LoRA layers on it."""
    return {
        name.replace(".base_layer.", "."): v
        for name, v in model.state_dict().items()
        if ".lora_" not in name
    }


def weight_hash(model: nn.Module, dtype: torch.dtype | None = None) -> str:
    """SHA-256 of a model's weights: the digests of their names, types, shapes and bytes; LoRA
    layers on it are passed over.

    Args:
        model: the model.
        dtype: type that floating-point weights are cast to first; `None`: as they are.
    """
    weights = base_weights(model)

    def digest(name: str) -> bytes:
        value = weights[name]
        if dtype is not None and value.is_floating_point():
            value = value.to(dtype)
        found = hashlib.sha256()
        _add(found, name, value)
        return found.digest()

    # hashlib lets go of the GIL; the order is that of the names, whoever is done first
    with ThreadPoolExecutor() as pool:
        return hashlib.sha256(b"".join(pool.map(digest, sorted(weights)))).hexdigest()


def running_hash(model: nn.Module) -> str:
    """SHA-256 of a model's weights one after the other, as the first references have it (`hash` in
    them is `"running"`).
    """
    found = hashlib.sha256()
    for name, value in sorted(base_weights(model).items()):
        _add(found, name, value)
    return found.hexdigest()


def _add(found: "hashlib._Hash", name: str, value: torch.Tensor) -> None:
    found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
    found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
