"""Which module imports which: the package nothing of the recipes."""

import ast
from pathlib import Path

from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_intervene"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(path: Path, statements: list[ast.stmt] | None = None) -> set[str]:
    """The modules of this package that a file imports, by their full names: anywhere in it, or by
    these statements alone.
    """
    name, found = module_name(path), set()
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if statements is None else statements:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            # `from x import y` is of the module x.y, if there is one, and otherwise of x
            found |= {
                f"{source}.{alias.name}" if f"{source}.{alias.name}" in MODULES else source
                for alias in node.names
            }
    return {x for x in found if x.partition(".")[0] == "hf_intervene"}


def test_the_loop_reads_from_top_to_bottom():
    """No long function, and none that writes the variables of another one."""
    tree = ast.parse((PACKAGE / "trainer" / "loop.py").read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert len(functions) > 5
    assert not {f.name for f in functions if f.end_lineno - f.lineno >= 80}
    assert not [node for node in ast.walk(tree) if isinstance(node, (ast.Nonlocal, ast.Global))]


def test_the_package_imports_nothing_of_the_recipes():
    wrong = {
        f"{name} imports {other}"
        for name, path in MODULES.items()
        for other in imported(path)
        if other.startswith("hf_intervene.training")
    }
    assert not wrong
    # and such an import would be seen
    recipe = ROOT / "training" / "reproduce.py"
    assert any(name.startswith("hf_intervene.training") for name in imported(recipe))


def module_level(statements: list[ast.stmt]) -> list[ast.stmt]:
    """The imports that run when a module is imported: not those of functions, nor those that type
    checkers alone see.
    """
    found = []
    for node in statements:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found.append(node)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            found += module_level(node.body) + module_level(node.orelse)
        elif isinstance(node, (ast.Try, ast.With, ast.For)):
            found += module_level(node.body)
    return found


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Groups of modules that import each other."""
    names = sorted(graph)
    edges = [[a in graph[b] for a in names] for b in names]
    number, labels = connected_components(csr_array(edges), connection="strong")
    groups = [{names[i] for i in (labels == k).nonzero()[0]} for k in range(number)]
    return [group for group in groups if len(group) > 1]


def test_no_module_imports_itself_by_way_of_others():
    graph = {
        name: imported(path, module_level(ast.parse(path.read_text()).body)) & MODULES.keys()
        for name, path in MODULES.items()
    }
    assert sum(map(len, graph.values())) > 100
    assert not circles(graph)
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [{"a", "b", "c"}]
