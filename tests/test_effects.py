"""Effects on true factors in samples, total effects of the causal layer, what the published
protocol can tell apart.
"""

import json
import math
import sys
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance

from hf_intervene import InterventionModel, LightVAE
from hf_intervene.data import quad
from hf_intervene.evaluation.codes import code_scores, untrained_model
from hf_intervene.metrics import (
    agreement,
    block_effects,
    disentanglement,
    effects,
    intervention_moves,
    sliced_wasserstein,
)
from hf_intervene.metrics.causal import (
    head_draws,
    head_readout,
    single_interventions_operator,
    total_effect_operator,
)
from hf_intervene.metrics.factors import KINDS, LEVELS, Factors, true_factors
from hf_intervene.plots import plot_matrices
from hf_intervene.training.studies import effects as recipe
from hf_intervene.training.studies import protocol


SHAPE, ORIENTATION = (quad.LATENTS.index(name) for name in ("shape", "orientation"))


# The causal model of quad


def paths(matrix, source, target, cut=()):
    """Sum over all directed paths of the products of their weights, those that enter a node in
    `cut` left out.
    """
    if source == target:
        return 1.0
    if target in cut:
        return 0.0
    return sum(
        matrix[target, k] * paths(matrix, source, k, cut)
        for k in range(len(matrix))
        if matrix[target, k]
    )


def test_total_effects_are_sums_over_paths():
    matrix, found = quad.weights("dependent"), quad.total_effects("dependent")
    scale = np.sqrt(
        [
            sum(paths(matrix, j, i) ** 2 * quad._NOISE_VARIANCE[j] for j in range(8))
            for i in range(8)
        ]
    )
    for i, j in product(range(8), repeat=2):
        assert found[i, j] == pytest.approx(paths(matrix, j, i) * scale[j] / scale[i])
    np.testing.assert_array_equal(quad.total_effects("independent"), np.eye(8))


@pytest.mark.parametrize("context", ["obs", "orientation", "quad1+quad3", "quad2+orientation"])
def test_moments_and_total_effects_by_simulation(context):
    latents = quad.sample_latents(context, 100_000, seed=5)
    means, spreads = quad.moments(context)
    np.testing.assert_allclose(means, latents.mean(0), atol=0.02)
    np.testing.assert_allclose(spreads, latents.std(0), atol=0.02)
    if context == "orientation":  # one intervention moves every mean by its total effect
        np.testing.assert_allclose(
            means, quad.total_effects()[:, ORIENTATION] * means[ORIENTATION], atol=1e-9
        )


def test_noise_behind_latents():
    noise = quad.exogenous_noise(quad.sample_latents("obs", 20_000))
    np.testing.assert_allclose(np.cov(noise, rowvar=False), np.eye(8), atol=0.05)


def test_true_moves():
    moving = effects.true_moves(["quad1", "orientation", "quad2+quad3"])
    assert [[quad.LATENTS[k] for k in np.flatnonzero(row)] for row in moving] == [
        ["quad1"],
        ["quad1", "quad2", "size", "color", "shape", "orientation"],
        ["quad1", "quad2", "quad3"],
    ]
    assert effects.true_moves(["orientation"], "independent").sum() == 1


# Moves of factors


@st.composite
def phases(draw):
    size = draw(st.integers(1, 5))
    return np.array(draw(st.lists(st.integers(0, 11), min_size=size, max_size=size))) / 12


@settings(max_examples=60, deadline=None)
@given(phases(), phases())
def test_circular_distance_by_a_slow_loop(a, b):
    """The least over all points at which the circle may be cut open, of the distance of the angles
    as numbers, mass being carried round.
    """
    grid = np.arange(240) / 240 + 1 / 480
    difference = np.array([(a <= x).mean() - (b <= x).mean() for x in grid])
    expected = min(np.abs(difference - level).mean() for level in difference)
    assert effects.circular_w1(a, b) == pytest.approx(expected, abs=1e-9)


