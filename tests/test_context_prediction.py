"""Contexts told apart by each concept's own block: against the ratio of densities, its gradient, its state, what it does to a model."""

import pytest
import torch
from accelerate import PartialState
from test_train import assert_same, last_state, run, weights

from hf_intervene import InterventionModel
from hf_intervene.bases import LightVAE
from hf_intervene.context_prediction import ContextPrediction
from hf_intervene.data import ContextImages
from hf_intervene.training.aggregate import AggregatePosteriors
from hf_intervene.training.arguments import TrainArguments


CONTEXTS = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # obs, a, b
SHIFT = 1.5


def draws(ids, generator):
    """Blocks of a, b and a free one, two standard normal numbers each; the first of a concept's block is shifted in its context."""
    m = torch.randn(len(ids), 3, 2, generator=generator)
    m[:, :2, 0] += SHIFT * CONTEXTS[ids]
    return m


@pytest.fixture(scope="module")
def trained():
    prediction, generator = ContextPrediction(CONTEXTS, 2, weight=3.0), torch.Generator().manual_seed(0)
    ids = torch.arange(600) % 3
    for _ in range(500):
        prediction.update(draws(ids, generator), ids)
    return prediction


def test_the_logits_are_the_log_ratios_of_densities(trained):
    ids = torch.arange(6000) % 3
    m = draws(ids, torch.Generator().manual_seed(1))
    true = SHIFT * m[:, :2, 0] - SHIFT**2 / 2  # log p(m | do k) / p(m | obs)
    assert (trained.network(m[:, :2]) - true).abs().mean() < 0.2
    best = torch.nn.functional.cross_entropy(true @ CONTEXTS.T, ids)
    assert trained.loss(m, ids).item() == pytest.approx(3.0 * best.item(), rel=0.03)


def test_in_a_context_of_several_concepts_they_add_up(trained):
    prediction = ContextPrediction(torch.cat([CONTEXTS, torch.ones(1, 2)]), 2, weight=1.0)
    prediction.network.load_state_dict(trained.network.state_dict())
    m = draws(torch.zeros(5, dtype=torch.long), torch.Generator().manual_seed(2))
    a, b = trained.network(m[:, :2]).unbind(1)
    expected = -torch.log_softmax(torch.stack([torch.zeros(5), a, b, a + b], dim=1), dim=1)[:, 3].mean()
    torch.testing.assert_close(prediction.loss(m, torch.full((5,), 3)), expected)


def test_the_gradient_moves_each_block_to_its_own_context_and_leaves_the_classifiers_alone(trained):
    m = torch.zeros(3, 3, 2, requires_grad=True)
    trained.loss(m, torch.arange(3)).backward()
    first = -m.grad[:, :2, 0]  # where to: (contexts, concepts)
    assert (first[0] < 0).all() and first[1, 0] > 0 > first[1, 1] and first[2, 1] > 0 > first[2, 0]
    assert (m.grad[:, 2] == 0).all()  # the free block
    assert not any(p.requires_grad or p.grad is not None for p in trained.parameters)


def test_it_goes_on_from_its_state(trained):
    def learn(prediction, steps):
        for step in steps:
            prediction.update(draws(torch.arange(12) % 3, torch.Generator().manual_seed(step)), torch.arange(12) % 3)
        return prediction

    whole, first, second = (ContextPrediction(CONTEXTS, 2, 1.0, seed) for seed in (0, 0, 1))
    learn(whole, range(6))
    second.load_state_dict({name: value.clone() for name, value in learn(first, range(3)).state_dict().items()})
    after = learn(second, range(3, 6)).state_dict()
    assert all(torch.equal(value, after[name]) for name, value in whole.state_dict().items())


def light(**changes):
    torch.manual_seed(0)
    base = LightVAE(3, 16, block_out_channels=(8, 8), hidden_width=16, norm="none")
    return InterventionModel.build(base, ("a", "b"), noise_width=4, **changes)


