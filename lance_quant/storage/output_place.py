"""Places of outputs: whether a file or folder can be made there, judged before the work, and locks against two makers.

Everything is made beside its place, under a temporary name, and renamed; so the place's folder must take new names, and
what is there now, if anything, must be an empty folder that can be replaced.
"""

import contextlib
import logging
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from lance_quant.errors import InputError

log = logging.getLogger("lance_quant")

_LONGEST_NAME = 255  # bytes, of ext4, NTFS (UTF-16 units) and APFS
_held: set[tuple[str, int]] = set()  # places that this process has locked, and the thread that did


def require_free(path: Path) -> None:
    """Raise InputError unless `path` can be created: absent, or an empty folder that can be replaced.

    Names that no file can have, links, mount points and the folder that one is in are refused, and folders that take no
    new files, like /proc: all that would otherwise fail after the work.
    """
    try:
        os.fsencode(path).decode("utf-8")
        if "\0" in os.fspath(path):
            raise ValueError("zero byte")
        found = path.is_dir() and not any(path.iterdir())
        other = not found and (path.exists() or path.is_symlink())
    except (ValueError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8, or holds a zero byte"
        raise InputError(f"output {os.fspath(path)[:200]!r} cannot be made: {reason}; choose another path") from None
    if other:
        raise InputError(f"{path} exists already and is never overwritten: remove it or choose another output path")
    if found:
        _require_replaceable(path)
    _require_writable(path)


def _require_replaceable(path: Path) -> None:
    """Raise InputError unless an empty folder can be replaced by another one."""
    if path.is_symlink():
        raise InputError(f"output {path} is a link to a folder: give the folder itself, or a new path")
    if os.path.ismount(path):
        raise InputError(f"output {path} is a mount point, which cannot be replaced: give a new folder in it")
    if os.path.realpath(path) == os.path.realpath("."):
        raise InputError(f"output {path} is the folder that you are in, which cannot be replaced: name a new one")


def _require_writable(path: Path) -> None:
    """Raise InputError unless the nearest folder that is there takes a new name as long as any that is needed."""
    place = Path(os.path.abspath(path))
    if len(os.fsencode(place.name)) > _LONGEST_NAME:
        raise InputError(f"output {str(path)[:80]}... has a name of {len(os.fsencode(place.name))} bytes, and "
                         f"{_LONGEST_NAME} is the longest: choose a shorter one")
    try:
        folder = next(parent for parent in place.parents if parent.exists() or parent.is_symlink())
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"output {path} cannot be made: {error.strerror} in {folder}; choose another path") from None


def beside(path: Path, kind: str) -> Path:
    """A hidden name beside `path` that says what it is for; of a long name, the beginning."""
    room = _LONGEST_NAME - len(kind) - 2
    name = os.fsencode(path.name)[:room].decode("utf-8", "ignore")
    return path.with_name(f".{name}.{kind}")


@contextlib.contextmanager
def reserved(path: Path) -> Iterator[None]:
    """Keep other runs from making `path` while the block runs; blocks of one thread may be nested.

    Raises:
        InputError: it exists, cannot be made, or another run is making it.
    """
    require_free(path)
    with locked(path):
        for stale in sorted(path.parent.glob(_literal(beside(path, "partial-").name) + "*")):
            log.warning("%s was left by a run that was killed: remove it", stale)
        yield


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a place, in this thread, as long as the block runs; the lock file goes with it.

    Raises:
        InputError: another run holds it.
    """
    key = (os.path.abspath(path), threading.get_ident())
    if key in _held:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(beside(path, "lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(f"another run is making {path} right now: wait for it, or choose another output") from None
    _held.add(key)
    try:
        yield
    finally:
        _held.discard(key)
        if os.name != "nt":  # there, an open file cannot be removed; anywhere else it must go before others may lock it
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
        if os.name == "nt":
            with contextlib.suppress(OSError):
                Path(lock.lock_file).unlink(missing_ok=True)


def _literal(name: str) -> str:
    """A name as a pattern of itself."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
