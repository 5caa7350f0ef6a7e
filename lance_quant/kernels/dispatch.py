"""How packed linears are computed: one seam, and a kernel per kind of machine behind it.

    reference       dequantize, then F.linear, in plain PyTorch: any device and shape, and what others are tested by
    native          CPUs with AVX2: C on the packed bytes, compiled on this machine when it is first needed (native.py)
    triton          CUDA: Triton on the packed bytes (w4a16.py)
    comfy_kitchen   CUDA, INT4 in groups of 64: comfy-kitchen's kernel on the packed bytes, where it is installed
                    (comfy.py)
    nvfp4_w4a4      NVFP4, with activations rounded to NVFP4 too, on the FP4 tensor cores of Blackwell (w4a4.py)

All of them read the codes of the file as they are; none keeps a repacked copy of those. `auto` takes the one of the
device where it can serve a layer, of triton and comfy_kitchen the faster (fastest.py), and the reference elsewhere,
saying why once; never nvfp4_w4a4, which computes something else. A kernel chooses between its own paths by the number
of rows: few rows are limited by reading the weights, so they are multiplied without being unpacked to memory; many rows
are limited by the multiplications, so a block of weights is unpacked and handed to the GEMM of the library.

tinygemm (`aten._weight_int4pack_mm`) is not among them: it wants a copy of the codes in an order of its own, so that a
layer would either have its bytes twice or no longer those of its file. benchmarks/linear_kernels.py times it.

The 8-bit head (int8.py) goes through the same seam.
"""

import functools
import logging
from collections import Counter
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from lance_quant.errors import InputError
from lance_quant.formats.base import Codec, PackedWeight

if TYPE_CHECKING:  # int8 imports this module
    from lance_quant.formats.int8 import Int8Weight

log = logging.getLogger("lance_quant")

Choice = Literal["auto", "reference", "native", "triton", "comfy_kitchen", "nvfp4_w4a4"]
CHOICES: tuple[Choice, ...] = ("auto", "reference", "native", "triton", "comfy_kitchen", "nvfp4_w4a4")
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
        return _or_faster(kernel, codec, n_in, dtype, device) if choice == "auto" else kernel
    if choice != "auto":
        raise InputError(f"kernel {choice} cannot run {codec} with {n_in} inputs in {dtype} on {device}: {refusal}; "
                         f"take --kernel auto or reference")
    say_once(f"kernel {wanted} cannot run {codec} with {n_in} inputs ({refusal}): such layers run on the much slower "
              f"reference")
    return _kernel("reference")


def _or_faster(kernel: Kernel, codec: Codec, n_in: int, dtype: torch.dtype, device: torch.device) -> Kernel:
    """The kernel of a device, or where there is another one beside it, what takes the faster of the two."""
    if kernel.name == "triton":
        fastest = _kernel("fastest")
        if fastest.refusal(codec, n_in, dtype, device) is None:
            return fastest
    return kernel


def require_values(choice: Choice, q: PackedWeight, where: str) -> None:
    """Raise InputError, naming `where`, if a kernel was asked for by name and the values of a weight do not suit it."""
    if choice == "nvfp4_w4a4":
        from lance_quant.kernels.nvfp4_w4a4 import misfit
        if (reason := misfit(q)) is not None:
            raise InputError(f"{where}: kernel nvfp4_w4a4 cannot run this weight: {reason}; take --kernel auto")


def choose_int8(choice: Choice, n_in: int, dtype: torch.dtype, device: torch.device) -> Kernel:
    """The kernel of an 8-bit head with `n_in` inputs.

    `choice` is about the model's linears: where that kernel cannot run the head, the reference does, and a warning
    says why. nvfp4_w4a4 says nothing about 8 bits and counts as auto.
    """
    wanted = OF_DEVICE.get(device.type, "reference") if choice in ("auto", "nvfp4_w4a4") else choice
    kernel = _kernel(wanted)
    refusal = kernel.int8_refusal(n_in, dtype, device)
    if refusal is None:
        return kernel
    say_once(f"kernel {wanted} cannot run the 8-bit head ({refusal}): it runs on the much slower reference")
    return _kernel("reference")


def count(path: str) -> None:
    """Note that a path ran once more."""
    if not torch.compiler.is_compiling():  # a compiled step that counted would be compiled anew for every number
        calls[path] += 1


@functools.cache
def say_once(message: str) -> None:
    """Warn, unless this process has said so before."""
    log.warning("%s", message)


@functools.cache
def _kernel(name: Choice | Literal["fastest"]) -> Kernel:
    if name == "native":
        from lance_quant.kernels.cpu import Native
        return Native()
    if name == "triton":
        from lance_quant.kernels.triton_w4a16 import TritonW4A16
        return TritonW4A16()
    if name == "comfy_kitchen":
        from lance_quant.kernels.comfy_kitchen import ComfyKitchen
        return ComfyKitchen()
    if name == "fastest":
        from lance_quant.kernels.autotune import Fastest
        return Fastest()
    if name == "nvfp4_w4a4":
        from lance_quant.kernels.nvfp4_w4a4 import W4A4
        return W4A4()
    from lance_quant.kernels.reference import Reference
    return Reference()
