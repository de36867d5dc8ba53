"""The tables that `training/reproduce.py` writes: what they show of each run, beside the published
figures.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from hf_intervene.trainer.checkpoints import write_whole
from hf_intervene.training.studies.seeds import mean_cell, seed_interval
from hf_intervene.training.studies.verdicts import LEVEL, compare_rows


HEADED = "end-to-end"  # the row that the others are compared with

# Published means over five seeds: concept, composition (sliced Wasserstein, paper's protocol),
# reconstruction (bits per pixel).
PUBLISHED = {
    "quad-independent": {
        HEADED: (0.063, 0.081, 0.519),
        "fine-tune": (0.059, 0.086, 0.518),
        "frozen": (0.086, 0.132, 0.559),
        "base": (0.175, 0.288, 0.444),
        "base pooled": (0.166, 0.248, 0.446),
        "head pooled": (0.202, 0.306, 0.840),
        "ada-gvae": (0.335, 0.355, 2.017),
        "beta-tcvae": (0.330, 0.346, 1.973),
        "tvae": (0.334, 0.341, 2.048),
    },
    "quad-dependent": {
        HEADED: (0.116, 0.127, 0.828),
        "fine-tune": (0.112, 0.121, 0.840),
        "frozen": (0.121, 0.134, 0.889),
        "base": (0.170, 0.222, 0.767),
        "base pooled": (0.167, 0.212, 0.746),
        "head pooled": (0.166, 0.203, 0.752),
        "ada-gvae": (0.375, 0.377, 2.443),
        "beta-tcvae": (0.366, 0.374, 2.408),
        "tvae": (0.370, 0.368, 2.455),
    },
    # Of the light VAE where it was published, else of the NVAE base; there is no held-out set.
    "mnist": {
        HEADED: (0.109, None, 0.259),
        "fine-tune": (0.112, None, 0.235),
        "frozen": (0.052, None, 0.161),
        "base": (0.127, None, 0.181),
        "base pooled": (0.105, None, 0.139),
        "head pooled": (0.099, None, 0.143),
        "ada-gvae": (0.500, None, 1.035),
        "beta-tcvae": (0.484, None, 1.036),
        "tvae": (0.486, None, 1.037),
    },
    # Of the NVAE base.
    "ident3d": {
        HEADED: (0.014, 0.051, 0.528),
        "fine-tune": (0.031, 0.063, 0.549),
        "frozen": (0.048, 0.063, 0.609),
        "base": (0.056, 0.092, 4.966),
        "base pooled": (0.049, 0.056, 0.559),
        "head pooled": (0.041, 0.068, 0.516),
        "ada-gvae": (0.249, 0.251, 3.267),
        "beta-tcvae": (0.257, 0.254, 3.261),
        "tvae": (0.254, 0.256, 3.282),
    },
}

# Columns of the table: measures of a run.
HEADERS = {
    "concept": "concept distance, independent",
    "over floor": "concept ratio, independent",
    "all pairs": "composition distance, independent",
    "over its floor": "composition ratio, independent",
    "paper's pairs": "paper's pairs distance, independent",
    "concepts there": "concept presence",
    "compositions there": "composition presence",
    "bits per pixel": "concept bits per pixel",
    "out of distribution": "composition bits per pixel",
    "Bernoulli bits per pixel": "concept Bernoulli bits per pixel",
    "above entropy": "concept bits above entropy",
    "concept, paper's protocol": "concept distance, paper",
    "compositions, paper's protocol": "paper's pairs distance, paper",
}
# What rows are compared by, and whether more is better.
COMPARED = {
    "concept distance, independent": -1,
    "composition distance, independent": -1,
    "concept presence": 1,
    "composition presence": 1,
}


# Of runs with the paper's likelihood, which is not normalised; the published figures are of it.
OF_BERNOULLI = {
    "bernoulli_bits_per_pixel": "Bernoulli bits per pixel",
    "bits_above_entropy": "bits above entropy",
}
Results = Mapping[str, Mapping[str, Mapping]]  # `run_of` by row and seed


def run_of(metrics: Mapping, paper_pairs: Sequence[str] = ()) -> dict:
    """What a table keeps of one run: `measures`, means over contexts by name, and `contexts`, the
    figures of each. `images`: a side of its distances, fewer where a data set has no more.

    Args:
        metrics: what evaluate.py, or a baseline, wrote.
        paper_pairs: the compositions that the paper reports; none: all.
    """
    contexts = {name: context_figures(row) for name, row in metrics["contexts"].items()}
    kinds = {name: row["kind"] for name, row in metrics["contexts"].items()}
    groups = {
        kind: [name for name, own in kinds.items() if own == kind]
        for kind in ("concept", "composition")
    }
    groups["paper's pairs"] = [
        name for name in groups["composition"] if name in paper_pairs or not paper_pairs
    ]
    found = {}
    for kind, names in groups.items():
        for measure in dict.fromkeys(key for name in names for key in contexts[name]):
            values = [contexts[name][measure] for name in names if measure in contexts[name]]
            found[f"{kind} {measure}"] = float(np.mean(values))
        for protocol in ("independent", "paper"):
            distance, floor = (
                found.get(f"{kind} {part}, {protocol}") for part in ("distance", "floor")
            )
            if distance is not None and metrics["means"][_OF[kind]][protocol]["ratio"] is not None:
                found[f"{kind} ratio, {protocol}"] = distance / floor
    images = int(next(iter(metrics["contexts"].values()))["images"])
    return {"measures": found, "contexts": contexts, "images": images}


_OF = {"concept": "concept", "composition": "composition", "paper's pairs": "composition"}


def context_figures(row: Mapping) -> dict[str, float]:
    """The figures of one context, by name."""
    found = {}
    for protocol in ("independent", "paper"):
        for key in ("distance", "floor", "mean_shift", "mean_shift_floor"):
            if row.get(protocol, {}).get(key) is not None:
                found[f"{key.replace('_', ' ')}, {protocol}"] = row[protocol][key]
    names = {"bits_per_pixel": "bits per pixel", **OF_BERNOULLI}
    found |= {name: row[key] for key, name in names.items() if key in row}
    for side, name in (("generated", "presence"), ("real", "presence of real images")):
        share = row.get("presence", {}).get(side, {}).get("all_wanted")
        if share is not None:
            found[name] = share["value"]
    return {name: float(value) for name, value in found.items()}


def measured(results: Results, row: str) -> list[Mapping[str, float]]:
    """The measures of every seed of a row."""
    return [run["measures"] for run in results[row].values()]


def cells(results: Results, published: Mapping[str, tuple]) -> pd.DataFrame:
    """The table as text, one line for each row of `measures` over seeds, and one for the floors."""
    rows = {}
    for row in results:
        rows[row] = {}
        for header, measure in HEADERS.items():
            values = [found[measure] for found in measured(results, row) if measure in found]
            rows[row][header] = (
                (f"{np.mean(values):.1f}" if "ratio" in measure else mean_cell(values))
                if values
                else ""
            )
        figures = [f"{x:.3f}" for x in published.get(row, ()) if x is not None]
        rows[row]["published"] = " / ".join(figures)
    floors = [found for row in results for found in measured(results, row)]
    rows["floor"] = {
        header: f"{np.mean([found[measure.replace('distance', 'floor')] for found in floors]):.3f}"
        for header, measure in HEADERS.items()
        if "distance" in measure and all(measure in found for found in floors)
    }
    frame = pd.DataFrame.from_dict(rows, orient="index").fillna("")
    return frame.loc[:, (frame != "").any()]


def markdown(frame: pd.DataFrame) -> str:
    lines = [
        ["", *frame.columns],
        ["---"] * (1 + len(frame.columns)),
        *([name, *row] for name, row in zip(frame.index, frame.values)),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def latex(frame: pd.DataFrame) -> str:
    """For the package booktabs."""
    style = (
        frame.style.format(escape="latex")
        .format_index(escape="latex", axis=0)
        .format_index(escape="latex", axis=1)
    )
    return style.to_latex(hrules=True).replace("±", "$\\pm$")


def long_form(results: Results, published: Mapping[str, tuple]) -> pd.DataFrame:
    """One line for each row and measure, for machines."""
    names = (
        "concept distance, paper",
        "paper's pairs distance, paper",
        "concept Bernoulli bits per pixel",
    )
    lines = []
    for row in results:
        known, seeds = dict(zip(names, published.get(row, ()))), measured(results, row)
        for measure in (name for name in seeds[0] if all(name in found for found in seeds)):
            values = [found[measure] for found in seeds]
            mean, width = seed_interval(values)
            lines.append(
                (row, measure, mean, mean - width, mean + width, len(values), known.get(measure))
            )
    return pd.DataFrame(
        lines, columns=["row", "measure", "mean", "low", "high", "seeds", "published"]
    )


def comparisons(results: Results) -> list[dict]:
    """`compare_rows` of the row that heads the table."""
    if HEADED not in results:
        return []
    by_seed = {
        row: {int(seed): run["measures"] for seed, run in seeds.items()}
        for row, seeds in results.items()
    }
    return compare_rows(by_seed, HEADED, COMPARED)


def reading(results: Results) -> list[str]:
    """What the figures say about the row that heads the table, in sentences."""
    lines = []
    for measure in COMPARED:
        found = [line for line in comparisons(results) if line["measure"] == measure]
        if found:
            parts = [
                f"{verdict} of {', '.join(names)}"
                if verdict != "level"
                else f"level with {', '.join(names)}"
                for verdict in ("ahead", "level", "behind")
                if (names := [line["against"] for line in found if line["verdict"] == verdict])
            ]
            lines.append(f"By {measure}, {HEADED} is {'; '.join(parts)}.")
    if lines:
        lines.append(
            f"Ahead and behind: p < {LEVEL} in a t-test paired over seeds, corrected over all"
            " comparisons (Holm)."
        )
    return lines


def missing(results: Results, rows: Sequence[str], seeds: int) -> list[str]:
    """What a caption says is not there: rows, and seeds of rows."""
    absent = [row for row in rows if row not in results]
    lines = [f"Not run: {', '.join(absent)}."] if absent else []
    for row, runs in results.items():
        lacking = [str(seed) for seed in range(seeds) if str(seed) not in runs]
        if lacking:
            lines.append(f"{row}: without seeds {', '.join(lacking)} of {seeds}.")
    return lines


def caption(results: Results, published: bool, lacking: Sequence[str]) -> str:
    """The sentences under a table, what is missing first."""
    # rows that were kept may have others
    counts = " or ".join(map(str, sorted({len(runs) for runs in results.values()})))
    sides = {run["images"] for runs in results.values() for run in runs.values()}
    words = (
        f"Mean ± half the 95 % t-interval over {counts} seeds;"
        f" {' or '.join(map(str, sorted(sides)))} images a side. Sliced 2-Wasserstein distances,"
        " independent protocol where nothing else is said. Bits per pixel are a code length, but"
        " for those by the paper's Bernoulli, which is not normalised. Tuned by single concepts"
        " alone (docs/protocol.md)."
    )
    if published:
        words += " Published: concept / composition / Bernoulli bits per pixel, paper's protocol."
    return " ".join([*lacking, words])


def write(
    name: str,
    results: Results,
    published: Mapping[str, tuple],
    notes: Sequence[str],
    out: Path,
    recipe: Mapping,
    lacking: Sequence[str] = (),
) -> str:
    """Write the table in all its forms; returns the Markdown."""
    frame = cells(results, published)
    under = caption(results, bool(published), lacking)
    text = markdown(frame) + f"\n{under}\n"
    text += "".join(f"\n- {line}" for line in [*reading(results), *notes]) + "\n"
    found = {
        "recipe": recipe,
        "caption": under,
        "results": results,
        "comparisons": comparisons(results),
        "notes": notes,
    }
    write_whole(out / f"{name}.md", text)
    write_whole(out / f"{name}.tex", latex(frame))
    write_whole(out / f"{name}.csv", long_form(results, published).to_csv(index=False))
    write_whole(out / f"{name}.json", json.dumps(found, indent=1))
    return text


def earlier_table(path: Path, rows: Sequence[str], recipe: Mapping) -> dict:
    """What the JSON file of a table holds of these rows: `results` and `notes`. The rows that a
    call leaves out stay in the table.

    Raises:
        ValueError: one sentence: the file is there and no table, or its results are of another
            recipe.
    """
    if not path.exists():
        return {"results": {}, "notes": []}
    try:
        table = json.loads(path.read_text())
        results = {row: table["results"][row] for row in rows if row in table["results"]}
        notes = [note for note in table["notes"] if note.partition(":")[0] in results]
        then = dict(table["recipe"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no table that this command wrote: move it away, or choose another --output."
        ) from error
    now = json.loads(json.dumps(recipe))
    if changed := [key for key in now if then.get(key) != now[key]]:
        raise ValueError(
            f"{path} holds results of another recipe (its {', '.join(changed)} differ): results of"
            " different recipes are not mixed; choose another --output."
        )
    return {"results": results, "notes": notes}
