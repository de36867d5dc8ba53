"""Residual latents: the prior against its formulas, the objective term by term, edits that keep
them, training, leakage.
"""

from functools import partial

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from hf_intervene import InterventionModel, InterventionPipeline, evaluation, trainer, wrap_base
from hf_intervene.bases.residual import ResidualPrior
from hf_intervene.metrics import context_leakage
from hf_intervene.trainer import TrainArguments


def autoencoder(kind="kl"):
    torch.manual_seed(0)
    if kind == "tiny":
        blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
        return AutoencoderTiny(**blocks, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
    }
    return AutoencoderKL(block_out_channels=(8, 16), scaling_factor=0.7, shift_factor=0.2, **blocks)


def shaken(module, std=0.1):
    """Random weights everywhere: zero-initialised layers would hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p += std * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return module


def build(kind="kl", **options):
    model = InterventionModel.build(
        wrap_base(autoencoder(kind), sample_size=16, residual_layers=4),
        ["a", "b"],
        noise_width=4,
        initializer_range=0.5,
        **options,
    ).eval()
    shaken(model.base.adapter.residual_prior, 0.03)
    return model


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_prior_is_invertible_and_its_density_is_that_of_the_map(channels):
    torch.manual_seed(0)
    prior = shaken(ResidualPrior(channels, layers=5, hidden=6))
    m, rho = torch.randn(2, channels, 3, 3), torch.randn(2, channels, 3, 3)
    r = prior(rho, m)
    found, log_density = prior.inverse(r, m)
    torch.testing.assert_close(found, rho, rtol=0, atol=1e-4)
    # log N(rho; 0, I) - log |det dr/drho|, the determinant from the whole Jacobian
    for k in range(2):
        one = partial(prior, m=m[k : k + 1])
        jacobian = torch.autograd.functional.jacobian(one, rho[k : k + 1]).flatten(4).flatten(0, 3)
        expected = (
            torch.distributions.Normal(0, 1).log_prob(rho[k]).sum() - jacobian.double().slogdet()[1]
        )
        torch.testing.assert_close(log_density[k], expected.float(), rtol=1e-4, atol=1e-3)
    assert (r - m).abs().max() > 0.1


def test_a_new_prior_is_a_plain_gaussian():
    prior, m, r = ResidualPrior(4, layers=4), torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    expected = torch.distributions.Normal(m, 1).log_prob(r).flatten(1).sum(1)
    torch.testing.assert_close(prior.inverse(r, m)[1], expected)


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_the_objective_term_by_term(kind):
    model = build(kind)
    x, s = torch.rand(3, 3, 16, 16), model.targets([["a"], ["a", "b"], None])
    noise, residual_noise = (
        torch.randn(3, *model.noise_shape),
        torch.randn(3, *model.base.noise_shapes["residual_noise"]),
    )
    out = model(
        x,
        s,
        beta=2.0,
        noise=noise,
        residual_weight=0.5,
        residual_noise=residual_noise,
    )
    vae, adapter = model.base.model, model.base.adapter
    with torch.no_grad():
        if kind == "kl":
            q = vae.encode(2 * x - 1).latent_dist
            mean, std = (q.mean - 0.2) * 0.7, q.std * 0.7
            scale, shift = 0.7, 0.2
        else:
            mean, scale, shift = vae.encode(2 * x - 1).latents, 1.0, 0.0
            std = torch.full_like(mean, 0.05)
        r = mean + std * residual_noise
        log_q = torch.distributions.Normal(mean, std).log_prob(r).flatten(1).sum(1)
        z = out.posterior_mean + (0.5 * out.posterior_logvar).exp() * noise
        m = adapter.network.decoder(model.head(z, s).embedding)
        log_p = adapter.residual_prior.inverse(r, m)[1]
        torch.testing.assert_close(out.residual_kl, log_q - log_p, rtol=1e-4, atol=1e-2)
        decoded = vae.decode(r / scale + shift).sample / 2 + 0.5
        pixels = (
            torch.distributions.Normal(decoded, (0.5 * adapter.residual_log_variance).exp())
            .log_prob(x)
            .flatten(1)
            .sum(1)
        )
        torch.testing.assert_close(out.reconstruction_loss, -pixels, rtol=1e-4, atol=1e-2)
        alone = vae.decode(m / scale + shift).sample / 2 + 0.5
        pixels = (
            torch.distributions.Normal(alone, (0.5 * adapter.log_variance).exp())
            .log_prob(x)
            .flatten(1)
            .sum(1)
        )
        torch.testing.assert_close(out.bottleneck_loss, -pixels, rtol=1e-4, atol=1e-2)
    expected = (
        out.reconstruction_loss + out.bottleneck_loss + 2 * out.kl + 0.5 * out.residual_kl
    ).mean()
    torch.testing.assert_close(out.loss, expected)


def test_an_edit_keeps_the_residual_and_changing_nothing_returns_the_image():
    model = build()
    x = torch.rand(3, 3, 16, 16)
    vae = model.base.model
    with torch.no_grad():
        own = (vae.decode(vae.encode(2 * x - 1).latent_dist.mean).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(model.reconstruct(x, "a"), own, rtol=0, atol=1e-4)
    edited = model.edit(x, ["a", "b"])
    assert (edited - own).abs().max() > 1e-3
    z, rho = model.abduct(x, model.targets("obs", 3))
    by_hand = model.decode(z, model.targets(["a", "b"], 3), {"residual_noise": rho})
    torch.testing.assert_close(edited, by_hand.clamp(0, 1), rtol=0, atol=1e-5)


def test_samples_follow_generator_and_scale():
    model = build()
    noise = torch.randn(2, *model.noise_shape)
    draw = [
        model.sample("a", noise=noise, generator=torch.Generator().manual_seed(k))
        for k in (0, 0, 1)
    ]
    assert torch.equal(draw[0], draw[1]) and not torch.allclose(draw[0], draw[2])
    still = [model.sample("a", noise=noise, residual_scale=0.0) for _ in range(2)]
    assert torch.equal(*still)
    with torch.no_grad():
        none = {name: torch.zeros_like(x) for name, x in model.base.draws(2).items()}
        expected = model.decode(noise, model.targets("a", 2), none)
    torch.testing.assert_close(still[0], expected)


def test_train_save_load_and_measure(tiny, tmp_path):
    autoencoder().save_pretrained(tmp_path / "vae")
    settings = tiny | {
        "base": str(tmp_path / "vae"),
        "regime": "frozen",
        "residual_layers": 2,
        "residual_weight": 0.5,
    }
    # more makes differences of rounding larger, with which Adam goes on
    settings |= {
        "context_prediction": 1.0,
        "free_invariance": 1.0,
    }
    whole = trainer.train(TrainArguments(**settings | {"output_dir": str(tmp_path / "whole")}))
    trainer.train(
        TrainArguments(
            **settings | {"gradient_accumulation_steps": 2, "output_dir": str(tmp_path / "parts")}
        )
    )
    model, parts = (
        InterventionModel.from_pretrained(tmp_path / name / "model") for name in ("whole", "parts")
    )
    for name, value in model.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-3, atol=1e-3)
    assert model.base.noise_shapes == {"residual_noise": (4, 8, 8)} and whole.step == 8
    rng = np.random.default_rng(0)
    names = ("obs", "quad1", "size", "quad1+size")
    real, other = (
        {name: rng.integers(0, 256, (24, 16, 16, 3), dtype=np.uint8) for name in names}
        for _ in range(2)
    )
    metrics = evaluation.evaluate(model, real, other, ("independent",), 20, edits=True)
    assert metrics["leakage"]["chance"] == pytest.approx(1 / 3)
    returned = model.reconstruct(real["obs"], output_type="np")
    assert metrics["reconstruction_psnr"] == pytest.approx(
        -10 * np.log10(((returned - real["obs"] / 255) ** 2).mean())
    )
    assert (
        "edit" not in metrics["contexts"]["obs"]
        and metrics["means"]["composition"]["edit"]["distance"] > 0
    )
    assert 0 < metrics["contexts"]["size"]["routes"]["change"] < 1
    table = evaluation.table(metrics)
    assert "Leakage: the context is told" in table and "| quad1+size |" in table
    pipe = InterventionPipeline.from_model(model)
    pipe.save_pretrained(tmp_path / "pipeline")
    loaded = InterventionPipeline.from_pretrained(tmp_path / "pipeline")
    call = {"interventions": ["quad1", "size"], "num_images": 2, "output_type": "pt"}
    images = [p(generator=torch.Generator().manual_seed(0), **call).images for p in (pipe, loaded)]
    assert torch.equal(*images)


def test_leakage_is_found_where_there_is_some_and_only_there():
    rng = np.random.default_rng(0)
    contexts = np.repeat(["obs", "a", "b"], 200)
    noise = rng.normal(size=(600, 4, 4, 4))
    blind = context_leakage(noise, contexts)
    assert abs(blind.accuracy - 1 / 3) < 0.06
    assert blind.interval[0] < 1 / 3 < blind.interval[1] + 0.03
    shifted = noise.copy()
    shifted[contexts == "a", 0, 0, 0] += 2
    assert context_leakage(shifted, contexts).interval[0] > 0.4
    wider = noise * np.where(contexts == "b", 1.5, 1.0)[:, None, None, None]
    assert context_leakage(wider, contexts).interval[0] > 0.5
    with pytest.raises(ValueError, match="at least two contexts"):
        context_leakage(noise[:200], contexts[:200])


def test_draws_do_not_leak_where_means_do():
    """The exact posterior of a model without leakage, r = a_k z + rho: the residual noise of means
    tells the contexts apart.
    """
    rng = np.random.default_rng(0)
    means, draws, contexts = [], [], []
    for name, a in (("obs", 0.0), ("a", 1.0)):
        z, rho = rng.normal(size=(2, 400, 64))
        r = a * z + rho
        mean, std = a * r / (a * a + 1), (a * a + 1) ** -0.5
        means.append(r - a * mean)
        draws.append(r - a * (mean + std * rng.normal(size=z.shape)))
        contexts += [name] * 400
    assert context_leakage(np.concatenate(means), np.array(contexts)).accuracy > 0.9
    assert abs(context_leakage(np.concatenate(draws), np.array(contexts)).accuracy - 0.5) < 0.06


def test_abducted_draws_are_the_posterior():
    model = build()
    x, s = torch.rand(1, 3, 16, 16).expand(64, -1, -1, -1), model.targets("a", 64)
    with torch.no_grad():
        z, rho = model.abduct(x, s, torch.Generator().manual_seed(0))
        mean, logvar = model.posterior(x[:1], s[:1])
        latents = model.base.adapter.residual_prior(rho, model.base._asked_for(model.embed(z, s)))
        q = model.base.model.encode(2 * x[:1] - 1).latent_dist
    standard = (z - mean) / (0.5 * logvar).exp()
    assert abs(standard.mean()) < 0.05 and abs(standard.std() - 1) < 0.05
    standard = (latents / 0.7 + 0.2 - q.mean) / q.std
    assert abs(standard.mean()) < 0.05 and abs(standard.std() - 1) < 0.05


def test_settings_that_make_no_sense(tiny):
    with pytest.raises(ValueError, match="residual latents need a pretrained autoencoder"):
        TrainArguments(**tiny | {"residual_layers": 2})
