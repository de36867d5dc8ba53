"""Heads on denoisers: the objective, schedules and their inverse."""

import math

import diffusers
import pytest
import torch
from conftest import generator
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusion_models import KINDS, randn, save_pipeline, save_vision, with_head

from hf_intervene import InterventionModel, InterventionPipeline, load_base, wrap_base
from hf_intervene.bases import denoising, schedulers
from hf_intervene.bases.adapter import DiffusionAdapter
from hf_intervene.bases.diffusion import PRECISION
from hf_intervene.terms import EditConsistency


# The objective


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_targets_and_weights_of_a_diffusion(kind, gamma):
    scheduler = DDPMScheduler(prediction_type=kind)
    x0, noise, time = (
        randn(4, 1, 2, 2),
        randn(4, 1, 2, 2, seed=1),
        torch.tensor([0.0, 0.1, 0.5, 0.9999]),
    )
    noisy, timesteps, target, weight = denoising.noised(scheduler, kind, x0, noise, time, gamma)
    for i in range(4):
        t = int(time[i] * 1000)
        a, s = scheduler.alphas_cumprod[t].sqrt(), (1 - scheduler.alphas_cumprod[t]).sqrt()
        assert timesteps[i] == t
        torch.testing.assert_close(noisy[i], a * x0[i] + s * noise[i])
        velocity = a * noise[i] - s * x0[i]
        targets = {"epsilon": noise[i], "v_prediction": velocity, "sample": x0[i]}
        torch.testing.assert_close(target[i], targets[kind])
        snr = (a / s) ** 2
        if gamma is not None:
            expected = (
                min(snr, gamma) / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[kind]
            )
        else:
            expected = min(1 / s**2, 400) if kind == "sample" else 1.0
        torch.testing.assert_close(
            weight[i], torch.as_tensor(expected), rtol=1e-3, atol=1e-6, check_dtype=False
        )


def test_targets_of_a_flow():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    x0, noise, time = (
        randn(3, 1, 2, 2),
        randn(3, 1, 2, 2, seed=1),
        torch.tensor([0.0, 0.5, 0.9999999]),
    )
    noisy, timesteps, target, weight = denoising.noised(scheduler, "flow", x0, noise, time)
    sigma = timesteps / 1000
    torch.testing.assert_close(
        noisy, (1 - sigma)[:, None, None, None] * x0 + sigma[:, None, None, None] * noise
    )
    assert torch.equal(target, noise - x0) and torch.equal(weight, torch.ones(3))
    # 3 u / (1 + 2 u), u = 1/2
    assert sigma[0] > sigma[1] > sigma[2] > 0 and abs(float(sigma[1]) - 0.75) < 0.01
    with pytest.raises(ValueError, match="a flow has no such weights"):
        denoising.noised(scheduler, "flow", x0, noise, time, 5.0)
    # A solver of other kinds too, whose sigmas are not the flow's before it samples.
    solver = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    found = denoising.noised(schedulers.training_scheduler(solver), "flow", x0, noise, time)
    for one, other in zip(found, (noisy, timesteps, target, weight)):
        torch.testing.assert_close(one, other)
    solver.set_timesteps(7)
    torch.testing.assert_close(solver.sigmas[:-1], solver.timesteps / 1000, atol=2e-3, rtol=0)
    # The clean sample, with errors that weigh as much as the velocity's.
    x, t, target, weight = denoising.noised(scheduler, "flow_sample", x0, noise, time)
    assert torch.equal(x, noisy) and torch.equal(t, timesteps) and torch.equal(target, x0)
    torch.testing.assert_close(weight, 1 / sigma.clamp(min=0.05) ** 2)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "flow", "flow_sample"])
