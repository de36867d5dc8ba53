"""The table of docs/pipelines.md is what docs/pipelines/make.py writes."""

import importlib.util
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("make_table", ROOT / "docs" / "pipelines" / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines(make):
    text = make.PAGE.read_text()
    return text[text.index(make.BEGIN) : text.index(make.END)].splitlines()


def test_the_table_lists_all_tested_pipelines(make):
    found = [line for line in lines(make) if line.startswith("| `")]
    assert len(found) == len(make.KINDS)
    refused = [line for line in found if "| no: " in line]
    assert len(refused) == 2 and all("`WanPipeline`" in line for line in refused)  # two denoisers, and a clip
    assert not [line for line in found if line not in refused and "| yes | " not in line]


def test_a_line_is_what_the_script_writes(make):
    assert make.row("z-image") in lines(make)


@pytest.mark.slow
def test_the_table_is_what_the_script_writes(make):
    assert make.table().splitlines()[3:-1] == lines(make)[3:]
