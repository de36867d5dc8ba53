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


TABLES: dict[str, Callable[[], str]] = {
    "summary": summary,
    "avatars": seeds("avatars"),
    "avatars-conditional-vae": seeds("avatars-conditional-vae"),
    "quad": seeds("quad-flow"),
    "quad-means": means("quad-flow"),
    "autoencoder": columns_of("autoencoder"),
    "avatars-dit": seeds("avatars-dit"),
    "protocol": protocol,
    "identifiability": columns_of("identifiability"),
    "head-identifiability": columns_of("head-identifiability"),
    "full-size": columns_of("full-size"),
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
