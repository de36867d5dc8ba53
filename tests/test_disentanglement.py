"""Measures of disentanglement: codes with known scores, and slow loops of the definitions."""

import math
import sys
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr

from hf_intervene.metrics import (
    block_mcc,
    block_predictions,
    dci,
    mcc,
    measure,
    measure_blocks,
    mig,
    sap,
    scored,
    two_sample_test,
)
from hf_intervene.metrics.disentanglement import MIN_SAMPLES, concentration


RNG = np.random.default_rng(0)
FACTORS = RNG.normal(size=(2000, 3))
ROTATION = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))[0]
CODES = {
    "perfect": FACTORS[:, [2, 0, 1]] * [-1, 3, 0.1] + 5,
    "monotone": np.exp(FACTORS),
    "rotated": FACTORS @ ROTATION,
    "random": RNG.normal(size=(2000, 3)),
    "duplicated": np.repeat(FACTORS, 2, axis=1),
}


@pytest.mark.parametrize("predictor", ["lasso", "boosting"])
def test_dci_of_known_codes(predictor):
    found = {name: dci(codes[:1000], FACTORS[:1000], predictor) for name, codes in CODES.items()}
    perfect, rotated, chance = found["perfect"], found["rotated"], found["random"]
    assert (
        perfect.disentanglement > 0.95
        and perfect.completeness > 0.95
        and perfect.informativeness > 0.95
    )
    assert perfect.importance.argmax(0).tolist() == [1, 2, 0]
    assert (
        rotated.disentanglement < 0.6
        and rotated.completeness < 0.6
        and rotated.informativeness > 0.8
    )
    assert chance.informativeness < 0.02
    duplicated = found["duplicated"]
    assert duplicated.disentanglement > 0.95 and duplicated.informativeness > 0.95
    if predictor == "boosting":  # trees use both codes of a factor; the lasso may use only one
        assert duplicated.completeness == pytest.approx(1 - math.log(2) / math.log(6), abs=0.15)


def test_gaps_of_known_codes():
    for measured in (mig, sap):
        assert measured(CODES["perfect"], FACTORS) == pytest.approx(1, abs=0.15)
        assert measured(CODES["duplicated"], FACTORS) == pytest.approx(0, abs=1e-9)
        assert measured(CODES["random"], FACTORS) < 0.05
        assert measured(CODES["rotated"], FACTORS) < 0.7
    assert mig(CODES["monotone"], FACTORS) == pytest.approx(mig(FACTORS, FACTORS))
    assert sap(CODES["monotone"], FACTORS) < sap(FACTORS, FACTORS) - 0.2
    assert (
        mig(FACTORS[:, :1], FACTORS[:, :1])
        == pytest.approx(1)
        == pytest.approx(sap(FACTORS[:, :1], FACTORS[:, :1]))
    )


def test_correlations_of_known_codes():
    assert mcc(CODES["perfect"], FACTORS) == pytest.approx(1)
    assert mcc(CODES["monotone"], FACTORS, "spearman") == pytest.approx(1)
    assert mcc(CODES["monotone"], FACTORS) < 0.9
    assert mcc(CODES["random"], FACTORS) < 0.1 and mcc(CODES["random"], FACTORS, "spearman") < 0.1
    # With independent factors of one variance, the correlations of a code are its weights.
    expected = (
        max(sum(abs(ROTATION[k, p[k]]) for k in range(3)) for p in permutations(range(3))) / 3
    )
    assert mcc(CODES["rotated"], FACTORS) == pytest.approx(expected, abs=0.05)
    assert mcc(FACTORS[:, :2], FACTORS) == pytest.approx(2 / 3, abs=0.05), (
        "a factor without a code counts as 0"
    )
    assert mcc(np.column_stack([FACTORS, np.ones(2000)]), FACTORS) == pytest.approx(1), (
        "a dead code costs nothing"
    )


