"""The baselines: their losses against slow loops, how they sample, and the job from end to end on
tiny models.
"""

import json
import math
import sys

import numpy as np
import pytest
import torch

from hf_intervene import LightVAE
from hf_intervene.data import ContextImages, quad
from hf_intervene.trainer.settings import TrainArguments
from hf_intervene.training.studies import baseline_losses, baselines
from hf_intervene.training.studies.baselines import BASELINES, WEIGHTS, Baseline
from hf_intervene.training.studies.tuning import GRID


CONTEXTS = ("obs", "quad1", "quad2", "quad3", "quad4", "size", "orientation")


def build(baseline, width=12):
    torch.manual_seed(0)
    return Baseline(
        LightVAE(3, 16, block_out_channels=(8, 8), hidden_width=16, latent_width=width),
        quad.CONCEPTS,
        baseline,
    )


@pytest.fixture(scope="module")
def data():
    return ContextImages.from_arrays(quad.images_by_context(CONTEXTS, 16, 16), quad.CONCEPTS)


def words(settings):
    return [
        word
        for key, value in settings.items()
        for word in (f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)]))
    ]


def log_gauss(z, mean, logvar):
    return -0.5 * (math.log(2 * math.pi) + logvar + (z - mean) ** 2 / math.exp(logvar))


def test_decomposed_kl_is_minibatch_weighted_sampling():
    pytest.importorskip("pythae")
    mean, logvar, z = (
        torch.randn(5, 3, generator=torch.Generator().manual_seed(k)) for k in range(3)
    )
    size, width, images = 5, 3, 100
    information = correlation = dimensions = 0.0
    for i in range(size):
        density = [
            [
                log_gauss(float(z[i, k]), float(mean[j, k]), float(logvar[j, k]))
                for k in range(width)
            ]
            for j in range(size)
        ]
        joint = math.log(sum(math.exp(sum(row)) for row in density) / (size * images))
        marginals = sum(
            math.log(sum(math.exp(row[k]) for row in density) / (size * images))
            for k in range(width)
        )
        prior = sum(log_gauss(float(z[i, k]), 0.0, 0.0) for k in range(width))
        information += (sum(density[i]) - joint) / size
        correlation += (joint - marginals) / size
        dimensions += (marginals - prior) / size
    got = baseline_losses.decomposed_kl(mean, logvar, z, 0.5, 3.0, images)
    assert got.item() == pytest.approx(
        0.5 * (information + dimensions) + 3.0 * correlation, rel=1e-4
    )
    # all weights equal: the KL, at these draws
    plain = baseline_losses.decomposed_kl(mean, logvar, z, 1.0, 1.0, images)
    assert plain.item() == pytest.approx(information + correlation + dimensions, rel=1e-4)


def test_averaged_posteriors_average_what_a_pair_shares():
    mean, logvar = (
        torch.randn(6, 4, 1, 1, generator=torch.Generator().manual_seed(k)) for k in range(2)
    )
    means, logvars = baseline_losses.averaged_posteriors(mean, logvar)
    averaged = 0
    for n in range(3):
        m, v = mean[[n, n + 3], :, 0, 0].tolist(), logvar[[n, n + 3], :, 0, 0].exp().tolist()
        delta = [
            0.5 * (math.log(v[1][i] / v[0][i]) + (v[0][i] + (m[0][i] - m[1][i]) ** 2) / v[1][i] - 1)
            for i in range(4)
        ]
        for i in range(4):
            shared = delta[i] < (max(delta) + min(delta)) / 2
            averaged += shared
            for k in range(2):
                expected = (
                    (sum(row[i] for row in m) / 2, sum(row[i] for row in v) / 2)
                    if shared
                    else (m[k][i], v[k][i])
                )
                found = (means[n + 3 * k, i].item(), logvars[n + 3 * k, i].exp().item())
                assert found == pytest.approx(expected, rel=1e-4)
    assert 0 < averaged < 12


def test_triplets_within_the_batch():
    mean = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([0, 1, 0, 2, 1, 0, 1])  # context 2 has one image: no anchor, yet a negative
    losses = []
    for a in range(7):
        order = [(a + k) % 7 for k in range(1, 7)]
        positive = next((p for p in order if ids[p] == ids[a]), None)
        negative = next(n for n in order if ids[n] != ids[a])
        if positive is not None:
            near, far = (
                math.dist(mean[a].tolist(), mean[k].tolist()) for k in (positive, negative)
            )
            losses.append(max(0.0, near - far + 1.0))
    assert len(losses) == 6
    assert baseline_losses.triplet_loss(mean, ids).item() == pytest.approx(
        np.mean(losses), rel=1e-4
    )
    assert baseline_losses.triplet_loss(mean, torch.zeros(7)).item() == 0


