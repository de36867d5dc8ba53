"""The two-sample test of images, and the kernel distance of features."""

import numpy as np
import pytest

from hf_intervene.data import quad
from hf_intervene.metrics.two_sample import image_two_sample_test, kernel_distance


def images(seed, count=200):
    return quad.images_by_context(["obs"], count, 16, seed=seed)["obs"]


def test_images_of_one_distribution_are_not_distinguished():
    test = image_two_sample_test(images(1), images(2), steps=40)
    assert test.interval[0] < 0.5 and test.p_value > 0.01 and test.images == 200


def test_a_slight_blur_is_detected_and_rounding_is_not():
    a, b = images(1), images(2) / np.float32(255)
    soft = (b + np.roll(b, 1, 1)) / 2
    seen = image_two_sample_test(a, soft, steps=80)
    assert seen.accuracy > 0.9 and seen.p_value < 1e-6 and seen.interval[0] > 0.8
    noise = np.random.default_rng(0).uniform(-0.4, 0.4, b.shape) / 255
    assert (
        image_two_sample_test(a, np.clip(b + noise, 0, 1).astype(np.float32), steps=40).interval[0]
        < 0.55
    )


def test_bad_sets_of_images():
    with pytest.raises(ValueError, match="at least 100 in each set, not 99"):
        image_two_sample_test(images(1), images(2, 99))
    with pytest.raises(ValueError, match=r"shapes \(16, 16, 3\) and \(8, 16, 3\)"):
        image_two_sample_test(images(1), images(2)[:, :8])


def test_kernel_distance_by_a_slow_loop():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(7, 3)), rng.normal(0.5, 1, size=(5, 3))
    b, a = b / np.sqrt((a**2).mean()), a / np.sqrt((a**2).mean())

    def kernel(x, y):
        return (x @ y / 3 + 1) ** 3

    expected = np.mean([kernel(a[i], a[j]) for i in range(7) for j in range(7) if i != j])
    expected += np.mean([kernel(b[i], b[j]) for i in range(5) for j in range(5) if i != j])
    expected -= 2 * np.mean([kernel(x, y) for x in a for y in b])
    assert kernel_distance(3 * a, 3 * b).value == pytest.approx(expected)


def test_kernel_distance_is_unbiased():
    rng = np.random.default_rng(0)
    same = [kernel_distance(*rng.normal(size=(2, 60, 4)), seed=k) for k in range(60)]
    values = np.array([found.value for found in same])
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(60)
    assert np.mean([found.interval[0] <= 0 <= found.interval[1] for found in same]) > 0.9
    far = kernel_distance(rng.normal(size=(100, 4)), rng.normal(1, 1, size=(80, 4)))
    assert far.interval[0] > 10 * values.std()
    with pytest.raises(ValueError, match="at least four images each"):
        kernel_distance(rng.normal(size=(3, 4)), rng.normal(size=(9, 4)))
