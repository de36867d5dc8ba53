"""Pipelines at the sizes that people use: what a head adds to a step of denoising, and what it
takes to record the pipeline. `published.py` makes the pipelines; each has a process of its own."""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from hf_intervene import InterventionModel, attach, intervene
from hf_intervene.bases import PipelineBase
from hf_intervene.trainer.sections import fast_bf16
from hf_intervene.training.benchmarks.published import PIPELINES
from hf_intervene.training.benchmarks.tools import (
    Conditions,
    HostWaits,
    figure,
    held_gib,
    peak_gib,
    summary,
)


CONCEPTS = ("smile", "glasses")


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