@pytest.mark.parametrize("baseline", BASELINES)
def test_gradient_reaches_every_weight(baseline, data):
    if baseline == "beta-tcvae":
        pytest.importorskip("pythae")
    model = build(baseline)
    rows = baselines.Pairs(data, "balanced", 24, 0).next_batch()
    assert (data.context_ids[rows[:12]] == 0).all() and (data.context_ids[rows[12:]] > 0).all()
    ids = data.context_ids[rows]
    noise = torch.randn(24, *model.noise_shape)
    model.objective(
        data.pixels[rows] / 255, data.targets()[ids], ids, noise, 1.0, 5.0, len(data)
    ).backward()
    assert all(bool(parameter.grad.abs().sum() > 0) for parameter in model.parameters())


def test_plain_objective_is_the_negative_elbo_with_its_weight(data):
    for baseline in ("conditional-vae", "tvae"):
        model = build(baseline)
        x, s, noise = (
            data.pixels[::5] / 255,
            data.targets()[data.context_ids[::5]],
            torch.randn(23, *model.noise_shape),
        )
        expected = model(x, s, beta=3.0, noise=noise).loss
        assert model.objective(
            x, s, data.context_ids[::5], noise, 3.0, 0.0, 1
        ).item() == pytest.approx(expected.item(), rel=1e-5)


def test_conditional_vae_is_told_the_sum_of_the_concepts(data):
    model = build("conditional-vae").eval()
    noise, x = torch.randn(4, *model.noise_shape), data.pixels[:4] / 255
    s = torch.zeros(4, 6)
    s[:, [0, 2]] = 1
    pair = model.sample(["quad1", "quad3"], noise=noise)
    assert torch.allclose(pair, model.decode(noise, s))
    assert not torch.allclose(pair, model.sample("quad1", noise=noise))
    assert not torch.allclose(model.posterior(x, s)[0], model.posterior(x, 0 * s)[0])


def test_contexts_are_gaussians_and_compose_by_addition(data):
    model = build("tvae", width=3)
    model.fit_contexts(data)
    x = data.pixels[data.context_ids == 2] / 255  # quad2
    with torch.no_grad():
        mean, logvar = model.posterior(x, torch.zeros(16, 6))
        draws = mean + (0.5 * logvar).exp() * torch.randn(40_000, 16, *model.noise_shape)
    draws = draws.flatten(0, 1)[..., 0, 0]
    assert torch.allclose(model.context_means[2], draws.mean(0), atol=0.01)
    assert torch.allclose(model.context_covariances[2], draws.T.cov(), atol=0.02)
    generator = torch.Generator().manual_seed(0)
    model.context_means.copy_(torch.randn(7, 3, generator=generator))
    model.context_covariances[1] = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 0.3]])
    model.context_covariances[3] = torch.diag(torch.tensor([1.0, 3.0, 0.2]))
    model.context_covariances[0] = torch.eye(3)
    targets = torch.zeros(200_000, 6)
    targets[:100_000, [0, 2]] = 1
    z = model.context_noise(torch.randn(200_000, 3, 1, 1, generator=generator), targets)[..., 0, 0]
    means = model.context_means
    assert torch.allclose(z[:100_000].mean(0), means[1] + means[3] - means[0], atol=0.03)
    assert torch.allclose(z[100_000:].mean(0), means[0], atol=0.03)
    # The sum of the two less obs has the eigenvalue 0.3 + 0.2 - 1 < 0: that direction has no
    # variance.
    expected = torch.tensor([[2.0, 0.5, 0.0], [0.5, 3.0, 0.0], [0.0, 0.0, 0.0]])
    assert torch.allclose(z[:100_000].T.cov(), expected, atol=0.05)


