"""Heads of many concepts: the low-rank intervention layer, and costs linear in their number."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hf_intervene import InterventionConfig, InterventionHead, mechanisms, modeling_intervention
from hf_intervene.metrics.causal import single_interventions_operator, total_effect_operator


def make_head(concepts=5, **options):
    torch.manual_seed(0)
    widths = {"noise_width": 5, "concept_width": 3, "feature_width": 7, "embedding_shape": [6]}
    options = widths | {"initializer_range": 0.5} | options
    head = InterventionHead(
        InterventionConfig(concepts=[f"c{j}" for j in range(concepts)], **options)
    ).eval()
    for parameter in head.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return head


def full_rank_copy(head):
    """Return the same head with a full intervention layer, whose W is the product.

    Its unused diagonal blocks are random.
    """
    copy = InterventionHead(
        InterventionConfig(**head.config.to_dict() | {"intervention_rank": None})
    ).to(head.dtype)
    copy.load_state_dict(head.state_dict(), strict=False)
    layer = head.intervention
    copy.intervention.weight.data = torch.einsum(
        "iar,kjbr->iakjb", layer.effects, layer.causes
    ).detach()
    return copy


@pytest.mark.parametrize("intervention", ["perfect", "soft"])
@pytest.mark.parametrize("steps", [1, 3])
def test_low_rank_is_the_full_layer_of_the_product(intervention, steps):
    head = make_head(
        intervention=intervention, propagation_steps=steps, intervention_rank=2
    ).double()
    full = full_rank_copy(head)
    z = torch.randn(4, 6, 5, dtype=torch.float64)
    targets = head.targets(["obs", ["c0"], {"c1": 0.3, "c4": 0.8}, ["c0", "c2"]]).double()
    values, chosen = torch.randn(4, 6, 3, dtype=torch.float64), torch.rand(4, 6) < 0.3
    for clamp in ((), (values, chosen)):
        torch.testing.assert_close(
            head(z, targets, *clamp).concepts,
            full(z, targets, *clamp).concepts,
            rtol=1e-12,
            atol=1e-12,
        )
    torch.testing.assert_close(head.intervention.off_diagonal(), full.intervention.off_diagonal())
    for context in (None, head.targets("c1")[0]):
        found, expected = (total_effect_operator(h.intervention, context) for h in (head, full))
        torch.testing.assert_close(torch.from_numpy(found), torch.from_numpy(expected))
    found, expected = (torch.from_numpy(single_interventions_operator(h)) for h in (head, full))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("weights", [(0.7, 0.0), (0.0, 0.7), (0.3, 0.2)])
def test_penalties_are_those_of_the_blocks(steps, weights):
    head = make_head(propagation_steps=steps, intervention_rank=2)
    effects, causes = head.intervention.effects, head.intervention.causes
    blocks = [
        effects[i] @ cause[j].T for cause in causes for i in range(6) for j in range(6) if i != j
    ]
    expected = sum(
        weights[0] * block.norm() + weights[1] * block.square().sum() for block in blocks
    )
    torch.testing.assert_close(head.penalty(*weights), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        full_rank_copy(head).penalty(*weights), expected, rtol=1e-5, atol=1e-4
    )
    parameters = list(head.intervention.parameters())[:2]
    for a, b in zip(
        *(torch.autograd.grad(x, parameters) for x in (head.penalty(*weights), expected))
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    head.intervention.effects.data.zero_()
    assert all(p.isfinite().all() for p in torch.autograd.grad(head.penalty(*weights), parameters))


@pytest.mark.parametrize("steps", [1, 3])
def test_low_rank_weights_start_at_the_scale_of_full_ones(steps):
    torch.manual_seed(0)
    config = {
        "concepts": [f"c{j}" for j in range(40)],
        "propagation_steps": steps,
        "initializer_range": 0.02,
    }
    weight = InterventionHead(
        InterventionConfig(**config, intervention_rank=8)
    ).intervention.off_diagonal()
    i, j = torch.nonzero(1 - torch.eye(41), as_tuple=True)
    assert weight[i, :, :, j].std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(weight[:, :, 0], weight[:, :, -1])


def test_low_rank_heads_save_and_load_bit_equal_and_older_configurations_load(tmp_path):
    head = make_head(intervention_rank=2)
    head.save_pretrained(tmp_path / "low")
    loaded = InterventionHead.from_pretrained(tmp_path / "low")
    z, targets = torch.randn(2, 6, 5), head.targets([["c0"], "obs"])
    assert loaded.config.intervention_rank == 2
    assert torch.equal(loaded(z, targets).embedding, head(z, targets).embedding)
    InterventionConfig(**head.config.to_dict() | {"intervention_rank": 3}).save_pretrained(
        tmp_path / "low"
    )
    with pytest.raises(ValueError, match="do not fit its configuration"):
        InterventionHead.from_pretrained(tmp_path / "low")

    full = make_head()
    full.save_pretrained(tmp_path / "full")
    config = tmp_path / "full" / "config.json"
    settings = json.loads(config.read_text())
    assert settings.pop("intervention_rank", None) is None
    config.write_text(json.dumps(settings))
    older = InterventionHead.from_pretrained(tmp_path / "full")
    assert torch.equal(older(z, targets).embedding, full(z, targets).embedding)


def test_bad_ranks():
    for rank in (0, -1):
        with pytest.raises(ValueError, match="intervention_rank must lie between 1"):
            InterventionConfig(concepts=["a"], intervention_rank=rank)


@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_computing_only_what_differs_gives_the_whole_result(monkeypatch, strength):
    """If few of many concepts are intervened on, the head computes only what differs."""
    head = make_head(40).double()
    head.posterior_offset.normal_()
    targets = head.targets(
        [["c3"], "obs", {"c3": strength}, {"c0": strength, "c39": 1.0}, ["c7"]]
    ).double()
    z, features = (
        torch.randn(5, *shape, dtype=torch.float64, requires_grad=True) for shape in ((41, 5), (7,))
    )
    parameters = [z, features, *head.parameters()]

    def outputs():
        embedding, (mean, logvar) = head(z, targets).embedding, head.posterior(features, targets)
        return [
            embedding,
            mean,
            *torch.autograd.grad(
                embedding.square().sum() + mean.pow(3).sum() + logvar.sum(), parameters
            ),
        ]

    assert mechanisms.places(targets) is not None and mechanisms.places(targets[:, :4]) is None
    sparse = outputs()
    for module in (mechanisms, modeling_intervention):
        monkeypatch.setattr(module, "places", lambda s: None)
    for a, b in zip(sparse, outputs()):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_strengths_have_gradients_where_they_are_zero():
    head = make_head(40).double()
    targets = head.targets([["c3"], "obs"]).double().requires_grad_()
    embedding = head(torch.randn(2, 41, 5, dtype=torch.float64), targets).embedding
    mean = head.posterior(torch.randn(2, 7, dtype=torch.float64), targets)[0]
    for output in (embedding, mean):
        (gradient,) = torch.autograd.grad(output.square().sum(), targets, retain_graph=True)
        assert (gradient[:, :40] != 0).all()


class Largest(TorchDispatchMode):
    """Record the number of elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor) and not function._schema.is_mutable:
                self.elements = max(self.elements, tensor.numel())
        return output


@pytest.mark.parametrize("steps", [1, 3])
def test_cost_is_linear_in_the_number_of_concepts(steps):
    """Operations and the largest tensor of forward, backward and the update of the offsets."""

    def cost(concepts):
        head = make_head(concepts, propagation_steps=steps, intervention_rank=4)
        targets = head.targets([["c0"], "obs", ["c1", "c2"], "c3"])
        z, features = torch.randn(4, concepts + 1, 5), torch.randn(4, 7)
        with FlopCounterMode(display=False) as flops, Largest() as largest:
            mean, logvar = head.posterior(features, targets)
            (
                head(z, targets).embedding.sum() + mean.sum() + logvar.sum() + head.penalty(0, 1.0)
            ).backward()
            head.center_posterior(mean.detach(), targets)
        return flops.get_total_flops(), largest.elements

    small, large = cost(127), cost(255)
    assert large[0] < 2.05 * small[0]
    assert large[1] < 2.05 * small[1]
