"""When a run is asked to stop: by Ctrl-C, by SIGTERM to any of its processes, or because the
launcher that started it has ended.

`kill -TERM` on `accelerate launch` ends the launcher and not what it launched; schedulers of
clusters do that when a job's time is up. While data are prepared there is nothing to save and the
run ends at once (`stops_at_once`); while it trains it ends after the step at hand, with a
checkpoint (`Stop`)."""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import reduce


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
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)

    def look() -> None:
        while not ended.wait(_LOOK_EVERY):
            if orphaned():
                os.kill(os.getpid(), signal.SIGTERM)
                return

    watch = threading.Thread(target=look, daemon=True)
    try:
        watch.start()
        yield
    finally:
        ended.set()
        signal.signal(signal.SIGTERM, previous)


class Stop:
    """Inside, Ctrl-C and SIGTERM are heard and not obeyed: the run ends after the step at hand,
    with a checkpoint.
    """

    def __init__(self) -> None:
        self._told = False
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

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether any of the processes is to stop; called once after each step, by all of them."""
        if accelerator.num_processes == 1:
            return self.asked
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
