"""Context schedules: the samples of a step, in every process, before and after a resume."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_intervene.data import ContextSchedule, shard
from hf_intervene.data.schedule import SCHEDULES


sizes = st.lists(st.integers(1, 12), min_size=1, max_size=6)


def ids(counts):
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


@given(sizes, st.integers(1, 20), st.sampled_from(SCHEDULES), st.integers(0, 5))
@settings(deadline=None)
def test_every_pass_over_a_context_sees_each_image_once(counts, batch_size, kind, seed):
    schedule = ContextSchedule(ids(counts), kind, batch_size, seed)
    drawn = torch.cat([schedule.next_batch() for _ in range(30)])
    assert len(drawn) == 30 * batch_size
    pools = (
        [range(sum(counts))]
        if kind == "proportional"
        else np.split(np.arange(sum(counts)), np.cumsum(counts)[:-1])
    )
    for pool in pools:
        seen = np.bincount(drawn.numpy(), minlength=sum(counts))[list(pool)]
        assert seen.max() - seen.min() <= 1, (
            "an image came again before all others of its context had come"
        )


@given(st.integers(1, 6), st.integers(1, 20))
@settings(deadline=None, max_examples=40)
def test_balanced_counts(contexts, batch_size):
    context_ids = ids([50] * contexts)
    schedule = ContextSchedule(context_ids, "balanced", batch_size)
    counts = np.stack(
        [np.bincount(context_ids[schedule.next_batch()], minlength=contexts) for _ in range(200)]
    )
    assert (counts.max(1) - counts.min(1)).max() <= 1
    np.testing.assert_allclose(counts.mean(0), batch_size / contexts, atol=0.15)


def test_single_draws_every_context_once_a_round():
    context_ids = ids([5, 9, 4])
    schedule = ContextSchedule(context_ids, "single", 6)
    contexts = [set(context_ids[schedule.next_batch()].tolist()) for _ in range(30)]
    assert all(len(c) == 1 for c in contexts)
    rounds = [set.union(*contexts[k : k + 3]) for k in range(0, 30, 3)]
    assert (
        all(r == {0, 1, 2} for r in rounds)
        and len({tuple(map(tuple, contexts[k : k + 3])) for k in range(0, 30, 3)}) > 1
    )


def test_adaptive_follows_the_excess_and_starves_none():
    context_ids = ids([40, 40, 40])
    schedule = ContextSchedule(context_ids, "adaptive", 12)
    np.testing.assert_allclose(schedule.probabilities(), 1 / 3)
    base = torch.tensor([1.0, 50.0, 5.0])  # losses that differ for good: no reason to prefer any
    for _ in range(50):
        batch = context_ids[schedule.next_batch()]
        schedule.update(batch, base[batch])
    np.testing.assert_allclose(schedule.probabilities(), 1 / 3)
    # Context 2 gets worse by 3. The docstring, written out: its running loss above the lowest, in
    # units of its noise.
    running, noise = 5.0, 0.0
    for _ in range(5):
        batch = context_ids[schedule.next_batch()]
        schedule.update(batch, base[batch] + torch.tensor([0.0, 0.0, 3.0])[batch])
        running, noise = running + 0.05 * (8 - running), 0.95 * noise + 0.05 * (8 - running) ** 2
    weight = 1 + (running - 5) / noise**0.5
    probabilities = schedule.probabilities()
    np.testing.assert_allclose(
        probabilities, 1 / 6 + np.array([1, 1, weight]) / (weight + 2) / 2, rtol=1e-6
    )
    assert probabilities[2] > 0.35
    counts = np.bincount(
        context_ids[torch.cat([schedule.next_batch() for _ in range(30)])], minlength=3
    )
    np.testing.assert_allclose(counts, probabilities * 360, atol=6)


def test_adaptive_does_not_follow_noise():
    """One context's loss is a hundred times as noisy as the others', and none has anything to
    regain.
    """
    context_ids, rng = ids([40, 40, 40]), np.random.default_rng(0)
    schedule, preferred = ContextSchedule(context_ids, "adaptive", 12), []
    for _ in range(600):
        batch = context_ids[schedule.next_batch()]
        schedule.update(batch, torch.from_numpy(rng.normal(20, np.array([0.1, 10.0, 0.1]))[batch]))
        preferred.append(schedule.probabilities()[1])
    assert abs(np.mean(preferred[100:]) - 1 / 3) < 0.04


@given(sizes, st.integers(1, 9), st.sampled_from(SCHEDULES), st.integers(0, 12))
@settings(deadline=None)
def test_the_stream_continues_where_the_state_was_taken(counts, batch_size, kind, steps):
    def run(schedule, n):
        batches = []
        for _ in range(n):
            batches.append(schedule.next_batch())
            schedule.update(ids(counts)[batches[-1]], batches[-1].float() % 7)
        return batches

    whole = ContextSchedule(ids(counts), kind, batch_size, seed=1)
    run(whole, steps)
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = ContextSchedule(ids(counts), kind, batch_size, seed=1)
    resumed.load_state_dict(state)
    for a, b in zip(run(whole, 10), run(resumed, 10)):
        assert torch.equal(a, b)


def test_shards_make_up_the_batch():
    batch = torch.randperm(12)
    for world in (1, 2, 3):
        assert torch.equal(torch.cat([shard(batch, rank, world) for rank in range(world)]), batch)
    with pytest.raises(ValueError, match="does not divide over 5 processes"):
        shard(batch, 0, 5)


def test_losses_that_are_not_finite_are_no_news():
    schedule = ContextSchedule(ids([4, 4]), "adaptive", 4)
    schedule.update(torch.tensor([0, 1]), torch.tensor([1.0, 1.0]))
    schedule.update(torch.tensor([0, 1]), torch.tensor([float("nan"), float("inf")]))
    np.testing.assert_allclose(schedule.probabilities(), 0.5)


def test_bad_arguments():
    for arguments, message in (
        ((ids([3]), "round-robin"), "unknown context schedule"),
        ((ids([3]), "balanced", 0), "at least 1"),
        ((torch.tensor([], dtype=torch.long),), "no samples"),
        ((torch.tensor([0, 2]),), "must have samples"),
    ):
        with pytest.raises(ValueError, match=message):
            ContextSchedule(*arguments)
    schedule = ContextSchedule(ids([3, 3]), "balanced", 2)
    with pytest.raises(ValueError, match="settings and data of the interrupted run"):
        schedule.load_state_dict(ContextSchedule(ids([3, 3, 3]), "balanced", 2).state_dict())
