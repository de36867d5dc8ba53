"""Measures: pure functions on arrays."""

from .causal import Agreement, agreement, block_effects, intervention_moves, total_effect_operator
from .disentanglement import DCI, Score, TwoSampleTest, block_mcc, dci, mcc, measure, mig, sap, scored, two_sample_test
from .effects import EffectMatrix, compare_effects, effect_matrix
from .factors import Factors, intervention_effects, read_error, read_factors
from .identifiability import CheckResult, Finding, check
from .leakage import LeakageResult, context_leakage
from .reconstruction import bits_per_pixel, mean_interval
from .transport import TransportResult, compare, sliced_wasserstein


__all__ = [
    "DCI",
    "Agreement",
    "CheckResult",
    "EffectMatrix",
    "Factors",
    "Finding",
    "LeakageResult",
    "Score",
    "TransportResult",
    "TwoSampleTest",
    "agreement",
    "bits_per_pixel",
    "block_effects",
    "block_mcc",
    "check",
    "compare",
    "compare_effects",
    "context_leakage",
    "dci",
    "effect_matrix",
    "intervention_effects",
    "intervention_moves",
    "mcc",
    "mean_interval",
    "measure",
    "mig",
    "read_error",
    "read_factors",
    "sap",
    "scored",
    "sliced_wasserstein",
    "total_effect_operator",
    "two_sample_test",
]
