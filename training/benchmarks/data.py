"""The data path, and several processes."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState

from hf_intervene import LightVAE
from hf_intervene.data import ContextImages, ContextSchedule, quad
from hf_intervene.objective import Objective
from hf_intervene.trainer.feeding import Feed
from hf_intervene.trainer.loop import train
from hf_intervene.trainer.settings import TrainArguments
from hf_intervene.training.benchmarks.bases import head_on, model_step
from hf_intervene.training.benchmarks.textbook import NEVER, SETTINGS
from hf_intervene.training.benchmarks.tools import Conditions, alternate, figure, rate, summary


def render(rounds: int) -> dict:
    latents = quad.sample_latents("obs", 2048)
    (seconds,) = alternate([lambda: quad.render(latents, 64)], rounds)
    return rate(2048, seconds)


def feeding(data: ContextImages, batch_size: int) -> Callable[[], None]:
    """What the trainer does before a step: the schedule, the noise, the images on the device in [0,
    1].
    """
    a = TrainArguments(batch_size=batch_size)
    with Conditions.device:
        model = head_on(LightVAE(sample_size=data.image_shape[-1]))
    feed = Feed(
        Objective(model),
        data,
        None,
        ContextSchedule(data.context_ids, a.data.schedule, batch_size),
        a,
        PartialState(cpu=Conditions.device.type == "cpu"),
    )
    steps = count()

    def batches() -> None:
        for _ in range(10):
            for inputs in feed.batch(next(steps)).inputs:
                assert inputs["pixel_values"].dtype == torch.float32

    return batches


def data(rounds: int, batch_size: int = 64, resolution: int = 64, images: int = 2000) -> dict:
    """Ten batches out of memory, and out of a file by memory map, over ten training steps of the
    light VAE.
    """
    drawn = ContextImages.from_arrays(
        quad.images_by_context(images_per_context=images, resolution=resolution), quad.CONCEPTS
    )
    with Conditions.device:
        step = model_step(head_on(LightVAE(sample_size=resolution)), batch_size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "images.npy")
        np.save(path, drawn.stored.numpy())
        stored = torch.from_numpy(np.load(path, mmap_mode="c"))
        mapped = ContextImages(
            stored, drawn.context_ids, drawn.contexts, drawn.concepts, mapped=True
        )
        memory, file, steps = alternate(
            [feeding(drawn, batch_size), feeding(mapped, batch_size), step], rounds
        )
    ten = [10 * seconds for seconds in steps]
    return {
        name: {"speed": rate(10 * batch_size, seconds), "share": summary(seconds, ten)}
        for name, seconds in (("memory", memory), ("file", file))
    }


def processes(rounds: int, steps: int = 5, **settings) -> dict:
    """The trainer in one process and in two of one thread each, each on a core of its own: with the
    same batch in total, and with the same in each process."""
    settings = SETTINGS | {"resolution": 64} | settings
    batch_size = TrainArguments(**settings).optimization.batch_size
    started = {
        "one": (1, batch_size),
        "two": (2, batch_size),
        "two, twice the batch": (2, 2 * batch_size),
    }
    speeds: dict[str, list[float]] = {name: [] for name in started}
    for _ in range(min(rounds, 5)):
        for name, (number, size) in started.items():
            speeds[name].append(_launched(number, settings | {"batch_size": size}, steps))
    found: dict = {"cores": len(os.sched_getaffinity(0))}
    for name, speed in speeds.items():
        found[name] = figure("images_per_second", speed)
        if name != "one":
            found[f"{name}, gain"] = summary(speed, speeds["one"], "speedup")
    return found


def _launched(number: int, settings: dict, steps: int) -> float:
    """Images a second, median over a few rounds, of the trainer in so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        job = settings | {
            "output_dir": f"{folder}/run",
            "log_every": steps,
            "eval_every": NEVER,
            "max_steps": 6 * steps,
        }
        Path(folder, "job.json").write_text(json.dumps(job))
        subprocess.run(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc_per_node",
                str(number),
            ]
            + ["-m", "hf_intervene.training.benchmarks.data", folder],
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        )
        seconds = json.loads(Path(folder, "seconds.json").read_text())
    return steps * TrainArguments(**job).optimization.batch_size / float(np.median(seconds))


def _process(folder: str) -> None:
    """One of the processes: rank 0 writes the seconds from one log to the next."""
    rank = int(os.environ["LOCAL_RANK"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    times: list[float] = []
    train(
        TrainArguments(**json.loads(Path(folder, "job.json").read_text())),
        on_log=lambda row: times.append(time.perf_counter()),
    )
    if rank == 0:
        # The first steps warm up; after the last step the run ends with a validation, which is
        # logged too.
        Path(folder, "seconds.json").write_text(json.dumps(np.diff(times)[:-1].tolist()))


if __name__ == "__main__":
    _process(sys.argv[1])
