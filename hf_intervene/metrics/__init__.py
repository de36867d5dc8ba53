"""Measures of images, codes and effects: functions of arrays."""

from .block_scores import block_correlations, block_mcc, block_predictions, measure_blocks
from .causal import Agreement, agreement, block_effects, intervention_moves, total_effect_operator
from .counterfactual import CounterfactualError, counterfactual_error
from .detector import Detector, DetectorError, Share, train_context_detector, train_detector
from .disentanglement import (
    DCI,
    Score,
    dci,
    mcc,
    measure,
    mig,
    sap,
    scored,
)
from .effects import EffectMatrix, compare_effects, effect_matrix
from .factor_match import FactorMatch, match_factors
from .factors import Factors, intervention_effects, read_error, read_factors
from .identifiability import CheckResult, Finding, check
from .leakage import LeakageResult, context_leakage
from .presence import CompositionRatio, Presence, composition_ratio, presence_shares, verdict
from .reconstruction import bits_per_pixel, entropy_bits, mean_interval
from .results import Result
from .routes import Routes, compare_routes
from .transport import TransportResult, compare, sliced_wasserstein
from .two_sample import (
    ImageTest,
    KernelDistance,
    TwoSampleTest,
    image_two_sample_test,
    kernel_distance,
    two_sample_test,
)


__all__ = [
    "DCI",
    "Agreement",
    "CheckResult",
    "CompositionRatio",
    "CounterfactualError",
    "Detector",
    "DetectorError",
    "EffectMatrix",
    "FactorMatch",
    "Factors",
    "Finding",
    "ImageTest",
    "KernelDistance",
    "LeakageResult",
    "Presence",
    "Result",
    "Routes",
    "Score",
    "Share",
    "TransportResult",
    "TwoSampleTest",
    "agreement",
    "bits_per_pixel",
    "block_effects",
    "block_correlations",
    "block_mcc",
    "block_predictions",
    "check",
    "compare",
    "compare_effects",
    "compare_routes",
    "composition_ratio",
    "context_leakage",
    "counterfactual_error",
    "dci",
    "effect_matrix",
    "entropy_bits",
    "image_two_sample_test",
    "intervention_effects",
    "intervention_moves",
    "kernel_distance",
    "match_factors",
    "mcc",
    "mean_interval",
    "measure",
    "measure_blocks",
    "mig",
    "presence_shares",
    "read_error",
    "read_factors",
    "sap",
    "scored",
    "sliced_wasserstein",
    "total_effect_operator",
    "train_context_detector",
    "train_detector",
    "two_sample_test",
    "verdict",
]
