"""What happens around each call of a denoiser that heads are on: what enters before it, and
guidance on what comes out.

State belongs to a pipeline, to a head on it and to a call. Nothing of it is kept on the denoiser
but hooks.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline
from torch import nn

from .attached import Attached, Run
from .bases.injection import Injection, PerThread
from .bases.sites import check_moves
from .calls import PipelineCall, Watcher, running_call
from .requested import Requested


class HeadsThread(PerThread):
    def __init__(self) -> None:
        self.pending = False  # whether this thread has made an `intervene` and not entered it
        self.inside = False  # whether its call of the denoiser is one that a head makes itself


class HeadsLike(Watcher, Protocol):
    """What is needed here of the heads on a pipeline (`acting.Heads`)."""

    pipe: DiffusionPipeline
    thread: HeadsThread


class HeadsCall(PipelineCall):
    """A call of the pipeline in which heads act.

    Args:
        heads: on the pipeline.
        arguments: of the call, by name.
        active: under what each head acts.
    """

    def __init__(
        self, heads: HeadsLike, arguments: dict[str, Any], active: Mapping[Attached, Requested]
    ):
        told = [a.num_images for a in active.values() if a.num_images is not None]
        super().__init__(heads, heads.pipe, arguments, told[0] if told else None)
        self.active = active
        self._runs: list[Run] | None = None

    def runs(self, device: torch.device) -> list[Run]:
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


class Around:
    """What happens around each call of a denoiser of a pipeline: `before` and `after` it.

    They are hooks. A module that was compiled in place (`module.compile()`) would compile its own
    hooks too. There they are put around the compiled call.

    Args:
        heads: on the pipeline.
        name: of the denoiser.
        module: the denoiser as the pipeline calls it.
    """

    def __init__(self, heads: HeadsLike, name: str, module: nn.Module):
        self.heads: HeadsLike | None = heads
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

    def __deepcopy__(self, memo: dict) -> "Around":
        # A denoiser that is copied alone belongs to no pipeline: the hooks on the copy do nothing.
        copied = memo[id(self)] = object.__new__(Around)
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

    def __init__(self, around: Around, inner: Any):
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
