"""Find out how a pipeline of diffusers calls its denoiser, by running it: record, fit, probe, check.

    pipe(prompt) --observed--> arguments of the denoiser, what `scheduler.step` and `vae.decode` get --fit--> `Recording`

The pipeline runs three times, for a few steps each, with its guidance off.

1. One image. The denoiser works in the first step only; after that it returns noise.
2. Two images, without the denoiser. What doubles belongs to each image; what does not is shared.
3. A row for each probe, without the denoiser. The scheduler returns 0, 1 and the base-16 digits of each entry's number in
   place of a sample, and the denoiser likewise. So each entry of the denoiser's arguments, of the prediction and of what the
   autoencoder is given tells which entry it was made of, by which scale and shift (see `replay.Placement`).

The model's time is a t or 1 + a t of the scheduler's. At the end the recording must build what was observed, or one sentence
names what it does not. No weight is changed, and the pipeline is left as it was.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import nn

from .denoising import prediction_type
from .replay import Placement, Recording, probe_rows, probes_of


STEPS = 3  # of each run
TOLERANCE = 1e-3  # of the replay, relative to the largest entry; in half precision a few of its roundings
_OFF = {"true_cfg_scale": 1.0, "image_guidance_scale": 1.0, "pag_scale": 0.0, "guidance_rescale": 0.0, "strength": 1.0}
_OFF |= {"use_resolution_binning": False, "num_frames": 1}
_COUNTS = ("num_images_per_prompt", "num_videos_per_prompt", "batch_size")


class NotRecordable(ValueError):
    """A pipeline that cannot be recorded, in one sentence."""


class _Enough(Exception):
    """What a run was for has been seen."""


class Run:
    """What was seen of one call of a pipeline.

    Attributes:
        arguments: by name those of the denoiser, of each of its calls.
        outputs: what it returned.
        steps: of each step of the scheduler: model output, time, sample.
        steps_of: how many steps had been made before each call of the denoiser.
        decoded: what the autoencoder was given.
        schedule: keyword arguments of `set_timesteps`.
    """

    def __init__(self) -> None:
        self.arguments: list[dict[str, Any]] = []
        self.outputs: list[Any] = []
        self.steps: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.steps_of: list[int] = []
        self.decoded: torch.Tensor | None = None
        self.schedule: dict[str, Any] = {}


def denoiser_of(pipe: DiffusionPipeline) -> tuple[str, nn.Module]:
    """Name and module of the one denoiser of a pipeline.

    Raises:
        NotRecordable: it has none, or several.
    """
    names = [name for name in pipe.components if name.startswith(("unet", "transformer"))]
    found = {name: pipe.components[name] for name in names if isinstance(pipe.components[name], nn.Module)}
    if len(found) != 1:
        what = f"{len(found)} denoisers ({', '.join(found)})" if found else "no denoiser (unet or transformer)"
        raise NotRecordable(f"a {type(pipe).__name__} has {what}: a head is trained on a pipeline with one.")
    return next(iter(found.items()))


class Recorder:
    """Runs of one pipeline.

    Args:
        pipe: the pipeline.
        prompt: its prompt.
        size: side of its images in pixels; `None`: the pipeline's own.
        call: further arguments of its call, such as `image` or `prompt_embeds`.

    Raises:
        TypeError, ValueError: one sentence: no pipeline, no denoiser or autoencoder or several, a scheduler of another kind.
    """

    def __init__(self, pipe: DiffusionPipeline, prompt: str, size: int | None, call: Mapping[str, Any]):
        if not isinstance(pipe, DiffusionPipeline):
            raise TypeError(f"a pipeline of diffusers was expected, not a {type(pipe).__name__}.")
        prediction_type(pipe.scheduler)  # schedulers of other kinds are refused here
        self.pipe, self.prompt, self.size, self.extra = pipe, prompt, size, dict(call)
        self.name, denoiser = denoiser_of(pipe)
        self.denoiser = getattr(denoiser, "_orig_mod", denoiser)  # without compiled code around it
        if getattr(pipe, "vae", None) is None:
            raise NotRecordable(f"a {type(pipe).__name__} has no autoencoder (vae): it cannot be recorded.")
        self.guidance = 1.0

    def arguments(self, images: int) -> dict[str, Any]:
        """Those of a call of the pipeline for so many images."""
        known = inspect.signature(type(self.pipe).__call__).parameters
        found: dict[str, Any] = {key: value for key, value in _OFF.items() if key in known}
        found |= {key: self.guidance for key in ("guidance_scale",) if key in known}
        found |= {key: self.size for key in ("height", "width") if key in known and self.size is not None}
        if "num_inference_steps" in known:
            found["num_inference_steps"] = STEPS
        if "generator" in known:
            found["generator"] = torch.Generator().manual_seed(0)
        # Some pipelines repeat the embeddings of a prompt for its images and some do not: here each image has its own.
        embedded = {key: _repeated(value, images) for key, value in self.extra.items() if "prompt" in key}
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
            raise _Enough

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
            denoise: what the denoiser's call returns, of the number of the step and a function that really calls it.
            step: what the scheduler's step returns, of its number and its sample.
        """
        run, pipe = Run(), self.pipe
        scheduler = _observed_scheduler(pipe.scheduler, run, step)
        forward, signature = self.denoiser.forward, inspect.signature(type(self.denoiser).forward)

        def denoiser_forward(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(self.denoiser, *args, **kwargs).arguments
            named = {key: value for key, value in list(bound.items())[1:]}
            for parameter in signature.parameters.values():
                if parameter.kind is parameter.VAR_KEYWORD:
                    named |= named.pop(parameter.name, {})
            run.arguments.append(_copied(named))
            run.steps_of.append(len(run.steps))
            found = denoise(len(run.steps), lambda: forward(*args, **kwargs))
            run.outputs.append(_copied(found[0]))
            return found

        def decode(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            run.decoded = latents.detach().clone()
            raise _Enough

        with ExitStack() as stack:
            stack.enter_context(replaced(pipe, self.name, self.denoiser))
            stack.enter_context(_taken_for_float32(pipe.vae))
            stack.enter_context(replaced(self.denoiser, "forward", denoiser_forward))
            stack.enter_context(replaced(pipe.vae, "decode", decode))
            if hasattr(pipe.vae, "encode"):
                stack.enter_context(replaced(pipe.vae, "encode", without_draws(pipe.vae, pipe.vae.encode)))
            stack.enter_context(replaced(pipe, "scheduler", scheduler))
            stack.enter_context(_quiet(pipe))
            for guider in pipe.components.values():  # HunyuanImage has objects for its guidance
                if hasattr(guider, "_enabled"):
                    stack.enter_context(replaced(guider, "_enabled", False))
            try:
                with torch.no_grad():
                    pipe(**self.arguments(images))
            except _Enough:
                pass
            except Exception as error:  # whatever a pipeline says to arguments that it was not made for
                raise NotRecordable(
                    f"a {type(pipe).__name__} cannot be run for recording ({_one_line(error)}): give what its call needs with call=."
                ) from error
            finally:
                if hasattr(pipe, "maybe_free_model_hooks"):
                    pipe.maybe_free_model_hooks()
        return run


def record(recorder: Recorder) -> Recording:
    """Record how a pipeline calls its denoiser; the pipeline is left as it was.

    Raises:
        NotRecordable: one sentence that names what does not fit.
    """
    pipe = recorder.pipe
    one = _first_run(recorder)
    template = one.outputs[0]
    sample = one.steps[0][2]
    two = recorder.run(2, lambda k, _: _Output(_noise_like(template, 2)), lambda k, x: _next(x, k))
    _check_calls(recorder, two, 2)
    entries, predicted = sample[0].numel(), template[0].numel()
    rows = probe_rows(entries, predicted)
    # In float32: nothing is rounded.
    probes, answers = probes_of(entries, rows).to(sample.device), probes_of(predicted, rows)

    def answer(k: int, _: Callable[[], Any]) -> Any:
        return _Output(_filled(template, answers if k == 2 else torch.zeros_like(answers)))

    def move(k: int, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x, dtype=torch.float32) if k == 1 else probes.view_as(x)

    probe = recorder.run(rows, answer, move)
    _check_calls(recorder, probe, rows)
    if not torch.equal(probe.steps[1][2], probes.view_as(probe.steps[1][2])):
        raise NotRecordable(f"a {type(pipe).__name__} changes its samples between two steps: it cannot be recorded.")
    recording = _Fit(recorder, one, two, probe, entries).recording(template)
    _check_replay(recorder, recording, one, two)
    return recording


def _first_run(recorder: Recorder) -> Run:
    """The run for one image, with guidance off: at 1, or at 0 where that is still guidance."""

    def denoise(k: int, call: Callable[[], Any]) -> Any:
        found = call() if k == 0 or not kept else _Output(_noise_like(kept[0], None))
        if not kept:
            kept.append(_copied(found[0]))
        return found

    reason = None
    for guidance in (1.0, 0.0):
        kept: list[Any] = []
        recorder.guidance = guidance
        try:
            run = recorder.run(1, denoise, lambda k, x: _next(x, k))
            _check_calls(recorder, run, 1)
            return run
        except NotRecordable as error:
            reason = reason or error
    assert reason is not None  # the first of the two
    raise reason


def _check_calls(recorder: Recorder, run: Run, images: int) -> None:
    """One call of the denoiser in each step, for as many rows as there are images."""
    name = type(recorder.pipe).__name__
    if run.decoded is None or len(run.steps) != STEPS:
        raise NotRecordable(f"a {name} made {len(run.steps)} of {STEPS} steps and decoded nothing: it cannot be recorded.")
    if run.steps_of != list(range(STEPS)):
        raise NotRecordable(
            f"a {name} calls its denoiser {len(run.steps_of)} times in {STEPS} steps with guidance off: it cannot be recorded."
        )
    for prediction, _, sample in run.steps:
        if len(sample) != images or prediction.shape != sample.shape:
            raise NotRecordable(
                f"a {name} steps on samples of shape {tuple(sample.shape)} with predictions of shape {tuple(prediction.shape)} "
                f"for {images} images: it cannot be recorded."
            )
    for found in run.outputs:
        if len(found) != images:
            raise NotRecordable(
                f"a {name} denoises {len(found)} rows for {images} images with guidance off: it cannot be recorded."
            )


class _Fit:
    """From three runs to a recording."""

    def __init__(self, recorder: Recorder, one: Run, two: Run, probe: Run, entries: int):
        self.recorder, self.one, self.two, self.probe, self.entries = recorder, one, two, probe, entries
        self.dtype = next((p.dtype for p in recorder.denoiser.parameters() if p.is_floating_point()), torch.float32)
        self.dtype = getattr(recorder.denoiser, "dtype", self.dtype)
        self.times = torch.stack([t.detach().double().cpu().flatten()[0] for _, t, _ in one.steps])
        self.constants: list[torch.Tensor] = []
        self.inputs: list[Placement] = []

    def recording(self, template: Any) -> Recording:
        names = self.one.arguments[0].keys()
        for run in (self.one, self.two, self.probe):
            for arguments in run.arguments:
                if arguments.keys() != names:
                    self.refuse("the denoiser", "gets other arguments in other steps or for more images")
        arguments = {
            name: self.node(
                name,
                [a[name] for a in self.one.arguments],
                [a[name] for a in self.two.arguments],
                [self.probe.arguments[1][name]],
            )
            for name in names
        }
        if not self.inputs:
            self.refuse("the noisy sample", "is in none of the denoiser's arguments")
        is_list = isinstance(template, (list, tuple))
        row = template[0]
        output = self.placed("the prediction", self.probe.steps[2][0], row.numel())
        decoded = self.probe.decoded
        assert decoded is not None
        tail = self.placed("what the autoencoder decodes", decoded, self.entries)
        if len(decoded) != len(self.probe.steps[0][2]) or not tail.is_invertible():
            self.refuse("what the autoencoder decodes", "does not hold each entry of a sample once")
        config = {
            "arguments": arguments,
            "constants": [{"shape": list(c.shape), "dtype": _dtype_name(c.dtype)} for c in self.constants],
            "placements": {
                "inputs": [placement.config for placement in self.inputs],
                "output": output.config,
                "tail": tail.config,
            },
            "sample_shape": list(self.one.steps[0][2].shape[1:]),
            "latent_shape": list(decoded.shape[1:]),
            "output_is_list": is_list,
        }
        found = Recording(config)
        for number, value in enumerate(self.constants):
            found.constants[number].copy_(value)
        for number, placement in enumerate(self.inputs):
            found.inputs[number].load_state_dict(placement.state_dict())
        found.output.load_state_dict(output.state_dict())
        found.tail.load_state_dict(tail.state_dict())
        return found

    def refuse(self, what: str, reason: str) -> None:
        raise NotRecordable(f"{what} of a {type(self.recorder.pipe).__name__} {reason}: it cannot be recorded.")

    def placed(self, what: str, rows: torch.Tensor, entries: int) -> Placement:
        try:
            return Placement.fit(rows, entries)
        except ValueError as error:
            raise NotRecordable(f"{what} of a {type(self.recorder.pipe).__name__} cannot be recorded: {error}.") from error

    def node(self, path: str, ones: list[Any], twos: list[Any], probes: list[Any], inner: bool = False) -> dict[str, Any]:
        """The node of an argument.

        Args:
            path: its name.
            ones, twos: its values in the steps of the runs for one and two images.
            probes: its value under the probes; of an element of a list with one for each row, those of all rows.
            inner: whether it is that of one row.
        """
        one = ones[0]
        if any(type(value) is not type(one) for value in (*ones, *twos, *probes)):
            self.refuse(f"the argument {path!r}", "is of several types")
        if isinstance(one, dict):
            if any(value.keys() != one.keys() for value in (*ones, *twos, *probes)):
                self.refuse(f"the argument {path!r}", "has other keys in other steps or for more images")
            return {"dict": {key: self.node(f"{path}.{key}", *_at(key, ones, twos, probes), inner) for key in one}}
        if isinstance(one, (list, tuple)):
            lengths = {len(value) for value in ones}, {len(value) for value in twos}, {len(value) for value in probes}
            rows = len(self.probe.steps[0][2])
            if not inner and lengths == ({1}, {2}, {rows}):
                first = [value[0] for value in ones], [value[0] for value in twos], list(probes[0])
                return {"each": self.node(f"{path}[]", *first, True)}
            if len(set().union(*lengths)) == 1:
                parts = [self.node(f"{path}[{k}]", *_at(k, ones, twos, probes), inner) for k in range(len(one))]
                return {"list" if isinstance(one, list) else "tuple": parts}
            self.refuse(f"the argument {path!r}", "is a list whose length is not that of the images")
        if isinstance(one, torch.Tensor):
            return self.tensor(path, ones, twos, torch.stack(probes) if inner else probes[0], inner)
        if one is None or isinstance(one, (bool, int, str, float)):
            if any(value != one for value in (*ones, *twos, *probes)):
                if isinstance(one, float):
                    of_one, of_two = ([torch.tensor(value) for value in of_run] for of_run in (ones, twos))
                    return self.tensor(path, of_one, of_two, torch.tensor(one), inner)
                self.refuse(f"the argument {path!r}", "changes from step to step or with the number of images")
            return {"value": one}
        self.refuse(f"the argument {path!r}", f"is a {type(one).__name__}, which cannot be kept")
        raise AssertionError  # `refuse` never returns

    def tensor(
        self, path: str, ones: list[torch.Tensor], twos: list[torch.Tensor], probe: torch.Tensor, inner: bool
    ) -> dict[str, Any]:
        one, two = ones[0], twos[0]
        dtype = "model" if one.dtype == self.dtype else _dtype_name(one.dtype)
        if _same(*ones) and _same(*twos):
            rows = None
            if not _same(one, two):
                rows = next((d for d in range(one.ndim) if _same(torch.cat([one, one], d), two)), None)
                if rows is None or inner:
                    self.refuse(f"the argument {path!r}", "is not the same for two images as for one")
            self.constants.append(one.cpu())
            return {"constant": len(self.constants) - 1, "rows": rows, "dtype": dtype}
        if probe.ndim and len(probe) > 1 and not _same(probe[0], probe[1]):
            if len(probe) != len(self.probe.steps[0][2]):
                self.refuse(f"the argument {path!r}", "holds the noisy samples of several images in one row")
            try:
                self.inputs.append(Placement.fit(probe, self.entries))
            except ValueError:
                self.refuse(
                    f"the argument {path!r}",
                    "is computed from the noisy sample in each step, as the residuals of a ControlNet are",
                )
            return {"input": len(self.inputs) - 1, "dtype": dtype}
        return self.time(path, ones, twos, inner) | {"dtype": dtype}

    def time(self, path: str, ones: list[torch.Tensor], twos: list[torch.Tensor], inner: bool) -> dict[str, Any]:
        """The node of an argument that is the time."""
        values = [value.double().cpu() for value in ones]
        flat = torch.stack([value.flatten()[0] for value in values])
        if not all(bool((value == value.flatten()[0]).all()) for value in values):
            self.refuse(f"the argument {path!r}", "changes from step to step, and not as one time does")
        found = fitted_time(self.times, flat, ones[0].dtype)
        if found is None:
            self.refuse(f"the argument {path!r}", "changes from step to step, and is no multiple of the scheduler's time")
        shape = list(ones[0].shape)
        if not inner and shape and shape[0] in (1, len(twos[0])):
            shape = shape[1:]
        return {"time": list(found or ()), "shape": shape}


def fitted_time(times: torch.Tensor, values: torch.Tensor, dtype: torch.dtype) -> tuple[float, float] | None:
    """(a, b) of values a t + b with b = 0 or b = 1, each of shape (steps,); `None`: there are none.

    Half precision rounds times; a that is nearly 1, 1/1000 or -1/1000 is that.
    """
    rounding = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
    for shift in (0.0, 1.0):
        scale = float((times * (values - shift)).sum() / times.square().sum())
        known = [k for k in (1.0, 1e-3, -1e-3, -1.0) if abs(scale / k - 1) < max(4 * rounding, 1e-4)]
        scale = known[0] if known else scale
        error = (times * scale + shift - values).abs()
        if bool((error <= (2 * rounding + 1e-4) * values.abs().clamp(min=1e-2 if shift else 1e-6)).all()):
            return scale, shift
    return None


def _check_replay(recorder: Recorder, recording: Recording, one: Run, two: Run) -> None:
    """The recording must build the arguments that were seen, and the predictions of the outputs."""
    name, dtype = type(recorder.pipe).__name__, _Fit(recorder, one, two, two, 0).dtype
    for run in (one, two):
        for number, (prediction, time, sample) in enumerate(run.steps):
            rows = time.flatten()[:1].expand(len(sample))
            built = recording.call(sample, rows, dtype)
            for key, value in run.arguments[number].items():
                if not _close(built[key], value):
                    raise NotRecordable(
                        f"the replay of a {name} does not equal its run: the argument {key!r} differs in step {number}."
                    )
            if not _close(recording.predicted([run.outputs[number]]), prediction.float()):
                raise NotRecordable(f"the replay of a {name} does not equal its run: the prediction differs in step {number}.")
    _, time, sample = one.steps[0]
    arguments = recording.call(sample, time.flatten()[:1], dtype)
    with torch.no_grad():
        again = recorder.denoiser(**arguments)
    if not _close(recording.predicted(again).to(dtype), one.steps[0][0].to(dtype)):  # with the roundings of that type
        raise NotRecordable(f"the replay of a {name} does not equal its run: the denoiser returns something else.")


def training_time(recorder: Recorder) -> SchedulerMixin:
    """A pipeline's scheduler, with a shift of the time that depends on the image's size as the one for these images."""
    pipe, scheduler = recorder.pipe, recorder.pipe.scheduler
    # Without the list of what was a default, which would be one again.
    config = {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}
    if not config.get("use_dynamic_shifting"):
        return type(scheduler).from_config(config)
    mu = _shift_of(recorder)
    if mu is None:
        raise NotRecordable(f"a {type(pipe).__name__} shifts its times in a way that cannot be recorded.")
    shift = float(torch.tensor(mu).exp()) if config.get("time_shift_type", "exponential") == "exponential" else mu
    key = "shift" if "shift" in config else "flow_shift"
    # exp(mu) / (exp(mu) + 1/t - 1) = s t / (1 + (s - 1) t) with s = exp(mu): the shift of a fixed size.
    return type(scheduler).from_config(config | {"use_dynamic_shifting": False, key: shift})


def _shift_of(recorder: Recorder) -> float | None:
    """mu of the pipeline with its own number of steps."""
    seen = Run()

    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        seen.schedule = kwargs
        raise _Enough

    scheduler = type(recorder.pipe.scheduler).from_config(recorder.pipe.scheduler.config)
    scheduler.set_timesteps = functools.wraps(scheduler.set_timesteps)(set_timesteps)
    with replaced(recorder.pipe, "scheduler", scheduler), _quiet(recorder.pipe):
        try:
            with torch.no_grad():
                arguments = recorder.arguments(1)
                arguments.pop("num_inference_steps", None)
                recorder.pipe(**arguments)
        except _Enough:
            pass
    mu = seen.schedule.get("mu")
    return None if mu is None else float(mu)


# Parts of a run


def _repeated(value: Any, images: int) -> Any:
    """The embedding of one prompt for each of several images."""
    if isinstance(value, torch.Tensor) and value.ndim and len(value) == 1:
        return value.repeat(images, *[1] * (value.ndim - 1))
    return value * images if isinstance(value, list) and len(value) == 1 else value


def _observed_scheduler(scheduler: SchedulerMixin, run: Run, step: Callable[[int, torch.Tensor], torch.Tensor]) -> SchedulerMixin:
    """A scheduler like a pipeline's, whose step is seen and returns what it is told; DDIM where others scale their samples."""
    kind = type(scheduler) if prediction_type(scheduler) == "flow" else DDIMScheduler
    found = kind.from_config(scheduler.config)

    def observed(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        number = len(run.steps)
        time = torch.as_tensor(timestep).detach().clone()
        run.steps.append((model_output.detach().clone(), time, sample.detach().clone()))
        if getattr(found, "_step_index", None) is not None:
            found._step_index += 1
        return _Output(step(number, sample))

    found.step = functools.wraps(found.step)(observed)
    return found


class _Output(tuple):
    """What a scheduler's step or a denoiser returns, with or without `return_dict`."""

    def __new__(cls, value: Any) -> "_Output":
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
def _quiet(pipe: DiffusionPipeline) -> Iterator[None]:
    """Inside, a pipeline shows no bar of its steps."""
    with replaced(pipe, "_progress_bar_config", {"disable": True}):
        yield


@contextmanager
def _taken_for_float32(vae: nn.Module) -> Iterator[None]:
    """Inside, an autoencoder says that it is in float32, so that latents are scaled for it without rounding."""
    kind = type(vae)
    vae.__class__ = type(kind.__name__, (kind,), {"dtype": torch.float32})
    try:
        yield
    finally:
        vae.__class__ = kind


def without_draws(vae: nn.Module, encode: Callable[..., Any]) -> Callable[..., Any]:
    """An autoencoder's `encode` whose draws are the mean: what is made of an image is the same in each run."""
    dtype = next((p.dtype for p in vae.parameters() if p.is_floating_point()), torch.float32)

    @functools.wraps(encode)
    def encoded(images: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = encode(images.to(dtype), *args, **kwargs)
        distribution = getattr(found, "latent_dist", None)
        if distribution is not None:
            distribution.sample = lambda generator=None: distribution.mode()
        return found

    return encoded


def _next(sample: torch.Tensor, number: int) -> torch.Tensor:
    """Another sample, the same for one image as for the first of two."""
    rows = [torch.randn(sample.shape[1:], generator=torch.Generator().manual_seed(10 * number + i)) for i in range(len(sample))]
    return torch.stack(rows).to(sample)


def _noise_like(template: Any, rows: int | None) -> Any:
    """What a denoiser returns, with noise in it, for so many rows; `None`: for as many."""
    if isinstance(template, (list, tuple)):
        return [torch.randn_like(template[0]) for _ in range(rows or len(template))]
    return torch.randn_like(template if rows is None else template[:1].expand(rows, *template.shape[1:]))


def _filled(template: Any, rows: torch.Tensor) -> Any:
    """What a denoiser returns, with these rows in it."""
    if isinstance(template, (list, tuple)):
        return [row.view(template[0].shape).to(template[0]) for row in rows]
    return rows.view(len(rows), *template.shape[1:]).to(template)


def _at(key: Any, ones: list[Any], twos: list[Any], probes: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    first, second, third = ([value[key] for value in of_run] for of_run in (ones, twos, probes))
    return first, second, third


def _copied(value: Any) -> Any:
    """Arguments as they are now: some pipelines change tensors in place."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        found = [_copied(inner) for inner in value]
        return found if isinstance(value, list) else tuple(found)
    return value


def _same(*tensors: torch.Tensor) -> bool:
    first = tensors[0]
    return all(first.shape == other.shape and torch.equal(first, other) for other in tensors[1:])


def _close(built: Any, seen: Any) -> bool:
    """Whether two arguments are the same, up to rounding."""
    if isinstance(seen, torch.Tensor):
        built = torch.as_tensor(built, device=seen.device)
        if built.shape != seen.shape and built.numel() != seen.numel() and seen.numel() != 1:
            return False  # one time for all rows may be built as one for each
        if not seen.numel():
            return True
        rounding = torch.finfo(seen.dtype).eps if seen.dtype.is_floating_point else 0.0
        difference = (built.double() - seen.double()).abs().max()
        return bool(difference <= max(TOLERANCE, 4 * rounding) * seen.double().abs().max().clamp(min=1e-3))
    if isinstance(seen, dict):
        return built.keys() == seen.keys() and all(_close(built[key], value) for key, value in seen.items())
    if isinstance(seen, (list, tuple)):
        return len(built) == len(seen) and all(map(_close, built, seen))
    if isinstance(seen, float):
        built = float(built.flatten()[0]) if isinstance(built, torch.Tensor) else built
        return abs(built - seen) <= TOLERANCE * max(abs(seen), 1e-3)
    return bool(built == seen)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__).rstrip(".")[:300]


__all__ = ["NotRecordable", "Recorder", "record"]
