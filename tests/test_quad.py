"""quad against slow references written from METHOD section 4."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from hf_intervene.data import load_quad, quad, shapes


def slow_latents(context, noise, variant):
    """Return latents for noise (n, 8), computed row by row in causal order."""
    order = ["orientation", "shape", "color", "quad4", "quad3", "quad2", "quad1", "size"]
    weights, rows = quad.weights(variant), []
    for row in noise:
        value = np.zeros(8)
        for name in order:
            i = quad.LATENTS.index(name)
            if name in context:
                value[i] = quad._INTERVENED_MEAN[i] + quad._INTERVENED_VARIANCE[i] ** 0.5 * row[i]
            else:
                value[i] = weights[i] @ value + quad._NOISE_VARIANCE[i] ** 0.5 * row[i]
        rows.append(value)
    return np.array(rows)


def slow_covariance(variant):
    """Return the covariance of the observational latents, a linear map of the noise."""
    columns = slow_latents([], np.eye(8), variant)
    return columns.T @ columns


@pytest.mark.parametrize("variant", quad.VARIANTS)
@pytest.mark.parametrize("context", ["obs", "quad3", "quad1+size", "quad2+quad4"])
def test_latents_have_the_moments_of_the_causal_model(context, variant):
    n = 40_000
    latents = quad.sample_latents(context, n, variant)
    noise = np.random.default_rng(0).standard_normal((n, 8))
    scale = slow_latents([], noise, variant).std(0)
    slow = slow_latents(context.split("+"), noise, variant) / scale
    np.testing.assert_allclose(latents.mean(0), slow.mean(0), atol=0.05)
    np.testing.assert_allclose(np.cov(latents.T), np.cov(slow.T), atol=0.06)


def test_observational_latents_are_standardised_and_interventions_cut_the_edges():
    latents = quad.sample_latents("obs", 40_000)
    np.testing.assert_allclose(latents.std(0), 1, atol=0.03)
    correlation = np.corrcoef(quad.sample_latents("quad2", 40_000).T)
    names = {name: i for i, name in enumerate(quad.LATENTS)}
    assert abs(correlation[names["quad2"], names["quad3"]]) < 0.02  # its parent
    assert abs(correlation[names["quad2"], names["quad1"]]) > 0.2  # its child


def test_draws_are_functions_of_seed_context_and_row():
    assert np.array_equal(quad.sample_latents("quad1", 10), quad.sample_latents("quad1", 25)[:10])
    assert np.array_equal(
        quad.sample_latents("size+quad1", 5), quad.sample_latents(["quad1", "size"], 5)
    )
    first = quad.sample_latents("quad1", 10)
    for other in (quad.sample_latents("quad1", 10, seed=1), quad.sample_latents("quad2", 10)):
        assert not np.isclose(first, other).any()


@pytest.mark.parametrize("variant", quad.VARIANTS)
@given(context=st.lists(st.sampled_from(quad.LATENTS), unique=True), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=30)
def test_counterfactuals_keep_the_noise(variant, context, seed):
    noise = np.random.default_rng(seed).standard_normal((5, 8))
    scale = np.sqrt(np.diag(slow_covariance(variant)))
    before, after = (slow_latents(names, noise, variant) / scale for names in ([], context))
    np.testing.assert_allclose(
        quad.counterfactual_latents(before, context or "obs", variant), after, atol=1e-9
    )


def test_palette():
    levels = np.array([0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0])
    expected = [
        (255, 0, 0),
        (255, 128, 0),
        (255, 255, 0),
        (0, 255, 0),
        (0, 255, 255),
        (0, 0, 255),
        (255, 0, 255),
    ]
    assert np.abs(shapes.palette(levels).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("resolution", [64, 32])
def test_rendering_against_a_per_pixel_reference(resolution):
    latents = quad.sample_latents("obs", 40)
    u = norm.cdf(latents)
    for image, row in zip(quad.render(latents, resolution), u):
        expected = np.zeros_like(image)
        half = resolution // 2
        for y in range(resolution):
            for x in range(resolution):
                quadrant = {(1, 0): 0, (1, 1): 1, (0, 0): 2, (0, 1): 3}[
                    (int(y >= half), int(x >= half))
                ]
                expected[y, x] = shapes.palette(row[quadrant])
        radius = 48 / 64 * resolution * (0.2 + 0.8 * row[4]) / 2
        angle, centre = 2 * np.pi * row[7], resolution / 2
        kind = ["circle", "square", "triangle", "ellipse"][round(3 * row[6])]
        for y in range(resolution):
            for x in range(resolution):
                dx, dy = x + 0.5 - centre, y + 0.5 - centre
                p, q = (
                    dx * np.cos(angle) + dy * np.sin(angle),
                    -dx * np.sin(angle) + dy * np.cos(angle),
                )
                inside = {
                    "circle": p**2 + q**2 <= radius**2,
                    "square": max(abs(p), abs(q)) <= radius,
                    "ellipse": (p / radius) ** 2 + (q / (radius / 2)) ** 2 <= 1,
                    "triangle": all(
                        p * np.cos(t) + q * np.sin(t) <= radius / 2
                        for t in np.pi / 2 + 2 * np.pi / 3 * np.arange(3)
                    ),
                }[kind]
                if inside:
                    expected[y, x] = shapes.palette(row[5])
        # up to rounding, a pixel may lie on the edge
        assert (image != expected).any(-1).sum() <= 2, kind


def test_all_four_shapes_are_drawn_with_their_areas():
    side = 64
    latents = np.zeros((4, 8))
    latents[:, 4] = norm.ppf(0.5)
    latents[:, 5] = norm.ppf(0.999)  # a magenta shape on the green of level 0.5
    latents[:, 6] = norm.ppf(np.array([0.01, 1 / 3, 2 / 3, 0.99]))
    areas = (quad.render(latents, side)[..., 2] > 200).sum((1, 2))
    r = 0.75 * side * 0.6 / 2
    np.testing.assert_allclose(
        areas, [np.pi * r**2, 4 * r**2, 3 * 3**0.5 / 4 * r**2, np.pi * r**2 / 2], rtol=0.06
    )


def test_dataset_holds_the_rendered_images_and_is_cached(tmp_path):
    arguments = {
        "contexts": ["obs", "quad1+size"],
        "images_per_context": 12,
        "resolution": 16,
        "cache_dir": str(tmp_path),
    }
    data = load_quad(**arguments)
    assert data.column_names == ["image", "context", "latents"] and len(data) == 24
    assert data["context"][:] == ["obs"] * 12 + ["quad1+size"] * 12
    latents = quad.sample_latents("quad1+size", 12)
    np.testing.assert_allclose(data[12:]["latents"], latents, rtol=1e-6)
    assert np.array_equal(np.asarray(data[15]["image"]), quad.render(latents, 16)[3])
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.arrow")}
    assert load_quad(**arguments)["context"][:] == data["context"][:]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.arrow")} == files
    assert (
        np.asarray(load_quad(**arguments | {"seed": 1})[0]["image"]).tobytes()
        != np.asarray(data[0]["image"]).tobytes()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "chain"}, "no variant 'chain'"),
        ({"contexts": ["quad7"]}, "unknown concept 'quad7'"),
        ({"contexts": ["size=0.5"]}, "full interventions only"),
        ({"resolution": 15}, "even resolution"),
        ({"images_per_context": 0}, "at least 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_quad(**arguments)
