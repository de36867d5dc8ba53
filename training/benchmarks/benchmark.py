"""Benchmarks: ratios of things that take turns in one run, medians and quartiles of several rounds,
peak memory of a process.

    python training/benchmarks/benchmark.py --output benchmarks/one-thread.json          # the quick ones; or names, or `all`
    python training/benchmarks/benchmark.py --compare benchmarks/before.json benchmarks/after.json

`--output` writes a JSON file and, beside it, the same as a Markdown table. What is measured:
`python training/benchmarks/benchmark.py --list`. On the CPU, unless `--device` names another one."""  # noqa: E501

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

from hf_intervene.errors import spoken
from hf_intervene.logging import bars_on_terminals_only
from hf_intervene.trainer.checkpoints import check_writable, write_whole
from hf_intervene.trainer.parsing import RecipeParser
from hf_intervene.training.benchmarks.tools import Conditions, machine


@dataclass(frozen=True)
class Benchmark:
    """
    Args:
        where: `module:function` beside this file; the function takes the number of rounds and
            returns a nested dictionary of figures.
        about: what is measured.
        long: whether it takes many minutes, and is run only by its name or by `all`.
    """

    where: str
    about: str
    long: bool = False

    def __call__(self, rounds: int) -> dict:
        module, function = self.where.split(":")
        return getattr(import_module(f"hf_intervene.training.benchmarks.{module}"), function)(
            rounds
        )


BENCHMARKS = {
    "render": Benchmark("data:render", "quad images of 64x64 drawn a second"),
    "head": Benchmark(
        "bases:head",
        "light VAE, 64x64, batch 256: with the head over without; a training step, sampling; the"
        " head alone over that step",
    ),
    "autoencoder": Benchmark(
        "bases:autoencoder",
        "AutoencoderKL of pretrain.py, 64x64, batch 16: with head and adapter over plain diffusers;"
        " a training step, sampling",
    ),
    "unet": Benchmark(
        "bases:unet",
        "UNet2DModel of pretrain.py, 32x32, batch 16: with head and adapter over plain diffusers; a"
        " training step, sampling in 5 steps",
    ),
    "terms": Benchmark(
        "bases:terms",
        "training steps of the light VAE, 64x64, batch 64: with each term, and with both, over the"
        " ELBO alone",
    ),
    "textbook": Benchmark(
        "textbook:textbook",
        "train.py, with the paper's method and with its defaults, against a plain float32 loop of"
        " the paper's method: per-sample data set, one context a batch, dense masked head, Adam;"
        " light VAE, 64x64, batch 64",
    ),
    "utilisation": Benchmark(
        "textbook:utilisation",
        "what train.py computes a second, over what a matrix product does; light VAE, 64x64,"
        " batch 64",
    ),
    "textbook-quality": Benchmark(
        "textbook:quality",
        "that loop and train.py after equally many images, and after half of them, 32x32:"
        " likelihood, distances, time",
        long=True,
    ),
    "presence": Benchmark(
        "presence:presence",
        "avatars, 32x32: processor time until pairs are as present as a conditional VAE ever has"
        " them, the head over the conditional VAE; rounds are seeds",
        long=True,
    ),
    "data": Benchmark(
        "data:data",
        "batches onto the device, over the training step of the light VAE, 64x64, batch 64",
    ),
    "processes": Benchmark(
        "data:processes",
        "train.py in two processes of one core each over one; light VAE, 64x64",
    ),
    "concepts": Benchmark(
        "head:concepts",
        "heads of 2 to 512 concepts, batch 64: forward and backward, with full and low-rank"
        " weights; the posterior",
    ),
    "contexts": Benchmark(
        "head:contexts",
        "one pass for a batch that mixes 7 or 64 contexts, over a pass for each; head, light VAE"
        " with head",
    ),
    "few-steps": Benchmark(
        "head:few_steps",
        "eight images of the pipeline avatars in ten steps; guided over unguided",
    ),
    "evaluation": Benchmark(
        "head:evaluation", "sliced Wasserstein distances, POT over ours", long=True
    ),
    "load": Benchmark(
        "bases:load",
        "a saved head on its frozen Stable Diffusion autoencoder, beyond the autoencoder alone",
    ),
    "denoise": Benchmark(
        "bases:denoise",
        "a denoising step of a UNet of Stable Diffusion's size, batch 2, with head, projections and"
        " hooks over the UNet alone",
        long=True,
    ),
    "full-size": Benchmark(
        "bases:full_size",
        "a training step on the Stable Diffusion autoencoder, 512x512, batch 1, in each regime",
        long=True,
    ),
    "full-size-head": Benchmark(
        "bases:full_size_head",
        "the same with head and adapter, end to end, over plain diffusers; sampling",
        long=True,
    ),
    "full-size-pipelines": Benchmark(
        "full_pipelines:full_size_pipelines",
        "Stable Diffusion XL, and as many blocks of Flux.1 and Qwen-Image as fit, 1024x1024, batch"
        " 1: a step of denoising with a head over one without, and recording the pipeline",
        long=True,
    ),
}

