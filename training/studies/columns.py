"""What the studies of a saved model on a simulated data set share: their options, and their tables.

`docs/tables.py` reads the tables.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from hf_intervene.trainer.checkpoints import write_whole
from hf_intervene.trainer.simulated import SIMULATED


def study_parser(description: str) -> argparse.ArgumentParser:
    """Data set, resolution, number of images and output file."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--dataset", default="avatars", choices=SIMULATED)
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--images", type=int, default=700, help="held-out images of each context")
    parser.add_argument("--output", required=True, help="JSON file to write")
    return parser


def write_columns(path: str, columns: Sequence[str], rows: Sequence[Sequence]) -> None:
    """Write a table as JSON; its numbers are shown with three digits."""
    write_whole(Path(path), json.dumps({"columns": columns, "digits": 3, "rows": rows}, indent=1))
