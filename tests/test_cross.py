"""The C sources for other systems and CPUs: cross-compiled, and run by emulators, where they give the same bits.

What is needed, beside a C compiler for this machine: Zig, whose compiler has every system's headers (`pip install
ziglang`), or Debian's gcc-aarch64-linux-gnu, and qemu-user for ARM64 or Wine for Windows.
"""

import importlib.util
import platform
import shutil
import subprocess
import sys

import pytest
from conftest import LEVELS

from lance_quant.cpu import compile_c

pytestmark = [pytest.mark.cross, pytest.mark.slow]
DRIVER = compile_c.ROOT.parent / "tests/every_function.c"
OWN = shutil.which("gcc") or shutil.which("clang")
ZIG = [sys.executable, "-m", "ziglang"] if importlib.util.find_spec("ziglang") else \
    [path] if (path := shutil.which("zig")) else None
GCC_ARM64 = shutil.which("aarch64-linux-gnu-gcc")
QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
WINE = shutil.which("wine64") or shutil.which("wine") or shutil.which("wine64", path="/usr/lib/wine")
needs_zig = pytest.mark.skipif(ZIG is None, reason="needs Zig: pip install ziglang")


def zig(target):
    return [*(ZIG or []), "cc", "-target", target]


def build(command, level, system, target, *sources, flags=(), link=()):
    """All C sources and `sources`, each with the flags of compile_c.py; what MSVC refuses is an error."""
    objects = []
    for source in (*compile_c.SOURCES, *sources):
        objects.append(target.with_name(f"{source.stem}-{level}.o"))
        run(*command, *compile_c.flags(source, level, system), *flags, "-Werror=vla", "-Werror=implicit", "-c",
            source, "-o", objects[-1])
    run(*command, *objects, "-o", target, *link)
    return target


def run(*command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, encoding="utf-8", errors="replace")
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """What this machine says, in plain C."""
    if OWN is None:
        pytest.skip("no C compiler on this machine")
    return said_here("plain", tmp_path_factory.mktemp("here"))


def said_here(level, folder):
    lines = run(build([OWN], level, sys.platform, folder / "driver", DRIVER, link=["-fopenmp", "-lm"])).splitlines()
    assert len(lines) == 62  # every function, and none gave up
    return lines


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the levels are those of x86-64")
@pytest.mark.skipif("avx2" not in LEVELS, reason="this CPU has no AVX2")
def test_avx2_gives_the_bits_of_plain_c(here, tmp_path):
    assert said_here("avx2", tmp_path) == here


@pytest.mark.skipif(QEMU is None, reason="needs qemu-aarch64, of Debian's qemu-user")
@pytest.mark.parametrize("compiler", [
    pytest.param("gcc", marks=pytest.mark.skipif(GCC_ARM64 is None, reason="needs gcc-aarch64-linux-gnu")),
    pytest.param("zig", marks=needs_zig)])
def test_arm64_gives_the_bits_of_x86_64(here, tmp_path, compiler):
    """GCC's program with OpenMP and two threads, Clang's without."""
    if compiler == "gcc":
        driver = build([GCC_ARM64], "plain", "linux", tmp_path / "driver", DRIVER, link=["-static", "-fopenmp", "-lm"])
    else:
        driver = build(zig("aarch64-linux-musl"), "plain", "", tmp_path / "driver", DRIVER)
    assert run(QEMU, driver).splitlines() == here


@needs_zig
@pytest.mark.skipif(WINE is None, reason="needs Wine")
@pytest.mark.parametrize("level", [level for level in ("plain", "avx2") if level in LEVELS])
def test_windows_gives_the_bits_of_linux(here, tmp_path, level):
    driver = build(zig("x86_64-windows-gnu"), level, "win32", tmp_path / "driver.exe", DRIVER)
    assert run(WINE, driver).splitlines() == here


TARGETS = {"x86_64-windows-gnu": "win32", "aarch64-windows-gnu": "win32", "aarch64-linux-gnu": "",
           "aarch64-macos": "darwin", "x86_64-macos": "darwin"}  # OpenMP on Linux is GCC's, tested above


@needs_zig
@pytest.mark.parametrize(("target", "level"), [
    (target, level) for target in TARGETS for level in compile_c.LEVELS
    if level == "plain" or target.startswith("x86_64")])
def test_the_library_compiles_for_every_system(tmp_path, target, level):
    """For macOS with OpenMP and its symbols left to the runtime that PyTorch has loaded, as in a wheel."""
    system = TARGETS[target]
    position = [] if system == "win32" else ["-fPIC"]
    library = build([*zig(target), *position], level, system, tmp_path / "library", flags=["-O1"],
                    link=["-shared", *compile_c.LINK.get(system, ())])
    held = library.read_bytes()
    assert all(name in held for name in (b"packed_linear", b"int8_linear", b"w4a8_linear", b"int4_quantize"))
