"""W4A8 on CPUs: 4-bit weights times int8 activations in int8 or int16 arithmetic (w4a8.py says what it computes).

Denoising is multiplications, which 4-bit weights alone do not save. Integers do:

    VNNI    (AVX512-VNNI, AVX-VNNI) multiplies int8 twice as fast as AVX512-BF16 multiplies bfloat16. A block of weight
            rows is unpacked to int8 into a buffer that stays in the cache, oneDNN multiplies it (`torch._int_mm`), and
            one pass rescales and adds the bias.
    AVX2    multiplies pairs of int16 into int32 twice as fast as float32; int8_products.c does the whole linear, in
            plain C elsewhere. oneDNN's int8 has no fast code without VNNI (Zen 3: 16 times float32's time).

Both equal w4a8.linear to the bit, so a machine with VNNI draws what a machine without draws. Up to FEW_ROWS rows, as in
decoding, reading weights is the cost, and the W4A16 kernel (cpu.py) computes: activations are not rounded there.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from lance_quant.cpu import compile_c
from lance_quant.formats.base import Codec
from lance_quant.formats.weights import PackedWeight
from lance_quant.kernels import cpu, w4a8
from lance_quant.kernels.base import CALLS
from lance_quant.kernels.ops import Derived, define, parts_of

_SOURCE = Path(__file__).with_name("int8_products.c")
FEW_ROWS = 48  # up to about here memory decides, not arithmetic; with VNNI it has not been measured
_BLOCK_ROWS = 512  # weight rows that are unpacked at a time for oneDNN: 1 MB at 2048 inputs


class NativeW4A8(cpu.Native):
    """int8 activations from FEW_ROWS rows on; below, and for an 8-bit head, what `native` computes."""

    name = "native_w4a8"

    def refusal(self, codec: Codec, n_in: int, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why this kernel cannot serve such a linear here, None if it can; arguments as in base.Kernel."""
        if n_in > w4a8.MOST_INPUTS:
            return f"it takes up to {w4a8.MOST_INPUTS} inputs"
        return super().refusal(codec, n_in, dtype, device) or _library_or_reason()[1]

    def linear(self, x: Tensor, q: PackedWeight, codec: Codec, bias: Tensor | None) -> Tensor:
        """Multiply: activations [rows, in], weight [out, in], bias [out] or None -> [rows, out] in the dtype of `x`."""
        if len(x) <= FEW_ROWS:
            return super().linear(x, q, codec, bias)
        scale, zero, row_scale = parts_of(q)
        return torch.ops.lance_quant.native_w4a8_linear(x, q.packed, scale, zero, row_scale, bias, codec.group_size)


@functools.cache
def has_vnni() -> bool:
    """Whether the CPU multiplies int8 in one instruction and oneDNN can use it."""
    flags = next((line.split() for line in _cpu_lines() if line.startswith("flags")), [])
    return not {"avx512_vnni", "avx_vnni"}.isdisjoint(flags)


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


# Row scales are made once for a weight and kept with its scales: 32 bits a row.
_INT4_ROW_SCALES: Derived[Tensor] = Derived(lambda scale, zero: w4a8.row_scales(scale, zero, None))
_NVFP4_ROW_SCALES: Derived[Tensor] = Derived(lambda scale, row_scale: w4a8.row_scales(scale, None, row_scale))


class _Result(ctypes.Structure):
    """`Result` of int8_products.c."""

    _fields_ = [*((name, ctypes.c_void_p) for name in ("row_scale", "out_scale", "bias", "y")),
                ("n_out", ctypes.c_int64), ("to_bf16", ctypes.c_int)]


