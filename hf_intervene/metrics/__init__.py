"""Measures: pure functions on arrays."""

from .disentanglement import DCI, Score, TwoSampleTest, block_mcc, dci, mcc, measure, mig, sap, scored, two_sample_test
from .factors import FactorRegressor, intervention_effects, train_regressor
from .identifiability import CheckResult, Finding, check
from .leakage import LeakageResult, context_leakage, share_moved
from .reconstruction import bits_per_pixel, mean_interval
from .transport import TransportResult, compare, sliced_wasserstein


__all__ = [
    "DCI",
    "CheckResult",
    "FactorRegressor",
    "Finding",
    "LeakageResult",
    "Score",
    "TransportResult",
    "TwoSampleTest",
    "bits_per_pixel",
    "block_mcc",
    "check",
    "compare",
    "context_leakage",
    "dci",
    "intervention_effects",
    "mcc",
    "mean_interval",
    "measure",
    "mig",
    "sap",
    "scored",
    "share_moved",
    "sliced_wasserstein",
    "train_regressor",
    "two_sample_test",
]
