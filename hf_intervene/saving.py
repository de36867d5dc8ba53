"""How an `InterventionModel` is saved and loaded: head, adapter, LoRA layers and base, each as what
reads it alone expects.
"""

import os
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.models.modeling_utils import ModelMixin

from . import hub
from .bases import Base
from .bases.limits import check_finite
from .bases.loading import remove_weights
from .bases.lora import has_lora, lora_rank
from .bases.saved import PART_FOLDERS, load_base_of, load_lora_of, save_base_of
from .configuration_intervention import InterventionConfig
from .logging import get_logger
from .modeling_intervention import InterventionHead
from .origins import forget_paths
from .pretrained import not_bundled


logger = get_logger(__name__)


class SavingMixin:
    """`save_pretrained` and `from_pretrained` of an `InterventionModel`."""

    config: InterventionConfig
    base: Base
    head: InterventionHead | None
    _loaded_from: Path | None = None  # the folder, if it was loaded

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        save_base: bool | None = None,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        **kwargs: Any,
    ) -> None:
        """Save what was trained: the head as a transformers model, adapter and base as diffusers
        models.

        save_directory/config.json, model.safetensors    the head; `InterventionHead.from_pretrained` reads it alone
        save_directory/adapter/                          the base family's adapter, where it has one
        save_directory/lora/                             LoRA layers on the base, if it has any; plain PEFT reads them alone
        save_directory/base/                             the base; plain diffusers reads it alone
        save_directory/scheduler/, vae/, image_encoder/, image_processor/      what a denoiser needs beside it

        Args:
            save_directory: the folder.
            save_base: whether to save the base too (and the models beside it); `None`: unless it still
                is the pretrained one it was loaded as, or that one in half precision. Then the
                configuration's `base_reference` (`companion_references`) says where to load it from,
                and by which hash to know it.
            variant: put into the names of the weights of head, adapter and base, such as `"fp16"`; cast
                the model first (`model.half()`).
            max_shard_size: larger weights of head, adapter and base are saved in several files. LoRA
                layers are always one file.
            **kwargs: of the head's `save_pretrained`.

        Raises:
            OSError, ValueError: one sentence: `save_directory` is a file, or pickle files are
                wanted, which would not be loaded again.
        """  # noqa: E501
        if kwargs.pop("push_to_hub", False):
            raise ValueError(
                "save_pretrained(push_to_hub=True) would push half of the model: use push_to_hub()."
            )
        if kwargs.pop("safe_serialization", True) is False:
            raise ValueError(hub.NO_PICKLES)
        if os.path.isfile(save_directory):
            raise NotADirectoryError(
                f"cannot save to {save_directory}: it is a file; give a folder."
            )
        if has_lora(self.base.model):
            for part in (self, self.head) if self.head is not None else (self,):
                part.config.lora_rank = lora_rank(self.base.model)  # loading looks there
        save_base_of(self.base, self.config, save_directory, save_base, variant, max_shard_size)
        if self.head is None:
            self.config.save_pretrained(save_directory, **kwargs)
        else:
            remove_weights(save_directory, variant)
            self.head.save_pretrained(
                save_directory, variant=variant, max_shard_size=max_shard_size, **kwargs
            )
        forget_paths(save_directory, ("", *PART_FOLDERS, *self.base.companion_names))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        base: ModelMixin | Base | None = None,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
        base_token: str | bool = False,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a model saved by `save_pretrained`, from a folder or the Hub; a base that was not
        saved with it, from its own place.

        Args:
            pretrained_model_name_or_path: folder or repository.
            base: the base to use instead, in the precision it has.
            torch_dtype: precision of head, adapter and base, as in a diffusers pipeline; `None`:
                float32. For a base in half precision under a head in float32, pass `base`.
            dtype: the same, by transformers' name for it.
            variant: the variant to read of what was saved here, such as `"fp16"`; a base elsewhere
                has its own in `base_reference`.
            base_token: token for a private base elsewhere, whose repository the model's
                configuration names and not you; `True`: that of `hf auth login`. Your token is sent
                there only if you say so.
            subfolder: of the folder or repository, where the model is.
            **kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`, as
                elsewhere; `use_safetensors=True`, `trust_remote_code` and `low_cpu_mem_usage`
                change nothing here. Others would reach the head alone, and are refused.

        Raises:
            OSError, ValueError, TypeError: one sentence: not a saved model, no such repository or
                no access to it, truncated, missing or pickled weights, weights that do not fit the
                configuration, a base that is not the one the head was trained on (in any
                precision), or of a class not registered.
        """
        name, dtype = pretrained_model_name_or_path, dtype or torch_dtype or torch.float32
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"torch_dtype must be a type such as torch.bfloat16, not {dtype!r}.")
        options = hub.pop_options(kwargs)
        if "output_loading_info" in kwargs:
            raise TypeError(
                "InterventionModel.from_pretrained takes no output_loading_info: what does not fit"
                " is an error here."
            )
        if kwargs.pop("use_safetensors", True) is False:
            raise TypeError(
                "InterventionModel.from_pretrained reads safetensors only: leave use_safetensors"
                " out."
            )
        if others := sorted(kwargs.keys() - {"trust_remote_code", "low_cpu_mem_usage"}):
            raise TypeError(
                f"InterventionModel.from_pretrained takes no {others[0]}, which would reach the"
                " head alone: leave it out."
            )
        path = hub.subfolder(hub.folder(not_bundled(name), **options), subfolder, name)
        logger.info("loading the model %s from %s", name, path)
        config = InterventionConfig.from_pretrained(path)
        options["base_token"] = base_token
        found = load_base_of(name, path, config, base, dtype, variant, options)
        head = None
        if config.ablation not in ("base", "base-pooled"):
            head = InterventionHead.from_pretrained(
                path, config=config, dtype=dtype, variant=variant
            )
            check_finite(head, f"the head of {name}")
        load_lora_of(name, path, config, found)
        made: Any = cls
        model = made(config, found, head).eval()
        model._loaded_from = path  # its card may have been edited
        return model


__all__ = ["SavingMixin"]
