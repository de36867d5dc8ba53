"""The true factors of quad, read from images, and their changes by edits."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr, ndtri

from hf_intervene.data import quad, shapes
from hf_intervene.metrics import intervention_effects, read_error, read_factors
from hf_intervene.metrics.factors import (
    CHANCE,
    KINDS,
    LEVELS,
    Factors,
    factor_changes,
    palette_levels,
    true_factors,
)
from hf_intervene.metrics.networks import blurred


SHAPE, ORIENTATION, COLOR = (quad.LATENTS.index(name) for name in ("shape", "orientation", "color"))
# rotations within a full turn that look the same
TURNS = {
    "square": 4,
    "triangle": 3,
    "ellipse": 2,
}


@pytest.fixture(scope="module")
def latents():
    return quad.sample_latents("obs", 128, "dependent", 77)


@pytest.mark.parametrize(("resolution", "shape", "size"), [(32, 0.03, 0.015), (64, 0.005, 0.008)])
def test_factors_are_read_from_real_images(resolution, shape, size):
    error = read_error(resolution, 300)
    # of 1275 colours
    assert max(error[name] for name in ("quad1", "quad2", "quad3", "quad4", "color")) < 5e-4
    assert error["shape"] <= shape and error["size"] < size and error["orientation"] < 0.025


def test_blurred_images_are_read_too(latents):
    sharp = torch.from_numpy(quad.render(latents, 64)).permute(0, 3, 1, 2).float() / 255
    soft = blurred(sharp, torch.full((128,), 1.5)).permute(0, 2, 3, 1).numpy().clip(0, 1)
    truth, read = true_factors(latents), read_factors(soft)
    assert (truth.kinds.argmax(1) == read.kinds.argmax(1)).mean() > 0.9
    assert np.abs(truth.levels - read.levels).mean(0).max() < 0.03


def test_large_images_are_read_as_averaged_ones(latents):
    error = np.abs(
        read_factors(quad.render(latents[:20], 128)).levels - true_factors(latents[:20]).levels
    )
    assert error.max() < 0.05


@settings(deadline=None)
@given(st.floats(0, 1))
def test_levels_of_the_palette(level):
    assert palette_levels(shapes.palette(np.array(level)) / 255) == pytest.approx(level, abs=4e-4)


def test_the_nearest_colour_by_a_slow_search():
    colours = np.random.default_rng(0).random((20, 3))
    grid = np.linspace(0, 1, 5001)
    known = np.stack(
        [np.interp(grid * 5, range(6), shapes.PALETTE[:, k] / 255) for k in range(3)], 1
    )
    expected = [np.square(known - colour).sum(1).min() for colour in colours]
    position = palette_levels(colours) * 5
    found = np.stack(
        [np.interp(position, range(6), shapes.PALETTE[:, k] / 255) for k in range(3)], 1
    )
    np.testing.assert_allclose(np.square(found - colours).sum(1), expected, atol=1e-5)


def test_images_that_are_not_of_quad():
    with pytest.raises(
        ValueError, match=r"have the shape \(n, S, S, 3\), S at least 8, not \(2, 32, 16, 3\)"
    ):
        read_factors(np.zeros((2, 32, 16, 3), np.uint8))


# The factors and their changes


def drawn(kind, orientation):
    """Return the latents of one large shape."""
    u = np.full((1, 8), 0.9)
    u[0, SHAPE], u[0, ORIENTATION], u[0, COLOR] = KINDS.index(kind) / 3, orientation, 0.4
    return ndtri(np.clip(u, 1e-9, 1 - 1e-9))


@pytest.mark.parametrize("kind", TURNS)
def test_orientations_that_look_the_same_are_the_same(kind):
    latents, turned, half = (
        drawn(kind, u) for u in (0.1, 0.1 + 1 / TURNS[kind], 0.1 + 0.5 / TURNS[kind])
    )
    images = [quad.render(x, 64).astype(float) for x in (latents, turned, half)]
    assert np.abs(images[0] - images[1]).mean() < 0.2 < np.abs(images[0] - images[2]).mean()
    index = np.array([KINDS.index(kind)])
    same, most = (
        factor_changes(true_factors(latents), true_factors(x), index)[ORIENTATION]
        for x in (turned, half)
    )
    assert same == pytest.approx(0, abs=1e-6) and most == pytest.approx(0.5)


def test_kinds_are_those_that_are_drawn():
    """Each kind has its own image, and changes at the same latent as in the renderer."""
    u = np.full((61, 8), 0.3)
    u[:, SHAPE], u[:, COLOR] = np.linspace(0.003, 0.997, 61), 0.8
    images, kinds = quad.render(ndtri(u), 32), true_factors(ndtri(u)).kinds.argmax(1)
    other_image = [not np.array_equal(a, b) for a, b in zip(images, images[1:])]
    assert other_image == (np.diff(kinds) != 0).tolist() and set(kinds) == {0, 1, 2, 3}


@st.composite
def some_factors(draw, images):
    def numbers(*shape):
        size = math.prod(shape)
        return np.array(
            draw(st.lists(st.floats(0, 1, width=32), min_size=size, max_size=size)), dtype=float
        ).reshape(shape)

    kinds = numbers(images, 4) + 0.01
    return Factors(numbers(images, 6), kinds / kinds.sum(1, keepdims=True), numbers(images, 3))


@settings(deadline=None)
@given(some_factors(3), some_factors(3), st.lists(st.integers(0, 3), min_size=3, max_size=3))
def test_changes_by_a_slow_loop(before, after, kinds):
    expected = {
        name: sum(abs(before.levels[i, k] - after.levels[i, k]) for i in range(3)) / 3
        for k, name in enumerate(LEVELS)
    }
    expected["shape"] = (
        sum(max(0, before.kinds[i, k] - after.kinds[i, k]) for i in range(3) for k in range(4)) / 3
    )
    turns = [
        min(
            abs(before.phases[i, kind - 1] - after.phases[i, kind - 1] + whole)
            for whole in (-1, 0, 1)
        )
        for i, kind in enumerate(kinds)
        if kind
    ]
    expected["orientation"] = sum(turns) / len(turns) if turns else math.nan
    found = factor_changes(before, after, np.array(kinds))
    np.testing.assert_allclose(found, [expected[name] for name in quad.LATENTS], atol=1e-6)


def test_changes_by_chance():
    a, b = (np.random.default_rng(seed).normal(size=(200_000, 8)) for seed in (0, 1))
    kinds = true_factors(a).kinds.argmax(1)
    changes = dict(zip(quad.LATENTS, factor_changes(true_factors(a), true_factors(b), kinds)))
    assert changes == pytest.approx(CHANCE, abs=0.01)


def test_levels_are_u():
    latents = quad.sample_latents("quad1", 5)
    np.testing.assert_allclose(
        true_factors(latents).levels[:, 0], ndtr(latents[:, 0].astype(float)), atol=1e-6
    )


# Edits


def test_effects_of_edits(latents):
    images = quad.render(latents, 32)
    truth = quad.counterfactual_latents(latents, "quad1", "dependent")

    def effects(edited):
        return intervention_effects(images, edited, latents, truth, "quad1")

    right, nothing = effects(quad.render(truth, 32)), effects(images)
    assert right["moved"] == pytest.approx(1) and right["leak"] == pytest.approx(
        right["leak_floor"]
    )
    assert nothing["moved"] == 0 and nothing["leak"] == 0
    other = latents.copy()
    other[:, quad.LATENTS.index("quad4")] = np.random.default_rng(0).normal(size=len(latents))
    wrong = effects(quad.render(other, 32))
    assert wrong["moved"] < 0.5 and wrong["leak"] > 3 * right["leak"]
