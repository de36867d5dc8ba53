"""Measures compared with POT, closed forms and results by hand."""

import sys

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hf_intervene.metrics import (
    bits_per_pixel,
    compare,
    context_leakage,
    kernel_distance,
    mean_interval,
    sliced_wasserstein,
    transport,
)
from hf_intervene.metrics.transport import (
    PAPER_DISTINCT,
    PAPER_REPEATS,
    directions,
    project,
    sliced_w2,
)


def images(n, seed=0, shift=0.0, side=4):
    rng = np.random.default_rng(seed)
    return (
        (0.5 + 0.1 * rng.standard_normal((n, side, side, 3)) + shift).clip(0, 1).astype(np.float32)
    )


@pytest.mark.parametrize(("n", "m"), [(60, 60), (60, 45), (17, 64)])
def test_distance_equals_pot(n, m):
    a, b = images(n, 1), images(m, 2, 0.05)
    expected = ot.sliced_wasserstein_distance(
        a.reshape(n, -1), b.reshape(m, -1), n_projections=70, seed=3, p=2
    )
    assert sliced_wasserstein(a, b, 70, seed=3) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("bytes_", [True, False])
@pytest.mark.parametrize(
    "chunk", [7, 10**6]
)  # pixels projected at once: sets in one part, or in several with a smaller last one
def test_distance_of_large_sets_is_pots_for_the_same_directions(monkeypatch, bytes_, chunk):
    monkeypatch.setattr(transport, "_CHUNK", chunk)
    rng = np.random.default_rng(0)
    axes = directions(48, 60, 1)
    sets = [
        rng.integers(0, high, (n, 4, 4, 3), dtype=np.uint8)
        for high, n in ((256, 1000), (250, 1000), (256, 700))
    ]
    exact = [x.reshape(len(x), -1) / 255 for x in sets]
    given = sets if bytes_ else [x.astype(np.float32) for x in exact]
    for other in (1, 2):
        expected = ot.sliced_wasserstein_distance(
            exact[0], exact[other], projections=axes.astype(np.float64), p=2
        )
        assert sliced_w2(*(project(given[k], axes) for k in (0, other))) == pytest.approx(
            expected, abs=1e-5, rel=1e-5
        )


def test_no_float_copy_of_all_images_is_made(monkeypatch):
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            self.elements = (
                max(self.elements, output.numel())
                if isinstance(output, torch.Tensor)
                else self.elements
            )
            return output

    monkeypatch.setattr(transport, "_CHUNK", 6400)
    pixels = np.random.default_rng(0).integers(0, 256, (1000, 100), dtype=np.uint8)
    pixels.flags.writeable = False  # like a memory map
    axes = directions(100, 5)
    with Largest() as largest:
        projected = project(pixels, axes)
    assert largest.elements == 6400
    np.testing.assert_allclose(projected, (pixels / 255) @ axes, rtol=1e-4, atol=1e-5)


def test_interval_equals_that_of_pot_on_halves():
    sets = images(31, 1), images(40, 2), images(40, 3, 0.05)
    axes = directions(48, 30)
    a, _, c = (x.reshape(len(x), -1).astype(np.float64) @ axes for x in sets)
    rng = np.random.default_rng(4)
    halves = []
    for _ in range(20):
        pair = [x[rng.permutation(len(x))[: len(x) // 2]] for x in (a, c)]
        halves.append(ot.wasserstein_1d(*pair, p=2).mean() ** 0.5)
    result = transport.compare_projected(*(project(x, axes) for x in sets), resamples=20, seed=4)
    assert result.interval[1] - result.distance == pytest.approx(
        1.96 * np.std(halves, ddof=1), rel=1e-4
    )


def test_distance_of_a_shift_is_its_root_mean_square():
    a = images(50)
    shift = np.random.default_rng(1).uniform(-0.05, 0.05, (4, 4, 3)).astype(np.float32)
    axes = directions(48, 4000)
    projected = [x.reshape(50, -1) @ axes for x in (a, a + shift)]
    assert sliced_w2(*projected) == pytest.approx(np.sqrt((shift**2).mean()), rel=0.05)


@pytest.mark.parametrize("protocol", transport.PROTOCOLS)
def test_the_shift_of_means_and_the_rest_make_the_distance(protocol):
    sets = [images(n, seed, shift) for n, seed, shift in ((90, 1, 0), (70, 2, 0), (70, 3, 0.05))]
    axes = directions(48, 30)
    a, b, c = (project(x, axes) for x in sets)
    result = transport.compare_projected(a, b, c, protocol)
    used = slice(PAPER_DISTINCT) if protocol == "paper" else slice(None)
    for other, distance, shift in (
        (c, result.distance, result.mean_shift),
        (b, result.floor, result.mean_shift_floor),
    ):
        centred = sliced_w2(a - a.mean(0), other[used] - other[used].mean(0))
        assert np.hypot(shift, centred) == pytest.approx(distance, rel=1e-4)
    assert result.mean_shift > 3 * result.mean_shift_floor


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 100))
@settings(deadline=None, max_examples=30)
def test_distance_is_a_distance(n, m, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((n, 5)), rng.standard_normal((m, 5))
    assert sliced_w2(a, b) == pytest.approx(sliced_w2(b, a)) and sliced_w2(a, b) >= 0
    assert sliced_w2(a, rng.permutation(a)) == 0
    assert sliced_w2(a, np.repeat(a, 3, axis=0)) == pytest.approx(0, abs=1e-9)


def test_bytes_and_fractions_are_the_same_image():
    a = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), dtype=np.uint8)
    b = images(20)
    assert sliced_wasserstein(a, b) == pytest.approx(
        sliced_wasserstein(a.astype(np.float32) / 255, b), rel=1e-5
    )


