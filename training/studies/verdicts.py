"""Paired comparisons of the rows of a table over seeds, corrected for their number: what a table
may call ahead.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import ttest_rel


LEVEL = 0.01
FEWEST = 3  # seeds in common


def paired_p(a: Sequence[float], b: Sequence[float]) -> float:
    """p of a two-sided paired t-test; of equal differences 1 if they are 0, else 0."""
    differences = np.subtract(a, b)
    if np.ptp(differences) == 0:
        return float(differences[0] == 0)
    return float(ttest_rel(a, b).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm, "A simple sequentially rejective multiple test
    procedure", 1979), in the given order.
    """
    order = np.argsort(p_values, kind="stable")
    factors = len(p_values) - np.arange(len(p_values))
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(1, np.maximum.accumulate(np.asarray(p_values)[order] * factors))
    return corrected.tolist()


def compare_rows(
    results: Mapping[str, Mapping[int, Mapping[str, float]]], row: str, measures: Mapping[str, int]
) -> list[dict]:
    """Compare a row with every other one, by measures that both have in `FEWEST` seeds at least.

    Args:
        results: measures by row and seed.
        row: the row that the others are compared with.
        measures: names, and 1 if more is better, -1 if less is.

    Returns:
        For each pair `against`, `measure`, `seeds`, the mean `difference` (row minus the other),
        `p`, corrected over all comparisons, and `verdict`: `ahead` or `behind` by p < 0.01, else
        `level`.
    """
    found = []
    for other in (name for name in results if name != row):
        for measure, sign in measures.items():
            seeds = [
                seed
                for seed in results[row]
                if seed in results[other]
                and measure in results[row][seed]
                and measure in results[other][seed]
            ]
            if len(seeds) < FEWEST:
                continue
            a, b = ([results[of][seed][measure] for seed in seeds] for of in (row, other))
            found.append(
                {
                    "against": other,
                    "measure": measure,
                    "seeds": len(seeds),
                    "difference": float(np.mean(np.subtract(a, b))),
                    "better": sign,
                    "p": paired_p(a, b),
                }
            )
    for line, p in zip(found, holm([line["p"] for line in found])):
        better = line.pop("better") * line["difference"] > 0
        line["p"] = p
        line["verdict"] = ("ahead" if better else "behind") if p < LEVEL else "level"
    return found
