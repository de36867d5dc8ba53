"""Jobs of the recipes that repeat trainings: each in processes of its own, side by side where cores
or GPUs allow, done once.

A job is a few command lines of the recipes that end in `folder/metrics/metrics.json`. What it was
told is kept beside it, so that the same request finds it done, an interrupted one goes on, and
another one is not mistaken for it."""

import json
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch

from hf_intervene.errors import INTERRUPTED, as_ctrl_c
from hf_intervene.trainer.checkpoints import write_whole


RECIPES = Path(__file__).parents[1]

Command = tuple[str, ...]  # a script of `training/` and its options


@dataclass(frozen=True)
class Job:
    """
    Args:
        folder: of the run and its metrics.
        commands: makes the command lines, once the jobs of `after` are done.
        after: jobs that must be done first.
    """

    folder: Path
    commands: Callable[[], Sequence[Command]]
    after: tuple["Job", ...] = ()

    def metrics(self) -> dict | None:
        """What was measured; `None` before it is done."""
        path = self.folder / "metrics" / "metrics.json"
        return json.loads(path.read_text()) if path.exists() else None


def training_commands(folder: Path, train: Sequence[str], evaluate: Sequence[str]) -> list[Command]:
    """A run of train.py, which goes on if it was interrupted, and one of evaluate.py."""
    return [
        ("train.py", "--output_dir", str(folder), "--resume", "auto", "--tracker", "none", *train),
        (
            "evaluate.py",
            "--model",
            str(folder / "model"),
            "--output",
            str(folder / "metrics"),
            *evaluate,
        ),
    ]


def options(settings: dict[str, object]) -> list[str]:
    """Settings as options of a command line."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def default_workers() -> int:
    """As many jobs side by side as there are GPUs, or else cores."""
    return torch.cuda.device_count() or len(os.sched_getaffinity(0))


def run_jobs(
    jobs: Sequence[Job], workers: int, report: Callable[[Job, dict], None] | None = None
) -> dict[Job, str]:
    """Run jobs side by side; those that others wait for must stand before them.

    Args:
        jobs: the jobs.
        workers: how many at once: each has a GPU, in turn, or its share of the cores.
        report: called with every finished job and its metrics.

    Returns:
        The jobs that failed, with a sentence each: the others are not stopped by them, those that
            wait for them are not tried.

    Raises:
        KeyboardInterrupt: when stopped, by Ctrl-C or SIGTERM; what was begun has saved its state.
        ValueError: one sentence: a folder holds a job that was told otherwise.
    """
    gpus = visible_gpus()
    devices: queue.SimpleQueue = queue.SimpleQueue()
    for number in range(workers):
        devices.put(gpus[number % len(gpus)] if gpus else None)
    processes = Processes()
    futures: dict[Job, Future] = {}

    def run(job: Job) -> None:
        for other in job.after:
            if futures[other].exception() is not None:
                raise RuntimeError(f"not run, since {other.folder} failed.")
        device = devices.get()
        try:
            _run(job, device, workers, processes)
        finally:
            devices.put(device)
        if report is not None:
            report(job, job.metrics())

    # First in, first out: what a job waits for has begun before it, so that no worker waits for
    # ever.
    pool = ThreadPoolExecutor(workers)
    with as_ctrl_c(signal.SIGTERM):
        try:
            for job in jobs:
                futures[job] = pool.submit(run, job)
            for future in as_completed(futures.values()):
                if not isinstance(future.exception(), (RuntimeError, type(None))):
                    raise future.exception()
        except BaseException:
            processes.stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
    return {
        job: str(future.exception())
        for job, future in futures.items()
        if future.exception() is not None
    }


class Processes:
    """The processes of the jobs that run, so that they can be stopped."""

    def __init__(self):
        self._running: set[subprocess.Popen] = set()
        self._stopped = False

    def run(self, command: Sequence[str | Path], environment: dict[str, str]) -> tuple[int, str]:
        """Exit status and standard error of a command."""
        if self._stopped:
            raise KeyboardInterrupt
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, env=environment, text=True, **quiet)
        self._running.add(process)
        try:
            errors = process.communicate()[1]
        finally:
            self._running.discard(process)
        if self._stopped or process.returncode == INTERRUPTED:
            raise KeyboardInterrupt
        return process.returncode, errors

    def stop(self) -> None:
        """Ask all to save their state and end."""
        self._stopped = True
        for process in tuple(self._running):
            process.terminate()


def as_told(job: Job, commands: Sequence[Command]) -> str:
    """The command lines as they are kept: the results, and the recipes, may be moved."""
    told = json.dumps(commands, indent=1)
    for place, name in (
        (job.folder, "{folder}"),
        (job.folder.parent, "{parent}"),
        (RECIPES, "{recipes}"),
    ):
        told = told.replace(str(place), name)
    return told


def visible_gpus() -> list[str]:
    """The names of the GPUs that this process may use, as a child's `CUDA_VISIBLE_DEVICES` takes
    them.
    """
    number, given = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(i) for i in range(number)] if given is None else given.split(",")[:number]


def _run(job: Job, device: str | None, workers: int, processes: Processes) -> None:
    commands = job.commands()
    told = as_told(job, commands)
    path = job.folder / "job.json"
    if path.exists() and path.read_text() != told:
        raise ValueError(
            f"{job.folder} holds a run with other settings: choose another --output, or remove it."
        )
    if job.metrics() is not None:
        return
    job.folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, told)
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    for script, *rest in commands:
        status, errors = processes.run([sys.executable, RECIPES / script, *rest], environment)
        if status:
            last = (errors.strip().splitlines() or [f"{script} ended with status {status}."])[-1]
            raise RuntimeError(last.removeprefix("error: "))
