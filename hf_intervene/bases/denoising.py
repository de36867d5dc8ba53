"""Noise and denoising as the schedulers of diffusers define them: training targets, sampling, and
the deterministic path and its inverse.

x_t = a_t x_0 + s_t noise; what denoisers predict is in `schedulers.py`. A deterministic step (DDIM,
Song et al., arXiv:2010.02502; Euler's for a flow) from t to t' is linear in x_t and the prediction,
with the coefficients of `step_coefficients`."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.training_utils import compute_snr
from tqdm.auto import tqdm

from ..contexts import shown
from .schedulers import is_flow, prediction_type, training_scheduler


# Of steps that take longer than two seconds, on a terminal.
_BAR = {"disable": None, "delay": 2, "leave": False}
# The least s_t of the weight 1 / s_t^2 of a clean sample's squared error (Li and He,
# arXiv:2511.13720).
LEAST_NOISE = 0.05
Predict = Callable[
    [torch.Tensor, torch.Tensor], torch.Tensor
]  # (x_t (B, ...), timestep ()) -> the denoiser's prediction (B, ...)


def _within(share: float, a: Any, s: Any) -> Any:
    """Whether the share of noise in x_t, s_t / (a_t + s_t), is at most `share`; of numbers or
    tensors."""
    return s <= share * (a + s)


@dataclass(frozen=True)
class Start:
    """Denoising that starts from a draw of p(x_t | z), where p(x_0 | z) = N(mean, spread^2), and
    not from noise alone (as SDEdit does from an image, Meng et al., arXiv:2108.01073).

    Args:
        mean: (B, ...).
        share: the share of noise in x_t to start at, s_t / (a_t + s_t).
        spread: a number, or a tensor ().
    """

    mean: torch.Tensor
    share: float
    spread: torch.Tensor | float

    def is_reached(self, a: Any, s: Any) -> bool:
        return bool(_within(self.share, a, s))

    def noise_scale(self, a: float, s: float) -> torch.Tensor | float:
        """The factor of s noise that gives x_t the variance a^2 spread^2 + s^2."""
        return (1 + (self.spread * a / s) ** 2) ** 0.5

    def noisy(self, a: float, s: float, noise: torch.Tensor) -> torch.Tensor:
        """x_t (B, ...) of standard normal noise (B, ...)."""
        return a * self.mean + s * self.noise_scale(a, s) * noise

    def noise_in(self, a: float, s: float, x: torch.Tensor) -> torch.Tensor:
        """The noise of which `noisy` makes x."""
        return (x - a * self.mean) / (s * self.noise_scale(a, s))


def noised(
    scheduler: SchedulerMixin,
    kind: str,
    x0: torch.Tensor,
    noise: torch.Tensor,
    time: torch.Tensor,
    min_snr_gamma: float | None = None,
    noisiest: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a denoiser is trained on.

    Args:
        scheduler: of `training_scheduler`.
        kind: what the denoiser predicts, `prediction_type` of the scheduler that it samples with.
        x0: clean samples, (B, ...).
        noise: standard normal, (B, ...).
        time: uniform draws in [0, 1), (B,): where on the schedule; of a flow, with a logit-normal
            density as for Stable Diffusion 3.
        min_snr_gamma: bound of the weights by signal-to-noise ratio (Hang et al.,
            arXiv:2303.09556); `None`: all weights are 1, but those of a clean sample, whose errors
            then count as much as those of the velocity that it stands for, 1 / max(s_t, 0.05)^2.
        noisiest: the largest share of noise that is drawn, s_t / (a_t + s_t).

    Returns:
        x_t (B, ...), timesteps (B,), the target of the prediction (B, ...), the weight of each
        sample's squared error (B,).

    Raises:
        ValueError: `min_snr_gamma` for a flow.
    """
    weight = torch.ones(len(x0), device=x0.device)
    if is_flow(kind):
        if min_snr_gamma is not None:
            raise ValueError(
                "min_snr_gamma weighs epsilon, v_prediction and sample; a flow has no such weights:"
                " leave it out."
            )
        # The tables stay where they are needed: moving them would wait for the device each time.
        scheduler.timesteps = scheduler.timesteps.to(x0.device)
        scheduler.sigmas = scheduler.sigmas.to(x0.device)
        steps = len(scheduler.timesteps)
        sigmas = scheduler.sigmas[:steps]
        # The noisier ones come before it.
        first = (~_within(noisiest, 1 - sigmas, sigmas)).sum().clamp(max=steps - 1)
        least = torch.special.ndtr(torch.logit(first.double() / steps))
        time = (least + (1 - least) * time.double()).clamp(1e-9, 1 - 1e-9)
        index = (torch.special.ndtri(time).sigmoid() * steps).long().clamp(min=first)
        timesteps, sigma = scheduler.timesteps[index], scheduler.sigmas.to(x0.dtype)[index]
        if kind == "flow_sample":
            weight = sigma.clamp(min=LEAST_NOISE) ** -2
        sigma = sigma.view(-1, *[1] * (x0.ndim - 1))
        target = noise - x0 if kind == "flow" else x0
        return (1 - sigma) * x0 + sigma * noise, timesteps, target, weight
    cumulative = scheduler.alphas_cumprod.to(x0.device)
    within = _within(noisiest, cumulative.sqrt(), (1 - cumulative).sqrt())
    steps = within.sum().clamp(min=1)  # the least noisy ones come first
    timesteps = (time.double() * steps).long()
    noisy = scheduler.add_noise(x0, noise, timesteps)
    if kind == "v_prediction":
        target = scheduler.get_velocity(x0, noise, timesteps)
    else:
        target = noise if kind == "epsilon" else x0
    if min_snr_gamma is None and kind != "sample":
        return noisy, timesteps, target, weight
    snr = compute_snr(scheduler, timesteps).clamp(min=1e-8)  # a_t^2 / s_t^2 = 1 / s_t^2 - 1
    if min_snr_gamma is None:
        return noisy, timesteps, target, (snr + 1).clamp(max=LEAST_NOISE**-2)
    of_sample = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1.0}[kind]
    return noisy, timesteps, target, snr.clamp(max=min_snr_gamma) / of_sample


