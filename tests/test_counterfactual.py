"""Edits whose true answers are known, and the twins of quad."""

import numpy as np
import pytest

from hf_intervene.data import quad
from hf_intervene.metrics.counterfactual import another_change, counterfactual_error


BEFORE = quad.images_by_context(["obs"], 30, 16)["obs"]
TRUTH = quad.twins(["quad1"], 30, 16)["quad1"]


def test_known_errors():
    right = counterfactual_error(BEFORE, TRUTH, TRUTH, BEFORE, TRUTH)
    assert (
        right.edited == right.ratio == right.reconstructed == right.outside == 0
        and right.images == 30
    )
    nothing = counterfactual_error(BEFORE, TRUTH, BEFORE, BEFORE, TRUTH)
    assert nothing.ratio == 1 and nothing.edited == nothing.unedited and nothing.outside is None
    slow = [np.sqrt((((a / 255) - (b / 255)) ** 2).mean()) for a, b in zip(BEFORE, TRUTH)]
    assert nothing.unedited == pytest.approx(np.mean(slow))
    assert nothing.edited_interval[0] < nothing.edited < nothing.edited_interval[1]
    half = (BEFORE / 510 + TRUTH / 510).astype(np.float32)
    found = counterfactual_error(BEFORE, TRUTH, half, BEFORE, TRUTH)
    assert found.ratio == pytest.approx(0.5, abs=1e-4) and found.ratio_interval == pytest.approx(
        (0.5, 0.5), abs=1e-4
    )
    assert counterfactual_error(BEFORE, BEFORE, TRUTH, BEFORE, BEFORE).ratio is None


def test_another_ones_change_is_right_outside_and_wrong_inside():
    before = np.zeros((4, 2, 2, 1), np.float32)
    truth = before.copy()
    truth[:, 0, 0, 0] = [0.2, 0.4, 0.6, 0.8]  # drawn for each image
    changed = another_change(before, truth, 0)
    assert not changed[:, 1].any() and not changed[:, 0, 1].any()
    assert sorted(changed[:, 0, 0, 0]) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert (changed[:, 0, 0, 0] != truth[:, 0, 0, 0]).all()
    found = counterfactual_error(before, truth, truth, before, truth)
    expected = np.abs(changed - truth)[:, 0, 0, 0].mean() / 2  # in one of four pixels
    assert found.edited == 0 and found.another == pytest.approx(expected)


def test_what_changes_outside():
    moved = TRUTH.copy()
    moved[:, :8] = 255 - moved[:, :8]  # the upper half, which quad1 does not change
    found = counterfactual_error(BEFORE, TRUTH, moved, BEFORE, TRUTH)
    changed = np.abs(moved.astype(int) - BEFORE)
    still = (TRUTH == BEFORE).all(-1, keepdims=True)
    assert (
        found.outside == pytest.approx((changed * still).sum() / changed.sum(), rel=1e-5)
        and found.outside > 0.5
    )


def test_images_that_do_not_belong_together():
    with pytest.raises(ValueError, match="five arrays of one shape"):
        counterfactual_error(BEFORE, TRUTH[:3], BEFORE, BEFORE, TRUTH)


def test_twins_of_quad():
    twins = quad.twins(["quad4", "size+orientation"], 20, 32, "dependent", 5)
    assert list(twins) == ["obs", "quad4", "size+orientation"]
    np.testing.assert_array_equal(
        twins["obs"], quad.images_by_context(["obs"], 20, 32, seed=5)["obs"]
    )
    # size and orientation cause nothing that the quadrants show but quad1, of which orientation is
    # a cause.
    np.testing.assert_array_equal(twins["size+orientation"][:, 0, -1], twins["obs"][:, 0, -1])
    assert (twins["quad4"][:, 0, -1] != twins["obs"][:, 0, -1]).any()
    latents = quad.sample_latents("obs", 20, "dependent", 5)
    truth = quad.render(quad.counterfactual_latents(latents, "quad4"), 32)
    np.testing.assert_array_equal(twins["quad4"], truth)
