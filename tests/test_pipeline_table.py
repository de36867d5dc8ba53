"""The table of docs/pipelines.md is what docs/pipelines/make.py writes."""

import importlib.util
from pathlib import Path


def test_the_table_is_what_the_script_writes():
    script = Path(__file__).parents[1] / "docs" / "pipelines" / "make.py"
    spec = importlib.util.spec_from_file_location("make_table", script)
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    text = make.PAGE.read_text()
    written = text[text.index(make.BEGIN) : text.index(make.END)].splitlines()
    lines = make.table().splitlines()[:-1]
    assert written[3:] == lines[3:]  # without the version of diffusers
    # SDXL and CogVideoX are there once
    assert sum("| yes | " in line for line in lines) == len(make.recorded.TRAINED) - 2
