"""The tables of the paper (METHOD section 5; arXiv:2507.04754), at a chosen scale, beside the
published figures.

    python training/reproduce.py --table quad-dependent --scale cpu --output outputs/reproduce

Every row is trained and measured with several seeds, each with training and held-out images of its
own, in jobs of their own; the same command goes on where it was interrupted. Baselines are tuned
first, over the grid of `studies/baselines.py`, with a seed that the table does not use. Writes
`TABLE-SCALE.md`, `.csv`, `.tex` and `.json`."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from hf_intervene.data import load_digits
from hf_intervene.errors import spoken
from hf_intervene.metrics.transport import directions
from hf_intervene.trainer.checkpoints import check_writable, write_whole
from hf_intervene.trainer.parsing import RecipeParser
from hf_intervene.training.studies.baseline_losses import beta_tcvae
from hf_intervene.training.studies.baselines import BASELINES, GRID
from hf_intervene.training.studies.jobs import (
    RECIPES,
    Command,
    Job,
    default_workers,
    options,
    run_jobs,
    training_commands,
)
from hf_intervene.training.studies.seeds import mean_cell, run_name, seed_interval


TUNING_SEED = 1000
HEADED = "end-to-end"  # the row that the others are compared with

# What has no head has no blocks that could fall silent early: the KL has its full weight from the
# start.
PLAIN = {"beta_warmup": 0}

# Rows: what they change in the settings of the run. `{base}` is the model of the row "base" with
# the same seed.
REGIMES = {
    HEADED: {},
    "fine-tune": {"regime": "fine-tune", "base": "{base}"},
    "frozen": {"regime": "frozen", "base": "{base}"},
    "base": {"ablation": "base", **PLAIN},
    "base pooled": {"ablation": "base-pooled", **PLAIN},
    "head pooled": {"ablation": "head-pooled"},
}
SWEEPS = {HEADED: {}}
SWEEPS |= {f"couplings {depth}": {"flow_depth": depth} for depth in (2, 8)}
SWEEPS |= {f"concept width {width}": {"concept_width": width} for width in (4, 8, 32)}
SWEEPS |= {f"beta {beta:g}": {"beta": beta} for beta in (0.25, 0.5, 2, 4)}
SWEEPS |= {f"group lasso {weight:g}": {"group_lasso": weight} for weight in (0.01, 0.1, 1)}
SWEEPS |= {f"L2 {weight:g}": {"l2": weight} for weight in (0.01, 0.1, 1)}
for term, strengths in (("context_prediction", (0, 100, 1000)), ("edit_consistency", (0, 0.1, 1))):
    SWEEPS |= {f"{term.replace('_', ' ')} {x:g}": {term: x} for x in strengths}

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


@dataclass(frozen=True)
class Table:
    """
    Args:
        dataset, variant: settings of train.py.
        rows: the settings that each row changes.
        baselines: those that it has too.
    """

    dataset: str
    variant: str = "dependent"
    rows: Mapping[str, dict] = field(default_factory=lambda: REGIMES)
    baselines: tuple[str, ...] = tuple(BASELINES)


TABLES = {
    "quad-dependent": Table("quad"),
    "quad-independent": Table("quad", "independent"),
    "mnist": Table("mnist"),
    "ident3d": Table("ident3d"),
    "avatars": Table("avatars"),
    "sweeps": Table("quad", rows=SWEEPS, baselines=()),
}


@dataclass(frozen=True)
class Scale:
    """
    Args:
        config: a configuration of `configs/`, by data set.
        train: settings of train.py that it changes.
        images: a side of every distance.
        projections: directions of it.
        seeds: how many.
        settings: how many of each baseline's grid are tried.
    """

    config: dict[str, str]
    train: dict
    images: int
    projections: int
    seeds: int
    settings: int | None = None


SMALL = {name: f"reproduce/{name}.yaml" for name in ("quad", "mnist", "ident3d", "avatars")}
SCALES = {
    "smoke": Scale(
        SMALL,
        {"images_per_context": 40, "validation_images": 20, "max_steps": 3},
        64,
        20,
        seeds=2,
        settings=1,
    ),
    "cpu": Scale(SMALL, {}, 1280, 500, seeds=3),
    # Of MNIST's 60,000 digits 42,000 are for training, and as few images are drawn. Of the 4,000
    # faces of each context of avatars 2,800 are.
    "full": Scale(
        {name: f"{name}.yaml" for name in SMALL},
        {
            "images_per_context": 35_000,
            "validation_images": 15_000,
            "validation_fraction": 0.3,
            "epochs": 100,
            "batch_size": 512,
            "patience": 20,
        },
        1280,
        500,
        seeds=5,
    ),
}


# Columns of the table: measures of a run.
HEADERS = {
    "concept": "concept distance, independent",
    "over floor": "concept ratio, independent",
    "composition": "composition distance, independent",
    "over its floor": "composition ratio, independent",
    "bits per pixel": "concept bits per pixel",
    "out of distribution": "composition bits per pixel",
    "concept, paper's protocol": "concept distance, paper",
    "composition, paper's protocol": "composition distance, paper",
}


def plan(
    table: Table, rows: Sequence[str], scale: Scale, seeds: int, folder: Path, mnist_digits: str
) -> dict[tuple[str, int], Job]:
    """The jobs of a table by row and seed, those that others wait for first."""
    config = str(RECIPES / "configs" / scale.config[table.dataset])
    data = {"dataset": table.dataset, "variant": table.variant, "mnist_digits": mnist_digits}
    measured = {"images": scale.images, "projections": scale.projections, "protocol": "both"}

    def seeded(seed: int) -> tuple[list[str], list[str]]:
        """Options of the training and of the measuring."""
        train = [
            "--config",
            config,
            *options(data | scale.train | {"seed": seed, "data_seed": seed}),
        ]
        found = {name.replace("_", "-"): value for name, value in data.items()}
        return train, options(found | measured | {"seed": seed})

    def trained(path: Path, seed: int, settings: dict, base: Job | None) -> list[Command]:
        train, measure = seeded(seed)
        found = {
            key: str(base.folder / "model" / "base") if value == "{base}" else value
            for key, value in settings.items()
        }
        return training_commands(path, train + options(found), measure)

    def baseline(path: Path, seed: int, name: str, settings: dict) -> list[Command]:
        told = {"baseline": name, "output_dir": path, "images": scale.images, "held_out_seed": seed}
        return [
            ("studies/baselines.py", *options(told), *seeded(seed)[0], *options(PLAIN | settings))
        ]

    def tuned(path: Path, seed: int, name: str, tried: Sequence[Job]) -> list[Command]:
        return baseline(path, seed, name, GRID[name][best_setting(tried)])

    jobs: dict[tuple[str, int], Job] = {}
    needs_base = [row for row in table.rows if "{base}" in table.rows[row].values()]
    first = ["base"] if set(needs_base) & set(rows) else []
    for row in dict.fromkeys([*first, *(row for row in table.rows if row in rows)]):
        for seed in range(seeds):
            path = folder / run_name(row, seed)
            base = jobs["base", seed] if row in needs_base else None
            commands = partial(trained, path, seed, table.rows[row], base)
            jobs[row, seed] = Job(path, commands, () if base is None else (base,))
    chosen = [name for name in table.baselines if name in rows]
    grid = {
        name: tuple(
            Job(path, partial(baseline, path, TUNING_SEED, name, settings))
            for number, settings in enumerate(GRID[name][: scale.settings])
            for path in [folder / "tuning" / f"{name}-{number}"]
        )
        for name in chosen
    }
    jobs |= {
        (f"tuning {name}", number): job for name in chosen for number, job in enumerate(grid[name])
    }
    for name in chosen:
        for seed in range(seeds):
            path = folder / run_name(name, seed)
            jobs[name, seed] = Job(path, partial(tuned, path, seed, name, grid[name]), grid[name])
    return jobs


def best_setting(tried: Sequence[Job]) -> int:
    """The number of the setting with the lowest concept distance."""
    return int(
        np.argmin([job.metrics()["means"]["concept"]["independent"]["distance"] for job in tried])
    )


def images_a_side(metrics: dict) -> int:
    """Of the distances of one run: fewer than were asked for where a data set has no more."""
    return int(next(iter(metrics["contexts"].values()))["images"])


def measures(metrics: dict) -> dict[str, float]:
    """What a table shows of one run, by name."""
    found = {}
    for kind, mean in metrics["means"].items():
        for protocol in ("independent", "paper"):
            for key in ("distance", "floor", "ratio", "mean_shift", "mean_shift_floor"):
                if (
                    mean[protocol].get(key) is not None
                ):  # older jobs have no shifts, few images no ratio
                    found[f"{kind} {key.replace('_', ' ')}, {protocol}"] = mean[protocol][key]
        found[f"{kind} bits per pixel"] = mean["bits_per_pixel"]
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
    names = ("concept distance, paper", "composition distance, paper", "concept bits per pixel")
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
    if pooled := results.get(
        "base pooled"
    ):  # rows may have other numbers of seeds: those that both have
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


def check_requirements(table: Table, rows: Sequence[str], mnist_digits: str) -> None:
    """Extras and data, before anything is trained.

    Raises:
        ImportError, OSError, ValueError: one sentence: what is missing, and how to get it.
    """
    directions(1, 1)  # needs POT
    if "beta-tcvae" in rows:
        beta_tcvae()  # needs pythae
    if table.dataset == "mnist":
        try:
            load_digits(mnist_digits, "test")
        except (OSError, ValueError) as error:
            raise type(error)(
                f"{str(error).removesuffix('.')}: give --mnist_digits a Hub name, a folder with"
                " MNIST's four files, or `bundled` (few digits)."
            ) from error


@spoken
def main(argv: Sequence[str] | None = None) -> int:
    parser = RecipeParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", required=True, choices=TABLES)
    parser.add_argument(
        "--scale",
        default="cpu",
        choices=SCALES,
        help="smoke: seconds a run, to try it; full: the paper's",
    )
    parser.add_argument("--output", default="outputs/reproduce")
    parser.add_argument(
        "--rows",
        nargs="+",
        metavar="ROW",
        help="only these rows (default all); others stay as they are",
    )
    parser.add_argument("--seeds", type=int, help="default: 2, 3 and 5, by scale")
    parser.add_argument(
        "--jobs", type=int, help="runs side by side (default: one for each GPU, or else core)"
    )
    parser.add_argument(
        "--mnist_digits", default="ylecun/mnist", help="bundled, a folder, or a Hub name"
    )
    arguments = parser.parse_args(argv)
    table, scale = TABLES[arguments.table], SCALES[arguments.scale]
    known = [*table.rows, *table.baselines]
    rows = arguments.rows or known
    seeds = scale.seeds if arguments.seeds is None else arguments.seeds
    name, out = f"{arguments.table}-{arguments.scale}", Path(arguments.output)
    unknown = [row for row in rows if row not in known]
    if unknown:
        raise ValueError(
            f"{arguments.table} has no row {', '.join(unknown)}: its rows are {', '.join(known)}."
        )
    if seeds < 1 or (arguments.jobs is not None and arguments.jobs < 1):
        raise ValueError("--seeds and --jobs must be at least 1.")
    check_writable(out)
    check_requirements(table, rows, arguments.mnist_digits)
    kept = earlier_table(out / f"{name}.json", [row for row in known if row not in rows])
    jobs = plan(table, rows, scale, seeds, out / name, arguments.mnist_digits)
    workers = arguments.jobs or default_workers()
    with tqdm(total=len(jobs), desc=name, disable=None) as bar:
        failed = run_jobs(list(jobs.values()), workers, lambda job, metrics: bar.update())
    results, sides = dict(kept["results"]), set()
    for row in rows:
        done = [jobs[row, seed].metrics() for seed in range(seeds)]
        if any(done):
            results[row] = [measures(metrics) for metrics in done if metrics is not None]
            sides |= {images_a_side(metrics) for metrics in done if metrics is not None}
    results = {row: results[row] for row in known if row in results}
    published = PUBLISHED.get(arguments.table, {})
    counts = " or ".join(
        map(str, sorted({len(found) for found in results.values()}))
    )  # rows that were kept may have others
    images = " or ".join(map(str, sorted(sides or {scale.images})))
    notes = [
        "Sliced 2-Wasserstein distances and bits per pixel, mean ± half the 95 % t-interval over "
        f"{counts} seeds; {images} images a side; independent protocol where "
        "nothing else is said."
    ]
    if published:
        notes[0] += (
            " Published: concept / composition / bits per pixel, paper's protocol and scale."
        )
    notes += kept["notes"]
    for row in (row for row in table.baselines if row in rows and row in results):
        settings = GRID[row][best_setting(jobs[row, 0].after)]
        notes.append(
            f"{row}: tuned to {', '.join(f'{key} {value}' for key, value in settings.items())}, of"
            f" {len(jobs[row, 0].after)} settings."
        )
    notes += [f"{job.folder.name} failed: {reason}" for job, reason in failed.items()]
    if results:
        print(write(name, results, published, notes, out))
    for job, reason in failed.items():
        print(f"error: {job.folder}: {reason}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
