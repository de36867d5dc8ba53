"""The type hints pass mypy with the settings of `pyproject.toml`, and are part of the package."""

import subprocess
import sys
from pathlib import Path

import pytest

import hf_intervene


def test_hints_ship_with_the_package():
    assert Path(hf_intervene.__file__).with_name("py.typed").exists()


def test_mypy_finds_nothing():
    pytest.importorskip("mypy", reason="mypy is not installed: pip install hf-intervene[test]")
    done = subprocess.run(
        [sys.executable, "-m", "mypy"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
