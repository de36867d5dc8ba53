"""One head on a pipeline: where it enters, and what it makes enter in one call of the pipeline."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from .bases.adapter import DiffusionAdapter, check_sites
from .bases.injection import Entries, Injection
from .bases.lora_layers import LoraLayers
from .bases.schedulers import check_prediction
from .bases.sites import find_sites
from .modeling_intervention import InterventionHead
from .requested import Requested
from .sampling_arguments import check_generator
from .values import Values


_EVALUATING = threading.RLock()  # modes are changed and put back in one thread at a time


class Attached:
    """One head on a pipeline.

    Args:
        head, adapter: the head and what leads its embedding into the denoiser.
        weight: factor of what enters.
        lora: LoRA layers that were trained with the head, for the main denoiser.
    """

    def __init__(
        self,
        head: InterventionHead,
        adapter: DiffusionAdapter,
        weight: float,
        lora: LoraLayers | None,
    ):
        self.head, self.adapter, self.weight, self.lora = head, adapter, weight, lora
        self.injections: dict[str, Injection] = {}  # by the name of the denoiser
        self.verified: set[str] = set()  # the names of those whose sites were seen to work

    def check(self, denoiser: nn.Module, is_main: bool) -> None:
        """Raise a ValueError or TypeError unless the head fits a denoiser."""
        check_sites(find_sites(denoiser), self.adapter, type(denoiser).__name__)
        if self.lora is not None and is_main:
            self.lora.check_fit(denoiser, "the LoRA of this head")

    def check_scheduler(self, pipe: DiffusionPipeline) -> None:
        """Raise a ValueError or TypeError unless the scheduler of a pipeline is for the prediction
        that the head was trained with."""
        scheduler = getattr(pipe, "scheduler", None)
        if scheduler is None:
            raise TypeError(
                f"a {type(pipe).__name__} has no scheduler: a head cannot be attached to it."
            )
        check_prediction(scheduler, self.adapter.config.prediction_type, "this head")

    def install(self, name: str, denoiser: nn.Module, is_main: bool) -> bool:
        """Put this head's hooks on a denoiser, in place of those on one of the same name before it;
        whether any changed."""
        injection = self.injections.get(name)
        if injection is None or injection.denoiser is not denoiser:
            self.check(denoiser, is_main)
            self.remove(name)
            injection = self.injections[name] = Injection(denoiser, self.lora if is_main else None)
        return injection.install()

    def remove(self, name: str) -> None:
        """Take this head's hooks off the denoiser of a name."""
        if (injection := self.injections.pop(name, None)) is not None:
            injection.clear()
            injection.remove()
        self.verified.discard(name)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, head and adapter are in evaluation mode; afterwards each part of them is in the
        mode that it was in."""
        with _EVALUATING:
            training = [
                module
                for part in (self.head, self.adapter)
                for module in part.modules()
                if module.training
            ]
            for module in training:
                module.training = False
            try:
                yield
            finally:
                for module in training:
                    module.training = True


class Run:
    """What one head does in one call of the pipeline.

    Args:
        attached: the head.
        active: what is asked of it.
        images: how many the call makes.
        device: of the denoiser's batch.

    Raises:
        ValueError: one sentence: interventions, noise or generators for another number of images.
    """

    def __init__(self, attached: Attached, active: Requested, images: int, device: torch.device):
        self.attached = attached
        for what, count, remedy in (
            ("interventions are", active.contexts, "give one context for all, or one each."),
            ("noise is", active.noise_rows, "give one row for each image."),
        ):
            if count not in (None, images):
                raise ValueError(
                    f"the {what} for {count} image{'' if count == 1 else 's'}, but this call makes "
                    f"{images}: {remedy}"
                )
        check_generator(active.generator, images)
        config = attached.head.config
        shape = (images, config.num_blocks, config.noise_width)
        with attached.evaluating():
            parts: list[nn.Module | None] = [attached.head, attached.adapter, attached.lora]
            for part in parts:
                if part is not None:
                    part.to(device)
            z = active.noise
            if z is None:
                z = randn_tensor(shape, active.generator, device, torch.float32)
            z = z.to(device)
            targets = active.targets.to(device).expand(images, -1)
            values = None
            if active.values is not None:
                values = Values(
                    *(part.to(device).expand(images, *part.shape[1:]) for part in active.values)
                )
            # The prediction is p + sum of w (p_other - p) over `others`, where p is that of `main`.
            main, others = active.passes(targets, values)
            self._main = self._entries(z, *main)
            self._others = [(self._entries(z, *other), w) for other, w in others]
        self._picked: dict[int, tuple[Entries, list[tuple[Entries, float]]]] = {}

    @torch.no_grad()
    def _entries(self, z: torch.Tensor, targets: torch.Tensor, values: Values | None) -> Entries:
        adapter = self.attached.adapter
        embedding = self.attached.head(z, targets, *(values or ())).embedding.to(adapter.dtype)
        return adapter.entries(embedding).weighted(self.attached.weight)

    def entries(self, rows: torch.Tensor) -> tuple[Entries, list[tuple[Entries, float]]]:
        """What enters in a batch whose rows are of these images, and what in the further calls of
        guidance, with weights."""
        if len(rows) not in self._picked:
            others = [(entries.rows(rows), weight) for entries, weight in self._others]
            self._picked[len(rows)] = self._main.rows(rows), others
        return self._picked[len(rows)]
