"""The site of the guides builds without warnings and loads nothing else. It needs extra `docs`."""

import re
import subprocess
import sys

import pytest
from guides import ROOT


pytest.importorskip("myst_nb")
jupytext = pytest.importorskip("jupytext")
nbformat = pytest.importorskip("nbformat")

NOTEBOOKS = ROOT / "docs" / "notebooks"


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-d",
        tmp_path / "trees",
        ROOT / "docs",
        tmp_path / "site",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe|source)\b[^>]*\bsrc="([^"]+)"', text)
        loaded += re.findall(
            r'<link\b(?![^>]*rel="(?:author|canonical)")[^>]*\bhref="([^"]+)"', text
        )
        assert loaded and not [
            url for url in loaded if url.startswith(("http:", "https:", "//"))
        ], page.name
    for style in (tmp_path / "site").rglob("*.css"):
        assert not re.search(
            r"url\(['\"]?(?:https?:)?//|@import", style.read_text(encoding="utf-8")
        ), style.name


def test_notebooks_are_those_of_their_sources():
    """What was stored has the cells of the script, all of them run, and none failed."""
    sources = [path for path in NOTEBOOKS.glob("*.py") if path.name != "make.py"]
    assert sources
    for source in sources:
        stored = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
        nbformat.validate(stored)
        cells = [cell.source for cell in stored.cells]
        assert cells == [cell.source for cell in jupytext.read(source, fmt="py:percent").cells], (
            "run docs/notebooks/make.py"
        )
        code = [cell for cell in stored.cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
        assert {output.output_type for cell in code for output in cell.outputs} <= {
            "stream",
            "execute_result",
            "display_data",
        }
        assert source.with_suffix(".ipynb").stat().st_size < 200_000


@pytest.mark.slow
def test_notebooks_run(monkeypatch):
    monkeypatch.syspath_prepend(NOTEBOOKS)
    import make

    for source in make.SOURCES:
        before = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
        after = make.executed(source)  # raises if a cell does
        for old, new in zip(before.cells, after.cells):
            kinds = [
                [output.output_type for output in cell.get("outputs", [])] for cell in (old, new)
            ]
            assert kinds[0] == kinds[1], new.source
