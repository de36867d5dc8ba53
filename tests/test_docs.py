"""The guides in docs/ and the README: their blocks run, and the files, links, options, names and
figures in them exist.
"""

import ast
import importlib
import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from guides import ROOT, Block, Command, blocks, check_options, commands, says

import hf_intervene
from hf_intervene.trainer.settings import TrainArguments


README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
EVERY = [README, *PAGES]
sys.path.insert(0, str(ROOT / "docs"))
import tables  # noqa: E402  # docs/tables.py


KINDS = {"python", "bash", "text", "bibtex", "setup"}  # and directives, in braces
SOURCES = [*(ROOT / "hf_intervene").rglob("*.py"), *(ROOT / "training").rglob("*.py")]


def ids(pages: list[Path]) -> list[str]:
    return [
        page.relative_to(ROOT).with_suffix("").as_posix().removeprefix("docs/") for page in pages
    ]


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """An empty folder in which the paths of a checkout lead to it."""
    for name in ("training", "docs", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Reader:
    """Reads blocks from top to bottom and does what they say; see `guides.py`.

    Args:
        page: their page.
        how: what is done with commands: `"process"` runs ours in this process, `"shell"` as they
            stand, `"parse"` reads their options.
    """

    def __init__(self, page: Path, how: str):
        self.page, self.how = page, how
        self.names: dict = {"__name__": page.stem}
        self.printed = ""

    def read(self, page_blocks: list[Block]) -> None:
        for block in page_blocks:
            where = f"{self.page.name}:{block.line}"
            assert block.kind in KINDS or block.kind.startswith("{"), (
                f"{where}: a block of kind {block.kind!r}"
            )
            if "prints" in block.steps:
                assert says(block.text, self.printed), f"{where}: printed was\n{self.printed}"
            elif "raises" in block.steps:
                found = self.failure(block.steps["raises"], where)
                assert says(block.text, found, whole=True), f"{where}: it says\n{found}"
            elif block.kind in ("python", "setup"):
                self.python(block)
            elif block.kind == "bash":
                self.bash(block, where)

    def python(self, block: Block) -> None:
        code = compile("\n" * (block.line - 1) + block.text, str(self.page), "exec")
        if "skip" in block.steps:
            return
        with redirect_stdout(io.StringIO()) as out:
            exec(code, self.names)
        self.printed = out.getvalue()

    def bash(self, block: Block, where: str) -> None:
        printed = ""
        for command in commands(block):
            if command.main is not None:
                check_options(command)
            if _installs(command.words, where) or self.how == "parse" or "skip" in block.steps:
                continue
            run = _in_process if command.main is not None and self.how == "process" else _in_shell
            code, out, error = run(command)
            # The check of a data set exits with 1 if an assumption fails, which is no error.
            passed = code == 0 or (command.name == "check" and "error:" not in error)
            assert passed, f"{where}: {shlex.join(command.words)}\n{error}"
            printed += out
        self.printed = printed

    def failure(self, what: str, where: str) -> str:
        """The message of Python code that raises, or of a command that fails."""
        if what.startswith("$ "):
            (command,) = commands(Block("bash", what.removeprefix("$ "), 0), tiny=False)
            code, _, error = _in_process(command)
            assert code not in (0, None), f"{where}: it works"
            return [line for line in error.splitlines() if line.strip()][-1]
        with pytest.raises((ValueError, TypeError, OSError, ImportError)) as caught:
            exec(compile(what, where, "exec"), self.names)
        return str(caught.value)


def _in_process(command: Command) -> tuple[int, str, str]:
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as error:
        code = command.main(command.argv)
    return code, out.getvalue(), error.getvalue()


def _in_shell(command: Command) -> tuple[int, str, str]:
    script = ["bash", "-euo", "pipefail", "-c", shlex.join(command.words)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout, done.stderr


def _installs(words: list[str], where: str) -> bool:
    """Whether a command installs something, or is one of the tests' own, which no test runs; the
    extras that it names exist.
    """
    if not {"pip", "ruff", "pytest"} & set(words[:3]):
        return False
    setup = (ROOT / "setup.py").read_text()
    for extra in re.findall(r"\w+", " ".join(re.findall(r"\[([\w,]+)\]", " ".join(words)))):
        assert f'"{extra}": [' in setup, f"{where}: setup.py has no extra {extra!r}"
    return True


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_the_blocks_of_a_page_run(page, workshop):
    Reader(page, "process").read(blocks(page))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_the_commands_of_a_page_run_in_a_shell(page, workshop, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    Reader(page, "shell").read(blocks(page))


# The README, which has no comments for tests: what its blocks need, by what is in them

PREPARED = """
from pathlib import Path
from diffusers import DDPMPipeline, DDPMScheduler
from diffusion_models import unet
from PIL import Image
from hf_intervene import InterventionModel, load_base

for context in ("obs", "A", "B"):
    Path("my-images", context).mkdir(parents=True)
    for number in range(24):
        picture = Image.effect_noise((16, 16), 99 + number).convert("RGB")
        picture.save(f"my-images/{context}/{number}.png")
scheduler = DDPMScheduler(prediction_type="v_prediction", num_train_timesteps=50)
DDPMPipeline(unet(), scheduler).save_pretrained("outputs/ddpm")
frozen = InterventionModel.build(load_base("outputs/ddpm", 16), ["glasses", "hat"])
frozen.save_pretrained("outputs/frozen-diffusion/model")
"""


def readme_blocks() -> Iterator[Block]:
    """Blocks of the README, with what they need."""
    yield Block("setup", PREPARED, 1)
    for block in blocks(README):
        # a thousand by default
        block.text = block.text.replace(
            "pipe(batch_size=4)", "pipe(batch_size=4, num_inference_steps=2)"
        )
        yield block


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_python_of_the_readme_runs_and_its_commands_have_these_options(workshop):
    Reader(README, "parse").read(readme_blocks())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_commands_of_the_readme_run(workshop):
    Reader(README, "process").read(readme_blocks())


# What is named exists


def prose(page: Path) -> str:
    """A page without its comments."""
    return re.sub(r"<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def inline_code(text: str) -> list[str]:
    return re.findall(
        r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    )


def anchors(page: Path) -> set[str]:
    headings = re.findall(
        r"^#+ (.*)$",
        re.sub(r"^```.*?^```$", "", prose(page), flags=re.DOTALL | re.MULTILINE),
        re.MULTILINE,
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", EVERY, ids=ids(EVERY))
def test_links_and_files_exist(page):
    text = prose(page)
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(#[\w-]+)?\)", text):
        if target.startswith("http"):
            continue
        found = page.parent / target if target else page
        assert found.exists(), target
        assert not anchor or anchor[1:] in anchors(found), f"{target}{anchor}"
    for target in re.findall(
        r"^```\{(?:figure|literalinclude|include)\} (\S+)", text, re.MULTILINE
    ):
        assert (page.parent / target).exists(), target
    for code in inline_code(text):
        for path in re.findall(
            r"(?<![\w/])(?:hf_intervene|training|tests|docs|model_cards)/[\w./*-]*\w", code
        ):
            assert list(ROOT.glob(path)), code


@pytest.mark.parametrize("page", EVERY, ids=ids(EVERY))
def test_names_of_the_package_exist(page):
    for dotted in set(re.findall(r"\bhf_intervene(?:\.[A-Za-z_]\w*)+", prose(page))):
        parts, found = dotted.split("."), hf_intervene
        for number, part in enumerate(parts[1:], start=2):
            try:
                found = getattr(found, part)
            except AttributeError:
                found = importlib.import_module(".".join(parts[:number]))


@pytest.mark.parametrize("page", EVERY, ids=ids(EVERY))
def test_options_exist(page):
    known = {f"--{name}" for name in TrainArguments().flat()} | {"--config", "--help"}
    known |= {"--num_processes", "--config_file", "--nproc_per_node"}  # of the launchers
    for source in SOURCES:
        known |= set(re.findall(r'"(--[\w-]+)"', source.read_text(encoding="utf-8")))
    for code in inline_code(prose(page)):
        for option in re.findall(r"(?<!\S)--[a-z][\w-]*", code):
            assert option in known, f"{option} in {code}"


def test_the_reference_has_all_public_names():
    text = "\n".join(
        (ROOT / "docs" / "api" / name).read_text()
        for name in ("models.md", "pipelines.md", "bases.md")
    )
    documented = set(
        re.findall(r"auto(?:class|function|data):: (?:hf_intervene\.)?(\w+)$", text, re.MULTILINE)
    )
    documented |= {
        name for members in re.findall(r":members: (.*)", text) for name in members.split(", ")
    }
    assert set(hf_intervene.__all__) <= documented, "name them in docs/api"


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


# Figures: what stands in a document was measured, and is in training/results


def outside_code(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", prose(page), flags=re.DOTALL | re.MULTILINE)


def numbers(found: object) -> Iterator[float]:
    """All numbers in what a JSON file holds, and in the text of its cells."""
    if isinstance(found, bool):
        return
    if isinstance(found, (int, float)):
        yield float(found)
    elif isinstance(found, str):
        yield from map(float, re.findall(r"\d+\.\d+", found))
    elif isinstance(found, (list, dict)):
        for part in found.values() if isinstance(found, dict) else found:
            yield from numbers(part)


@pytest.mark.parametrize("page", EVERY, ids=ids(EVERY))
def test_tables_are_those_that_are_made_of_the_results(page):
    text = page.read_text(encoding="utf-8")
    assert tables.written(text) == text, "python docs/tables.py"


# Numbers that are no results, by page: thresholds, shares that a text makes up, chance.
DEFINITIONS = {
    "benchmarks.md": {"2 %"},
    "metrics.md": {"0.9", "49 %", "96 %", "5 %", "0.75", "0.5", "50 %"},
    "protocol.md": {"0.01"},
    "results.md": {"0.5", "50 %"},
    "training.md": {"20 %"},
}
NAMES = r"(?:[vV]ersion|Python|diffusers|disent|Wan|Apache-|CC BY-SA|CC0) ?\d+(?:\.\d+)+"


def figures(page: Path) -> Iterator[tuple[str, str]]:
    """Decimals and percentages outside of code, links and generated tables, each with its line."""
    text = re.sub(r"<!-- table: .*?<!-- end of table -->", "", page.read_text(), flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->|^```.*?^```$|`[^`\n]+`", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(rf"\]\([^)]*\)|\S*://\S+|arXiv:\S+|\b95 %|{NAMES}", "", text)
    for line in text.splitlines():
        found = re.findall(r"(?<![\w.:])(?:\d+\.\d+(?: ?%)?|\d+ ?%)(?![\d.]*\d)", line)
        yield from ((figure, line) for figure in found)


def printed(page: Path) -> set[str]:
    """Figures of blocks that a test compares with what is printed."""
    shown = [block.text for block in blocks(page) if "prints" in block.steps]
    return set(re.findall(r"\d+\.\d+", "\n".join(shown)))


def stated(page: Path) -> set[str]:
    """Figures that stand alone on a page, from `training/results/single-figures.json`."""
    found = json.loads((ROOT / "training" / "results" / "single-figures.json").read_text())
    return {
        value
        for entry in found.get(page.relative_to(ROOT).as_posix(), ())
        for value in entry["values"]
    }


@pytest.mark.parametrize("page", EVERY, ids=ids(EVERY))
def test_figures_are_in_the_results(page):
    """A row of figures stands in a generated table. A figure of three decimals elsewhere is one of
    a file in training/results, rounded. With fewer decimals that would hold of any figure: it is
    stated there for this page with its command, or printed by a block of the page.
    """
    if page.name == "compatibility.md":  # of versions
        return
    measured = {
        f"{number:.3f}"
        for path in (ROOT / "training" / "results").glob("*.json")
        for number in numbers(json.loads(path.read_text()))
    }
    known = stated(page) | printed(page) | DEFINITIONS.get(page.name, set())
    for figure, line in figures(page):
        if re.fullmatch(r"\d\.\d{3}", figure):
            row = re.findall(r"(?<![\d.])\d\.\d{3}(?!\d)", line)
            assert not (line.startswith("|") and len(row) > 1), f"generate this table: {line}"
            assert figure in measured or figure in known, f"{figure} in {line}"
        else:
            assert figure in known, f"{figure} is in no file of training/results: {line}"


def test_a_figure_that_nothing_measured_is_found(tmp_path):
    page = tmp_path / "results.md"
    page.write_text(
        "Version 0.1, Python 3.11, `0.77` and [a](b/1.2): 0.96 of them, 3 % more; 0.123 too.\n"
        "<!-- table: x -->\n| 0.55 |\n<!-- end of table -->\n```text\n0.44\n```\n"
    )
    assert [figure for figure, _ in figures(page)] == ["0.96", "3 %", "0.123"]


def test_stated_figures_are_used_and_have_a_command():
    found = json.loads((ROOT / "training" / "results" / "single-figures.json").read_text())
    for name, entries in found.items():
        used = {figure for figure, _ in figures(ROOT / name)}
        for entry in entries:
            assert entry["what"] and entry["command"]
            assert set(entry["values"]) <= used, f"{set(entry['values']) - used} of {name}"


def test_a_table_changes_with_its_results(tmp_path, monkeypatch):
    """The table's mean and interval are those of its file, by another way of reckoning."""
    values = [0.91, 0.95, 0.99]
    columns = ("all there", "real", "distance", "floor")
    contexts = ("obs", "a", "b", "a+b", "a+b+c", "a+b+c+d")
    found = {name: dict.fromkeys(columns, values) for name in contexts}
    rival = {name: dict.fromkeys(columns, [0.5]) for name in contexts}
    for name, figures in (("avatars", found), ("avatars-conditional-vae", rival)):
        (tmp_path / f"{name}.json").write_text(json.dumps(figures))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    interval = interval_by_hand(values)
    made = tables.written("<!-- table: summary -->\nold\n<!-- end of table -->\n")
    assert "old" not in made and f"| `a` | 0.950 ± {interval:.3f} | 0.500 |" in made
    assert "| the 1 pairs, mean | 0.950" in made
    with pytest.raises(ValueError, match="there is no table 'none'; there is summary"):
        tables.written("<!-- table: none -->\n<!-- end of table -->")


def interval_by_hand(values: list[float]) -> float:
    """Half a 95 % t-interval of three values, with the quantile from a printed table."""
    mean = sum(values) / 3
    variance = sum((value - mean) ** 2 for value in values) / 2
    return 4.302653 * (variance / 3) ** 0.5


def test_messages_of_tables_are_those_of_the_source():
    """The messages in the failures' tables, in pieces between what differs."""
    said = []
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                said.append(
                    "".join(
                        part.value if isinstance(part, ast.Constant) else "\0"
                        for part in node.values
                    )
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(node.value)
    everything = "\n".join(said)
    messages = re.findall(r"^\| `([^`]+)` \|", prose(ROOT / "docs" / "faq.md"), re.MULTILINE)
    assert len(messages) > 10
    for message in messages:
        pieces = [piece.strip() for piece in re.split(r"^warning: |\.\.\.|\b[\d.]+\b|; ", message)]
        for piece in pieces:
            assert len(piece) < 12 or piece in everything, piece


def test_pictures_are_small():
    sizes = {path.name: path.stat().st_size for path in (ROOT / "docs").rglob("*.png")}
    assert max(sizes.values()) < 100_000 and sum(sizes.values()) < 500_000, sizes
