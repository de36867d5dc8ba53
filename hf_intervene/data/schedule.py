"""Context schedules: they draw the samples of each training step (METHOD section 3).

A schedule draws the *global* batch of a step, the same in every process. Each process then trains
on its own slice (`shard`). So the result does not depend on the number of processes. The state of a
schedule is a few counters, which a checkpoint keeps as JSON.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler


SCHEDULES = ("balanced", "single", "proportional")


class ContextSchedule(Sampler[list[int]]):
    r"""An infinite stream of global batches of sample indices.

    Within a context, samples are drawn without replacement and reshuffled after each pass. `kind`
    says how contexts are drawn:

    - `"balanced"`: uniform over contexts, mixed within the batch. Counts in one batch differ by at
      most 1.
    - `"single"`: one context a batch, every context once in each random round (the paper's).
    - `"proportional"`: all samples pooled, each once per pass.

    Iterating yields one epoch of index lists, and the next iteration continues there. So it can be
    the `batch_sampler` of a `DataLoader`. A `DataLoader` with workers draws ahead; to save
    checkpoints, use `next_batch`.

    Args:
        context_ids: context of every sample, (N,) integers from 0.
        kind: one of `SCHEDULES`.
        batch_size: samples of an optimiser step, over all processes.
        seed: seed of the stream.
        num_contexts: number of contexts; `None` means the highest of `context_ids` plus 1. Every
            context must have samples, except with `"proportional"`.

    Raises:
        ValueError: an argument is out of range, or a context has no samples.
    """

    def __init__(
        self,
        context_ids: torch.Tensor,
        kind: str = "balanced",
        batch_size: int = 64,
        seed: int = 0,
        num_contexts: int | None = None,
    ):
        if kind not in SCHEDULES:
            raise ValueError(
                f"unknown context schedule {kind!r}; choose one of {', '.join(SCHEDULES)}."
            )
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}.")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, not {seed}.")
        ids = np.asarray(context_ids)
        if not len(ids):
            raise ValueError("there are no samples to draw batches from.")
        self.kind, self.batch_size, self.seed = kind, batch_size, seed
        counts = np.bincount(ids, minlength=num_contexts or 0)
        if num_contexts is not None and len(counts) > num_contexts:
            raise ValueError(
                f"context_ids go up to {ids.max()}, but there are only {num_contexts} contexts."
            )
        if kind != "proportional" and not counts.all():
            raise ValueError(
                f"every context from 0 to {len(counts) - 1} must have samples; {np.argmin(counts)}"
                " has none."
            )
        pools = 1 if kind == "proportional" else len(counts)
        self._members = (
            [np.flatnonzero(ids == pool) for pool in range(pools)]
            if pools > 1
            else [np.arange(len(ids))]
        )
        self._steps = 0
        # samples drawn so far, of each context
        self._drawn = np.zeros(len(self._members), dtype=np.int64)
        self._permutations: dict[int, tuple[int, np.ndarray]] = {}

    def __len__(self) -> int:
        """Return the number of steps that draw as many samples as there are."""
        return max(1, round(sum(map(len, self._members)) / self.batch_size))

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(len(self)):
            yield self.next_batch().tolist()

    def next_batch(self) -> torch.Tensor:
        """Return the indices of the next global batch, (batch_size,) int64, in random order."""
        rng = self._rng(0, self._steps)
        counts = self._counts(rng)
        indices = np.concatenate(
            [self._draw(context, count) for context, count in enumerate(counts) if count]
        )
        self._steps += 1
        # Shuffled, so that the slice of every process mixes the contexts.
        return torch.from_numpy(rng.permutation(indices))

    def _counts(self, rng: np.random.Generator) -> np.ndarray:
        contexts = len(self._members)
        if self.kind == "single":
            round_number, position = divmod(self._steps, contexts)
            counts = np.zeros(contexts, dtype=np.int64)
            counts[self._rng(1, round_number).permutation(contexts)[position]] = self.batch_size
            return counts
        # Whole shares first, then one more for as many contexts as are left over, drawn by
        # systematic sampling: the expectation is exact and a count is never off its share by more
        # than 1.
        share = np.full(contexts, 1 / contexts) * self.batch_size
        counts = np.floor(share + 1e-9).astype(np.int64)
        left = self.batch_size - counts.sum()
        if left:
            order = rng.permutation(contexts)
            edges = np.cumsum((share - counts).clip(min=0)[order])
            points = (rng.random() + np.arange(left)) * edges[-1] / left
            counts[order[np.searchsorted(edges, points, side="right").clip(max=contexts - 1)]] += 1
        return counts

    def _draw(self, context: int, count: int) -> np.ndarray:
        members, drawn = self._members[context], []
        while count:
            pass_number, position = divmod(int(self._drawn[context]), len(members))
            piece = self._permutation(context, pass_number)[position : position + count]
            drawn.append(members[piece])
            self._drawn[context] += len(piece)
            count -= len(piece)
        return np.concatenate(drawn)

    def _permutation(self, context: int, pass_number: int) -> np.ndarray:
        cached = self._permutations.get(context)
        if cached is None or cached[0] != pass_number:
            order = self._rng(2, context, pass_number).permutation(len(self._members[context]))
            cached = self._permutations[context] = (pass_number, order)
        return cached[1]

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *key])

    def state_dict(self) -> dict:
        """Return the state with which the stream continues: numbers and lists, as JSON has them."""
        state = {
            "kind": self.kind,
            "steps": self._steps,
            "drawn": self._drawn.tolist(),
            "sizes": self._sizes(),
        }
        return state

    def load_state_dict(self, state: dict) -> None:
        """Continue the stream where `state_dict` was called.

        Raises:
            ValueError: the state belongs to another kind of schedule or to other data.
        """
        sizes = state.get("sizes", self._sizes())  # the first checkpoints did not have them
        if (
            state["kind"] != self.kind
            or len(state["drawn"]) != len(self._drawn)
            or sizes != self._sizes()
        ):
            raise ValueError(
                f"the saved schedule is {state['kind']!r} over {sum(sizes)} images in"
                f" {len(state['drawn'])} contexts, this one is {self.kind!r} over"
                f" {sum(self._sizes())} in {len(self._drawn)}, or their shares differ: resume with"
                " the settings and data of the interrupted run."
            )
        self._steps = state["steps"]
        self._drawn = np.array(state["drawn"], dtype=np.int64)

    def _sizes(self) -> list[int]:
        return [len(members) for members in self._members]


def shard(batch: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    """Return the slice of a global batch that process `rank` of `world` trains on.

    The slices of all processes, in order, are the batch.

    Raises:
        ValueError: the number of processes does not divide the batch.
    """
    if len(batch) % world:
        raise ValueError(
            f"a batch of {len(batch)} does not divide over {world} processes: choose a multiple of"
            f" {world}."
        )
    size = len(batch) // world
    return batch[rank * size : (rank + 1) * size]
