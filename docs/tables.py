"""The tables of results in the documents, made from `training/results/*.json`.

    python docs/tables.py            writes them into README.md and docs/*.md
    python docs/tables.py --check    writes nothing; exit code 1 if a document would change

In a document a table stands between two comments, `<!-- table: NAME -->` and `<!-- end of table
-->`. NAME is one of `TABLES`. A document may use a table of another one by its name.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from hf_intervene.training.studies import seeds_table
from hf_intervene.training.studies.seeds import seeds_cell


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "training" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
PAIRS = re.compile(r"[^+]+\+[^+]+")


def read(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def over_contexts(found: dict, column: str, contexts: Sequence[str]) -> list[float]:
    """Of every seed the mean of a column over contexts."""
    return list(np.mean([found[context][column] for context in contexts], axis=0))


def summary() -> str:
    """What the samples of avatars show; of single concepts, of pairs, of more."""
    found = read("avatars")
    pairs = [name for name in found if PAIRS.fullmatch(name)]
    groups = {f"`{name}`": [name] for name in found if "+" not in name and name != "obs"}
    groups[f"the {len(pairs)} pairs, mean"] = pairs
    groups |= {
        {2: "three at once", 3: "all four"}[name.count("+")]: [name]
        for name in found
        if name.count("+") > 1
    }
    rival = read("avatars-conditional-vae")
    columns = (
        ("samples", found, "all there"),
        ("conditional VAE", rival, "all there"),
        ("real images", found, "real"),
        ("distance to real images", found, "distance"),
        ("conditional VAE", rival, "distance"),
        ("real to real", found, "floor"),
    )
    rows = [
        [label, *(seeds_cell(over_contexts(runs, column, names)) for _, runs, column in columns)]
        for label, names in groups.items()
    ]
    return markdown(("", *(head for head, *_ in columns)), rows)


def seeds(name: str) -> Callable[[], str]:
    """A table of `seeds_table.py`: every context, every column."""
    return lambda: seeds_table.table(read(name))


def means(name: str) -> Callable[[], str]:
    """Distances of a table of `seeds_table.py`: the mean over single contexts, over pairs."""

    def table() -> str:
        found = read(name)
        single = [context for context in found if "+" not in context]
        pairs = [context for context in found if PAIRS.fullmatch(context)]
        columns = ("distance", "floor")
        rows = [
            [label, *(seeds_cell(over_contexts(found, column, names)) for column in columns)]
            for label, names in (("single contexts and `obs`", single), ("pairs", pairs))
        ]
        return markdown(("mean over", *columns), rows)

    return table


def protocol() -> str:
    """What `training/studies/protocol.py` measured: distances of sets of which a share is wrong,
    and how often such a set is ranked as worse than the exact one of the same draw.
    """
    found = read("protocol")
    measured = np.concatenate(list(found["distances"].values()))  # (draws, sizes, shares)
    worse = (measured[..., 1:] > measured[..., :1]).mean(0)
    notes = {64: " (published)", 1280: " (independent)"}
    rows = [
        [
            f"{size:,}{notes.get(size, '')}",
            f"{mean[0]:.3f}",
            *(f"{value:.3f}; {rate:.0%}" for value, rate in zip(mean[1:], rates)),
        ]
        for size, mean, rates in zip(found["sizes"], measured.mean(0), worse)
    ]
    shares = [f"{share:.0%} wrong" for share in found["shares"][1:]]
    return markdown(["distinct images", "exact", *shares], rows)


def columns_of(name: str) -> Callable[[], str]:
    """A table whose file holds its `columns`, its `rows`, and of each column the `digits` of its
    numbers; two numbers are a mean and half its interval.
    """

    def table() -> str:
        found = read(name)
        digits = found["digits"]
        digits = digits if isinstance(digits, list) else [digits] * len(found["columns"])
        rows = [[_entry(*pair) for pair in zip(row, digits)] for row in found["rows"]]
        return markdown(found["columns"], rows)

    return table


def _entry(value: object, digits: int) -> str:
    if isinstance(value, list):
        return " ± ".join(f"{part:.{digits}f}" for part in value)
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def _quartiles(found: dict, name: str, digits: int, unit: str = "", scale: float = 1.0) -> str:
    """A median and its quartiles, as `benchmarks/tools.py` writes them."""
    low, high = (f"{scale * value:.{digits}f}" for value in found["quartiles"])
    middle = f"{scale * found[name]:.{digits}f}"
    return f"{middle}{unit} ({low} to {high})" if low != high else f"{middle}{unit}"


def full_pipelines() -> str:
    """What `benchmarks/full_pipelines.py` measured, a column for each pipeline."""
    results = read("full-size-pipelines")["results"]["full-size-pipelines"]

    def part(found: dict) -> str:
        share = found["denoiser_parameters"] / found["whole_denoiser"]["parameters"]
        return "whole" if share == 1 else f"{100 * share:.0f} % of the weights"

    def of_steps(entry: Callable[[dict], str]) -> Callable[[dict], str]:
        return lambda found: entry(found["step"]) if "step" in found else "-"

    def of_recording(entry: Callable[[dict], str]) -> Callable[[dict], str]:
        return lambda found: entry(found["recording"])

    rows: dict[str, Callable[[dict], str]] = {
        "the denoiser": part,
        "a step without a head": of_steps(
            lambda step: _quartiles(step["alone"], "seconds", 1, " s")
        ),
        "a step with one over it": of_steps(
            lambda step: _quartiles(step["with a head over without"], "ratio", 3)
        ),
        "time in head and hooks, of a step": of_steps(
            lambda step: _quartiles(step["hooks over the step"], "ratio", 3, " %", 100)
        ),
        "of the first step of an image": of_steps(
            lambda step: _quartiles(
                step["head and hooks over the first step"], "ratio", 3, " %", 100
            )
        ),
        "times that they wait for the device in a step": of_steps(
            lambda step: str(step["host_waits_in_hooks"])
        ),
        "recording": of_recording(lambda found: f"{found['all']['seconds']:.0f} s"),
        "of it in 2 calls of the denoiser": of_recording(
            lambda found: f"{found['calls of the denoiser']['seconds']:.0f} s"
        ),
        "memory of the pipeline": lambda found: f"{found['pipeline_gib']:.1f} GiB",
        "peak of a recording beyond it": of_recording(
            lambda found: f"{found['beyond_the_pipeline_peak_gib']:.2f} GiB"
        ),
        "peak of a step beyond it": of_steps(
            lambda step: f"{step['alone_beyond_peak_gib']:.2f} GiB"
        ),
    }
    return markdown(
        ["", *results],
        [[label, *(entry(found) for found in results.values())] for label, entry in rows.items()],
    )


def pipeline_memory() -> str:
    """What denoisers take by their numbers of weights, and what was measured beside them."""
    results = read("full-size-pipelines")["results"]["full-size-pipelines"]

    def gib(number: float, each: int) -> str:
        return f"{number * each / 2**30:.1f} GiB"

    rows: dict[str, Callable[[dict, dict], str]] = {
        "weights of the denoiser": lambda whole, _: f"{whole['parameters'] / 1e9:.1f} billion",
        "in bfloat16": lambda whole, _: gib(whole["parameters"], 2),
        "in 8 bits": lambda whole, _: gib(whole["parameters"], 1),
        "in bfloat16, one block at a time": lambda whole, _: gib(
            whole["largest_block_parameters"] + whole["parameters_outside_of_blocks"], 2
        ),
        "trained beside the head": lambda _, recording: (
            f"{recording['adapter_parameters'] / 1e6:.0f} million"
        ),
        "with gradients and AdamW": lambda _, recording: gib(recording["adapter_parameters"], 16),
        "kept of the recording": lambda _, recording: f"{recording['kept_mib']:.1f} MiB",
    }
    return markdown(
        ["", *results],
        [
            [label, *(entry(f["whole_denoiser"], f["recording"]) for f in results.values())]
            for label, entry in rows.items()
        ],
    )


TABLES: dict[str, Callable[[], str]] = {
    "summary": summary,
    "avatars": seeds("avatars"),
    "avatars-conditional-vae": seeds("avatars-conditional-vae"),
    "quad": seeds("quad-flow"),
    "quad-means": means("quad-flow"),
    "autoencoder": columns_of("autoencoder"),
    "avatars-dit": seeds("avatars-dit"),
    "denoiser-alone": columns_of("denoiser-alone"),
    "protocol": protocol,
    "identifiability": columns_of("identifiability"),
    "head-identifiability": columns_of("head-identifiability"),
    "full-size": columns_of("full-size"),
    "full-size-pipelines": full_pipelines,
    "pipeline-memory": pipeline_memory,
    "textbook": columns_of("textbook"),
}


def written(text: str) -> str:
    """A document with its tables as they should be.

    Raises:
        ValueError: it names a table that there is not.
    """

    def table(match: re.Match) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"there is no table {match[2]!r}; there is {', '.join(TABLES)}.")
        return f"{match[1]}{TABLES[match[2]]()}{match[3]}"

    return _TABLE.sub(table, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check, changed = parser.parse_args().check, []
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = written(before)
        if after != before:
            changed.append(page)
            if not check:
                page.write_text(after, encoding="utf-8")
    print(*(page.relative_to(ROOT) for page in changed), sep="\n")
    return int(check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
