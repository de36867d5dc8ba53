"""MNIST concepts: effects of interventions on real digits, measured on the images."""

import numpy as np
import pytest
from scipy import ndimage

from hf_intervene.data import load_digits, mnist


ALL = mnist.TRAIN_CONTEXTS + mnist.HELD_OUT
Y, X = np.mgrid[:28, :28] + 0.5


def column(latents, name):
    return latents[:, mnist.LATENTS.index(name)]


def measures(images):
    """Return measures of images (n, 28, 28, 1) by name, each (n,).

    They are area, thickness (twice the area divided by the length of the contour), centre of mass,
    slant (x per y), size, and the radius of the largest disk inside.
    """
    x = images[..., 0] / 255
    area = x.sum((1, 2))
    gradient = np.gradient(np.pad(x, ((0, 0), (1, 1), (1, 1))), axis=(1, 2))
    mean_x, mean_y = ((x * axis).sum((1, 2)) / area for axis in (X, Y))
    dx, dy = X - mean_x[:, None, None], Y - mean_y[:, None, None]
    xx, yy, xy = ((x * product).sum((1, 2)) / area for product in (dx * dx, dy * dy, dx * dy))
    return {
        "area": area,
        "thickness": 2 * area / np.hypot(*gradient).sum((1, 2)),
        "x": mean_x,
        "y": mean_y,
        "slant": xy / yy,
        "size": np.sqrt(xx + yy),
        "widest": np.array(
            [ndimage.distance_transform_edt(np.pad(image > 0.5, 1)).max() for image in x]
        ),
    }


@pytest.fixture(scope="module")
def contexts():
    """Draw 200 images of every context."""
    return mnist.images_by_context(ALL, 200, load_digits())


@pytest.fixture(scope="module")
def measured(contexts):
    return {name: measures(images) for name, images in contexts.items()}


@pytest.fixture(scope="module")
def paired():
    """Return a function from a context to latents, and measures before and after it.

    It draws the same 200 digits with and without the intervention.
    """
    digits = load_digits().images[::2]
    before = measures(mnist.render(digits, mnist.sample_latents("obs", len(digits))))

    def intervened(context):
        latents = mnist.sample_latents(context, len(digits))
        return latents, before, measures(mnist.render(digits, latents))

    return intervened


def test_images_are_functions_of_digits_seed_context_and_row(contexts):
    digits = load_digits()
    alone = mnist.images_by_context(["thin+shift"], 8, digits)
    assert list(alone) == ["shift+thin"] and np.array_equal(
        alone["shift+thin"], contexts["shift+thin"][:8]
    )
    assert alone["shift+thin"].dtype == np.uint8 and alone["shift+thin"].shape == (8, 28, 28, 1)
    rows, latents = (
        mnist.sample_rows("shift+thin", 8, len(digits)),
        mnist.sample_latents("shift+thin", 8),
    )
    assert np.array_equal(alone["shift+thin"], mnist.render(digits.images[rows], latents))
    other = mnist.images_by_context(["shift+thin"], 8, digits, seed=1)["shift+thin"]
    assert not np.array_equal(other, alone["shift+thin"])
    assert not np.isin(
        column(mnist.sample_latents("thin", 8), "thin"), column(latents, "thin")
    ).any()


def test_every_digit_is_taken_once_before_any_is_taken_again():
    rows = mnist.sample_rows("swell", 25, 10, seed=3)
    assert sorted(rows[:10]) == sorted(rows[10:20]) == list(range(10)) and len(set(rows[20:])) == 5
    assert np.array_equal(mnist.sample_rows("swell", 7, 10, seed=3), rows[:7])
    assert not np.array_equal(mnist.sample_rows("thin", 25, 10, seed=3), rows)


@pytest.mark.parametrize("context", ALL)
def test_only_what_is_intervened_on_is_drawn(context):
    latents = mnist.sample_latents(context, 2000)
    for k, (name, (concept, neutral, low, high)) in enumerate(mnist._PARAMETERS.items()):
        if concept in context.split("+"):
            assert low <= latents[:, k].min() and latents[:, k].max() <= high, name
            assert latents[:, k].mean() == pytest.approx(
                (low + high) / 2, abs=0.05 * (high - low)
            ), name
            assert latents[:, k].std() == pytest.approx((high - low) / 12**0.5, rel=0.05), name
            assert not low <= neutral <= high or concept == "swell", name
        else:
            assert (latents[:, k] == neutral).all(), name