def test_circular_distances_that_are_known():
    turns = np.random.default_rng(0).uniform(size=500)
    assert effects.circular_w1(turns, turns) == pytest.approx(0, abs=1e-12)
    near_the_cut = 0.05 * turns
    assert effects.circular_w1(near_the_cut, (near_the_cut - 0.1) % 1) == pytest.approx(0.1)
    assert effects.circular_w1(np.zeros(3), np.full(4, 0.5)) == pytest.approx(0.5)
    assert effects.circular_w1(np.zeros(3), np.arange(1000) / 1000) == pytest.approx(0.25, abs=1e-3)


def some_factors(n, rng, shift=0.0):
    kinds = np.eye(4)[rng.integers(4, size=n)]
    return Factors(
        0.5 * rng.uniform(size=(n, 6)) + shift, kinds, (0.2 * rng.uniform(size=(n, 3)) + shift) % 1
    )


def test_moves_by_a_slow_loop():
    rng = np.random.default_rng(0)
    for sizes in ((40, 40), (40, 31)):
        a, b = some_factors(sizes[0], rng), some_factors(sizes[1], rng, 0.1)
        expected = {
            name: wasserstein_distance(a.levels[:, k], b.levels[:, k])
            for k, name in enumerate(LEVELS)
        }
        shares = [[(x.kinds.argmax(1) == kind).mean() for kind in range(4)] for x in (a, b)]
        expected["shape"] = sum(max(0, p - q) for p, q in zip(*shares))
        weights = [shares[0][kind] + shares[1][kind] for kind in (1, 2, 3)]
        turns = [
            effects.circular_w1(*(x.phases[x.kinds.argmax(1) == kind, kind - 1] for x in (a, b)))
            for kind in range(1, len(KINDS))
        ]
        expected["orientation"] = sum(w * turn for w, turn in zip(weights, turns)) / sum(weights)
        np.testing.assert_allclose(
            effects.factor_moves(a, b), [expected[name] for name in quad.LATENTS], atol=1e-9
        )


def test_a_shift_is_found_and_no_move_is_the_floor():
    rng = np.random.default_rng(1)
    obs, other, same, moved = (some_factors(400, rng, shift) for shift in (0, 0, 0, 0.3))
    matrix = effects.effect_matrix(obs, other, {"same": same, "moved": moved}, resamples=20)
    columns = [quad.LATENTS.index(name) for name in (*LEVELS, "orientation")]
    np.testing.assert_allclose(matrix.values[1, columns], 0.3, atol=0.03)
    margins = (matrix.intervals[1, :, 1] - matrix.values[1])[
        [quad.LATENTS.index(name) for name in LEVELS]
    ]
    # Of a difference of means of 400 numbers, uniform over 0.5, each.
    np.testing.assert_allclose(margins, 1.96 * 0.5 * np.sqrt(2 / 12 / 400), rtol=0.5)
    assert (
        (matrix.values[0] < 2 * matrix.floor).all()
        and (matrix.floor < matrix.noise).all()
        and (matrix.noise < 0.12).all()
    )
    assert matrix.values[1, SHAPE] < matrix.noise[SHAPE]
    moving = np.zeros((2, 8), bool)
    moving[1, columns] = True
    perfect = effects.compare_effects(matrix, matrix, moving)
    assert (
        perfect["correlation"] == pytest.approx(1)
        and perfect["found"] == 1
        and perfect["size"] == pytest.approx(1)
    )
    still = effects.effect_matrix(obs, other, {"same": same, "moved": same}, resamples=20)
    nothing = effects.compare_effects(still, matrix, moving)
    assert (
        nothing["found"] == 0
        and abs(nothing["size"]) < 0.05
        and nothing["error"] == pytest.approx(0.3 * 7 / 16, abs=0.03)
    )
    reverse = effects.compare_effects(matrix, still, ~moving)
    assert reverse["spurious"] > 0.8
    shifts, errors = effects.mean_shifts(obs, {"moved": moved})
    np.testing.assert_allclose(shifts, 0.3, atol=4 * errors.max())


