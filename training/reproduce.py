"""The tables of the paper (METHOD section 5; arXiv:2507.04754), at a chosen scale, beside the
published figures.

    python training/reproduce.py --table quad-dependent --scale cpu --output outputs/reproduce

The protocol is fixed in `docs/protocol.md`. Every row is tuned first, over its trials of
`studies/tuning.py`, with a seed that no table reports and by single concepts alone. Then it is
trained and measured with ten seeds, each with training and held-out images of its own, in jobs of
their own; the same command goes on where it was interrupted. Writes `TABLE-SCALE.md`, `.csv`,
`.tex` and, with the figures of every context and seed, `.json`."""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tqdm.auto import tqdm

from hf_intervene.data import load_digits, quad
from hf_intervene.errors import spoken
from hf_intervene.metrics.transport import directions
from hf_intervene.trainer.checkpoints import check_writable
from hf_intervene.trainer.parsing import RecipeParser
from hf_intervene.training.studies.baseline_losses import beta_tcvae
from hf_intervene.training.studies.baselines import BASELINES
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
    missing,
    run_of,
    write,
)
from hf_intervene.training.studies.seeds import run_name
from hf_intervene.training.studies.tuning import GRID, TRIALS, TUNING_SEED, best_trial


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
SWEEPS |= {f"hidden layers {depth}": {"flow_depth": depth} for depth in (1, 3)}
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
        tuned: whether the rows are methods to be tuned.
        paper_pairs: the compositions that the paper reports, if they are not all.
        detector: whether true attributes are known, for a detector of concepts.
    """

    dataset: str
    variant: str = "dependent"
    rows: Mapping[str, dict] = field(default_factory=lambda: REGIMES)
    baselines: tuple[str, ...] = tuple(BASELINES)
    tuned: bool = True
    paper_pairs: tuple[str, ...] = ()
    detector: bool = False


TABLES = {
    "quad-dependent": Table("quad", paper_pairs=quad.PAPER_PAIRS),
    "quad-independent": Table("quad", "independent", paper_pairs=quad.PAPER_PAIRS),
    "mnist": Table("mnist"),
    "ident3d": Table("ident3d"),
    "avatars": Table("avatars", detector=True),
    "sweeps": Table("quad", rows=SWEEPS, baselines=(), tuned=False, paper_pairs=quad.PAPER_PAIRS),
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
        trials: of each row's settings; the same number for all.
    """

    config: dict[str, str]
    train: dict
    images: int
    projections: int
    seeds: int
    trials: int = TRIALS


SMALL = {name: f"reproduce/{name}.yaml" for name in ("quad", "mnist", "ident3d", "avatars")}
SCALES = {
    "smoke": Scale(
        SMALL,
        {"images_per_context": 40, "validation_images": 20, "max_steps": 3},
        64,
        20,
        seeds=2,
        trials=1,
    ),
    "cpu": Scale(SMALL, {}, 1280, 500, seeds=10),
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
        seeds=10,
    ),
}


