"""What each addition to the paper's module is worth: same data, same steps, several seeds.

    python training/studies/ablation.py --config training/configs/ablation.yaml --output outputs/ablation --jobs 2

Every variant changes one setting of the configuration. Each job is a run of train.py and one of
evaluate.py in a process of its own, on one core; a finished job is not run again. Writes
`ablation.json` and `ablation.md`."""  # noqa: E501

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from hf_intervene.errors import spoken
from hf_intervene.training.studies.jobs import RECIPES, Job, options, run_jobs, training_commands
from hf_intervene.training.studies.seeds import mean_cell, run_name


VARIANTS: dict[str, dict[str, str]] = {
    "default": {},
    "no free block": {"free_blocks": "0"},
    "no context prediction": {"context_prediction": "0"},
    "no edit consistency": {"edit_consistency": "0"},
    "no free invariance": {"free_invariance": "0"},
    "none of the three terms": {
        "context_prediction": "0",
        "edit_consistency": "0",
        "free_invariance": "0",
    },
    "no fit of the prior": {"prior_steps": "0"},
    "AdamW alone": {"optimizer": "adamw"},
    "no warm-up of beta": {"beta_warmup": "0"},
    "Bernoulli likelihood": {"likelihood": "bernoulli"},
    "batch norm in the base": {"base_norm": "batch"},
    "the paper's head": {"mechanism": "mlp"},
    "the paper's head and likelihood": {"mechanism": "mlp", "likelihood": "bernoulli"},
}
MEASURES = ("concept", "composition", "bits per pixel")


def measures(metrics: dict) -> dict[str, float]:
    means = metrics["means"]
    return {
        "concept": means["concept"]["independent"]["distance"],
        "composition": means["composition"]["independent"]["distance"],
        "bits per pixel": means["concept"]["bits_per_pixel"],
        "concept floor": means["concept"]["independent"]["floor"],
        "composition floor": means["composition"]["independent"]["floor"],
    }


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Mean over seeds +- the half width of its 95 % t-interval, by variant."""
    lines = ["| variant | " + " | ".join(MEASURES) + " |", "| --- |" + " --- |" * len(MEASURES)]
    for variant, rows in results.items():
        cells = [mean_cell([row[measure] for row in rows]) for measure in MEASURES]
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    rows = [row for variant in results.values() for row in variant]
    floors = [
        np.mean([row[f"{kind} floor"] for row in rows]) for kind in ("concept", "composition")
    ]
    lines.append(f"| floor | {floors[0]:.3f} | {floors[1]:.3f} | |")
    return "\n".join(lines) + "\n"


@spoken
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=str(RECIPES / "configs" / "ablation.yaml"))
    parser.add_argument("--output", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=1280, help="images a side of each distance")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one core each")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments = parser.parse_args(argv)
    out = Path(arguments.output)
    measured = ["--images", str(arguments.images), "--protocol", "independent"]
    jobs = {}
    for seed in range(arguments.seeds):
        for variant in arguments.variants:
            folder = out / run_name(variant, seed)
            trained = [
                "--config",
                arguments.config,
                "--seed",
                str(seed),
                *options(VARIANTS[variant]),
            ]
            jobs[variant, seed] = Job(folder, partial(training_commands, folder, trained, measured))
    failed = run_jobs(list(jobs.values()), arguments.jobs)
    if failed:
        print(
            "\n".join(f"error: {job.folder}: {reason}" for job, reason in failed.items()),
            file=sys.stderr,
        )
        return 1
    results = {
        v: [measures(jobs[v, seed].metrics()) for seed in range(arguments.seeds)]
        for v in arguments.variants
    }
    (out / "ablation.json").write_text(json.dumps(results, indent=1))
    (out / "ablation.md").write_text(table(results))
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
