"""Just-in-time compilation of this package's C sources, kept in a cache for later runs.

A library is made for the CPU at hand, so no wheel can carry it. A user without a compiler gets the reason in words, and
callers then do the same in PyTorch.

What is loaded runs, so a library in the cache is taken only if its hash is the one that was written beside it when it
was compiled, and if nobody but the user could have changed either; otherwise it is compiled anew.
"""

import atexit
import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from lance_quant.storage.user_cache import user_cache

log = logging.getLogger("lance_quant")

_SUFFIX = ".dll" if os.name == "nt" else ".so"


def load(source: Path, flags: Sequence[str]) -> tuple[ctypes.CDLL | None, str | None]:
    """The library of a C source, compiled unless an earlier run has; or None, and why there is none.

    Args:
        source: one file; the headers that it includes are beside it.
        flags: for the compiler.
    """
    try:
        command = _compiler()
    except ValueError as error:
        return None, f"the environment variable CC is no command ({error})"
    if not command:
        return None, "there is no C compiler; install gcc or clang"
    try:
        return ctypes.CDLL(str(compiled(source, flags, command))), None
    except subprocess.CalledProcessError as error:
        said = (error.stderr or str(error)).strip().splitlines()
        return None, f"{command[0]} failed: {next((line for line in said if 'error' in line), said[-1])}"
    except OSError as error:  # no such compiler, a full disk, a folder that may hold no programs
        return None, f"it cannot be compiled or loaded: {error}"


def _compiler() -> list[str]:
    """CC as a command, else what is installed; ValueError for a quote that does not close."""
    given = os.environ.get("CC")
    if given:
        return shlex.split(given, posix=os.name != "nt")
    found = next(filter(None, map(shutil.which, ("gcc", "cc", "clang"))), None)
    return [found] if found else []


def compiled(source: Path, flags: Sequence[str], command: Sequence[str]) -> Path:
    """The shared library of this source, compiler and CPU.

    Raises:
        OSError, CalledProcessError: the compiler is missing or fails, or nothing can be written.
    """
    version = _run([*command, "--version"])
    cpu = next((line for line in _lines(Path("/proc/cpuinfo")) if line.startswith("flags")), "")
    texts = [path.read_text(encoding="utf-8") for path in (source, *sorted(source.parent.glob("*.h")))]
    key = hashlib.sha256("\n".join([*texts, version, cpu, *flags]).encode()).hexdigest()[:16]
    name = f"{source.stem}-{key}{_SUFFIX}"
    for folder in _cache_folders():
        if _is_sound(folder / name):
            return folder / name
        if os.access(folder, os.W_OK):
            break
    log.info("compiling %s (once) to %s", source.name, folder / name)
    # A folder of its own: another process, also in another container with the same home, may be compiling too.
    with tempfile.TemporaryDirectory(prefix="compiling-", dir=folder) as own:
        partial = Path(own) / name
        _run([*command, *flags, str(source), "-o", str(partial)])
        digest = partial.with_name(f"{name}.sha256")
        digest.write_text(_digest(partial), encoding="ascii")
        os.replace(digest, folder / digest.name)
        os.replace(partial, folder / name)
    return folder / name


def _run(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=True).stdout


def _is_sound(library: Path) -> bool:
    """Whether a library is as it was compiled, by this user."""
    digest = library.with_name(f"{library.name}.sha256")
    try:
        own = all(_is_own(path) for path in (library.parent, library, digest))
        sound = own and digest.read_text(encoding="ascii") == _digest(library)
    except (OSError, UnicodeDecodeError):
        return False
    if not sound:
        log.warning("%s is not what was compiled, or others may write to it: compiling it anew", library)
    return sound


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


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
