"""Packed linears on CPUs: packed_linear.c, of the wheel or compiled on first use (compile_c.py), for AVX2, AVX-512 or
in plain C, which ARM64 runs with NEON.

Two paths, chosen by the number of rows:

    dot    few rows. The packed bytes are multiplied in integers, by activations of 24 bits, or 16 where they come in
           bfloat16, with an exponent for every 64. What 16 bits lose of 64 inputs is an eighth of what rounding to
           bfloat16 has lost of the largest one. Nothing is unpacked to memory: an INT4 weight costs 4.375 bits of
           traffic instead of 16.
    gemm   more rows. A block of weight rows is dequantized, to the last bit as the definition says, into one scratch
           buffer that stays in the cache and serves all layers, and the library's GEMM multiplies it.

The GEMM runs in bfloat16 where the layer does and the CPU has AVX-512; elsewhere in float32, because PyTorch's bfloat16
GEMM has no fast path without AVX-512 (Zen 3: 64 rows in 270 ms instead of 55).

An 8-bit head goes the same two ways, its few rows in float32: converting a code takes two instructions for 8 of them.
One row through the head of Lance_3B, one Zen 3 core: bfloat16 or float32 `F.linear` 65 ms, this 29, PyTorch's
`aten._weight_int8pack_mm` 45 for bfloat16 activations and 390 for float32 ones.

Why C and not torch.compile: Inductor's code for the same integer expression took 11 ms where this takes 1.1
(2048 -> 11008, one row, one Zen 3 core; bfloat16 F.linear: 4.5), needs a C++ compiler as well, and compiles 5-30 s per
shape instead of seconds once.
"""

import ctypes
import functools
import threading
from pathlib import Path

import torch
from torch import Tensor

from lance_quant.cpu import compile_c, matmul
from lance_quant.formats import nvfp4
from lance_quant.formats.base import Codec
from lance_quant.formats.int8 import Int8Weight
from lance_quant.formats.weights import PackedWeight
from lance_quant.kernels.base import CALLS
from lance_quant.kernels.ops import define, parts_of

_SOURCE = Path(__file__).with_name("packed_linear.c")
COLUMNS = 64  # that packed_linear.c takes at a time
# Rows up to which `dot` runs, by what the GEMM would compute in: measured, benchmarks/RESULTS.md.
DOT_ROWS = {torch.bfloat16: 18, torch.float32: 32}
# 8 bits: the head of Lance_3B takes 350 and 380 ms for 32 rows in float32, 690 and 650 for 64.
INT8_DOT_ROWS = {torch.bfloat16: 12, torch.float32: 32}
# Of either in plain C: on a Zen 3 without its AVX2 `gemm` is faster from 3 or 4 rows on. On ARM64 nothing was measured.
PLAIN_DOT_ROWS = 3
BLOCK = 1 << 21  # weights that are unpacked at a time
_INT8_BLOCK = 1 << 20  # likewise; 4 MB of floats stay in the cache between the passes of `_int8_gemm`


class Native:
    """C on CPUs."""

    name = "native"

    def refusal(self, codec: Codec, n_in: int, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why this kernel cannot serve such a linear here, None if it can; arguments as in base.Kernel."""
        if (reason := _unserved(dtype, device)) is not None:
            return reason
        if n_in % COLUMNS or (codec.group_size % COLUMNS and codec.group_size not in (16, 32)):
            return f"it takes multiples of {COLUMNS} inputs, in groups of 16, 32 or multiples of {COLUMNS}"
        return unavailable()

    def linear(self, x: Tensor, q: PackedWeight, codec: Codec, bias: Tensor | None) -> Tensor:
        """Multiply: activations [rows, in], weight [out, in], bias [out] or None -> [rows, out] in the dtype of `x`."""
        scale, zero, row_scale = parts_of(q)
        return torch.ops.lance_quant.native_linear(x, q.packed, scale, zero, row_scale, bias, codec.group_size)

    def int8_refusal(self, n_in: int, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why this kernel cannot serve an 8-bit head with `n_in` inputs here; None if it can."""
        if (reason := _unserved(dtype, device)) is not None:
            return reason
        return f"it takes multiples of {COLUMNS} inputs" if n_in % COLUMNS else unavailable()

    def int8_linear(self, x: Tensor, q: Int8Weight) -> Tensor:
        """Multiply: activations [rows, in], weight [out, in] -> [rows, out] in the dtype of `x`."""
        return torch.ops.lance_quant.native_int8(x, q.codes, q.scale)


def _unserved(dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type != "cpu":
        return "it runs on the CPU"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return "it computes in float32, bfloat16 or float16"
    return None


def unavailable() -> str | None:
    """Why these kernels cannot run on this machine; None if they can. Compiles them if need be."""
    return _library_or_reason()[1]


def gemm_dtype(dtype: torch.dtype) -> torch.dtype:
    """What many rows are multiplied in; see the module docstring."""
    wide = torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "AVX10"))
    return torch.bfloat16 if dtype == torch.bfloat16 and wide else torch.float32


