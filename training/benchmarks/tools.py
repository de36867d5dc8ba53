"""How the benchmarks measure: things take turns in one run, and what counts are the ratios within a
round.

So what slows the machine down for a while slows both sides of a ratio. `alternate` calls functions
of this process in turn; `contest` lets processes take turns, each of which does nothing else, so
that their peak memory can be told and neither profits from what the other sets."""

import ctypes
import gc
import multiprocessing
import os
import platform
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_intervene.trainer.sections import fast_bf16


class Conditions:
    """How this process measures: which device models and batches are on, and what a round's seconds
    are. Those on the wall, or on a machine with other work the processor time of this process;
    until the device is done with its work, which otherwise goes on beside the host's."""

    cpu_time = False
    device = torch.device("cpu")

    @classmethod
    def now(cls) -> float:
        if cls.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.process_time() if cls.cpu_time else time.perf_counter()

    @classmethod
    def autocast(cls) -> torch.autocast:
        """bf16, as the trainer does it where it is computed in hardware."""
        return torch.autocast(cls.device.type, torch.bfloat16, enabled=fast_bf16())


def alternate(functions: Sequence[Callable[[], None]], rounds: int) -> list[list[float]]:
    """Seconds of each function, called in turn, after one round of warm-up."""
    seconds: list[list[float]] = [[] for _ in functions]
    for number in range(rounds + 1):
        for function, record in zip(functions, seconds):
            start = Conditions.now()
            function()
            if number:
                record.append(Conditions.now() - start)
    return seconds


def figure(name: str, values: Sequence[float]) -> dict:
    """Median and quartiles of a quantity over the rounds; `benchmark.py` knows by its name which
    way is better.
    """
    low, middle, high = torch.quantile(
        torch.tensor(values, dtype=torch.float64), torch.tensor([0.25, 0.5, 0.75]).double()
    ).tolist()
    return {name: middle, "quartiles": [low, high], "rounds": len(values)}


def summary(numerator: Sequence[float], denominator: Sequence[float], name: str = "ratio") -> dict:
    """`figure` of the ratios, round by round."""
    return figure(name, [a / b for a, b in zip(numerator, denominator)])


def rate(amount: float, seconds: Sequence[float], name: str = "images_per_second") -> dict:
    """`figure` of an amount a second."""
    return figure(name, [amount / s for s in seconds])


class _Over(BaseException):
    """There are no more rounds."""


class Turns:
    """A contestant's side of a contest: it calls `next` before each of its rounds, for as long as
    that returns.
    """

    def __init__(self, connection: Connection):
        self._connection, self._start = connection, Conditions.now()

    def next(self) -> None:
        self._connection.send(Conditions.now() - self._start)
        if not self._connection.recv():
            raise _Over
        self._start = Conditions.now()


@dataclass
class Outcome:
    """
    Args:
        seconds: of each round.
        first_seconds: before the first round: drawing images, building, compiling, first steps.
        peak_gib: peak memory of the process.
    """

    seconds: list[float] = field(default_factory=list)
    first_seconds: float = 0.0
    peak_gib: float = 0.0


def contest(contestants: dict[str, tuple[Callable, tuple]], rounds: int) -> dict[str, Outcome]:
    """Let contestants do their rounds in turn, each in a process of its own with as many threads as
    this one, after a round of warm-up.

    Args:
        contestants: by name a function that pickle finds by its module, called with `Turns` and the
            arguments.
        rounds: how many are measured.
    """
    spawn, threads = multiprocessing.get_context("spawn"), torch.get_num_threads()
    outcomes: dict[str, Outcome] = {name: Outcome() for name in contestants}
    running = {}
    try:
        for name, (
            function,
            arguments,
        ) in contestants.items():  # one after the other: each start has the machine to itself
            here, there = spawn.Pipe()
            process = spawn.Process(
                target=_take_part,
                args=(there, threads, Conditions.cpu_time, Conditions.device, function, arguments),
            )
            process.start()
            there.close()
            running[name] = process, here
            outcomes[name].first_seconds = _answer(name, here)
        for number in range(rounds + 1):
            for name, (_, connection) in running.items():
                connection.send(True)
                seconds = _answer(name, connection)
                if number:
                    outcomes[name].seconds.append(seconds)
        for name, (process, connection) in running.items():
            connection.send(False)
            outcomes[name].peak_gib = _answer(name, connection)
            process.join()
    finally:
        for process, _ in running.values():
            if process.is_alive():
                process.terminate()
    return outcomes


def _answer(name: str, connection: Connection) -> float:
    try:
        return connection.recv()
    except EOFError:
        raise RuntimeError(f"the process of {name!r} ended with the error above.") from None


def _take_part(
    connection: Connection,
    threads: int,
    cpu_time: bool,
    device: torch.device,
    function: Callable,
    arguments: tuple,
) -> None:
    Conditions.cpu_time, Conditions.device = cpu_time, device
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    try:
        function(Turns(connection), *arguments)
    except _Over:
        connection.send(peak_gib())


def repeat(turns: Turns, make: Callable[..., Callable[[], None]], *arguments) -> None:
    """A contestant whose rounds are calls of the function that `make` makes, with what it makes on
    the device.
    """
    with Conditions.device:
        step = make(*arguments)
    step()
    while True:
        turns.next()
        step()


def over(outcomes: dict[str, Outcome], name: str, other: str) -> dict:
    """Time of one contestant over that of another, and the peak memory of both."""
    peaks = {"peak_gib": outcomes[name].peak_gib, f"{other}_peak_gib": outcomes[other].peak_gib}
    return summary(outcomes[name].seconds, outcomes[other].seconds) | peaks


def peak_gib() -> float:
    """Peak memory of this process so far, in GiB: the device's, if there is one."""
    if Conditions.device.type != "cpu":
        return torch.accelerator.max_memory_allocated() / 2**30
    try:  # not what getrusage says: a process started by a larger one begins with the peak of that
        return _status_gib("VmHWM")
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def held_gib() -> float:
    """Memory that this process holds now, in GiB; `peak_gib` is that of what comes from now on.
    Where the system cannot count anew, it is the peak so far."""
    gc.collect()
    if Conditions.device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats()
        return torch.accelerator.memory_allocated() / 2**30
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed is given back
        Path("/proc/self/clear_refs").write_text("5")
        return _status_gib("VmRSS")
    except (OSError, AttributeError, StopIteration):
        return peak_gib()


def _status_gib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 2**20


class HostWaits(TorchDispatchMode):
    """Counts what makes the host wait for a device: values of tensors that it reads.

    Attributes:
        seen: by what, in the order in which it was done.
    """

    OPERATORS = (
        "_local_scalar_dense",
        "nonzero",
        "equal",
        "masked_select",
        "is_nonzero",
        "unique",
        "_unique2",
    )

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    @property
    def count(self) -> int:
        return len(self.seen)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence = (), kwargs: Mapping | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in self.OPERATORS:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def machine() -> dict:
    """What figures depend on beside the code."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {
        "processor": processor,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "bf16": fast_bf16(),
    }
    found["clock"] = "processor" if Conditions.cpu_time else "wall"
    if Conditions.device.type != "cpu":
        found["device"] = (
            torch.cuda.get_device_name()
            if Conditions.device.type == "cuda"
            else Conditions.device.type
        )
    return found | {
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }
