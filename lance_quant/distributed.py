"""Data parallelism over samples: one run on several processes, which torchrun starts, on one machine or several.

    torchrun --nproc_per_node 4 run_baseline.py --task t2i ...

Every process loads the model and takes each `size`-th sample. A request depends on no other one, so what is made and
measured is what one process would make and measure. Process 0, the leader, brings it together and writes the output.

Messages are sums, answers, latents and finished files on the CPU, few beside hours of work. So they go through gloo
whatever the model runs on: NCCL would cost GPU memory, and forbid two processes on one GPU.
"""

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lance_quant.errors import InputError
from lance_quant.storage.output_place import require_free, reserved

log = logging.getLogger("lance_quant")

_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
_MEETING = timedelta(minutes=10)  # until every process is there
_PATIENCE = timedelta(days=30)  # one process may draw clips for hours after the others are done
T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """The processes of a run, seen from one of them. Its methods are for all of them at the same place in the code.

    rank: its number; 0 leads
    size: how many there are
    """

    rank: int
    size: int
    group: "dist.ProcessGroup | None" = None  # not every build of torch has it

    @property
    def leads(self) -> bool:
        """Whether this process writes the output."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of the samples, every `size`-th; empty where there are fewer samples than processes."""
        return items[self.rank::self.size]

    def collect(self, own: Iterable[T], total: int) -> Iterator[T]:
        """What was made of `total` shared samples, in their order: all of it on the leader, elsewhere one's own.

        One message per `size` samples, so that the leader need not hold more. Every process must go to the end.
        """
        own = iter(own)
        if self.size == 1:
            yield from own
            return
        for first in range(0, total, self.size):
            mine: Any = next(own) if first + self.rank < total else None
            parts: list[Any] = [None] * self.size
            with _in_touch():
                dist.gather_object(mine, parts if self.leads else None, dst=0, group=self.group)
            if self.leads:
                yield from parts[:total - first]
            elif first + self.rank < total:
                yield mine

    def bring(self, folder: Path, own: Sequence[str], total: int) -> None:
        """Copy every process's files of its samples, one each, to the leader's folder."""
        for name, content in self.collect(((name, (folder / name).read_bytes()) for name in own), total):
            if not (folder / name).exists():
                (folder / name).write_bytes(content)

    def everyone(self, value: T) -> list[T]:
        """What every process gave, by rank, on all of them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _in_touch():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def add(self, tensor: Tensor) -> None:
        """Replace a CPU tensor of any shape by its sum over all processes, on all of them."""
        self._reduce(tensor, dist.ReduceOp.SUM)

    def maximum(self, tensor: Tensor) -> None:
        """Replace a CPU tensor of any shape by its maximum over all processes, on all of them."""
        self._reduce(tensor, dist.ReduceOp.MAX)

    def _reduce(self, tensor: Tensor, operation: Any) -> None:
        if self.size > 1:
            with _in_touch():
                dist.all_reduce(tensor, operation, group=self.group)

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """Run a block on every process, with warnings from the leader only. Where it raises InputError on one of them,
        the leader logs it, and all end with exit code 2."""
        if self.size == 1:
            yield
            return
        level, mistake = log.level, None
        if not self.leads:
            log.setLevel(logging.ERROR)
        try:
            yield
        except InputError as error:
            mistake = str(error)
        finally:
            log.setLevel(level)
        mistakes = self.everyone(mistake)
        if any(mistakes):
            if self.leads:
                log.error("error: %s", _as_one(mistakes))
            self.everyone(None)  # torchrun ends the others when the first is gone: not before the leader has spoken
            raise SystemExit(2)

    def require_same(self, **facts: Any) -> None:
        """End as `agreed` does unless all processes have equal facts: other machines may have other files."""
        everyones = self.everyone(facts)
        with self.agreed():
            for name in facts:
                odd = [rank for rank, theirs in enumerate(everyones) if theirs[name] != everyones[0][name]]
                if odd:
                    raise InputError(f"process {odd[0]} of {self.size} has another {name} than process 0: give all "
                                     "machines the same files")

    def require_free(self, path: Path) -> None:
        """As output_place.require_free; only the leader writes outputs."""
        if self.leads:
            require_free(path)

    def reserved(self, path: Path) -> contextlib.AbstractContextManager[None]:
        """As output_place.reserved; only the leader writes outputs."""
        return reserved(path) if self.leads else contextlib.nullcontext()


ALONE = Team(0, 1)


def _as_one(mistakes: Sequence[str | None]) -> str:
    """One line for what went wrong on some processes."""
    rank, first = next((rank, mistake) for rank, mistake in enumerate(mistakes) if mistake)
    text = " ".join(first.split())
    return text if all(mistake == first for mistake in mistakes) else f"process {rank} of {len(mistakes)}: {text}"


@contextlib.contextmanager
def _in_touch() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise InputError("another process of this run has ended; what it said last is the reason "
                         f"({str(error).splitlines()[0]})") from error


@contextlib.contextmanager
def joined(device: str) -> Iterator[Team]:
    """The team that torchrun's environment variables describe; without them, or with one process, `ALONE`.

    Args:
        device: what --device says. Where it leaves the GPU open, the process takes the one of its LOCAL_RANK.

    Raises:
        InputError: the variables make no sense, the processes do not meet, or one of them ends early.
    """
    rank, size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if size == 1:
        yield ALONE
        return
    absent = [name for name in ("RANK", *_ADDRESS) if name not in os.environ]
    if absent or rank >= size:
        problem = f"{', '.join(absent)} not set" if absent else f"RANK is {rank}"
        raise InputError(f"WORLD_SIZE is {size} and {problem}: start the script with torchrun, or unset WORLD_SIZE")
    if not (dist.is_available() and dist.is_gloo_available()):
        raise InputError(f"{size} processes cannot work together: this build of torch has no gloo; start the script "
                         "without torchrun")
    level = log.level
    team = Team(rank, size, _meet(size))
    if not team.leads:
        log.setLevel(logging.WARNING)
    try:
        with team.agreed():
            _take_gpu(device, _number("LOCAL_RANK", rank))
        yield team
        team.everyone(None)  # whoever is done waits: a closed connection looks like an error to the others
    finally:
        log.setLevel(level)
        dist.destroy_process_group()


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or (name == "WORLD_SIZE" and int(text) < 1):
        raise InputError(f"environment variable {name} is {text!r}, not a number of processes: unset it, or start the "
                         "script with torchrun")
    return int(text)


def _meet(size: int) -> "dist.ProcessGroup":
    try:
        dist.init_process_group("gloo", timeout=_MEETING)
        return dist.new_group(timeout=_PATIENCE)
    except RuntimeError as error:
        place = ":".join(os.environ[name] for name in _ADDRESS)
        raise InputError(f"{size} processes did not meet at {place}: {str(error).splitlines()[0]}") from error


def _take_gpu(device: str, local_rank: int) -> None:
    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise InputError(f"process {local_rank} on this machine finds {count} GPUs: start one process per GPU "
                         f"(--nproc_per_node {count}), or let them share one with --device cuda:0")
    torch.cuda.set_device(local_rank)
