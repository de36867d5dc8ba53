"""ident3d against slow references: the causal model row by row, the renderer ray by ray."""

import colorsys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray_marcher import first_hit, inside, slow_colour
from scipy.stats import norm

from hf_intervene import trainer
from hf_intervene.data import ident3d, load_ident3d, raycast
from hf_intervene.trainer import simulated
from hf_intervene.training import pretrain


ALL = ident3d.TRAIN_CONTEXTS + ident3d.HELD_OUT
HUES = ident3d.CONCEPTS
CENTRE = np.zeros(10)  # every latent in the middle of its range


def latents_with(**values):
    """Return one row with some latents at levels in (0, 1), and the others in the middle."""
    row = CENTRE.copy()
    for name, level in values.items():
        row[ident3d.LATENTS.index(name)] = norm.ppf(level) / (2 / 3 if name in HUES else 1)
    return row


# Latents


def slow_latents(context, noise, variant):
    """Return latents for noise (n, 10), computed row by row from the documentation."""
    rows = []
    for draw in noise:
        z = dict(zip(ident3d.LATENTS, draw))
        if variant == "dependent":
            # The noise keeps all variances at 1. The parents of each latent are independent.
            z["spotlight"] = 0.7 * z["spotlight_position"] + (1 - 0.49) ** 0.5 * z["spotlight"]
            if "spotlight" in context:
                z["spotlight"] = 1.6 + 0.6 * draw[2]
            z["object"] = (
                0.6 * z["spotlight"]
                - 0.5 * z["position_x"]
                + (1 - 0.36 - 0.25) ** 0.5 * z["object"]
            )
            if "object" in context:
                z["object"] = -1.6 + 0.6 * draw[1]
            z["background"] = (
                -0.6 * z["object"]
                + 0.5 * z["position_y"]
                + (1 - 0.36 - 0.25) ** 0.5 * z["background"]
            )
            if "background" in context:
                z["background"] = 1.6 + 0.6 * draw[0]
        else:
            for i, (name, mean) in enumerate(zip(HUES, (1.6, -1.6, 1.6))):
                z[name] = mean + 0.6 * draw[i] if name in context else draw[i]
        rows.append([z[name] for name in ident3d.LATENTS])
    return np.array(rows)


@pytest.mark.parametrize("variant", ident3d.VARIANTS)
@pytest.mark.parametrize("context", ALL)
def test_latents_have_the_moments_of_the_causal_model(context, variant):
    n = 20_000
    latents = ident3d.sample_latents(context, n, variant)
    slow = slow_latents(
        context.split("+"), np.random.default_rng(0).standard_normal((n, 10)), variant
    )
    np.testing.assert_allclose(latents.mean(0), slow.mean(0), atol=0.04)
    np.testing.assert_allclose(np.cov(latents.T), np.cov(slow.T), atol=0.06)
    if context == "obs":
        np.testing.assert_allclose(latents.std(0), 1, atol=0.03)


@pytest.mark.parametrize("variant", ident3d.VARIANTS)
@given(context=st.sets(st.sampled_from(HUES)), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=20)
def test_counterfactuals_keep_the_noise(variant, context, seed):
    noise = np.random.default_rng(seed).standard_normal((5, 10))
    before, after = slow_latents([], noise, variant), slow_latents(context, noise, variant)
    counterfactual = ident3d.counterfactual_latents(before, sorted(context) or "obs", variant)
    np.testing.assert_allclose(counterfactual, after, atol=1e-9)
    downstream = (
        {"background": 1, "object": 2, "spotlight": 3}
        if variant == "dependent"
        else dict.fromkeys(HUES, 1)
    )
    touched = {
        name
        for cause in context
        for name in (HUES[: downstream[cause]] if variant == "dependent" else [cause])
    }
    untouched = [i for i, name in enumerate(ident3d.LATENTS) if name not in touched]
    np.testing.assert_allclose(counterfactual[:, untouched], before[:, untouched], atol=1e-9)


