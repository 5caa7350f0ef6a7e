"""The rules that keep the tree readable, checked on the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "lance_quant").rglob("*.py"))
SCRIPTS = sorted(path for path in ROOT.glob("*.py"))
RUNTIME = sorted((ROOT / "lance_quant" / "lance").rglob("*.py"))
QUANTIZER = sorted((ROOT / "lance_quant" / "methods").glob("*.py"))
LIMIT = 45
by_name = {"ids": lambda path: str(path.relative_to(ROOT))}


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


@pytest.mark.parametrize("path", RUNTIME, **by_name)
def test_the_runtime_stands_on_the_foundations_only(path):
    allowed = ("lance_quant.formats.layout", "lance_quant.errors", "lance_quant.storage", "lance_quant.cpu",
               "lance_quant.lance")
    ours = {name for name in imported(path) if name.startswith("lance_quant.")}
    assert not [name for name in ours if not name.startswith(allowed) and name != "lance_quant.formats"]


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


@pytest.mark.parametrize("path", QUANTIZER, **by_name)
def test_public_functions_of_the_quantizer_have_docstrings(path):
    assert not [node.name for node in public(path) if ast.get_docstring(node) is None]


@pytest.mark.parametrize("path", [*PACKAGE, *SCRIPTS], **by_name)
def test_every_module_says_what_it_is_for(path):
    assert ast.get_docstring(tree(path)) or not path.read_text(encoding="utf-8").strip()