def test_blocks_are_read_whole():
    """Each factor is a combination of the entries of its block, not a single entry."""
    noise = RNG.normal(size=(2000, 3))
    blocks = np.stack([FACTORS + 2 * noise, FACTORS - 2 * noise], 2)[:, [1, 2, 0]]
    assert block_mcc(blocks, FACTORS) == pytest.approx(1)
    assert mcc(blocks.reshape(2000, -1), FACTORS) < 0.6
    assert block_mcc(RNG.normal(size=(2000, 3, 4)), FACTORS) < 0.1
    assert block_mcc(CODES["rotated"][..., None], FACTORS) == pytest.approx(
        mcc(CODES["rotated"], FACTORS), abs=0.02
    )
    assert block_mcc(np.zeros((2000, 3, 2)), FACTORS) == 0


def curved_blocks(samples=600):
    """Blocks 0 and 1 hold the factors of these numbers on curves, block 2 holds noise."""
    rng = np.random.default_rng(4)
    factors = rng.uniform(-1.5, 1.5, size=(samples, 2))
    curves = np.stack([np.cos(2 * factors), np.sin(2 * factors), factors**2], axis=2)
    return np.concatenate([curves, rng.normal(size=(samples, 1, 3))], axis=1), factors


def test_a_kernel_follows_curves():
    blocks, factors = curved_blocks()
    own, other = (block_mcc(blocks[:, order], factors, "kernel") for order in ([0, 1], [2]))
    assert own > 0.97 and other < 0.1
    assert block_mcc(blocks, factors) < 0.9


def test_predictions_are_of_samples_that_were_held_out():
    """Noise of as many entries as samples predicts its training samples and no others."""
    rng = np.random.default_rng(0)
    blocks, factors = rng.normal(size=(100, 1, 60)), rng.normal(size=(100, 1))
    for predictor in ("linear", "kernel"):
        predicted = block_predictions(blocks, factors, predictor)[:, 0, 0]
        assert abs(np.corrcoef(predicted, factors[:, 0])[0, 1]) < 0.35


def test_scores_of_blocks():
    """Known codes: apart and clean, the same in both blocks, each block with the other's factor."""
    blocks, factors = curved_blocks()
    clean = measure_blocks(blocks, factors, (0, 1), resamples=10)
    for name in ("mcc", "own_block", "disentanglement", "completeness"):
        assert clean[name].value > 0.95, name
    assert 0.8 < clean["informativeness"].value < 1
    assert clean["mcc"].floor < 0.15 and clean["mig"].floor < 0.1
    assert clean["other_block"].value < 0.15 and clean["sap"].value > 0.9
    assert clean["mcc_linear"].value < 0.9
    assert clean["mcc"].interval[0] < clean["mcc"].value < clean["mcc"].interval[1]
    both = np.concatenate([blocks[:, 0], blocks[:, 1]], axis=1)
    shared = measure_blocks(np.stack([both, both], axis=1), factors, (0, 1), resamples=2)
    assert shared["own_block"].value == pytest.approx(shared["other_block"].value)
    assert abs(shared["mig"].value) < 1e-9 and shared["disentanglement"].value < 0.05
    swapped = measure_blocks(blocks[:, [1, 0, 2]], factors, (0, 1), resamples=2)
    assert swapped["own_block"].value < 0.15 and swapped["other_block"].value > 0.97
    assert swapped["mcc"].value == pytest.approx(clean["mcc"].value)


def test_an_untrained_model_is_scored_beside():
    """Its codes have the score that they have alone; an order of rows that is another is not
    passed over."""
    blocks, factors = curved_blocks(300)
    other = np.concatenate([blocks[:, :1], blocks[:, 2:], blocks[:, 2:]], axis=1)
    found = measure_blocks(blocks, factors, (0, 1), 2, untrained=other)
    alone = measure_blocks(other, factors, (0, 1), 2)
    assert all(score.untrained == alone[name].value for name, score in found.items())
    assert all(score.untrained is None for score in alone.values())
    codes = {name: CODES[name][:100] for name in ("perfect", "random")}
    score = scored(mcc, codes["perfect"], FACTORS[:100], 2, untrained=codes["random"])
    assert score.untrained == mcc(codes["random"], FACTORS[:100]) < score.value
    with pytest.raises(ValueError, match=r"must have the shape \(100, 3\)"):
        scored(mcc, codes["perfect"], FACTORS[:100], untrained=codes["random"][:50])


