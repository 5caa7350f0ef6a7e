"""What pip installs: a wheel that works away from the repository, its dependencies, and the set the tests run with."""

import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import lance_quant
from lance_quant.cpu import compile_c

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
LINES = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
STAGES = {"lance-quant-calibrate": "awq_calibrate_single", "lance-quant-merge": "awq_merge_stats",
          "lance-quant-int4": "awq_apply", "lance-quant-nvfp4": "nvfp4_apply", "lance-quant-baseline": "run_baseline",
          "lance-quant-eval": "run_quant_eval", "lance-quant-vllm": "export_vllm",
          "lance-quant-serve": "serve", "lance-quant-merge-lora": "merge_lora"}
PACKAGES = ("lance_quant", "lance_nano")


def by_name(lines):
    return {found.name: found.specifier for found in (Requirement(line) for line in lines)}


WHEEL, PINNED = by_name(PROJECT["dependencies"]), by_name(line for line in LINES if not line.startswith("#"))


def test_the_wheel_takes_the_torch_that_is_there():
    """A pin would replace the CUDA build of a ComfyUI."""
    assert [str(one) for one in WHEEL["torch"]] == [">=2.6"]
    assert not any(one.operator in ("==", "===", "~=") for specifier in WHEEL.values() for one in specifier)


def test_requirements_are_the_wheels_dependencies_with_torch_pinned():
    assert WHEEL.keys() == PINNED.keys()
    assert {name for name in WHEEL if WHEEL[name] != PINNED[name]} == {"torch"}
    (pin,) = PINNED["torch"]
    assert pin.operator == "==" and WHEEL["torch"].contains(pin.version)


