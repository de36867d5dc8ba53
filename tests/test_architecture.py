"""Where things live: bases are asked by their verbs, and modules import in one direction."""

import ast
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse.csgraph import connected_components

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


# One direction of imports, those inside of functions and for type checkers too


def modules(folder):
    """By dotted name the files of a package."""
    found = {}
    for file in folder.rglob("*.py"):
        parts = (folder.name, *file.relative_to(folder).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = file
    return found


def imports(name, files):
    """The modules of the package that one of them imports anywhere in its source."""
    package = name if files[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(files[name].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else None
            module = ".".join(filter(None, (above, node.module)))
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                yield inner if inner in files else module


def circles(folder):
    """Sets of modules that import each other, directly or by way of others. The package itself,
    which everybody imports, is left out."""
    files = modules(folder)
    names = sorted(set(files) - {folder.name})
    graph = np.zeros((len(names), len(names)))
    for row, name in enumerate(names):
        for other in imports(name, files):
            if other in names and other != name:
                graph[row, names.index(other)] = 1
    count, labels = connected_components(graph, connection="strong")
    sets = [{n for n, label in zip(names, labels) if label == k} for k in range(count)]
    return [found for found in sets if len(found) > 1]


def test_the_search_finds_circles(tmp_path):
    folder = tmp_path / "p"
    (folder / "q").mkdir(parents=True)
    (folder / "a.py").write_text("def f():\n    from .q import b\n")
    (folder / "q" / "__init__.py").write_text("")
    (folder / "q" / "b.py").write_text("from ..c import x\n")
    (folder / "c.py").write_text("import p.a\n")
    (folder / "d.py").write_text("from . import a\n")
    assert circles(folder) == [{"p.a", "p.q.b", "p.c"}]


def test_no_modules_import_each_other():
    assert not circles(PACKAGE)