def generate(
    predict: Predict,
    scheduler: SchedulerMixin,
    noise: torch.Tensor,
    steps: int,
    generator: torch.Generator | list[torch.Generator] | None = None,
    start: Start | None = None,
) -> torch.Tensor:
    """Samples (B, ...) from noise (B, ...), standard normal, by any scheduler of diffusers.

    Args:
        predict: the denoiser.
        scheduler, noise: see above.
        steps: from noise to a sample.
        generator: for schedulers that draw noise as they go.
        start: where denoising starts; `None`: from noise alone. As in image-to-image pipelines,
            only the steps from there on are made.

    Raises:
        ValueError: no such number of steps.
    """
    _check_steps(scheduler, steps)
    scheduler = type(scheduler).from_config(scheduler.config)  # some keep the state of the last run
    scheduler.set_timesteps(steps, device=noise.device)
    accepts = inspect.signature(scheduler.step).parameters
    options = {"generator": generator} if "generator" in accepts else {}
    if start is None:
        x, timesteps = noise * getattr(scheduler, "init_noise_sigma", 1.0), scheduler.timesteps
    else:
        x, timesteps = _started(scheduler, noise, start)
    for t in tqdm(timesteps, "denoising", **_BAR):
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(predict(scaled, t), t, x, **options).prev_sample
    return x