def test_paper_protocol_is_the_explicit_repeat():
    real, other, generated = images(1280, 1), images(1280, 2), images(1280, 3, 0.03)
    repeat = lambda x: np.repeat(x[:PAPER_DISTINCT], PAPER_REPEATS, axis=0)  # noqa: E731
    result = compare(real, other, generated, "paper", 50)
    assert result.distance == pytest.approx(
        sliced_wasserstein(real, repeat(generated), 50), rel=1e-5
    )
    assert result.floor == pytest.approx(sliced_wasserstein(real, repeat(other), 50), rel=1e-5)
    assert result.ratio is None and result.ratio_interval is None  # 64 distinct images
    independent = compare(real, other, generated, "independent", 50)
    assert independent.ratio == pytest.approx(independent.distance / independent.floor)
    assert compare(real[:199], other, generated[:199], "independent", 50).ratio is None
    assert independent.floor < result.floor / 2, (
        "64 distinct images are a far higher floor than 1,280"
    )


def test_interval_covers_what_repeated_draws_give():
    """New draws of both sets vary as much as the interval of one draw says."""
    fresh = [
        compare(
            images(200, 3 * k),
            images(200, 3 * k + 1),
            images(200, 3 * k + 2, 0.03),
            num_projections=40,
        )
        for k in range(40)
    ]
    distances = np.array([r.distance for r in fresh])
    widths = np.array([r.interval[1] - r.interval[0] for r in fresh])
    assert all(r.interval[0] <= r.distance <= r.interval[1] for r in fresh)
    covered = np.mean([r.interval[0] <= distances.mean() <= r.interval[1] for r in fresh])
    assert covered >= 0.8
    assert widths.mean() / 2 < 3 * 1.96 * distances.std(), "not wide for the sake of covering"


def test_floor_is_blind_to_the_generated_images():
    real, other = images(100, 1), images(100, 2)
    floors = {
        compare(real, other, images(100, 5, shift), num_projections=20).floor
        for shift in (0.0, 0.2)
    }
    assert len(floors) == 1


def test_bad_input(monkeypatch):
    a = images(100)
    with pytest.raises(ValueError, match="unknown protocol"):
        compare(a, a, a, "published")
    with pytest.raises(ValueError, match="as many other real images"):
        compare(a, a[:50], a)
    with pytest.raises(ValueError, match="at least 64 images"):
        compare(a, a[:50], a[:50], "paper")
    for bad in (a + 1, np.where(a > 0.5, np.nan, a)):
        with pytest.raises(ValueError, match="in \\[0, 1\\]"):
            sliced_wasserstein(a, bad)
    monkeypatch.setitem(sys.modules, "ot.sliced", None)
    directions.cache_clear()  # otherwise they are cached by an earlier test
    with pytest.raises(ImportError, match="hf-intervene\\[eval\\]"):
        sliced_wasserstein(a, a)


@pytest.mark.parametrize(
    "sets",
    [
        (np.zeros((0, 4, 4, 1)), np.zeros((9, 4, 4, 1))),
        (np.zeros((9, 4, 4, 1)), np.zeros((9, 4, 4, 3))),
        ([0.1, 0.2], [0.1, 0.3]),
    ],
)
def test_sets_without_images_or_of_two_shapes(sets):
    with pytest.raises(ValueError, match="sets of at least one image .* all of one shape"):
        sliced_wasserstein(*sets)
    with pytest.raises(ValueError, match="sets of at least one image .* all of one shape"):
        compare(sets[0], sets[1], sets[1])


def test_measures_of_numbers_that_are_not_finite():
    bad = np.full((30, 4), np.nan)
    with pytest.raises(ValueError, match="features must be finite"):
        kernel_distance(bad, np.zeros((30, 4)))
    contexts = np.repeat(["a", "b"], 15)
    with pytest.raises(ValueError, match="residuals must be finite"):
        context_leakage(bad, contexts)
    with pytest.raises(ValueError, match="30 residuals were given for 20 contexts"):
        context_leakage(np.zeros((30, 4)), contexts[:20])
    with pytest.raises(ValueError, match="no values to take the mean of"):
        mean_interval([])


def test_bits_per_pixel():
    # A pixel has 3 bits if each of its three channels has ln 2 nats.
    assert bits_per_pixel(4 * 6 * 3 * np.log(2), 4, 6) == pytest.approx(3.0)


def test_mean_interval():
    values = np.random.default_rng(0).normal(5, 2, 400)
    mean, (low, high) = mean_interval(values)
    assert mean == pytest.approx(values.mean()) and low < mean < high
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.15)