def compute(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, row_scale: Tensor | None,
            bias: Tensor | None, group_size: int) -> Tensor:
    """Multiply with int8 activations: [rows, in] -> [rows, out] in the dtype of `x`.

    Args:
        x: [rows, in] activations.
        packed: uint8 [out, in/2] codes.
        scale, zero, row_scale: see ops.parts_of.
        bias: [out] or None.
    """
    if not len(x):
        return x.new_empty(0, len(packed))
    kept = _NVFP4_ROW_SCALES.of(scale, row_scale) if zero is None else _INT4_ROW_SCALES.of(scale, zero)
    weight = cpu.weight_of_parts(packed, scale, zero, row_scale, group_size)
    inputs = x.contiguous() if x.dtype == torch.bfloat16 else x.float().contiguous()
    y = inputs.new_empty(len(x), len(packed))
    multiply = _by_library if has_vnni() else _in_c
    CALLS.add(f"native_w4a8 {'oneDNN' if has_vnni() else 'plain C' if compile_c.level() == 'plain' else 'AVX2'}")
    multiply(inputs, weight, kept, None if bias is None else bias.float(), y)
    return y.to(x.dtype)


def _in_c(x: Tensor, weight: cpu.Weight, scale: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """`y` [rows, out] of `x` [rows, in], both float32 or bfloat16; `scale` [out] are the weight's row scales."""
    inverse, row_scale = 1 / scale, scale.new_empty(len(x))
    failed = _library().w4a8_linear(ctypes.byref(weight), inverse.data_ptr(), x.data_ptr(), x.dtype == torch.bfloat16,
                                    len(x), ctypes.byref(_result(row_scale, scale, bias, y)), torch.get_num_threads())
    if failed:
        raise MemoryError(f"no memory for {x.shape[0]} rows of {x.shape[1]} inputs")


def _by_library(x: Tensor, weight: cpu.Weight, scale: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """As `_in_c`, with torch._int_mm."""
    inverse, threads = 1 / scale, torch.get_num_threads()
    x8 = quantize_activations(x)
    result = _result(x8.scale, scale, bias, y)
    for begin in range(0, weight.n_out, _BLOCK_ROWS):
        end = min(begin + _BLOCK_ROWS, weight.n_out)
        block = cpu.scratch((end - begin) * weight.n_in, torch.int8).view(end - begin, weight.n_in)
        _library().w4a8_unpack(ctypes.byref(weight), inverse.data_ptr(), begin, end, block.data_ptr(), threads)
        sums = torch._int_mm(x8.codes, block.t())
        _library().w4a8_rescale(ctypes.byref(result), len(x), begin, end - begin, sums.data_ptr(), threads)


def quantize_activations(x: Tensor) -> w4a8.Int8Rows:
    """w4a8.quantize_activations of [rows, in] contiguous, float32 or bfloat16, in one pass."""
    codes, scale = torch.empty(x.shape, dtype=torch.int8), torch.empty(len(x), dtype=torch.float32)
    _library().w4a8_quantize(x.data_ptr(), x.dtype == torch.bfloat16, *x.shape, codes.data_ptr(), scale.data_ptr(),
                             torch.get_num_threads())
    return w4a8.Int8Rows(codes, scale)


def _result(row_scale: Tensor, out_scale: Tensor, bias: Tensor | None, y: Tensor) -> _Result:
    result = _Result(row_scale.data_ptr(), out_scale.data_ptr(), None if bias is None else bias.data_ptr(),
                     y.data_ptr(), y.shape[1], y.dtype == torch.bfloat16)
    result.tensors = row_scale, out_scale, bias, y  # kept alive
    return result


def _library() -> ctypes.CDLL:
    library, reason = _library_or_reason()
    if library is None:
        raise RuntimeError(f"kernel native_w4a8: {reason}")
    return library


@functools.cache
def _library_or_reason() -> tuple[ctypes.CDLL | None, str | None]:
    """The compiled file, or why there is none."""
    library, reason = compile_c.load(_SOURCE)
    if library is not None:
        _declare(library)
    return library, reason


def _declare(library: ctypes.CDLL) -> None:
    """Argument types of the C functions."""
    pointer, number, small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.w4a8_linear.argtypes = [pointer, pointer, pointer, small, number, pointer, small]
    library.w4a8_linear.restype = small
    library.w4a8_quantize.argtypes = [pointer, small, number, number, pointer, pointer, small]
    library.w4a8_quantize.restype = None
    library.w4a8_unpack.argtypes = [pointer, pointer, number, number, pointer, small]
    library.w4a8_unpack.restype = None
    library.w4a8_rescale.argtypes = [pointer, number, number, number, pointer, small]
    library.w4a8_rescale.restype = None


define("native_w4a8_linear", compute, "CPU")
