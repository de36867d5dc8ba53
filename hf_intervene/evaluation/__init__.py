"""Measuring a trained model on held-out images: `evaluate` in Python, `hf-intervene evaluate` in a
shell.
"""

from .command import main, make_parser, versions, write
from .held_out import held_out_images, load_model, training_split
from .measuring import evaluate
from .tables import table


__all__ = [
    "evaluate",
    "held_out_images",
    "load_model",
    "main",
    "make_parser",
    "table",
    "training_split",
    "versions",
    "write",
]