def test_no_orientation_without_a_kind_that_has_one():
    circles = some_factors(30, np.random.default_rng(0))
    circles.kinds = np.eye(4)[np.zeros(30, int)]
    assert math.isnan(effects.factor_moves(circles, circles)[ORIENTATION])


def test_shifts_of_true_factors_are_those_of_the_causal_model():
    read = {
        name: true_factors(quad.sample_latents(name, 40_000, seed=9))
        for name in quad.TRAIN_CONTEXTS
    }
    obs = read.pop("obs")
    shifts, errors = effects.mean_shifts(obs, read)
    assert (np.abs(shifts - effects.true_mean_shifts(quad.CONCEPTS)) < 5 * errors).all()


def test_too_few_images():
    a = some_factors(10, np.random.default_rng(0))
    with pytest.raises(ValueError, match="at least 20 images"):
        effects.effect_matrix(a, a, {"x": a})


# The causal layer


def a_model(concepts=quad.CONCEPTS, **options):
    torch.manual_seed(0)
    base = LightVAE(3, 16, block_out_channels=(8, 8), hidden_width=16, latent_width=12)
    options = {
        "noise_width": 4,
        "concept_width": 3,
        "initializer_range": 0.5,
        "free_blocks": 1,
    } | options
    return InterventionModel.build(base, concepts, **options).eval()


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_total_effects_of_the_layer_are_sums_over_paths(steps):
    head = a_model(["a", "b", "c"], propagation_steps=steps).head
    weight = head.intervention.off_diagonal().detach().double().numpy()  # (D, w, slices, D, w)

    def expected(i, j, targets):
        if i == j and steps == 1:
            return np.eye(3)
        walks = [(i,)]  # from i backwards to j, of up to `steps` edges
        total = np.eye(3) * (i == j)
        for _ in range(steps):
            walks = [
                (*walk, k)
                for walk in walks
                for k in range(4)
                if k != walk[-1] and not targets[walk[-1]]
            ]
            for walk in (walk for walk in walks if walk[-1] == j):
                product = np.eye(3)
                for effect, cause in zip(walk, walk[1:]):
                    product = (
                        product @ weight[effect, :, int(targets[cause]) if steps == 1 else 0, cause]
                    )
                total = total + product
        return total

    for targets in ([0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 1, 0]):
        operator = total_effect_operator(
            head.intervention, torch.tensor(targets, dtype=torch.float32)
        )
        for i, j in product(range(4), repeat=2):
            np.testing.assert_allclose(operator[i, :, j], expected(i, j, targets), atol=1e-5)
    single = single_interventions_operator(head)
    for i, j in product(range(4), range(3)):
        np.testing.assert_allclose(
            single[i, :, j], expected(i, j, [int(k == j) for k in range(4)]), atol=1e-5
        )


def test_shares_by_simulation_whatever_the_basis():
    head = a_model(["a", "b", "c"]).head
    eps, c = head_draws(head, ["obs", "a"], 4000)
    readout, operator = head_readout(head), total_effect_operator(head.intervention)
    shares = block_effects(operator, eps[0], readout)
    np.testing.assert_allclose(np.square(shares).sum(1), 1)
    for i, j in product(range(4), repeat=2):
        part = (eps[0][:, j] @ operator[i, :, j].T @ readout[i]).var(0).sum()
        assert shares[i, j] ** 2 == pytest.approx(
            part / (c[0][:, i] @ readout[i]).var(0).sum(), rel=0.2, abs=0.02
        )
    # Another basis of every block: eps -> eps B, T -> B^-1 T A, U -> A^-1 U.
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(4, 3, 3)) + 2 * np.eye(3) for _ in range(2))
    other = np.einsum("iax,iajc,jcy->ixjy", a, operator, np.linalg.inv(b).transpose(0, 2, 1))
    changed = np.einsum("nja,jab->njb", eps[0], b)
    back = np.einsum("ixa,iae->ixe", np.linalg.inv(a), readout)
    np.testing.assert_allclose(block_effects(other, changed, back), shares, rtol=1e-6)
    moved = np.einsum("knia,iab->knib", c, a)
    for found, same in zip(
        intervention_moves(moved[0], moved[1:], back), intervention_moves(c[0], c[1:], readout)
    ):
        np.testing.assert_allclose(found, same, rtol=1e-4, atol=1e-6)