class Plan:
    """The jobs of a table.

    Args:
        table, scale: which, and how large.
        folder: of the runs.
        mnist_digits: the setting of train.py.
    """

    def __init__(self, table: Table, scale: Scale, folder: Path, mnist_digits: str):
        self.table, self.scale, self.folder = table, scale, folder
        self.data = {
            "dataset": table.dataset,
            "variant": table.variant,
            "mnist_digits": mnist_digits,
        }
        self.config = str(RECIPES / "configs" / scale.config[table.dataset])

    def jobs(self, rows: Sequence[str], seeds: int) -> dict[tuple[str, int], Job]:
        """All jobs by row and seed, or `tuning ROW` and the number of the trial; those that others
        wait for stand first.
        """
        jobs: dict[tuple[str, int], Job] = {}
        known = [*self.table.rows, *self.table.baselines]
        first = ["base"] if any(self._needs_base(row) for row in rows) else []
        for row in dict.fromkeys([*first, *(row for row in known if row in rows)]):
            of_base = tuple(job for (name, _), job in jobs.items() if name == "tuning base")
            tried: list[Job] = []
            for number in range(len(self.trials(row))):
                path = self.folder / "tuning" / f"{row.replace(' ', '-')}-{number}"
                after = of_base if self._needs_base(row) else ()
                told = partial(self._trial, path, row, number, of_base)
                tried.append(Job(path, told, after))
                jobs[f"tuning {row}", number] = tried[-1]
            for seed in range(seeds):
                path = self.folder / run_name(row, seed)
                base = jobs["base", seed] if self._needs_base(row) else None
                told = partial(self._run, path, row, seed, tried, base)
                jobs[row, seed] = Job(path, told, (*tried, *([] if base is None else [base])))
        return jobs

    def trials(self, row: str) -> list[dict]:
        """The settings that are tried of a row; none where there is nothing to tune."""
        return GRID[row][: self.scale.trials] if self.table.tuned else []

    def chosen(self, row: str, tried: Sequence[Job]) -> dict:
        """The settings that won, once the trials are done."""
        return self.trials(row)[best_trial([job.metrics() for job in tried])] if tried else {}

    def _needs_base(self, row: str) -> bool:
        return "{base}" in self.table.rows.get(row, {}).values()

    def _trial(self, path: Path, row: str, number: int, of_base: Sequence[Job]) -> list[Command]:
        base = None
        if self._needs_base(row):
            base = of_base[best_trial([job.metrics() for job in of_base])].folder
        return self._commands(path, row, TUNING_SEED, self.trials(row)[number], base, True)

    def _run(
        self, path: Path, row: str, seed: int, tried: Sequence[Job], base: Job | None
    ) -> list[Command]:
        folder = None if base is None else base.folder
        return self._commands(path, row, seed, self.chosen(row, tried), folder, False)

    def _commands(
        self, path: Path, row: str, seed: int, settings: dict, base: Path | None, singles: bool
    ) -> list[Command]:
        """The training and the measuring of one run, `singles`: by single concepts alone."""
        given = self.data | self.scale.train | {"seed": seed, "data_seed": seed}
        train = ["--config", self.config, *options(given)]
        only = ["--singles"] if singles else []
        if row in self.table.baselines:
            told = {"baseline": row, "output_dir": path, "images": self.scale.images}
            told |= {"held_out_seed": seed}
            words = [*options(told), *only, *train, *options(PLAIN | settings)]
            return [("studies/baselines.py", *words)]
        own = {
            key: str(base / "model" / "base") if value == "{base}" else value
            for key, value in self.table.rows[row].items()
        }
        measure = {name.replace("_", "-"): value for name, value in self.data.items()}
        measure |= {"images": self.scale.images, "projections": self.scale.projections}
        measure |= {"protocol": "both", "seed": seed}
        measure |= {} if self.table.detector else {"detector-images": 0}
        measure |= {"twins": 0} if singles or not self.table.detector else {}
        words = [*options(measure), "--no-tests", *only]
        return training_commands(path, train + options(own | settings), words)


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
    parser.add_argument("--seeds", type=int, help="default: 2 at smoke scale, else 10")
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
    plan = Plan(table, scale, out / name, arguments.mnist_digits)
    recipe = recipe_of(plan, arguments.table)
    kept = earlier_table(out / f"{name}.json", [row for row in known if row not in rows], recipe)
    jobs = plan.jobs(rows, seeds)
    workers = arguments.jobs or default_workers()
    with tqdm(total=len(jobs), desc=name, disable=None) as bar:
        failed = run_jobs(list(jobs.values()), workers, lambda job, metrics: bar.update())
    results = dict(kept["results"])
    for row in rows:
        done = {seed: jobs[row, seed].metrics() for seed in range(seeds)}
        found = {
            str(seed): run_of(metrics, table.paper_pairs)
            for seed, metrics in done.items()
            if metrics is not None
        }
        if found:
            results[row] = found
    results = {row: results[row] for row in known if row in results}
    notes = kept["notes"]
    for row in (row for row in rows if row in results and plan.trials(row)):
        tried = [jobs[f"tuning {row}", number] for number in range(len(plan.trials(row)))]
        settings = plan.chosen(row, tried)
        words = ", ".join(f"{key} {value}" for key, value in settings.items()) or "the recipe"
        notes.append(f"{row}: tuned to {words}; settings tried: {len(tried)}.")
    notes.sort(key=lambda note: list(known).index(note.partition(":")[0]))
    notes += [f"{job.folder.name} failed: {reason}" for job, reason in failed.items()]
    if results:
        caption = missing(results, known, seeds)
        published = PUBLISHED.get(arguments.table, {})
        print(write(name, results, published, notes, out, recipe, caption))
    for job, reason in failed.items():
        print(f"error: {job.folder}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def recipe_of(plan: Plan, table: str) -> dict:
    """What all results of a table have in common; see `earlier_table`."""
    text = Path(plan.config).read_bytes()
    scale = plan.scale
    return {
        "table": table,
        "config": Path(plan.config).relative_to(RECIPES).as_posix(),
        "sha256": hashlib.sha256(text).hexdigest(),
        "data": {key: str(value) for key, value in plan.data.items()},
        "train": scale.train,
        "images": scale.images,
        "projections": scale.projections,
        "trials": scale.trials,
        "rows": json.loads(json.dumps(dict(plan.table.rows), default=str)),
        "grid": {row: plan.trials(row) for row in (*plan.table.rows, *plan.table.baselines)},
    }


if __name__ == "__main__":
    sys.exit(main())
