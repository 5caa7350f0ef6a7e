"""What the documentation says can be typed, and exists: commands, links, paths, the map of rooms, a short README."""

import ast
import functools
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_architecture import DOORS, FLOORS, MODULES, needed, room

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "tests" / "goldens" / "README.md",
         *(path for folder in ("docs", "benchmarks") for path in sorted((ROOT / folder).glob("*.md"))),
         *(ROOT / folder / "README.md" for folder in ("comfyui", "apple", "lance_nano")),
         *sorted((ROOT / "plugins").rglob("*.md"))]
STARTED = [path for folder in (".", "apple", "benchmarks", "examples", "lance_nano")
           for path in (ROOT / folder).glob("*.py")]
SCRIPTS = ["awq_calibrate_single", "awq_merge_stats", "awq_apply", "nvfp4_apply", "run_baseline", "run_quant_eval",
           "export_vllm", "merge_lora", "serve"]
FOLDERS = "apple|benchmarks|comfyui|docs|examples|lance_nano|lance_quant|plugins|tests"
MOST_BYTES, MOST_WORDS = 10_000, 80  # of the README; of one of its paragraphs
by_page = {"ids": lambda path: str(path.relative_to(ROOT))}


@functools.cache
def commands() -> list[str]:
    """Every command of ours in the documentation's code blocks, and in the docstrings of what can be started."""
    texts = [path.read_text(encoding="utf-8") for path in PAGES]
    texts += [ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "" for path in STARTED]
    lines = [line.strip() for text in texts for line in text.replace("\\\n", " ").splitlines()]
    before = re.compile(r"^(\w+=\S+ |/usr/bin/time -v )*(torchrun --nproc_per_node \d+|python)")
    lines = [before.sub("python", re.sub(r"^lance-quant ", "python -m lance_quant ", line)) for line in lines]
    ours = re.compile(r"python (-m (?:lance_nano|lance_quant|benchmarks|apple|comfyui)(?:\.\w+)?|[\w/]+\.py)( |$)")
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


@functools.cache
def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in a language, "" for those without one."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


@functools.cache
def anchors(page: Path) -> set[str]:
    """What #… may follow the name of a page: headings as GitHub spells them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, **by_page)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(path), f"{target}: there are {sorted(anchors(path))}"


@pytest.mark.parametrize("page", PAGES, **by_page)
def test_every_named_file_of_the_repository_exists(page):
    """In backticks, from the root of the repository or the page's folder; * and NAME stand for something."""
    text = prose(page)
    names = re.findall(rf"`((?:{FOLDERS})/[\w./*-]+)`", text)
    gone = [name for name in names if "NAME" not in name
            and not any(list(base.glob(name)) for base in (ROOT, page.parent))]
    assert gone == []
    scripts = {path.name for folder in FOLDERS.split("|") for path in (ROOT / folder).rglob("*.py")}
    scripts |= {path.name for path in ROOT.glob("*.py")} | {"inference_lance.py"}  # the official one
    assert set(re.findall(r"`(\w+\.py)`", text)) <= scripts


@pytest.mark.parametrize("page", PAGES, **by_page)
def test_every_python_example_is_python(page):
    for block in blocks(page, "python"):
        ast.parse(block)


@pytest.mark.slow
def test_the_python_of_the_readme_draws_a_picture(tmp_path):
    """As it stands, but for where lance-nano is and where the picture goes."""
    (block,) = blocks(ROOT / "README.md", "python")
    assert len(block.splitlines()) <= 10
    block = block.replace('"lance_nano/', f'r"{ROOT}/lance_nano/')
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, r'{ROOT}')\n{block}"], cwd=tmp_path,
                          check=True, stdout=subprocess.PIPE, text=True)
    assert (tmp_path / "circle.png").is_file() and done.stdout.strip() == "red"


def test_targets_of_make_that_are_named_exist_and_are_listed():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    named = {name for text in texts for name in re.findall(r"(?:^|`)make (\w+)", text, re.M)}
    assert {"demo", "test", "help"} <= named
    assert named <= set(re.findall(r"^(\w+):.*##", makefile, re.M))


def test_downloads_name_the_repositories_and_a_folder():
    lines = [line for page in PAGES for line in re.findall(r"hf download [^`\n]+", page.read_text(encoding="utf-8"))]
    assert len(lines) > 8
    for line in lines:
        words = shlex.split(line)
        assert re.fullmatch(r"bytedance-research/Lance|Reza2kn/Lance-3B(-Video)?-(AWQ-INT4|NVFP4)", words[2])
        assert words[3] == "--local-dir" and words[5::2] == ["--include"] * len(words[5::2])


def test_the_readme_is_a_front_door():
    """A stranger reads it to the end: 10 kB, the picture and the sizes first, short paragraphs, plain tables."""
    assert len(README.encode()) <= MOST_BYTES
    first = README[:README.index("## ")]
    assert "![" in first and "| Lance_3B_Video |" in first
    assert README.index("make demo ") < README.index("hf download") < README.index("## What ran where")
    text = prose(ROOT / "README.md")
    for paragraph in re.split(r"\n\s*\n|\n(?=\d\. |- )", text):
        if not paragraph.lstrip().startswith(("|", "#", "![")):
            assert len(paragraph.split()) <= MOST_WORDS, paragraph
    cells = [cell for line in text.splitlines() if line.startswith("|") for cell in line.split("|")]
    assert not [cell for cell in cells if re.search(r"<br|<li|; ", cell) or len(cell.split()) > 25]


def test_every_page_of_the_manual_is_linked_from_the_readme():
    assert [path.name for path in (ROOT / "docs").glob("*.md") if f"(docs/{path.name})" not in README] == []


def below(name: str, arrows: set[tuple[str, str]]) -> set[str]:
    """All rooms that arrows lead to from a room, over others too."""
    direct = {end for start, end in arrows if start == name}
    return direct.union(*(below(end, arrows) for end in direct))


def test_the_map_of_rooms_is_the_code():
    """Every drawn arrow is an import, and every import between rooms follows drawn arrows."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawn = set(re.findall(r"^    (\w+) --> (\w+)$", page, re.M))
    imports = {(room(name), room(other)) for name, path in MODULES.items() if name not in DOORS
               for other in needed(path) if "." in other and room(other) != room(name)}
    assert drawn - imports == set(), "drawn, and not in the code"
    missing = {(start, end) for start, end in imports if end not in below(start, drawn)}
    assert missing == set(), "in the code, and not drawn"
    listed = re.findall(r"^\| `(\w+)` \|", page, re.M)
    assert sorted(listed) == sorted(FLOORS)


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
