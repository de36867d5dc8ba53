"""Heads at work on a pipeline: hooks on its denoisers, what enters in each call of one, and
guidance on what comes out.

    pipeline call -> PipelineCall (calls.py) -> a Run of each head that acts: z, and what enters
    denoiser call -> before: rows of each Run enter (Injection) -> after: guidance, further calls

State belongs to a pipeline, to a head on it and to a call. Nothing of it is kept on the denoiser
but hooks.
"""

import copy
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .attached import Attached, Run
from .bases.injection import Injection, PerThread
from .bases.sites import check_moves
from .calls import PipelineCall, running_call, unwatch, unwatch_steps, watch, watch_steps


if TYPE_CHECKING:
    from .attaching import intervene


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
        self.thread = _Thread()
        self._around: dict[str, _Around] = {}
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
        if name not in self.attached:
            known = ", ".join(map(repr, self.attached))
            raise ValueError(
                f"{'give head=: ' if name is None else f'there is no head {name!r}: '}the heads on "
                f"this pipeline are {known}."
            )
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
                    self._around[name] = _Around(self, name, outermost)
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
        from .attaching import active_on

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


class HeadsCall(PipelineCall):
    """A call of the pipeline in which heads act.

    Args:
        heads: on the pipeline.
        arguments: of the call, by name.
        active: under what each head acts.
    """

    def __init__(
        self, heads: Heads, arguments: dict[str, Any], active: Mapping[Attached, "intervene"]
    ):
        told = [a.num_images for a in active.values() if a.num_images is not None]
        super().__init__(heads, heads.pipe, arguments, told[0] if told else None)
        self.active = active
        self._runs: list[Run] | None = None

    def runs(self, device: torch.device) -> "list[Run]":
        """A run of each head, all begun where the first batch is known."""
        assert self.images is not None
        if self._runs is None:
            self._runs = [
                Run(attached, active, self.images, device)
                for attached, active in self.active.items()
            ]
            for active in self.active.values():
                active.acted = True
        return self._runs


class _Thread(PerThread):
    def __init__(self) -> None:
        self.pending = False  # whether this thread has made an `intervene` and not entered it
        self.inside = False  # whether its call of the denoiser is one that a head makes itself


class _Around:
    """What happens around each call of a denoiser of a pipeline: `before` and `after` it.

    They are hooks. A module that was compiled in place (`module.compile()`) would compile its own
    hooks too. There they are put around the compiled call.

    Args:
        heads: on the pipeline.
        name: of the denoiser.
        module: the denoiser as the pipeline calls it.
    """

    def __init__(self, heads: Heads, name: str, module: nn.Module):
        self.heads: Heads | None = heads
        self.name, self.module = name, module
        self._handles: list = []
        self._compiled: _CompiledCall | None = None
        compiled: Any = module._compiled_call_impl
        if compiled is not None:
            self._compiled = module._compiled_call_impl = _CompiledCall(self, compiled)
            return
        self._handles = [
            module.register_forward_pre_hook(self.before, with_kwargs=True),
            module.register_forward_hook(self.after, with_kwargs=True),
        ]

    def is_on(self, module: nn.Module) -> bool:
        """Whether this is where it belongs for a module: it may be another one, or compiled."""
        calls = _compiled_calls(self.module)
        return module is self.module and (self._compiled in calls if calls else bool(self._handles))

    def remove(self) -> None:
        """Leave the denoiser as it was."""
        for handle in self._handles:
            handle.remove()
        mine = self._compiled
        calls = _compiled_calls(self.module) if mine is not None else []
        for outer, call in zip([None, *calls], calls):
            if mine is not None and call is mine:
                if outer is None:
                    self.module._compiled_call_impl = mine.inner
                else:
                    outer.inner = mine.inner

    def __deepcopy__(self, memo: dict) -> "_Around":
        # A denoiser that is copied alone belongs to no pipeline: the hooks on the copy do nothing.
        copied = memo[id(self)] = object.__new__(_Around)
        with_pipe = self.heads is not None and id(self.heads.pipe) in memo
        copied.heads = copy.deepcopy(self.heads, memo) if with_pipe else None
        copied.name, copied.module = self.name, copy.deepcopy(self.module, memo)
        copied._handles, copied._compiled = copy.deepcopy(self._handles, memo), None
        return copied

    def _running(self) -> HeadsCall | None:
        if self.heads is None or self.heads.thread.inside:
            return None
        found = running_call(self.heads)
        return found if isinstance(found, HeadsCall) else None

    @torch.compiler.disable
    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if (call := self._running()) is None:
            return
        sample = _sample(module, args, kwargs)
        rows = call.rows(sample)
        for run, injection in self._acting(call, sample):
            injection.set(run.entries(rows)[0])

    @torch.compiler.disable
    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if (call := self._running()) is None or self.heads is None:
            return output
        sample = _sample(module, args, kwargs)
        rows, acting = call.rows(sample), self._acting(call, sample)

        def predict() -> Any:
            return _prediction(module(*args, **kwargs))

        self.heads.thread.inside = True
        try:
            for run, injection in acting:
                self._verify(run.attached, injection, predict)
            predicted = found = _prediction(output)
            for run, injection in acting:
                main, others = run.entries(rows)
                for entries, weight in others:
                    injection.set(entries)
                    found = _led(found, predicted, predict(), weight, sample)
                injection.set(main)
        finally:
            self.heads.thread.inside = False
            for _, injection in acting:
                injection.clear()
        return output if found is predicted else _with_prediction(output, found)

    def _acting(self, call: HeadsCall, sample: Any) -> list[tuple[Run, Injection]]:
        """What acts on this denoiser; a head may have been detached since the call began."""
        found = [
            (run, run.attached.injections.get(self.name)) for run in call.runs(sample[0].device)
        ]
        return [(run, injection) for run, injection in found if injection is not None]

    def _verify(self, attached: Attached, injection: Injection, predict: Callable[[], Any]) -> None:
        """Once for each head and denoiser: what enters must move the prediction."""
        cached = getattr(injection.denoiser, "is_cache_enabled", False)  # further calls count there
        if self.name not in attached.verified and not cached:
            check_moves(injection.denoiser, injection.sites, predict)
            attached.verified.add(self.name)


