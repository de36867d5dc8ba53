"""The two routes of an intervention: separated in the head, and measured on images."""

import numpy as np
import pytest
import torch

from hf_intervene import InterventionModel, LightVAE
from hf_intervene.evaluation.content import measure_routes
from hf_intervene.metrics.routes import compare_routes


@pytest.fixture
def model():
    torch.manual_seed(0)
    base = LightVAE(3, 16, block_out_channels=(8, 8), hidden_width=16, latent_width=12)
    return InterventionModel.build(base, ("a", "b"), noise_width=4, initializer_range=0.5).eval()


def test_edge_targets_reach_the_edges_and_nothing_else(model):
    head, z = model.head.double(), torch.randn(5, model.num_blocks, 4, dtype=torch.float64)
    s = torch.rand(2, 5, model.num_blocks, dtype=torch.float64)
    found = head(z, s[0], edge_targets=s[1]).concepts
    u = head.exogenous(z.transpose(0, 1), s[0].T[..., None])
    eps = head.expressive(u).transpose(0, 1)
    torch.testing.assert_close(found, head.intervention(eps, s[1][..., None]))
    torch.testing.assert_close(head(z, s[0], edge_targets=s[0]).embedding, head(z, s[0]).embedding)
    with pytest.raises(ValueError, match=r"edge_targets must have the shape of targets, \(5, "):
        head(z, s[0], edge_targets=s[1][:, :1])


def test_without_edges_the_edge_route_has_no_effect(model):
    torch.nn.init.zeros_(model.head.intervention.weight)
    with torch.no_grad():  # A_int starts as A_obs
        model.head.exogenous.slices.bias += torch.randn_like(model.head.exogenous.slices.bias)
    noise = torch.randn(20, *model.noise_shape, generator=torch.Generator().manual_seed(0))
    found = measure_routes(model, "a", noise, {}, None)
    assert found["own"] == pytest.approx(1) and found["edges"] == 0 and found["change"] > 0
    assert found["rates"] is None and found["outside"] is None


def test_a_new_head_acts_only_through_its_edges(model):
    noise = torch.randn(20, *model.noise_shape, generator=torch.Generator().manual_seed(0))
    found = measure_routes(model, "a", noise, {}, None)
    assert found["edges"] == pytest.approx(1) and found["own"] == pytest.approx(0, abs=1e-5)


class Reads:
    """Return a detector of the first and the last pixel."""

    concepts, unusable, usable = ("first", "last"), {}, np.array([True, True])

    def logits(self, images):
        return 20 * (images[:, [0, -1], [0, -1], 0] - 0.5)

    def present(self, images):
        return self.logits(images) > 0


def test_routes_by_hand():
    before, whole, own, edges = np.zeros((4, 10, 4, 4, 1))
    whole[:, 0, 0], whole[:, -1, -1] = 1, 1
    own[:, 0, 0] = 1
    edges[:6, -1, -1] = 1
    found = compare_routes(before, whole, own, edges, "first", Reads())
    assert (
        found.change == pytest.approx(2 / 16)
        and found.own == pytest.approx(0.5)
        and found.edges == pytest.approx(0.3)
    )
    assert {name: share.value for name, share in found.rates.items()} == {
        "observational": 0,
        "intervened": 1,
        "own": 1,
        "edges": 0,
    }
    assert found.outside == pytest.approx(0.5)
    assert compare_routes(before, before, own, edges).own is None
    with pytest.raises(ValueError, match="four arrays of one shape"):
        compare_routes(before, whole[:3], own, edges)
