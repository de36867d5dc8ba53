"""The study of identifiability with the head itself: blocks and contexts belong together, the
untrained model is what it says, and jobs of another recipe are refused.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_intervene.metrics.recovery_data import simulate
from hf_intervene.training.studies import head_identifiability as study


TINY = study.Recipe(steps=6, batch_size=32, hidden_width=16)


def test_blocks_are_read_in_the_order_of_the_concepts():
    """A head that knows the truth, each concept in the block of its context."""
    simulation, places = simulate(d=4, seed=1), np.array([2, 0, 3, 1])
    x, e = simulation.sample(0, 300, 5)
    c = e @ simulation.concepts.reshape(4, -1).T
    known = {row.tobytes(): values for row, values in zip(x.astype(np.float32), c)}

    def posterior(features, targets):
        rows = [known[row.numpy().tobytes()] for row in features]
        mean = torch.zeros(len(rows), 6, 1)
        mean[:, places, 0] = torch.tensor(np.array(rows)).float()
        return mean, mean

    model = SimpleNamespace(
        base=SimpleNamespace(encode=lambda x: SimpleNamespace(features=x.flatten(1))),
        head=SimpleNamespace(posterior=posterior),
        num_blocks=6,
    )
    recovery = study.HeadRecovery(model, np.zeros(x.shape[1]), np.ones(x.shape[1]), places)
    np.testing.assert_allclose(recovery.encode(x)[:, :, 0], c, atol=1e-5)


@pytest.mark.parametrize("broken", [None, "missing"])
def test_every_context_is_that_of_its_block(monkeypatch, broken):
    seen = {}

    def train(model, contexts, recipe, seed):
        seen["contexts"] = contexts

    monkeypatch.setattr(study, "train", train)
    monkeypatch.setattr(
        study,
        "scores",
        lambda simulation, recovery: (
            seen.update(order=recovery.order)
            or {"mcc": 0.0, "own_block": 0.0, "correlations": [0.0] * 4}
        ),
    )
    study.solve(samples=20, recipe=TINY, d=4, seed=3, broken=broken)
    simulation = simulate(d=4, seed=3, broken=broken)
    drawn = [simulation.sample(k, 20, 3)[0] for k in range(5)]
    center, spread = np.concatenate(drawn).mean(0), np.concatenate(drawn).std(0)
    for k in range(4):
        found = seen["contexts"][1 + seen["order"][k]]
        if broken is not None and k == simulation.affected:
            assert found is None
            continue
        expected = (drawn[k + 1] - center) / spread
        np.testing.assert_allclose(found[:, 0, 0].numpy(), expected, atol=1e-5)


def test_a_step_of_training_changes_head_and_base():
    torch.manual_seed(0)
    model = study.build(8, 2, 2, 1, TINY)
    before = {name: x.clone() for name, x in model.named_parameters()}
    g = torch.Generator().manual_seed(0)
    contexts = [torch.randn(40, 1, 1, 8, generator=g) for _ in range(3)]
    study.train(model, contexts, TINY, seed=0)
    changed = {name for name, x in model.named_parameters() if not torch.equal(x, before[name])}
    assert {"base.model.log_variance", "head.flow.last.bias", "head.intervention.weight"} <= changed
    assert sorted(model.head.intervention.order.tolist()) == [0, 1]


def test_a_job_is_done_once_and_not_mixed(tmp_path, monkeypatch):
    scores = {"mcc": 0.5, "correlations": [1.0], "affected": 1.0}
    scores |= dict.fromkeys(study.MEASURES, 0.5)
    calls = []
    monkeypatch.setattr(study, "solve", lambda **told: calls.append(told) or dict(scores))
    name = "3 concepts"
    first = study.run_job(name, 0, tmp_path, TINY)
    assert study.run_job(name, 0, tmp_path, TINY) == first and len(calls) == 1
    assert calls[0]["d"] == 3 and first["told"]["recipe"]["steps"] == 6
    with pytest.raises(ValueError, match="another recipe"):
        study.run_job(name, 0, tmp_path, study.Recipe(steps=7))
    text = study.table({name: [first, first]})
    assert "| 3 concepts | 0.500 ± 0.000 |" in text and "untrained_mcc" in text


@pytest.mark.slow
def test_the_head_finds_concepts_and_an_untrained_one_does_not():
    found = study.solve(seed=0, recipe=study.Recipe(steps=3000))
    assert found["mcc"] > found["untrained_mcc"] + 0.15
    assert found["own_block"] > found["other_block"]
    assert json.dumps(found)