@pytest.mark.parametrize("noisiest", [0.3, 0.5, 1.0])
def test_no_draw_is_noisier_than_asked(kind, noisiest):
    flow = kind.startswith("flow")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0) if flow else DDPMScheduler()
    n = 4001
    time = torch.linspace(0, 1 - 1e-7, n)
    x0, noise = torch.zeros(n, 1, 1, 1), torch.ones(n, 1, 1, 1)

    def drawn(noisiest):
        """Shares of noise, and timesteps."""
        x, t, *_ = denoising.noised(scheduler, kind, x0, noise, time, noisiest=noisiest)
        s = x.flatten()
        return s if flow else s / (s + (1 - s**2).clamp(min=0).sqrt()), t

    (share, t), (share_of_all, t_of_all) = drawn(noisiest), drawn(1.0)
    assert share.max() <= noisiest + 1e-6
    # As densely as in the whole schedule, below it.
    below = t_of_all[share_of_all <= noisiest].double()
    levels = torch.linspace(0.01, 0.99, 25, dtype=torch.float64)
    expected, found = below.quantile(levels), t.double().quantile(levels)
    torch.testing.assert_close(found, expected, atol=4, rtol=0.05)
    # Below all of the schedule its least noisy step is left.
    assert drawn(1e-5)[1].unique().tolist() == [float(scheduler.timesteps.min())]


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_denoising_loss_and_the_kl(kind):
    model = with_head(kind)
    x, s = (
        torch.rand(3, 3, 16, 16, generator=generator(1)),
        model.targets([["a"], "obs", {"b": 0.5}]),
    )
    draws = model.posterior_draws(3, generator())
    output = model(x, s, beta=2.0, **draws)
    mean, logvar = model.posterior(x, s)
    e = model.embed(mean + (0.5 * logvar).exp() * draws["noise"], s)

    def denoising_loss(**options):
        noisy, t, target, _ = denoising.noised(
            model.base._training_scheduler,
            schedulers.prediction_type(model.base.scheduler),
            model.base.prepare(x)["x0"],
            draws["residual_noise"],
            draws["time"],
            **options,
        )
        return PRECISION * (model.base.denoise(noisy, t, e) - target).square().sum((1, 2, 3))

    expected = denoising_loss()
    torch.testing.assert_close(output.reconstruction_loss, expected, rtol=1e-4, atol=1e-3)
    model.base.train_for_samples()
    less_noise = model(x, s, beta=2.0, **draws).reconstruction_loss
    torch.testing.assert_close(less_noise, denoising_loss(noisiest=0.5), rtol=1e-4, atol=1e-3)
    model.base.adapter.register_to_config(noisiest=1.0)
    model.base.adapter.log_variance.data.fill_(math.log(0.3))
    output = model(x, s, beta=2.0, **draws)
    likelihood = torch.distributions.Normal(model.base.adapter.decode(e), math.sqrt(0.3))
    alone = -likelihood.log_prob(model.base.prepare(x)["x0"]).sum((1, 2, 3))
    torch.testing.assert_close(output.bottleneck_loss, alone, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(output.loss, (alone + expected + 2 * output.kl).mean())
    prepared = model(None, s, beta=2.0, prepared=model.base.prepare(x), **draws)
    assert torch.equal(prepared.loss, output.loss)


def with_flows(kind):
    base = with_head(kind).base
    return InterventionModel.build(base, ["a", "b"], mechanism="flow", concept_width=4)


@pytest.mark.parametrize("kind", ["unet", "sd3"])
def test_edits_of_a_denoiser_are_read_back(kind):
    model = with_flows(kind).train()
    contexts = torch.eye(model.num_blocks)[:2]
    term = EditConsistency.build(1.0, model, contexts)
    draws = term.draw(4, torch.Generator().manual_seed(0))
    targets = contexts.repeat(2, 1)
    output = model(torch.rand(4, *model.base.image_shape), targets)
    term.loss(model, output, targets, draws).backward()
    parts = {name: p.grad for name, p in model.base.adapter.named_parameters()}
    assert all(g is not None and g.any() for name, g in parts.items() if "decoder" in name)
    assert any(g is not None and g.any() for name, g in parts.items() if "encoder" in name)


def test_edits_are_not_read_back_by_a_vision_model_or_without_a_decoder(tmp_path, capsys):
    source = save_pipeline("unet", tmp_path / "ddpm")
    vision = load_base(source, 16, image_encoder=save_vision(tmp_path / "vit"))
    older = wrap_base(older_adapter("dit"))
    for base in (vision, older):
        model = InterventionModel.build(base, ["a", "b"], mechanism="flow", concept_width=4)
        assert EditConsistency.build(1.0, model, torch.eye(model.num_blocks)[:2]) is None
        assert "edit consistency is left out" in capsys.readouterr().err


def older_adapter(kind):
    """A base with an adapter as it was before there were decoders."""
    base = with_head(kind).base
    later = {"decoded_shape", "start"}
    config = {k: v for k, v in base.adapter.config.items() if k[0] != "_" and k not in later}
    config["sites"] = {k: v for k, v in config["sites"].items() if not k.startswith("input")}
    parts = {name: getattr(base, name) for name in ("scheduler", "vae")}
    return type(base)(base.model, **parts, adapter=type(base.adapter)(**config).eval())


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_an_older_adapter_works_as_it_did(kind):
    base = older_adapter(kind)
    x, t, e = (
        randn(2, *base.sample_shape),
        torch.tensor([300, 20]),
        randn(2, *base.embedding_shape, seed=1),
    )
    base.adapter.projections.vector[-1].weight.data.normal_()
    assert not hasattr(base.adapter, "decoder") and base.loss_terms == ("reconstruction_loss",)
    encoded = base.encode(torch.rand(2, *base.image_shape))
    assert list(base.loss(e, encoded, base.training_draws(2))) == ["reconstruction_loss"]
    with torch.no_grad():
        assert not torch.equal(base.denoise(x, t, e), base.denoise(x, t, 0 * e))


def test_times_of_a_batch_are_spread_over_the_schedule():
    time = with_head().posterior_draws(50, generator())["time"]
    assert torch.equal((time.sort().values * 50).floor(), torch.arange(50.0))
    assert not torch.equal(time, time.sort().values)


# Sampling, and the deterministic path


SCHEDULES = [
    DDIMScheduler(clip_sample=False, timestep_spacing="trailing"),
    DDIMScheduler(clip_sample=False, timestep_spacing="trailing", prediction_type="v_prediction"),
    FlowMatchEulerDiscreteScheduler(shift=3.0),
]


SAMPLE = {"clip_sample": False, "timestep_spacing": "trailing", "prediction_type": "sample"}
OF_SAMPLES = [
    DDIMScheduler(**SAMPLE),
    DPMSolverMultistepScheduler(
        prediction_type="sample", use_flow_sigmas=True, flow_shift=3.0, solver_order=1
    ),
]


@pytest.mark.parametrize("scheduler", SCHEDULES + OF_SAMPLES, ids=schedulers.prediction_type)
def test_the_path_is_that_of_the_scheduler(scheduler):
    def predict(x, t):
        return torch.tanh(x + t / 1000)

    noise = randn(2, 3, 4, 4)
    # DDIM's own grid is even only where it divides its 1,000 steps
    found = denoising.follow(predict, scheduler, noise, 10)
    torch.testing.assert_close(
        found, denoising.generate(predict, scheduler, noise, 10), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("scheduler", SCHEDULES, ids=schedulers.prediction_type)
def test_the_path_is_inverted(scheduler):
    def predict(x, t):
        return torch.tanh(x) * (0.5 + t / 2000)

    x0 = randn(2, 3, 4, 4)
    back = {
        n: denoising.follow(predict, scheduler, denoising.invert(predict, scheduler, x0, 20, n), 20)
        for n in (1, 3, 8)
    }
    errors = {n: float((x - x0).abs().max()) for n, x in back.items()}
    assert errors[8] < errors[3] < errors[1] and errors[8] < 1e-3


@pytest.mark.parametrize("of_sample", OF_SAMPLES, ids=["diffusion", "flow"])
def test_a_clean_sample_stands_for_a_velocity(of_sample):
    """The path of a denoiser that predicts samples is that of the one that predicts the velocities
    that they stand for, there and back.
    """
    kind = schedulers.prediction_type(of_sample)
    other = {"sample": "v_prediction", "flow_sample": "flow_prediction"}[kind]
    of_velocity = type(of_sample).from_config(of_sample.config, prediction_type=other)
    points = {float(t): (a, s) for t, a, s in denoising.path(of_sample, 20, torch.device("cpu"))}

    def velocity(x, t):
        return torch.tanh(x) * (0.5 + t / 2000)

    def sample(x, t):
        a, s = points[float(t)]
        return (a if kind == "sample" else 1) * x - s * velocity(x, t)

    x0 = randn(2, 3, 4, 4)
    for start in (None, denoising.Start(randn(2, 3, 4, 4, seed=1), 0.4, 0.5)):
        noise = denoising.invert(velocity, of_velocity, x0, 20, 8, start)
        found = denoising.invert(sample, of_sample, x0, 20, 8, start)
        torch.testing.assert_close(found, noise, rtol=1e-4, atol=1e-4)
        again = denoising.follow(sample, of_sample, found, 20, start)
        torch.testing.assert_close(again, x0, rtol=1e-3, atol=1e-3)


SOLVERS = [
    *SCHEDULES,
    *OF_SAMPLES,
    UniPCMultistepScheduler(prediction_type="sample", use_flow_sigmas=True, flow_shift=1.0),
    DDPMScheduler(clip_sample=False, timestep_spacing="trailing"),
    EulerDiscreteScheduler(timestep_spacing="trailing"),
    HeunDiscreteScheduler(timestep_spacing="trailing"),
    DPMSolverMultistepScheduler(timestep_spacing="trailing"),
    UniPCMultistepScheduler(timestep_spacing="trailing"),
    UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    FlowMatchHeunDiscreteScheduler(),
]


@pytest.mark.parametrize("start", [0.3, 0.6, 1e-9])
@pytest.mark.parametrize("scheduler", SOLVERS, ids=lambda s: type(s).__name__)
def test_samples_start_from_a_mean_with_a_share_of_noise(scheduler, start):
    """The denoiser is the exact one of a point x_0, so that every solver must end there; what it is
    given shows where it started."""
    x0, mean, noise = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1), randn(2, 3, 4, 4, seed=2)
    kind, seen = schedulers.prediction_type(scheduler), []
    alphas = getattr(scheduler, "alphas_cumprod", None)

    def predict(x, t):
        if schedulers.is_flow(kind):
            a, s = 1 - float(t) / 1000, float(t) / 1000
        else:
            a, s = float(alphas[int(t)].sqrt()), float((1 - alphas[int(t)]).sqrt())
        seen.append((x, a, s))
        e = (x - a * x0) / s
        velocities = {"v_prediction": a * e - s * x0, "flow": e - x0}
        return {"epsilon": e, "sample": x0, "flow_sample": x0, **velocities}[kind]

    start_from = denoising.Start(mean, start, 0.5)
    found = denoising.generate(predict, scheduler, noise, 20, start=start_from)
    x, a, s = seen[0]
    expected = a * mean + math.sqrt(s**2 + (0.5 * a) ** 2) * noise
    torch.testing.assert_close(x, expected, rtol=5e-3, atol=5e-3)
    assert s / (a + s) <= start or len(seen) <= 2
    if start > 0.1:
        assert s / (a + s) > start - 0.12
        assert len(seen) < 20 * getattr(scheduler, "order", 1)
    torch.testing.assert_close(found, x0, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("scheduler", SCHEDULES, ids=schedulers.prediction_type)
def test_the_path_from_a_mean_is_inverted(scheduler):
    def predict(x, t):
        return torch.tanh(x) * (0.5 + t / 2000)

    x0, start = randn(2, 3, 4, 4), denoising.Start(randn(2, 3, 4, 4, seed=1), 0.4, 0.5)
    noise = denoising.invert(predict, scheduler, x0, 20, 8, start)
    assert not torch.allclose(noise, denoising.invert(predict, scheduler, x0, 20, 8))
    found = denoising.follow(predict, scheduler, noise, 20, start)
    torch.testing.assert_close(found, x0, rtol=1e-3, atol=1e-3)
    other = denoising.generate(predict, scheduler, noise, 20, start=start)
    torch.testing.assert_close(found, other, rtol=1e-3, atol=1e-3)


def test_a_head_starts_from_what_it_decodes():
    model = with_head("unet")
    base, e = model.base, randn(3, *model.base.embedding_shape)
    assert 0 < base.adapter.config.start < 1
    draws = base.draws(3, generator())
    with torch.no_grad():
        x0 = 2 * base.generate(e, draws, num_inference_steps=10, along_path=True) - 1
        entries = base.adapter.entries(e)
        mean, x = base.adapter.decode(e), None
        points = [*denoising.path(base.scheduler, 10, e.device), (None, 1.0, 0.0)]
        for (t, a, s), (_, a_next, s_next) in zip(points[:-1], points[1:]):
            if s / (a + s) > base.adapter.config.start:
                continue
            if x is None:
                spread = math.sqrt(s**2 + a**2 * float(base.adapter.log_variance.exp()))
                x = a * mean + spread * draws["residual_noise"]
            kind = base.adapter.config.prediction_type
            scale, shift = denoising.step_coefficients(kind, a, s, a_next, s_next)
            x = scale * x + shift * base.denoise(x, t, entries)
    torch.testing.assert_close(x0, x.clamp(-1, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("start", [0.0, 1.5, -1.0, float("nan")])
def test_a_start_that_cannot_be_is_refused(start):
    config = dict(with_head("unet").base.adapter.config)
    with pytest.raises(ValueError, match=r"start must lie in \(0, 1\]"):
        DiffusionAdapter(**{k: v for k, v in config.items() if k[0] != "_"} | {"start": start})


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_to_nothing_returns_the_image(kind):
    model = with_head(kind)
    images = model.sample(["a"], 2, generator(), num_inference_steps=8)
    returned = model.edit(images, "a", context="a", num_inference_steps=20)
    edited = model.edit(images, ["b"], context="a", num_inference_steps=20)
    if kind == "unet":  # the others' autoencoders have random weights and return nothing
        psnr = -10 * torch.log10((returned - images).square().mean())
        assert psnr > 30
        assert (edited - images).abs().mean() > 3 * (returned - images).abs().mean()
    # What is returned without an intervention is what the model makes of the abducted noise,
    # whatever the autoencoder does to it.
    noise, residual = model.abduct(images, model.targets("a", 2), num_inference_steps=20)
    assert torch.equal(model.predict(noise, residual, "a", num_inference_steps=20), returned)


SAMPLERS = [
    "DDPM",
    "DDIM",
    "PNDM",
    "DPMSolverMultistep",
    "UniPCMultistep",
    "EulerDiscrete",
    "EulerAncestralDiscrete",
    "HeunDiscrete",
]


@pytest.mark.parametrize("name", SAMPLERS)
def test_any_scheduler_generates(name):
    pipe = InterventionPipeline.from_model(with_head())
    kind = getattr(
        diffusers,
        (
            f"{name.removesuffix('Discrete')}DiscreteScheduler"
            if name.endswith("Discrete")
            else f"{name}Scheduler"
        ),
    )
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    a, b = (
        pipe(["a", "b"], 2, generator(), output_type="pt", num_inference_steps=6).images
        for _ in range(2)
    )
    assert torch.equal(a, b) and a.std() > 0.05


def test_guidance_leads_away_from_the_observational_pass():
    model = with_head()
    draws = {
        "noise": randn(2, 3, 4),
        "residual_noise": randn(2, 3, 16, 16, seed=1),
        "num_inference_steps": 1,
    }
    obs, plain, guided = (
        model.sample(["a"] if w else "obs", guidance_scale=w or 1.0, **draws) for w in (0, 1.0, 2.0)
    )
    inside = (guided > 0) & (guided < 1) & (plain > 0) & (plain < 1) & (obs > 0) & (obs < 1)
    assert inside.float().mean() > 0.2
    torch.testing.assert_close(guided[inside], (2 * plain - obs)[inside], rtol=1e-3, atol=2e-3)
    with pytest.raises(ValueError, match="nothing is intervened on"):
        model.sample("obs", 1, guidance_scale=2.0)
    # What the model has of its own.
    assert torch.equal(model.sample(["a"], **draws), guided)
    assert torch.equal(model.sample("obs", **draws), obs)
    model.base.adapter.register_to_config(guidance=1.0)
    assert torch.equal(model.sample(["a"], **draws), plain)


def test_what_samples_start_from_is_not_guided(monkeypatch):
    model = with_head().eval()
    started = []
    start = model.base._start
    monkeypatch.setattr(model.base, "_start", lambda mean: started.append(mean) or start(mean))
    noise = randn(2, 3, 4)
    for options in ({"guidance_scale": 1.0}, {"guidance_scale": 3.0}):
        model.sample(["a", "b"], noise=noise, num_inference_steps=2, **options)
    expected = model.base.adapter.decode(model.embed(noise, model.targets(["a", "b"], 2)))
    for mean in started:
        torch.testing.assert_close(mean, expected)
    model.sample("a+b", noise=noise, num_inference_steps=2, guidance_scale=3.0, compose="scores")
    a, b, obs = (
        model.base.adapter.decode(model.embed(noise, model.targets(name, 2)))
        for name in ("a", "b", "obs")
    )
    torch.testing.assert_close(started[-1], a + b - obs)