def test_moves_under_interventions():
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(20_000, 2, 3))
    moved = np.stack([obs, obs]) + np.array([0, 2.0])[:, None, None, None] * np.array(
        [[1.0, 0, 0], [0, 0, 0]]
    )
    moved[1, :, 1] *= 2
    means, distances = intervention_moves(obs, moved)
    np.testing.assert_allclose(means, [[0, 2 / math.sqrt(3)], [0, 0]], atol=0.02)
    # Gaussians of standard deviations 1 and 2 in three dimensions are sqrt(3) apart; the unit is
    # sqrt(3).
    np.testing.assert_allclose(distances, [[0, 2 / math.sqrt(3)], [0, 1]], atol=0.03)


def test_agreement():
    true = np.abs(quad.total_effects())[:6, :6]
    perfect, reverse = agreement(true, true), agreement(true.T, true)
    assert perfect.auroc == 1 and perfect.rank == pytest.approx(1) and perfect.direction == 1
    assert (
        perfect.auroc_p < 0.01
        and perfect.auroc_floor == pytest.approx(0.5)
        and abs(perfect.rank_floor) < 1e-9
    )
    assert reverse.direction == 0 and reverse.auroc < 0.5
    constant = agreement(np.ones((6, 6)), true)
    assert constant.auroc == 0.5 and constant.auroc_p == 1 and constant.direction == 0.5
    random = [
        agreement(np.random.default_rng(k).uniform(size=(6, 6)), true).auroc_p for k in range(12)
    ]
    assert np.mean(random) == pytest.approx(0.5, abs=0.3)
    assert math.isnan(agreement(true, np.eye(6)).auroc_p)
    assert agreement(np.eye(9) + np.tri(9), np.tri(9)).auroc == 1
    with pytest.raises(ValueError, match="two square matrices"):
        agreement(np.ones((2, 3)), np.ones((2, 3)))


@pytest.mark.parametrize("shared", [True, False])
def test_plot(tmp_path, shared):
    matrices = {
        "a": np.array([[0.1, np.nan]]),
        "b": np.array([[-0.5, 1.0]]),
        "c": np.zeros((1, 2)),
        "d": np.zeros((1, 2)),
    }
    figure = plot_matrices(matrices, ["row"], ["x", "y"], "size", shared)
    figure.savefig(tmp_path / "figure.png")
    assert [axis.get_title() for axis in figure.axes if axis.get_visible()][:4] == list("abcd")
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.10"]


# The recipes


def test_an_untrained_model_has_the_configuration_and_none_of_the_training():
    """New weights everywhere that are those of no training: another model of the same
    configuration has the same ones.
    """
    models = [a_model(mechanism="flow"), a_model(mechanism="flow")]
    with torch.no_grad():
        for parameter in models[0].parameters():
            parameter.add_(1.0)
    first, second = (untrained_model(model, seed=3) for model in models)
    states = [model.state_dict() for model in (first, second, models[0])]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
        if value.is_floating_point() and value.numel() > 1:
            assert not torch.equal(value, states[2][name]), name
    assert first.config.to_dict() == models[0].config.to_dict()
    assert not torch.equal(
        untrained_model(models[0], 4).head.unpool.weight, first.head.unpool.weight
    )


def test_codes_that_hold_their_concepts_are_told_from_untrained_ones(monkeypatch):
    """An encoder that knows the true latents: each concept in its own block."""
    model = a_model()

    def known(self, pixel_values, targets, *_):
        if self is not model:
            return abduct(self, pixel_values, targets)
        latents = quad.sample_latents("obs", len(targets), "independent", 1_000_000)
        z = torch.zeros(len(targets), *self.noise_shape)
        z[:, :6, 0] = torch.from_numpy(latents[:, [0, 1, 2, 3, 4, 7]])
        return z, None

    abduct = InterventionModel.abduct
    monkeypatch.setattr(InterventionModel, "abduct", known)
    found = code_scores(model, "independent", 200, 0, 2, ("z",))["z"]
    assert found["own_block"]["value"] > 0.97 and found["other_block"]["value"] < 0.25
    assert found["own_block"]["untrained"] < 0.9
    assert np.array(found["blocks"])[range(6), [0, 1, 2, 3, 4, 7]].min() > 0.95


