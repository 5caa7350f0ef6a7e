"""The rules that keep the tree readable, checked on the source."""

import ast
import functools
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "lance_quant").rglob("*.py"))
SCRIPTS = sorted(path for path in ROOT.glob("[a-z]*.py"))
# The rooms of lance_quant/, from the ground up: a module imports from its own room and from those below it.
FLOORS = ("errors", "storage", "distributed", "cpu", "formats", "lance", "kernels", "calibration", "methods",
          "inference", "evaluation", "cli", "official", "serving")
MOST_ROOMS, MOST_MODULES = 14, 16
DOORS = ("lance_quant", "lance_quant.__main__")  # into the house, and no rooms of it
LIMIT = 45
by_name = {"ids": lambda path: str(path.relative_to(ROOT))}


@functools.cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path):
    """Dotted names of everything that a file imports."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def functions(path):
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


@pytest.mark.parametrize("path", PACKAGE, **by_name)
def test_the_package_never_imports_a_root_script(path):
    roots = {script.stem for script in SCRIPTS}
    assert not {name.split(".")[0] for name in imported(path)} & roots


def module(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path): path for path in PACKAGE}


def needed(path):
    """Modules of the package that a file imports, lazily and for type checking too."""
    named = imported(path) & MODULES.keys() - {module(path)}
    return {name for name in named if not any(other.startswith(f"{name}.") for other in named)}


def room(name):
    return name.split(".")[1]


def test_rooms_are_few_and_small():
    assert {room(name) for name in MODULES if name not in DOORS} == set(FLOORS)
    assert len(FLOORS) <= MOST_ROOMS
    for folder in {path.parent for path in PACKAGE} - {ROOT / "lance_quant"}:
        assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= MOST_MODULES, folder


@pytest.mark.parametrize("path", [path for path in PACKAGE if module(path) not in DOORS], **by_name)
def test_imports_point_down(path):
    floor = FLOORS.index(room(module(path)))
    assert not [name for name in needed(path) if "." in name and FLOORS.index(room(name)) > floor]


def test_no_module_needs_itself():
    """No cycle, lazy imports and those for type checking included."""
    graph = {name: needed(path) for name, path in MODULES.items()}
    while True:
        ready = [name for name, below in graph.items() if not below & graph.keys()]
        if not ready:
            break
        for name in ready:
            del graph[name]
    assert sorted(graph) == []


def bound_by_import(path):
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return names


@pytest.mark.parametrize("path", [*PACKAGE, *SCRIPTS], **by_name)
def test_nothing_foreign_is_rebound(path):
    foreign = bound_by_import(path)
    for node in ast.walk(tree(path)):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign) else []:
            while isinstance(target, ast.Attribute) and isinstance(target.value, ast.Attribute):
                target = target.value
            if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                assert target.value.id not in foreign, f"line {node.lineno} assigns to {target.value.id}.{target.attr}"


@pytest.mark.parametrize("path", [path for path in PACKAGE if path.name != "script.py"], **by_name)
def test_the_package_does_not_print(path):
    calls = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


def test_what_cli_prints_goes_to_stderr():
    calls = [node for node in ast.walk(tree(ROOT / "lance_quant" / "cli" / "script.py")) if isinstance(node, ast.Call)]
    prints = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    assert all(any(keyword.arg == "file" for keyword in call.keywords) for call in prints)


@pytest.mark.parametrize("path", [*PACKAGE, *SCRIPTS], **by_name)
def test_no_function_is_longer_than_a_screen(path):
    long = {node.name: node.end_lineno - node.lineno + 1 for node in functions(path)
            if node.end_lineno - node.lineno + 1 > LIMIT}
    assert not long


def public(path):
    """Functions and methods without an underscore, in public scopes, that are not nested in a function."""
    def walk(body):
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield from walk(node.body)
            elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                yield node

    return walk(tree(path).body)


@pytest.mark.parametrize("path", [*PACKAGE, *SCRIPTS], **by_name)
def test_public_functions_have_type_hints(path):
    for node in public(path):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        bare = [arg.arg for arg in arguments if arg.annotation is None and arg.arg not in ("self", "cls")]
        assert not bare and node.returns is not None, f"{node.name} (line {node.lineno}): {bare}"


@pytest.mark.parametrize("path", [*PACKAGE, *SCRIPTS], **by_name)
def test_only_main_and_what_reads_the_command_line_take_its_arguments(path):
    """Everything else takes settings, requests, paths and numbers."""
    if path.parent.name == "cli" or path.relative_to(ROOT).parts[1:] == ("official", "request.py"):
        return
    takers = [node.name for node in functions(path) if node.name != "main"
              and any(arg.annotation and "Namespace" in ast.unparse(arg.annotation) for arg in node.args.args)]
    assert not takers


def is_overload(node):
    return any("overload" in ast.unparse(decorator) for decorator in node.decorator_list)


@pytest.mark.parametrize("path", [*PACKAGE, *SCRIPTS], **by_name)
def test_public_functions_have_docstrings(path):
    assert not [node.name for node in public(path) if not (ast.get_docstring(node) or is_overload(node))]


@pytest.mark.parametrize("path", [*PACKAGE, *SCRIPTS], **by_name)
def test_public_functions_of_tensors_say_shapes(path):
    """[out, in] and the like, or that the shape is any, flat or a scalar."""
    for node in public(path):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        typed = " ".join(ast.unparse(one) for one in (*(arg.annotation for arg in arguments), node.returns) if one)
        if re.search(r"\bTensor\b", typed) and not is_overload(node):
            said = ast.get_docstring(node) or ""
            assert re.search(r"\[[^\]]+\]|shape|\bflat\b|scalar", said), f"{node.name} (line {node.lineno})"


@pytest.mark.parametrize("path", [*PACKAGE, *SCRIPTS], **by_name)
def test_every_module_says_what_it_is_for(path):
    assert ast.get_docstring(tree(path)) or not path.read_text(encoding="utf-8").strip()


def test_types_are_checked_everywhere_without_blanket_ignores():
    """`make lint` runs mypy; what it must overlook is named where it is, by its kind."""
    mypy = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    assert mypy["files"] == ["[a-z]*.py", "lance_quant"]
    assert mypy["disallow_untyped_defs"] and mypy["check_untyped_defs"]
    assert not [one for one in mypy["overrides"] if "ignore_errors" in one]
    for path in [*PACKAGE, *SCRIPTS]:
        assert not re.search(r"# type: ignore(?!\[)|# mypy:", path.read_text(encoding="utf-8")), path
