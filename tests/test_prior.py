"""The order of concepts and the fit of a finished model's prior, on codes whose distribution is
known.
"""

import math

import pytest
import torch

from hf_intervene import Encoded
from hf_intervene.data import ContextImages
from hf_intervene.trainer.checkpoints import newest_checkpoint
from hf_intervene.trainer.prior import causal_order, fit_prior, order_concepts


class Codes(torch.nn.Module):
    """A base whose images are codes: their features are their pixels."""

    def encode(self, pixel_values):
        return Encoded(pixel_values.flatten(1), {})


def model_of_codes(head_of_codes):
    from hf_intervene import InterventionConfig, InterventionHead

    torch.manual_seed(0)
    config = InterventionConfig(
        concepts=["a", "b"],
        mechanism="flow",
        concept_width=2,
        free_blocks=1,
        feature_width=6,
        embedding_shape=[4],
        **head_of_codes,
    )
    head = InterventionHead(config)
    head.posterior = lambda features, targets: (
        6 * features.view(-1, 3, 2) - 3,
        torch.full((len(features), 3, 2), -6.0),
    )
    model = torch.nn.Module()
    model.head, model.base, model.config, model.concepts, model.device = (
        head,
        Codes(),
        config,
        ("a", "b"),
        torch.device("cpu"),
    )
    model.seen = lambda targets: targets
    return model


def chain(rows=2000, seed=0):
    """b causes a: images of codes (rows, 3, 2), in obs and under both interventions, with their
    data set.
    """
    generator = torch.Generator().manual_seed(seed)
    codes = []
    for context in ("obs", "a", "b"):
        free, noise, b = (0.3 * torch.randn(rows, 2, generator=generator) for _ in range(3))
        b = b + 1.0 if context == "b" else b
        a = noise - 1.0 if context == "a" else noise + b.sin() * 1.5
        codes.append(torch.stack([a, b, free], dim=1))
    codes = torch.cat(codes)
    pixels = ((codes + 3) / 6 * 255).round().clamp(0, 255).byte()
    ids = torch.arange(3).repeat_interleave(rows)
    return codes, ContextImages(pixels.view(-1, 1, 3, 2), ids, ("obs", "a", "b"), ("a", "b"))


def test_causes_come_before_what_they_move():
    moved = torch.tensor(
        [[9.0, 0.5, 0.2, 0.1], [4.0, 9.0, 0.3, 0.2], [5.0, 6.0, 9.0, 0.4], [0.3, 0.2, 7.0, 9.0]]
    )
    assert causal_order(moved) == [3, 2, 1, 0]


def test_concepts_are_ordered_by_their_codes():
    model = model_of_codes({"concept_edges": True})
    order_concepts(model, chain()[1], None)
    assert model.head.intervention.order.tolist() == [1, 0]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps_are_steps(steps):
    model = model_of_codes({"concept_edges": False})
    before = [p.detach().clone() for p in model.head.flow.parameters()]
    assert math.isfinite(fit_prior(model, chain(40)[1], None, steps, seed=0))
    assert any(not torch.equal(a, b) for a, b in zip(before, model.head.flow.parameters()))


def test_what_is_kept_of_another_fit_does_not_outlive_the_newer_one(tmp_path):
    """The newer one has taken fewer steps when it is stopped."""
    data = chain(40)[1]

    def stopped(seed, calls):
        left = iter(range(calls))

        def check():
            if next(left, None) is None:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fit_prior(model_of_codes({}), data, None, 100, seed, check, tmp_path)
        _, _, state = newest_checkpoint(tmp_path)
        return state["key"]["seed"], state["step"]

    first, then = stopped(0, 30), stopped(1, 15)
    assert first[0] == 0 and then[0] == 1 and 0 < then[1] < first[1]


def test_the_fitted_prior_is_the_distribution_of_the_codes():
    codes, data = chain()
    model = model_of_codes({"concept_edges": True})
    order_concepts(model, data, None)
    fitted = fit_prior(model, data, None, steps=400, seed=0)
    # The entropy of what was drawn: six normal entries of standard deviation 0.3, with the
    # posterior's own noise.
    variance = 0.09 + math.exp(-6) + (6 / 255) ** 2 / 12
    assert fitted == pytest.approx(-6 * 0.5 * math.log(2 * math.pi * math.e * variance), abs=0.25)
    drawn = model.head(torch.randn(4000, 3, 3), torch.zeros(4000, 3)).concepts.detach()
    real = codes[:2000]
    torch.testing.assert_close(drawn.mean(0), real.mean(0), atol=0.06, rtol=0)
    correlation = [torch.corrcoef(x[:, :2, 0].T)[0, 1].item() for x in (drawn, real)]
    assert correlation[0] == pytest.approx(correlation[1], abs=0.08) and correlation[1] > 0.5
    cut = model.head(
        torch.randn(4000, 3, 3), torch.tensor([[1.0, 0.0, 0.0]]).expand(4000, -1)
    ).concepts
    assert abs(torch.corrcoef(cut[:, :2, 0].T)[0, 1].item()) < 0.08