LOWER = ("ratio", "seconds", "milliseconds", "bits_per_pixel", "distance")
HIGHER = ("speedup", "images_per_second", "gflops", "utilisation")
RELATIVE = ("ratio", "speedup", "utilisation")  # hold on other machines too
MEMORY = "peak_gib"
NOISE = 0.02  # a change of less is none, whatever the quartiles say; memory has no quartiles


@dataclass(frozen=True)
class Figure:
    name: str
    kind: str
    value: float
    quartiles: tuple[float, float]

    def gain(self, other: "Figure") -> float:
        """By which share `other` is better; negative if it is worse."""
        return other.value / self.value - 1 if self.kind in HIGHER else self.value / other.value - 1

    def differs(self, other: "Figure") -> bool:
        """Whether the two are apart by more than noise: their quartiles do not overlap."""
        apart = self.quartiles[1] < other.quartiles[0] or other.quartiles[1] < self.quartiles[0]
        return apart and abs(self.gain(other)) > NOISE


def figures(results: dict, path: tuple[str, ...] = ()) -> Iterator[Figure]:
    """The figures in what benchmarks returned: numbers of a known kind, with quartiles beside them;
    peak memory.
    """
    for key, value in results.items():
        name = ", ".join(path)
        if isinstance(value, dict):
            yield from figures(value, (*path, key))
        elif key in LOWER + HIGHER and "quartiles" in results:
            yield Figure(name, key, value, tuple(results["quartiles"]))
        elif key.endswith(MEMORY):
            of = key.removesuffix(MEMORY).rstrip("_")
            yield Figure(f"{name} ({of})" if of else name, MEMORY, value, (value, value))


def markdown(report: dict) -> str:
    """The report as a table, with what it was measured on."""
    m = report["machine"]
    device = f"{m['device']}, " if "device" in m else ""
    device += (
        f"{m['processor']} ({m['instructions']}), {m['threads']} of {m['cores']}"
        f" cores{', bf16' if m['bf16'] else ''}, {m['clock']} time"
    )
    lines = [f"{device}, torch {m['torch']}:", ""]
    lines += ["| benchmark | | median | quartiles |", "| --- | --- | --- | --- |"]
    for f in figures(report["results"]):
        quartiles = (
            "" if f.kind == MEMORY else f"{_number(f.quartiles[0])} to {_number(f.quartiles[1])}"
        )
        lines.append(
            f"| {f.name} | {'peak memory, GiB' if f.kind == MEMORY else f.kind.replace('_', ' ')} |"
            f" {_number(f.value)} | {quartiles} |"
        )
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    return (
        f"{value:,.0f}"
        if abs(value) >= 100
        else f"{value:.3g}"
        if abs(value) < 0.1
        else f"{value:.3f}"
    )


