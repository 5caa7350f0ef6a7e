"""The user's cache folder: what is made once per machine, and may be deleted at any time."""

import contextlib
import os
from pathlib import Path


def user_cache() -> Path | None:
    """$XDG_CACHE_HOME/lance-quant, else ~/.cache/lance-quant, made if need be; None where there is no home to write in.
    It may be read-only."""
    with contextlib.suppress(OSError, RuntimeError):  # a file in its place; a user without a home
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lance-quant"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder
    return None
