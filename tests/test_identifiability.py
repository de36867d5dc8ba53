"""The check of contexts before training, and the recovery of identifiable concepts."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from hf_intervene import cli
from hf_intervene.data import quad
from hf_intervene.metrics import check, recovery_data, shifts
from hf_intervene.metrics.identifiability import FAILS, HOLDS, WEAK
from hf_intervene.metrics.recovery import (
    Structure,
    _structure,
    recover,
    score,
    simulate_and_recover,
)
from hf_intervene.training.studies import identifiability as study
from hf_intervene.training.studies import rows


# Before training


def vectors(n=1200, seed=0, **shifts):
    """Return contexts of vectors instead of images. Each shift moves one entry by a number."""
    rng = np.random.default_rng(seed)
    contexts = {name: rng.normal(size=(n, 6)) for name in ("obs", *shifts)}
    for name, (entry, by) in shifts.items():
        contexts[name][:, entry] += by
    return contexts


GOOD = vectors(a=(0, 1.0), b=(1, -1.0), c=(2, 1.5))


def failing(result, status=FAILS):
    return [
        f"{finding.assumption}: {finding.message}"
        for finding in result.findings
        if finding.status == status
    ]


def test_good_contexts_pass():
    result = check(GOOD)
    assert result.passed and all(
        finding.status == HOLDS and not finding.advice for finding in result.findings
    )
    assert str(result).endswith(
        "Nothing speaks against identifying the concepts from these contexts."
    )
    assert list(result.from_obs) == ["a", "b", "c"] and list(result.pairs) == [
        "a / b",
        "a / c",
        "b / c",
    ]
    assert json.loads(json.dumps(result.to_dict()))["from_obs"]["a"]["told_apart"] is True
    assert check(GOOD).to_dict() == result.to_dict()


def test_no_observational_images():
    result = check({name: x for name, x in GOOD.items() if name != "obs"})
    assert "there are no observational images (the contexts are a, b, c)" in failing(result)[0]
    assert not result.from_obs and result.pairs and not result.passed


def test_a_concept_without_a_context_of_its_own():
    contexts = {name: x for name, x in GOOD.items() if name != "c"} | {"a+c": GOOD["c"]}
    result = check(contexts)
    assert "'c' has no context in which it alone was intervened on, only a+c." in failing(result)[0]
    assert (
        "'d' has no context in which it alone was intervened on."
        in failing(check(GOOD, ["a", "b", "c", "d"]))[0]
    )


def test_a_context_that_changes_nothing():
    result = check(GOOD | {"d": vectors(seed=5)["obs"]})
    assert len(failing(result)) == 1 and failing(result)[0].startswith(
        "'d' differs from 'obs': the classifier tells them apart"
    )
    assert "those of d are too small to compare" in failing(result, WEAK)[0]
    assert "1 of 8 findings, speaks against" in str(result)


def test_a_concept_under_two_names():
    result = check(GOOD | {"again": vectors(seed=5, c=(2, 1.5))["c"]})
    assert "again / c are told apart with" in failing(result)[0]
    assert "again, c move the data alike" in failing(result)[1]


def test_a_concept_changed_to_two_values():
    """The contexts differ, but their shifts have one direction."""
    result = check(GOOD | {"more": vectors(seed=5, c=(2, 3.0))["c"]})
    assert [line.split(":")[0] for line in failing(result)] == ["independent directions"]
    assert "c, more move the data alike" in failing(result)[0]


def test_few_images_and_copies():
    few = check({name: x[:200] for name, x in GOOD.items()})
    assert (
        "few images: obs (200), a (200), b (200), c (200)." in failing(few, WEAK)[0]
        and few.images["a"] == 200
    )
    too_few = check(GOOD | {"b": GOOD["b"][:7]})
    assert "few images: b (7)." in failing(too_few)[0] and "b" not in too_few.from_obs
    copies = check(GOOD | {"d": np.repeat(vectors(seed=5)["obs"][:30], 40, axis=0)})
    assert "copies of others of their context: d (1170)" in failing(copies, WEAK)[0]
    assert not copies.from_obs["d"].told_apart, "copies are not known again"


def test_shifts_by_hand():
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(4, 4))
    obs, a, b = (rng.normal(size=(50_000, 4)) @ mixing for _ in range(3))
    a += 1.0 * mixing[0]
    b += 0.5 * (mixing[0] + mixing[1])
    spectrum = shifts.shift_spectrum(obs, {"a": a, "b": b})
    assert (
        spectrum["hidden"] == [] and spectrum["closest"] == ["a", "b"] and spectrum["noise"] < 0.05
    )
    # Two directions at 45 degrees: sqrt(1 +- cos 45).
    assert spectrum["singular_values"] == pytest.approx(
        [np.sqrt(1 + np.sqrt(0.5)), np.sqrt(1 - np.sqrt(0.5))], abs=0.03
    )


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({}, "there are no images"),
        ([1], "there are no images"),
        ({"obs": GOOD["obs"]}, "no context but the observational one"),
        (GOOD | {"c": GOOD["c"][:, :4]}, r"'c' have the shape \(4,\), those of 'obs' \(6,\)"),
        (GOOD | {"c": np.arange(5)}, r"array of numbers \(n, ...\), not int64 of the shape \(5,\)"),
        (GOOD | {"c": np.full((30, 2), None)}, "not object of the shape"),
        (GOOD | {"c": np.zeros((30, 0))}, r"not float64 of the shape \(30, 0\)"),
        (GOOD | {"c": GOOD["c"] * np.nan}, "must be finite"),
        (GOOD | {"a+b": GOOD["c"], "b+a": GOOD["c"]}, "'a\\+b' is given twice"),
    ],
)
def test_bad_input(images, message):
    with pytest.raises(ValueError, match=message):
        check(images)


def test_bad_options():
    with pytest.raises(ValueError, match="unknown concept 'c'; the known ones are obs, a, b"):
        check(GOOD, ["a", "b"])
    with pytest.raises(
        ValueError, match="at least 20 images of a context are needed for a test, not 5"
    ):
        check(GOOD, max_images=5)


@pytest.fixture
def folder(tmp_path):
    """Make an image folder with the observational context and those of two concepts."""
    for context in ("obs", "quad3", "quad1+quad3"):
        (tmp_path / context).mkdir()
        for number, pixels in enumerate(quad.images_by_context([context], 60, 8)[context]):
            Image.fromarray(pixels).save(tmp_path / context / f"{number}.png")
    return tmp_path


def test_the_command(folder, capsys):
    assert cli.main(["check", str(folder), "--resolution", "8"]) == 1
    said = capsys.readouterr().out
    assert (
        "FAILS a context for each concept: 'quad1' has no context in which it alone was intervened"
        " on, only quad1+quad3." in said
    )
    assert cli.main(["check", str(folder), "--resolution", "8", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["images"] == {
        "obs": 60,
        "quad3": 60,
        "quad1+quad3": 60,
    }
    assert cli.main(["check", str(folder / "nowhere")]) == 1
    assert "error: there is no folder" in capsys.readouterr().err


@pytest.mark.slow
def test_quad_passes(capsys):
    assert cli.main(["check", "quad"]) == 0
    assert "Nothing speaks against" in capsys.readouterr().out


# Recovery


@pytest.mark.parametrize("width", [1, 2])
def test_structure_of_concepts_known_up_to_a_linear_map(width):
    simulation = recovery_data.simulate(d=3, width=width, seed=1)
    total = 3 * width
    z = [
        simulation.sample(k, 4000, 0)[1] @ simulation.concepts.reshape(total, -1).T
        for k in range(4)
    ]
    mixing = np.random.default_rng(0).normal(size=(total, total))
    unmix = _structure([x @ mixing for x in z], Structure(3, width, range(3)))
    # from each concept to each recovered one
    blocks = np.abs(mixing @ unmix.T).reshape(3, width, 3, width).sum((1, 3))
    assert (np.diag(blocks) > 10 * (blocks - np.diag(np.diag(blocks))).max(0)).all()


def test_logits_are_density_ratios():
    """They agree with torch's densities for a random structure without cycles."""
    structure = Structure(3, 2, [0, 2])
    with torch.no_grad():
        for parameter in structure.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
        structure.edges.tril_()
        structure.edges[[1, 3, 5], [0, 2, 4]] = 0  # within a block
        z = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
        matrices, offsets = structure.whitening()
        logs = [
            torch.distributions.MultivariateNormal(
                torch.linalg.solve(m, t), precision_matrix=m.T @ m
            ).log_prob(z)
            for m, t in zip(matrices.double(), offsets.double())
        ]
        expected = torch.stack([log - logs[0] for log in logs], 1).float()
        torch.testing.assert_close(structure.logits(z), expected, rtol=1e-3, atol=1e-3)


