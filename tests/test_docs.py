"""The guides in docs/ and the README: their blocks run, and the files, links, options, names and
figures in them exist.
"""

import ast
import importlib
import io
import re
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from conftest import HUB
from guides import ROOT, Block, Command, blocks, check_options, commands, says
from shared_models import build, put_folder

import hf_intervene
from hf_intervene import InterventionPipeline
from hf_intervene.trainer.settings import TrainArguments


README = ROOT / "README.md"
RESULTS = ROOT / "docs" / "results.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
EVERY = [README, *PAGES]
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
import shutil, torch
from pathlib import Path
from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler
from diffusion_models import unet, vae
from PIL import Image
from hf_intervene import InterventionModel, bundled, load_base

vae().save_pretrained("path/to/vae")
vae().save_pretrained("path/to/pipeline/vae")
shutil.copytree(bundled("quad"), "outputs/demo/pipeline")
Image.new("RGB", (64, 64)).save("photo.png")
for context in ("obs", "smile", "glasses"):
    Path("my-images", context).mkdir(parents=True)
    for number in range(24):
        Image.effect_noise((16, 16), 99 + number).convert("RGB").save(f"my-images/{context}/{number}.png")
"""  # noqa: E501
FROZEN_HEAD = """
shutil.rmtree("outputs/ddpm", ignore_errors=True)
DDPMPipeline(unet(), DDPMScheduler(prediction_type="v_prediction", num_train_timesteps=50)).save_pretrained("outputs/ddpm")
frozen = InterventionModel.build(load_base("outputs/ddpm", 16), ["quad1", "size"])
frozen.save_pretrained("outputs/frozen-diffusion/model")
"""  # noqa: E501
SETUPS = {
    'from_pretrained("outputs/ddpm")': FROZEN_HEAD,
    "local_files_only": 'InterventionPipeline.from_pretrained("user/name")',
}
UNRUN = {
    "@register_base": "test_full_size.py runs it",
    "hf-intervene demo": "minutes",
    "configs/mnist.yaml": "the digits are on the Hub",
    "training/studies/identifiability.py": "minutes",
    "--push": "test_cards.py does it",
    "reproduce.py": "minutes",
}


def readme_blocks() -> Iterator[Block]:
    """Blocks of the README with what is to be done about them; the figures under "What it reaches"
    took hours.
    """
    text = README.read_text(encoding="utf-8")
    hours = text[: text.index("\n## What it reaches")].count("\n")
    yield Block("setup", PREPARED, 1)
    for block in blocks(README):
        for snippet, setup in SETUPS.items():
            if snippet in block.text:
                yield Block("setup", setup, block.line)
        block.text = block.text.replace(
            "pipe(batch_size=4)", "pipe(batch_size=4, num_inference_steps=2)"
        )  # a thousand by default
        reasons = [reason for snippet, reason in UNRUN.items() if snippet in block.text]
        if reasons or block.line > hours:
            block.steps["skip"] = reasons[0] if reasons else "hours"
        yield block


@pytest.fixture
def shared(waits, workshop):
    """What the README loads from the Hub."""
    InterventionPipeline.from_model(build()).save_pretrained(workshop / "shared")
    commit = put_folder("user/name", workshop / "shared")
    HUB.repos["user/name"].refs["v1"] = commit


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_python_of_the_readme_runs_and_its_commands_have_these_options(shared):
    Reader(README, "parse").read(readme_blocks())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_commands_of_the_readme_run(shared):
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


def test_figures_are_those_that_were_measured():
    """Rows of tables, and figures of three decimals, stand in the README, the results or the cards."""  # noqa: E501
    measured = [
        README,
        RESULTS,
        *(ROOT / "training" / "results").glob("*.md"),
        *(ROOT / "model_cards").rglob("*.md"),
    ]
    text = "\n".join(path.read_text(encoding="utf-8") for path in measured)
    rows = {line.strip() for line in text.splitlines() if line.startswith("|")}
    for page in (page for page in PAGES if page not in measured):
        outside = re.sub(r"^```.*?^```$", "", prose(page), flags=re.DOTALL | re.MULTILINE)
        for line in outside.splitlines():
            if len(re.findall(r"\d\.\d{3}", line)) > 1 and line.startswith("|"):
                assert line.strip() in rows, f"{page.name}: {line}"
            for figure in re.findall(r"(?<![\d.])\d\.\d{3}(?!\d)", line):
                assert figure in text, f"{page.name}: {figure} in {line}"


PAPER = {
    "quad (dependent)": "quad-dependent",
    "quad (independent)": "quad-independent",
    "MNIST": "mnist",
}


def table_rows(text: str) -> dict[str, list[str]]:
    """Cells of the rows of tables by the letters of their names: the results' `beta-tcvae` is the
    guides' BetaTCVAE.
    """
    found = [
        [cell.strip() for cell in line[1:].removesuffix("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return {re.sub("[^a-z]", "", name.lower()): cells for name, *cells in found if name.strip("- ")}


def test_tables_of_the_paper_are_those_that_were_written():
    """In the README concept and composition of all tables side by side, in the results bits per
    pixel and the paper's protocol too.
    """
    text = RESULTS.read_text(encoding="utf-8")
    summary = table_rows(
        README.read_text(encoding="utf-8").split("\n## What it reaches")[1].split("\n## ")[0]
    )
    for number, (heading, name) in enumerate(PAPER.items()):
        written = table_rows(
            (ROOT / "training" / "results" / f"{name}-cpu.md").read_text(encoding="utf-8")
        )
        detailed = table_rows(re.split(r"\n#+ ", text.split(f"\n### {heading}\n")[1])[0])
        assert (
            {"endtoend", "finetune", "tvae", "floor"}
            <= written.keys()
            <= detailed.keys() & summary.keys()
        ), heading
        for row, (concept, _, composition, _, bits, bits_out, *paper, _) in written.items():
            means = [cell.partition(" ±")[0] for cell in (bits_out, *paper)]
            assert summary[row][2 * number : 2 * number + 2] == [
                concept,
                composition,
            ], f"README: {heading}, {row}"
            assert detailed[row][:2] == [concept, composition], f"{heading}, {row}"
            assert detailed[row][2:4] == [
                f"{bits} / {means[0]}" if bits else "",
                f"{means[1]} / {means[2]}",
            ], f"{heading}, {row}"


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
