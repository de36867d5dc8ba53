"""Run a pipeline of diffusers and see what passes between its parts, without changing them."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import nn

from .schedulers import is_flow, prediction_type


STEPS = 3  # of each run
_DISTILLED = ("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler")
_OFF = {
    "true_cfg_scale": 1.0,
    "image_guidance_scale": 1.0,
    "pag_scale": 0.0,
    "guidance_rescale": 0.0,
    "strength": 1.0,
}
_OFF |= {"use_resolution_binning": False, "num_frames": 1}
_COUNTS = ("num_images_per_prompt", "num_videos_per_prompt", "batch_size")


class NotRecordable(ValueError):
    """A pipeline that cannot be recorded, in one sentence."""


class Enough(Exception):
    """What a run was for has been seen."""


class Run:
    """What was seen of one call of a pipeline.

    Attributes:
        arguments: by name those of the denoiser, of each of its calls.
        outputs: what it returned.
        steps: of each step of the scheduler: model output, time, sample.
        steps_of: how many steps had been made before each call of the denoiser.
        called: name of the denoiser in each of its calls.
        decoded: what the autoencoder was given.
        schedule: keyword arguments of `set_timesteps`.
    """

    def __init__(self) -> None:
        self.arguments: list[dict[str, Any]] = []
        self.outputs: list[Any] = []
        self.steps: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.steps_of: list[int] = []
        self.called: list[str] = []
        self.decoded: torch.Tensor | None = None
        self.schedule: dict[str, Any] = {}


def denoisers_of(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """By name the denoiser of a pipeline, or the two that share its noise levels: the first one has
    those from `boundary_ratio` on, the second one those below, as in Wan 2.2.

    Raises:
        NotRecordable: it has none, or several that share them in another way.
    """
    names = [name for name in pipe.components if name.startswith(("unet", "transformer"))]
    found = {
        name: pipe.components[name]
        for name in names
        if isinstance(pipe.components[name], nn.Module)
    }
    shared = len(found) == 2 and boundary_of(pipe) is not None
    if len(found) != 1 and not shared:
        what = (
            f"{len(found)} denoisers ({', '.join(found)})"
            if found
            else "no denoiser (unet or transformer)"
        )
        raise NotRecordable(
            f"a {type(pipe).__name__} has {what}: a head is trained on a pipeline with one, or with"
            " two that share the noise levels by its boundary_ratio."
        )
    # Without compiled code around them; the first one first.
    return {name: getattr(found[name], "_orig_mod", found[name]) for name in sorted(found)}


def boundary_of(pipe: DiffusionPipeline) -> float | None:
    """The time from which on the first of two denoisers is called, as the scheduler counts it."""
    ratio = pipe.config.get("boundary_ratio")
    return None if ratio is None else ratio * pipe.scheduler.config.num_train_timesteps


class Recorder:
    """Runs of one pipeline.

    Args:
        pipe: the pipeline.
        prompt: its prompt.
        size: side of its images in pixels; `None`: the pipeline's own.
        call: further arguments of its call, such as `image` or `prompt_embeds`.

    Raises:
        TypeError, ValueError: one sentence: no pipeline, no denoiser or autoencoder or several, a
            scheduler of another kind.
    """

    def __init__(
        self, pipe: DiffusionPipeline, prompt: str, size: int | None, call: Mapping[str, Any]
    ):
        if not isinstance(pipe, DiffusionPipeline):
            raise TypeError(f"a pipeline of diffusers was expected, not a {type(pipe).__name__}.")
        prediction_type(pipe.scheduler)  # schedulers of other kinds are refused here
        if type(pipe.scheduler).__name__ in _DISTILLED:
            raise NotRecordable(
                f"a {type(pipe).__name__} with a {type(pipe.scheduler).__name__} is a distilled"
                " model, whose loss is another: train the head on the model that it was distilled"
                " from, and attach it to this one."
            )
        self.pipe, self.prompt, self.size, self.extra = pipe, prompt, size, dict(call)
        self.denoisers = denoisers_of(pipe)
        self.denoiser = next(iter(self.denoisers.values()))
        self.boundary = boundary_of(pipe) if len(self.denoisers) == 2 else None
        if getattr(pipe, "vae", None) is None:
            raise NotRecordable(
                f"a {type(pipe).__name__} has no autoencoder (vae): it cannot be recorded."
            )
        self.guidance = 1.0

    def arguments(self, images: int) -> dict[str, Any]:
        """Those of a call of the pipeline for so many images."""
        known = inspect.signature(type(self.pipe).__call__).parameters
        found: dict[str, Any] = {key: value for key, value in _OFF.items() if key in known}
        found |= {key: self.guidance for key in ("guidance_scale",) if key in known}
        found |= {
            key: self.size for key in ("height", "width") if key in known and self.size is not None
        }
        if "num_inference_steps" in known:
            found["num_inference_steps"] = STEPS
        if "generator" in known:
            found["generator"] = torch.Generator().manual_seed(0)
        # Some pipelines repeat the embeddings of a prompt for its images and some do not: here each
        # image has its own.
        embedded = {
            key: _repeated(value, images) for key, value in self.extra.items() if "prompt" in key
        }
        counts = [name for name in _COUNTS if name in known]
        if not any("embeds" in key for key in embedded):
            if "prompt" in known:
                found["prompt"] = self.prompt if counts else [self.prompt] * images
            if counts:
                found[counts[0]] = images
        return found | self.extra | embedded

    def first_arguments(self, prompt: str) -> dict[str, Any]:
        """Those of the denoiser's first call for a prompt, which is not carried out."""

        def stop(number: int, call: Callable[[], Any]) -> Any:
            raise Enough

        own, self.prompt = self.prompt, prompt
        try:
            return self.run(1, stop, lambda k, x: x).arguments[0]
        finally:
            self.prompt = own

    def run(
        self,
        images: int,
        denoise: Callable[[int, Callable[[], Any]], Any],
        step: Callable[[int, torch.Tensor], torch.Tensor],
    ) -> Run:
        """Call the pipeline until it decodes.

        Args:
            images: how many.
            denoise: what the denoiser's call returns, of the number of the step and a function that
                really calls it.
            step: what the scheduler's step returns, of its number and its sample.
        """
        run, pipe = Run(), self.pipe
        scheduler = _observed_scheduler(pipe.scheduler, run, step)

        def watched(name: str, denoiser: nn.Module) -> Callable[..., Any]:
            forward, signature = denoiser.forward, inspect.signature(type(denoiser).forward)
            return lambda *args, **kwargs: called(name, forward, signature, args, kwargs)

        def called(
            name: str, forward: Callable, signature: inspect.Signature, args: tuple, kwargs: dict
        ) -> Any:
            bound = signature.bind(None, *args, **kwargs).arguments
            named = {key: value for key, value in list(bound.items())[1:]}
            for parameter in signature.parameters.values():
                if parameter.kind is parameter.VAR_KEYWORD:
                    named |= named.pop(parameter.name, {})
            run.arguments.append(copied(named))
            run.steps_of.append(len(run.steps))
            run.called.append(name)
            found = denoise(len(run.steps), lambda: forward(*args, **kwargs))
            run.outputs.append(copied(found[0]))
            return found

        def decode(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            run.decoded = latents.detach().clone()
            raise Enough

        with ExitStack() as stack:
            # What was compiled runs as it was written: nothing is compiled for a few steps.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            for name, denoiser in self.denoisers.items():
                stack.enter_context(replaced(pipe, name, denoiser))
                stack.enter_context(replaced(denoiser, "_compiled_call_impl", None))
                stack.enter_context(replaced(denoiser, "forward", watched(name, denoiser)))
            stack.enter_context(_taken_for_float32(pipe.vae))
            stack.enter_context(replaced(pipe.vae, "decode", decode))
            if hasattr(pipe.vae, "encode"):
                stack.enter_context(
                    replaced(pipe.vae, "encode", without_draws(pipe.vae, pipe.vae.encode))
                )
            stack.enter_context(replaced(pipe, "scheduler", scheduler))
            stack.enter_context(quiet(pipe))
            for guider in pipe.components.values():  # HunyuanImage has objects for its guidance
                if hasattr(guider, "_enabled"):
                    stack.enter_context(replaced(guider, "_enabled", False))
            try:
                with torch.no_grad():
                    pipe(**self.arguments(images))
            except Enough:
                pass
            except (
                Exception
            ) as error:  # whatever a pipeline says to arguments that it was not made for
                raise NotRecordable(
                    f"a {type(pipe).__name__} cannot be run for recording ({_one_line(error)}):"
                    " give what its call needs with call=."
                ) from error
            finally:
                if hasattr(pipe, "maybe_free_model_hooks"):
                    pipe.maybe_free_model_hooks()
        return run


def _repeated(value: Any, images: int) -> Any:
    """The embedding of one prompt for each of several images."""
    if isinstance(value, torch.Tensor) and value.ndim and len(value) == 1:
        return value.repeat(images, *[1] * (value.ndim - 1))
    return value * images if isinstance(value, list) and len(value) == 1 else value


def _observed_scheduler(
    scheduler: SchedulerMixin, run: Run, step: Callable[[int, torch.Tensor], torch.Tensor]
) -> SchedulerMixin:
    """A scheduler like a pipeline's, whose step is seen and returns what it is told; DDIM where
    others scale their samples.
    """
    kind = type(scheduler) if is_flow(prediction_type(scheduler)) else DDIMScheduler
    found = kind.from_config(scheduler.config)

    def observed(
        model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        number = len(run.steps)
        time = torch.as_tensor(timestep).detach().clone()
        run.steps.append((model_output.detach().clone(), time, sample.detach().clone()))
        if getattr(found, "_step_index", None) is not None:
            found._step_index += 1
        return Output(step(number, sample))

    found.step = functools.wraps(found.step)(observed)
    return found


class Output(tuple):
    """What a scheduler's step or a denoiser returns, with or without `return_dict`."""

    def __new__(cls, value: Any) -> "Output":
        return super().__new__(cls, (value,))

    @property
    def sample(self) -> Any:
        return self[0]

    prev_sample = sample


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, an object has another attribute; the object itself is not otherwise touched."""
    had, former = name in vars(owner), vars(owner).get(name)
    object.__setattr__(owner, name, value)
    try:
        yield
    finally:
        if had:
            object.__setattr__(owner, name, former)
        else:
            object.__delattr__(owner, name)


@contextmanager
def quiet(pipe: DiffusionPipeline) -> Iterator[None]:
    """Inside, a pipeline shows no bar of its steps."""
    with replaced(pipe, "_progress_bar_config", {"disable": True}):
        yield


@contextmanager
def _taken_for_float32(vae: nn.Module) -> Iterator[None]:
    """Inside, an autoencoder says that it is in float32, so that latents are scaled for it without
    rounding.
    """
    kind = type(vae)
    vae.__class__ = type(kind.__name__, (kind,), {"dtype": torch.float32})
    try:
        yield
    finally:
        vae.__class__ = kind


def without_draws(vae: nn.Module, encode: Callable[..., Any]) -> Callable[..., Any]:
    """An autoencoder's `encode` whose draws are the mean: what is made of an image is the same in
    each run.
    """
    dtype = next((p.dtype for p in vae.parameters() if p.is_floating_point()), torch.float32)

    @functools.wraps(encode)
    def encoded(images: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = encode(images.to(dtype), *args, **kwargs)
        distribution = getattr(found, "latent_dist", None)
        if distribution is not None:
            distribution.sample = lambda generator=None: distribution.mode()
        return found

    return encoded


def copied(value: Any) -> Any:
    """Arguments as they are now: some pipelines change tensors in place."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        found = [copied(inner) for inner in value]
        return found if isinstance(value, list) else tuple(found)
    return value


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__).rstrip(".")[:300]


__all__ = ["NotRecordable", "Recorder", "Run"]
