"""What `test_docs.py` reads out of a Markdown page: its blocks, and the comments before them that
say how a test runs them.

Comments do not show on the site. Each is for the block that follows it:

    <!-- test: setup
    Python code -->                     runs there: makes what the reader has, such as images or a saved model
    <!-- test: append --x 1 -->         options that every command of the block gets
    <!-- test: replace 300 by 24 -->    a number of the block is another one
    <!-- test: skip because ... -->     does not run: Python is compiled, commands are parsed
    <!-- test: prints -->               the (text) block is in what the block before it printed; `...` stands for anything
    <!-- test: raises
    Python code, or $ command -->       the (text) block is what this fails with
"""  # noqa: E501

import argparse
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import pytest
from conftest import TINY

from hf_intervene import cli
from hf_intervene.trainer.parsing import parse_arguments


ROOT = Path(__file__).parents[1]
_PART = re.compile(
    r"^<!-- test: (?P<comment>.*?)\s*-->$|^```(?P<kind>[\w{}-]*)[^\n]*\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
_SETTINGS = TINY | {"max_steps": 2, "eval_every": 2}

# What the commands of all pages get, so that each takes a second or two.
TINY_OPTIONS = {
    "train": (
        " ".join(f"--{name} {value}" for name, value in _SETTINGS.items())
        .translate(str.maketrans("", "", "[],"))
        .split()
    ),
    "evaluate": (
        "--images 8 --projections 5 --num-inference-steps 2 --detector-images 0 --twins 0".split()
    ),
    "pretrain": ["--images", "16", "--resolution", "16", "--steps", "2", "--batch-size", "8"],
    "check": ["--images", "24", "--resolution", "16"],
}


@dataclass
class Block:
    """A fenced block, or a setup: its language, text, line in the page, and the comments before it."""  # noqa: E501

    kind: str
    text: str
    line: int
    steps: dict[str, str] = field(default_factory=dict)


def blocks(page: Path) -> list[Block]:
    """The blocks of a page in order, replacements made."""
    text, found, comments = page.read_text(encoding="utf-8"), [], {}
    for match in _PART.finditer(text):
        line = text[: match.start()].count("\n") + 2
        if match["comment"] is None:
            block = Block(match["kind"], match["text"], line, comments)
            if "replace" in comments:
                before, after = comments["replace"].split(" by ")
                assert re.search(rf"\b{before}\b", block.text), (
                    f"{page.name}:{line}: nothing to replace"
                )
                block.text = re.sub(rf"\b{before}\b", after, block.text)
            found, comments = [*found, block], {}
            continue
        step, rest = re.match(r"(\S+)\s*(.*)", match["comment"], re.DOTALL).groups()
        assert step in {
            "setup",
            "append",
            "replace",
            "skip",
            "prints",
            "raises",
        }, f"{page.name}:{line}: {step}"
        if step == "setup":
            found.append(Block("setup", rest, line))
        else:
            comments[step] = rest
    return found


@dataclass
class Command:
    """One command of a bash block.

    Args:
        words: with what is appended.
        name: of the recipe or sub-command, such as `train`; empty if it is neither.
        main: what runs it in this process, if it is one of ours.
        argv: the arguments of `main`.
    """

    words: list[str]
    name: str = ""
    main: Callable | None = None
    argv: list[str] = field(default_factory=list)


def commands(block: Block, tiny: bool = True) -> Iterator[Command]:
    """The commands of a bash block, tiny options appended."""
    appended = shlex.split(block.steps.get("append", ""))
    for line in block.text.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&", line):
            words = shlex.split(part, comments=True)
            if words:
                yield _command(words, appended, TINY_OPTIONS if tiny else {})


def _command(words: list[str], appended: list[str], tiny: dict[str, list[str]]) -> Command:
    recipe = next(
        (k for k, word in enumerate(words) if re.fullmatch(r"training/(\w+/)?\w+\.py", word)), None
    )
    if recipe is not None:
        name, main, first = Path(words[recipe]).stem, None, recipe + 1
        module = ".".join(Path(words[recipe]).with_suffix("").parts)
        main = import_module(f"hf_intervene.{module}").main
    elif words[0] == "hf-intervene":
        name, main, first = words[1], cli.main, 1
    else:
        return Command(words)
    assert not any(word.startswith("/") for word in words), (
        f"a command of a page would write outside its folder: {words}"
    )
    words = words + tiny.get(name, []) + appended
    return Command(words, name, main, words[first:])


class _Parsed(Exception):
    pass


def check_options(command: Command) -> None:
    """Parse a command of ours with its own parser, and no more."""
    if command.name == "train":
        parse_arguments(command.argv[1:] if command.main is cli.main else command.argv)
        return
    parser = argparse.ArgumentParser
    parse, parse_known = parser.parse_args, parser.parse_known_args

    def only_parse(self, *args, **kwargs):
        patch.setattr(parser, "parse_known_args", parse_known)
        parse(self, *args, **kwargs)
        raise _Parsed

    def only_parse_known(self, *args, **kwargs):
        """Of a command that leaves the rest to the trainer's parser."""
        patch.setattr(parser, "parse_known_args", parse_known)
        parse_arguments(parse_known(self, *args, **kwargs)[1])
        raise _Parsed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(_Parsed):
        patch.setattr(parser, "parse_args", only_parse)
        patch.setattr(parser, "parse_known_args", only_parse_known)
        command.main(command.argv)


def says(expected: str, found: str, whole: bool = False) -> bool:
    """Whether a text is in (or is the whole of) another, up to white space; `...` stands for
    anything.
    """
    pattern = ".*?".join(re.escape(" ".join(part.split())) for part in expected.split("..."))
    return bool((re.fullmatch if whole else re.search)(pattern, " ".join(found.split()), re.DOTALL))
