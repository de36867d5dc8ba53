"""Heads on a pipeline: which there are, under what they act, and the hooks on its denoisers.

    pipeline call -> HeadsCall (around.py) -> a Run of each head that acts: z, and what enters
    denoiser call -> before: rows of each Run enter (Injection) -> after: guidance, further calls

State belongs to a pipeline, to a head on it and to a call. Nothing of it is kept on the denoiser
but hooks.
"""

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .around import Around, HeadsCall, HeadsThread
from .attached import Attached
from .calls import unwatch, unwatch_steps, watch, watch_steps
from .contexts import shown
from .requested import Requested


_NAMES = re.compile(r"(^|_)(unet|transformer)(_\d+)?$")
_HOOKING = threading.RLock()  # hooks come and go in one thread at a time


def denoisers(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """The denoisers of a pipeline as it calls them, compiled or not, by the names of its
    components; the main one first.

    Raises:
        TypeError: one sentence: it has none.
    """
    found = {
        name: part
        for name, part in vars(pipe).items()
        if _NAMES.search(name) and isinstance(inner(part), ModelMixin)
    }
    if not found:
        raise TypeError(
            f"a {type(pipe).__name__} has no denoiser (unet or transformer): a head cannot be "
            "attached to it."
        )
    return dict(sorted(found.items(), key=lambda item: item[0] not in ("unet", "transformer")))


def inner(part: Any) -> Any:
    """A model without the compiled code around it."""
    return getattr(part, "_orig_mod", part)


class Heads:
    """The heads on a pipeline, and the hooks around its denoisers that let them act.

    Args:
        pipe: the pipeline.
    """

    def __init__(self, pipe: DiffusionPipeline):
        self.pipe = pipe
        self.attached: dict[str, Attached] = {}
        self.thread = HeadsThread()
        self._around: dict[str, Around] = {}
        self._scheduler: Any = None

    def add(self, name: str, attached: Attached) -> None:
        """Put a head on the pipeline; where it does not fit, nothing is changed.

        Raises:
            ValueError, TypeError: one sentence: see `Attached.check`.
        """
        for number, denoiser in enumerate(denoisers(self.pipe).values()):
            attached.check(inner(denoiser), number == 0)
        if not self.attached:
            watch(self.pipe, self)
        self.attached[name] = attached
        self.hook()

    def drop(self, name: str) -> None:
        """Take a head off; with the last one all hooks go."""
        attached = self.attached.pop(name)
        with _HOOKING:
            for part in tuple(attached.injections):
                attached.remove(part)
            for around in self._around.values():
                _forget_compiled(around.module)
            if not self.attached:
                unwatch(self.pipe)
                for part in tuple(self._around):
                    self._around.pop(part).remove()
                self._watch_scheduler(None)

    def named(self, name: str | None) -> tuple[str, Attached]:
        """A head and its name; `None`: the only one.

        Raises:
            ValueError: one sentence: there is none of that name, or several.
        """
        if name is None and len(self.attached) == 1:
            return next(iter(self.attached.items()))
        if not isinstance(name, str) or name not in self.attached:
            known = ", ".join(map(repr, self.attached))
            which = "give head=" if name is None else f"there is no head {shown(name)}"
            raise ValueError(f"{which}: the heads on this pipeline are {known}.")
        return name, self.attached[name]

    def hook(self) -> None:
        """Put all hooks where they belong.

        The denoiser may be another one than before, LoRA exchanges modules, and compilation puts
        one around the denoiser.

        Raises:
            ValueError, TypeError: one sentence: a head does not fit a denoiser that has taken the
                place of another one.
        """
        with _HOOKING:
            found = denoisers(self.pipe)
            for name in self._around.keys() - found.keys():
                self._around.pop(name).remove()
                for attached in self.attached.values():
                    attached.remove(name)
            for number, (name, outermost) in enumerate(found.items()):
                changed = [
                    a.install(name, inner(outermost), number == 0) for a in self.attached.values()
                ]
                around = self._around.get(name)
                if around is None or not around.is_on(outermost):
                    if around is not None:
                        around.remove()
                    self._around[name] = Around(self, name, outermost)
                    changed.append(True)
                if any(changed):
                    _forget_compiled(outermost)
            self._watch_scheduler(getattr(self.pipe, "scheduler", None))

    def _watch_scheduler(self, scheduler: Any) -> None:
        if scheduler is not self._scheduler:
            for change, which in ((unwatch_steps, self._scheduler), (watch_steps, scheduler)):
                if which is not None:
                    change(which)
            self._scheduler = scheduler

    @contextmanager
    def call(self, arguments: Mapping[str, Any]) -> Iterator[None]:
        """What a call of the pipeline runs in (see `calls.watch`)."""
        if self.thread.pending:
            self.thread.pending = False
            raise ValueError(
                "intervene(pipe, ...) does nothing by itself: call the pipeline inside "
                "`with intervene(pipe, ...):`."
            )
        active = active_on(self)
        if not active:
            yield
            return
        for attached in active:
            attached.check_scheduler(self.pipe)
        self.hook()
        if any(a.further_calls for a in active.values()):
            for name, around in self._around.items():
                if getattr(inner(around.module), "is_cache_enabled", False):
                    raise ValueError(
                        f"guidance and composed scores call the {name} more than once in a step, "
                        "which its cache takes for steps: call disable_cache() of it first."
                    )
        running = HeadsCall(self, dict(arguments), active)
        try:
            with running.running():
                yield
        finally:
            for attached in active:
                for injection in attached.injections.values():
                    injection.clear()


_ACTIVE: ContextVar[tuple[Requested, ...]] = ContextVar("hf_intervene_active", default=())


def active_on(heads: Heads) -> dict[Attached, Requested]:
    """Under what each head of a pipeline acts in this context: the innermost `with` of that
    head."""
    return {
        asked.attached: asked
        for asked in _ACTIVE.get()
        if asked.heads is heads and heads.attached.get(asked.name) is asked.attached
    }


def activate(asked: Requested) -> None:
    """Let a request act in this context from now on."""
    _ACTIVE.set((*_ACTIVE.get(), asked))


def deactivate(asked: Requested) -> None:
    """Undo `activate`. Contexts are left in any order: this one alone goes, the last of it if
    entered twice."""
    active = list(_ACTIVE.get())
    if asked in active:
        del active[len(active) - 1 - active[::-1].index(asked)]
        _ACTIVE.set(tuple(active))


def _forget_compiled(outermost: nn.Module) -> None:
    # Compiled code does not notice hooks that come and go, around the denoiser or its blocks.
    modules = inner(outermost).modules()
    if inner(outermost) is not outermost or any(m._compiled_call_impl is not None for m in modules):
        torch.compiler.reset()
