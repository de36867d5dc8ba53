"""The way of a batch to the device: which images, their pixels, their noise.

    schedule --indices--> uint8 rows of the images --pinned copy--> device --/ 255--> pixel_values

No Python runs per sample, and nothing waits for the device. Images that fit into the device's
memory are put there once. Where they come from the host's memory or from a file, the next batch is
fetched while the device works on this one."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator, PartialState

from ..data import ContextImages, ContextSchedule, shard
from ..objective import Objective
from .prepared import PreparedImages
from .settings import TrainArguments
from .validation import step_generator, to_unit


RESIDENT_SHARE = 0.5  # of the device's free memory that images may take


@dataclass
class Batch:
    """
    Args:
        indices: images of the global batch, int64 (B,), on the host.
        ids: context of each of them, int64 (B,), on the device.
        targets: (B, D), on the device.
        parts: slices of the global batch, one for each micro-batch of this process.
        inputs: for each of them the images and the noise, as arguments of the model's `forward`.
    """

    indices: torch.Tensor
    ids: torch.Tensor
    targets: torch.Tensor
    parts: list[slice]
    inputs: Iterator[dict]


def resident(size: int, device: torch.device) -> bool:
    """Whether images of so many bytes are to be kept on a device: those on the host are there
    already.
    """
    if device.type != "cuda":
        return False
    return size <= RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]


def kept_at_hand(
    data: ContextImages, validation: ContextImages, device: torch.device
) -> tuple[ContextImages, ContextImages]:
    """Training and validation images, on the device if it has room for them."""
    together = validation.stored is data.stored
    if not resident(data.stored.nbytes + (0 if together else validation.stored.nbytes), device):
        return data, validation
    data = data.on(device)
    if together:  # the images are in memory now
        validation = replace(validation, stored=data.stored, mapped=False, file=None)
    return data, validation.on(device)


class Feed:
    """The batches of a run, one after the other.

    Args:
        objective: whose random numbers are drawn.
        data: the training images.
        prepared: what a denoiser's frozen parts made of them, if there is one.
        schedule: which of them a step trains on.
        arguments: the settings.
        accelerator: its processes share every batch.
    """

    def __init__(
        self,
        objective: Objective,
        data: ContextImages,
        prepared: PreparedImages | None,
        schedule: ContextSchedule,
        arguments: TrainArguments,
        accelerator: Accelerator | PartialState,
    ):
        self.objective, self.data, self.prepared, self.schedule = (
            objective,
            data,
            prepared,
            schedule,
        )
        self.seed, self.batch_size = arguments.optimization.seed, arguments.optimization.batch_size
        self.accumulation, self.prompt_dropout = (
            arguments.optimization.gradient_accumulation_steps,
            arguments.base.prompt_dropout,
        )
        self.rank, self.world, self.device = (
            accelerator.process_index,
            accelerator.num_processes,
            accelerator.device,
        )
        self.micro_batch = self.batch_size // self.world // self.accumulation  # images
        self.targets = data.targets(objective.model.config.free_blocks).to(
            self.device
        )  # (contexts, D)
        self.pins = self.device.type == "cuda"
        self.at_hand = (
            prepared is None and not data.mapped and data.stored.device.type == self.device.type
        )
        # With the images in the memory of the device there is nothing to fetch ahead.
        self.pool = None if self.at_hand else ThreadPoolExecutor(1)
        self._ahead: tuple[int, Future] | None = None
        self._state: dict | None = None  # of the schedule, before it drew ahead

    def batch(self, step: int) -> Batch:
        """The batch of a step; steps come in order."""
        if self._ahead is not None and self._ahead[0] == step:
            host = self._ahead[1].result()
        else:
            host = self._fetch(step, self.schedule.next_batch())
        self._ahead = self._state = None
        if self.pool is not None:
            self._state = self.schedule.state_dict()
            self._ahead = (
                step + 1,
                self.pool.submit(self._fetch, step + 1, self.schedule.next_batch()),
            )
        indices = host.pop("indices")
        ids = host.pop("ids").to(self.device, non_blocking=True)
        # Numbers of prompts stay on the host, which looks the prompts up.
        own = {
            name: value if name == "prepared.prompts" else value.to(self.device, non_blocking=True)
            for name, value in host.items()
        }
        size, first = self.micro_batch, self.rank * self.micro_batch * self.accumulation
        parts = [
            slice(start, start + size)
            for start in range(first, first + size * self.accumulation, size)
        ]
        return Batch(
            indices,
            ids,
            self.targets[ids],
            parts,
            (self._inputs(own, n) for n in range(self.accumulation)),
        )

    def _fetch(self, step: int, indices: torch.Tensor) -> dict[str, torch.Tensor]:
        """What of a batch is on the host, of this process's samples; the contexts of all."""
        rows = shard(indices, self.rank, self.world)
        generator = step_generator(self.seed, step)
        draws = self.objective.draws(self.batch_size, generator)
        host = {"indices": indices, "ids": self.data.context_ids[indices]}
        host |= {name: shard(value, self.rank, self.world) for name, value in draws.items()}
        if self.prepared is not None:
            prepared = self.prepared[rows]
            if "prompts" in prepared and self.prompt_dropout:
                kept = (
                    shard(torch.rand(self.batch_size, generator=generator), self.rank, self.world)
                    >= self.prompt_dropout
                )
                # the one that the pipeline was recorded with
                prepared["prompts"] = prepared["prompts"].where(kept, -1)
            host |= {f"prepared.{name}": value for name, value in prepared.items()}
        elif self.at_hand:
            host["rows"] = rows
        else:
            host["images"] = self.data.images(rows)
        return {name: value.pin_memory() for name, value in host.items()} if self.pins else host

    def _inputs(self, own: dict[str, torch.Tensor], number: int) -> dict:
        part = {name: value.chunk(self.accumulation)[number] for name, value in own.items()}
        if self.prepared is not None:
            return {"pixel_values": None, "prepared": _taken(part, "prepared.")} | part
        images = self.data.images(part.pop("rows")) if "rows" in part else part.pop("images")
        return {"pixel_values": to_unit(images)} | part

    def state_dict(self) -> dict:
        """All that is needed to go on, JSON as it is."""
        return {"schedule": self._state or self.schedule.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: the state is of another kind of schedule or of other data, or corrupt.
        """
        self.schedule.load_state_dict(state["schedule"])

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)


def _taken(values: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Those whose names begin so, without it, taken out."""
    return {
        name.removeprefix(prefix): values.pop(name)
        for name in list(values)
        if name.startswith(prefix)
    }
