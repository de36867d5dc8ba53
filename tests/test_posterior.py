"""The whitened posterior, compared with a slow loop, torch's KL, and the moments of the prior."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from hf_intervene import InterventionConfig, InterventionHead, InterventionModel
from hf_intervene.bases.light_vae import LightVAE
from hf_intervene.posterior import Whitening, gaussian_kl, mixture


CONCEPTS, WIDTH = ("a", "b"), 3 * 4


def covariances(contexts=3, width=WIDTH, seed=0):
    x = torch.randn(contexts, 40, width, generator=torch.Generator().manual_seed(seed))
    x[..., 1] = x[..., 0] + 0.2 * x[..., 1]  # nearly a copy
    return x.mT @ x / 40


def whitened_by(head, covariance):
    """Set the whitening for covariances of y in obs and every single context, (1 + d, D n, D n).

    Trainings of version 0.1 did this.
    """
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    eigenvalues = eigenvalues.clamp(min=1e-3)
    head.whitening.matrix.copy_((vectors * eigenvalues.rsqrt()[:, None]) @ vectors.mT)


def make_head(**options):
    torch.manual_seed(0)
    head = InterventionHead(
        InterventionConfig(
            concepts=CONCEPTS,
            noise_width=4,
            feature_width=7,
            embedding_shape=[5],
            posterior="whitened",
            **options,
        )
    )
    head.posterior_offset.normal_()
    whitened_by(head, covariances())
    return head


def test_noise_against_a_loop():
    head, y = make_head(), torch.randn(4, 3, 4)
    found = head.whiten(y, head.targets([["obs"], ["b"], ["a"], ["b"]]))
    for sample, context in enumerate((0, 2, 1, 2)):
        # Any root of the inverse, which a rotation makes symmetric.
        T = torch.linalg.inv(torch.linalg.cholesky(covariances()[context].double()))
        u, _, v = torch.linalg.svd(T)
        T = v.mT @ u.mT @ T
        torch.testing.assert_close(T, T.mT)
        torch.testing.assert_close(
            found[sample].flatten(),
            (T @ y[sample].flatten().double()).float(),
            rtol=1e-3,
            atol=1e-4,
        )


def test_offsets_come_before_the_map():
    head, features = make_head(), torch.randn(3, 7)
    targets = head.targets([["obs"], ["a"], ["b"]])
    plain = InterventionHead(
        InterventionConfig(**head.config.to_dict() | {"posterior": "conditional"})
    )
    plain.load_state_dict(head.state_dict(), strict=False)
    mean, _ = head.posterior(features, targets)
    torch.testing.assert_close(mean, plain.posterior(features, targets)[0] - head.posterior_offset)


def exact(head, mean, logvar, targets):
    """q(z | x, s) with a full covariance."""
    T = torch.einsum("bk,kij->bij", mixture(targets[:, :2]), head.whitening.matrix).double()
    return MultivariateNormal(
        (T @ mean.flatten(1).double()[..., None])[..., 0],
        T @ logvar.flatten(1).double().exp().diag_embed() @ T.mT,
    )


def test_kl_and_marginals_against_torch():
    head, mean, logvar = make_head(), torch.randn(5, 3, 4), torch.randn(5, 3, 4) - 2
    targets = head.targets([["obs"], ["a"], ["b"], ["a"], ["obs"]])
    q, prior = (
        exact(head, mean, logvar, targets),
        MultivariateNormal(torch.zeros(WIDTH).double(), torch.eye(WIDTH).double()),
    )
    torch.testing.assert_close(
        head.kl(mean, logvar, targets).double(), kl_divergence(q, prior), rtol=1e-4, atol=1e-4
    )
    of_z = head.marginals(mean, logvar, targets)
    torch.testing.assert_close(of_z[0].flatten(1).double(), q.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(of_z[1].exp().flatten(1).double(), q.variance, rtol=1e-4, atol=1e-5)


def test_kl_of_contexts_that_were_never_seen_is_an_upper_bound():
    head, mean, logvar = make_head(), torch.randn(3, 3, 4), torch.randn(3, 3, 4) - 2
    targets = head.targets([["a", "b"], {"a": 0.5}, {"a": 0.2, "b": 0.9}])
    q, prior = (
        exact(head, mean, logvar, targets),
        MultivariateNormal(torch.zeros(WIDTH).double(), torch.eye(WIDTH).double()),
    )
    excess = head.kl(mean, logvar, targets).double() - kl_divergence(q, prior)
    assert (excess > 0).all()
    assert (head.marginals(mean, logvar, targets)[1].exp().flatten(1) >= q.variance - 1e-5).all()


def test_draws_are_white_in_every_context_for_any_encoder():
    """The encoder shifts and correlates y by context; draws of z have the prior's moments."""
    torch.manual_seed(0)
    head = make_head()
    head.posterior_offset.zero_()
    roots = torch.linalg.cholesky(covariances(seed=1))
    shift = torch.randn(3, WIDTH)
    rows = torch.arange(30_000) % 3
    mean = (
        0.9 * torch.einsum("bij,bj->bi", roots[rows], torch.randn(len(rows), WIDTH)) + shift[rows]
    ).view(-1, 3, 4)
    std = 0.3
    targets = head.targets([["obs"], ["a"], ["b"]])
    head.posterior_offset.copy_(torch.stack([mean[rows == k].mean(0) for k in range(3)]))
    centred = mean - head.posterior_offset[rows]
    flat = centred.flatten(1)
    covariance = torch.stack(
        [flat[rows == k].T @ flat[rows == k] / (rows == k).sum() for k in range(3)]
    )
    whitened_by(head, covariance + std**2 * torch.eye(WIDTH))
    z = head.whiten(centred + std * torch.randn_like(centred), targets[rows]).flatten(1)
    for k in range(3):
        own = z[rows == k]
        assert own.mean(0).abs().max() < 0.05
        assert (own.T @ own / len(own) - torch.eye(WIDTH)).abs().max() < 0.06


