"""When a run is asked to stop: by Ctrl-C, by SIGTERM to any of its processes, or because the
launcher that started it has ended.

`kill -TERM` on `accelerate launch` ends the launcher and not what it launched; schedulers of
clusters do that when a job's time is up. While data are prepared the run ends at once, and what is
prepared so far is kept (`stops_at_once`). Afterwards it ends after the step or batch at hand, with
a checkpoint (`Stop`), be it in training, validation, a grid of samples or the fit of the prior."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import reduce

from ..errors import as_ctrl_c


AGREE_EVERY = (
    1.0  # seconds after which several processes agree on stopping, or a step, whichever is longer
)
_MOST_STEPS = 10  # between two agreements
_LOOK_EVERY = 0.5  # seconds after which the launcher is looked for
# What launchers set for the processes they start: accelerate launch, torchrun.
_LAUNCHERS = ("ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID")
_LAUNCHER_WORDS = (b"accelerate", b"torchrun", b"torch.distributed", b"deepspeed")
_PARENT = os.getppid()


def orphaned() -> bool:
    """Whether a launcher started this process and has ended."""
    if not any(name in os.environ for name in _LAUNCHERS):
        return False
    parent = os.getppid()
    return parent != _PARENT or (parent == 1 and not _is_launcher(parent))


def _is_launcher(process: int) -> bool:
    """Whether a process looks like a launcher; `True` where that cannot be told. In a container one
    may be process 1, which otherwise takes the children of a launcher that has ended."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return True
    return any(word in words for word in _LAUNCHER_WORDS)


@contextmanager
def stops_at_once() -> Iterator[None]:
    """Inside, SIGTERM is a KeyboardInterrupt, as Ctrl-C is, so that what is half written is
    removed, and so is the end of the launcher, where the caller's thread hears signals at all."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(_LOOK_EVERY):
            if orphaned():
                os.kill(os.getpid(), signal.SIGTERM)
                return

    watch = threading.Thread(target=look, daemon=True)
    with as_ctrl_c(signal.SIGTERM):
        try:
            watch.start()
            yield
        finally:
            ended.set()


class Interrupted(Exception):
    """All processes have agreed to stop. What was being done between two steps is begun anew later,
    unless it says otherwise."""


def by_main_process(
    accelerator: Accelerator,
    work: Callable[[Callable[[], None]], None],
    asked: Callable[[], bool] = lambda: False,
) -> None:
    """Do a work of the main process alone. The others wait, and all of them hear signals meanwhile:
    a barrier would hear none before its end.

    Args:
        accelerator: its processes call this together.
        work: called in the main process with a function, which it calls after every piece.
        asked: whether this process is to stop.

    Raises:
        Interrupted: one of the processes is to stop, and the work was not done.
    """
    several, since = accelerator.num_processes > 1, time.monotonic()

    def goes_on(more: bool) -> bool:
        """Tell the others; whether the work goes on."""
        told = [float(asked()), float(more)]
        told = reduce(torch.tensor(told, device=accelerator.device), "sum").tolist()
        if told[0] and told[1]:
            raise Interrupted
        return told[1] > 0

    def check() -> None:
        nonlocal since
        if not several and asked():
            raise Interrupted
        if several and (asked() or time.monotonic() - since >= AGREE_EVERY):
            goes_on(True)
            since = time.monotonic()

    if accelerator.is_main_process:
        work(check)
    if several:
        while goes_on(False):
            pass


class Stop:
    """Inside, Ctrl-C and SIGTERM are heard and not obeyed: the run ends after the step or batch at
    hand, with a checkpoint.
    """

    def __init__(self) -> None:
        self._told = False
        self._kind = ""
        self._since = time.monotonic()  # the last agreement
        self._steps = self._wait = (
            1  # from there to the next one, and what of them is still to come
        )

    @property
    def asked(self) -> bool:
        """Whether this process is to stop."""
        return self._told or orphaned()

    @asked.setter
    def asked(self, told: bool) -> None:
        self._told = told

    def __enter__(self) -> "Stop":
        try:
            self._previous = {
                number: signal.signal(number, self._ask)
                for number in (signal.SIGINT, signal.SIGTERM)
            }
        except ValueError:  # not in the main thread: the caller handles signals
            self._previous = {}
        return self

    def _ask(self, *_: object) -> None:
        self._told = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self, accelerator: Accelerator, kind: str = "step") -> None:
        """Called after each step, or after each batch of another work, by all processes.

        Args:
            accelerator: the processes.
            kind: of the work: how long a step takes says nothing of another work's batches.

        Raises:
            Interrupted: one of them is to stop.
        """
        if self.agreed(accelerator, kind):
            raise Interrupted

    def by_main_process(
        self, accelerator: Accelerator, work: Callable[[Callable[[], None]], None]
    ) -> None:
        """`by_main_process` with this process's own signals."""
        by_main_process(accelerator, work, lambda: self.asked)

    def agreed(self, accelerator: Accelerator, kind: str = "step") -> bool:
        """Whether any of the processes is to stop; see `check`."""
        if accelerator.num_processes == 1:
            return self.asked
        if kind != self._kind:
            self._kind, self._steps, self._wait = kind, 1, 1
        self._wait -= 1
        if self._wait > 0:
            return False
        now = time.monotonic()
        told = torch.tensor([float(self.asked), now - self._since], device=accelerator.device)
        asked, seconds = reduce(
            told, "sum"
        ).tolist()  # the same in all processes, and so what follows
        per_step = seconds / accelerator.num_processes / self._steps
        self._steps = self._wait = max(
            1, min(_MOST_STEPS, math.floor(AGREE_EVERY / max(per_step, 1e-9)))
        )
        self._since = now
        return asked > 0
