"""A base from a folder or the Hub: a model of a registered class, or a pipeline, whose denoiser is
called as the pipeline does.
"""

import os
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from transformers import (
    ImageProcessingMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto import AutoTokenizer
from transformers.models.clip import CLIPTextModel

from .. import hub
from .autoencoder import AutoencoderBase
from .base import Base
from .diffusion import DiffusionBase
from .limits import read_part
from .loading import (
    load_model_config,
    load_part,
    load_scheduler,
    load_transformers,
    load_vision,
    model_files,
    one_line,
)
from .pipelines import PipelineBase
from .registry import base_family, model_class_named, registered_family


def load_base(
    name_or_path: str | os.PathLike,
    sample_size: int | None,
    subfolder: str | None = None,
    residual_layers: int = 0,
    image_encoder: str | os.PathLike | None = None,
    prompt: str = "",
    prompts: Sequence[str] | None = None,
    prompt_folder: str | os.PathLike | None = None,
    num_frames: int | None = None,
    **options: Any,
) -> Base:
    """Load a pretrained model of any registered class, from a folder or the Hub, and wrap it for
    images of `sample_size` pixels.

    Args:
        name_or_path: folder or repository of a model, or of a diffusers pipeline, whose denoiser,
            scheduler and autoencoder are taken. A pipeline whose denoiser has no family of its own
            is recorded (see `PipelineBase`), which needs its text encoders.
        sample_size: side of the images in pixels; `None`: the model's own.
        subfolder: the model's sub-folder there.
        residual_layers: of an autoencoder: couplings of the prior of residual latents; 0: none.
        image_encoder: of a denoiser: folder or repository of the vision model that z is read from;
            `None`: a new convolutional network.
        prompt: the prompt that the head is trained with. A pipeline is recorded for it, whatever
            its denoiser.
        prompts, prompt_folder: prompts of images, likewise, and where what is made of them is kept;
            see `PipelineBase`. Where there is no text encoder they are not used.
        num_frames: of clips, for a pipeline that makes them; `None`: a base of images.
        **options: further ones of `DiffusionBase`, for a denoiser.

    Raises:
        OSError, ValueError: one sentence: nothing there, truncated weights, a class that is not
            registered, another image size, a class without residual latents, a pipeline that cannot
            be recorded.
    """
    known = {
        *signature(DiffusionBase).parameters,
        *signature(PipelineBase.from_pipeline).parameters,
    }
    if unknown := sorted(options.keys() - known):
        raise TypeError(f"load_base() takes no {unknown[0]}: leave it out.")
    what = f"{str(name_or_path)!r}{f' with a sub-folder {subfolder!r}' if subfolder else ''}"
    files = model_files(subfolder)
    if subfolder is None:  # perhaps a pipeline
        files += [
            "model_index.json",
            "scheduler/*.json",
            "text_encoder/*.json",
            "text_encoder/model*.safetensors",
            "tokenizer/*",
        ]
        files += [file for part in ("unet", "transformer", "vae") for file in model_files(part)]
    try:
        path = hub.folder(name_or_path, files) / (subfolder or "")
    except OSError as error:
        raise OSError(f"there is no pretrained base {what}: {error}") from error
    is_pipeline = (path / "model_index.json").exists()
    if is_pipeline:
        denoiser = next(
            (part for part in ("unet", "transformer") if (path / part / "config.json").exists()),
            None,
        )
        if denoiser is None:
            raise ValueError(
                f"the pipeline {what} has no denoiser (unet or transformer): give one of its models"
                " with a sub-folder."
            )
        index = read_part(path / "model_index.json")
        has_text = index.get("text_encoder") not in (None, [None, None])
        if prompt and not has_text:
            raise ValueError(f"the pipeline {what} has no text encoder: leave prompt out.")
        told: dict[str, Any] = (
            {"prompts": prompts, "prompt_folder": prompt_folder} if prompts and has_text else {}
        )
        if num_frames is not None:
            told["num_frames"] = num_frames
        if prompt or told or not _has_family(load_model_config(path / denoiser) or {}):
            if residual_layers:
                raise ValueError(
                    f"the pipeline {what} has no residual latents: leave residual_layers at 0."
                )
            if options.pop("class_label", None) is not None:
                raise ValueError(
                    f"the denoiser of {what} is given no class of its own: leave class_label out."
                )
            options |= {} if image_encoder is None else load_vision(image_encoder)
            pipe = load_pipeline(name_or_path, what)
            return PipelineBase.from_pipeline(pipe, prompt, sample_size, **told, **options)
        options = _pipeline_parts(path, what) | options
        path = path / denoiser
    elif prompt:
        raise ValueError(f"the base {what} is no pipeline with a text: leave prompt out.")
    elif num_frames is not None:
        raise ValueError(f"the base {what} is no pipeline that makes clips: leave frames out.")
    config = load_model_config(path)
    if config is None:
        raise FileNotFoundError(
            f"there is no pretrained base {what}: give a folder saved by diffusers, or a Hub name."
        )
    model = load_part(model_class_named(config["_class_name"]), path, f"the base {what}")
    family = base_family(model)
    base: Base
    if issubclass(family, AutoencoderBase):
        base = family(model, sample_size=sample_size, residual_layers=residual_layers)
    elif residual_layers:
        raise ValueError(
            f"a {type(model).__name__} has no residual latents: leave residual_layers at 0."
        )
    elif issubclass(family, DiffusionBase):
        if not is_pipeline:
            raise ValueError(
                f"the base {what} is a denoiser without its scheduler: give the folder of its"
                " pipeline instead."
            )
        if image_encoder is not None:
            options |= load_vision(image_encoder)
        base = family(model, sample_size=sample_size, **options)
    else:
        base = family(model)
    if image_encoder is not None and not isinstance(base, DiffusionBase):
        raise ValueError(
            f"a {type(model).__name__} has an encoder of its own: leave image_encoder out."
        )
    if sample_size is not None and base.image_shape[-1] != sample_size:
        raise ValueError(
            f"the base {name_or_path} is for images of {base.image_shape[-1]} pixels, not"
            f" {sample_size}: give it images of its size."
        )
    return base


def _has_family(config: dict) -> bool:
    """Whether the denoiser of a configuration can be called without a recording of its pipeline."""
    family = registered_family(config.get("_class_name"))
    if family is None or not issubclass(family, DiffusionBase):
        return False
    # Others than Stable Diffusion 1 and 2 get more than a text and a noisy image.
    more = (
        "addition_embed_type",
        "class_embed_type",
        "num_class_embeds",
        "encoder_hid_dim",
        "time_cond_proj_dim",
    )
    is_unet = config["_class_name"] == "UNet2DConditionModel"
    return not (
        is_unet
        and (
            any(config.get(name) for name in more)
            or config.get("in_channels") != config.get("out_channels")
        )
    )


def load_pipeline(name_or_path: str | os.PathLike, what: str) -> DiffusionPipeline:
    """A whole pipeline of diffusers, from a folder or the Hub, each of its parts loaded as strictly
    as the parts of a base.

    Raises:
        OSError, ValueError: one sentence: a part is missing, corrupt, or of a class that is not of
            diffusers or transformers.
    """
    file = hub.folder(name_or_path, ["model_index.json"]) / "model_index.json"
    if not file.exists():
        raise OSError(f"{what} is no pipeline of diffusers: it has no model_index.json.")
    index = read_part(file)
    names = [
        name for name, entry in index.items() if isinstance(entry, list) and entry != [None, None]
    ]
    names = [name for name in names if name != "safety_checker"]
    kinds = (
        "*.json",
        "*.txt",
        "*.model",
        "*.jinja",
        "model*.safetensors",
        "diffusion_pytorch_model*.safetensors",
    )
    path = hub.folder(
        name_or_path, ["model_index.json", *(f"{name}/{kind}" for name in names for kind in kinds)]
    )
    found = getattr(diffusers, str(index.get("_class_name")), None)
    if not (isinstance(found, type) and issubclass(found, DiffusionPipeline)):
        raise ValueError(
            f"{what} is a {index.get('_class_name')!r}, which is no pipeline of this version of"
            " diffusers."
        )
    pipeline_class: Any = found
    expected = pipeline_class._get_signature_keys(pipeline_class)
    parts: dict[str, Any] = dict.fromkeys(expected[0])
    parts |= {
        name: index[name]
        for name in expected[1]
        if name in index and not isinstance(index[name], list)
    }
    parts |= {
        name: _load_component(index[name], path / name, f"the {name} of {what}")
        for name in names
        if name in parts
    }
    if "requires_safety_checker" in expected[1]:
        parts["requires_safety_checker"] = False
    try:
        return pipeline_class(**parts)
    except Exception as error:  # whatever a constructor says to parts that do not fit together
        raise ValueError(
            f"the parts of the pipeline {what} do not fit together: {one_line(error)}"
        ) from error


def _load_component(entry: list, folder: Path, what: str) -> Any:
    """A part of a pipeline, by the library and the class that model_index.json names."""
    library, name = entry if len(entry) == 2 else (None, None)
    if library == "transformers":
        found: Any = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return load_transformers(found, folder, what, dtype=torch.float32).eval()
        if isinstance(found, type) and issubclass(
            found, (PreTrainedTokenizerBase, ProcessorMixin, ImageProcessingMixin)
        ):
            return load_transformers(found, folder, what, weights=False)
    if library == "diffusers":
        found = getattr(diffusers, str(name), None)
        if isinstance(found, type) and issubclass(found, SchedulerMixin):
            return load_scheduler(folder, what)
        if isinstance(found, type) and issubclass(found, ModelMixin):
            return load_part(model_class_named(name), folder, what).eval()
        guider: Any = found
        if isinstance(found, type) and found.__module__.startswith("diffusers.guiders."):
            return load_transformers(guider, folder, what, weights=False)
    raise ValueError(
        f"{what} cannot be {entry!r}, as model_index.json says: only parts of diffusers and"
        " transformers are loaded."
    )


def _pipeline_parts(path: Path, what: str) -> dict[str, Any]:
    """Scheduler, autoencoder and embedding of the empty prompt of a pipeline's folder, as far as it
    has them.
    """
    parts: dict[str, Any] = {
        "scheduler": load_scheduler(path / "scheduler", f"the pipeline {what}")
    }
    if (path / "vae" / "config.json").exists():
        saved = load_model_config(path / "vae") or {}
        parts["vae"] = load_part(
            model_class_named(saved.get("_class_name", "")), path / "vae", f"the vae of {what}"
        )
    if (path / "text_encoder" / "config.json").exists() and not (path / "text_encoder_2").exists():
        config = read_part(path / "text_encoder" / "config.json")
        if config.get("model_type") == "clip_text_model":  # Stable Diffusion 1 and 2
            encoder = load_transformers(
                CLIPTextModel, path / "text_encoder", f"the text encoder of {what}"
            ).eval()
            tokenizer = load_transformers(
                AutoTokenizer, path / "tokenizer", f"the tokenizer of {what}", weights=False
            )
            length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
            tokens = tokenizer(
                "", padding="max_length", max_length=length, return_tensors="pt"
            ).input_ids
            with torch.no_grad():
                parts["text"] = encoder(tokens).last_hidden_state
    return parts


__all__ = ["load_base", "load_pipeline"]