def test_observational_images_are_the_digits_themselves():
    digits = load_digits("bundled", "test").images
    images = mnist.render(digits, mnist.sample_latents("obs", len(digits)))[..., 0]
    assert np.abs(images.astype(int) - digits).mean() < 3
    assert images.sum() / digits.sum() == pytest.approx(1, abs=0.03)


def slow_render(digit, p):
    """Draw one digit as a set of points on the fine grid.

    The set is dilated or eroded by a disk of points, and then read point by point.
    """
    shape = (
        np.asarray(ndimage.zoom(digit.astype(float), 4, order=3, mode="nearest", grid_mode=True))
        > digit.max() / 2
    )
    inside = ndimage.distance_transform_edt(shape) - 0.5
    radius = (p["thicken"] - p["thin"]) * 2 * inside[shape].mean()
    reach = int(abs(radius)) + 1
    i, j = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = np.hypot(i, j) <= abs(radius) + 0.5  # the contour runs half-way between two points
    if radius > 0:
        moved = ndimage.binary_dilation(shape, disk)
    else:
        moved = ~ndimage.binary_dilation(~shape, disk, border_value=1) if radius < 0 else shape
    axis = np.argwhere(mnist._medial_axis(ndimage.distance_transform_edt(shape)))
    cy, cx = (axis[int(p["swell_position"] * len(axis))] + 0.5) / 4
    fine = np.zeros((112, 112))
    for row in range(112):
        for col in range(112):
            # The inverse of: swelling, then scale and shear about (14.5, 14.5), then shift.
            x, y = (col + 0.5) / 4 - p["shift_x"] - 14.5, (row + 0.5) / 4 - p["shift_y"] - 14.5
            y = y / p["scale"] + 14.5
            x = x / p["scale"] - p["shear"] * (y - 14.5) + 14.5
            r = np.hypot(x - cx, y - cy)
            if 0 < r < p["swell_radius"]:
                towards = p["swell_radius"] * (r / p["swell_radius"]) ** p["swell_strength"] / r
                x, y = cx + (x - cx) * towards, cy + (y - cy) * towards
            i, j = int(np.floor(y * 4)), int(np.floor(x * 4))
            fine[row, col] = moved[i, j] if 0 <= i < 112 and 0 <= j < 112 else 0
    return fine.reshape(28, 4, 28, 4).mean((1, 3))


@pytest.mark.parametrize("context", ALL)
def test_rendering_against_a_per_point_reference(context):
    digits = load_digits().images[[0, 7]]
    latents = mnist.sample_latents(context, 2)
    for image, digit, row in zip(mnist.render(digits, latents)[..., 0] / 255, digits, latents):
        expected = slow_render(digit, dict(zip(mnist.LATENTS, row)))
        # The reference uses only whole points: its edges are hard, with errors up to half a point,
        # an eighth of a pixel.
        assert (
            np.abs(image - expected).sum() < 0.16 * np.abs(np.gradient(np.pad(expected, 1))).sum()
        )
        assert np.abs(image - expected).max() < 0.5


def test_affine_interventions_do_what_their_parameters_say(paired):
    latents, before, after = paired("scale")
    np.testing.assert_allclose(after["size"] / before["size"], column(latents, "scale"), atol=0.02)
    np.testing.assert_allclose(
        after["area"] / before["area"], column(latents, "scale") ** 2, atol=0.05
    )
    latents, before, after = paired("shear")
    # Contours that leave the image, and the blur of pixels, reduce the slant a little.
    np.testing.assert_allclose(
        after["slant"] - before["slant"], column(latents, "shear"), atol=0.15
    )
    assert np.median(np.abs(after["slant"] - before["slant"] - column(latents, "shear"))) < 0.02
    np.testing.assert_allclose(after["area"] / before["area"], 1, atol=0.06)
    latents, before, after = paired("shift")
    for axis in "xy":
        moved = after[axis] - before[axis] - column(latents, f"shift_{axis}")
        assert np.median(np.abs(moved)) < 0.02 and np.abs(moved).max() < 0.6
    np.testing.assert_allclose(after["slant"], before["slant"], atol=0.25)


