"""Invertible mechanisms: both directions, the density against autograd and against draws, the mixture, the exact SEM."""

import math

import pytest
import torch

from hf_intervene import InterventionConfig, InterventionHead
from hf_intervene.flow import ConceptFlow
from hf_intervene.structural import ExactInterventionLayer


def head(concepts=("a", "b"), width=4, free=1, seed=0, **options):
    torch.manual_seed(seed)
    config = InterventionConfig(
        concepts=list(concepts),
        mechanism="flow",
        concept_width=width,
        free_blocks=free,
        embedding_shape=[8],
        feature_width=8,
        **options,
    )
    made = InterventionHead(config).double()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return made


def contexts(rows=40, blocks=3):
    s = torch.zeros(rows, blocks, dtype=torch.float64)
    s[:10, 0] = 1
    s[5:20, 1] = 1
    s[20:30, 0] = 0.3
    return s


@pytest.mark.parametrize("width", [1, 2, 5])
def test_noise_of_concepts_is_the_noise_that_made_them(width):
    h, s = head(width=width), contexts()
    z = torch.randn(40, 3, width + 1, dtype=torch.float64)
    c = h(z, s).concepts
    found = h.whiten(c, s)
    torch.testing.assert_close(h(found, s).concepts, c)
    # Away from where the two parts of a mixture meet, z itself is found; its last entry says only which part it was.
    same = (found[..., :-1] - z[..., :-1]).abs().amax(-1) < 1e-6
    assert same[:, 2].all() and same[:10, 0].all() and same.float().mean() > 0.8


@pytest.mark.parametrize("context", [(1.0, 1.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, 0.0)])
def test_the_density_is_that_of_a_change_of_variables(context):
    h = head(concept_edges=True)
    with torch.no_grad():
        h.flow.share_logit.fill_(-40.0)  # without the mixture there is one map
    s = torch.tensor([context], dtype=torch.float64)
    c = h(torch.randn(1, 3, 5, dtype=torch.float64), s).concepts.detach()

    def noise(flat):
        return h.whiten(flat.view(1, 3, 4), s)[0, :, :4].flatten()

    jacobian = torch.autograd.functional.jacobian(noise, c.flatten())
    z = noise(c.flatten())
    expected = -0.5 * (z.square() + math.log(2 * math.pi)).sum() + torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(h.log_density(c, s)[0], expected.float())


def test_the_mixture_is_a_density_and_draws_follow_it():
    torch.manual_seed(0)
    flow = ConceptFlow(1, 1, 1)
    flow.reset_parameters()
    with torch.no_grad():
        flow.share_logit.fill_(math.log(0.3 / 0.7))
        flow.mean[1] = 6.0
        flow.log_scale[1] = -1.0
    grid = torch.linspace(-12, 18, 60001)
    density = flow.log_density(grid[None, :, None], 0.0)[0].exp().detach()
    step = grid[1] - grid[0]
    assert (density.sum() * step).item() == pytest.approx(1, abs=1e-3)
    drawn = flow(torch.randn(1, 200_000, 2), torch.zeros(1, 200_000, 1))[0, :, 0]
    for low, high in ((-12, 0), (0, 4), (4, 18)):
        inside = (grid >= low) & (grid < high)
        share = ((drawn >= low) & (drawn < high)).float().mean().item()
        assert (density[inside].sum() * step).item() == pytest.approx(share, abs=5e-3)


def test_every_context_at_once_is_every_context_by_itself():
    h = head(concepts=("a", "b", "c"), free=2)
    c = torch.randn(6, 5, 4, dtype=torch.float64)
    asked = torch.tensor([[0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 1, 1, 0, 0]], dtype=torch.float64)
    one_by_one = torch.stack([h.log_density(c, row.expand(6, -1)) for row in asked], dim=1)
    torch.testing.assert_close(h.context_log_densities(c, asked), one_by_one)


