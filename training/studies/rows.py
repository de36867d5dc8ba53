"""The command of a study of rows and seeds: its jobs run side by side, and make a table."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from hf_intervene.trainer.checkpoints import write_whole


def run_rows(
    argv: Sequence[str] | None,
    doc: str,
    name: str,
    rows: Mapping[str, Mapping],
    steps: int,
    job: Callable[[str, int, Path, int], dict],
    table: Callable[[dict[str, list[dict]]], str],
) -> int:
    """Parse the arguments, run the jobs, and write `name.json` and `name.md`.

    Args:
        argv: the arguments; `None`: the process's.
        doc: the docstring of the study, whose first line describes the command.
        name: of the two files.
        rows: what there is, by the label of its row.
        steps: of the training in a job, unless the command says otherwise.
        job: result of a row, a seed, the folder and the steps; a function of a module.
        table: Markdown of the results, of each row by seed.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--output", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=steps, help=f"of training (default {steps})")
    parser.add_argument("--jobs", type=int, default=1, help="problems side by side, one core each")
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=rows,
        default=list(rows),
        metavar="ROW",
        help=f"of {', '.join(rows)}",
    )
    arguments = parser.parse_args(argv)
    out = Path(arguments.output)
    out.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(arguments.jobs) as pool:
        jobs = {
            (row, seed): pool.submit(job, row, seed, out, arguments.steps)
            for seed in range(arguments.seeds)
            for row in arguments.rows
        }
        results = {
            row: [jobs[row, seed].result() for seed in range(arguments.seeds)]
            for row in arguments.rows
        }
    text = table(results)
    write_whole(out / f"{name}.json", json.dumps(results, indent=1))
    write_whole(out / f"{name}.md", text)
    print(text)
    return 0
