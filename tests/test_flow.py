"""Invertible mechanisms: both directions, the density, the mixtures and the exact SEM."""

import math

import pytest
import torch

from hf_intervene import InterventionConfig, InterventionHead
from hf_intervene.flow import ConceptFlow
from hf_intervene.mixtures import Mixture
from hf_intervene.structural import OrderedInterventionLayer


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
    # Away from where the two parts of a mixture meet, z is recovered. Its last entry gives only
    # the part.
    same = (found[..., :-1] - z[..., :-1]).abs().amax(-1) < 1e-6
    assert same[:, 2].all() and same[:10, 0].all() and same.float().mean() > 0.8


def test_mixtures_are_maps_between_noise_and_values():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3 * 4, generator=generator, dtype=torch.float64)
    x[:, 4:8] *= 20  # clusters far apart, with next to nothing between them
    mixture = Mixture.of(x)
    z = torch.linspace(-6, 6, 50, dtype=torch.float64)
    c = mixture.quantile(z)
    torch.testing.assert_close(mixture.noise(c), z, rtol=1e-6, atol=1e-6)
    # dz/dc = f(c) / N(z; 0, 1)
    nearby = c.clone().requires_grad_()
    (slope,) = torch.autograd.grad(mixture.noise(nearby).sum(), nearby)
    log_normal = -0.5 * (z.square() + math.log(2 * math.pi))
    torch.testing.assert_close(slope.log() + log_normal, mixture.log_density(c))
    step = 1e-3
    grid = torch.arange(-120, 120, step, dtype=torch.float64)
    one = Mixture(*(part[:1] for part in mixture))
    assert one.log_density(grid).exp().sum().item() * step == pytest.approx(1, abs=1e-6)


def test_a_value_far_from_all_components_costs_a_bounded_number_of_nats():
    x = torch.zeros(1, 3 * 4, dtype=torch.float64)
    x[:, 8:] = -50.0  # as narrow as they can be, all at 0
    mixture = Mixture.of(x)
    c = torch.tensor([3.0, 10.0], dtype=torch.float64, requires_grad=True)
    density = mixture.log_density(c)
    (slope,) = torch.autograd.grad(density.sum(), c)
    assert density.min() > -15 and slope.abs().max() < 0.5
    assert mixture.log_density(torch.zeros(1, dtype=torch.float64)) > 1


def test_values_have_the_gradient_of_the_exact_inverse():
    x = torch.randn(5, 3 * 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = torch.tensor([-2.0, -0.5, 0.0, 1.0, 2.5], dtype=torch.float64, requires_grad=True)

    def value(x, z):
        return Mixture.of(x).quantile(z)

    assert torch.autograd.gradcheck(value, (x.requires_grad_(), z), eps=1e-5, atol=1e-4)


def test_mixtures_in_half_precision_are_computed_in_single():
    x = torch.randn(200, 24, generator=torch.Generator().manual_seed(0))
    z = torch.randn(200, generator=torch.Generator().manual_seed(1))
    half, single = (Mixture.of(y) for y in (x.bfloat16(), x.bfloat16().float()))
    torch.testing.assert_close(half.quantile(z), single.quantile(z))


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
    expected = (
        -0.5 * (z.square() + math.log(2 * math.pi)).sum() + torch.linalg.slogdet(jacobian).logabsdet
    )
    torch.testing.assert_close(h.log_density(c, s)[0], expected.float())


def test_the_mixture_is_a_density_and_draws_follow_it():
    torch.manual_seed(0)
    flow = ConceptFlow(1, 1, 1, hidden_width=32)
    for module in flow.children():
        for layer in module if isinstance(module, torch.nn.ModuleList) else [module]:
            layer.reset_parameters()
    flow.reset_parameters()
    with torch.no_grad():
        flow.share_logit.fill_(math.log(0.3 / 0.7))
        _, means, log_scales = flow.last.bias[1, 0].chunk(3)  # under an intervention
        means += 6
        log_scales -= 1
    grid = torch.linspace(-12, 18, 60001)
    nothing = torch.zeros(1, 200_000, 32)  # it has a message
    s, h = nothing[:, : len(grid), :1], nothing[:, : len(grid)]
    states = flow.states(grid[None, :, None], s, h, whole=True)
    density = flow.log_densities(states, s)[0].exp().detach()
    step = grid[1] - grid[0]
    assert (density.sum() * step).item() == pytest.approx(1, abs=1e-3)
    drawn = flow(torch.randn(1, 200_000, 2), nothing[..., :1], nothing)[0, :, 0]
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


@pytest.mark.parametrize("edges", [False, True])
def test_states_serve_whole_targets_as_maps_of_their_own_do(edges):
    """Densities, noise and gradients: shared states, and maps interpolated for each strength."""
    h = head(concepts=("a", "b", "c"), free=2, concept_edges=edges)
    s = torch.tensor([[0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 1, 1, 0, 0]]).double().repeat(4, 1)
    found = []
    for whole in (True, False, None):
        c = torch.randn(12, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        c.requires_grad_()
        states = h.states(c, s, whole)
        values = h.log_density(c, s, states), h.whiten(c, s, states)
        h.zero_grad()
        (values[0].sum() + values[1].square().sum()).backward()
        gradients = [p.grad for p in h.flow.parameters()] + [h.intervention.weight.grad, c.grad]
        found.append([*values, *(g.clone() for g in gradients)])
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2], rtol=0, atol=0)