def test_the_structural_equations_hold_and_cut_what_is_intervened_on():
    torch.manual_seed(0)
    layer = ExactInterventionLayer(2, 3, 2, concept_edges=True).double()
    layer.reset_parameters(0.0)
    with torch.no_grad():
        layer.weight.normal_(std=0.3)
    eps, s = torch.randn(40, 3, 2, dtype=torch.float64), contexts()
    c = layer(eps, s[..., None])
    W = layer.off_diagonal().detach()[:, :, 0]  # (D, w, D, w)
    assert bool(W[0, :, 1].any()) and not W[0, :, 2].any()  # concepts depend on concepts, free blocks on all
    for row in range(40):
        for i in range(3):
            heard = sum(W[i, :, j] @ c[row, j] for j in range(3) if j != i)
            torch.testing.assert_close(c[row, i], eps[row, i] + (1 - s[row, i]) * heard)
    torch.testing.assert_close(layer.noise(c, s[..., None]), eps)
    matrix = torch.eye(6, dtype=torch.float64) - (1 - s[25].repeat_interleave(2))[:, None] * layer.off_diagonal().flatten(
        2
    ).flatten(0, 1)
    torch.testing.assert_close(layer.log_det(s)[25], torch.linalg.slogdet(matrix).logabsdet)


def test_without_edges_into_concepts_an_intervention_cuts_nothing():
    h, s = head(), contexts()
    z = torch.randn(40, 3, 5, dtype=torch.float64)
    assert bool(h.intervention.weight[:2].any())
    torch.testing.assert_close(h(z, s, edge_targets=torch.zeros_like(s)).concepts, h(z, s).concepts)
    h.intervention.concept_edges = True
    assert not torch.allclose(h(z, s, edge_targets=torch.zeros_like(s)).concepts, h(z, s).concepts)


def test_a_chosen_value_is_reached_and_moves_only_what_depends_on_it():
    h = head()
    z, s = torch.randn(5, 3, 5, dtype=torch.float64), torch.zeros(5, 3, dtype=torch.float64)
    with torch.no_grad():
        h.intervention.weight.zero_()
        h.intervention.weight[2, :, 0, 0] = torch.eye(4)  # the free block depends on concept a
    values = torch.randn(5, 3, 4, dtype=torch.float64)
    chosen = torch.tensor([True, False, False]).expand(5, 3)
    before, after = h(z, s).concepts, h(z, s, values, chosen).concepts
    torch.testing.assert_close(after[:, 0], values[:, 0])
    torch.testing.assert_close(after[:, 1], before[:, 1])
    torch.testing.assert_close(after[:, 2] - before[:, 2], values[:, 0] - before[:, 0])


def test_strengths_lead_from_one_map_to_the_other_without_a_jump():
    h = head()
    z = torch.zeros(21, 3, 5, dtype=torch.float64)
    s = torch.zeros(21, 3, dtype=torch.float64)
    s[:, 0] = torch.linspace(0, 1, 21)
    c = h(z, s).concepts[:, 0]
    steps = (c[1:] - c[:-1]).norm(dim=-1)
    assert steps.max() < 4 * steps.mean() and (c[-1] - c[0]).norm() > steps.max()


def test_the_kl_is_that_of_draws():
    h = head()
    mean, logvar = torch.randn(1, 3, 4, dtype=torch.float64), torch.full((1, 3, 4), -1.0, dtype=torch.float64)
    s = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64).expand(20_000, -1)
    y = mean + (0.5 * logvar).exp() * torch.randn(20_000, 3, 4, dtype=torch.float64)
    q = torch.distributions.Normal(mean, (0.5 * logvar).exp()).log_prob(y).flatten(1).sum(1)
    expected = (q - h.log_density(y, s)).mean().item()
    assert h.kl(mean, logvar, s, y).mean().item() == pytest.approx(expected, abs=0.15)


def test_flows_refuse_what_they_do_not_have():
    with pytest.raises(ValueError, match="perfect interventions"):
        InterventionConfig(mechanism="flow", intervention="soft")
    with pytest.raises(ValueError, match="mechanism must be one of"):
        InterventionConfig(mechanism="spline")


def test_a_head_with_flows_is_saved_and_loaded(tmp_path):
    h = head().float()
    h.save_pretrained(tmp_path)
    again = InterventionHead.from_pretrained(tmp_path)
    z, s = torch.randn(40, 3, 5), contexts().float()
    torch.testing.assert_close(again(z, s).embedding, h(z, s).embedding)
