"""The public API: every name in the `__all__` of a module, its signature and its docstring.

`public_api.txt` is the agreed list. After an intended change, write it again and read the
difference:

    python tests/test_public_api.py
"""

import ast
import difflib
import importlib.util
import inspect
import pkgutil
import textwrap
from pathlib import Path

import hf_intervene
import hf_intervene.training


LISTED = Path(__file__).with_name("public_api.txt")
SPECIAL = ("__init__", "__call__")  # methods that users call with another syntax
WRAPPERS = {"property": "property ", "classmethod": "classmethod ", "staticmethod": "staticmethod "}


def public_modules():
    """Return the modules of the package that have an `__all__`, which makes a module public.

    The others are not imported.
    """
    names = {"hf_intervene"}
    for package in (hf_intervene, hf_intervene.training):
        names |= {
            found.name for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        }
    sources = {
        name: Path(importlib.util.find_spec(name).origin).read_text() for name in sorted(names)
    }
    return {
        name: importlib.import_module(name)
        for name, source in sources.items()
        if "\n__all__ = [" in source
    }


def definition(thing):
    """Return the syntax tree of a class or function: annotations and defaults as written."""
    return ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]


def plain_function(member):
    """Return the function of a method, property or decorator, or `None`.

    It is `None` if the function was not written in this package.
    """
    function = inspect.unwrap(getattr(member, "fget", None) or getattr(member, "__func__", member))
    # not by `dataclass`
    written = inspect.isfunction(function) and not function.__code__.co_filename.startswith("<")
    return function if written and function.__module__.startswith("hf_intervene") else None


def signature(name, function):
    node = definition(function)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{name}({ast.unparse(node.args)}){returns}"


def attribute(statement):
    """Return a public attribute or field as `name: type = default` without its help, or `None`."""
    value = statement.value
    if isinstance(statement, ast.Assign):
        name, shown = statement.targets[0].id, "" if isinstance(value, ast.Constant) else None
    else:
        name, shown = statement.target.id, f": {ast.unparse(statement.annotation)}"
    if shown is None or name.startswith("_"):
        return None
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "setting":
        value = value.args[0]  # its default, without help and checks
    elif isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        value.keywords = [
            keyword for keyword in value.keywords if keyword.arg in ("default", "default_factory")
        ]
    return f"{name}{shown}" + (f" = {ast.unparse(value)}" if value is not None else "")


def methods(cls):
    """Return the public methods and properties that a class defines, by name."""
    found = {name: plain_function(member) for name, member in sorted(vars(cls).items())}
    return {
        name: function
        for name, function in found.items()
        if function and (name in SPECIAL or not name.startswith("_"))
    }


def described(name, thing):
    """Return the lines of the list for one public name."""
    if inspect.isclass(thing):
        node = definition(thing)
        yield f"class {name}" + (
            f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else ""
        )
        for statement in node.body:
            if isinstance(statement, (ast.AnnAssign, ast.Assign)) and (
                shown := attribute(statement)
            ):
                yield f"    {shown}"
        for method, function in methods(thing).items():
            yield (
                f"    {WRAPPERS.get(type(vars(thing)[method]).__name__, '')}{signature(method, function)}"  # noqa: E501
            )
    elif callable(thing) and plain_function(thing):
        yield signature(name, plain_function(thing))
    elif isinstance(thing, (str, int, float, tuple)):
        yield f"{name} = {thing!r}"
    else:
        yield name  # an alias of types


def listing():
    """Return the public API as text: one line for each name, where it first occurs."""
    lines, seen = [], {}
    for module_name, module in public_modules().items():
        lines += ["", f"# {module_name}"]
        for name in sorted(module.__all__):
            thing = getattr(module, name)
            if plain_function(thing) or inspect.isclass(thing):
                first = seen.setdefault(thing, f"{module_name}.{name}")
                if first != f"{module_name}.{name}":
                    lines.append(f"{name}: see {first}")
                    continue
            lines += described(name, thing)
    return "\n".join(lines[1:]) + "\n"


def test_the_public_api_is_the_one_that_is_listed():
    before, now = LISTED.read_text().splitlines(), listing().splitlines()
    changes = "\n".join(
        line for line in difflib.unified_diff(before, now, "listed", "now", n=0, lineterm="")
    )
    assert not changes, (
        f"the public API has changed:\n{changes}\nIf that is meant, run `python"
        " tests/test_public_api.py` and look at what it writes."
    )


def test_every_public_name_has_a_docstring():
    missing = []
    for module_name, module in public_modules().items():
        things = {module_name: module}
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isclass(thing):
                # The class describes the constructor's arguments. An override without a docstring
                # has the meaning of the method that it overrides.
                things |= {
                    f"{name}.{method}": getattr(thing, method)
                    for method in methods(thing)
                    if method != "__init__"
                }
                if ast.get_docstring(definition(thing)) is None:  # dataclasses generate one
                    missing.append(f"{module_name}: {name}")
            elif plain_function(thing):
                things[name] = thing
        missing += [
            f"{module_name}: {name}" for name, thing in things.items() if not inspect.getdoc(thing)
        ]
    assert not missing, f"without a docstring: {missing}"


if __name__ == "__main__":
    LISTED.write_text(listing())
    print(f"{LISTED} written: {len(LISTED.read_text().splitlines())} lines.")
