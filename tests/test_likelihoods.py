"""Likelihoods: code lengths are those of distributions over bytes, and bits per pixel are made of
them.
"""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from hf_intervene import InterventionModel, LightVAE, evaluation
from hf_intervene.bases.likelihoods import (
    bernoulli_code_length,
    bernoulli_loss,
    gaussian_code_length,
    gaussian_loss,
)
from hf_intervene.metrics import entropy_bits


# every image of one pixel, and of two: (n, 1, 1, pixels)
BYTES = torch.arange(256.0) / 255
IMAGES = {
    1: BYTES[:, None, None, None],
    2: torch.cartesian_prod(BYTES, BYTES)[:, None, None],
}
LOGITS = (-300.0, -4.0, -1e-7, 0.0, 2.0, 60.0)


def gaussian(mean, std):
    def length(x):
        return gaussian_code_length(torch.full_like(x, mean), x, torch.tensor(2 * np.log(std)))

    return length


@pytest.mark.parametrize("pixels", [1, 2])
@pytest.mark.parametrize("logit", LOGITS)
def test_probabilities_of_all_images_sum_to_one_bernoulli(pixels, logit):
    x = IMAGES[pixels]
    lengths = bernoulli_code_length(torch.full_like(x, logit), x)
    assert (-lengths.double()).exp().sum().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("pixels", [1, 2])
@pytest.mark.parametrize("mean", [-0.2, 0.0, 0.31, 1.0, 1.4])
@pytest.mark.parametrize("std", [0.0005, 0.02, 0.2, 5.0])
def test_probabilities_of_all_images_sum_to_one_gaussian(pixels, mean, std):
    lengths = gaussian(mean, std)(IMAGES[pixels])
    assert (-lengths.double()).exp().sum().item() == pytest.approx(1, abs=1e-4)
    assert torch.isfinite(lengths).all()


def test_the_unnormalised_losses_do_not_sum_to_one():
    x = IMAGES[1]
    assert (-bernoulli_loss(torch.zeros_like(x), x)).exp().sum() > 100
    assert (-gaussian_loss(torch.full_like(x, 0.5), x, torch.tensor(-6.0))).exp().sum() > 100


def test_each_probability_is_that_of_its_interval():
    mean, std = 0.31, 0.04
    edges = np.concatenate([[-np.inf], (np.arange(255) + 0.5) / 255, [np.inf]])
    expected = np.diff(norm.cdf(edges, mean, std))
    found = (-gaussian(mean, std)(IMAGES[1]).double()).exp().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)
    weights = np.exp(-bernoulli_loss(torch.full_like(IMAGES[1], 1.3), IMAGES[1]).double().numpy())
    found = (-bernoulli_code_length(torch.full_like(IMAGES[1], 1.3), IMAGES[1])).exp().numpy()
    np.testing.assert_allclose(found, weights / weights.sum(), rtol=1e-4)


def test_far_bytes_have_finite_lengths_that_grow_like_the_density():
    """Hundreds of standard deviations away, on both sides."""
    lengths = gaussian(0.5, 0.002)(IMAGES[1])
    assert torch.isfinite(lengths).all() and lengths[0] > 10_000
    assert lengths[10].item() == pytest.approx(lengths[245].item(), rel=1e-6)


def test_a_fine_gaussian_has_the_density_times_the_interval():
    g = torch.Generator().manual_seed(0)
    x = torch.randint(20, 235, (5, 3, 8, 8), generator=g) / 255
    mean = x + 0.1 * torch.randn(x.shape, generator=g)
    log_variance = torch.tensor(-3.0)
    near = gaussian_loss(mean, x, log_variance) + x[0].numel() * np.log(255)
    torch.testing.assert_close(
        gaussian_code_length(mean, x, log_variance), near, rtol=1e-4, atol=0.05
    )


