"""The detector of concepts: its results, its unusable concepts, and slow loops of its parts."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_intervene.metrics.detector import (
    best_threshold,
    detector_error,
    train_context_detector,
    train_detector,
)
from hf_intervene.metrics.networks import balanced_weights, blurred, prepared


CONCEPTS = ("dot", "bar")


def drawn(concepts, count, seed):
    """Return noise images (count, 16, 16, 3) with a bright dot or a faint bar if asked for."""
    images = np.random.default_rng(seed).integers(90, 130, (count, 16, 16, 3), dtype=np.uint8)
    if "dot" in concepts:
        images[:, 3:6, 3:6, 0] = 220
    if "bar" in concepts:
        images[:, 12, 2:14] += 40
    return images


@pytest.fixture(scope="module")
def by_context():
    return {name: drawn(name.split("+"), 300, seed) for seed, name in enumerate(("obs", *CONCEPTS))}


@pytest.fixture(scope="module")
def detector(by_context):
    labels = np.repeat([[c in name for c in CONCEPTS] for name in by_context], 300, axis=0)
    return train_detector(np.concatenate(list(by_context.values())), labels, CONCEPTS, steps=120)


@pytest.fixture(scope="module")
def context_detector(by_context):
    return train_context_detector(by_context, CONCEPTS, steps=120)


@pytest.mark.parametrize("which", ["detector", "context_detector"])
def test_concepts_are_found_alone_and_together(which, request):
    detector = request.getfixturevalue(which)
    assert detector.usable.all() and not detector.unusable
    for context in ("obs", "dot", "bar", "dot+bar"):
        found = detector.present(drawn(context.split("+"), 100, 77))
        assert (found == [name in context for name in CONCEPTS]).mean(0).min() > 0.95, context
    for error in detector.errors.values():
        assert error["sharp"].true_positive > 0.95 and error["sharp"].false_positive < 0.05
        assert error["sharp"].balanced_accuracy >= error["blurred"].balanced_accuracy - 0.02
    assert detector.kind == ("attributes" if which == "detector" else "contexts")


def test_it_reads_uint8_and_floats_alike_and_no_other_shape(detector):
    images = drawn(["dot"], 20, 3)
    np.testing.assert_allclose(detector.logits(images), detector.logits(images / 255), atol=1e-3)
    assert detector.features(images).shape == (20, 128)
    with pytest.raises(
        ValueError, match=r"trained on images of shape \(16, 16, 3\), not \(8, 8, 3\)"
    ):
        detector.present(np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        detector.present(images.astype(float))


def test_the_same_training_twice(by_context, context_detector):
    again = train_context_detector(by_context, CONCEPTS, steps=120)
    assert again.to_dict() == context_detector.to_dict()
    np.testing.assert_array_equal(
        again.logits(by_context["dot"]), context_detector.logits(by_context["dot"])
    )


def test_unusable_concepts_have_a_reason(by_context):
    images = {
        "obs": by_context["obs"],
        "dot": by_context["dot"],
        "same": drawn([], 300, 9),
        "few": drawn(["bar"], 20, 8),
    }
    detector = train_context_detector(images, ("dot", "same", "few", "none"), steps=60)
    assert detector.usable.tolist() == [True, False, False, False]
    assert "same is detected with a balanced accuracy of 0." in detector.unusable["same"]
    assert "there are only 20 images with or without few" in detector.unusable["few"]
    assert "there are only 0 images with or without none" in detector.unusable["none"]
    assert set(detector.errors) == {"dot", "same"}
    with pytest.raises(ValueError, match="needs observational images"):
        train_context_detector({"dot": by_context["dot"]}, ("dot",))
    with pytest.raises(ValueError, match=r"labels must have shape \(300, 2\)"):
        train_detector(by_context["obs"], np.zeros((300, 3)), CONCEPTS)


# Its parts


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(-5, 5), st.booleans(), st.integers(0, 3)), min_size=1, max_size=12
    )
)
def test_best_threshold_by_a_slow_loop(rows):
    logits, labels, weights = (np.array(x, dtype=float) for x in zip(*rows))

    def accuracy(threshold):
        above = logits > threshold
        rates = [np.average(above[labels == k] == k, weights=weights[labels == k]) for k in (0, 1)]
        return np.mean(rates)

    found = best_threshold(logits, labels, weights)
    if all(weights[labels == k].sum() > 0 for k in (0, 1)):
        assert accuracy(found) == pytest.approx(max(accuracy(t) for t in np.arange(-6, 6, 0.25)))


def test_weighted_labels_do_not_depend_on_other_labels():
    rng = np.random.default_rng(0)
    labels = torch.from_numpy((rng.random((400, 3)) < [0.3, 0.6, 0.5]).astype(np.float32))
    labels[:, 1] = torch.where(
        torch.from_numpy(rng.random(400) < 0.6), 1 - labels[:, 0], labels[:, 1]
    )
    weights = balanced_weights(labels)
    for k in range(3):
        for j in set(range(3)) - {k}:
            for answer in (0, 1):
                rows = labels[:, j] == answer
                share = (weights[rows, k] * labels[rows, k]).sum() / weights[rows, k].sum()
                assert share.item() == pytest.approx(0.5, abs=1e-5)
    labels[:50, 0] = torch.nan
    assert (balanced_weights(labels)[:50, 0] == 0).all()
    one_answer = balanced_weights(torch.ones(5, 1))
    assert (one_answer == 0).all()


def test_error_of_known_answers():
    found = np.array([True] * 9 + [False] + [True] * 2 + [False] * 8 + [True])
    labels = np.array([1.0] * 10 + [0.0] * 10 + [np.nan])
    error = detector_error(found, labels)
    assert (error.true_positive, error.false_positive, error.balanced_accuracy) == (
        0.9,
        0.2,
        pytest.approx(0.85),
    )
    assert (error.with_concept, error.without) == (10, 10)
    assert 0.6 < error.interval[0] < 0.85 < error.interval[1] < 0.97


def test_blur_keeps_means_and_constants():
    x = torch.rand(3, 2, 9, 7, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.0, 0.7, 2.0])
    out = blurred(x, sigma)
    torch.testing.assert_close(out[0], x[0])
    torch.testing.assert_close(blurred(torch.full_like(x, 0.3), sigma), torch.full_like(x, 0.3))
    assert out[2].std() < out[1].std() < x[1].std()
    # One bright pixel, far from the border: the Gaussian itself.
    spot = torch.zeros(1, 1, 31, 31)
    spot[..., 15, 15] = 1
    found = blurred(spot, torch.tensor([1.5]))[0, 0]
    rows = torch.arange(31.0) - 15
    expected = torch.exp(-(rows[:, None] ** 2 + rows**2) / (2 * 1.5**2))
    torch.testing.assert_close(found, expected / expected.sum(), atol=1e-6, rtol=1e-4)


def test_large_images_are_averaged():
    images = np.random.default_rng(0).integers(0, 256, (2, 128, 128, 3), dtype=np.uint8)
    expected = images.reshape(2, 64, 2, 64, 2, 3).mean((2, 4)).transpose(0, 3, 1, 2) / 255
    np.testing.assert_allclose(prepared(images), expected, atol=1e-5)