def test_recipe(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(disentanglement, "_FLOORS", 1)
    a_model().save_pretrained(tmp_path / "model")
    argv = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out"), "--images", "60"]
    argv += ["--resamples", "2"]
    assert recipe.main(argv) == 0
    measured = json.loads((tmp_path / "out" / "effects.json").read_text())
    assert np.array(measured["effects"]["generated"]["values"]).shape == (21, 8)
    assert np.array(measured["codes"]["z"]["blocks"]).shape == (7, 8)
    assert {0 <= x["own_block"]["untrained"] <= 1 for x in measured["codes"].values()} == {True}
    assert {np.array(x).shape for x in measured["causal"]["learnt"].values()} == {
        (7, 7),
        (7, 6),
        (6, 6),
    }
    text = (tmp_path / "out" / "effects.md").read_text()
    assert (
        text in capsys.readouterr().out
        and "| quad2+orientation | " in text
        and "| real images | " in text
    )
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {
        "effects.png",
        "codes.png",
        "causal.png",
    }


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ({"concepts": ["a", "b"]}, {}, "the model's are a, b"),
        ({"ablation": "base"}, {}, "no intervention head"),
        ({}, {"--variant": "other"}, "no variant 'other'; choose one of dependent, independent"),
        ({}, {"--variant": "independent"}, "trained on the dependent variant"),
        ({}, {"--resamples": "1"}, "two random halves"),
        ({}, {"--images": "3"}, "at least 40 images"),
        ({}, {"--model": "nowhere"}, "no model folder nowhere"),
        ({}, {"--output": "file/out"}, "cannot be written"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, capsys, model, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    a_model(**model).save_pretrained("model")
    (tmp_path / "model" / "training_arguments.yaml").write_text("resolution: 16\n")
    words = [
        word
        for pair in ({"--model": "model", "--output": "out"} | options).items()
        for word in pair
    ]
    assert recipe.main(words) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]


def test_without_scikit_learn(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert recipe.main(["--model", "model", "--output", str(tmp_path)]) == 1
    assert 'pip install "hf-intervene[eval]"' in capsys.readouterr().err


def test_protocol(tmp_path, capsys):
    argv = [
        "--output",
        str(tmp_path),
        "--resolution",
        "8",
        "--seeds",
        "3",
        "--projections",
        "20",
        "--contexts",
        "quad4",
    ]
    assert protocol.main(argv) == 0
    measured = np.array(json.loads((tmp_path / "protocol.json").read_text())["distances"]["quad4"])
    assert measured.shape == (3, 4, 5) and (measured[:, -1, 4] > 3 * measured[:, -1, 0]).all()
    found, bounds = protocol.power(measured)
    assert found[-1, 4] == 1 and np.isnan(found[:, 0]).all() and bounds[-1, 4, 0] < 1
    assert "| 64 (published) |" in (tmp_path / "protocol.md").read_text()
    assert protocol.main(["--output", str(tmp_path), "--contexts", "obs"]) == 1
    assert "with an intervention" in capsys.readouterr().err


def test_repeating_images_changes_nothing():
    """Why 64 distinct images stand for the published protocol."""
    real, few = (quad.images_by_context(("quad1",), n, 8, seed=n)["quad1"] for n in (160, 8))
    assert sliced_wasserstein(real, few, 20) == pytest.approx(
        sliced_wasserstein(real, np.repeat(few, 20, axis=0), 20)
    )


def test_sets_with_defects():
    exact, other = np.zeros((100, 2)), np.ones((100, 2))
    for size, share in product((16, 64), (0.0, 0.1, 0.5, 1.0)):
        rows = protocol.spoilt(exact, other, size, share)
        assert len(rows) == size and rows.sum() == 2 * round(share * size)
