"""What the documentation says can be typed, and exists."""

import ast
import functools
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "lance_nano" / "README.md",
        *sorted((ROOT / "benchmarks").glob("*.md"))]
STARTED = [path for folder in (".", "apple", "benchmarks", "examples", "lance_nano")
           for path in (ROOT / folder).glob("*.py")]
SCRIPTS = ["awq_calibrate_single", "awq_merge_stats", "awq_apply", "nvfp4_apply", "run_baseline", "run_quant_eval",
           "export_vllm"]


@functools.cache
def commands() -> list[str]:
    """Every command of ours in the documentation's code blocks, and in the docstrings of what can be started."""
    texts = [path.read_text(encoding="utf-8") for path in DOCS if path.exists()]
    texts += [ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "" for path in STARTED]
    lines = [line.strip() for text in texts for line in text.replace("\\\n", " ").splitlines()]
    lines = [re.sub(r"^(\w+=\S+ )?(torchrun --nproc_per_node \d+|python)", "python", line) for line in lines]
    ours = re.compile(r"python (-m (?:lance_nano|lance_quant|benchmarks|apple)\.\w+|[\w/]+\.py)( |$)")
    found = [line for line in lines if ours.match(line) and "…" not in line]
    return sorted({re.sub(r"\s+#.*", "", line) for line in found})


def module_of(command: str) -> object:
    words = shlex.split(command)
    if words[1] == "-m":
        package = (ROOT / words[2].replace(".", "/")).is_dir()
        return importlib.import_module(f"{words[2]}.__main__" if package else words[2])
    path = ROOT / words[1]
    assert path.is_file(), f"{words[1]} does not exist"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("command", commands())
def test_every_documented_command_parses(command):
    words = shlex.split(command)
    arguments = words[3:] if words[1] == "-m" else words[2:]
    if arguments == ["--help"]:
        with pytest.raises(SystemExit, match="^0$"):
            module_of(command).parse_args(arguments)
    else:
        module_of(command).parse_args(arguments)


def test_there_are_commands_for_every_stage():
    joined = "\n".join(commands())
    assert all(f"python {name}.py" in joined for name in SCRIPTS)


def test_every_path_of_the_tree_exists():
    (tree,) = re.findall(r"## The tree\n\n```\n(.*?)```", README, re.S)
    paths = re.findall(r"^([\w./]+)|(?<=\s)(\w+\.py)\b", tree, re.M)
    names = [first or second for first, second in paths]
    assert len(names) > 10
    assert [name for name in names if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_the_docstring_and_explains_every_argument(name, capsys):
    module = importlib.import_module(name)
    assert all(f"\n{word} " in module.__doc__ for word in ("Reads", "Writes", "Needs", "Next"))
    with pytest.raises(SystemExit):
        module.parse_args(["--help"])
    shown = capsys.readouterr().out
    assert module.__doc__.strip().splitlines()[0] in shown
    # argparse prints an argument without help alone on its line
    assert re.findall(r"^  (--\w+(?: \S+)?)$\n(?=  -)", shown, re.M) == []


@pytest.mark.parametrize("path", [path for path in STARTED if "def main" in path.read_text(encoding="utf-8")],
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_what_can_be_started_ends_as_the_scripts_do(path):
    """Mistakes of the user are one line and code 2: cli.script.run."""
    *_, before, last = ast.parse(path.read_text(encoding="utf-8")).body
    calls = ast.unparse(last).removeprefix("if __name__ == '__main__':").strip()
    if calls == "command()":  # a stage: what its console script starts
        assert isinstance(before, ast.FunctionDef) and before.name == "command"
        calls = ast.unparse(before.body[-1])
    assert calls == "script.run(main)"
