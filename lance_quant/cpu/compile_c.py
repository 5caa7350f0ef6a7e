"""The package's C library: what came with the wheel, else C sources compiled just in time and kept in a cache.

A wheel that was built where there is a compiler holds one library for each level of instructions (LEVELS), of all C
sources; which one is loaded is decided at run time, by the CPU. Elsewhere the compiler of the machine makes the one
that the CPU needs, source by source, with the same flags. A user with neither gets the reason in words, and callers
then do the same in PyTorch. All levels give the same bits, but for sums of few rows with AVX-512 (docs/kernels.md).

What is loaded runs, so a library is taken only if its hash is the one that was written beside it when it was compiled,
and from the cache only if nobody but the user could have changed either. The name holds a hash of the sources: a
library of other sources, which would have other arguments, is never found.
"""

import atexit
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from lance_quant.storage.user_cache import user_cache

log = logging.getLogger("lance_quant")

ROOT = Path(__file__).parents[1]
SOURCES = tuple(ROOT / name for name in ("cpu/rounding.c", "kernels/int8_products.c", "kernels/packed_linear.c"))
# What a library may use beside the least of its architecture (SSE2; on ARM64 that has NEON), as GCC and Clang call it.
# VNNI: Cascade Lake, Zen 4 and newer.
LEVELS = {
    "plain": (),
    "avx2": ("-mavx2", "-mfma", "-mbmi", "-mbmi2"),
    "avx512": ("-mavx2", "-mfma", "-mbmi", "-mbmi2", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl",
               "-mavx512vnni"),
}
# Not contracted and not -ffast-math: the bits are part of the promise.
_FLAGS = ("-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
# What is allowed here changes none of a finite number that is not 0, and makes minima and maxima single instructions.
_OWN_FLAGS = {"rounding.c": ("-ffinite-math-only", "-fno-signed-zeros")}
_SUFFIX = ".dll" if os.name == "nt" else ".so"


def load(source: Path) -> tuple[ctypes.CDLL | None, str | None]:
    """A library that has the functions of a C source; or None, and why there is none.

    Args:
        source: one of SOURCES.
    """
    library = _from_wheel() if source in SOURCES else None
    return (library, None) if library is not None else _just_in_time(source)


@functools.cache
def level() -> str:
    """The best of LEVELS for this CPU. PyTorch is asked, which obeys ATEN_CPU_CAPABILITY."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability() if is_x86(platform.machine()) else ""
    wide = capability.startswith(("AVX512", "AVX10")) and torch.cpu._is_avx512_supported()
    if wide and torch.cpu._is_vnni_supported():
        return "avx512"
    return "avx2" if capability.startswith("AVX") else "plain"


def is_x86(machine: str) -> bool:
    """Of platform.machine(), or of the end of a wheel's platform tag."""
    return machine.endswith(("x86_64", "amd64", "AMD64"))


def flags(source: Path, at: str, system: str = sys.platform) -> tuple[str, ...]:
    """For GCC and Clang, to compile a source for one of LEVELS on a system as sys.platform calls it."""
    return (*_FLAGS, *_OWN_FLAGS.get(source.name, ()), *LEVELS[at], f"-DLEVEL_{at}", *_OPENMP.get(system, ()))


# Threads are OpenMP's, of the runtime that PyTorch has brought along: GCC's on Linux, LLVM's on macOS, where Apple's
# compiler takes the pragmas and has no runtime. On Windows Clang has none that would be found: one thread.
_OPENMP = {"linux": ("-fopenmp", "-fPIC"), "darwin": ("-Xclang", "-fopenmp")}
LINK = {"linux": ("-lm",), "darwin": ("-Wl,-undefined,dynamic_lookup",)}  # last on the command line


def wheel_name(at: str) -> str:
    """File name, in this folder, of a wheel's library for one of LEVELS."""
    return f"native-{at}-{_key(*SOURCES)}{_SUFFIX}"


def write_digest(library: Path) -> Path:
    """The file with the hash of a library that was just compiled, beside it."""
    path = library.with_name(f"{library.name}.sha256")
    path.write_text(_digest(library), encoding="ascii")
    return path


@functools.cache
def _from_wheel() -> ctypes.CDLL | None:
    path = Path(__file__).with_name(wheel_name(level()))
    if not path.is_file():
        return None
    try:
        if _has_digest(path):
            return ctypes.CDLL(str(path))
        reason: object = "it is not what was compiled"
    except OSError as error:
        reason = error
    log.warning("%s, which came with the package, is not used: %s", path, reason)
    return None


def _just_in_time(source: Path) -> tuple[ctypes.CDLL | None, str | None]:
    try:
        command = _compiler()
    except ValueError as error:
        return None, f"the environment variable CC is no command ({error})"
    if not command:
        return None, f"there is no C compiler; {_HOW_TO_GET_ONE.get(sys.platform, 'install gcc or clang')}"
    try:
        return ctypes.CDLL(str(compiled(source, command))), None
    except subprocess.CalledProcessError as error:
        said = (error.stderr or str(error)).strip().splitlines()
        return None, f"{command[0]} failed: {next((line for line in said if 'error' in line), said[-1])}"
    except OSError as error:  # no such compiler, a full disk, a folder that may hold no programs
        return None, f"it cannot be compiled or loaded: {error}"


_HOW_TO_GET_ONE = {"darwin": "run xcode-select --install", "win32": "install clang, or the wheel, which needs none"}
# GCC for Windows keeps registers of AVX where they are not aligned (its bug 54412).
_COMPILERS = ("clang",) if os.name == "nt" else ("gcc", "cc", "clang")


def _compiler() -> list[str]:
    """CC as a command, else what is installed; ValueError for a quote that does not close."""
    given = os.environ.get("CC")
    if given:
        return shlex.split(given, posix=os.name != "nt")
    if sys.platform == "darwin" and subprocess.run(["xcode-select", "-p"], capture_output=True).returncode:
        return []  # calling cc would open a window
    found = next(filter(None, map(shutil.which, _COMPILERS)), None)
    return [found] if found else []


def compiled(source: Path, command: Sequence[str]) -> Path:
    """The shared library of this source and compiler, for this CPU's level.

    Raises:
        OSError, CalledProcessError: the compiler is missing or fails, or nothing can be written.
    """
    version = _run([*command, "--version"])
    own = flags(source, level())
    name = f"{source.stem}-{_key(source, version, platform.machine(), *own)}{_SUFFIX}"
    for folder in _cache_folders():
        if _is_sound(folder / name):
            return folder / name
        if os.access(folder, os.W_OK):
            break
    log.info("compiling %s (once) to %s", source.name, folder / name)
    # A folder of its own: another process, also in another container with the same home, may be compiling too.
    with tempfile.TemporaryDirectory(prefix="compiling-", dir=folder) as passing:
        partial = Path(passing) / name
        _run([*command, *own, "-shared", str(source), "-o", str(partial), *LINK.get(sys.platform, ())])
        digest = write_digest(partial)
        os.replace(digest, folder / digest.name)
        os.replace(partial, folder / name)
    return folder / name


def _key(*parts: Path | str) -> str:
    """Of sources with all headers that they may include, and of words."""
    sources = [part for part in parts if isinstance(part, Path)]
    headers = sorted({header for one in (Path(__file__), *sources) for header in one.parent.glob("*.h")})
    texts = [path.read_text(encoding="utf-8") for path in (*sources, *headers)]
    words = [part for part in parts if isinstance(part, str)]
    return hashlib.sha256("\n".join([*texts, *words]).encode()).hexdigest()[:16]


def _run(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=True).stdout


def _is_sound(library: Path) -> bool:
    """Whether a library is as it was compiled, by this user."""
    try:
        digest = library.with_name(f"{library.name}.sha256")
        sound = all(_is_own(path) for path in (library.parent, library, digest)) and _has_digest(library)
    except OSError:
        return False
    if not sound:
        log.warning("%s is not what was compiled, or others may write to it: compiling it anew", library)
    return sound


def _has_digest(library: Path) -> bool:
    """Whether the hash beside a library is its own."""
    try:
        return library.with_name(f"{library.name}.sha256").read_text(encoding="ascii") == _digest(library)
    except UnicodeDecodeError:
        return False


def _is_own(path: Path) -> bool:
    """Whether a path is this user's or the system's, and nobody else may write to it. Windows has folders by user."""
    if not hasattr(os, "getuid"):
        return True
    status = path.stat()
    return status.st_uid in (os.getuid(), 0) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _cache_folders() -> Iterator[Path]:
    """Where the library may be kept: in the user's cache, else in a folder that goes when the process ends."""
    if (folder := user_cache()) is not None:
        if _is_own(folder):
            yield folder
        else:
            log.warning("%s is another user's, or others may write to it: compiling for this run alone", folder)
    passing = Path(tempfile.mkdtemp(prefix="lance-quant-"))
    atexit.register(shutil.rmtree, passing, ignore_errors=True)
    yield passing