def tiny_model(likelihood):
    torch.manual_seed(0)
    base = LightVAE(1, 2, (4,), hidden_width=8, latent_width=4, norm="none", likelihood=likelihood)
    model = InterventionModel.build(base, ["a"], mechanism="flow", concept_width=2, free_blocks=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.eval()


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_the_code_of_a_model_needs_no_more_than_all_words(likelihood):
    """Kraft: over all bytes of one pixel, the others known, exp(-ELBO) sums to no more than the
    probability of the others. It holds for every draw of concepts, so the encoder is shut out.
    """
    model = tiny_model(likelihood)
    x = torch.rand(1, 1, 2, 2).mul(255).round().div(255).repeat(256, 1, 1, 1)
    x[:, 0, 1, 0] = BYTES
    embedding = torch.randn(1, 4, 1, 1).repeat(256, 1, 1, 1)
    with torch.no_grad():
        encoded = model.base.encode(x)
        lengths = model.base.code_length(embedding, encoded, {})["reconstruction_loss"].double()
        logits = model.base.model.decode(embedding).sample.double()
    others = torch.ones(2, 2, dtype=torch.bool)
    others[1, 0] = False
    known = (
        bernoulli_code_length(logits[:1, :, others], x[:1, :, others])
        if likelihood == "bernoulli"
        else gaussian_code_length(
            logits[:1, :, others].sigmoid(), x[:1, :, others], model.base.model.log_variance
        )
    )
    assert torch.logsumexp(-lengths, 0).item() == pytest.approx(-known.item(), abs=1e-3)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_bits_per_pixel_are_the_code_length(likelihood):
    model = tiny_model(likelihood)
    g = np.random.default_rng(0)
    real = {"obs": g.integers(0, 256, (24, 2, 2, 1), dtype=np.uint8)}
    metrics = evaluation.evaluate(model, real, real, ("independent",), 10)
    row = metrics["contexts"]["obs"]
    x = torch.from_numpy(real["obs"]).permute(0, 3, 1, 2) / 255
    generator = torch.Generator().manual_seed(0)
    torch.randn(24, *model.noise_shape, generator=generator)  # of the samples
    noise = torch.randn(24, *model.draw_shape, generator=generator)
    with torch.no_grad():
        outputs = [
            model(x, model.targets("obs", 24), noise=noise, code_length=c) for c in (True, False)
        ]
    lengths, losses = (
        (o.reconstruction_loss + o.kl).mean().item() / 4 / np.log(2) for o in outputs
    )
    assert row["bits_per_pixel"] == pytest.approx(lengths, rel=1e-4)
    assert metrics["code_length"] and lengths > losses
    if likelihood == "gaussian":
        assert "bernoulli_bits_per_pixel" not in row
        return
    assert row["bernoulli_bits_per_pixel"] == pytest.approx(losses, rel=1e-4)
    entropy = entropy_bits(real["obs"])
    assert row["bits_above_entropy"] == pytest.approx(losses - entropy, rel=1e-4)
    assert "no code length" in evaluation.table(metrics)


def test_no_bernoulli_is_below_the_entropy():
    images = np.array([0, 17, 255, 128], np.uint8).reshape(4, 1, 1, 1)
    p = np.array([17, 128]) / 255
    expected = -(p * np.log2(p) + (1 - p) * np.log2(1 - p)).sum() / 4
    assert entropy_bits(images) == pytest.approx(expected)
    x = torch.from_numpy(images) / 255
    best = bernoulli_loss(torch.logit(x, 1e-6), x).mean().item() / np.log(2)
    assert best == pytest.approx(expected, abs=1e-4)


# The KL


def head_model(kind):
    """A model whose posterior is far from the prior; of a whitened one the maps are not close to
    the identity, as after training.
    """
    torch.manual_seed(0)
    base = LightVAE(1, 8, (8, 8), hidden_width=32, latent_width=8, likelihood="gaussian")
    options = {"mechanism": "flow"} if kind == "flow" else {"posterior": kind, "noise_width": 12}
    model = InterventionModel.build(base, ["a", "b"], concept_width=6, free_blocks=1, **options)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        if model.head.whitening is not None:
            width = model.head.whitening.matrix.shape[-1]
            for k in range(3):
                scale = torch.linspace(0.3, 4, width).roll(k)
                rotation = torch.linalg.qr(torch.randn(width, width))[0]
                matrix = rotation * scale @ rotation.T
                model.head.whitening.matrix[k] = (matrix + matrix.T) / 2
    return model.eval()


def draws_of(shape, count=3000):
    """Normal draws of exact means and covariances, so that few are needed, (count, *shape)."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(count, *shape, generator=g, dtype=torch.float64).flatten(1)
    x = x - x.mean(0)
    root = torch.linalg.cholesky(x.T @ x / count)
    return torch.linalg.solve_triangular(root, x.T, upper=False).T.unflatten(1, shape)


def drawn_kl(head, mean, logvar, s, noise):
    """E log q - log p over draws, of one image, in float64: of the concepts for a head with flows,
    otherwise of the noise z = T y, with the determinant of the T that is there.
    """
    y, rows = mean.double() + (logvar.double() / 2).exp() * noise, s.expand(len(noise), -1)
    log_q = -0.5 * (noise.square() + logvar.double() + np.log(2 * np.pi)).flatten(1).sum(1)
    if head.is_flow:
        return (log_q - head.log_density(y.to(head.dtype), rows).double()).mean()
    z = head.whiten(y.to(head.dtype), rows).double()
    log_p = -0.5 * (z.square() + np.log(2 * np.pi)).flatten(1).sum(1)
    if head.whitening is not None:
        context = int(s.argmax()) + 1 if s.any() else 0
        log_q = log_q - torch.linalg.slogdet(head.whitening.matrix[context].double())[1]
    return (log_q - log_p).mean()


def kl_of(head, mean, logvar, s, noise):
    """`InterventionHead.kl` of one image; with flows it is itself a draw, of which the mean."""
    if not head.is_flow:
        return head.kl(mean[None], logvar[None], s[None])[0]
    mean, logvar, s = (x.expand(len(noise), *x.shape) for x in (mean, logvar, s))
    return head.kl(mean, logvar, s, mean + (logvar / 2).exp() * noise.float()).mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["flow", "centered", "whitened"])
def test_the_kl_is_that_of_draws_after_a_save_too(tmp_path, kind, dtype):
    model = head_model(kind)
    if dtype != torch.float32:
        model.to(dtype).save_pretrained(tmp_path)
        model = InterventionModel.from_pretrained(tmp_path).float().eval()
    targets = model.targets([["obs"], ["a"], ["b"]])
    with torch.no_grad():
        features = model.base.encode(torch.rand(3, 1, 8, 8)).features
        mean, logvar = model.head.posterior(features, targets)
        noise = draws_of(mean.shape[1:])
        for parts in zip(mean, logvar, targets):
            kl = kl_of(model.head, *parts, noise).item()
            assert kl > 1  # there is something to agree in
            assert kl == pytest.approx(drawn_kl(model.head, *parts, noise).item(), abs=0.05)