def compare(before: dict, after: dict) -> tuple[str, bool]:
    """What of two reports changed, and whether anything got worse beyond noise. On other machines
    only ratios can be compared.
    """
    same = before["machine"] == after["machine"]
    old = {(f.name, f.kind): f for f in figures(before["results"])}
    new = {(f.name, f.kind): f for f in figures(after["results"])}
    lines, worse = [], False
    if not same:
        lines.append("The machines differ: only ratios are compared.")
    for key in (key for key in old if key in new and (same or key[1] in RELATIVE)):
        a, b = old[key], new[key]
        verdict = ("better" if a.gain(b) > 0 else "WORSE") if a.differs(b) else "same"
        worse = worse or verdict == "WORSE"
        span = [
            f"{_number(f.value)} [{_number(f.quartiles[0])}, {_number(f.quartiles[1])}]"
            for f in (a, b)
        ]
        lines.append(f"{verdict:6}  {a.name}, {a.kind}: {span[0]} -> {span[1]} ({a.gain(b):+.1%})")
    lines += [f"gone    {name}, {kind}" for name, kind in old if (name, kind) not in new]
    lines += [f"new     {name}, {kind}" for name, kind in new if (name, kind) not in old]
    return "\n".join(lines), worse


def read(path: str) -> dict:
    """A report.

    Raises:
        OSError, ValueError: one sentence: there is no such file, or it is no report.
    """
    try:
        report = json.loads(Path(path).read_text())
        _ = report["machine"], list(figures(report["results"]))
        return report
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a report that --output wrote.") from error


def chosen(names: Sequence[str]) -> list[str]:
    unknown = [name for name in names if name != "all" and name not in BENCHMARKS]
    if unknown:
        raise ValueError(
            f"there is no benchmark {unknown[0]!r}; the benchmarks are {', '.join(BENCHMARKS)}, and"
            " all."
        )
    if "all" in names:
        return list(BENCHMARKS)
    return list(names) or [name for name, benchmark in BENCHMARKS.items() if not benchmark.long]


def chosen_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        return device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"there is no device {name!r} here ({str(error).splitlines()[0].rstrip('.')})."
        ) from error


def measure(names: Sequence[str], rounds: int, output: str | None) -> dict:
    """Run benchmarks; after each the report so far is written."""
    report = {"machine": machine(), "rounds": rounds, "results": {}}
    for name in names:
        print(f"{name}: {BENCHMARKS[name].about}", flush=True)
        report["results"][name] = BENCHMARKS[name](rounds)
        print(
            markdown(report | {"results": {name: report["results"][name]}}).split("\n", 4)[-1],
            flush=True,
        )
        if output:
            write_whole(Path(output), json.dumps(report, indent=1))
            write_whole(Path(output).with_suffix(".md"), markdown(report))
    return report


def _main(argv: Sequence[str] | None = None) -> int:
    parser = RecipeParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "benchmarks",
        nargs="*",
        metavar="NAME",
        help="default: those that take no longer than minutes; or all",
    )
    parser.add_argument("--list", action="store_true", help="say what there is")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--device", default="cpu", help="of models and batches, such as cuda; default: cpu"
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="processor time instead of time on the wall: for a busy machine",
    )
    parser.add_argument(
        "--output", metavar="FILE.json", help="written after each benchmark, with a table beside it"
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("BEFORE.json", "AFTER.json"),
        help="exit code 1 if something got worse",
    )
    arguments = parser.parse_args(argv)
    bars_on_terminals_only()
    if arguments.list:
        print(
            "\n".join(
                f"{name}: {b.about}{' (long)' if b.long else ''}" for name, b in BENCHMARKS.items()
            )
        )
        return 0
    if arguments.compare:
        text, worse = compare(*map(read, arguments.compare))
        print(text)
        return int(worse)
    names = chosen(arguments.benchmarks)
    if arguments.rounds < 1 or arguments.threads < 1:
        raise ValueError("rounds and threads must be at least 1.")
    if arguments.output:
        check_writable(Path(arguments.output).resolve().parent)
    Conditions.cpu_time, Conditions.device = arguments.cpu_time, chosen_device(arguments.device)
    if Conditions.device.type == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nor does the trainer find another one
    elif arguments.cpu_time:
        raise ValueError("processor time says nothing of another device: leave out --cpu-time.")
    elif Conditions.device.index:
        raise ValueError(
            f"the trainer takes the first device that it sees: give it {Conditions.device.type} and"
            " let it see no other."
        )
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    measure(names, arguments.rounds, arguments.output)
    return 0


main = spoken(_main, failed=2)


if __name__ == "__main__":
    sys.exit(main())
