"""Locating a checkout of ByteDance's Lance: where it is looked for, what counts as one, and which commit it is.

Light on purpose: other programs report what is found here, and neither torch nor the source is imported.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lance_quant.errors import InputError

ENV_SOURCE = "LANCE_SRC_PATH"
MARKERS = ("inference_lance.py", "modeling/lance/lance.py")
NAMES = ("lance", "lance-main")  # folder names looked for, in any case: a clone and an unpacked download
REPOSITORY = "https://github.com/bytedance/Lance"
# sha256 of MARKERS at the commit that the child was written against.
KNOWN_COMMIT = "4baeee086648996f6ab12e673cbe461b0b149997"
KNOWN = ("7a0aab757e65a3b5e0b3fe4c8a8223db1f0fd6fc80ce743446a93530519079ed",
         "196dbb4b3bc8914f90f211ba7b1e8099804fb978c2c21196815f11f66efb418f")
_HOME = Path(__file__).resolve().parent.parent.parent


class Candidate(NamedTuple):
    """One place that was looked at: how it came up, and why it was rejected ("" if it is a checkout)."""

    via: str
    path: Path
    rejected: str


def candidates(explicit: Path | None = None, more: Iterable[tuple[str, Path]] = ()) -> Iterator[Candidate]:
    """Every place in order, until one is a checkout: explicit, LANCE_SRC_PATH, this repository, `more`, working folder.

    A path that was given, by argument or environment, ends the search also where it is wrong.

    Args:
        more: (how to call it, folder) of a host program; folders inside it that are called like a checkout count.
    """
    given = ("--official_src", explicit) if explicit else (ENV_SOURCE, os.environ.get(ENV_SOURCE))
    if given[1]:
        path = Path(given[1]).expanduser()
        yield Candidate(given[0], path, _rejected(path))
        return
    places = [("inside this repository", _inside(_HOME)), ("beside this repository", _inside(_HOME.parent)),
              *((via, _inside(folder)) for via, folder in more),
              ("working directory", [Path.cwd(), *_inside(Path.cwd())])]
    for via, paths in places:
        for path in paths:
            found = Candidate(via, path, _rejected(path))
            yield found
            if not found.rejected:
                return


def _inside(folder: Path) -> list[Path]:
    """The folders in a folder that are called like a checkout; where one would be, if there is none."""
    try:
        named = sorted(path for path in folder.iterdir() if path.name.lower() in NAMES and path.is_dir())
    except OSError:  # gone, or not ours to read
        named = []
    return named or [folder / "Lance"]


def _rejected(path: Path) -> str:
    """Why a path is no checkout; "" if it is one."""
    if not path.is_dir():
        return "is a file" if path.exists() else "does not exist"
    missing = [name for name in MARKERS if not (path / name).is_file()]
    if not missing:
        return ""
    nearer = [inside for inside in _inside(path) if all((inside / name).is_file() for name in MARKERS)]
    return f"no {' and no '.join(missing)}" + (f"; did you mean {nearer[0]}?" if nearer else "")


def find(explicit: Path | None = None, more: Iterable[tuple[str, Path]] = ()) -> Candidate:
    """The checkout to use; arguments as for `candidates`.

    Raises:
        InputError: there is none, or a path that was given is none; lists the places and why each was rejected.
    """
    looked = list(candidates(explicit, more))
    last = looked[-1]
    if not last.rejected:
        return last._replace(path=last.path.resolve())
    if len(looked) == 1:
        raise InputError(f"{last.via} {last.path} is no checkout of {REPOSITORY}: {last.rejected}")
    places = "; ".join(f"{one.path} ({one.via}: {one.rejected})" for one in looked)
    raise InputError(f"official Lance source not found: say where a checkout of {REPOSITORY} lies with --official_src "
                     f"or {ENV_SOURCE}. Looked at {places}")


def describe(checkout: Candidate) -> dict[str, Any]:
    """What run.json says of a checkout; `tested`: it is the commit that the child was written against."""
    digests = {name: hashlib.sha256((checkout.path / name).read_bytes()).hexdigest() for name in MARKERS}
    return {"path": str(checkout.path), "found": checkout.via, "sha256": digests,
            "tested": tuple(digests.values()) == KNOWN}
