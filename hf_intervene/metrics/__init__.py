"""Measures: pure functions on arrays."""

from .factors import FactorRegressor, intervention_effects, train_regressor
from .leakage import LeakageResult, context_leakage, share_moved
from .reconstruction import bits_per_pixel, mean_interval
from .transport import TransportResult, compare, sliced_wasserstein


__all__ = [
    "FactorRegressor",
    "LeakageResult",
    "TransportResult",
    "bits_per_pixel",
    "compare",
    "context_leakage",
    "intervention_effects",
    "mean_interval",
    "share_moved",
    "sliced_wasserstein",
    "train_regressor",
]
