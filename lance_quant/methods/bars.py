"""Progress bars of a conversion, which its log lines do not tear."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

Item = TypeVar("Item")


def bar(items: Sequence[Item], stage: str, shown: bool) -> Iterator[Item]:
    """The items, with a bar over them where stderr is a terminal and it is to be `shown`; log lines move it down."""
    with logging_redirect_tqdm() if shown else nullcontext():
        yield from tqdm(items, desc=stage, disable=None if shown else True)  # None: only on a terminal
