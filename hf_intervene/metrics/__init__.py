"""Measures: pure functions on arrays."""

from .reconstruction import bits_per_pixel, mean_interval
from .transport import TransportResult, compare, sliced_wasserstein


__all__ = ["TransportResult", "bits_per_pixel", "compare", "mean_interval", "sliced_wasserstein"]
