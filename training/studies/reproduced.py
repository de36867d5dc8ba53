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
    "composition": "composition distance, independent",
    "over its floor": "composition ratio, independent",
    "bits per pixel": "concept bits per pixel",
    "out of distribution": "composition bits per pixel",
    "Bernoulli bits per pixel": "concept Bernoulli bits per pixel",
    "above entropy": "concept bits above entropy",
    "concept, paper's protocol": "concept distance, paper",
    "composition, paper's protocol": "composition distance, paper",
}


# Of runs with the paper's likelihood, which is not normalised; the published figures are of it.
OF_BERNOULLI = {
    "bernoulli_bits_per_pixel": "Bernoulli bits per pixel",
    "bits_above_entropy": "bits above entropy",
}


def images_a_side(metrics: dict) -> int:
    """Of the distances of one run: fewer than were asked for where a data set has no more."""
    return int(next(iter(metrics["contexts"].values()))["images"])


def measures(metrics: dict) -> dict[str, float]:
    """What a table shows of one run, by name."""
    found = {}
    for kind, mean in metrics["means"].items():
        for protocol in ("independent", "paper"):
            for key in ("distance", "floor", "ratio", "mean_shift", "mean_shift_floor"):
                # older jobs have no shifts, few images no ratio
                if mean[protocol].get(key) is not None:
                    found[f"{kind} {key.replace('_', ' ')}, {protocol}"] = mean[protocol][key]
        found[f"{kind} bits per pixel"] = mean["bits_per_pixel"]
        for key, name in OF_BERNOULLI.items():
            if key in mean:
                found[f"{kind} {name}"] = mean[key]
    return found


def cells(results: Mapping[str, Sequence[dict]], published: Mapping[str, tuple]) -> pd.DataFrame:
    """The table as text, one line for each row of `measures` over seeds, and one for the floors."""
    rows = {}
    for row, seeds in results.items():
        rows[row] = {}
        for header, measure in HEADERS.items():
            values = [found[measure] for found in seeds if measure in found]
            rows[row][header] = (
                (f"{np.mean(values):.1f}" if "ratio" in measure else mean_cell(values))
                if values
                else ""
            )
        figures = [f"{x:.3f}" for x in published.get(row, ()) if x is not None]
        rows[row]["published"] = " / ".join(figures)
    floors = [found for seeds in results.values() for found in seeds]
    rows["floor"] = {
        header: f"{np.mean([found[measure.replace('distance', 'floor')] for found in floors]):.3f}"
        for header, measure in HEADERS.items()
        if "distance" in measure and any(measure in found for found in floors)
    }
    return pd.DataFrame.from_dict(rows, orient="index").fillna("")


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


def long_form(
    results: Mapping[str, Sequence[dict]], published: Mapping[str, tuple]
) -> pd.DataFrame:
    """One line for each row and measure, for machines."""
    names = (
        "concept distance, paper",
        "composition distance, paper",
        "concept Bernoulli bits per pixel",
    )
    lines = []
    for row, seeds in results.items():
        known = dict(zip(names, published.get(row, ())))
        for measure in (name for name in seeds[0] if all(name in found for found in seeds)):
            values = [found[measure] for found in seeds]
            mean, width = seed_interval(values)
            lines.append(
                (row, measure, mean, mean - width, mean + width, len(values), known.get(measure))
            )
    return pd.DataFrame(
        lines, columns=["row", "measure", "mean", "low", "high", "seeds", "published"]
    )


def reading(results: Mapping[str, Sequence[dict]]) -> list[str]:
    """What the figures say about the row that heads the table, in sentences."""
    if HEADED not in results or len(results[HEADED]) < 2:
        return []
    lines = []
    for kind in ("concept", "composition"):
        measure = f"{kind} distance, independent"
        intervals = {
            row: seed_interval([found[measure] for found in seeds])
            for row, seeds in results.items()
            if len(seeds) > 1 and all(measure in found for found in seeds)
        }
        mean, width = intervals.pop(HEADED)
        above = [row for row, (other, half) in intervals.items() if other - half > mean + width]
        below = [row for row, (other, half) in intervals.items() if other + half < mean - width]
        rest = [row for row in intervals if row not in above + below]
        lines.append(
            f"{kind.capitalize()} distance of {HEADED} against the others, by 95 % intervals over"
            f" seeds: lower than {', '.join(above) or 'none'}; not told apart from"
            f" {', '.join(rest) or 'none'}; higher than {', '.join(below) or 'none'}."
        )
    ours = results[HEADED]
    pairs = [
        found["composition distance, independent"] / found["concept distance, independent"]
        for found in ours
    ]
    lines.append(f"Composition distance over concept distance of {HEADED}: {mean_cell(pairs, 2)}.")
    # rows may have other numbers of seeds: those that both have
    if pooled := results.get("base pooled"):
        ratios = [
            a["concept bits per pixel"] / b["concept bits per pixel"] for a, b in zip(ours, pooled)
        ]
        lines.append(
            f"Bits per pixel of {HEADED} over those of base pooled, in distribution:"
            f" {mean_cell(ratios)}."
        )
    return lines


def write(
    name: str,
    results: Mapping[str, Sequence[dict]],
    published: Mapping[str, tuple],
    notes: Sequence[str],
    out: Path,
) -> str:
    """Write the table in all its forms; returns the Markdown."""
    frame = cells(results, published)
    text = markdown(frame) + "".join(f"\n- {line}" for line in [*reading(results), *notes]) + "\n"
    write_whole(out / f"{name}.md", text)
    write_whole(out / f"{name}.tex", latex(frame))
    write_whole(out / f"{name}.csv", long_form(results, published).to_csv(index=False))
    write_whole(out / f"{name}.json", json.dumps({"results": results, "notes": notes}, indent=1))
    return text


def earlier_table(path: Path, rows: Sequence[str]) -> dict:
    """What the JSON file of a table holds of these rows: `results` and `notes`. The rows that a
    call leaves out stay in the table.

    Raises:
        ValueError: one sentence: the file is there and no table.
    """
    if not path.exists():
        return {"results": {}, "notes": []}
    try:
        table = json.loads(path.read_text())
        results = {row: table["results"][row] for row in rows if row in table["results"]}
        return {
            "results": results,
            "notes": [note for note in table["notes"] if note.partition(":")[0] in results],
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no table that this command wrote: move it away, or choose another --output."
        ) from error
