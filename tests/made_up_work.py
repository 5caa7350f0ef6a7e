"""Work for a process of its own. A module without torch: a new process imports what its function comes from."""

import os
import time
from collections.abc import Iterator


def ends_badly(how: str) -> Iterator[str]:
    """Give one thing, then do not come to an end."""
    yield "first"
    if how == "raise":
        raise ValueError("as told")
    if how == "exit":
        os._exit(3)
    time.sleep(60)
