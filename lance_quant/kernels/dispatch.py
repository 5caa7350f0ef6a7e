"""Kernel dispatch: which kernel computes a packed linear on a device.

    reference       dequantize, then F.linear, in plain PyTorch: any device and shape, and what others are tested by
    native          CPUs with AVX2: C on the packed bytes, compiled on this machine when it is first needed (cpu.py)
    triton          CUDA: Triton on the packed bytes (triton_w4a16.py)
    comfy_kitchen   CUDA, INT4 in groups of 64: comfy-kitchen's kernel on the packed bytes, where it is installed
                    (comfy_kitchen.py)
    native_w4a8     CPUs with AVX2: activations rounded to int8, integer products; by name only (cpu_w4a8.py)
    nvfp4_w4a4      NVFP4, with activations rounded to NVFP4 too, on the FP4 tensor cores of Blackwell (nvfp4_w4a4.py)

All of them read the codes of the file as they are; none keeps a repacked copy of those. `auto` takes the one of the
device where it can serve a layer, of triton and comfy_kitchen the faster (autotune.py), and the reference elsewhere,
saying why once; never native_w4a8 and nvfp4_w4a4, which round activations too. A kernel chooses between its own paths
by the number of rows: few rows are limited by reading the weights, so they are multiplied without being unpacked to
memory; many rows are limited by the multiplications, so a block of weights is unpacked and handed to a GEMM.

tinygemm (`aten._weight_int4pack_mm`) is not among them: it wants a copy of the codes in an order of its own, so that a
layer would either have its bytes twice or no longer those of its file. benchmarks/linear_kernels.py times it.

The 8-bit head (formats/int8.py) goes through the same dispatch.
"""

import functools
from collections.abc import Callable

import torch

from lance_quant.errors import InputError
from lance_quant.formats.base import Codec
from lance_quant.formats.int4 import Int4
from lance_quant.formats.nvfp4 import Nvfp4, Nvfp4Weight
from lance_quant.formats.weights import PackedWeight
from lance_quant.kernels import nvfp4_w4a4
from lance_quant.kernels.autotune import Autotuned
from lance_quant.kernels.base import Kernel, warn_once
from lance_quant.kernels.choices import KERNEL_CHOICES, KernelChoice
from lance_quant.kernels.comfy_kitchen import ComfyKitchen
from lance_quant.kernels.cpu import Native
from lance_quant.kernels.cpu_w4a8 import NativeW4A8
from lance_quant.kernels.reference import Reference
from lance_quant.kernels.triton_w4a16 import TritonW4A16

_OF_DEVICE: dict[str, KernelChoice] = {"cpu": "native", "cuda": "triton"}
_KERNELS: dict[str, Callable[[], Kernel]] = {
    "reference": Reference, "native": Native, "triton": TritonW4A16, "comfy_kitchen": ComfyKitchen,
    "autotuned": Autotuned, "native_w4a8": NativeW4A8, "nvfp4_w4a4": nvfp4_w4a4.W4A4}
_SCALED = {codec.SCHEMES["searched"] for codec in (Int4, Nvfp4)}  # schemes of linears whose scales were moved
_ROUND_ACTIVATIONS: tuple[KernelChoice, ...] = ("native_w4a8", "nvfp4_w4a4")  # they say nothing about an 8-bit head


def choose(choice: KernelChoice, codec: Codec, n_in: int, dtype: torch.dtype, device: torch.device) -> Kernel:
    """The kernel of a linear with `n_in` inputs.

    Args:
        choice: a kernel's name, or "auto".
        codec: the format of the weight.
        dtype: compute dtype.
        device: where weight and activations are.

    Raises:
        InputError: a kernel was asked for by name and cannot serve the layer here; says why.
    """
    if choice not in KERNEL_CHOICES:
        raise InputError(f"kernel {choice!r} is unknown; there are {', '.join(KERNEL_CHOICES)}")
    wanted = _OF_DEVICE.get(device.type, "reference") if choice == "auto" else choice
    kernel = _kernel(wanted)
    refusal = kernel.refusal(codec, n_in, dtype, device)
    if refusal is None:
        return _or_autotuned(kernel, codec, n_in, dtype, device) if choice == "auto" else kernel
    if choice != "auto":
        raise InputError(f"kernel {choice} cannot run {_layer(codec, n_in)} in {dtype} on {device}: {refusal}; "
                         f"take --kernel auto or reference")
    warn_once(f"kernel {wanted} cannot run {_layer(codec, n_in)} ({refusal}): such layers run on the much slower "
              f"reference")
    return _kernel("reference")


def _layer(codec: Codec, n_in: int) -> str:
    """A kind of layer, for messages."""
    return f"{codec.name} in groups of {codec.group_size} with {n_in} inputs"


def _or_autotuned(kernel: Kernel, codec: Codec, n_in: int, dtype: torch.dtype, device: torch.device) -> Kernel:
    """The kernel of a device, or where there is another one beside it, what takes the faster of the two."""
    if kernel.name == "triton":
        autotuned = _kernel("autotuned")
        if autotuned.refusal(codec, n_in, dtype, device) is None:
            return autotuned
    return kernel


def require_values(choice: KernelChoice, q: PackedWeight, where: str) -> None:
    """Raise InputError, naming `where`, if a kernel was asked for by name and the values of a weight do not suit it."""
    if choice == "nvfp4_w4a4" and isinstance(q, Nvfp4Weight) and (reason := nvfp4_w4a4.misfit(q)) is not None:
        raise InputError(f"{where}: kernel nvfp4_w4a4 cannot run this weight: {reason}; take --kernel auto")


def choice_for(choice: KernelChoice, scheme: str) -> KernelChoice:
    """The kernel of one linear of a file, when `choice` is that of the whole model.

    int8 activations need a weight whose scales were moved into it from its inputs (`scheme` in the meta says so): with
    outliers in their inputs, linears that the published recipe leaves unscaled, or that had no statistics, lose four
    times more than 4 bits cost (docs/experiments.md). Those keep 16-bit activations.
    """
    return "auto" if choice == "native_w4a8" and scheme not in _SCALED else choice


def choose_int8(choice: KernelChoice, n_in: int, dtype: torch.dtype, device: torch.device) -> Kernel:
    """The kernel of an 8-bit head with `n_in` inputs; arguments as for `choose`.

    `choice` is about the model's linears: where that kernel cannot run the head, the reference does, and a warning
    says why. Kernels that round activations are about 4 bits and count as auto.
    """
    wanted = _OF_DEVICE.get(device.type, "reference") if choice in ("auto", *_ROUND_ACTIVATIONS) else choice
    kernel = _kernel(wanted)
    refusal = kernel.int8_refusal(n_in, dtype, device)
    if refusal is None:
        return kernel
    warn_once(f"kernel {wanted} cannot run the 8-bit head ({refusal}): it runs on the much slower reference")
    return _kernel("reference")


@functools.cache
def _kernel(name: str) -> Kernel:
    return _KERNELS[name]()
