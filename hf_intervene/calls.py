"""Calls of a pipeline: which one is running, how many images it makes, and which row of the
denoiser's batch is which image.

A pipeline that is watched (`watch`) says when it is called. A call is known in the context that it
runs in (`contextvars`), so threads and asyncio tasks have calls of their own. Another pipeline on
the same denoiser has no part in it.

The number of images is what `prepare_latents` makes. `scheduler.step` must get as many, or the call
is refused.
"""

import functools
import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline


class Watcher(Protocol):
    """What a watched pipeline tells of its calls."""

    def call(self, arguments: dict[str, Any]) -> AbstractContextManager:
        """What a call of the pipeline runs in; `arguments` are the call's by name."""


class PipelineCall:
    """One call of a pipeline.

    Args:
        watcher: whose call it is.
        pipe: the pipeline.
        arguments: of the call, by name.
        images: how many images it makes, where the user says so; it is not counted then.
    """

    def __init__(
        self,
        watcher: Watcher,
        pipe: DiffusionPipeline,
        arguments: dict[str, Any],
        images: int | None = None,
    ):
        self.watcher, self.pipe, self.arguments = watcher, pipe, arguments
        self.images = images  # once that is known
        self._latents: torch.Tensor | None = None  # what `prepare_latents` made
        self._rows: dict[int, torch.Tensor] = {}
        self._checked = images is not None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, this is the call that runs."""
        token = _RUNNING.set((*_RUNNING.get(), self))
        try:
            yield
        finally:
            _RUNNING.reset(token)

    def prepared(self, latents: Any) -> None:
        """Note what `prepare_latents` returned: the latents, or a tuple that begins with them."""
        found = latents[0] if isinstance(latents, (tuple, list)) else latents
        if self._latents is None and isinstance(found, torch.Tensor) and found.ndim:
            self._latents = found

    def rows(self, sample: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
        """For each row of a denoiser's batch the number of its image, an index (rows,) on the
        device of the batch.

        The first batch of each size is compared with itself, which waits for the device once. Later
        ones are not looked at.

        Args:
            sample: (rows, ...), or a list of as many tensors.

        Raises:
            ValueError: one sentence: rows and images do not fit together.
        """
        count = len(sample)
        if count not in self._rows:
            if self.images is None:
                self.images = self._count(sample)
            self._rows[count] = self._layout(sample, self.images)
        return self._rows[count]

    def _count(self, sample: torch.Tensor | Sequence[torch.Tensor]) -> int:
        if self._latents is not None:
            return len(self._latents)
        # One of the few pipelines without `prepare_latents`.
        count, labels = len(sample), self.arguments.get("class_labels")
        if labels is not None:
            return len(labels) if isinstance(labels, (list, tuple, torch.Tensor)) else 1
        guided = any(
            "guidance" in name for name in inspect.signature(self.pipe.__call__).parameters
        )
        x = torch.stack(list(sample))
        return (
            count // 2
            if guided and count % 2 == 0 and torch.equal(x[: count // 2], x[count // 2 :])
            else count
        )

    def _layout(self, sample: torch.Tensor | Sequence[torch.Tensor], images: int) -> torch.Tensor:
        count = len(sample)
        device = sample[0].device
        index = torch.arange(count, device=device)
        if count % images == 0:
            tiled, repeated = index % images, index // (count // images)
            if count == images or images == 1:
                return tiled
            x = torch.stack(list(sample)) if not isinstance(sample, torch.Tensor) else sample
            # without what was concatenated to them
            if self._latents is not None and x.ndim == self._latents.ndim:
                x = x[(slice(None), *(slice(0, size) for size in self._latents.shape[1:]))]
            if torch.equal(x, x[tiled]):
                return tiled
            if torch.equal(x, x[:: count // images][repeated]):
                return repeated
        raise ValueError(
            f"this {type(self.pipe).__name__} makes {images} images and calls its denoiser with "
            f"{count} rows, and which row is which image cannot be told: call it for one image at "
            "a time, or give the number of images as intervene(..., num_images=)."
        )

    def step(self, sample: torch.Tensor) -> None:
        """Compare what `scheduler.step` gets, (images, ...), with the number of images, once.

        Raises:
            ValueError: one sentence: they differ.
        """
        if self._checked or self.images is None:
            return
        self._checked = True
        # DiT steps with both halves of its guidance
        doubled = self._latents is None and "class_labels" in self.arguments
        if len(sample) not in (self.images, *([2 * self.images] if doubled else [])):
            raise ValueError(
                f"this {type(self.pipe).__name__} seemed to make {self.images} images, but its "
                f"scheduler steps {len(sample)}: give the number as intervene(..., num_images=)."
            )


_RUNNING: ContextVar[tuple[PipelineCall, ...]] = ContextVar("hf_intervene_calls", default=())
_WATCHING = threading.RLock()
_WATCHER, _PLAIN_CLASS = "_call_watcher", "_unwatched_class"  # attributes of a watched pipeline


def running_call(watcher: Watcher) -> PipelineCall | None:
    """The innermost call that runs in this context and is a watcher's."""
    return next((call for call in reversed(_RUNNING.get()) if call.watcher is watcher), None)


