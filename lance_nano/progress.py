"""What both trainers share: a clock that survives a restart, a state file replaced whole, a log of means."""

from __future__ import annotations

import logging
import os
import random
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from lance_quant.errors import InputError
from lance_quant.storage import torch_file
from lance_quant.storage.schema import parse

log = logging.getLogger("lance_nano")


def start_logging() -> None:
    """Log to stderr with the time of day; call it once in every process."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)  # script.run has set the root to warnings


def generator_for(seed: int, *parts: int) -> random.Random:
    """A generator that depends on the seed and on where in the run it is used, not on what ran before."""
    return random.Random(":".join(map(str, (seed, *parts))))


class Clock:
    """Training minutes so far, including those of earlier runs of the same state file."""

    def __init__(self, minutes: float, spent: float = 0.0):
        self.limit, self.spent, self.started = minutes, spent, time.monotonic()

    @property
    def minutes(self) -> float:
        """Minutes since the first start."""
        return self.spent + (time.monotonic() - self.started) / 60

    @property
    def fraction(self) -> float:
        """Share of the limit that is over; above 1 when it has passed."""
        return self.minutes / self.limit


class Means:
    """Running means of named numbers, emptied by `take`."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.count = 0

    def add(self, **values: float) -> None:
        """Count one set of values."""
        self.count += 1
        for name, value in values.items():
            self.sums[name] += value

    def take(self) -> str:
        """The means as text, and start again."""
        text = "  ".join(f"{name} {total / self.count:.4f}" for name, total in self.sums.items())
        self.sums.clear()
        self.count = 0
        return text


def save_state(path: Path, **state: object) -> None:
    """Write a state file completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load_state(path: Path) -> dict | None:
    """The state a killed run left behind, or None."""
    if not path.exists():
        return None
    return parse(dict[str, Any], torch_file.load(path, "state file", "remove it to start anew"), f"state file {path}")


def require_state(path: Path, what: str) -> dict:
    """`load_state`, or InputError where there is none."""
    state = load_state(path)
    if state is None:
        raise InputError(f"{what} not found: {path}")
    return state
