"""What changes over a run by a formula: the learning rate, and the weight of the KL."""

import math

from .settings import TrainArguments


def learning_rate_factor(arguments: TrainArguments, step: int, total: int) -> float:
    """Share of the peak: a cosine down to `final_learning_rate`, times a linear warm-up."""
    settings = arguments.optimization
    warmup = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * step / total))
    floor = settings.final_learning_rate
    return warmup * (floor + (1 - floor) * cosine)


def beta_of(arguments: TrainArguments, step: int, total: int) -> float:
    """The weight of the KL: it rises from 0 over the share `beta_warmup` of the steps."""
    steps = arguments.objective.beta_warmup * total
    return arguments.objective.beta * (min(1.0, step / steps) if steps > 0 else 1.0)