def watch(pipe: DiffusionPipeline, watcher: Watcher) -> None:
    """Tell a watcher of each call of a pipeline from now on.

    The pipeline gets a sub-class of its own class, of the same name: `pipe(...)` looks `__call__`
    up in the class, and the class itself belongs to other pipelines too.
    """
    plain: Any = type(pipe)
    pipe.__dict__[_WATCHER], pipe.__dict__[_PLAIN_CLASS] = watcher, plain
    pipe.__class__ = _watched_class(plain)


def unwatch(pipe: DiffusionPipeline) -> None:
    """Undo `watch`."""
    pipe.__class__ = pipe.__dict__.pop(_PLAIN_CLASS)
    del pipe.__dict__[_WATCHER]


@functools.cache
def _watched_class(plain: Any) -> Any:
    @functools.wraps(plain.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        watcher = self.__dict__.get(_WATCHER)
        if watcher is None:  # made by this class, such as with its `from_pipe`
            return plain.__call__(self, *args, **kwargs)
        names = [name for name in inspect.signature(plain.__call__).parameters if name != "self"]
        with watcher.call(dict(zip(names, args)) | kwargs):
            return plain.__call__(self, *args, **kwargs)

    methods: dict[str, Any] = {"__call__": call}
    if prepare := getattr(plain, "prepare_latents", None):

        @functools.wraps(prepare)
        def prepare_latents(self: Any, *args: Any, **kwargs: Any) -> Any:
            made = prepare(self, *args, **kwargs)
            watcher = self.__dict__.get(_WATCHER)
            if watcher is not None and (running := running_call(watcher)) is not None:
                running.prepared(made)
            return made

        methods["prepare_latents"] = prepare_latents
    same = {
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
    }
    return type(plain.__name__, (plain,), methods | same)


class _Step:
    """`step` of a scheduler that tells the calls that run in its context what it gets."""

    def __init__(self, scheduler: Any):
        self.scheduler, self.watchers = scheduler, 1
        functools.update_wrapper(self, type(scheduler).step)
        self.__wrapped__ = scheduler.step  # bound: pipelines look at its signature
        self._names = tuple(inspect.signature(scheduler.step).parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        sample = (dict(zip(self._names, args)) | kwargs).get("sample")
        if isinstance(sample, torch.Tensor):
            for call in _RUNNING.get():
                if getattr(call.pipe, "scheduler", None) is self.scheduler:
                    call.step(sample)
        return type(self.scheduler).step(self.scheduler, *args, **kwargs)

    def __deepcopy__(self, memo: dict) -> "_Step":
        # a copied scheduler steps itself
        return _Step(memo.get(id(self.scheduler), self.scheduler))


def watch_steps(scheduler: Any) -> None:
    """Let a scheduler tell the running calls what it steps; each time is undone by an
    `unwatch_steps`."""
    with _WATCHING:
        found = scheduler.__dict__.get("step")
        if isinstance(found, _Step):
            found.watchers += 1
        elif found is None:  # otherwise somebody has put a `step` of their own there, which stays
            scheduler.__dict__["step"] = _Step(scheduler)


def unwatch_steps(scheduler: Any) -> None:
    """Undo `watch_steps`."""
    with _WATCHING:
        found = scheduler.__dict__.get("step")
        if isinstance(found, _Step):
            found.watchers -= 1
            if not found.watchers:
                del scheduler.__dict__["step"]
