"""What each addition to the paper's module is worth: same data, same steps, several seeds.

    python training/ablation.py --config training/configs/ablation.yaml --output outputs/ablation --jobs 2

Every variant changes one setting of the configuration. Each job is a run of train.py and one of evaluate.py in a process of its own, on
one core; a finished job is not run again. Writes `ablation.json` and `ablation.md`.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from hf_intervene.training.seeds import mean_cell, run_name


HERE = Path(__file__).parent
VARIANTS: dict[str, dict[str, str]] = {
    "default": {},
    "no free block": {"free_blocks": "0"},
    "incoming edges kept (soft)": {"intervention": "soft"},
    "batch norm in the head": {"norm": "batch"},
    "batch norm in the base": {"base_norm": "batch"},
    "reduced form of the paper": {"propagation_steps": "1"},
    "posterior told the targets, not centred": {"posterior": "conditional"},
    "posterior not told the targets": {"posterior": "unconditional"},
    "no moment matching": {"moment_matching": "0"},
}
MEASURES = ("concept", "composition", "bits per pixel")


def run_job(config: str, folder: Path, settings: dict[str, str], seed: int, images: int) -> dict[str, float]:
    """Train and measure one variant with one seed; the measures by name."""
    measured = folder / "metrics" / "metrics.json"
    if not measured.exists():
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        changes = [word for key, value in settings.items() for word in (f"--{key}", value)]
        train = ["train.py", "--config", config, "--output_dir", str(folder), "--seed", str(seed), "--resume", "auto"]
        measure = ["evaluate.py", "--model", str(folder / "model"), "--output", str(folder / "metrics")]
        measure += ["--images", str(images), "--protocol", "independent"]
        for script, *options in (train + changes, measure):
            done = subprocess.run([sys.executable, HERE / script, *options], env=environment, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{folder}: {done.stderr.strip().splitlines()[-1]}")
    means = json.loads(measured.read_text())["means"]
    print(f"{folder.name}: concept {means['concept']['independent']['distance']:.3f}", flush=True)
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
    floors = [np.mean([row[f"{kind} floor"] for row in rows]) for kind in ("concept", "composition")]
    lines.append(f"| floor | {floors[0]:.3f} | {floors[1]:.3f} | |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=str(HERE / "configs" / "ablation.yaml"))
    parser.add_argument("--output", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=1280, help="images a side of each distance")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one core each")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments = parser.parse_args(argv)
    out = Path(arguments.output)
    jobs = [(variant, seed) for seed in range(arguments.seeds) for variant in arguments.variants]

    def run(job: tuple[str, int]) -> dict[str, float]:
        variant, seed = job
        folder = out / run_name(variant, seed)
        return run_job(arguments.config, folder, VARIANTS[variant], seed, arguments.images)

    try:
        with ThreadPoolExecutor(arguments.jobs) as pool:
            measures = dict(zip(jobs, pool.map(run, jobs)))
    except (OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    results = {v: [measures[v, seed] for seed in range(arguments.seeds)] for v in arguments.variants}
    (out / "ablation.json").write_text(json.dumps(results, indent=1))
    (out / "ablation.md").write_text(table(results))
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