def test_strengths_between_have_densities_of_their_own():
    h, s = head(), contexts()
    c = torch.randn(40, 3, 4, dtype=torch.float64)
    states = h.states(c, s)
    torch.testing.assert_close(h.log_density(c, s, states), h.log_density(c, s))
    as_if_whole = h.log_density(c, s, h.states(c, s, whole=True))
    differs = (h.log_density(c, s) - as_if_whole).abs() > 1e-3
    assert differs[20:30].all() and not differs[:20].any() and not differs[30:].any()


def test_concepts_are_remade_above_free_blocks_as_they_are():
    h, s = head(concepts=("a", "b"), free=2, concept_edges=True), contexts(blocks=4)
    z = torch.randn(40, 4, 5, dtype=torch.float64)
    c = h(z, s).concepts
    torch.testing.assert_close(h.remade(c, z, s), c)
    z[:, 1] = torch.randn(40, 5, dtype=torch.float64)  # the last concept: nothing depends on it
    remade = h.remade(c, z, s)
    torch.testing.assert_close(remade, h(z, s).concepts)
    torch.testing.assert_close(remade[:, [0, 2, 3]], c[:, [0, 2, 3]])
    assert not torch.allclose(remade[:, 1], c[:, 1])


def test_blocks_depend_on_earlier_causes_unless_they_are_intervened_on():
    torch.manual_seed(0)
    layer = OrderedInterventionLayer(3, 5, 2, 6, concept_edges=True).double()
    layer.order.copy_(torch.tensor([2, 0, 1]))
    with torch.no_grad():
        layer.weight.normal_(std=0.3)
    c, s = torch.randn(40, 5, 2, dtype=torch.float64), torch.zeros(5, 40, 1, dtype=torch.float64)
    s[0, :10], s[2, 5:20] = 1, 0.3
    causes = {3: [], 4: [3], 2: [3, 4], 0: [3, 4, 2], 1: [3, 4, 2, 0]}  # free blocks first
    heard = layer(c, s)
    for i, before in causes.items():
        expected = sum(
            (c[:, j] @ layer.weight[i, :, j].T for j in before),
            torch.zeros(40, 6, dtype=torch.float64),
        )
        torch.testing.assert_close(heard[i], (1 - s[i]) * expected)
    assert layer.levels() == [[3], [4], [2], [0], [1]]
    torch.testing.assert_close(layer(c, s[[0, 4]], [0, 4]), heard[[0, 4]])
    layer.concept_edges = False
    assert layer.levels() == [[0, 1, 2, 3], [4]]


def test_concepts_follow_from_noise_block_by_block():
    h = head(concepts=("a", "b"), free=2, concept_edges=True)
    h.intervention.order.copy_(torch.tensor([1, 0]))
    z, s = torch.randn(40, 4, 5, dtype=torch.float64), contexts(blocks=4)
    c = h(z, s).concepts
    for j in (2, 3, 1, 0):
        heard = h.intervention(c, s.T[..., None])
        made = h.flow(z.transpose(0, 1), s.T[..., None], heard)[j]
        torch.testing.assert_close(c[:, j], made)


def test_without_edges_into_concepts_an_intervention_cuts_nothing():
    h, s = head(), contexts()
    z = torch.randn(40, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(h(z, s, edge_targets=torch.zeros_like(s)).concepts, h(z, s).concepts)
    h.intervention.concept_edges = True
    assert not torch.allclose(h(z, s, edge_targets=torch.zeros_like(s)).concepts, h(z, s).concepts)


def test_a_chosen_value_is_reached_and_moves_only_what_depends_on_it():
    h = head(concepts=("a", "b", "c"), concept_edges=True)  # a causes b, b causes c
    z, s = torch.randn(5, 4, 5, dtype=torch.float64), torch.zeros(5, 4, dtype=torch.float64)
    values = torch.randn(5, 4, 4, dtype=torch.float64)
    chosen = torch.tensor([False, True, False, False]).expand(5, 4)
    before, after = h(z, s).concepts, h(z, s, values, chosen).concepts
    torch.testing.assert_close(after[:, 1], values[:, 1])
    torch.testing.assert_close(after[:, [0, 3]], before[:, [0, 3]])
    assert not torch.allclose(after[:, 2], before[:, 2])


def test_strengths_lead_from_one_map_to_the_other_without_a_jump():
    h = head()
    z = torch.zeros(2001, 3, 5, dtype=torch.float64)
    s = torch.zeros(2001, 3, dtype=torch.float64)
    s[:, 0] = torch.linspace(0, 1, 2001)
    c = h(z, s).concepts[:, 0]
    steps = (c[1:] - c[:-1]).norm(dim=-1)  # quick between two clusters, but no jump
    assert steps.max() < 0.02 * steps.sum() and (c[-1] - c[0]).norm() > 0.5


def test_the_kl_is_that_of_draws():
    h = head()
    mean, logvar = (
        torch.randn(1, 3, 4, dtype=torch.float64),
        torch.full((1, 3, 4), -1.0, dtype=torch.float64),
    )
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