def test_simulated_contexts():
    """An intervention changes its concept and the effects of it, and cuts its incoming edges."""
    simulation = recovery_data.simulate(d=4, seed=3)
    size = 40_000
    z = [simulation.sample(k, size, 0)[1] @ simulation.concepts[:, 0].T for k in range(5)]
    np.testing.assert_allclose(z[0].std(0), 1, atol=0.03)
    for k in range(4):
        np.testing.assert_allclose(z[k + 1][:, :k].mean(0), z[0][:, :k].mean(0), atol=0.03)
        np.testing.assert_allclose(z[k + 1][:, k].mean(), simulation.shift[k + 1, k, 0], atol=0.03)
        np.testing.assert_allclose(np.corrcoef(z[k + 1].T)[k, :k], 0, atol=0.03)
    x, e = simulation.sample(0, 50, 0)
    assert x.shape == (50, 12) and e.shape == (50, 6)
    np.testing.assert_array_equal(x, simulation.sample(0, 50, 0)[0])


def test_broken_assumptions():
    def contexts(broken, **options):
        simulation = recovery_data.simulate(d=3, broken=broken, seed=1, **options)
        return simulation, [
            simulation.sample(k, 20_000, 0)[1] @ simulation.concepts[:, 0].T for k in range(4)
        ]

    simulation, z = contexts("unchanged")
    np.testing.assert_allclose(np.cov(z[3].T), np.cov(z[0].T), atol=0.05)
    simulation, z = contexts("soft")
    assert np.abs(np.corrcoef(z[3].T)[2, :2]).max() > 0.1, "edges are kept"
    simulation, _ = contexts("dependent-rows")
    assert np.linalg.matrix_rank(simulation.concepts[:, 0]) == 2
    simulation, _ = contexts("folded")
    e = np.random.default_rng(0).normal(size=(5, 5))
    np.testing.assert_array_equal(simulation._decode(e), simulation._decode(-e))
    _, noisy = contexts(None, noise=0.5)
    np.testing.assert_allclose(noisy[0].var(0), 1.25, atol=0.06)


