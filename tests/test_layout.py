"""Which module imports which: the package nothing of the recipes."""

import ast
from pathlib import Path


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