@pytest.mark.parametrize("name", ["Makefile", "README.md"])
def test_the_documented_set_up_installs_the_pinned_set_and_no_cuda_packages(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert re.search(r"pip install (-q )?-r requirements.txt -e \.", text)
    assert "https://download.pytorch.org/whl/cpu" in text
    assert not re.search(r"pip install (-q )?-e \.", text)


def test_the_oldest_python_is_said_alike_everywhere():
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")
    assert PYPROJECT["tool"]["mypy"]["python_version"] == oldest
    nodes = tomllib.loads((ROOT / "comfyui/pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert nodes["requires-python"] == PROJECT["requires-python"]
    for page in ("README.md", "CONTRIBUTING.md"):
        assert f"Python {oldest}" in (ROOT / page).read_text(encoding="utf-8")


def test_ci_runs_the_tests_on_three_systems_and_the_oldest_python():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]
    matrix = jobs["test"]["strategy"]["matrix"]
    assert {name.split("-")[0] for name in matrix["os"]} == {"ubuntu", "windows", "macos"}
    assert matrix["python"][0] == PROJECT["requires-python"].removeprefix(">=") and len(matrix["python"]) == 2
    assert jobs["test"]["steps"][-1]["run"].startswith("python -m pytest")
    assert jobs["lint"]["steps"][-1]["run"] == "make lint"


def test_wheels_with_c_are_made_and_tried_on_three_systems_and_two_architectures():
    jobs = yaml.safe_load((ROOT / ".github/workflows/wheels.yml").read_text(encoding="utf-8"))["jobs"]
    assert set(jobs["wheel"]["strategy"]["matrix"]["os"]) == {
        "ubuntu-latest", "ubuntu-24.04-arm", "windows-latest", "windows-11-arm", "macos-15-intel", "macos-latest"}
    (build,) = [step["env"] for step in jobs["wheel"]["steps"] if "cibuildwheel" in step["uses"]]
    assert build["CIBW_TEST_COMMAND"] == "python {project}/tests/installed_kernels.py"
    assert all("LANCE_QUANT_NEEDS_C=1" in build[name] for name in ("CIBW_ENVIRONMENT", "CIBW_ENVIRONMENT_MACOS"))


def test_the_version_to_cite_is_the_version():
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.M)
    assert cited[1] == lance_quant.__version__
    assert f"## {lance_quant.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_hooks_run_a_ruff_that_the_tests_may_run():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    pinned = re.search(r"ruff-pre-commit\n    rev: v(\S+)", hooks)[1]
    lines = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()
    (ruff,) = [Requirement(line) for line in lines if line.startswith("ruff")]
    assert ruff.specifier.contains(pinned)


COMPILER = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang") or sys.platform == "win32"


def built(work: Path, **environment: str) -> Path:
    """A wheel of the working tree, built in a copy: an earlier build/ would put files that are gone into it."""
    source = work / "source"
    source.mkdir()
    for path in [*ROOT.glob("[a-z]*.py"), *(ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE"))]:
        shutil.copy(path, source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir",
                    str(work), str(source)], check=True, capture_output=True, text=True,
                   env={**os.environ, **environment})
    return next(work.glob("lance_quant-*.whl"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    needs = {"LANCE_QUANT_NEEDS_C": "1"} if COMPILER else {}
    return built(tmp_path_factory.mktemp("wheel"), **needs)


@pytest.fixture(scope="module")
def scripts(wheel, tmp_path_factory) -> Path:
    """Of a fresh environment that has the wheel, our dependencies by a path, and nothing of the checkout."""
    work = tmp_path_factory.mktemp("installed")
    venv.create(work / "venv", symlinks=sys.platform != "win32")
    scripts = work / "venv" / ("Scripts" if sys.platform == "win32" else "bin")
    python = scripts / f"python{'.exe' if sys.platform == 'win32' else ''}"
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index",
                    str(wheel)], check=True)
    site = Path(run(work, python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return scripts


def run(folder: Path, *command: str | Path, **environment: str) -> str:
    bare = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "CC")}
    done = subprocess.run(command, cwd=folder, env={**bare, **environment}, check=True, stdout=subprocess.PIPE,
                          text=True)
    return done.stdout.strip()


def held_by(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


FILES = {path.relative_to(ROOT).as_posix() for name in PACKAGES for path in (ROOT / name).rglob("*")
         if path.is_file() and path.suffix not in (".pyc", ".so", ".md")} \
    | {path.name for path in ROOT.glob("[a-z]*.py") if path.name != "setup.py"}


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_both_packages_and_no_name_of_others(wheel):
    """C sources, headers, styles, templates, the checkpoint, py.typed; apple and benchmarks run from a checkout."""
    assert {"lance_quant/py.typed", "lance_nano/checkpoint/Wan2.2_VAE.pth"} <= FILES
    native = {name for name in held_by(wheel) if name.startswith("lance_quant/cpu/native-")}
    assert held_by(wheel) - native == FILES
    levels = compile_c.LEVELS if compile_c.is_x86(platform.machine()) else ["plain"]
    names = [f"lance_quant/cpu/{compile_c.wheel_name(level)}" for level in levels if COMPILER]
    assert native == {f"{name}{suffix}" for name in names for suffix in ("", ".sha256")}


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="no C compiler on this machine")
def test_a_wheel_with_libraries_is_for_its_platform_and_any_python(wheel):
    python, abi, system = wheel.stem.split("-")[-3:]
    assert (python, abi) == ("py3", "none") and system not in ("any", "")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="MSVC is not asked for by CC")
def test_a_wheel_that_is_built_without_a_compiler_is_python_for_all_platforms(tmp_path):
    wheel = built(tmp_path, CC="no-such-compiler")
    assert wheel.name.endswith("-py3-none-any.whl") and held_by(wheel) == FILES


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="no C compiler on this machine")
def test_an_installed_wheel_runs_its_c_functions_where_there_is_no_compiler(scripts, tmp_path):
    said = run(tmp_path, scripts / "python", ROOT / "tests/installed_kernels.py", PATH="", XDG_CACHE_HOME=str(tmp_path))
    assert said.startswith(compile_c.level()) and str(scripts.parent) in said
    assert not list(tmp_path.iterdir())  # no cache: nothing was compiled


@pytest.mark.slow
def test_an_installed_wheel_draws_outside_the_repository(scripts, tmp_path):
    where, model, version = run(tmp_path, scripts / "python", "-c", "import lance_quant, lance_nano;"
                                " print(lance_quant.__file__, lance_nano.CHECKPOINT, lance_quant.__version__,"
                                " sep='\\n')").splitlines()
    assert Path(where).is_relative_to(scripts.parent) and version == lance_quant.__version__
    (tmp_path / "prompts.json").write_text('{"000000.png": "a red circle on a white background"}', encoding="utf-8")
    run(tmp_path, scripts / "lance-quant-baseline", "--task", "t2i", "--model_path", model, "--example_json",
        "prompts.json", "--video_height", "112", "--video_width", "112", "--validation_num_timesteps", "2",
        "--save_path_gen", "out")
    assert (tmp_path / "out/000000.png").is_file()
    for name, module in STAGES.items():
        said = run(tmp_path, scripts / name, "--help")
        assert importlib.import_module(module).__doc__.splitlines()[0] in said


def test_every_stage_is_a_command():
    assert {name: f"{module}:command" for name, module in STAGES.items()}.items() <= PROJECT["scripts"].items()
