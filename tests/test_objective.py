"""The objective and its terms: sums, gradients, and a term that somebody adds."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

from hf_intervene import InterventionModel, LightVAE
from hf_intervene.objective import Objective
from hf_intervene.terms import (
    L2,
    ContextPrediction,
    EditConsistency,
    FreeInvariance,
    GroupLasso,
    Term,
    term_names,
)
from hf_intervene.terms.edit_consistency import KNEE, edited
from hf_intervene.trainer.building import build_objective
from hf_intervene.trainer.sections import ObjectiveSettings


CONTEXTS = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]])


@pytest.fixture
def model():
    torch.manual_seed(0)
    base = LightVAE(3, 16, (8, 16), hidden_width=16, latent_width=8, likelihood="gaussian")
    made = InterventionModel.build(
        base, ["a", "b"], mechanism="flow", concept_width=4, free_blocks=1, concept_edges=True
    )
    with torch.no_grad():
        made.head.intervention.weight.normal_(std=0.1)
    return made


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(1)
    return {"pixel_values": torch.rand(6, 3, 16, 16, generator=g), "targets": CONTEXTS.repeat(2, 1)}


def all_terms(model):
    return [
        ContextPrediction(2.0, CONTEXTS),
        EditConsistency(0.5, model.noise_shape, model.base.image_shape),
        FreeInvariance(3.0, CONTEXTS, 2, 4),
        GroupLasso(0.1),
        L2(0.0),
    ]


def test_the_loss_is_the_elbo_and_the_weighted_terms(model, batch):
    objective = Objective(model, all_terms(model))
    # without l2
    assert set(objective.terms) == {
        "context_prediction",
        "edit_consistency",
        "free_invariance",
        "group_lasso",
    }
    draws = objective.draws(6, torch.Generator().manual_seed(0))
    weights = {name: torch.tensor(w) for name, w in objective.weights(1.0).items()}
    output = objective(**batch, weights=weights, **draws)
    elbo = (output.reconstruction_loss + output.kl).mean()
    added = sum(weights[name] * value for name, value in output.terms.items())
    torch.testing.assert_close(output.loss, elbo + added)
    assert all(value > 0 for value in output.terms.values())


def test_a_step_is_the_same_with_densities_that_terms_share_and_without(model, batch):
    """Losses and gradients; without, KL and edits have maps of their own for each strength."""
    found = []
    for whole in (True, False):
        torch.manual_seed(2)
        objective = Objective(model, all_terms(model), whole)
        draws = objective.draws(6, torch.Generator().manual_seed(0))
        weights = {name: torch.tensor(w) for name, w in objective.weights(1.0).items()}
        model.zero_grad()
        output = objective(**batch, weights=weights, **draws)
        output.loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((output.loss.detach(), output.kl.detach(), output.terms, gradients))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_an_objective_knows_whether_its_contexts_are_whole(model):
    for strength, whole in ((1.0, True), (0.5, False)):
        contexts = CONTEXTS * torch.tensor([strength, 1.0, 1.0])
        assert Objective.build(model, contexts, {"context_prediction": 1.0}).whole is whole


def test_terms_rise_when_they_say(model):
    term = EditConsistency(0.5, model.noise_shape, model.base.image_shape)
    assert [round(term.weight(p), 3) for p in (0.0, 0.05, 0.15, 0.25, 1.0)] == [
        0,
        0,
        0.25,
        0.5,
        0.5,
    ]


def test_context_prediction_is_the_cross_entropy_of_the_densities(model, batch):
    output = model(**batch)
    found = ContextPrediction(1.0, CONTEXTS).loss(model, output, batch["targets"], {})
    logits = torch.stack(
        [model.head.log_density(output.draw, row.expand(6, -1)) for row in CONTEXTS], dim=1
    )
    torch.testing.assert_close(found, cross_entropy(logits, torch.tensor([0, 1, 2, 0, 1, 2])))


def test_context_prediction_leaves_out_contexts_that_it_does_not_tell_apart(model, batch):
    targets = batch["targets"].clone()
    targets[0, 0] = 0.5  # a partial intervention
    output = model(batch["pixel_values"], targets)
    contexts = torch.cat([CONTEXTS, targets[:1]])
    term = ContextPrediction(1.0, contexts)
    assert len(term.contexts) == 3
    logits = model.head.context_log_densities(output.draw, CONTEXTS)[1:]
    torch.testing.assert_close(
        term.loss(model, output, targets, {}), cross_entropy(logits, torch.tensor([1, 2, 0, 1, 2]))
    )


def test_an_edit_keeps_what_is_not_intervened_on_anew(model):
    head = model.head
    with torch.no_grad():
        head.intervention.weight.zero_()
    c = torch.randn(6, 3, 4)
    targets = CONTEXTS.repeat(2, 1)
    for kind, strength in ((0.1, 1.0), (0.9, 0.0)):
        kinds = torch.tensor([[kind, 0.5, kind]]).expand(6, -1)  # the free block stays all the same
        z = head.whiten(c, targets)
        after, new = edited(head, c, z, targets, torch.randn(6, 3, 5), kinds)
        torch.testing.assert_close(after[:, 1:], c[:, 1:])
        assert bool((after[:, 0] != c[:, 0]).all())
        assert new.tolist() == [[strength, *row[1:]] for row in targets.tolist()]


def edit_term(model, every):
    return EditConsistency(1.0, model.noise_shape, model.base.image_shape, every=every)


def test_the_gradient_of_edit_consistency_goes_to_decoder_and_encoder_alone(model, batch):
    term = edit_term(model, 1)
    draws = term.draw(6, torch.Generator().manual_seed(0))
    output = model(**batch)
    term.loss(model, output, batch["targets"], draws).backward()
    moved = {
        name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())
    }
    for part in ("base.model.decoder", "base.model.encoder", "head.unpool", "head.encoder_readout"):
        assert any(name.startswith(part) for name in moved), part
    assert not any("flow" in name or "intervention" in name for name in moved)


def test_edit_consistency_by_a_loop(model, batch):
    term = edit_term(model, 2)
    draws = term.draw(6, torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = model(**batch)
        expected = []
        for i in (0, 2, 4):
            row = slice(i, i + 1)
            after, new = edited(
                model.head,
                output.draw[row],
                model.head.whiten(output.draw[row], batch["targets"][row]),
                batch["targets"][row],
                draws["noise"][row],
                draws["kind"][row],
            )
            image = model.base.generate(model.head.represent(after), {})
            noisy = image + draws["spread"][row] * draws["blur"][row]
            mean, logvar = model.head.posterior(model.base.encode(noisy).features, new)
            off = ((after - mean) / (0.5 * logvar).exp()).abs().flatten().tolist()
            assert min(off) < KNEE
            expected.append(sum(0.5 * x**2 if x < KNEE else KNEE * (x - KNEE / 2) for x in off))
        found = term.loss(model, output, batch["targets"], draws)
    torch.testing.assert_close(found, torch.tensor(expected).mean())


def test_edits_that_change_nothing_have_a_gradient(model, batch):
    """However sure the encoder is: the gradient does not end where a reading is far off."""
    term = edit_term(model, 1)
    draws = term.draw(6, torch.Generator().manual_seed(0))
    with torch.no_grad():
        bias = model.head.encoder_readout.bias
        bias[len(bias) // 2 :] = -20.0
    output = model(**batch)
    term.loss(model, output, batch["targets"], draws).backward()
    assert bool(model.head.unpool.weight.grad.any())


def test_the_decoder_learns_to_be_read_back(model, batch):
    """Only the decoder is trained, by this term only: edits are read back better."""
    term = edit_term(model, 1)
    optimizer = torch.optim.Adam(
        [*model.base.model.decoder.parameters(), *model.head.unpool.parameters()], lr=3e-3
    )
    draws = term.draw(6, torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = model(**batch)
    losses = []
    for _ in range(40):
        loss = term.loss(model, output, batch["targets"], draws)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


class DarkImages(Term):
    """What somebody would add: one class, and its place in the list."""

    name = "dark_images"

    def draw(self, rows, generator):
        return {"noise": torch.rand(rows, generator=generator)}

    def loss(self, model, output, targets, draws):
        assert draws["noise"].shape == (len(targets),)
        return model.base.generate(model.head.represent(output.draw), {}).mean()


@dataclass
class Weights(ObjectiveSettings):
    dark_images: float = 0.0


def test_a_new_term_is_one_class_and_one_setting(model, batch):
    """Nothing else has to know of it: training builds its objective by the names in the
    settings."""
    weights = Weights(context_prediction=0.0, edit_consistency=0.0, free_invariance=0.0)
    weights.dark_images = 3.0
    settings = SimpleNamespace(objective=weights)
    data = SimpleNamespace(targets=lambda free_blocks: CONTEXTS)
    objective = build_objective(settings, model, data)
    assert set(objective.terms) == {"dark_images"}
    assert objective.weights(0.5) == {"dark_images": 3.0}
    draws = objective.draws(6, torch.Generator().manual_seed(0))
    output = objective(**batch, weights={"dark_images": torch.tensor(3.0)}, **draws)
    elbo = (output.reconstruction_loss + output.kl).mean()
    torch.testing.assert_close(
        output.loss - elbo, 3 * output.terms["dark_images"], rtol=1e-3, atol=1e-3
    )


def test_terms_that_a_model_has_no_use_for_are_left_out(model):
    strengths = dict.fromkeys(term_names(), 1.0) | {"dark_images": 0.0}
    assert set(Objective.build(model, CONTEXTS, strengths).terms) == {
        "context_prediction",
        "edit_consistency",
        "free_invariance",
        "group_lasso",
        "l2",
    }
    assert set(Objective.build(model, CONTEXTS, strengths, sharded=True).terms) == {
        "context_prediction",
        "group_lasso",
        "l2",
    }
    assert set(Objective.build(model, CONTEXTS[:1], strengths).terms) == {"group_lasso", "l2"}
    with pytest.raises(ValueError, match="no term 'dark': the terms are context_prediction"):
        Objective.build(model, CONTEXTS, {"dark": 1.0})


def test_penalties_are_of_the_edges_into_concepts(model, batch):
    layer = model.head.intervention
    layer.concept_edges = True
    with torch.no_grad():
        layer.weight.normal_()
    blocks = torch.stack(
        [layer.weight[i, :, j].square().sum() for i, j in ((0, 2), (1, 2), (1, 0))]
    )
    output = model(**batch)
    torch.testing.assert_close(
        GroupLasso(1.0).loss(model, output, None, {}), blocks.sqrt().sum(), rtol=1e-3, atol=1e-3
    )
    torch.testing.assert_close(L2(1.0).loss(model, output, None, {}), blocks.sum())


def test_free_invariance_turns_the_gradient_of_the_encoder_round(model, batch):
    torch.manual_seed(0)
    term = FreeInvariance(50.0, CONTEXTS, 2, 4)
    c = torch.randn(6, 3, 4, requires_grad=True)
    output = SimpleNamespace(draw=c)
    loss = term.loss(model, output, batch["targets"], {})
    loss.backward()
    plain = c.detach().clone().requires_grad_()
    expected = cross_entropy(
        term.classifier(plain[:, 2:].flatten(1)), torch.tensor([0, 1, 2, 0, 1, 2])
    )
    (gradient,) = torch.autograd.grad(expected, plain)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(c.grad, -50 * gradient)
    assert all(bool(p.grad.any()) for p in term.classifier.parameters())
