"""The lower bounds of `setup.py` are the versions that `.ci/oldest` runs the tests with."""

import runpy
from pathlib import Path

import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version


ROOT = Path(__file__).parents[1]


def versions(requirements, operator):
    """Return the name and version of each requirement that uses this operator."""
    parsed = [Requirement(text) for text in requirements]
    return {
        (canonicalize_name(r.name), Version(s.version))
        for r in parsed
        for s in r.specifier
        if s.operator == operator
    }


def test_lower_bounds_are_the_oldest_versions_tested(monkeypatch):
    said = {}
    monkeypatch.setattr(setuptools, "setup", lambda **options: said.update(options))
    runpy.run_path(str(ROOT / "setup.py"))
    requirements = said["install_requires"] + [
        text
        for name in ("eval", "app", "baselines", "test")
        for text in said["extras_require"][name]
    ]
    pins = [
        line
        for line in (ROOT / ".ci" / "oldest.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert versions(requirements, ">=") == versions(pins, "==")
    assert (
        len(pins)
        == len(versions(pins, "=="))
        == len({Requirement(text).name for text in requirements})
    ), "one bound for each"
