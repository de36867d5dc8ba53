"""Pipelines at the sizes that people use: what a head adds to a step of denoising, and what it
takes to record the pipeline.

The configurations are the published ones, the weights random: none are downloaded. Of the denoisers
that are too large for the memory of a small machine some blocks are left out (`BLOCKS`). Each
pipeline has a process of its own."""

import multiprocessing
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
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

from hf_intervene import InterventionModel, attach, intervene
from hf_intervene.bases import PipelineBase
from hf_intervene.trainer.sections import fast_bf16
from hf_intervene.training.benchmarks.bases import STABLE_DIFFUSION
from hf_intervene.training.benchmarks.tools import (
    Conditions,
    HostWaits,
    figure,
    held_gib,
    peak_gib,
    summary,
)


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
CONCEPTS = ("smile", "glasses")

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


@dataclass
class Step:
    """One call of a denoiser.

    Args:
        seconds: of the whole call, with all hooks.
        hook_seconds: of them in the hooks of this package.
        hooks: how many of those were called.
        waits: how often they made the host wait for a device; only where that is counted.
        is_real: whether the denoiser computed anything: a recording puts others in its place.
    """

    seconds: float = 0.0
    hook_seconds: float = 0.0
    hooks: int = 0
    waits: int = 0
    is_real: bool = False


class Watched:
    """The calls of a denoiser, and what the hooks of this package take of them.

    Attributes:
        steps: one for each call that has ended.
        counting: whether waits are counted, which takes time itself.
    """

    def __init__(self, denoiser: nn.Module):
        self.denoiser, self.steps, self.counting = denoiser, list[Step](), False
        self._open: list[tuple[Step, float]] = []  # a call may be made within a call
        denoiser.register_forward_pre_hook(self._begin, prepend=True)
        denoiser.register_forward_hook(self._end)
        for part in denoiser.children():
            part.register_forward_pre_hook(self._note)

    def watch_hooks(self) -> None:
        """Watch the hooks that are there now; this package's own are told by their module."""
        for module in self.denoiser.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key, hook in hooks.items():
                    if _is_of_the_package(hook):
                        hooks[key] = self._watched(hook)
        ends = self.denoiser._forward_hooks
        mine = next(key for key, hook in ends.items() if hook == self._end)
        ends.move_to_end(mine)  # behind those that came later

    def _begin(self, *_: Any) -> None:
        self._open.append((Step(), Conditions.now()))

    def _end(self, *_: Any) -> None:
        step, start = self._open.pop()
        step.seconds = Conditions.now() - start
        self.steps.append(step)

    def _note(self, *_: Any) -> None:
        if self._open:
            self._open[-1][0].is_real = True

    def _watched(self, hook: Callable) -> Callable:
        def watched(*args: Any, **kwargs: Any) -> Any:
            step, start = self._open[-1][0], Conditions.now()
            with HostWaits() if self.counting else nullcontext() as waits:
                found = hook(*args, **kwargs)
            step.hook_seconds += Conditions.now() - start
            step.hooks += 1
            step.waits += waits.count if waits is not None else 0
            return found

        return watched


def _is_of_the_package(hook: Any) -> bool:
    function = getattr(hook, "func", hook)  # of a `partial`
    module = getattr(function, "__module__", None) or ""
    return module.startswith("hf_intervene.") and ".benchmarks." not in module


