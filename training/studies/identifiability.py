"""Simulation study of identifiability: what is recovered when its assumptions hold, and what when
one is dropped (METHOD section 6).

    python training/studies/identifiability.py --output outputs/identifiability

Every row is a problem of `hf_intervene.metrics.recovery`, solved with several seeds, each of them
another graph, decoder and data. A job is a minute on one core; a finished one is not run again.
Writes `identifiability.json` and `identifiability.md`."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from hf_intervene.errors import spoken
from hf_intervene.metrics.recovery import ConceptEncoder, Recovery, score, simulate_and_recover
from hf_intervene.metrics.recovery_data import simulate
from hf_intervene.trainer.checkpoints import write_whole
from hf_intervene.training.studies.rows import run_rows
from hf_intervene.training.studies.seeds import mean_cell, run_name


SAMPLES = 10_000
ROWS: dict[str, dict] = {
    f"{n:,} samples a context": {"samples": n} for n in (100, 300, 1000, 3000, SAMPLES)
}
ROWS |= {f"{d} concepts": {"d": d} for d in (3, 12, 20)}
ROWS |= {
    "concepts of 2 dimensions": {"d": 3, "width": 2},
    "noise of 0.1": {"noise": 0.1},
    "noise of 0.3": {"noise": 0.3},
    "one concept without a context": {"broken": "missing"},
    "one context that changes nothing": {"broken": "unchanged"},
    "soft interventions": {"broken": "soft"},
    "dependent rows": {"broken": "dependent-rows"},
    "a decoder that is not injective": {"broken": "folded"},
}
# with their decimals
MEASURES = {
    "mcc": 3,
    "untrained": 3,
    "floor": 3,
    "angle": 1,
    "worst_angle": 1,
    "affected": 3,
}


def run_job(name: str, seed: int, folder: Path, steps: int) -> dict:
    """One row with one seed; see `recovery.score`."""
    path = folder / "jobs" / f"{run_name(name, seed)}-steps{steps}.json"
    if path.exists() and "untrained" in (known := json.loads(path.read_text())):
        return known
    torch.set_num_threads(1)
    start = time.process_time()
    problem = {"samples": SAMPLES, **ROWS[name]}
    result = simulate_and_recover(steps=steps, seed=seed, **problem)
    result["affected"] = result["correlations"][result["affected"]]
    result["untrained"] = untrained_mcc(seed, problem)
    result |= {"processor_seconds": time.process_time() - start, "problem": problem, "seed": seed}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(result, indent=1))
    print(f"{name}, seed {seed}: MCC {result['mcc']:.3f}", flush=True)
    return result


def untrained_mcc(seed: int, problem: dict) -> float:
    """The MCC of an encoder that was never trained, on the same data."""
    simulation = simulate(seed=seed, **{k: v for k, v in problem.items() if k != "samples"})
    d, width = simulation.shift.shape[1:]
    x = simulation.sample(0, 2000, seed)[0]
    torch.manual_seed(seed)
    encoder = ConceptEncoder(x.shape[1], d * width).requires_grad_(False)
    untrained = Recovery(encoder, np.eye(d * width), x.mean(0), x.std(0), width, float("nan"))
    return score(simulation, untrained)["mcc"]


def table(results: dict[str, list[dict]]) -> str:
    """Mean over seeds +- the half width of its 95 % t-interval, by row."""
    lines = [
        "| | MCC | untrained | floor | principal angle, mean | largest | correlation of the last"
        " concept |",
        "| --- |" + " --- |" * len(MEASURES),
    ]
    for name, rows in results.items():
        cells = [
            mean_cell([row[measure] for row in rows], decimals)
            for measure, decimals in MEASURES.items()
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@spoken
def main(argv: Sequence[str] | None = None) -> int:
    return run_rows(argv, __doc__, "identifiability", ROWS, 6000, run_job, table)


if __name__ == "__main__":
    sys.exit(main())