def test_morphological_interventions_do_what_their_parameters_say(paired):
    for name, sign in (("thicken", 1), ("thin", -1)):
        latents, before, after = paired(name)
        factor = 1 + sign * column(latents, name)
        # The dilated area of a stroke grows like its thickness, but where strokes meet or the image
        # ends.
        ratio = after["area"] / before["area"]
        assert np.corrcoef(ratio, factor)[0, 1] > 0.8
        assert np.abs(ratio - factor).mean() < 0.15
        assert (sign * (after["thickness"] - before["thickness"]) > 0).all()
        for axis in "xy":
            assert np.abs(after[axis] - before[axis]).mean() < 0.4
        assert np.abs(after["slant"] - before["slant"]).mean() < 0.1
    latents, before, after = paired("swell")
    assert (
        np.mean(after["widest"] > before["widest"] + 0.5) > 0.95
        and np.mean(after["area"] > before["area"]) > 0.98
    )


def test_swelling_is_local():
    digits = load_digits().images[:60]
    latents = mnist.sample_latents("swell", 60)
    plain, swollen = (
        mnist.render(digits, x)[..., 0].astype(int)
        for x in (mnist.sample_latents("obs", 60), latents)
    )
    changed = np.abs(plain - swollen) > 20
    assert changed.any((1, 2)).all()
    for mask, radius in zip(changed, column(latents, "swell_radius")):
        # All changed pixels lie in a disk, so that the distance of two of them is at most its
        # diameter.
        y, x = np.nonzero(mask)
        assert np.hypot(y[:, None] - y, x[:, None] - x).max() <= 2 * radius + 1
    # The position runs along the axis from top to bottom.
    rows = [np.nonzero(mask)[0].mean() for mask in changed]
    assert np.corrcoef(rows, column(latents, "swell_position"))[0, 1] > 0.8


EFFECTS = {  # concept: (measure, direction)
    "scale": ("size", -1),
    "shear": ("slant", 1),
    "shift": ("x", -1),
    "swell": ("widest", 1),
    "thicken": ("thickness", 1),
    "thin": ("thickness", -1),
}


def order(lower, higher):
    """Return the share of pairs of independent images in the named order (0.5 by chance)."""
    return np.mean(lower[:, None] < higher) + 0.5 * np.mean(lower[:, None] == higher)


@pytest.mark.parametrize("context", [name for name in ALL if name != "obs"])
def test_contexts_differ_from_obs_in_their_concepts(measured, context):
    obs, here = measured["obs"], measured[context]
    for concept in context.split("+"):
        name, sign = EFFECTS[concept]
        # Smaller digits also have thinner strokes, so that digits of the same size are compared.
        like = measured["scale"] if "scale" in context and concept != "scale" else obs
        assert order(*(like[name], here[name])[::sign]) > 0.85, concept
    for concept, (
        name,
        _,
    ) in EFFECTS.items():  # measures without a relation to the context are as in obs
        if concept in ("shear", "shift") and concept not in context:
            assert 0.35 < order(obs[name], here[name]) < 0.65, concept


def test_the_drawing_does_not_reveal_the_context(contexts):
    # for strokes of the same thickness
    obs, *others = (contexts[name] for name in ("obs", "shear", "shift"))
    assert len(np.unique(obs)) > 150

    def grey_share(images):
        return np.mean((images > 0) & (images < 255)) / np.mean(images > 0)

    for images in others:
        assert grey_share(images) == pytest.approx(grey_share(obs), rel=0.05)


def test_strokes_end_where_the_digit_did():
    digit = np.zeros((1, 28, 28), np.uint8)
    digit[:, :, 12:16] = 255  # from border to border
    latents = mnist.sample_latents("scale+thicken", 1)
    latents[:, mnist.LATENTS.index("scale")] = 0.5
    image = mnist.render(digit, latents)[0, ..., 0]
    assert image[14].max() == 255 and image[:4].max() == image[-4:].max() == 0


def test_a_blank_digit_stays_blank_and_a_full_one_is_drawn():
    digits = np.stack([np.zeros((28, 28), np.uint8), np.full((28, 28), 255, np.uint8)])
    for context in ALL:
        images = mnist.render(digits, mnist.sample_latents(context, 2))
        assert images[0].max() == 0 and images[1].max() == 255
