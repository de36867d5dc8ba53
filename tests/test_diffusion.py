"""Heads on denoisers: what enters, the objective, schedules and their inverse, saving and loading."""  # noqa: E501

import copy
import math
import sys
from concurrent.futures import ThreadPoolExecutor

import diffusers
import pytest
import torch
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
from diffusion_models import (
    KINDS,
    conditional,
    make,
    save_pipeline,
    save_vision,
    unet,
    vae,
    with_head,
)
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from hf_intervene import (
    InterventionConfig,
    InterventionModel,
    InterventionPipeline,
    cli,
    load_base,
    wrap_base,
)
from hf_intervene.bases import denoising
from hf_intervene.bases.adapter import DiffusionAdapter
from hf_intervene.bases.diffusion import PRECISION
from hf_intervene.bases.injection import Entries, Injection, find_sites
from hf_intervene.bases.loading import load_scheduler
from hf_intervene.bases.lora import add_lora, merged
from hf_intervene.terms import EditConsistency


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def test_the_commands_take_what_a_denoiser_does(tmp_path):
    InterventionPipeline.from_model(with_head()).save_pretrained(tmp_path / "pipe")
    pipe = InterventionPipeline.from_pretrained(tmp_path / "pipe")
    options = ["--interventions", "a", "--num-inference-steps", "3", "--guidance-scale", "2"]
    assert (
        cli.main(
            [
                "sample",
                str(tmp_path / "pipe"),
                "--num-images",
                "1",
                *options,
                "--output",
                str(tmp_path / "a"),
            ]
        )
        == 0
    )
    expected = pipe("a", 1, generator(), num_inference_steps=3, guidance_scale=2.0).images[0]
    image = Image.open(tmp_path / "a" / "0000.png")
    assert image.tobytes() == expected.tobytes()
    assert (
        cli.main(
            [
                "edit",
                str(tmp_path / "pipe"),
                str(tmp_path / "a" / "0000.png"),
                *options,
                "--output",
                str(tmp_path / "b"),
            ]
        )
        == 0
    )
    edited = pipe.edit(image, "a", num_inference_steps=3, guidance_scale=2.0).images[0]
    assert Image.open(tmp_path / "b" / "0000.png").tobytes() == edited.tobytes()


