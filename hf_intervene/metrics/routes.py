"""Routes: the two parts of the head through which an intervention changes the image.

See METHOD section 2, steps 1 and 3, and arXiv:2507.04754. An intervention on a concept does two
things in the head: the concept's noise goes through A_int instead of A_obs, and its incoming edges
are cut. `InterventionHead.forward` can do one without the other: the exogenous layer takes
`targets`, the intervention layer takes `edge_targets`. Four images are made from the same noise:
observational, intervened, with only the concept's own noise changed, and with only the edges cut.

If no other concept causes a concept, cutting its edges should change nothing. If it does change the
image, this is not an effect of the concept: the decoder uses the missing edges to recognise the
context. In training it has not seen the missing edges of two concepts together.
"""

from dataclasses import dataclass

import numpy as np

from .detector import Detector, Share
from .presence import presence_shares
from .reconstruction import mean_interval
from .results import Result


@dataclass
class Routes(Result):
    """Result of `compare_routes`.

    Args:
        change: mean absolute change of the pixels, in [0, 1], by the whole intervention.
        change_interval: its 95 % interval.
        own: the change by only the concept's own noise (A_int, edges kept), divided by `change`.
        edges: the change by only the edges (A_obs, edges cut), divided by `change`. `own` and
            `edges` need not add up to 1. Both are `None` if nothing changes.
        rates: with a detector that is usable for the concept, the rate of the concept in the
            `observational`, `intervened`, `own` and `edges` images.
        outside: with such a detector, the share of the change of its probabilities that belongs to
            other concepts; else `None`.
    """

    change: float
    change_interval: tuple[float, float]
    own: float | None
    edges: float | None
    rates: dict[str, Share] | None = None
    outside: float | None = None


def compare_routes(
    observational: np.ndarray,
    intervened: np.ndarray,
    own: np.ndarray,
    edges: np.ndarray,
    concept: str | None = None,
    detector: Detector | None = None,
    seed: int = 0,
) -> Routes:
    """Compare the four images of each noise.

    All are float images (n, H, W, C) in [0, 1]. Row i has the same noise in each.

    Args:
        observational: without an intervention.
        intervened: with an intervention on the concept, as in training.
        own: with A_int for the concept, its edges kept.
        edges: with A_obs for the concept, its edges cut.
        concept: name of the concept, for the detector.
        detector: a detector of concepts.
        seed: seed of the bootstrap.

    Raises:
        ValueError: the images have different shapes.
    """
    images = {"observational": observational, "intervened": intervened, "own": own, "edges": edges}
    if len({np.shape(x) for x in images.values()}) > 1:
        raise ValueError(
            f"four arrays of one shape are needed, not {[np.shape(x) for x in images.values()]}."
        )
    changes = {
        name: np.abs(x - observational).mean((1, 2, 3), dtype=np.float64)
        for name, x in images.items()
    }
    change, interval = mean_interval(changes["intervened"], seed=seed)
    by_own, by_edges = (
        float(changes[x].mean() / change) if change else None for x in ("own", "edges")
    )
    result = Routes(change, interval, by_own, by_edges)
    if detector is None or concept not in detector.concepts or concept in detector.unusable:
        return result
    found = {
        name: presence_shares(detector.present(x), [concept], detector.concepts, detector.usable)
        for name, x in images.items()
    }
    result.rates = {name: of.rates[concept] for name, of in found.items()}
    chances = [1 / (1 + np.exp(-detector.logits(x))) for x in (observational, intervened)]
    moved = np.abs(chances[1] - chances[0]).mean(0) * detector.usable  # (K,)
    if moved.sum() > 0:
        result.outside = float(1 - moved[detector.concepts.index(concept)] / moved.sum())
    return result
