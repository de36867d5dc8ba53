"""Training a head: `train` in Python, `hf-intervene train` in a shell.

Where to look: `sections.py` what can be set, `parsing.py` how it is read; `building.py` what the
settings make; `loop.py` the training itself, from top to bottom; `progress.py` what it logs;
`state.py` where a run stands, and its checkpoints; `resuming.py` whether it may go on; `feeding.py`
the way of a batch to the device; `distributed.py` several processes."""

from .building import build_model, build_objective, load_data
from .command import main
from .loop import TrainResult, train
from .parsing import parse_arguments, read_config
from .settings import TrainArguments


__all__ = [
    "TrainArguments",
    "TrainResult",
    "build_model",
    "build_objective",
    "load_data",
    "main",
    "parse_arguments",
    "read_config",
    "train",
]
