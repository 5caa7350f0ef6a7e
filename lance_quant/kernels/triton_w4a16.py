"""Packed linears on CUDA: Triton kernels on the published bytes, for both formats.

Three paths, chosen by the number of rows:

    gemv   decoding: a program per 8 outputs, which goes through whole rows of weights in float32
    tile   up to TILE_ROWS rows: a program per block of outputs unpacks its weights on the way to the tensor cores
    gemm   more rows, as in denoising: the weight is unpacked once into a passing buffer, to the last bit as the
           definition says, and cuBLAS multiplies it. The buffer's traffic is 5 bytes a weight: a tenth of the
           multiplication's time at 2300 rows on an H100, by arithmetic

An 8-bit head has a gemv of its own; more rows of it multiply a block of rows at a time, dequantized by PyTorch.

Nothing here was timed: the limits between the paths come from arithmetic and from the dispatch constants of others
(comfy-kitchen leaves its 4-bit kernel at 256 rows). Correctness is tested on the CPU through Triton's interpreter, and
tests/compile_triton.py compiles every kernel for five generations of GPUs.
"""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from lance_quant.formats import int8
from lance_quant.formats.base import Codec
from lance_quant.formats.weights import PackedWeight
from lance_quant.kernels.base import CALLS
from lance_quant.kernels.ops import define, parts_of

GEMV_ROWS, TILE_ROWS = 4, 256
_GROUP_SIZES = (16, 32, 64, 128, 256)


class TritonW4A16:
    """Triton on CUDA."""

    name = "triton"

    def refusal(self, codec: Codec, n_in: int, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why this kernel cannot serve such a linear here, None if it can; arguments as in base.Kernel."""
        return _not_here(device) or unsupported(codec, dtype)

    def linear(self, x: Tensor, q: PackedWeight, codec: Codec, bias: Tensor | None) -> Tensor:
        """Multiply: activations [rows, in], weight [out, in], bias [out] or None -> [rows, out] in the dtype of `x`."""
        scale, zero, row_scale = parts_of(q)
        return torch.ops.lance_quant.triton_linear(x, q.packed, scale, zero, row_scale, bias, codec.group_size)

    def int8_refusal(self, n_in: int, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why this kernel cannot serve an 8-bit head with `n_in` inputs here; None if it can."""
        return _not_here(device) or _uncomputed(dtype)

    def int8_linear(self, x: Tensor, q: int8.Int8Weight) -> Tensor:
        """Multiply: activations [rows, in], weight [out, in] -> [rows, out] in the dtype of `x`."""
        return torch.ops.lance_quant.triton_int8(x, q.codes, q.scale)


def _not_here(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "it runs on CUDA"
    if importlib.util.find_spec("triton") is None:  # it comes with torch for CUDA
        return "the triton package is missing; install torch's build for CUDA"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0 (Ampere) or newer"
    return None


def _uncomputed(dtype: torch.dtype) -> str | None:
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return "it computes in float32, bfloat16 or float16"
    return None


def unsupported(codec: Codec, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot compute such layers anywhere."""
    if (reason := _uncomputed(dtype)) is not None:
        return reason
    if codec.group_size not in _GROUP_SIZES:
        return f"it takes groups of {', '.join(map(str, _GROUP_SIZES))}"
    return None


def compute(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, row_scale: Tensor | None,
            bias: Tensor | None, group_size: int) -> Tensor:
    """[rows, in] -> [rows, out], on the path for so many rows."""
    from lance_quant.kernels import triton_kernels

    rows, weight = x.shape[0], (packed, scale, zero, row_scale)
    if not rows:
        return x.new_empty(0, packed.shape[0])
    if rows <= GEMV_ROWS:
        CALLS.add("triton gemv")
        return triton_kernels.gemv(x, *weight, bias, group_size)
    if rows <= TILE_ROWS:
        CALLS.add("triton tile")
        return triton_kernels.tile(x, *weight, bias, group_size)
    CALLS.add("triton dequantize + GEMM")
    return F.linear(x, triton_kernels.unpack(*weight, group_size, x.dtype), bias)


def compute_int8(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """[rows, in] -> [rows, out], on the path for so many rows."""
    from lance_quant.kernels import triton_kernels

    if not x.shape[0]:
        return x.new_empty(0, codes.shape[0])
    if x.shape[0] <= GEMV_ROWS:
        CALLS.add("triton int8 gemv")
        return triton_kernels.int8_gemv(x, codes, scale)
    CALLS.add("triton int8 dequantize + GEMM")
    return int8.linear(x, int8.Int8Weight(codes, scale))


define("triton_linear", compute, "CUDA")
define("triton_int8", compute_int8, "CUDA", "Tensor codes, Tensor scale")
