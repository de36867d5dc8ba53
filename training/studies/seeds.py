"""What the recipes that repeat a thing over seeds share: the name of a run, and a mean with its
interval.
"""

from collections.abc import Sequence

import numpy as np
from scipy.stats import t as student


def run_name(name: str, seed: int) -> str:
    """Of the file or folder of a row's run with one seed."""
    return f"{name.replace(' ', '-').replace(',', '')}-seed{seed}"


def seed_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds, and half the width of its 95 % t-interval; NaN for a single seed."""
    values = np.array(values)
    width = (
        student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
        if len(values) > 1
        else np.nan
    )
    return float(values.mean()), float(width)


def seeds_cell(values: Sequence[float] | None) -> str:
    """`seed_interval` as text, without a width that rounds to 0; empty without values."""
    if not values:
        return ""
    mean, width = seed_interval(values)
    return f"{mean:.3f}" + (f" ± {width:.3f}" if width >= 0.0005 else "")


def mean_cell(values: Sequence[float], decimals: int = 3) -> str:
    """`seed_interval` as text: mean +- half width, or the mean alone of a single seed."""
    mean, width = seed_interval(values)
    return f"{mean:.{decimals}f}" + (f" ± {width:.{decimals}f}" if len(values) > 1 else "")
