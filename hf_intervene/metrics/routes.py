"""Routes: by which way an intervention reaches the image (METHOD section 2, steps 1 and 3;
arXiv:2507.04754).

An intervention on a concept does two things in the head: the concept's noise goes through A_int in
place of A_obs, and its incoming edges are cut. `InterventionHead.forward` lets the two be done one
at a time: the exogenous layer sees `targets`, the intervention layer `edge_targets`. From the same
noise come four images: observational, intervened, with the concept's own noise alone, and with the
edges alone.

A concept that no other causes loses nothing with its edges. An effect through cut edges there is no
effect of the concept: the decoder reads "hears nobody" as a sign of the context, and two such signs
at once are new to it.
"""

from dataclasses import asdict, dataclass

import numpy as np

from .detector import Detector, Share
from .presence import presence_shares
from .reconstruction import mean_interval


@dataclass
class Routes:
    """
    Args:
        change: mean absolute change of the pixels, in [0, 1], by the whole intervention.
        change_interval: its 95 % interval.
        own: change by the concept's own noise alone (A_int, edges kept) over `change`.
        edges: change by the edges alone (A_obs, edges cut) over `change`. The two need not add up
            to 1. Both are `None` if nothing changes.
        rates: with a detector that can tell the concept, its rate in the `observational`,
            `intervened`, `own` and `edges` images.
        outside: with a detector, share of the change of its probabilities that falls on other
            concepts; `None` without.
    """

    change: float
    change_interval: tuple[float, float]
    own: float | None
    edges: float | None
    rates: dict[str, Share] | None = None
    outside: float | None = None

    def to_dict(self) -> dict:
        """As JSON holds it."""
        return asdict(self)


def compare_routes(
    observational: np.ndarray,
    intervened: np.ndarray,
    own: np.ndarray,
    edges: np.ndarray,
    concept: str | None = None,
    detector: Detector | None = None,
    seed: int = 0,
) -> Routes:
    """Compare the four images of each noise. All are float images (n, H, W, C) in [0, 1]; row i has
    the same noise in each.

    Args:
        observational: nothing intervened on.
        intervened: the concept intervened on, as trained.
        own: A_int for the concept, its edges kept.
        edges: A_obs for the concept, its edges cut.
        concept: its name, for the detector.
        detector: of concepts.
        seed: of the bootstrap.

    Raises:
        ValueError: images of different shapes.
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
