"""Stable Diffusion XL, Flux.1 and Qwen-Image by their published configurations. The weights are
random: none are downloaded.

Of the denoisers that are too large for the memory of a small machine some blocks are left out
(`BLOCKS`)."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from hf_intervene.training.benchmarks.bases import STABLE_DIFFUSION
from hf_intervene.training.benchmarks.tools import Conditions


# The published configurations. What is not named has this value by default.
SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SDXL_VAE: dict[str, Any] = STABLE_DIFFUSION | {"sample_size": 1024, "scaling_factor": 0.13025}
SDXL_SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_BIG_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
FLUX: dict[str, Any] = {"num_layers": 19, "num_single_layers": 38, "guidance_embeds": True}
FLUX_VAE: dict[str, Any] = SDXL_VAE | {
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
FLUX_SCHEDULER: dict[str, Any] = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
QWEN: dict[str, Any] = {"num_layers": 60}
QWEN_SCHEDULER: dict[str, Any] = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}
# Blocks that are kept where the whole denoiser does not fit.
BLOCKS: dict[str, dict[str, int]] = {
    "Flux.1": {"num_layers": 1, "num_single_layers": 2},
    "Qwen-Image": {"num_layers": 1},
}


def filled(make: Callable[[], Any], dtype: torch.dtype) -> Any:
    """A model without the time that its own initialisation takes: its matrices repeat one block of
    random numbers, at the scale of a map that keeps the size of its input. Norms are ones, biases
    zeros."""
    with init_empty_weights():
        model = make()
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(1_000_003, generator=generator).to(dtype)  # a prime: no two rows are alike
    for module in model.modules():
        for name, empty in module.named_parameters(recurse=False):
            if empty.ndim < 2:
                values = torch.full(empty.shape, float(name == "weight"), dtype=dtype)
            else:
                values = torch.empty(empty.numel(), dtype=dtype)
                for part in values.split(len(block)):
                    part.copy_(block[: len(part)])
                values = values.mul_(empty[0].numel() ** -0.5).view(empty.shape)
            module._parameters[name] = nn.Parameter(values, requires_grad=False)
    return model.to(Conditions.device).eval()


def _tokenizer(length: int) -> CLIPTokenizer:
    """One of a few words: what an encoder costs does not depend on them."""
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "!"]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        quoted = (f'"{word}": {number}' for number, word in enumerate(words))
        vocabulary.write_text("{" + ", ".join(quoted) + "}")
        merges.write_text("#version: 0.2\n")
        return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=length)


def sdxl(
    dtype: torch.dtype,
    unet: dict | None = None,
    vae: dict | None = None,
    clip_l: dict | None = None,
    clip_big_g: dict | None = None,
) -> tuple[DiffusionPipeline, dict[str, Any]]:
    """The whole pipeline, and what its call is given. Arguments replace entries of the published
    configurations."""
    tokens = {"bos_token_id": 0, "eos_token_id": 1}
    configs = [
        CLIPTextConfig(**base | tokens | (own or {}))
        for base, own in ((CLIP_L, clip_l), (CLIP_BIG_G, clip_big_g))
    ]
    tokenizer = _tokenizer(configs[0].max_position_embeddings)
    config, vae_config = SDXL_UNET | (unet or {}), SDXL_VAE | (vae or {})
    pipe = diffusers.StableDiffusionXLPipeline(
        unet=filled(lambda: diffusers.UNet2DConditionModel(**config), dtype),
        vae=filled(lambda: diffusers.AutoencoderKL(**vae_config), dtype),
        text_encoder=filled(lambda: CLIPTextModel(configs[0]), dtype),
        text_encoder_2=filled(lambda: CLIPTextModelWithProjection(configs[1]), dtype),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=diffusers.EulerDiscreteScheduler(**SDXL_SCHEDULER),
    )
    return pipe, {"prompt": "a"}


def flux(
    dtype: torch.dtype, transformer: dict | None = None, vae: dict | None = None, size: int = 1024
) -> tuple[DiffusionPipeline, dict[str, Any]]:
    """Without its text encoders, whose 4.9 billion weights do not fit: the prompt is given as
    embeddings."""
    config = FLUX | BLOCKS["Flux.1"] | (transformer or {})
    vae_config = FLUX_VAE | (vae or {})
    model = filled(lambda: diffusers.FluxTransformer2DModel(**config), dtype)
    text = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = diffusers.FluxPipeline(
        transformer=model,
        vae=filled(lambda: diffusers.AutoencoderKL(**vae_config), dtype),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**FLUX_SCHEDULER),
        **text,
    )
    widths = model.config.joint_attention_dim, model.config.pooled_projection_dim
    embeds = torch.randn(1, 512, widths[0]), torch.randn(1, widths[1])
    found = {
        name: value.to(Conditions.device, dtype)
        for name, value in zip(("prompt_embeds", "pooled_prompt_embeds"), embeds)
    }
    return pipe, found | {"height": size, "width": size}


def qwen(
    dtype: torch.dtype, transformer: dict | None = None, vae: dict | None = None, size: int = 1024
) -> tuple[DiffusionPipeline, dict[str, Any]]:
    """Without its text encoder, likewise."""
    config = QWEN | BLOCKS["Qwen-Image"] | (transformer or {})
    model = filled(lambda: diffusers.QwenImageTransformer2DModel(**config), dtype)
    pipe = diffusers.QwenImagePipeline(
        transformer=model,
        vae=filled(lambda: diffusers.AutoencoderKLQwenImage(**(vae or {})), dtype),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**QWEN_SCHEDULER),
        text_encoder=None,
        tokenizer=None,
    )
    embeds = torch.randn(1, 10, model.config.joint_attention_dim).to(Conditions.device, dtype)
    mask = torch.ones(1, 10, dtype=torch.int64, device=Conditions.device)
    return pipe, {
        "prompt_embeds": embeds,
        "prompt_embeds_mask": mask,
        "height": size,
        "width": size,
    }


@dataclass(frozen=True)
class Pipeline:
    """
    Args:
        make: of a precision, the pipeline and the arguments of its call.
        denoiser: makes the whole denoiser.
        steps: whether its steps are measured, or its recording alone.
    """

    make: Callable[..., tuple[DiffusionPipeline, dict[str, Any]]]
    denoiser: Callable[[], nn.Module]
    steps: bool = True


PIPELINES = {
    "Stable Diffusion XL": Pipeline(sdxl, lambda: diffusers.UNet2DConditionModel(**SDXL_UNET)),
    "Flux.1": Pipeline(flux, lambda: diffusers.FluxTransformer2DModel(**FLUX)),
    "Qwen-Image": Pipeline(qwen, lambda: diffusers.QwenImageTransformer2DModel(**QWEN), False),
}
