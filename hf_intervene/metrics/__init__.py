"""Measures: pure functions on arrays."""

from .leakage import LeakageResult, context_leakage, share_moved
from .reconstruction import bits_per_pixel, mean_interval
from .transport import TransportResult, compare, sliced_wasserstein


__all__ = [
    "LeakageResult",
    "TransportResult",
    "bits_per_pixel",
    "compare",
    "context_leakage",
    "mean_interval",
    "share_moved",
    "sliced_wasserstein",
]
