"""Factors of samples against real ones: every defect changes its own measure."""

import numpy as np
import pytest

from hf_intervene.data import quad
from hf_intervene.metrics import read_factors
from hf_intervene.metrics.factor_match import (
    DEFECTS,
    correlation_slope,
    defective_latents,
    factor_table,
    match_factors,
)
from hf_intervene.metrics.factors import KINDS, true_factors


def factors(seed, variant="dependent"):
    return true_factors(quad.sample_latents("obs", 500, variant, seed))


def test_real_images_match_and_each_defect_shows_where_it_should():
    real = factors(1)
    floor = match_factors(real, factors(2))
    assert (
        floor.slope == pytest.approx(1, abs=0.1)
        and floor.slope_interval[0] < 1 < floor.slope_interval[1]
    )
    assert (
        floor.shape_distance < 0.08
        and floor.size_distance < 0.04
        and 0.4 < floor.two_sample["accuracy"] < 0.6
    )
    found = {
        name: match_factors(real, true_factors(defective_latents("obs", 500, "dependent", 2, name)))
        for name in DEFECTS
    }
    assert found["no triangles"].triangles == 0 and found[
        "no triangles"
    ].shape_distance == pytest.approx(0.33, abs=0.05)
    assert found["circles only"].shape_distance > 0.7 and found["circles only"].size_distance < 0.04
    assert (
        found["one size"].size_distance == pytest.approx(0.25, abs=0.03)
        and found["one size"].shape_distance < 0.08
    )
    assert found["one size"].slope < 0.85
    assert all(x.two_sample["accuracy"] > floor.two_sample["accuracy"] for x in found.values())


def test_the_slope_by_hand():
    a, b = (factor_table(factors(seed)) for seed in (1, 2))
    rows = [(i, j) for i in range(7) for j in range(i)]
    ra, rb = (np.array([np.corrcoef(x[:, i], x[:, j])[0, 1] for i, j in rows]) for x in (a, b))
    assert correlation_slope(a, b) == pytest.approx(
        np.linalg.lstsq(ra[:, None], rb, rcond=None)[0][0]
    )
    shuffled = np.column_stack(
        [np.random.default_rng(k).permutation(column) for k, column in enumerate(b.T)]
    )
    assert abs(correlation_slope(a, shuffled)) < 0.15
    independent = factor_table(factors(1, "independent"))
    assert correlation_slope(independent, b) is None
    assert match_factors(factors(1, "independent"), factors(2)).slope_interval is None


def test_latents_with_defects():
    for name in DEFECTS:
        latents = defective_latents("quad1", 50, "dependent", 0, name)
        images = quad.render(latents, 64)
        read = read_factors(images)
        kinds = read.kinds.argmax(1)
        if name == "no triangles":
            assert KINDS.index("triangle") not in kinds
        elif name == "circles only":
            assert (kinds == 0).all()
        else:
            assert (
                np.ptp(latents[:, quad.LATENTS.index("size")]) == 0
                and read.levels[:, 4].std() < 0.02
            )
    with pytest.raises(
        ValueError, match="no defect 'blue'; choose one of no triangles, one size, circles only"
    ):
        defective_latents("obs", 5, "dependent", 0, "blue")
