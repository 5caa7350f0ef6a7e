"""How packed linears are computed: one seam, and a kernel per kind of machine behind it.

    reference   dequantize, then F.linear, in plain PyTorch: any device, any shape, and what the others are tested by
    native      CPUs with AVX2: C on the packed bytes, compiled on this machine when it is first needed (native.py)
    triton      CUDA: Triton on the packed bytes (w4a16.py)

All of them read the bytes of the file as they are; none keeps a repacked copy. `auto` takes the one of the device
where it can serve a layer, and the reference elsewhere, saying why once. A kernel chooses between its own paths by the
number of rows: few rows are limited by reading the weights, so they are multiplied without being unpacked to memory;
many rows are limited by the multiplications, so a block of weights is unpacked and handed to the GEMM of the library.

The 8-bit head (int8.py) goes through the same seam.
"""

import functools
import logging
from collections import Counter
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from lance_quant.codec import Codec, PackedWeight
from lance_quant.errors import InputError

if TYPE_CHECKING:  # int8 imports this module
    from lance_quant.int8 import Int8Weight

log = logging.getLogger("lance_quant")

Choice = Literal["auto", "reference", "native", "triton"]
CHOICES: tuple[Choice, ...] = ("auto", "reference", "native", "triton")
OF_DEVICE: dict[str, Choice] = {"cpu": "native", "cuda": "triton"}
# Kernel and path -> calls in this process; run.json has the difference over a run (on several processes: of the first).
# A recorded CUDA graph counts once, however often it is replayed, and the reference inside compiled steps not at all.
calls: Counter[str] = Counter()


class Kernel(Protocol):
    """Computes packed linears."""

    name: str

    def refusal(self, codec: Codec, n_in: int, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why this kernel cannot serve such a layer on this machine; None if it can."""

    def linear(self, x: Tensor, q: PackedWeight, codec: Codec, bias: Tensor | None) -> Tensor:
        """[rows, in] -> [rows, out] in the dtype of `x`, which is the compute dtype; `bias` [out] has it too."""

    def int8_refusal(self, n_in: int, dtype: torch.dtype, device: torch.device) -> str | None:
        """As `refusal`, for 8 bits with one scale per row."""

    def int8_linear(self, x: Tensor, q: "Int8Weight") -> Tensor:
        """As `linear`, for 8 bits with one scale per row."""


def choose(choice: Choice, codec: Codec, n_in: int, dtype: torch.dtype, device: torch.device) -> Kernel:
    """The kernel of a layer with `n_in` inputs.

    Raises:
        InputError: a kernel was asked for by name and cannot serve the layer here; says why.
    """
    if choice not in CHOICES:
        raise InputError(f"kernel {choice!r} is unknown; there are {', '.join(CHOICES)}")
    wanted = OF_DEVICE.get(device.type, "reference") if choice == "auto" else choice
    kernel = _kernel(wanted)
    refusal = kernel.refusal(codec, n_in, dtype, device)
    if refusal is None:
        return kernel
    if choice != "auto":
        raise InputError(f"kernel {choice} cannot run {codec} with {n_in} inputs in {dtype} on {device}: {refusal}; "
                         f"take --kernel auto or reference")
    _say_once(f"kernel {wanted} cannot run {codec} with {n_in} inputs ({refusal}): such layers run on the much slower "
              f"reference")
    return _kernel("reference")


def choose_int8(choice: Choice, n_in: int, dtype: torch.dtype, device: torch.device) -> Kernel:
    """The kernel of an 8-bit head with `n_in` inputs.

    `choice` is about the model's linears: where that kernel cannot run the head, the reference does, and a warning
    says why.
    """
    wanted = OF_DEVICE.get(device.type, "reference") if choice == "auto" else choice
    kernel = _kernel(wanted)
    refusal = kernel.int8_refusal(n_in, dtype, device)
    if refusal is None:
        return kernel
    _say_once(f"kernel {wanted} cannot run the 8-bit head ({refusal}): it runs on the much slower reference")
    return _kernel("reference")


def count(path: str) -> None:
    """Note that a path ran once more."""
    if not torch.compiler.is_compiling():  # a compiled step that counted would be compiled anew for every number
        calls[path] += 1


@functools.cache
def _say_once(message: str) -> None:
    log.warning("%s", message)


@functools.cache
def _kernel(name: Choice) -> Kernel:
    if name == "native":
        from lance_quant.kernels.native import Native
        return Native()
    if name == "triton":
        from lance_quant.kernels.w4a16 import TritonW4A16
        return TritonW4A16()
    from lance_quant.kernels.reference import Reference
    return Reference()
