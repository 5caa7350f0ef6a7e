"""Just-in-time compilation of this package's C sources, kept in a cache for later runs.

A library is made for the CPU at hand, so no wheel can carry it. A user without a compiler gets the reason in words, and
callers then do the same in PyTorch.
"""

import atexit
import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from lance_quant.storage.user_cache import user_cache

log = logging.getLogger("lance_quant")


def load(source: Path, flags: Sequence[str]) -> tuple[ctypes.CDLL | None, str | None]:
    """The library of a C source, compiled unless an earlier run has; or None, and why there is none.

    Args:
        source: one file; the headers that it includes are beside it.
        flags: for the compiler.
    """
    command = shlex.split(os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc") or "")
    if not command:
        return None, "there is no C compiler; install gcc"
    try:
        return ctypes.CDLL(str(compiled(source, flags, command))), None
    except subprocess.CalledProcessError as error:
        said = (error.stderr or str(error)).strip().splitlines()
        return None, f"{command[0]} failed: {next((line for line in said if 'error' in line), said[-1])}"
    except OSError as error:  # no such compiler, a full disk, a folder that may hold no programs
        return None, f"it cannot be compiled or loaded: {error}"


def compiled(source: Path, flags: Sequence[str], command: Sequence[str]) -> Path:
    """The shared library of this source, compiler and CPU.

    Raises:
        OSError, CalledProcessError: the compiler is missing or fails, or nothing can be written.
    """
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    cpu = next((line for line in _lines(Path("/proc/cpuinfo")) if line.startswith("flags")), "")
    texts = [path.read_text() for path in (source, *sorted(source.parent.glob("*.h")))]
    key = hashlib.sha256("\n".join([*texts, version, cpu, *flags]).encode()).hexdigest()[:16]
    name = f"{source.stem}-{key}.so"
    for folder in _cache_folders():
        if (folder / name).is_file():
            return folder / name
        if os.access(folder, os.W_OK):
            break
    log.info("compiling %s (once) to %s", source.name, folder / name)
    # A folder of its own: another process, also in another container with the same home, may be compiling too.
    with tempfile.TemporaryDirectory(prefix="compiling-", dir=folder) as own:
        partial = Path(own) / name
        subprocess.run([*command, *flags, str(source), "-o", str(partial)], capture_output=True, text=True, check=True)
        os.replace(partial, folder / name)
    return folder / name


def _cache_folders() -> Iterator[Path]:
    """Where the library may be kept: in the user's cache, else in a folder that goes when the process ends."""
    if (folder := user_cache()) is not None:
        yield folder
    passing = Path(tempfile.mkdtemp(prefix="lance-quant-"))
    atexit.register(shutil.rmtree, passing, ignore_errors=True)
    yield passing


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []
