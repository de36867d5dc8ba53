"""The guides in docs/ and the README: their blocks run, and the files, links, options and names in them exist."""

import importlib
import io
import os
import re
import shlex
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from guides import ROOT, Block, blocks, check_options, commands, says

import hf_intervene


PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)
KINDS = {"python", "bash", "text", "yaml", "bibtex", "setup"}  # and directives, in braces
README = ROOT / "README.md"


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """An empty folder in which the paths of a checkout lead to it."""
    for name in ("training", "docs", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Reader:
    """Reads a page from top to bottom and does what it says."""

    def __init__(self, page: Path, in_shell: bool):
        self.page, self.in_shell = page, in_shell
        self.names: dict = {"__name__": page.stem}
        self.printed = ""

    def read(self) -> None:
        for block in blocks(self.page):
            where = f"{self.page.name}:{block.line}"
            assert block.kind in KINDS or block.kind.startswith("{"), f"{where}: a block of kind {block.kind!r}"
            if "prints" in block.steps:
                assert says(block.text, self.printed), f"{where}: printed was\n{self.printed}"
            elif "raises" in block.steps:
                found = self.fail(block.steps["raises"], where)
                assert says(block.text, found, whole=True), f"{where}: it says\n{found}"
            elif block.kind in ("python", "setup"):
                self.python(block, where)
            elif block.kind == "bash":
                self.bash(block, where)

    def python(self, block: Block, where: str) -> None:
        code = compile("\n" * (block.line - 1) + block.text, str(self.page), "exec")
        if "skip" not in block.steps:
            self.printed = self.run(lambda: exec(code, self.names), where)

    def bash(self, block: Block, where: str) -> None:
        printed = ""
        for command in commands(block):
            if command.main is not None:
                check_options(command)
            if "skip" in block.steps or _installs(command.words, where):
                continue
            if command.main is None or self.in_shell:
                done = subprocess.run(
                    ["bash", "-euo", "pipefail", "-c", shlex.join(command.words)], capture_output=True, text=True, timeout=600
                )
                code, out, error = done.returncode, done.stdout, done.stderr
            else:
                code, out, error = _in_process(command)
            # The check of a data set exits with 1 if an assumption fails, which is no error.
            assert code == 0 or (command.name == "check" and "error:" not in error), (
                f"{where}: {shlex.join(command.words)}\n{error}"
            )
            printed += out
        self.printed = printed

    def fail(self, what: str, where: str) -> str:
        if what.startswith("$ "):
            (command,) = commands(Block("bash", what.removeprefix("$ "), 0), tiny=False)
            code, _, error = _in_process(command)
            assert code not in (0, None), f"{where}: it works"
            return [line for line in error.splitlines() if line.strip()][-1]
        with pytest.raises((ValueError, TypeError, OSError, ImportError)) as caught:
            exec(compile(what, where, "exec"), self.names)
        return str(caught.value)

    def run(self, action, where: str) -> str:
        out = io.StringIO()
        with redirect_stdout(out):
            action()
        return out.getvalue()


def _in_process(command) -> tuple[int, str, str]:
    out, error = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(error):
        code = command.main(command.argv)
    return code, out.getvalue(), error.getvalue()


def _installs(words: list[str], where: str) -> bool:
    """Whether a command installs something, which no test does; the extras that it names exist."""
    if not ({"pip", "apt-get"} & set(words[:3])):
        return False
    setup = (ROOT / "setup.py").read_text()
    for extras in re.findall(r"\[([\w,]+)\]", " ".join(words)):
        for extra in extras.split(","):
            assert f'"{extra}": [' in setup, f"{where}: setup.py has no extra {extra!r}"
    return True


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run(page, workshop):
    Reader(page, in_shell=False).read()


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_run_in_a_shell(page, workshop, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    Reader(page, in_shell=True).read()
