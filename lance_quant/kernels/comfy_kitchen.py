"""INT4 linears on CUDA by comfy-kitchen, the library of kernels that comes with ComfyUI.

Its AWQ kernel takes the codes of the file as they are, but wants

    w = (code - 8) * S + Z    with S = scale and Z = (8 - zero) * scale, transposed, in the dtype of the activations.

S and Z are made at first use and kept with the scales: 32 bits a group of 64, half a bit a weight more memory. Both are
exact in float16, for scales from 2^-17 on. In bfloat16 S is, and Z where |8 - zero| is a power of two or 0; elsewhere
it is off by 1/36 of a step at most. S and Z in float16 would be exact for bfloat16 activations too, but the kernel
would round those to float16, whose range they exceed.

More than ROWS rows take the way of the Triton kernels, unpacking and cuBLAS, because comfy-kitchen unpacks by a dozen
PyTorch operations there. An 8-bit head runs on the Triton kernels as well.
"""

import functools
import importlib.util

import torch
from torch import Tensor

from lance_quant.formats.base import Codec
from lance_quant.formats.int4 import Int4
from lance_quant.formats.weights import PackedWeight
from lance_quant.kernels import triton_w4a16
from lance_quant.kernels.base import CALLS
from lance_quant.kernels.ops import Derived, define, parts_of

ROWS = 256  # its own limit between its kernel and unpacking
GROUP_SIZE = 64  # the kernel for more than 8 rows goes through the inputs in steps of 64, with one scale each


class ComfyKitchen(triton_w4a16.TritonW4A16):
    """comfy-kitchen's AWQ kernel where it can serve, Triton's elsewhere."""

    name = "comfy_kitchen"

    def refusal(self, codec: Codec, n_in: int, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why this kernel cannot serve such a linear here, None if it can; arguments as in base.Kernel."""
        if not isinstance(codec, Int4) or codec.group_size != GROUP_SIZE:
            return f"it takes INT4 in groups of {GROUP_SIZE}"
        if dtype not in (torch.bfloat16, torch.float16):
            return "it computes in bfloat16 or float16"
        return super().refusal(codec, n_in, dtype, device) or unavailable()

    def linear(self, x: Tensor, q: PackedWeight, codec: Codec, bias: Tensor | None) -> Tensor:
        """Multiply: activations [rows, in], weight [out, in], bias [out] or None -> [rows, out] in the dtype of `x`."""
        return torch.ops.lance_quant.comfy_linear(x, q.packed, *parts_of(q), bias, codec.group_size)


@functools.cache
def unavailable() -> str | None:
    """Why comfy-kitchen's CUDA kernels cannot run in this process; None if they can."""
    if importlib.util.find_spec("comfy_kitchen") is None:
        return "the comfy-kitchen package is missing; pip install comfy-kitchen"
    try:
        import comfy_kitchen
        from comfy_kitchen.registry import registry
    except Exception as error:  # noqa: BLE001 - a foreign package in whatever state it is
        return f"comfy-kitchen cannot be imported ({type(error).__name__}: {error})"
    if not hasattr(comfy_kitchen, "gemv_awq_w4a16"):
        return "this comfy-kitchen has no AWQ kernel; update it"
    if not registry.is_available("cuda"):  # it would run on plain PyTorch instead
        return "comfy-kitchen cannot load its CUDA kernels here"
    return None


def scales_and_zeros(scale: Tensor, zero: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """S and Z [groups, out] of scales and zero points [out, groups]; see the module docstring."""
    shift = (8 - zero.float()) * scale.float()
    return scale.t().to(dtype).contiguous(), shift.t().to(dtype).contiguous()


@functools.cache
def _kept(dtype: torch.dtype) -> Derived[tuple[Tensor, Tensor]]:
    return Derived(functools.partial(scales_and_zeros, dtype=dtype))


def compute(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, row_scale: Tensor | None,
            bias: Tensor | None, group_size: int) -> Tensor:
    """[rows, in] -> [rows, out], on the path for so many rows."""
    if not 0 < x.shape[0] <= ROWS:
        return triton_w4a16.compute(x, packed, scale, zero, row_scale, bias, group_size)
    import comfy_kitchen

    CALLS.add("comfy_kitchen")
    shared = _kept(x.dtype).of(scale, zero)
    return comfy_kitchen.gemv_awq_w4a16(x.contiguous(), packed.view(torch.int8), *shared, bias, group_size)


define("comfy_linear", compute, "CUDA")
