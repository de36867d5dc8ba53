"""Nothing of this package needs a GPU, and where there is none, none of its ways can be tested on
one. What can be: that tensors are where they have to be, on a device of our own making
(`elsewhere.py`), with what runs there (`elsewhere_cases.py`). PyTorch takes one such device in a
process, and keeps it: so these have a process of their own."""

import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_on_another_device(which):
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this PyTorch takes no device that is written in Python")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        which,
        Path(__file__).with_name("elsewhere_cases.py"),
    ]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0 and " passed" in found.stdout, found.stdout + found.stderr
