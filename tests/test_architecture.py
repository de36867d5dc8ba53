"""Where things live: bases are asked by their verbs, and modules import in one direction."""

import ast
from pathlib import Path

import pytest

import hf_intervene


PACKAGE = Path(hf_intervene.__file__).parent
ROOT = PACKAGE.parent
FLAGS = ("denoises", "residual_shape")
FAMILIES = {"AutoencoderBase", "DiffusionBase", "LightVAEBase", "PipelineBase"}


def kind_tests(source):
    """Lines that ask a base what kind it is: `isinstance` with a family, or a flag of `base`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
            "isinstance",
            "issubclass",
        ):
            names = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
            names |= {n.attr for n in ast.walk(node.args[1]) if isinstance(n, ast.Attribute)}
            if names & FAMILIES:
                found.append(node.lineno)
        if isinstance(node, ast.Attribute) and node.attr in FLAGS:
            owner = node.value
            if getattr(owner, "id", getattr(owner, "attr", "")) == "base":
                found.append(node.lineno)
    return found


def sources():
    folders = [PACKAGE, ROOT / "training"]
    files = [file for folder in folders for file in sorted(folder.rglob("*.py"))]
    return [file for file in files if PACKAGE / "bases" not in file.parents]


@pytest.mark.parametrize(
    "source",
    [
        "if model.base.denoises: pass",
        "isinstance(base, bases.DiffusionBase)",
        "isinstance(base, (AutoencoderBase, int))",
        "self.base.residual_shape is None",
    ],
)
def test_the_search_finds_a_test_of_a_kind(source):
    assert kind_tests(source) == [1]


def test_no_base_is_asked_for_its_kind():
    found = {str(file.relative_to(ROOT)): kind_tests(file.read_text()) for file in sources()}
    assert not {name: lines for name, lines in found.items() if lines}
