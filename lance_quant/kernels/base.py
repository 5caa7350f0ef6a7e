"""The kernel interface: what a linear layer asks of its kernel, and a counter of what ran.

A kernel multiplies rows of activations by a packed weight without a float copy of the whole weight. Kernels know this
module and their formats, and not one another's choice, which is dispatch.py.

Shapes: rows are tokens, [rows, in] activations, [out, in] weights.
"""

import functools
import logging
import threading
from collections import Counter
from typing import Protocol

import torch
from torch import Tensor

from lance_quant.formats.base import Codec
from lance_quant.formats.int8 import Int8Weight
from lance_quant.formats.weights import PackedWeight

log = logging.getLogger("lance_quant")


class Kernel(Protocol):
    """Computes linears over packed weights."""

    name: str

    def refusal(self, codec: Codec, n_in: int, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why this kernel cannot serve a linear with `n_in` inputs on this machine, for a message; None if it can.

        Args:
            codec: the format of the weight.
            n_in: inputs of the linear.
            dtype: compute dtype, of activations, bias and result.
            device: where weight and activations are.
        """

    def linear(self, x: Tensor, q: PackedWeight, codec: Codec, bias: Tensor | None) -> Tensor:
        """Multiply: [rows, in] -> [rows, out] in the dtype of `x`.

        Args:
            x: [rows, in] activations in the compute dtype; zero rows are fine.
            q: packed weight [out, in].
            bias: [out] in the compute dtype, or None.
        """

    def int8_refusal(self, n_in: int, dtype: torch.dtype, device: torch.device) -> str | None:
        """As `refusal`, for 8 bits with one scale per row."""

    def int8_linear(self, x: Tensor, q: Int8Weight) -> Tensor:
        """As `linear`, for 8 bits with one scale per row: [rows, in] -> [rows, out]."""


class CallCounter:
    """How often each path of each kernel ran in this process, by its name; safe to use from several threads.

    A recorded CUDA graph counts once, however often it is replayed, and the reference inside compiled steps not at all.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, path: str) -> None:
        """Note that a path ran once more."""
        if not torch.compiler.is_compiling():  # a compiled step that counted would be compiled anew for every number
            with self._lock:
                self._counts[path] += 1

    def counts(self) -> Counter[str]:
        """Path -> calls up to now, a copy."""
        with self._lock:
            return Counter(self._counts)

    def since(self, before: Counter[str]) -> dict[str, int]:
        """Path -> calls since `counts` gave `before`; paths that did not run are left out."""
        return dict(self.counts() - before)


# The one counter of the process: kernels add to it, run.json has the difference over a run (on several processes: of
# the first), tests and benchmarks read it.
CALLS = CallCounter()


@functools.cache
def warn_once(message: str) -> None:
    """Warn, unless this process has said so before."""
    log.warning("%s", message)