@pytest.mark.parametrize("posterior", ["whitened", "unconditional"])
def test_contexts_are_read_from_what_does_not_know_them(posterior):
    model = light(posterior=posterior)
    x, s = torch.rand(3, 3, 16, 16), model.targets([["obs"], ["a"], ["b"]])
    output = model(x, s, predict_contexts=True)
    assert model(x, s).observational_mean is None
    torch.testing.assert_close(output.observational_mean, model(x, torch.zeros_like(s)).posterior_mean)
    assert torch.equal(output.observational_mean[0], output.posterior_mean[0])


def halves(size, generator):
    """Images whose left half has one brightness and whose right half another; in the context of a concept one half is brighter on average."""
    data = {}
    for context, (left, right) in {"obs": (0, 0), "a": (1, 0), "b": (0, 1)}.items():
        levels = torch.rand(size, 2, generator=generator) ** (1 / (1 + 2 * torch.tensor([left, right])))
        images = levels.repeat_interleave(8, dim=1)[:, None, :, None].expand(size, 16, 16, 3)
        data[context] = (images * 255).round().to(torch.uint8).numpy()
    return ContextImages.from_arrays(data, ("a", "b"))


def test_each_block_comes_to_carry_its_concept():
    """By the penalty alone: then the half of a concept is in its block, whichever way the weights began."""
    model, data = light(), halves(2000, torch.Generator().manual_seed(0))
    settings = TrainArguments(context_prediction=0.1, moment_matching=0.0, prior_matching=0.0)
    posteriors = AggregatePosteriors(model, data, settings, PartialState(cpu=True))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    targets = data.targets(1)
    for step in range(300):
        rows = torch.randint(len(data), (64,), generator=torch.Generator().manual_seed(step))
        ids = data.context_ids[rows]
        output = model(data.images(rows).float().div(255), targets[ids], predict_contexts=True)
        loss = posteriors.penalty(output, targets[ids], ids, matched=0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        moments = output.posterior_mean.detach(), output.posterior_logvar.detach()
        posteriors.follow(*moments, output.observational_mean.detach(), targets[ids], ids, step, 1.0)

    grid = torch.full((3, 3, 16, 16), 0.4)  # neither half bright, the left one, the right one
    grid[1, :, :, :8] = grid[2, :, :, 8:] = 0.9
    with torch.no_grad():
        said = posteriors.prediction.network(model(grid, torch.zeros(3, 3), predict_contexts=True).observational_mean[:, :2])
    change = said[1:] - said[0]  # (which half, concept)
    assert change[0, 0] > 2 * change[0, 1].abs() and change[1, 1] > 2 * change[1, 0].abs(), change


def test_a_run_with_it_resumes_and_one_without_differs(tiny, tmp_path):
    settings = tiny | {"context_prediction": 0.5, "moment_warmup": 0.8, "max_steps": 6, "eval_every": 3}  # over after 5 steps
    run(settings)
    for name, changes in {
        "resumed": {"resume": str(tmp_path / "run" / "checkpoints" / "step-00000003")},
        "without": {"context_prediction": 0.0},
        "pooled": {"ablation": "head-pooled"},
    }.items():
        run(settings | changes | {"output_dir": str(tmp_path / name)})
    resumed = settings | {"output_dir": str(tmp_path / "resumed")}
    assert_same(weights(tmp_path / "resumed" / "model"), weights(tmp_path / "run" / "model"))
    for part in ("optimizer", "moments"):
        assert_same(last_state(resumed)[0][part], last_state(settings)[0][part])
    assert any(name.startswith("contexts.") for name in last_state(settings)[0]["moments"])
    ours, other = (weights(tmp_path / name / "model") for name in ("run", "without"))
    assert max((ours[name] - value).abs().max().item() for name, value in other.items()) > 1e-4
    pooled = last_state(settings | {"output_dir": str(tmp_path / "pooled")})[0]["moments"]
    assert not any(name.startswith("contexts.") for name in pooled)  # one context for the model: nothing to tell apart
