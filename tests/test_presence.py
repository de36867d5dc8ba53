"""Presence of concepts, composition relative to the product of single rates, verdicts."""

import numpy as np
import pytest
from scipy.stats import norm

from hf_intervene.metrics.detector import Share, proportion
from hf_intervene.metrics.presence import composition_ratio, presence_shares, verdict


CONCEPTS = ("a", "b", "c")
RNG = np.random.default_rng(0)


@pytest.mark.parametrize("wanted", [(), ("a",), ("a", "c")])
def test_shares_by_a_slow_loop(wanted):
    found = RNG.random((200, 3)) < 0.6
    shares = presence_shares(found, wanted, CONCEPTS, np.ones(3, bool))
    hits, exact, unwanted = 0, 0, 0
    for row in found:
        there = {name for name, present in zip(CONCEPTS, row) if present}
        hits += there >= set(wanted)
        exact += there == set(wanted)
        unwanted += bool(there - set(wanted))
    if wanted:
        assert shares.all_wanted.value == hits / 200
        low, high = shares.all_wanted.interval
        assert low < shares.all_wanted.value < high
    else:
        assert shares.all_wanted is None
    assert shares.exact.value == exact / 200 and shares.unwanted.value == unwanted / 200
    assert {name: share.value for name, share in shares.rates.items()} == dict(
        zip(CONCEPTS, found.mean(0))
    )
    assert shares.to_dict()["images"] == 200


def test_an_unusable_concept_has_no_presence_and_does_not_count_for_others():
    found = np.array([[True, True, False], [True, False, False]])
    usable = np.array([True, False, True])
    other, own = (presence_shares(found, [name], CONCEPTS, usable) for name in ("a", "b"))
    assert other.exact.value == 1 and other.unwanted.value == 0 and set(other.rates) == {"a", "c"}
    assert own.all_wanted is None and own.exact is None and own.unwanted.value == 1
    assert presence_shares(found, ["a", "b"], CONCEPTS, usable).all_wanted is None
    with pytest.raises(ValueError, match="knows no concept 'd'; it knows a, b, c"):
        presence_shares(found, ["d"], CONCEPTS, usable)


def test_interval_of_a_share_is_wilsons():
    share = proportion(np.arange(50) < 20)
    z, n, p = norm.ppf(0.975), 50, 0.4
    middle, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert share.interval == pytest.approx(
        ((middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n))
    )


def test_composition_ratio():
    def share(value):
        return Share(value, (0, 1))

    found = composition_ratio(share(0.3), 1000, [(share(0.5), 1000), (share(0.6), 1000)])
    assert found.product == pytest.approx(0.3) and found.ratio == pytest.approx(1)
    # Delta method: variances of the logarithms add up.
    error = np.sqrt(sum((1 - p) / (p * 1000) for p in (0.3, 0.5, 0.6)))
    assert found.interval == pytest.approx((np.exp(-1.96 * error), np.exp(1.96 * error)), abs=0.03)
    assert composition_ratio(share(0.0), 10, [(share(0.0), 10), (share(1.0), 10)]) is None


@pytest.mark.parametrize(
    ("generated", "obs", "words"),
    [
        (0.9, 0.05, "clear"),
        (0.49, 0.05, "partly (49 % of 96 %)"),
        (0.05, 0.05, "not to be told from obs"),
        (
            0.97,
            0.97,
            "not to be told from obs, but found in 97 % of obs samples (real ones: 5 %)",
        ),
        (0.95, 0.4, "clear, but found in 40 % of obs samples (real ones: 5 %)"),
    ],
)
def test_verdicts(generated, obs, words):
    shares = [proportion(np.arange(1000) < round(1000 * p)) for p in (generated, 0.96, obs, 0.05)]
    assert verdict(*shares) == words
