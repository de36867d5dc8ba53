"""The command that trains: `hf-intervene train`, and `training/train.py`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from ..errors import INTERRUPTED, spoken
from ..logging import bars_on_terminals_only
from .distributed import process_state
from .loop import train
from .parsing import parse_arguments


@spoken
def main(argv: Sequence[str] | None = None) -> int:
    """Train as the words of a command line say, `None` for those of this process; returns the exit
    status.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    bars_on_terminals_only()
    result = train(parse_arguments([word for word in words if word != "--json"]))
    if process_state().is_main_process:
        if "--json" in words:
            print(
                json.dumps(
                    asdict(result) | {"model_dir": result.model_dir and str(result.model_dir)}
                )
            )
        elif not result.interrupted:
            print(
                f"trained {result.step} steps; lowest validation loss {result.validation:.4f}"
                f" {result.unit}; model in {result.model_dir}"
            )
    return INTERRUPTED if result.interrupted else 0
