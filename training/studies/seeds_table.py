"""One table of several runs: what `evaluate.py` found of models that differ in their seeds alone.

    python training/studies/seeds_table.py outputs/a/metrics outputs/b/metrics --output training/results/avatars

writes FILE.json, every figure of every run, and FILE.md, the means and half a 95 % t-interval over
the runs."""  # noqa: E501

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from hf_intervene.errors import spoken
from hf_intervene.trainer.parsing import RecipeParser
from hf_intervene.training.studies.seeds import seeds_cell


# Columns: title, and where it is in a context's entry.
COLUMNS = {
    "all there": ("presence", "generated", "all_wanted", "value"),
    "real": ("presence", "real", "all_wanted", "value"),
    "something else": ("presence", "generated", "unwanted", "value"),
    "real, something else": ("presence", "real", "unwanted", "value"),
    "error of edits": ("counterfactual", "edited"),
    "unedited": ("counterfactual", "unedited"),
    "another's change": ("counterfactual", "another"),
    "slope of correlations": ("factors", "generated", "slope"),
    "shapes": ("factors", "generated", "shape_distance"),
    "size": ("factors", "generated", "size_distance"),
    "triangles": ("factors", "generated", "triangles"),
    "real triangles": ("factors", "floor", "triangles"),
    "distance": ("independent", "distance"),
    "floor": ("independent", "floor"),
}


def figures(metrics: Mapping) -> dict[str, dict[str, float]]:
    """The figures of a run by context and column; what was not measured is left out."""
    found: dict[str, dict[str, float]] = {}
    for context, row in metrics["contexts"].items():
        found[context] = {}
        for title, path in COLUMNS.items():
            value = row
            for key in path:
                value = value.get(key) if isinstance(value, Mapping) else None
            if isinstance(value, (int, float)):
                found[context][title] = float(value)
    return found


# Settings of a measurement, or of a baseline, in which runs of one table differ.
OF_A_RUN = ("model", "output", "seed", "data_seed", "held_out_seed", "output_dir", "json")


def recipe(metrics: Mapping) -> dict:
    """How a run was trained and measured, without its seeds and places, as far as it says so."""
    settings = metrics.get("settings", {}) | metrics.get("recipe", {})
    return {name: value for name, value in settings.items() if name not in OF_A_RUN}


def combine(runs: Sequence[Mapping]) -> dict[str, dict[str, list[float]]]:
    """Every figure of every run, by context and column, in the order of the runs.

    Raises:
        ValueError: fewer than two runs, or runs of another recipe, measured in another way, or of
            other contexts or measures than the first.
    """
    if len(runs) < 2:
        raise ValueError(f"a table over seeds needs at least two runs, not {len(runs)}.")
    recipes = [recipe(run) for run in runs]
    for number, other in enumerate(recipes[1:], 2):
        names = recipes[0].keys() | other.keys()
        if changed := sorted(key for key in names if recipes[0].get(key) != other.get(key)):
            raise ValueError(
                f"run {number} is of another recipe than the first: {changed[0]} is"
                f" {other.get(changed[0])!r} and not {recipes[0].get(changed[0])!r}; a table has"
                " runs that differ in their seeds alone."
            )
    first, *others = [figures(run) for run in runs]
    for number, other in enumerate(others, 2):
        if {c: set(row) for c, row in other.items()} != {c: set(row) for c, row in first.items()}:
            raise ValueError(
                f"run {number} has other contexts or measures than the first: evaluate all in the"
                " same way."
            )
    return {
        c: {k: [run[c][k] for run in (first, *others)] for k in row} for c, row in first.items()
    }


def table(combined: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Markdown: the means, and half a 95 % t-interval where the runs differ."""
    titles = [title for title in COLUMNS if any(title in row for row in combined.values())]
    lines = ["| context | " + " | ".join(titles) + " |", "| --- |" + " --- |" * len(titles)]
    for context, row in combined.items():
        cells = [seeds_cell(row.get(title)) for title in titles]
        lines.append(f"| `{context}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@spoken
def main(argv: Sequence[str] | None = None) -> int:
    parser = RecipeParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="folders that evaluate.py wrote")
    parser.add_argument("--output", required=True, help="file to write, without its ending")
    arguments = parser.parse_args(argv)
    runs = [json.loads(Path(run, "metrics.json").read_text()) for run in arguments.runs]
    combined = combine(runs)
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(combined, indent=1) + "\n")
    output.with_suffix(".md").write_text(table(combined))
    print(table(combined), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