def test_gaussian_kl_against_torch():
    mean, logvar = torch.randn(3, 4, 5).double(), torch.randn(3, 4, 5).double()
    posterior, prior = (
        Normal(mean, (0.5 * logvar).exp()),
        Normal(torch.zeros_like(mean), torch.ones_like(mean)),
    )
    torch.testing.assert_close(
        gaussian_kl(mean, logvar), kl_divergence(posterior, prior).sum((1, 2))
    )


def test_a_new_whitening_changes_nothing():
    torch.manual_seed(0)
    whitening, mean, logvar = Whitening(3, WIDTH), torch.randn(4, 3, 4), torch.randn(4, 3, 4)
    weights = mixture(torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.3, 0.0]]))
    torch.testing.assert_close(whitening(mean, weights), mean)
    torch.testing.assert_close(whitening.kl(mean, logvar, weights), gaussian_kl(mean, logvar))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=4))
def test_mixtures(rows):
    s = torch.tensor(rows)
    weights = mixture(s)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(len(s)))
    for row, mixed in zip(s, weights):
        if row.count_nonzero() <= 1:
            torch.testing.assert_close(mixed, torch.cat([1 - row.sum()[None], row]))


def test_leaving_out_contexts_without_weight_changes_nothing():
    whitening, y = make_head().whitening, torch.randn(5, 3, 4, requires_grad=True)
    weights = mixture(torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.25]]))
    whole = weights.clone().requires_grad_()  # so that no context is left out
    up = torch.randn(5, 3, 4)
    for method in (whitening, whitening.variance):
        found, expected = method(y, weights), method(y, whole)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(z, y, up)[0] for z in (found, expected)))


def test_under_autocast_it_stays_in_float32():
    head, mean, logvar = make_head(), torch.randn(4, 3, 4), torch.randn(4, 3, 4) - 2
    targets = head.targets("a", 4)
    whole = head.whiten(mean, targets), head.kl(mean, logvar, targets)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = head.whiten(mean, targets), head.kl(mean, logvar, targets)
    assert all(torch.equal(a, b) for a, b in zip(whole, mixed))


def test_saved_and_loaded(tmp_path):
    make_head().save_pretrained(tmp_path)
    loaded, head = InterventionHead.from_pretrained(tmp_path), make_head()
    assert loaded.config.posterior == "whitened"
    y, targets = torch.randn(3, 3, 4), head.targets(["a", "b"], 3)
    assert torch.equal(loaded.whiten(y, targets), head.whiten(y, targets))
    assert torch.equal(loaded.kl(y, y, targets), head.kl(y, y, targets))


def test_a_model_encodes_to_white_noise_and_back(tmp_path):
    torch.manual_seed(0)
    base = LightVAE(sample_size=16, block_out_channels=(8, 8), hidden_width=16, latent_width=8)
    model = InterventionModel.build(base, CONCEPTS, posterior="whitened", noise_width=4).eval()
    whitened_by(model.head, covariances())
    x, s = torch.rand(4, 3, 16, 16), model.targets("a", 4)
    noise = torch.randn(4, 3, 4)
    output = model(x, s, noise=noise)
    y = output.posterior_mean + (0.5 * output.posterior_logvar).exp() * noise
    z = model.head.whiten(y, s)
    reconstruction = model.base.generate(model.head.embed_draw(y, s), {})
    torch.testing.assert_close(reconstruction, model.sample("a", noise=z))
    torch.testing.assert_close(
        output.kl, model.head.kl(output.posterior_mean, output.posterior_logvar, s)
    )
    torch.testing.assert_close(model.posterior(x, s)[0], model.abduct(x, s)[0])
    torch.testing.assert_close(
        model.posterior(x, s)[0], model.head.whiten(output.posterior_mean, s)
    )
    torch.testing.assert_close(
        model.edit(x, "b", context="a"), model.sample("b", noise=model.posterior(x, s)[0])
    )


def test_matrices_that_are_too_many():
    with pytest.raises(ValueError, match='use posterior="centered"'):
        InterventionHead(
            InterventionConfig(concepts=[f"c{j}" for j in range(16)], posterior="whitened")
        )