class Weight(ctypes.Structure):
    """A packed weight as the C functions take it: `Weight` of packed_weight.h."""

    _fields_ = [*((name, ctypes.c_void_p) for name in ("packed", "scale", "scale_e4m3", "e4m3", "zero", "row_scale")),
                *((name, ctypes.c_int64) for name in ("n_out", "n_in", "group_size", "steps_per_group"))]


def weight_of(q: PackedWeight, group_size: int) -> Weight:
    """A packed weight [out, in] as the C functions take it."""
    return weight_of_parts(q.packed, *parts_of(q), group_size)


def weight_of_parts(packed: Tensor, scale: Tensor, zero: Tensor | None, row_scale: Tensor | None,
                    group_size: int) -> Weight:
    """As `weight_of`, from codes uint8 [out, in/2] and what ops.parts_of gives."""
    floating = scale.is_floating_point()
    weight = Weight(packed.data_ptr(), scale.data_ptr() if floating else None, None if floating else scale.data_ptr(),
                     _e4m3().data_ptr(), None if zero is None else zero.data_ptr(),
                     None if row_scale is None else row_scale.data_ptr(), packed.shape[0], packed.shape[1] * 2,
                     group_size, max(1, group_size // COLUMNS))
    weight.tensors = packed, scale, zero, row_scale  # kept alive
    return weight


@functools.cache
def _e4m3() -> Tensor:
    """float32 values of the 256 E4M3 bytes, by the definition."""
    return nvfp4.decode_e4m3(torch.arange(256, dtype=torch.uint8))


def dequantize_rows(weight: Weight, begin: int, end: int, out: Tensor) -> None:
    """Rows of a weight into `out`, contiguous [end - begin, in], float32 or bfloat16."""
    _library().packed_dequantize(ctypes.byref(weight), begin, end, out.dtype == torch.bfloat16, out.data_ptr(),
                                 torch.get_num_threads())


def _linear(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, row_scale: Tensor | None,
            bias: Tensor | None, group_size: int) -> Tensor:
    weight = weight_of_parts(packed, scale, zero, row_scale, group_size)
    if not x.shape[0]:
        return x.new_empty(0, weight.n_out)
    return dot(x, weight, bias) if x.shape[0] <= most_dot_rows(x.dtype, DOT_ROWS) else gemm(x, weight, bias)


def most_dot_rows(dtype: torch.dtype, measured: dict[torch.dtype, int]) -> int:
    """Rows up to which `dot` runs on this CPU, of DOT_ROWS or INT8_DOT_ROWS, for inputs of this dtype."""
    return PLAIN_DOT_ROWS if compile_c.level() == "plain" else measured[gemm_dtype(dtype)]


def dot(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """The path for few rows, see the module docstring: [rows, in] -> [rows, out]."""
    CALLS.add("native dot")
    digits = 2 if x.dtype == torch.bfloat16 else 3
    wide = x.float().contiguous()
    bias = None if bias is None else bias.float()
    y = wide.new_empty(x.shape[0], weight.n_out)  # not torch.empty: the process may have another default dtype
    failed = _library().packed_linear(ctypes.byref(weight), wide.data_ptr(), x.shape[0], digits,
                                      None if bias is None else bias.data_ptr(), y.data_ptr(),
                                      torch.get_num_threads())
    if failed:
        raise MemoryError(f"no memory for {x.shape[0]} rows of {x.shape[1]} inputs")
    return y.to(x.dtype)


def gemm(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """The path for many rows: [rows, in] -> [rows, out]."""
    dtype = gemm_dtype(x.dtype)
    CALLS.add(f"native dequantize + {str(dtype).removeprefix('torch.')} GEMM")
    wide, y = x.to(dtype), x.new_empty(x.shape[0], weight.n_out, dtype=dtype)
    step = max(1, BLOCK // weight.n_in)
    for begin in range(0, weight.n_out, step):
        end = min(begin + step, weight.n_out)
        block = scratch((end - begin) * weight.n_in, dtype).view(end - begin, weight.n_in)
        dequantize_rows(weight, begin, end, block)
        _multiply(wide, block, y[:, begin:end])
    if bias is not None:
        y += bias
    return y.to(x.dtype)


def _int8(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    if not x.shape[0]:
        return x.new_empty(0, codes.shape[0])
    if x.shape[0] <= most_dot_rows(x.dtype, INT8_DOT_ROWS):
        return _int8_dot(x, codes, scale)
    return _int8_gemm(x, codes, scale)


def _int8_dot(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    CALLS.add("native int8 dot")
    wide = x.float().contiguous()
    y = wide.new_empty(x.shape[0], codes.shape[0])  # see `dot`
    _library().int8_linear(codes.data_ptr(), scale.data_ptr(), *codes.shape, wide.data_ptr(), x.shape[0], y.data_ptr(),
                           torch.get_num_threads())
    return y.to(x.dtype)


def _int8_gemm(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    dtype = gemm_dtype(x.dtype)
    CALLS.add(f"native int8 dequantize + {str(dtype).removeprefix('torch.')} GEMM")
    wide, y = x.to(dtype), x.new_empty(x.shape[0], codes.shape[0], dtype=dtype)
    step = max(1, _INT8_BLOCK // codes.shape[1])
    for begin in range(0, len(codes), step):
        part = codes[begin:begin + step]
        # codes are exact in either dtype, so this is rounded once, as the definition is
        block = scratch(part.numel(), dtype).view(part.shape).copy_(part).mul_(scale[begin:begin + step, None])
        _multiply(wide, block, y[:, begin:begin + step])
    return y.to(x.dtype)


def _multiply(x: Tensor, block: Tensor, y: Tensor) -> None:
    """[rows, in] times [out, in] transposed, into `y` [rows, out]."""
    if x.dtype == torch.float32:
        y.copy_(matmul.linear(x, block))
    else:
        torch.mm(x, block.t(), out=y)


_kept = threading.local()


def scratch(size: int, dtype: torch.dtype) -> Tensor:
    """The thread's buffer [size], which all layers share; grown when a layer's rows exceed BLOCK."""
    held = getattr(_kept, "bytes", None)
    if held is None or held.numel() < size * 4:
        held = _kept.bytes = torch.empty(max(size, BLOCK) * 4, dtype=torch.uint8, device="cpu")
    return held.view(dtype)[:size]


define("native_linear", _linear, "CPU")
define("native_int8", _int8, "CPU", "Tensor codes, Tensor scale")


def _library() -> ctypes.CDLL:
    library, reason = _library_or_reason()
    if library is None:
        raise RuntimeError(f"native kernels are not available: {reason}")
    return library


@functools.cache
def _library_or_reason() -> tuple[ctypes.CDLL | None, str | None]:
    """The compiled file, or why there is none."""
    library, reason = compile_c.load(_SOURCE)
    if library is None:
        return None, reason
    _declare(library)
    return library, None


def _declare(library: ctypes.CDLL) -> None:
    """Argument types of the C functions."""
    pointer, number, small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.packed_linear.argtypes = [pointer, pointer, number, small, pointer, pointer, small]
    library.packed_linear.restype = small
    library.packed_dequantize.argtypes = [pointer, number, number, small, pointer, small]
    library.packed_dequantize.restype = None
    library.int8_linear.argtypes = [pointer, pointer, number, number, pointer, number, pointer, small]
    library.int8_linear.restype = None
