"""The tables of the paper (METHOD section 5; arXiv:2507.04754), at a chosen scale, beside the
published figures.

    python training/reproduce.py --table quad-dependent --scale cpu --output outputs/reproduce

Every row is trained and measured with several seeds, each with training and held-out images of its
own, in jobs of their own; the same command goes on where it was interrupted. Baselines are tuned
first, over the grid of `studies/baselines.py`, with a seed that the table does not use. Writes
`TABLE-SCALE.md`, `.csv`, `.tex` and `.json`."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from hf_intervene.data import load_digits
from hf_intervene.errors import spoken
from hf_intervene.metrics.transport import directions
from hf_intervene.trainer.checkpoints import check_writable
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
from hf_intervene.training.studies.reproduced import (
    HEADED,
    PUBLISHED,
    earlier_table,
    images_a_side,
    measures,
    write,
)
from hf_intervene.training.studies.seeds import run_name


TUNING_SEED = 1000

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
    # rows that were kept may have others
    counts = " or ".join(map(str, sorted({len(found) for found in results.values()})))
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
