"""Deterministic data parallelism on the CPU: single-threaded workers on pieces that depend on shapes alone.

Float sums depend on their order, and torch and its libraries cut products and reductions by the number of threads: the
last bits of a matrix product on two threads are others than on one, and a quantizer turns last bits into other codes.
Inside `block_threads` every operation of torch takes one thread, and `map_threads` shares out pieces that are cut the
same way for any number of workers. So the result is the same to the bit, whether one worker takes them all or eight.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TypeVar

import torch

Item = TypeVar("Item")
Found = TypeVar("Found")

# How many workers map_threads takes inside the thread's outermost `block_threads`, which alone sets it; None outside.
_WORKERS: ContextVar[int | None] = ContextVar("block_workers", default=None)


@contextmanager
def block_threads() -> Iterator[int]:
    """Inside, torch's own operations take one thread, and map_threads as many workers as they took threads before.

    A layer is hundreds of short operations between blocks, and after each of them torch's threads wait for one another:
    on a loaded 4-core machine a layer took 33 CPU-seconds that way, and 5 with one thread.
    """
    before = torch.get_num_threads()
    workers = _WORKERS.get() or before
    outer = _WORKERS.set(workers)
    torch.set_num_threads(1)
    try:
        yield workers
    finally:
        torch.set_num_threads(before)
        _WORKERS.reset(outer)


def block_threads_on(device: torch.device) -> AbstractContextManager[object]:
    """`block_threads` for work on a CPU, nothing for a GPU's."""
    return block_threads() if device.type == "cpu" else nullcontext()


def in_block_threads() -> bool:
    """Whether this thread is inside `block_threads`, or is a worker of map_threads."""
    return _WORKERS.get() is not None


def map_threads(function: Callable[[Item], Found], items: Sequence[Item]) -> list[Found]:
    """Call `function` on every item, in order, with single-threaded workers, torch.get_num_threads() many."""
    with block_threads() as workers:
        if workers == 1 or len(items) == 1:
            return [function(item) for item in items]
        with ThreadPoolExecutor(min(workers, len(items)), initializer=_begin_worker,
                                initargs=(torch.is_grad_enabled(),)) as pool:
            return list(pool.map(function, items))


def _begin_worker(records_gradients: bool) -> None:
    """What torch and this module know by thread."""
    torch.set_num_threads(1)  # bmm goes by the thread's own OpenMP setting, not by the process's
    torch.set_grad_enabled(records_gradients)
    _WORKERS.set(1)
