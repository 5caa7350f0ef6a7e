"""What pip installs: the wheel's dependencies, and the pinned set that the tests run with."""

from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LINES = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()


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
def test_the_documented_set_up_installs_the_pinned_set(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "pip install -q -r requirements.txt -e ." in text.replace("pip install -r", "pip install -q -r")
    assert "install -q -e ." not in text and "`pip install -e .`" not in text


def test_every_package_of_ours_is_installed_and_no_other_name():
    """apple and benchmarks run from a checkout (`python -m apple.export_mlx`): as names they would belong to others."""
    found = {".".join(path.parent.relative_to(ROOT).parts) for top in ("lance_quant", "lance_nano")
             for path in (ROOT / top).rglob("__init__.py")}
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    assert set(listed) == found and len(listed) == len(found)


def test_c_sources_are_in_the_wheel():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    for kind in ("*.c", "*.h"):
        folders = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "lance_quant").rglob(kind)}
        assert folders and all(kind in data[folder] for folder in folders)
