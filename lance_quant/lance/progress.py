"""Progress bars: on a terminal only, and on the first process only, where torchrun started several."""

import os
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress(items: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """A tqdm bar over `items`; `options` are tqdm's."""
    if os.environ.get("RANK", "0") != "0":
        options["disable"] = True
    elif not options.get("disable"):
        options["disable"] = None  # tqdm's word for: unless this is a terminal; escapes would litter a redirected log
    return tqdm(items, **options)
