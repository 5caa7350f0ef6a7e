"""W4A8 by definition: 4-bit weights times int8 activations, in integer products, in plain PyTorch.

    y[r, o] = a[r] * s[o] * sum over i of x8[r, i] * w8[o, i]  +  bias[o]

Activations are rounded per token, symmetric: a[r] = max |x[r]| / 127. Weights are derived from the packed bytes: what
a code stands for, rounded again to int8 with one scale per output row, s[o] = largest value that its groups can hold
/ 127. So scales leave the sum, and an int8 GEMM can take it. What both roundings cost stands in docs/experiments.md;
W4A8 runs by name only.

The sum is exact in int32 (up to MOST_INPUTS inputs), so every kernel can be equal to this to the last bit: the float32
operations around it are written here one by one. A row of activations that holds NaN or Inf gives NaN in all its
outputs, and only there. (SmoothQuant, arXiv:2211.10438, and QServe, arXiv:2405.04532, on why scales belong outside.)

Shape suffixes: r row (token), o out, i in.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lance_quant.cpu import matmul
from lance_quant.formats import int4, nvfp4
from lance_quant.formats.int4 import Int4Weight
from lance_quant.formats.weights import PackedWeight

LARGEST = 127
MOST_INPUTS = 131_072  # 127 * 127 * inputs < 2^31
_SMALLEST = 2.0**-100  # keeps rows of zeros finite
_EXACT_INPUTS = 1024  # whose products float32 sums exactly: 127 * 127 * 1024 < 2^24


class Int8Rows(NamedTuple):
    """A matrix with one scale per row.

    codes: int8 [rows, in], -127..127
    scale: float32 [rows]; NaN where the row held NaN or Inf
    """

    codes: Tensor
    scale: Tensor


def quantize_activations(x: Tensor) -> Int8Rows:
    """Round activations [rows, in], any float dtype, to int8 per token, to nearest, ties to even."""
    wide = x.float()
    largest = wide.abs().amax(1) if x.numel() else wide.new_zeros(len(x))
    finite = torch.isfinite(largest)
    largest = torch.where(finite, largest, 1.0).clamp(min=_SMALLEST)
    top = torch.full_like(largest, LARGEST)  # divided by a number, torch multiplies by its inverse on some devices
    codes = torch.where(finite[:, None], wide * (top / largest)[:, None], 0.0).round_()
    return Int8Rows(codes.to(torch.int8), torch.where(finite, largest / top, torch.nan))


def row_scales(scale: Tensor, zero: Tensor | None, row_scale: Tensor | None) -> Tensor:
    """float32 [out]: the scale s of every weight row, from what its groups can hold; reads no codes.

    Args:
        scale, zero, row_scale: of a packed weight, see ops.parts_of.
    """
    if zero is not None:
        largest = (scale.float() * torch.maximum(zero, int4.LEVELS - zero)).amax(1)
    else:
        values = scale.float() if scale.is_floating_point() else nvfp4.decode_e4m3(scale)
        largest = (values if row_scale is None else values * row_scale).amax(1) * nvfp4.MAGNITUDES[-1]
    return largest.clamp(min=_SMALLEST) / torch.full_like(largest, LARGEST)


def quantize_weight(q: PackedWeight, scale: Tensor) -> Int8Rows:
    """The int8 weight [out, in] of a packed one, by its `row_scales` [out]."""
    w = int4.dequantize(q) if isinstance(q, Int4Weight) else nvfp4.dequantize(q)
    return Int8Rows((w * (1 / scale)[:, None]).round_().to(torch.int8), scale)


def products(x8_ri: Tensor, w8_oi: Tensor) -> Tensor:
    """int32 [rows, out]: exact sums of int8 products, by float32 GEMMs over as many inputs as they sum exactly."""
    total = torch.zeros(len(x8_ri), len(w8_oi), dtype=torch.int32, device=x8_ri.device)
    for x8, w8 in zip(x8_ri.split(_EXACT_INPUTS, 1), w8_oi.split(_EXACT_INPUTS, 1), strict=True):
        total += matmul.linear(x8.float(), w8.float()).to(torch.int32)
    return total


def rescale(sums_ro: Tensor, x: Int8Rows, w: Int8Rows, bias: Tensor | None) -> Tensor:
    """float32 [rows, out] of int32 sums [rows, out], with bias [out]."""
    y = sums_ro.float() * (x.scale[:, None] * w.scale)
    return y if bias is None else y + bias.float()


def linear(x: Tensor, q: PackedWeight, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The definition: [rows, in] -> [rows, out] in the dtype of `x`, of a packed weight and its `row_scales` [out]."""
    x8, w8 = quantize_activations(x), quantize_weight(q, scale)
    return rescale(products(x8.codes, w8.codes), x8, w8, bias).to(x.dtype)