# What enters a denoiser


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_head_changes_nothing(kind):
    model, parts = make(kind)
    base = wrap_base(model, **parts)
    x, t = randn(3, *base.sample_shape), torch.tensor([900, 20, 400])
    with torch.no_grad():
        plain = base._call(x, t)[:, : x.shape[1]]
        assert torch.equal(base.denoise(x, t, 10 * randn(3, *base.embedding_shape)), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_every_sample_has_its_own_embedding(kind):
    base = with_head(kind).base
    x, t, e = (
        randn(3, *base.sample_shape),
        torch.tensor([900, 20, 400]),
        randn(3, *base.embedding_shape, seed=1),
    )
    with torch.no_grad():
        together = base.denoise(x, t, e)
        alone = torch.cat(
            [base.denoise(x[i : i + 1], t[i : i + 1], e[i : i + 1]) for i in range(3)]
        )
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
        other = base.denoise(x, t, e.roll(1, 0))
    assert (together - other).abs().amax((1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize(
    ("kind", "layer"),
    [("unet", "time_embedding.linear_2"), ("sd3", "time_text_embed.timestep_embedder.linear_2")],
)
def test_a_vector_is_added_to_the_time_embedding(kind, layer):
    base = with_head(kind).base
    del base.adapter.projections.input  # the vector alone
    if kind == "unet":
        del base.adapter.projections.map
    x, t, e = (
        randn(1, *base.sample_shape),
        torch.tensor([300]),
        randn(1, *base.embedding_shape, seed=1),
    )
    with torch.no_grad():
        entered = base.denoise(x, t, e)
        base.model.get_submodule(layer).bias += base.adapter.projections.vector(e)[0]
        torch.testing.assert_close(entered, base._call(x, t), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "layer"),
    [("unet", "conv_in"), ("conditional", "conv_in"), ("dit", "pos_embed.proj")],
)
def test_what_is_decoded_is_added_to_the_features_of_the_sample(kind, layer, monkeypatch):
    base = with_head(kind).base
    projections = base.adapter.projections
    for name in ("vector", "map"):
        if hasattr(projections, name):
            delattr(projections, name)
    for values in projections.values:
        values.weight.data.zero_()
    x, t, e = (
        randn(2, *base.sample_shape),
        torch.tensor([300, 20]),
        randn(2, *base.embedding_shape, seed=1),
    )
    with torch.no_grad():
        entered = base.denoise(x, t, e)
        features = projections.input(base.adapter.decoder(e))
        module = base.model.get_submodule(layer)
        plain = module.forward
        monkeypatch.setattr(module, "forward", lambda x: plain(x) + features)
        expected = base._call(x, t)[:, : x.shape[1]]
    torch.testing.assert_close(entered, expected, rtol=1e-4, atol=1e-5)


def test_a_sample_is_decoded_once_for_all_steps():
    model, calls = with_head("dit"), []
    model.base.adapter.decoder.register_forward_hook(lambda *_: calls.append(1))
    model.sample("a", 2, num_inference_steps=4)
    assert len(calls) == 1
    model.sample(["a", "b"], 2, num_inference_steps=4, compose="scores")
    assert len(calls) == 1 + 4  # a and b together, nothing, each of the two


def test_features_of_what_is_decoded_are_resized_with_the_sample():
    base = with_head("dit").base
    e = randn(1, *base.embedding_shape)
    with torch.no_grad():
        base.injection.set(base.adapter.entries(e))
        for side in (8, 12):
            x = randn(1, 4, side, side)
            plain = torch.nn.functional.conv2d(
                x, base.model.pos_embed.proj.weight, base.model.pos_embed.proj.bias, stride=2
            )
            found = base.model.pos_embed.proj(x) - plain
            features = base.adapter.entries(e).input
            size = (side // 2,) * 2
            expected = torch.nn.functional.interpolate(features, size, mode="bilinear")
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        base.injection.set(base.adapter.entries(randn(2, *base.embedding_shape)))
        frames = base.model.pos_embed.proj(torch.zeros(6, 4, 8, 8))  # three of each of two clips
        assert all(torch.equal(frames[3 * n], frames[3 * n + 2]) for n in range(2))
        assert not torch.equal(frames[0], frames[3])
    base.injection.clear()


def test_tokens_are_attended_to_beside_the_text():
    """The branch of one cross-attention layer against loops over heads and queries."""
    model, _ = make("conditional")
    injection, name = Injection(model), find_sites(model).tokens[0]
    layer = model.get_submodule(name)
    hidden, text = randn(2, 5, layer.query_dim), randn(2, 3, 12, seed=1)
    keys, values = randn(2, 4, layer.inner_dim, seed=2), randn(2, 4, layer.inner_dim, seed=3)
    with torch.no_grad():
        plain = layer(hidden, encoder_hidden_states=text)
        injection.install()
        injection.set(
            Entries(keys=(keys,) * len(injection.layers), values=(values,) * len(injection.layers))
        )
        entered = layer(hidden, encoder_hidden_states=text)
        injection.remove()
        assert torch.equal(layer(hidden, encoder_hidden_states=text), plain)
        query, width = layer.to_q(hidden), layer.inner_dim // layer.heads
        branch = torch.zeros_like(query)
        for b in range(2):
            for n in range(5):
                for h in range(layer.heads):
                    part = slice(h * width, (h + 1) * width)
                    scores = torch.stack(
                        [query[b, n, part] @ keys[b, k, part] / math.sqrt(width) for k in range(4)]
                    )
                    branch[b, n, part] = sum(
                        w * values[b, k, part] for k, w in enumerate(scores.softmax(0))
                    )
        expected = (
            plain + (layer.to_out[0](branch) - layer.to_out[0].bias) / layer.rescale_output_factor
        )
        torch.testing.assert_close(entered, expected, rtol=1e-4, atol=1e-5)


def test_entries_add_up_and_are_weighted():
    entries = with_head("conditional").base.adapter.entries(randn(2, 4, 12))
    doubled = entries.weighted(2.0)
    assert all(torch.equal(2 * a, b) for a, b in zip(entries.values, doubled.values))
    # the softmax is not a weight
    assert all(torch.equal(a, b) for a, b in zip(entries.keys, doubled.keys))
    assert torch.equal(
        entries.rows(torch.tensor([1, 1, 0])).values[0], entries.values[0][[1, 1, 0]]
    )


def test_a_copy_of_a_denoiser_does_not_keep_what_entered():
    model = with_head("unet")
    x, t, e = randn(2, 3, 16, 16), torch.tensor([5, 500]), randn(2, 128, seed=1)
    with torch.no_grad():
        plain = model.base._call(x, t)
        entered = model.base.denoise(x, t, e)
        model.base.injection.set(model.base.adapter.entries(e))
        copied = copy.deepcopy(model)
        assert torch.equal(copied.base.model(x, t).sample, plain)
        assert torch.equal(copied.base.denoise(x, t, e), entered)
    model.base.injection.clear()


@pytest.mark.parametrize("kind", ["unet", "conditional"])
def test_lora_added_later_is_entered_too(kind):
    model = with_head(kind)
    base = model.base
    x, t, e = (
        randn(2, *base.sample_shape),
        torch.tensor([5, 500]),
        randn(2, *base.embedding_shape, seed=1),
    )
    with torch.no_grad():
        entered, plain = base.denoise(x, t, e), base._call(x, t)
    add_lora(base.model, 2)
    with torch.no_grad():
        torch.testing.assert_close(base.denoise(x, t, e), entered)  # LoRA layers start at zero
        for name, parameter in base.model.named_parameters():
            parameter.data += 0.1 * (".lora_" in name)
        assert not torch.allclose(base.denoise(x, t, e), entered)
        whole = merged(base.model)
        again = wrap_base(whole, **base.companions(), adapter=base.adapter)
        torch.testing.assert_close(
            again.denoise(x, t, e), base.denoise(x, t, e), rtol=1e-4, atol=1e-5
        )
    assert not torch.equal(entered, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    model = with_head(kind)
    draws = model.posterior_draws(3, generator())
    x, s = (
        torch.rand(3, 3, 16, 16, generator=generator(1)),
        model.targets([["a"], "obs", ["a", "b"]]),
    )

    def gradients():
        model.zero_grad()
        model(x, s, **draws).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.train()
    model.base.model.enable_gradient_checkpointing()
    found = gradients()
    assert plain.keys() == found.keys() and any("exogenous" in name for name in plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4, msg=name)
    # Another wrapper of the same denoiser is not disturbed by what the checkpointed one has left.
    fresh = with_head(kind)
    other = wrap_base(model.base.model, **model.base.companions(), adapter=model.base.adapter)
    e = randn(3, *other.embedding_shape)
    with torch.no_grad():
        noisy, t = randn(3, *other.sample_shape), torch.tensor([3, 30, 300])
        torch.testing.assert_close(
            other.eval().denoise(noisy, t, e), fresh.base.denoise(noisy, t, e)
        )


# The objective


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_targets_and_weights_of_a_diffusion(kind, gamma):
    scheduler = DDPMScheduler(prediction_type=kind)
    x0, noise, time = (
        randn(4, 1, 2, 2),
        randn(4, 1, 2, 2, seed=1),
        torch.tensor([0.0, 0.1, 0.5, 0.9999]),
    )
    noisy, timesteps, target, weight = denoising.noised(scheduler, x0, noise, time, gamma)
    for i in range(4):
        t = int(time[i] * 1000)
        a, s = scheduler.alphas_cumprod[t].sqrt(), (1 - scheduler.alphas_cumprod[t]).sqrt()
        assert timesteps[i] == t
        torch.testing.assert_close(noisy[i], a * x0[i] + s * noise[i])
        torch.testing.assert_close(
            target[i], noise[i] if kind == "epsilon" else a * noise[i] - s * x0[i]
        )
        snr = (a / s) ** 2
        expected = (
            1.0 if gamma is None else min(snr, gamma) / (snr if kind == "epsilon" else snr + 1)
        )
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
    noisy, timesteps, target, weight = denoising.noised(scheduler, x0, noise, time)
    sigma = timesteps / 1000
    torch.testing.assert_close(
        noisy, (1 - sigma)[:, None, None, None] * x0 + sigma[:, None, None, None] * noise
    )
    assert torch.equal(target, noise - x0) and torch.equal(weight, torch.ones(3))
    # 3 u / (1 + 2 u), u = 1/2
    assert sigma[0] > sigma[1] > sigma[2] > 0 and abs(float(sigma[1]) - 0.75) < 0.01
    with pytest.raises(ValueError, match="a flow has no such weights"):
        denoising.noised(scheduler, x0, noise, time, 5.0)
    # A solver of other kinds too, whose sigmas are not the flow's before it samples.
    solver = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    found = denoising.noised(denoising.training_scheduler(solver), x0, noise, time)
    for one, other in zip(found, (noisy, timesteps, target, weight)):
        torch.testing.assert_close(one, other)
    solver.set_timesteps(7)
    torch.testing.assert_close(solver.sigmas[:-1], solver.timesteps / 1000, atol=2e-3, rtol=0)


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
    noisy, t, target, _ = denoising.noised(
        model.base._training_scheduler,
        model.base.prepare(x)["x0"],
        draws["residual_noise"],
        draws["time"],
    )
    errors = (model.base.denoise(noisy, t, e) - target).square().sum((1, 2, 3))
    expected = PRECISION * errors
    torch.testing.assert_close(output.reconstruction_loss, expected, rtol=1e-4, atol=1e-3)
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


@pytest.mark.parametrize("scheduler", SCHEDULES, ids=denoising.PREDICTIONS)
def test_the_path_is_that_of_the_scheduler(scheduler):
    def predict(x, t):
        return torch.tanh(x + t / 1000)

    noise = randn(2, 3, 4, 4)
    # DDIM's own grid is even only where it divides its 1,000 steps
    found = denoising.follow(predict, scheduler, noise, 10)
    torch.testing.assert_close(
        found, denoising.generate(predict, scheduler, noise, 10), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("scheduler", SCHEDULES, ids=denoising.PREDICTIONS)
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


SOLVERS = [
    *SCHEDULES,
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
    kind, seen = denoising.prediction_type(scheduler), []
    alphas = getattr(scheduler, "alphas_cumprod", None)

    def predict(x, t):
        if kind == "flow":
            a, s = 1 - float(t) / 1000, float(t) / 1000
        else:
            a, s = float(alphas[int(t)].sqrt()), float((1 - alphas[int(t)]).sqrt())
        seen.append((x, a, s))
        e = (x - a * x0) / s
        return {"epsilon": e, "v_prediction": a * e - s * x0, "flow": e - x0}[kind]

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


@pytest.mark.parametrize("scheduler", SCHEDULES, ids=denoising.PREDICTIONS)
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


# Saving and loading


@pytest.mark.parametrize("kind", KINDS)
def test_round_trips(kind, tmp_path):
    model = with_head(kind)
    call = {"generator": generator(), "num_inference_steps": 3}
    images = model.sample(["a", "b"], 2, **call)
    model.save_pretrained(tmp_path / "model")
    call["generator"] = generator()
    assert torch.equal(
        InterventionModel.from_pretrained(tmp_path / "model").sample(["a", "b"], 2, **call), images
    )
    InterventionPipeline.from_model(model).save_pretrained(tmp_path / "pipe")
    pipe = InterventionPipeline.from_pretrained(tmp_path / "pipe")
    call["generator"] = generator()
    assert torch.equal(pipe(["a", "b"], 2, output_type="pt", **call).images, images)
    assert all(
        path.suffix in (".json", ".safetensors", ".py")
        for path in tmp_path.rglob("*")
        if path.is_file()
    )


@pytest.mark.parametrize("regime", ["frozen", "lora", "end-to-end"])
def test_only_what_was_trained_is_saved(regime, tmp_path):
    source = save_pipeline("dit", tmp_path / "dit")
    base = load_base(source, 16, image_encoder=save_vision(tmp_path / "vit"))
    model = InterventionModel.build(base, ["a", "b"], noise_width=4).eval()
    if regime == "lora":
        add_lora(base.model, 2)
        model.config.lora_rank = model.head.config.lora_rank = 2
    for name, parameter in model.named_parameters():
        if {"frozen": "projections", "lora": ".lora_", "end-to-end": "base.model"}[regime] in name:
            parameter.data += 0.1
    model.save_pretrained(tmp_path / "model")
    folders = {path.name for path in (tmp_path / "model").iterdir() if path.is_dir()}
    own = {"frozen": set(), "lora": {"lora"}, "end-to-end": {"base"}}[regime]
    assert folders == {"adapter", "scheduler", "image_processor"} | own
    loaded = InterventionModel.from_pretrained(tmp_path / "model")
    call = {"num_images": 2, "num_inference_steps": 3}
    assert torch.equal(
        loaded.sample("a", generator=generator(), **call),
        model.sample("a", generator=generator(), **call),
    )
    x = torch.rand(2, 3, 16, 16, generator=generator())
    assert torch.equal(
        loaded.posterior(x, loaded.targets("a", 2))[0], model.posterior(x, model.targets("a", 2))[0]
    )
    # The frozen models beside the denoiser are known by their hash too.
    save_pipeline("dit", source, seed=1)
    with pytest.raises(ValueError, match="is not the base that the head was trained on"):
        InterventionModel.from_pretrained(tmp_path / "model")


def test_features_of_a_vision_model(tmp_path):
    save_vision(tmp_path / "vit")
    base = load_base(save_pipeline("unet", tmp_path / "ddpm"), 16, image_encoder=tmp_path / "vit")
    images = torch.randint(256, (3, 3, 16, 16), generator=generator(), dtype=torch.uint8)
    expected = AutoImageProcessor.from_pretrained(tmp_path / "vit")(
        list(images), return_tensors="pt"
    )
    with torch.no_grad():
        expected = ViTModel.from_pretrained(tmp_path / "vit").eval()(**expected).pooler_output
    # dropout stays off
    torch.testing.assert_close(base.train().encode(images.float() / 255).features, expected)
    assert base.feature_width == 16 and not hasattr(base.adapter, "encoder")
    # One that was saved as part of a classifier has no pooler, and none is drawn.
    ViTForImageClassification(ViTConfig.from_pretrained(tmp_path / "vit")).save_pretrained(
        tmp_path / "vit"
    )
    features = [
        load_base(tmp_path / "ddpm", 16, image_encoder=tmp_path / "vit")
        .encode(images.float() / 255)
        .features
        for _ in range(2)
    ]
    assert features[0].shape == (3, 16) and torch.equal(*features)
    model = InterventionModel.build(base, ["a"], posterior="unconditional")
    # the linear readout of the paper
    assert isinstance(model.head.encoder_readout, torch.nn.Linear)


# Bad input


def test_a_denoiser_of_classes_is_given_one(tmp_path):
    """The same for all images, kept with the adapter."""
    _, parts = make("unet")
    torch.manual_seed(0)
    denoiser = unet(num_class_embeds=3).eval()
    model = InterventionModel.build(
        wrap_base(denoiser, class_label=2, **parts), ["a", "b"], noise_width=4
    ).eval()
    model.save_pretrained(tmp_path)
    loaded = InterventionModel.from_pretrained(tmp_path)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([10, 900])
    with torch.no_grad():
        expected = denoiser(
            x, t, class_labels=torch.tensor([2, 2])
        ).sample  # a new head changes nothing
        for base in (model.base, loaded.base):
            assert torch.allclose(
                base.denoise(x, t, torch.zeros(2, *base.embedding_shape)), expected, atol=1e-5
            )
    model(torch.rand(2, 3, 16, 16), model.targets([["a"], []])).loss.backward()
    for label in (None, 3):
        with pytest.raises(
            ValueError, match="conditioned on classes: give class_label, from 0 to 2"
        ):
            wrap_base(denoiser, class_label=label, **parts)
    with pytest.raises(ValueError, match="has no classes: leave class_label out"):
        wrap_base(unet(), class_label=1, **parts)


def test_one_sentence_for_what_does_not_fit(tmp_path):
    model, parts = make("unet")
    with pytest.raises(ValueError, match="needs the scheduler"):
        wrap_base(model)
    with pytest.raises(TypeError, match="must be a scheduler of diffusers"):
        wrap_base(model, scheduler=model)
    with pytest.raises(ValueError, match="predicts 'sample' is not supported"):
        wrap_base(model, scheduler=DDPMScheduler(prediction_type="sample"))
    with pytest.raises(ValueError, match="conditioned on classes"):
        wrap_base(unet(num_class_embeds=3), **parts)
    text = make("conditional")[1]
    for options in ({"num_class_embeds": 3}, {"encoder_hid_dim": 5}):
        with pytest.raises(ValueError, match="wants more than text .*PipelineBase.from_pipeline"):
            wrap_base(conditional(**options), **text)
    with pytest.raises(
        ValueError, match="denoises 3 channels, but the AutoencoderKL makes latents of 4"
    ):
        wrap_base(model, vae=vae(), **parts)
    adapter = with_head().base.adapter
    with pytest.raises(
        ValueError, match="trained with 'v_prediction' predictions, but this DDIMScheduler"
    ):
        wrap_base(model, scheduler=DDIMScheduler(), adapter=adapter)
    other = {
        "scheduler": DDIMScheduler(),
        "vae": vae(),
        "adapter": with_head("conditional").base.adapter,
    }
    with pytest.raises(
        ValueError, match="its cross-attention width is 12, that of this UNet2DConditionModel is 20"
    ):
        wrap_base(conditional(cross_attention_dim=20), **other)
    with pytest.raises(ValueError, match="does not say what size"):
        wrap_base(unet(sample_size=None), **parts)
    with pytest.raises(ValueError, match="ablation 'base'"):
        InterventionModel(
            InterventionConfig(concepts=["a"], ablation="base"), wrap_base(model, **parts)
        )
    built = with_head()
    with pytest.raises(ValueError, match="residual_noise has 1 rows for 2 samples"):
        built.sample("a", 2, residual_noise=torch.zeros(1, 3, 16, 16))
    with pytest.raises(TypeError, match="takes no return_reconstruction"):
        built(torch.rand(1, 3, 16, 16), built.targets("a"), return_reconstruction=True)
    for steps in (0, -1, 2000, 2.5):
        with pytest.raises(
            ValueError, match=f"a whole number from 1 to 1000, those of the scheduler, not {steps}"
        ):
            built.sample("a", 2, num_inference_steps=steps)
        with pytest.raises(
            ValueError, match=f"a whole number from 1 to 1000, those of the scheduler, not {steps}"
        ):
            built.edit(torch.rand(2, 3, 16, 16), "a", num_inference_steps=steps)
    pipe = InterventionPipeline.from_model(built)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="takes the denoiser's for 'flow'"):
        pipe("a")
    model.save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match="without its scheduler"):
        load_base(tmp_path / "unet", 16)
    source = save_pipeline("unet", tmp_path / "ddpm")
    with pytest.raises(ValueError, match="has no residual latents"):
        load_base(source, 16, residual_layers=2)
    with pytest.raises(ValueError, match="no vision model"):
        load_base(source, 16, image_encoder=tmp_path / "unet")


def test_a_scheduler_that_clips_latents_is_warned_of(capsys):
    for kind, scheduler, warned in (
        ("dit", DDPMScheduler(), True),
        ("dit", DDPMScheduler(clip_sample=False), False),
        ("dit", DDPMScheduler(clip_sample_range=8.0), False),
        ("unet", DDPMScheduler(), False),  # of pixels
    ):
        model, parts = make(kind)
        wrap_base(model, **parts | {"scheduler": scheduler})
        assert ("the scheduler clips samples at 1" in capsys.readouterr().err) == warned


def test_a_scheduler_is_nothing_but_a_scheduler(tmp_path):
    for name in ("DiffusionPipeline", "os", "UNet2DModel"):
        (tmp_path / "scheduler_config.json").write_text(f'{{"_class_name": "{name}"}}')
        with pytest.raises(ValueError, match="no scheduler of this version"):
            load_scheduler(tmp_path, "it")
    (tmp_path / "scheduler_config.json").write_text("{")
    with pytest.raises(OSError, match="truncated"):
        load_scheduler(tmp_path, "it")
    (tmp_path / "scheduler_config.json").unlink()
    with pytest.raises(OSError, match="has no scheduler"):
        load_scheduler(tmp_path, "it")


@pytest.mark.parametrize("kind", KINDS)
def test_threads_share_a_denoiser(kind):
    """Each call has what it was given, whatever another thread does meanwhile."""
    model = with_head(kind)
    noise = torch.randn(4, *model.noise_shape, generator=torch.Generator().manual_seed(0))
    residual = torch.randn(4, *model.base.sample_shape, generator=torch.Generator().manual_seed(1))

    def sample(row):
        context, part = ("obs", "a", "b", "a+b")[row], slice(row, row + 1)
        return model.sample(
            context, noise=noise[part], residual_noise=residual[part], num_inference_steps=4
        )

    expected, interval = [sample(row) for row in range(4)], sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(sample, list(range(4)) * 2))
    finally:
        sys.setswitchinterval(interval)
    for image, same in zip(found, expected * 2):
        torch.testing.assert_close(image, same, rtol=0, atol=1e-5)
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)  # or it would not matter