def test_job_from_end_to_end_and_not_twice(tiny, tmp_path, capsys, monkeypatch):
    argv = ["--baseline", "ada-gvae", "--images", "64", "--held_out_seed", "3", *words(tiny)]
    assert baselines.main(argv) == 0
    out = tmp_path / "run"
    metrics = json.loads((out / "metrics" / "metrics.json").read_text())
    assert (
        set(metrics["contexts"]) == {*quad.TRAIN_CONTEXTS, *quad.HELD_OUT}
        and metrics["seconds"] > 0
    )
    assert set(metrics["contexts"]["obs"]) >= {"independent", "paper", "bits_per_pixel"}
    assert "paper protocol" in (out / "metrics" / "metrics.md").read_text()
    saved = Baseline.load(out / "model")
    assert not torch.equal(saved.context_means[0], saved.context_means[1])
    monkeypatch.setattr(baselines, "train_baseline", None)
    assert baselines.main(argv) == 0
    assert "mean composition" in capsys.readouterr().out
    assert baselines.main([*argv, "--beta", "3"]) == 1
    assert "holds a job with another beta" in capsys.readouterr().err


def test_saved_model_samples_the_same(tmp_path, data):
    for baseline in ("conditional-vae", "tvae"):
        model = build(baseline).eval()
        if baseline == "tvae":
            model.fit_contexts(data)
        model.save(tmp_path)
        noise = torch.randn(3, *model.noise_shape)
        assert torch.equal(
            Baseline.load(tmp_path).sample("quad1+size", noise=noise),
            model.sample("quad1+size", noise=noise),
        )


def test_training_learns_and_keeps_the_best(tiny, monkeypatch):
    scores = iter([3.0, 1.0, 2.0])
    states = []

    def validate(model, *_):
        states.append({key: value.clone() for key, value in model.state_dict().items()})
        return next(scores)

    monkeypatch.setattr(baselines, "validation_loss", validate)
    a = TrainArguments(**tiny | {"max_steps": 12})
    model = baselines.train_baseline(a, "conditional-vae", 0.0)
    assert torch.equal(model.base.model.quant.weight, states[1]["base.model.quant.weight"])
    assert not torch.equal(
        states[0]["base.model.quant.weight"], states[1]["base.model.quant.weight"]
    )
    assert not next(scores, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": "2"}, "conditional-vae has no weight of its own"),
        ({"baseline": "tvae", "weight": "-1"}, "weight must not be negative"),
        ({"ablation": "base"}, "leave ablation at 'none'"),
        ({"baseline": "ada-gvae", "batch_size": "15"}, "batch_size must be even"),
        ({"beta": "-1"}, "beta must not be negative"),
        ({"baseline": "tvae", "weight": "1e39"}, "is not finite"),
    ],
)
def test_bad_input_is_one_sentence(tiny, capsys, change, message):
    assert baselines.main(words({"baseline": "conditional-vae"} | tiny | change)) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]


def test_missing_library_is_named(tiny, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pythae.models", None)
    monkeypatch.setattr(baselines, "load_data", None)
    baseline_losses.beta_tcvae.cache_clear()
    assert baselines.main(words({"baseline": "beta-tcvae"} | tiny)) == 1
    assert 'pip install "hf-intervene[baselines]"' in capsys.readouterr().err


def test_grid_holds_settings_that_exist():
    assert set(BASELINES) <= set(GRID)
    for baseline in BASELINES:
        for row in GRID[baseline]:
            TrainArguments(**{key: value for key, value in row.items() if key != "weight"})
            assert ("weight" in row) == (baseline in WEIGHTS)


def test_references_of_images_without_content(tiny, capsys):
    settings = {
        key: tiny[key]
        for key in ("resolution", "images_per_context", "validation_images", "block_out_channels")
    }
    assert baselines.main(["--explain", "quad", "--images", "64", *words(settings)]) == 0
    lines = [
        line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:] if line
    ]
    rows = {label: [float(cell) for cell in cells] for label, *cells in lines}
    assert rows["grey 0.5"][-1] == pytest.approx(3, abs=1e-3)  # a bit a channel
    assert rows["uniform noise"][-1] == pytest.approx(3 / math.log(2), abs=0.05)
    assert rows["real images"][-1] < rows["mean training image"][-1] < 3
    assert rows["real images"][0] < 0.5 * min(
        row[0] for label, row in rows.items() if label != "real images"
    )


def test_bernoulli_bits():
    images = np.random.default_rng(0).random((3, 2, 2, 1), dtype=np.float32)
    nats = 0.0
    for x in images:
        for value in x.ravel().tolist():
            nats -= value * math.log(0.25) + (1 - value) * math.log(0.75)
    bits = baselines.bernoulli_bits(images, np.full((1, 2, 2, 1), 0.25, np.float32))
    assert bits == pytest.approx(nats / (3 * 4 * math.log(2)), rel=1e-5)
