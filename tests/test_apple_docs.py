"""apple/: its commands parse, its scripts explain themselves, and the house rules hold there too."""

import ast
import re
import shlex
from pathlib import Path

import pytest
from test_architecture import LIMIT, functions, public, tree

from apple import compare_mlx, export_coreml, export_mlx, extract_und, measure_nano

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "apple"
MODULES = sorted(FOLDER.glob("*.py"))
SCRIPTS = {"extract_und": extract_und, "export_mlx": export_mlx, "export_coreml": export_coreml,
           "compare_mlx": compare_mlx, "measure_nano": measure_nano}
TEXTS = [(FOLDER / "README.md").read_text(encoding="utf-8"), *(module.__doc__ for module in SCRIPTS.values())]
COMMANDS = sorted({line.strip() for text in TEXTS for line in text.splitlines()
                   if line.strip().startswith("python -m apple.")})
by_name = {"ids": lambda path: path.name}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_documented_command_parses(command):
    words = shlex.split(command)
    SCRIPTS[words[2].removeprefix("apple.")].parse_args(words[3:])


def test_there_is_a_command_for_every_script():
    assert {shlex.split(command)[2].removeprefix("apple.") for command in COMMANDS} == set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_the_docstring_and_explains_every_argument(name, capsys):
    assert all(f"\n{word} " in SCRIPTS[name].__doc__ for word in ("Reads", "Writes", "Needs", "Next"))
    with pytest.raises(SystemExit):
        SCRIPTS[name].parse_args(["--help"])
    shown = capsys.readouterr().out
    assert SCRIPTS[name].__doc__.strip().splitlines()[0] in shown
    assert re.findall(r"^  (--\w+(?: \S+)?)$\n(?=  -)", shown, re.M) == []


@pytest.mark.parametrize("path", MODULES, **by_name)
def test_functions_fit_a_screen_are_typed_and_explained(path):
    assert ast.get_docstring(tree(path))
    assert not [node.name for node in functions(path) if node.end_lineno - node.lineno + 1 > LIMIT]
    for node in public(path):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        assert all(arg.annotation for arg in arguments if arg.arg not in ("self", "cls")), node.name
        assert node.returns is not None, node.name
        assert ast.get_docstring(node) or node.name == "forward", node.name


def test_nothing_else_imports_apple():
    others = [path for path in ROOT.rglob("*.py") if FOLDER not in path.parents and "/test" not in str(path)
              and not {".venv", "build"} & set(path.parts)]
    uses = re.compile(r"^\s*(from|import) apple\b", re.M)
    assert not [path for path in others if uses.search(path.read_text(encoding="utf-8"))]


def test_the_sizes_in_the_readme_are_those_that_the_tests_hold():
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_apple_*.py"))
    sizes = re.findall(r"\| (\d,\d{3},\d{3},\d{3})", TEXTS[0])
    assert len(sizes) > 5
    assert not [size for size in sizes if size.replace(",", "_") not in tests]


def test_optional_packages_are_imported_only_where_they_are_needed():
    """MLX and coremltools at the top of a module would make the folder unusable without them."""
    for path in MODULES:
        top = {alias.name.split(".")[0] for node in tree(path).body if isinstance(node, ast.Import)
               for alias in node.names}
        assert path.name == "coreml_parts.py" or not top & {"mlx", "mlx_lm", "coremltools"}