def test_a_pair_holds_both_interventions():
    for variant in ident3d.VARIANTS:
        for pair in ident3d.HELD_OUT:
            both = ident3d.sample_latents(pair, 20_000, variant)
            for name in pair.split("+"):
                i = ident3d.LATENTS.index(name)
                alone = ident3d.sample_latents(name, 20_000, variant)
                np.testing.assert_allclose(both[:, i].mean(), alone[:, i].mean(), atol=0.03)
                np.testing.assert_allclose(both[:, i].std(), alone[:, i].std(), atol=0.03)
            first, second = (both[:, ident3d.LATENTS.index(name)] for name in pair.split("+"))
            assert abs(np.corrcoef(first, second)[0, 1]) < 0.03  # both without their causes


def test_hues_are_not_uniform_and_interventions_show():
    hues = ident3d.scenes(ident3d.sample_latents("obs", 20_000))[:, :3]
    middles = ident3d.RANGES[:3].mean(1)
    assert (np.abs(hues - middles) < 75).mean(0) == pytest.approx(
        norm.cdf(norm.ppf(0.75) * 1.5) * 2 - 1, abs=0.02
    )
    for i, name in enumerate(HUES):
        moved = ident3d.scenes(ident3d.sample_latents(name, 5000))[:, i]
        assert abs(moved.mean() - hues[:, i].mean()) > 1.3 * hues[:, i].std()


# Images


def test_images_are_functions_of_seed_context_and_row():
    latents = ident3d.sample_latents("background+spotlight", 12, seed=3)
    assert np.array_equal(
        ident3d.sample_latents(["spotlight", "background"], 5, seed=3), latents[:5]
    )
    images = ident3d.render(latents, 24)
    assert np.array_equal(images, ident3d.render(latents, 24))
    for row, image in zip(latents, images):
        assert np.array_equal(ident3d.render(row[None], 24)[0], image)
    by_context = ident3d.images_by_context(["background+spotlight"], 7, 24, seed=3)
    assert np.array_equal(by_context["background+spotlight"], images[:7])
    for other in (
        ident3d.sample_latents("background+spotlight", 12, seed=4),
        ident3d.sample_latents("obs", 12, seed=3),
    ):
        assert not np.isclose(other, latents).any()


def test_rendering_against_a_ray_marcher():
    resolution, checked, off = 32, {"object": 0, "shadow": 0}, []
    rays = raycast.rays(resolution)
    for row in ident3d.sample_latents("obs", 4, seed=5):
        image, scene = (
            ident3d.render(row[None], resolution)[0],
            ident3d.scene(ident3d.scenes(row[None])[0]),
        )
        changed = raycast.cast(scene, resolution) != raycast.cast(moved_away(scene), resolution)
        pixels = np.flatnonzero(changed.any(-1))
        for pixel in np.random.default_rng(0).choice(pixels, 12, replace=False):
            colours = np.mean(
                [slow_colour(scene, rays[:, s, pixel]) for s in range(rays.shape[1])], axis=0
            )
            expected = 255 * np.sqrt(np.minimum(colours, 1))
            off.append(np.abs(image.reshape(-1, 3)[pixel] - expected).max())
            hits = [
                first_hit(scene, raycast.CAMERA, rays[:, s, pixel]) < np.inf
                for s in range(rays.shape[1])
            ]
            checked["object" if all(hits) else "shadow"] += not any(hits) or all(hits)
    assert checked["object"] > 8 and checked["shadow"] > 8
    # The slow normals come from samples of a ball: they have a small error everywhere, and a larger
    # one where two parts meet.
    assert np.quantile(off, 0.8) < 2.5 and max(off) < 25


def moved_away(scene):
    """Return the scene with its object moved to where neither the camera nor the light sees it."""
    return replace(scene, centre=np.array([0.0, -40.0, 0.0]))


