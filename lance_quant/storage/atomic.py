"""Atomic outputs: files and folders that appear whole or not at all.

A file or folder is written under a temporary name beside its final one and renamed when it is complete, so that a
kill, an error or a full disk never leaves something that looks finished.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lance_quant.errors import InputError
from lance_quant.storage.output_place import beside, reserved


def _partial(path: Path) -> Path:
    return beside(path, f"partial-{os.getpid()}")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; rename it to `path` when the block ends well, remove it otherwise.

    Raises:
        InputError: `path` exists already, cannot be made, or another run is making it.
    """
    with reserved(path):
        partial = _partial(path)
        try:
            yield partial
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder; rename it to `path` when the block ends well, remove it otherwise.

    Raises:
        InputError: `path` exists already and is not an empty folder, cannot be made, or another run is making it.
    """
    with reserved(path):
        partial = _partial(path)
        partial.mkdir()
        try:
            yield partial
            move_folder(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def move_folder(folder: Path, path: Path) -> None:
    """Give a finished folder its place, which is absent or an empty folder."""
    if path.is_dir():
        path.rmdir()  # Windows replaces files, but no folders
    os.replace(folder, path)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, as a hard link; on another disk, or where there are no links, copy it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def size_text(count: int) -> str:
    """A number of bytes for a person: 4.31 GB, 2.58 MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def read_json(path: Path, what: str) -> Any:
    """Parse a JSON file; `what` names it in the InputError for a missing or malformed one. See parse_json."""
    if not is_file(path):
        raise InputError(f"{what} not found: {path}")
    return parse_json(path.read_bytes(), f"{what} {path}")


def is_file(path: str | Path) -> bool:
    """Whether a file is there; False for a name that no file can have: too long, or with a zero byte."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def parse_json(data: bytes | bytearray, what: str) -> Any:
    """The value of UTF-8 JSON, with or without the byte order mark that Windows editors write.

    Raises:
        InputError: no JSON; or JSON that readers understand differently: one key twice in an object, half of a
            surrogate pair, numbers of thousands of digits, nesting deeper than Python recurses.
    """
    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_without_doubles)
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise InputError(f"{what} is nested too deeply to be read") from None
    except UnicodeEncodeError as error:
        raise InputError(f"{what} holds half of a surrogate pair ({error.object[error.start]!r}), which is no "
                         "character") from None
    except ValueError as error:  # json.JSONDecodeError and UnicodeDecodeError among them
        raise InputError(f"{what} is not valid JSON: {error}") from error
    return value


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def write_json(path: Path, value: Any) -> None:
    """Write `value`, paths as text, as indented UTF-8 JSON (inside a block of `whole_file` or `whole_folder`)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=os.fspath) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8. Names of files that the system's locale could not decode become what they are on the disk,
    or, where that is no UTF-8, escapes."""
    data = text.encode("utf-8", "surrogateescape")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        data = text.encode("utf-8", "backslashreplace")
    path.write_bytes(data)
