"""How the settings of every method are chosen, ours and the rivals' alike: the protocol of
`docs/protocol.md`.

Each method has the same number of trials, a fixed list whose first entry is the recipe as it is. A
trial is trained with a seed that no table reports and measured on `obs` and single concepts alone.
"""

from collections.abc import Mapping, Sequence

import numpy as np


TUNING_SEED = 1000
TRIALS = 8

_RATES = [{"learning_rate": 0.001}, {"learning_rate": 0.004}]
_HEAD = [{}, *_RATES, {"beta": 0.5}, {"beta": 2.0}]
_TERMS = [{"context_prediction": 100.0}, {"edit_consistency": 1.0}, {"free_invariance": 30.0}]
_PLAIN = [{}, *_RATES, {"beta": 0.25}, {"beta": 0.5}, {"beta": 2.0}, {"beta": 4.0}, {"beta": 8.0}]
_WIDE = [{"beta": beta} for beta in (1.0, 2.0, 8.0, 32.0)] + [
    {"beta": beta, **rate} for beta in (8.0, 32.0) for rate in _RATES
]
# By row of a table: settings of train.py; `weight` is that of a baseline's own term. Without blocks
# none of our terms can be computed, so those rows have more weights of the KL instead.
GRID: dict[str, list[dict[str, float]]] = {
    "end-to-end": _HEAD + _TERMS,
    "fine-tune": _HEAD + _TERMS,
    "frozen": _HEAD + _TERMS,
    "base": _PLAIN,
    "base pooled": _PLAIN,
    "head pooled": _HEAD + [{"beta": 4.0}, *_TERMS[1:]],
    "conditional-vae": _WIDE,
    "ada-gvae": _WIDE,
    "beta-tcvae": [
        {"beta": 1.0, "weight": 4.0},
        {"beta": 0.5, "weight": 2.0},
        {"beta": 2.0, "weight": 8.0},
        {"beta": 1.0, "weight": 8.0},
        {"beta": 4.0, "weight": 4.0},
        {"beta": 4.0, "weight": 16.0},
        *({"beta": 1.0, "weight": 4.0, **rate} for rate in _RATES),
    ],
    "tvae": [
        {"beta": 1.0, "weight": 10.0},
        {"beta": 2.0, "weight": 10.0},
        {"beta": 0.5, "weight": 10.0},
        {"beta": 2.0, "weight": 100.0},
        {"beta": 8.0, "weight": 10.0},
        {"beta": 2.0, "weight": 1.0},
        *({"beta": 2.0, "weight": 10.0, **rate} for rate in _RATES),
    ],
}


def choice_score(metrics: Mapping) -> float:
    """What a trial is chosen by, at most about 1: the mean of

        floor / distance, of the means over `obs` and single concepts;
        min(1, share of samples that show the concept / the same of real images), the mean over
        concepts, where a detector of true attributes is there.

    Raises:
        ValueError: a combination was measured, which a choice must not see.
    """
    seen = [name for name, row in metrics["contexts"].items() if row["kind"] != "concept"]
    if seen:
        raise ValueError(
            f"{seen[0]} was measured in a trial: settings are chosen by single concepts alone."
        )
    mean = metrics["means"]["concept"]["independent"]
    parts = [mean["floor"] / mean["distance"]]
    shares = [row["presence"] for row in metrics["contexts"].values() if "presence" in row]
    ratios = [
        min(1.0, found["generated"]["all_wanted"]["value"] / found["real"]["all_wanted"]["value"])
        for found in shares
        if found["generated"]["all_wanted"] and found["real"]["all_wanted"]["value"]
    ]
    if ratios:
        parts.append(float(np.mean(ratios)))
    return float(np.mean(parts))


def best_trial(trials: Sequence[Mapping | None]) -> int:
    """Number of the best trial by `choice_score`, the first of equals.

    Raises:
        ValueError: a trial is missing: all methods have the same number.
    """
    scores = []
    for number, metrics in enumerate(trials):
        if metrics is None:
            raise ValueError(f"trial {number} has no metrics: a choice needs all of its trials.")
        scores.append(choice_score(metrics))
    return int(np.argmax(scores))