def test_the_shadow_is_dark_and_has_the_hue_of_the_ground():
    row = latents_with(position_z=0.5, spotlight_position=0.05)
    scene = ident3d.scene(ident3d.scenes(row[None])[0])
    image, empty = (
        raycast.cast(scene, 64).astype(int),
        raycast.cast(moved_away(scene), 64).astype(int),
    )
    # Where the line from the light through the object's centre meets the ground, seen by the
    # camera.
    ground = scene.light + (scene.centre - scene.light) * (
        scene.light[2] / (scene.light[2] - scene.centre[2])
    )
    rays = raycast.rays(64)[:, 0]
    towards = (ground - raycast.CAMERA) / np.linalg.norm(ground - raycast.CAMERA)
    y, x = divmod(int(np.argmax(towards @ rays)), 64)
    assert image[y, x].sum() < 0.7 * empty[y, x].sum()
    ambient = 255 * np.sqrt(raycast.AMBIENT * scene.ground)
    np.testing.assert_allclose(image[y, x], ambient, atol=1.5)


def hue(pixel):
    """Return the hue in degrees of an RGB pixel, after squaring the values."""
    return 360 * colorsys.rgb_to_hsv(*np.square(pixel / 255))[0]


@given(level=st.floats(0.01, 0.99))
@settings(deadline=None, max_examples=20)
def test_hues_can_be_read_from_the_image(level):
    def off(hue_read, name, row):
        return abs(
            (hue_read - ident3d.scenes(row[None])[0, ident3d.LATENTS.index(name)] + 180) % 360 - 180
        )

    row = latents_with(background=level)
    # a corner outside the light
    assert off(hue(ident3d.render(row[None], 64)[0, 1, 1]), "background", row) < 6
    row = latents_with(object=level)
    scene = ident3d.scene(ident3d.scenes(row[None])[0])
    image, empty = raycast.cast(scene, 64), raycast.cast(moved_away(scene), 64)
    pixels = image[(image != empty).any(-1)]
    assert min(off(hue(pixel), "object", row) for pixel in pixels) < 12  # the side in ambient light
    row = latents_with(spotlight=level)
    scene = ident3d.scene(ident3d.scenes(row[None])[0])
    lit = (
        np.square(raycast.cast(moved_away(scene), 64)[40, 32] / 255) / scene.ground
        - raycast.AMBIENT
    )
    assert (
        off(hue(255 * np.sqrt(np.clip(lit, 0, 1))), "spotlight", row) < 12
        or (lit + raycast.AMBIENT).max() > 0.9
    )


@pytest.mark.parametrize("name", ident3d.LATENTS)
def test_every_latent_is_visible(name):
    low, high = (
        ident3d.render(latents_with(**{name: level})[None], 48)[0].astype(int)
        for level in (0.25, 0.75)
    )
    assert (np.abs(low - high).max(-1) > 20).mean() > 0.01


def test_no_rotation_leaves_the_object_as_it_is():
    points = np.random.default_rng(0).uniform(-1, 1, (40_000, 3))
    shape = inside(points)
    for axis in ([1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 1], [1, 1, 1]):
        axis = np.array(axis) / np.linalg.norm(axis)
        for angle in np.radians([60, 90, 120, 180]):
            k = np.cross(np.eye(3), axis)
            turned = points @ (np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * k @ k)
            assert (
                inside(turned) != shape
            ).sum() > 0.04 * shape.sum()  # handle, spout and knob are small