class _CompiledCall:
    """The call of a module that was compiled in place, with what happens around it.

    Args:
        around: what happens.
        inner: the compiled call, or another one of these around it.
    """

    def __init__(self, around: _Around, inner: Any):
        self.around, self.inner = around, inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.around.before(self.around.module, args, kwargs)
        output = self.inner(*args, **kwargs)
        return self.around.after(self.around.module, args, kwargs, output)


def _compiled_calls(module: nn.Module) -> list[Any]:
    """What is called of a module that was compiled in place, from the outside; else nothing."""
    found, call = [], module._compiled_call_impl
    while call is not None:
        found.append(call)
        call = call.inner if isinstance(call, _CompiledCall) else None
    return found


def _sample(module: nn.Module, args: tuple, kwargs: dict) -> Any:
    """The noisy batch of a denoiser's call, a tensor or a list of tensors: its first argument,
    whatever it is called."""
    if args:
        return args[0]
    name = next(
        (name for name in ("hidden_states", "sample", "x") if name in kwargs), next(iter(kwargs))
    )
    return kwargs[name]


def _prediction(output: Any) -> Any:
    """The prediction in what a denoiser returns: a tensor, or a list of tensors where it takes a
    list."""
    return output if isinstance(output, torch.Tensor) else output[0]


def _with_prediction(output: Any, predicted: Any) -> Any:
    """What a denoiser returns, with another prediction."""
    if isinstance(output, torch.Tensor):
        return predicted
    if isinstance(output, (tuple, list)):
        return type(output)([predicted, *output[1:]])
    values = dict(output.items())
    return type(output)(**values | {next(iter(values)): predicted})


def _led(found: Any, predicted: Any, other: Any, weight: float, sample: Any) -> Any:
    """found + weight (other - predicted), of whole predictions; a learnt variance, channels behind
    those of the sample, stays."""
    if not isinstance(predicted, torch.Tensor):
        parts = zip(found, predicted, other, sample)
        return type(predicted)([_led(f, p, o, weight, x) for f, p, o, x in parts])
    change = weight * (other - predicted)
    if predicted.ndim == 4 and predicted.shape[1] == 2 * sample.shape[1]:
        change[:, sample.shape[1] :] = 0
    return found + change


def _forget_compiled(outermost: nn.Module) -> None:
    # Compiled code does not notice hooks that come and go, around the denoiser or its blocks.
    modules = inner(outermost).modules()
    if inner(outermost) is not outermost or any(m._compiled_call_impl is not None for m in modules):
        torch.compiler.reset()
