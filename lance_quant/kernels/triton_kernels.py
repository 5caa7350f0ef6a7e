"""The Triton kernels of w4a16.py, and their launches. Importing this needs triton.

Axes of a block of weights: n outputs, g groups of inputs that share a scale, h bytes of such a group (HALF of them); a
byte holds an even column in its low nibble and the odd one after it in its high nibble.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_GEMV_COLUMNS, _TILE_COLUMNS, _UNPACK_COLUMNS = 512, 64, 256  # of a block of weights, at least one group


@triton.jit
def _values(code, IS_INT4: tl.constexpr):
    """4-bit codes (int32) as float32: INT4's 0..15, NVFP4's E2M1 values."""
    if IS_INT4:
        # 2^23 with the code in its last bits: two operations of full speed, where a conversion has a quarter of it
        return (code | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    size = code & 7  # 0, 0.5, then a float32 with E2M1's exponent and mantissa bits and 126 more in the exponent
    bits = tl.where(size < 2, size * 0x3F000000, (size << 22) + 0x3F000000)
    return (bits | ((code & 8) << 28)).to(tl.float32, bitcast=True)


@triton.jit
def _scales(scale, zero, row_scale, n, g, n_out, n_groups, IS_INT4: tl.constexpr, IS_E4M3: tl.constexpr,
            HAS_ROW_SCALE: tl.constexpr):
    """float32 [n, g] scales, and zero points of INT4 (0 for NVFP4)."""
    where = n[:, None] * n_groups + g[None, :]
    mask = (n[:, None] < n_out) & (g[None, :] < n_groups)
    if IS_E4M3:
        byte = tl.load(scale + where, mask=mask, other=0).to(tl.int32)
        normal = ((byte << 20) + (120 << 23)).to(tl.float32, bitcast=True)
        s = tl.where(byte < 8, byte.to(tl.float32) * 0.001953125, normal)
    else:
        s = tl.load(scale + where, mask=mask, other=0.0).to(tl.float32)
    if HAS_ROW_SCALE:
        s = s * tl.load(row_scale + n, mask=n < n_out, other=0.0)[:, None]
    z = tl.zeros_like(s)
    if IS_INT4:
        z = tl.load(zero + where, mask=mask, other=0).to(tl.float32)
    return s, z


@triton.jit
def _block(packed, scale, zero, row_scale, n, g, n_out, n_groups, HALF: tl.constexpr, IS_INT4: tl.constexpr,
           IS_E4M3: tl.constexpr, HAS_ROW_SCALE: tl.constexpr):
    """float32 weights [n, g, h] of even columns and of odd columns."""
    mask = (n[:, None] < n_out) & (g[None, :] < n_groups)
    s, z = _scales(scale, zero, row_scale, n, g, n_out, n_groups, IS_INT4, IS_E4M3, HAS_ROW_SCALE)
    h = tl.arange(0, HALF)
    where = n.to(tl.int64)[:, None, None] * (n_groups * HALF) + g[None, :, None] * HALF + h[None, None, :]
    byte = tl.load(packed + where, mask=mask[:, :, None], other=0).to(tl.int32)
    even = (_values(byte & 15, IS_INT4) - z[:, :, None]) * s[:, :, None]
    odd = (_values(byte >> 4, IS_INT4) - z[:, :, None]) * s[:, :, None]
    return even, odd


@triton.jit
def _gemv(x, packed, scale, zero, row_scale, bias, out, n_out, n_groups, GROUPS: tl.constexpr, HALF: tl.constexpr,
          BLOCK_N: tl.constexpr, IS_INT4: tl.constexpr, IS_E4M3: tl.constexpr, HAS_ROW_SCALE: tl.constexpr,
          HAS_BIAS: tl.constexpr):
    """One row of inputs and BLOCK_N outputs."""
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    pair, h = tl.arange(0, 2), tl.arange(0, HALF)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, n_groups, GROUPS):
        g = first + tl.arange(0, GROUPS)
        column = (g[:, None, None] * HALF + h[None, :, None]) * 2 + pair[None, None, :]
        inputs = tl.load(x + row * n_groups * HALF * 2 + column, mask=g[:, None, None] < n_groups, other=0.0)
        x_even, x_odd = tl.split(inputs.to(tl.float32))
        even, odd = _block(packed, scale, zero, row_scale, n, g, n_out, n_groups, HALF, IS_INT4, IS_E4M3,
                           HAS_ROW_SCALE)
        total += tl.sum(tl.sum(even * x_even[None, :, :] + odd * x_odd[None, :, :], axis=2), axis=1)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < n_out, other=0.0).to(tl.float32)
    tl.store(out + row * n_out + n, total.to(out.dtype.element_ty), mask=n < n_out)


@triton.jit
def _tile(x, packed, scale, zero, row_scale, bias, out, rows, n_out, n_groups, GROUPS: tl.constexpr,
          HALF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_INT4: tl.constexpr,
          IS_E4M3: tl.constexpr, HAS_ROW_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr):
    """BLOCK_M rows of inputs and BLOCK_N outputs."""
    BYTES: tl.constexpr = GROUPS * HALF
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    byte, pair = tl.arange(0, BYTES), tl.arange(0, 2)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, n_groups, GROUPS):
        b = first * HALF + byte
        inside = (m[:, None, None] < rows) & (b[None, :, None] < n_groups * HALF)
        where = m.to(tl.int64)[:, None, None] * (n_groups * HALF * 2) + b[None, :, None] * 2 + pair[None, None, :]
        x_even, x_odd = tl.split(tl.load(x + where, mask=inside, other=0.0))
        even, odd = _block(packed, scale, zero, row_scale, n, first + tl.arange(0, GROUPS), n_out, n_groups, HALF,
                           IS_INT4, IS_E4M3, HAS_ROW_SCALE)
        even = tl.trans(tl.reshape(even, (BLOCK_N, BYTES)).to(x.dtype.element_ty))
        odd = tl.trans(tl.reshape(odd, (BLOCK_N, BYTES)).to(x.dtype.element_ty))
        total = tl.dot(x_even, even, total, input_precision="ieee")
        total = tl.dot(x_odd, odd, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < n_out, other=0.0).to(tl.float32)[None, :]
    where = m.to(tl.int64)[:, None] * n_out + n[None, :]
    tl.store(out + where, total.to(out.dtype.element_ty), mask=(m[:, None] < rows) & (n[None, :] < n_out))


@triton.jit
def _unpack(packed, scale, zero, row_scale, out, n_out, n_groups, GROUPS: tl.constexpr, HALF: tl.constexpr,
            BLOCK_N: tl.constexpr, IS_INT4: tl.constexpr, IS_E4M3: tl.constexpr, HAS_ROW_SCALE: tl.constexpr):
    """BLOCK_N rows and GROUPS groups of the weight itself."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    g, h, pair = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS), tl.arange(0, HALF), tl.arange(0, 2)
    even, odd = _block(packed, scale, zero, row_scale, n, g, n_out, n_groups, HALF, IS_INT4, IS_E4M3, HAS_ROW_SCALE)
    column = (g[None, :, None, None] * HALF + h[None, None, :, None]) * 2 + pair[None, None, None, :]
    where = n.to(tl.int64)[:, None, None, None] * (n_groups * HALF * 2) + column
    mask = (n[:, None, None, None] < n_out) & (g[None, :, None, None] < n_groups)
    tl.store(out + where, tl.join(even, odd).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _int8_gemv(x, codes, scale, out, n_in, n_out, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr):
    """One row of inputs and BLOCK_N outputs of a weight in 8 bits with one scale per row."""
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, n_in, BLOCK_I):
        i = first + tl.arange(0, BLOCK_I)
        inputs = tl.load(x + row * n_in + i, mask=i < n_in, other=0.0).to(tl.float32)
        code = tl.load(codes + n.to(tl.int64)[:, None] * n_in + i[None, :],
                       mask=(n[:, None] < n_out) & (i[None, :] < n_in), other=0).to(tl.float32)
        total += tl.sum(code * inputs[None, :], axis=1)
    total *= tl.load(scale + n, mask=n < n_out, other=0.0).to(tl.float32)
    tl.store(out + row * n_out + n, total.to(out.dtype.element_ty), mask=n < n_out)


