"""Find out how a pipeline of diffusers calls its denoiser, by running it: record, fit, probe,
check.

    pipe(prompt) --observed--> arguments of the denoiser, what `scheduler.step` and `vae.decode` get --fit--> `Recording`

The pipeline runs three times, for a few steps each, with its guidance off.

1. One image. The denoiser works in the first step only; after that it returns noise.
2. Two images, without the denoiser. What doubles belongs to each image; what does not is shared.
3. A row for each probe, without the denoiser. The scheduler returns 0, 1 and the base-16 digits of
   each entry's number in place of a sample, and the denoiser likewise. So each entry of the
   denoiser's arguments, of the prediction and of what the autoencoder is given tells which entry it
   was made of, by which scale and shift (see `replay.Placement`).

The model's time is a t or 1 + a t of the scheduler's. At the end the recording must build what was
observed, or one sentence names what it does not. No weight is changed, and the pipeline is left as
it was."""  # noqa: E501

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .fitting import Fit, check_replay
from .observing import STEPS, Enough, NotRecordable, Output, Recorder, Run, copied, quiet, replaced
from .replay import Recording, probe_rows, probes_of


def record(recorder: Recorder) -> Recording:
    """Record how a pipeline calls its denoiser; the pipeline is left as it was.

    Raises:
        NotRecordable: one sentence that names what does not fit.
    """
    pipe = recorder.pipe
    one = _first_run(recorder)
    template = one.outputs[0]
    sample = one.steps[0][2]
    two = recorder.run(2, lambda k, _: Output(_noise_like(template, 2)), lambda k, x: _next(x, k))
    _check_calls(recorder, two, 2)
    entries, predicted = sample[0].numel(), template[0].numel()
    rows = probe_rows(entries, predicted)
    # In float32: nothing is rounded.
    probes, answers = probes_of(entries, rows).to(sample.device), probes_of(predicted, rows)

    def answer(k: int, _: Callable[[], Any]) -> Any:
        return Output(_filled(template, answers if k == 2 else torch.zeros_like(answers)))

    def move(k: int, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x, dtype=torch.float32) if k == 1 else probes.view_as(x)

    probe = recorder.run(rows, answer, move)
    _check_calls(recorder, probe, rows)
    if not torch.equal(probe.steps[1][2], probes.view_as(probe.steps[1][2])):
        raise NotRecordable(
            f"a {type(pipe).__name__} changes its samples between two steps: it cannot be recorded."
        )
    recording = Fit(recorder, one, two, probe, entries).recording(template)
    check_replay(recorder, recording, one, two)
    return recording


def _first_run(recorder: Recorder) -> Run:
    """The run for one image, with guidance off: at 1, or at 0 where that is still guidance."""

    def denoise(k: int, call: Callable[[], Any]) -> Any:
        found = call() if k == 0 or not kept else Output(_noise_like(kept[0], None))
        if not kept:
            kept.append(copied(found[0]))
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
        raise NotRecordable(
            f"a {name} made {len(run.steps)} of {STEPS} steps and decoded nothing: it cannot be"
            " recorded."
        )
    if run.steps_of != list(range(STEPS)):
        raise NotRecordable(
            f"a {name} calls its denoiser {len(run.steps_of)} times in {STEPS} steps with guidance"
            " off: it cannot be recorded."
        )
    for prediction, _, sample in run.steps:
        if len(sample) != images or prediction.shape != sample.shape:
            raise NotRecordable(
                f"a {name} steps on samples of shape {tuple(sample.shape)} with predictions of"
                f" shape {tuple(prediction.shape)} for {images} images: it cannot be recorded."
            )
    if recorder.boundary is not None:
        names = list(recorder.denoisers)
        for (_, time, _), called in zip(run.steps, run.called):
            if called != names[float(time.flatten()[0]) < recorder.boundary]:
                raise NotRecordable(
                    f"a {name} does not share its noise levels between its denoisers by its"
                    " boundary_ratio: it cannot be recorded."
                )
    for found in run.outputs:
        if len(found) != images:
            raise NotRecordable(
                f"a {name} denoises {len(found)} rows for {images} images with guidance off: it"
                " cannot be recorded."
            )


def training_time(recorder: Recorder) -> SchedulerMixin:
    """A pipeline's scheduler, with a shift of the time that depends on the image's size as the one
    for these images.
    """
    pipe, scheduler = recorder.pipe, recorder.pipe.scheduler
    # Without the list of what was a default, which would be one again.
    config = {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}
    if not config.get("use_dynamic_shifting"):
        return type(scheduler).from_config(config)
    mu = _shift_of(recorder)
    if mu is None:
        raise NotRecordable(
            f"a {type(pipe).__name__} shifts its times in a way that cannot be recorded."
        )
    shift = (
        float(torch.tensor(mu).exp())
        if config.get("time_shift_type", "exponential") == "exponential"
        else mu
    )
    key = "shift" if "shift" in config else "flow_shift"
    # exp(mu) / (exp(mu) + 1/t - 1) = s t / (1 + (s - 1) t) with s = exp(mu): the shift of a fixed
    # size.
    return type(scheduler).from_config(config | {"use_dynamic_shifting": False, key: shift})


def _shift_of(recorder: Recorder) -> float | None:
    """mu of the pipeline with its own number of steps."""
    seen = Run()

    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        seen.schedule = kwargs
        raise Enough

    scheduler = type(recorder.pipe.scheduler).from_config(recorder.pipe.scheduler.config)
    scheduler.set_timesteps = functools.wraps(scheduler.set_timesteps)(set_timesteps)
    with replaced(recorder.pipe, "scheduler", scheduler), quiet(recorder.pipe):
        try:
            with torch.no_grad():
                arguments = recorder.arguments(1)
                arguments.pop("num_inference_steps", None)
                recorder.pipe(**arguments)
        except Enough:
            pass
    mu = seen.schedule.get("mu")
    return None if mu is None else float(mu)


def _next(sample: torch.Tensor, number: int) -> torch.Tensor:
    """Another sample, the same for one image as for the first of two."""
    rows = [
        torch.randn(sample.shape[1:], generator=torch.Generator().manual_seed(10 * number + i))
        for i in range(len(sample))
    ]
    return torch.stack(rows).to(sample)


def _noise_like(template: Any, rows: int | None) -> Any:
    """What a denoiser returns, with noise in it, for so many rows; `None`: for as many."""
    if isinstance(template, (list, tuple)):
        return [torch.randn_like(template[0]) for _ in range(rows or len(template))]
    return torch.randn_like(
        template if rows is None else template[:1].expand(rows, *template.shape[1:])
    )


def _filled(template: Any, rows: torch.Tensor) -> Any:
    """What a denoiser returns, with these rows in it."""
    if isinstance(template, (list, tuple)):
        return [row.view(template[0].shape).to(template[0]) for row in rows]
    return rows.view(len(rows), *template.shape[1:]).to(template)


__all__ = ["NotRecordable", "Recorder", "record", "training_time"]
