"""What the published protocol can tell apart: 64 generated images, each 20 times, against 1,280
real ones (METHOD section 5).

    python training/studies/protocol.py --resolution 32 --output outputs/protocol

"Generated" images are real ones here, a known share of which are observational images in a context
with an intervention: a model that ignores the intervention so often. Distances to 1,280 real
images, drawn anew each time, are measured with various numbers of distinct images; 64 are the
published protocol (to repeat all of them leaves a distribution as it is), 1,280 the independent
one. The power is how often the worse of two sets, an exact one and a spoilt one, has the larger
distance. Writes `protocol.json` and `protocol.md`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.stats import binomtest
from tqdm.auto import tqdm

from hf_intervene.contexts import OBS
from hf_intervene.data import quad
from hf_intervene.errors import spoken
from hf_intervene.metrics.transport import (
    PAPER_DISTINCT,
    PAPER_REPEATS,
    directions,
    project,
    sliced_w2,
)
from hf_intervene.trainer.checkpoints import check_writable, write_whole
from hf_intervene.trainer.simulated import HELD_OUT_SEED


REAL = PAPER_DISTINCT * PAPER_REPEATS
SIZES = (16, PAPER_DISTINCT, 256, REAL)  # distinct images
SHARES = (0.0, 0.1, 0.25, 0.5, 1.0)  # of observational images among them


def spoilt(exact: np.ndarray, observational: np.ndarray, size: int, share: float) -> np.ndarray:
    """`size` rows, the nearest whole number to `share` of them observational."""
    replaced = round(share * size)
    return np.concatenate([exact[: size - replaced], observational[:replaced]])


def distances(
    context: str, resolution: int, seed: int, axes: np.ndarray, variant: str = "dependent"
) -> np.ndarray:
    """Sliced W2 of sets of every size and share from one set of real images of a context, (sizes,
    shares). All sets are drawn independently, but that a smaller set is part of the larger one.

    Args:
        context: with an intervention.
        resolution: of the images.
        seed: of them.
        axes: random directions; see `transport.directions`.
        variant: of quad.
    """

    def drawn(name: str, number: int) -> np.ndarray:
        latents = quad.sample_latents(
            name, REAL, variant, HELD_OUT_SEED + (1 + len(SHARES)) * seed + number
        )
        return project(quad.render(latents, resolution), axes)

    real = drawn(context, len(SHARES))
    measured = np.zeros((len(SIZES), len(SHARES)))
    for k, share in enumerate(SHARES):
        exact, observational = (
            drawn(context, k),
            drawn(OBS, k) if share else np.zeros((0, axes.shape[1]), np.float32),
        )
        for row, size in enumerate(SIZES):
            measured[row, k] = sliced_w2(real, spoilt(exact, observational, size, share))
    return measured


def power(measured: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How often a spoilt set has the larger distance than the exact one of the same draw, (sizes,
    shares), and its 95 % interval (Wilson), (sizes, shares, 2). Of distances (draws, sizes,
    shares); the first share is 0, of which it is NaN."""
    right = (measured[..., 1:] > measured[..., :1]).sum(0)
    intervals = [
        [binomtest(int(n), len(measured)).proportion_ci(0.95, "wilson") for n in row]
        for row in right
    ]
    bounds = np.array([[(x.low, x.high) for x in row] for row in intervals])
    return tuple(
        np.concatenate([np.full_like(x[:, :1], np.nan, dtype=float), x], 1)
        for x in (right / len(measured), bounds)
    )


def table(results: dict[str, list]) -> str:
    """Markdown of distances and power, over all draws of all contexts."""
    measured = np.concatenate(
        [np.array(rows) for rows in results.values()]
    )  # (draws, sizes, shares)
    found, bounds = power(measured)
    lines = [
        f"| distinct images | floor | {' | '.join(f'{s:.0%} observational' for s in SHARES[1:])} |",
        "| --- " * 6 + "|",
    ]
    means, spreads = measured.mean(0), measured.std(0, ddof=1)
    for k, size in enumerate(SIZES):
        note = {PAPER_DISTINCT: " (published)", REAL: " (independent)"}.get(size, "")
        cells = [f"{means[k, 0]:.3f} ± {spreads[k, 0]:.3f}"]
        cells += [
            f"{means[k, j]:.3f} ± {spreads[k, j]:.3f}; {found[k, j]:.0%} [{bounds[k, j, 0]:.0%},"
            f" {bounds[k, j, 1]:.0%}]"
            for j in range(1, len(SHARES))
        ]
        lines.append(f"| {size:,}{note} | {' | '.join(cells)} |")
    return "\n".join(
        [
            *lines,
            "",
            (
                f"Sliced W2 to {REAL:,} real images, mean ± standard deviation over {len(measured)}"
                f" draws in {len(results)} contexts ({', '.join(results)}); how often the spoilt"
                " set is ranked as the worse one [95 %]. 50 % is chance. A draw is new images of"
                " both sets; of two models that are compared the real images are the same, as"
                " here."
            ),
            "",
        ]
    )


@spoken
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True)
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=20, help="draws in each context (default 20)")
    parser.add_argument(
        "--projections",
        type=int,
        default=500,
        help="random directions of the distance (default 500)",
    )
    parser.add_argument(
        "--contexts",
        nargs="+",
        default=list(quad.CONCEPTS),
        metavar="CONTEXT",
        help="with an intervention",
    )
    arguments = parser.parse_args(argv)
    if OBS in arguments.contexts or arguments.seeds < 2:
        raise ValueError(
            "the experiment needs contexts with an intervention, and two draws of each at least."
        )
    check_writable(arguments.output)
    for context in arguments.contexts:
        # complains before anything is drawn
        quad.render(quad.sample_latents(context, 1), arguments.resolution)
    axes = directions(3 * arguments.resolution**2, arguments.projections)
    results = {}
    for context in tqdm(arguments.contexts, desc="contexts", disable=None):
        results[context] = [
            distances(context, arguments.resolution, s, axes).tolist()
            for s in range(arguments.seeds)
        ]
    text = table(results)
    print(text)
    settings = {"sizes": SIZES, "shares": SHARES, "settings": vars(arguments)}
    write_whole(
        Path(arguments.output, "protocol.json"),
        json.dumps(settings | {"distances": results}, indent=1),
    )
    write_whole(Path(arguments.output, "protocol.md"), text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