def _started(
    scheduler: SchedulerMixin, noise: torch.Tensor, start: Start
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a scheduler starts from, as its steps have it, and the timesteps left: those whose share
    of noise is at most that of `start`, and the last one at least."""
    of_flow = is_flow(prediction_type(scheduler))
    if of_flow:
        s = scheduler.sigmas[: len(scheduler.timesteps)].double().cpu()
        a = 1 - s
    else:
        alphas = training_scheduler(scheduler).alphas_cumprod.double()
        alphas = alphas[scheduler.timesteps.long().cpu()]
        a, s = alphas.sqrt(), (1 - alphas).sqrt()
    # A solver that calls the denoiser twice in a step begins with the first of the two.
    begins = range(0, len(s), getattr(scheduler, "order", 1))
    begin = next((n for n in begins if start.is_reached(a[n], s[n])), begins[-1])
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    timesteps, point = scheduler.timesteps[begin:], (float(a[begin]), float(s[begin]))
    if of_flow:
        return start.noisy(*point, noise), timesteps
    # Some schedulers scale x_t: their own function does so.
    noise, t = noise * start.noise_scale(*point), timesteps[:1].expand(len(noise))
    return scheduler.add_noise(start.mean, noise, t), timesteps


def path(
    scheduler: SchedulerMixin, steps: int, device: torch.device, start: Start | None = None
) -> list[tuple[torch.Tensor, float, float]]:
    """Timestep, a_t and s_t of the deterministic path with `steps` steps, from noise to the clean
    sample, whose (a, s) is (1, 0). `start`: as in `generate`, only those from there on.

    Raises:
        ValueError: no such number of steps.
    """
    _check_steps(scheduler, steps)
    if is_flow(prediction_type(scheduler)):
        fresh = type(scheduler).from_config(scheduler.config)
        fresh.set_timesteps(steps, device=device)
        points = [(t, 1 - s, s) for t, s in zip(fresh.timesteps, fresh.sigmas[:-1].tolist())]
    else:
        alphas = training_scheduler(scheduler).alphas_cumprod.double()
        last = len(alphas)
        # trailing: the first is the noisiest there is
        timesteps = [round(last * (steps - k) / steps) - 1 for k in range(steps)]
        points = [
            (torch.tensor(t, device=device), float(alphas[t].sqrt()), float((1 - alphas[t]).sqrt()))
            for t in timesteps
        ]
    if start is None:
        return points
    return [point for point in points if start.is_reached(*point[1:])] or points[-1:]


def _check_steps(scheduler: SchedulerMixin, steps: int) -> None:
    most = scheduler.config.num_train_timesteps
    if not (isinstance(steps, int) and 1 <= steps <= most):
        raise ValueError(
            f"num_inference_steps must be a whole number from 1 to {most}, those of the scheduler,"
            f" not {shown(steps)}."
        )


def step_coefficients(
    kind: str, a: float, s: float, a_next: float, s_next: float
) -> tuple[float, float]:
    """(A, B) of the deterministic step x_t' = A x_t + B prediction, from the x_0 and the noise that
    the prediction stands for:

    epsilon: x_0 = (x - s e) / a,  noise = e;   v: x_0 = a x - s v,  noise = s x + a v;   flow: x_0 = x - s v,  noise = x + a v.

    A clean sample is taken as the velocity that it stands for, see `_velocity`: from a step that
    ends at that sample, as the last one does, nobody could go back.
    """  # noqa: E501
    if kind == "epsilon":
        return a_next / a, s_next - a_next * s / a
    scale = a_next + s_next if is_flow(kind) else a_next * a + s_next * s
    return scale, s_next * a - a_next * s


def _velocity(kind: str, prediction: torch.Tensor, x: torch.Tensor, a: float, s: float) -> Any:
    """A prediction as `step_coefficients` takes it: its v or velocity where it is x_0."""
    if kind not in ("sample", "flow_sample"):
        return prediction
    return ((x if is_flow(kind) else a * x) - prediction) / s


def follow(
    predict: Predict,
    scheduler: SchedulerMixin,
    noise: torch.Tensor,
    steps: int,
    start: Start | None = None,
) -> torch.Tensor:
    """The clean sample (B, ...) that the deterministic path leads to from noise (B, ...); `start`
    as in `generate`."""
    kind, x = prediction_type(scheduler), noise
    points: list[tuple[Any, float, float]] = [
        *path(scheduler, steps, noise.device, start),
        (None, 1.0, 0.0),
    ]
    if start is not None:
        _, a, s = points[0]
        x = start.noisy(a, s, noise)
    for (t, a, s), (_, a_next, s_next) in zip(tqdm(points[:-1], "denoising", **_BAR), points[1:]):
        scale, shift = step_coefficients(kind, a, s, a_next, s_next)
        x = scale * x + shift * _velocity(kind, predict(x, t), x, a, s)
    return x


def invert(
    predict: Predict,
    scheduler: SchedulerMixin,
    x0: torch.Tensor,
    steps: int,
    iterations: int = 3,
    start: Start | None = None,
) -> torch.Tensor:
    """The noise (B, ...) from which `follow` leads to x0 (B, ...).

    Each step of the path is solved for where it came from by fixed-point iteration, x_t = (x_t' - B
    predict(x_t, t)) / A; with a single one it would be the usual DDIM inversion, which takes the
    prediction at the wrong point and does not come back to the image."""
    kind, x = prediction_type(scheduler), x0
    points: list[tuple[Any, float, float]] = [
        *path(scheduler, steps, x0.device, start),
        (None, 1.0, 0.0),
    ]
    for (t, a, s), (_, a_next, s_next) in tqdm(
        list(zip(points[:-1], points[1:]))[::-1], "noising", **_BAR
    ):
        scale, shift = step_coefficients(kind, a, s, a_next, s_next)
        guess = x
        for _ in range(iterations):
            guess = (x - shift * _velocity(kind, predict(guess, t), guess, a, s)) / scale
        x = guess
    if start is None:
        return x
    _, a, s = points[0]
    return start.noise_in(a, s, x)