def _shared(scale: Tensor, zero: Tensor | None, row_scale: Tensor | None, group_size: int, columns: int) -> dict:
    """What all kernels are told: the format, and how many groups make a block of about `columns`."""
    return {"GROUPS": max(1, columns // group_size), "HALF": group_size // 2, "IS_INT4": zero is not None,
            "IS_E4M3": not scale.is_floating_point(), "HAS_ROW_SCALE": row_scale is not None}


def gemv(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, row_scale: Tensor | None,
         bias: Tensor | None, group_size: int) -> Tensor:
    """[rows, in] -> [rows, out]; every row reads the whole weight."""
    x, n_out = x.contiguous(), packed.shape[0]
    out = x.new_empty(x.shape[0], n_out)
    _gemv[triton.cdiv(n_out, 8), x.shape[0]](x, packed, scale, zero, row_scale, bias, out, n_out, scale.shape[1],
                                             BLOCK_N=8, HAS_BIAS=bias is not None,
                                             **_shared(scale, zero, row_scale, group_size, _GEMV_COLUMNS))
    return out


def tile_blocks(rows: int, group_size: int, dtype: torch.dtype) -> tuple[int, int]:
    """Rows and outputs of a block of `_tile`: as many as fit the shared memory of consumer GPUs, 99 KB, where a block
    is kept several times over to load ahead (tests/compile_triton.py has the bytes)."""
    width = max(_TILE_COLUMNS, group_size) * dtype.itemsize
    if rows <= 16 or width > 512:
        return 16, 32
    return (32, 64) if rows <= 64 or width > 256 else (64, 64)


def tile(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, row_scale: Tensor | None,
         bias: Tensor | None, group_size: int) -> Tensor:
    """[rows, in] -> [rows, out]; every block of rows reads the whole weight."""
    x, rows, n_out = x.contiguous(), x.shape[0], packed.shape[0]
    out = x.new_empty(rows, n_out)
    block_m, block_n = tile_blocks(rows, group_size, x.dtype)
    _tile[triton.cdiv(n_out, block_n), triton.cdiv(rows, block_m)](
        x, packed, scale, zero, row_scale, bias, out, rows, n_out, scale.shape[1], BLOCK_M=block_m, BLOCK_N=block_n,
        HAS_BIAS=bias is not None, **_shared(scale, zero, row_scale, group_size, _TILE_COLUMNS))
    return out


def unpack(packed: Tensor, scale: Tensor, zero: Tensor | None, row_scale: Tensor | None, group_size: int,
           dtype: torch.dtype) -> Tensor:
    """The weight, [out, in]: the definition's, rounded to `dtype`."""
    n_out, n_groups = scale.shape
    out = torch.empty(n_out, n_groups * group_size, dtype=dtype, device=packed.device)
    shared = _shared(scale, zero, row_scale, group_size, _UNPACK_COLUMNS)
    _unpack[triton.cdiv(n_out, 8), triton.cdiv(n_groups, shared["GROUPS"])](
        packed, scale, zero, row_scale, out, n_out, n_groups, BLOCK_N=8, **shared)
    return out


def int8_gemv(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """[rows, in] -> [rows, out]; every row reads the whole weight."""
    x, (n_out, n_in) = x.contiguous(), codes.shape
    out = x.new_empty(x.shape[0], n_out)
    _int8_gemv[triton.cdiv(n_out, 8), x.shape[0]](x, codes, scale, out, n_in, n_out, BLOCK_N=8, BLOCK_I=512)
    return out