def measured(
    kind: str,
    rounds: int,
    threads: int,
    device: torch.device,
    cpu_time: bool,
    options: dict | None = None,
) -> dict:
    """The figures of one pipeline; `options` are of its `make`. No rounds: only its recording."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    Conditions.device, Conditions.cpu_time = device, cpu_time
    dtype = torch.bfloat16 if fast_bf16() else torch.float32
    pipe, call = PIPELINES[kind].make(dtype, **(options or {}))
    pipe.set_progress_bar_config(disable=True)
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    found: dict[str, Any] = {
        "dtype": str(dtype),
        "denoiser_parameters": parameters(denoiser),
        "pipeline_gib": sum(parameters(part) * dtype.itemsize for part in parts) / 2**30,
    }
    watched = Watched(denoiser)
    base, found["recording"] = _recording(pipe, call, watched)
    if not rounds:
        return found
    model = InterventionModel.build(base, CONCEPTS).eval()
    base.release()
    for parameter in base.adapter.projections.parameters():
        nn.init.normal_(parameter, std=0.02)  # some are zero in a new head
    attach(pipe, model.head, base.adapter)
    watched.watch_hooks()
    return found | {"step": _steps(pipe, call, watched, rounds)}


def _recording(
    pipe: DiffusionPipeline, call: dict[str, Any], watched: Watched
) -> tuple[PipelineBase, dict[str, Any]]:
    """Time and memory of a recording, beyond what the pipeline holds."""
    call = dict(call)
    prompt = call.pop("prompt", "")
    held, start = held_gib(), Conditions.now()
    base = PipelineBase.from_pipeline(pipe, prompt, call=call)
    seconds, peak = Conditions.now() - start, peak_gib() - held
    real = [step.seconds for step in watched.steps if step.is_real]
    kept = sum(value.numel() * value.element_size() for value in base.adapter.recorded.buffers())
    watched.steps.clear()
    return base, {
        "all": figure("seconds", [seconds]),
        "calls of the denoiser": figure("seconds", [sum(real)]) | {"number": len(real)},
        "beyond_the_pipeline_peak_gib": peak,
        "held_afterwards_gib": held_gib() - held,
        "kept_mib": kept / 2**20,
        "adapter_parameters": parameters(base.adapter),
        "image_size": base.image_shape[-1],
    }


def _steps(pipe: DiffusionPipeline, call: dict, watched: Watched, rounds: int) -> dict[str, Any]:
    """Steps of denoising with a head over one without, in turn, and what the hooks take of them.
    In the first step of a call the head and its adapter are run, for all of its steps."""
    options = {"guidance_scale": 1.0, "output_type": "latent"}

    def steps(number: int, with_head: bool) -> list[Step]:
        watched.steps.clear()
        with intervene(pipe, CONCEPTS) if with_head else nullcontext():
            pipe(**call, **options, num_inference_steps=number)
        return watched.steps[-number:]

    watched.counting = True
    counted = steps(2, True)[-1]  # in the first one the head is verified, once
    watched.counting = False
    held = held_gib()
    steps(1, False)
    peak = peak_gib() - held
    # Each time the last of two steps; which of the two comes first takes turns too.
    found: list[tuple[Step, Step, Step]] = []
    for number in range(rounds):
        if number % 2:
            (_, other), (first, last) = steps(2, False), steps(2, True)
        else:
            (first, last), (_, other) = steps(2, True), steps(2, False)
        found.append((first, last, other))
    alone = [step.seconds for _, _, step in found]
    return {
        "alone": figure("seconds", alone),
        "alone_beyond_peak_gib": peak,
        "with a head over without": summary([step.seconds for _, step, _ in found], alone),
        "hooks over the step": summary([step.hook_seconds for _, step, _ in found], alone),
        "head and hooks over the first step": summary(
            [step.hook_seconds for step, _, _ in found], alone
        ),
        "hooks": counted.hooks,
        "host_waits_in_hooks": counted.waits,
    }


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def full_size_pipelines(
    rounds: int, kinds: Sequence[str] = tuple(PIPELINES), options: dict | None = None
) -> dict:
    """Of each pipeline its recording, and of those whose steps are measured a step; beside it the
    weights of the whole denoiser."""
    rounds, spawn, results = min(rounds, 5), multiprocessing.get_context("spawn"), {}
    threads = torch.get_num_threads()
    for kind in kinds:
        arguments = (kind, rounds if PIPELINES[kind].steps else 0, threads)
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            found = pool.submit(
                measured, *arguments, Conditions.device, Conditions.cpu_time, options
            ).result()
        results[kind] = found | {"whole_denoiser": weights_of(PIPELINES[kind].denoiser)}
    return results


def weights_of(make: Callable[[], nn.Module]) -> dict[str, int]:
    """How many weights a denoiser has: all of them, those of its largest block, and those outside
    of blocks, as `enable_group_offload` with `block_level` tells them apart. Nothing is
    allocated."""
    with torch.device("meta"):
        model = make()
    kinds = (nn.ModuleList, nn.Sequential)
    blocks = [
        parameters(block)
        for part in model.children()
        if isinstance(part, kinds)
        for block in part.children()
    ]
    return {
        "parameters": parameters(model),
        "largest_block_parameters": max(blocks),
        "parameters_outside_of_blocks": parameters(model) - sum(blocks),
    }