def test_the_object_is_always_in_view_and_above_the_ground():
    assert (
        np.linalg.norm(raycast.CAPSULES[:, :3], axis=1) + raycast.CAPSULES[:, 6]
    ).max() < raycast.REACH
    assert (
        np.linalg.norm(raycast.CAPSULES[:, 3:6], axis=1) + raycast.CAPSULES[:, 6]
    ).max() < raycast.REACH
    assert ident3d.RANGES[ident3d.LATENTS.index("position_z"), 0] > raycast.REACH
    forward = raycast.LOOKS_AT - raycast.CAMERA
    forward /= np.linalg.norm(forward)
    up = np.array([0, -forward[2], forward[1]])
    for corner in np.stack(np.meshgrid(*ident3d.RANGES[3:6]), -1).reshape(-1, 3) - raycast.CAMERA:
        for side in (corner[0], corner @ up):
            angle = np.arctan2(abs(side), corner @ forward) + np.arcsin(
                raycast.REACH / np.hypot(side, corner @ forward)
            )
            assert np.tan(angle) < raycast.ZOOM


def test_resolutions_show_the_same_scene():
    latents = ident3d.sample_latents("obs", 3)
    small, large = ident3d.render(latents, 16), ident3d.render(latents, 64)
    means = np.sqrt(np.square(large / 255).reshape(3, 16, 4, 16, 4, 3).mean((2, 4))) * 255
    assert np.abs(small - means).mean() < 4
    assert ident3d.render(latents, 33).shape == (3, 33, 33, 3)


# Data set, training


def test_dataset_holds_the_rendered_images_and_is_cached(tmp_path):
    arguments = {
        "contexts": ["obs", "background+object"],
        "images_per_context": 6,
        "resolution": 16,
        "cache_dir": str(tmp_path),
    }
    data = load_ident3d(**arguments)
    assert data.column_names == ["image", "context", "latents"]
    assert data["context"][:] == ["obs"] * 6 + ["background+object"] * 6
    latents = ident3d.sample_latents("background+object", 6)
    np.testing.assert_allclose(data[6:]["latents"], latents, rtol=1e-6)
    assert np.array_equal(np.asarray(data[8]["image"]), ident3d.render(latents, 16)[2])
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.arrow")}
    load_ident3d(**arguments)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.arrow")} == files


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "chain"}, "no variant 'chain'"),
        ({"variant": ["dependent"]}, "no variant"),
        ({"contexts": ["phi"]}, "unknown concept 'phi'"),
        ({"contexts": ["object=0.5"]}, "full interventions only"),
        ({"contexts": "obs"}, "must be a list"),
        ({"resolution": 7}, "at least 8 pixels"),
        ({"resolution": 32.5}, "whole number"),
        ({"images_per_context": 0}, "at least 1"),
        ({"num_proc": 0}, "num_proc must be at least 1"),
        ({"num_proc": 1.5}, "num_proc must be a whole number"),
    ],
)
def test_bad_arguments_are_one_sentence(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        load_ident3d(**arguments)
    assert "\n" not in str(caught.value)


@given(
    latents=st.lists(
        st.lists(st.floats(allow_infinity=True), min_size=8, max_size=11), min_size=1, max_size=2
    )
)
@settings(deadline=None, max_examples=40)
def test_any_latents_are_drawn_or_refused_with_one_sentence(latents):
    try:
        images = ident3d.render(np.array(latents), 8)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert images.shape == (len(latents), 8, 8, 3) and images.dtype == np.uint8


def test_training_and_pretraining_draw_it(tiny):
    data, validation = trainer.load_data(trainer.TrainArguments(**tiny | {"dataset": "ident3d"}))
    assert data.contexts == list(ident3d.TRAIN_CONTEXTS) and data.pixels.shape == (
        4 * 32,
        3,
        16,
        16,
    )
    assert len(validation) == 4 * 8
    real, other = simulated.SIMULATED["ident3d"](16, 3, "independent").held_out_images(3, 0)
    assert tuple(real) == tuple(other) == ALL
    assert np.array_equal(
        real["obs"],
        ident3d.images_by_context(["obs"], 3, 16, "independent", simulated.HELD_OUT_SEED)["obs"],
    )
    assert pretrain.observational_images("ident3d", 3, 16).shape == (3, 3, 16, 16)