@st.composite
def tables(draw):
    """Draw codes and factors with few values, so that all kinds of ties occur."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    codes, factors = (
        rng.integers(0, draw(st.integers(2, 5)), size=(30, draw(st.integers(1, 4))))
        for _ in range(2)
    )
    factors[:2] = [[0], [1]]
    return codes.astype(float), factors.astype(float)


@given(tables())
@settings(deadline=None, max_examples=50)
def test_slow_loops(table):
    codes, factors = table
    n, size = len(codes), codes.shape[1]

    def share(*conditions):
        return sum(all(column[i] == value for column, value in conditions) for i in range(n)) / n

    def information(x, y):
        total = 0.0
        for a in set(x):
            for b in set(y):
                both = share((x, a), (y, b))
                if both:
                    total += both * math.log(both / share((x, a)) / share((y, b)))
        return total

    def correlated(function, x, y):
        return abs(function(x, y).statistic) if len(set(x)) > 1 else 0.0

    gaps, separations, matrix = [], [], {"linear": [], "spearman": []}
    for y in factors.T:
        shared = sorted([information(x, y) for x in codes.T] + [0.0] * (size == 1), reverse=True)
        gaps.append((shared[0] - shared[1]) / information(y, y))
        r2 = sorted(
            [correlated(pearsonr, x, y) ** 2 for x in codes.T] + [0.0] * (size == 1), reverse=True
        )
        separations.append(r2[0] - r2[1])
        matrix["linear"].append([correlated(pearsonr, x, y) for x in codes.T])
        matrix["spearman"].append([correlated(spearmanr, x, y) for x in codes.T])
    assert mig(codes, factors) == pytest.approx(np.mean(gaps), abs=1e-9)
    assert sap(codes, factors) == pytest.approx(np.mean(separations), abs=1e-9)
    for kind, rows in matrix.items():
        # a factor without a code counts as correlation 0
        rows = [row + [0.0] * (len(rows) - size) for row in rows]
        best = max(
            sum(row[p[k]] for k, row in enumerate(rows)) for p in permutations(range(len(rows[0])))
        )
        assert mcc(codes, factors, kind) == pytest.approx(best / len(rows), abs=1e-9)


@given(
    st.lists(
        st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=3, max_size=3),
        min_size=1,
        max_size=4,
    )
)
def test_concentration_by_a_slow_loop(rows):
    total, weights = 0.0, sum(sum(row) for row in rows)
    for row in rows:
        shares = [x / sum(row) for x in row if x > 0] if sum(row) else []
        total += sum(row) * (1 + sum(p * math.log(p, 3) for p in shares))
    assert concentration(np.array(rows)) == pytest.approx(total / weights if weights else 0.0)


# Floors and intervals


def test_floor_and_interval():
    scores = measure(CODES["rotated"][:600], FACTORS[:600], resamples=10)
    for score in scores.values():
        assert (
            score.interval[0] < score.value < score.interval[1]
            and score.to_dict()["floor"] == score.floor
        )
    assert (
        scores["mcc_linear"].floor < 0.15
        and scores["mig"].floor < 0.1
        and scores["informativeness"].floor < 0.02
    )
    chance = measure(CODES["random"][:600], FACTORS[:600], resamples=2)
    assert chance["mcc_linear"].value == pytest.approx(chance["mcc_linear"].floor, abs=0.05)


@pytest.mark.parametrize("function", [mig, sap, mcc])
def test_interval_is_as_wide_as_fresh_samples_scatter(function):
    rng = np.random.default_rng(5)

    def fresh():
        factors = rng.normal(size=(400, 2))
        return factors @ [[1, 0.6], [0.2, 1]] + 0.5 * rng.normal(size=(400, 2)), factors

    values = np.array([function(*fresh()) for _ in range(200)])
    half_widths = [
        np.ptp(scored(function, *fresh(), resamples=40, seed=k).interval) / 2 for k in range(10)
    ]
    assert np.mean(half_widths) == pytest.approx(1.96 * values.std(), rel=0.35)


def test_the_same_twice():
    assert scored(mcc, CODES["rotated"], FACTORS) == scored(mcc, CODES["rotated"], FACTORS)


# Two samples


def test_two_samples():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 1000, 5))
    same, shifted, spread = (
        two_sample_test(a, b),
        two_sample_test(a, b + 1),
        two_sample_test(a, 2 * b[:400]),
    )
    assert (
        not same.told_apart and same.interval[0] < 0.5 < same.interval[1] and same.samples == 1000
    )
    assert (
        shifted.told_apart
        and shifted.accuracy > 0.8
        and spread.told_apart
        and spread.samples == 400
    )
    assert shifted.to_dict()["told_apart"] is True and two_sample_test(a, b) == same


def test_samples_of_one_distribution_are_rarely_distinguished():
    rng = np.random.default_rng(1)
    accuracies = [two_sample_test(*rng.normal(size=(2, 200, 3)), seed=k) for k in range(60)]
    assert sum(test.told_apart for test in accuracies) <= 6  # 2.5 % are expected
    assert np.mean([test.accuracy for test in accuracies]) == pytest.approx(0.5, abs=0.02)


def test_two_samples_of_images():
    rng = np.random.default_rng(2)
    images = rng.integers(0, 200, size=(2, 100, 8, 8, 3), dtype=np.uint8)
    assert two_sample_test(images[0], images[1] + 50).told_apart


# Bad input


@pytest.mark.parametrize(
    ("codes", "factors", "message"),
    [
        (FACTORS[:30], FACTORS[:31], r"not \(30, 3\) and \(31, 3\)"),
        (FACTORS[:, 0], FACTORS, r"codes \(n, D\) and factors \(n, K\)"),
        (FACTORS[:, :0], FACTORS, r"not \(2000, 0\)"),
        (FACTORS[:5], FACTORS[:5], f"at least {MIN_SAMPLES} samples are needed, not 5"),
        (np.where(FACTORS > 2, np.nan, FACTORS), FACTORS, "must be finite"),
        (FACTORS, np.column_stack([FACTORS[:, 0], np.full(2000, 0.1)]), "factor 1 has one value"),
    ],
)
def test_bad_input(codes, factors, message):
    for function in (mig, sap, mcc, dci):
        with pytest.raises(ValueError, match=message):
            function(codes, factors)


def test_bad_options(monkeypatch):
    with pytest.raises(ValueError, match="choose one of linear, spearman"):
        mcc(FACTORS, FACTORS, "pearson")
    with pytest.raises(ValueError, match="choose one of boosting, lasso"):
        dci(FACTORS, FACTORS, "forest")
    with pytest.raises(ValueError, match=r"\(samples, blocks, width\), not \(2000, 3\)"):
        block_mcc(FACTORS, FACTORS)
    with pytest.raises(ValueError, match="choose one of linear, kernel"):
        block_mcc(FACTORS[..., None], FACTORS, "forest")
    for own in ((0, 3), (0, 1, 2, 0)):
        with pytest.raises(ValueError, match="a column of 3 factors for each of at most 3 blocks"):
            measure_blocks(FACTORS[..., None], FACTORS, own)
    with pytest.raises(ValueError, match="cannot be compared"):
        two_sample_test(FACTORS, FACTORS[:, :2])
    with pytest.raises(ValueError, match="at least 20 samples in each set, not 7"):
        two_sample_test(FACTORS, FACTORS[:7])
    with pytest.raises(ValueError, match="must be finite"):
        two_sample_test(FACTORS, np.where(FACTORS > 2, np.nan, FACTORS))
    monkeypatch.setitem(sys.modules, "sklearn", None)
    for function in (dci, two_sample_test, measure_blocks):
        with pytest.raises(ImportError, match="hf-intervene\\[eval\\]"):
            function(FACTORS, FACTORS)
