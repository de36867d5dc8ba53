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


@given(sizes, st.integers(1, 9), st.sampled_from(SCHEDULES), st.integers(0, 12))
@settings(deadline=None)
def test_the_stream_continues_where_the_state_was_taken(counts, batch_size, kind, steps):
    def run(schedule, n):
        return [schedule.next_batch() for _ in range(n)]

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