def test_recovery_in_seconds():
    result = simulate_and_recover(2000, steps=1500, d=3, seed=0)
    assert result["mcc"] > 0.9 > result["floor"] and len(result["correlations"]) == 3
    assert 0 <= result["angle"] <= result["worst_angle"] <= 90


def test_score_of_the_truth():
    """An encoder that returns the true concepts has angles of 0."""
    simulation = recovery_data.simulate(d=3, width=2, seed=0)

    class Truth:
        def encode(self, x):
            _, e = simulation.sample(0, len(x), 7)
            return np.einsum("jwe,ne->njw", simulation.concepts, e) @ [[2, 1], [0, 1]]

    result = score(simulation, Truth(), seed=7)
    assert (
        result["mcc"] == pytest.approx(1)
        and result["worst_angle"] < 0.01
        and result["floor"] < 0.95
    )


def test_the_study(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        study,
        "ROWS",
        {"two": {"d": 2, "samples": 50}, "missing": {"d": 2, "samples": 50, "broken": "missing"}},
    )
    monkeypatch.setattr(rows, "ProcessPoolExecutor", study_in_this_process)
    assert study.main(["--output", str(tmp_path), "--steps", "20", "--seeds", "2"]) == 0
    assert (tmp_path / "identifiability.md").read_text() in capsys.readouterr().out
    assert [
        row["seed"]
        for row in json.loads((tmp_path / "identifiability.json").read_text())["missing"]
    ] == [0, 1]
    assert study.main(["--output", str(tmp_path), "--steps", "20", "--seeds", "2"]) == 0
    assert "seed" not in capsys.readouterr().out, "finished jobs are not run again"


def study_in_this_process(_):
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(1)


def test_bad_recovery():
    with pytest.raises(ValueError, match="choose one of " + ", ".join(recovery_data.BROKEN)):
        recovery_data.simulate(broken="linear")
    with pytest.raises(ValueError, match="not 1 and 1"):
        recovery_data.simulate(d=1)
    for contexts in ([None, None], [np.zeros((5, 3)), None]):
        with pytest.raises(
            ValueError, match="an observational and an interventional context with at least"
        ):
            recover(np.zeros((30, 3)), contexts)


@pytest.mark.slow
def test_assumptions_met():
    """The target: six concepts, 10,000 samples of each context."""
    assert simulate_and_recover(10_000, seed=0)["mcc"] >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("broken", recovery_data.BROKEN)
def test_assumptions_dropped(broken):
    """The affected concept is lost, or all concepts if the assumption is about all."""
    result = simulate_and_recover(3000, steps=3000, d=4, broken=broken, seed=0)
    found = (
        result["correlations"][result["affected"]]
        if broken in ("missing", "unchanged")
        else min(result["correlations"])
    )
    assert found < 0.85
