"""The true factors of quad read off images, and what edits do to them."""

import numpy as np
import pytest

from hf_intervene.data import quad
from hf_intervene.metrics import intervention_effects, train_regressor


@pytest.fixture(scope="module")
def regressor():
    return train_regressor(16, seed=0, steps=400)


@pytest.fixture(scope="module")
def latents():
    return quad.sample_latents("obs", 128, "dependent", 77)


def test_the_regressor_reads_colours(regressor):
    assert min(regressor.scores[name] for name in ("quad1", "quad2", "quad3", "quad4")) > 0.7


def test_effects_of_edits(regressor, latents):
    seen = ["quad1", "quad2", "quad3", "quad4"]  # what so short a training reads well
    images = quad.render(latents, 16)
    truth = quad.counterfactual_latents(latents, "quad1", "dependent")

    def effects(edited):
        return intervention_effects(regressor, images, edited, latents, truth, "quad1", seen)

    right, nothing = effects(quad.render(truth, 16)), effects(images)
    assert right["moved"] == pytest.approx(1) and right["leak"] == pytest.approx(right["leak_floor"])
    assert nothing["moved"] == 0 and nothing["leak"] == 0
    other = latents.copy()
    other[:, quad.LATENTS.index("quad4")] = np.random.default_rng(0).normal(size=len(latents))
    wrong = effects(quad.render(other, 16))
    assert wrong["moved"] < 0.5 and wrong["leak"] > 3 * right["leak"]
