"""NVFP4 linears with activations in NVFP4 too: what the FP4 tensor cores of Blackwell multiply.

    y[r, o] = g[r] * G * sum over i of (E2M1 * E4M3 of x[r, i]) * (E2M1 * E4M3 of w[o, i])

Activations are rounded as `nvfp4.quantize` rounds a weight, every row by itself with a power of two g[r], so that no
row depends on what it is batched with. That costs quality, which weights in 4 bits alone do not (docs/kernels.md), so
this kernel runs only when it is asked for by name. A row with NaN or Inf gives NaN in all its outputs, and only there.

Everything but one call is plain PyTorch, which `--compile` fuses. Where that call cannot run (any device but a GPU of
compute capability 10.0 or newer with a torch that has it, outputs that are no multiple of 16, inputs of 32) the same
products are simulated: both factors are dequantized, which is exact also in bfloat16 (six significant bits), and
multiplied. So what this costs in quality can be measured on any machine.

The tensor cores want the weight's scales as E4M3 with one factor for the whole weight, in cuBLAS's order of blocks of
128 x 4. They are made at first use and kept: 0.5 bits a weight more memory.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lance_quant.formats import nvfp4
from lance_quant.formats.base import Codec
from lance_quant.formats.blocks import dequantize_to
from lance_quant.formats.nvfp4 import Nvfp4, Nvfp4Weight
from lance_quant.formats.weights import PackedWeight
from lance_quant.kernels.base import CALLS, warn_once
from lance_quant.kernels.ops import Derived, define, parts_of
from lance_quant.kernels.reference import Reference

_FP4_ROWS, _FP4_OUTPUTS, _FP4_INPUTS = 16, 16, 32  # whose multiples cuBLAS takes; rows are padded to them


class W4A4(Reference):
    """NVFP4 times NVFP4 activations; of an 8-bit head it is what the reference is."""

    name = "nvfp4_w4a4"

    def refusal(self, codec: Codec, n_in: int, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why this kernel cannot serve such a linear here, None if it can; arguments as in base.Kernel."""
        if not isinstance(codec, Nvfp4):
            return "it takes NVFP4"
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return "it computes in float32, bfloat16 or float16"
        if (reason := without_tensor_cores(device)) is not None:
            warn_once(f"kernel nvfp4_w4a4 is simulated here, and slow: {reason}")
        return None

    def linear(self, x: Tensor, q: PackedWeight, codec: Codec, bias: Tensor | None) -> Tensor:
        """Multiply: activations [rows, in], weight [out, in], bias [out] or None -> [rows, out] in the dtype of `x`."""
        rounded = nvfp4.quantize_rows(x)
        scale, _, row_scale = parts_of(q)
        y = torch.ops.lance_quant.nvfp4_products(rounded.packed, q.packed, rounded.scale, scale, row_scale,
                                                 _wide(x.dtype)) * rounded.global_scale
        return (y if bias is None else y + bias).to(x.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What products are summed up to, before g: float16 could not hold them."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


@functools.cache
def without_tensor_cores(device: torch.device) -> str | None:
    """Why a device cannot multiply NVFP4; None if it can."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "FP4 tensor cores are in NVIDIA GPUs from compute capability 10.0 (Blackwell) on"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 10:
        return f"FP4 tensor cores come with compute capability 10.0 (Blackwell), and this GPU has {major}.{minor}"
    if not hasattr(F, "scaled_mm"):
        return f"torch {torch.__version__} has no torch.nn.functional.scaled_mm to use FP4 tensor cores with"
    return None


class E4m3(NamedTuple):
    """Scales as the tensor cores take them.

    codes: uint8 [out, in/16], bytes of E4M3
    factor: float32 [1], a power of two that multiplies all of them
    """

    codes: Tensor
    factor: Tensor


def e4m3_of(q: Nvfp4Weight) -> E4m3 | None:
    """A weight's scales, exactly; None where they are not E4M3 times one power of two."""
    values = nvfp4.scale_values(q)
    mantissa, exponent = torch.frexp(values.amax().clamp(min=2.0**-100))  # mantissa from 1/2 to 1
    # As large as they can be, up to 448 = 0.875 * 2^9: subnormal bytes have fewer bits.
    exponent = exponent - 9 + (mantissa > 0.875)
    factor = ((exponent + 127) << 23).view(torch.float32)
    codes = nvfp4.encode_e4m3(nvfp4.round_e4m3(values / factor))
    if not torch.equal(nvfp4.decode_e4m3(codes) * factor, values):
        return None
    return E4m3(codes, factor.view(1))


def misfit(q: Nvfp4Weight) -> str | None:
    """Why tensor cores cannot take a weight, by its values; None if they can."""
    if e4m3_of(q) is None:
        return "its block scales are not E4M3 times a power of two, as in files of the published recipe"
    return None


class _Blocked(NamedTuple):
    scale: Tensor  # float8_e4m3fn, `blocked`
    factor: Tensor


def _blocked_scales(scale: Tensor, row_scale: Tensor | None) -> _Blocked | None:
    shared = e4m3_of(Nvfp4Weight(scale, scale, 1.0 if row_scale is None else row_scale))
    return None if shared is None else _Blocked(blocked(shared.codes).view(torch.float8_e4m3fn), shared.factor)


_KEPT: Derived[_Blocked | None] = Derived(_blocked_scales)


def blocked(codes: Tensor) -> Tensor:
    """uint8 [rows, blocks] -> flat, in cuBLAS's order: tiles of 128 rows and 4 columns, padded with zeros, each as
    [32, 4, 4] by row modulo 32, row over 32, and column."""
    rows, columns = codes.shape
    padded = F.pad(codes, (0, -columns % 4, 0, -rows % 128))
    tiles = padded.view(padded.shape[0] // 128, 4, 32, padded.shape[1] // 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).flatten()


def products(codes: Tensor, packed: Tensor, code_scale: Tensor, scale: Tensor, row_scale: Tensor | None,
             dtype: torch.dtype) -> Tensor:
    """Activations without their g, times a weight: [rows, out] in `dtype`.

    Args:
        codes, code_scale: of activations, uint8 [rows, in/2] and bytes of E4M3 [rows, in/16].
        packed, scale, row_scale: of the weight, see parts_of.
    """
    if not codes.shape[0]:
        return _empty(codes, packed, code_scale, scale, row_scale, dtype)
    if (without_tensor_cores(codes.device) is None and packed.shape[0] % _FP4_OUTPUTS == 0
            and packed.shape[1] * 2 % _FP4_INPUTS == 0 and (kept := _KEPT.of(scale, row_scale)) is not None):
        CALLS.add("nvfp4_w4a4")
        return multiplied(codes, packed, code_scale, kept.scale, kept.factor, dtype)
    CALLS.add("nvfp4_w4a4 simulated")
    weight = Nvfp4Weight(packed, scale, 1.0 if row_scale is None else row_scale)
    x = nvfp4.dequantize(Nvfp4Weight(codes, code_scale, 1.0)).to(dtype)
    return F.linear(x, dequantize_to(Nvfp4(), weight, dtype))


def multiplied(codes: Tensor, packed: Tensor, code_scale: Tensor, scale: Tensor, factor: Tensor,
               dtype: torch.dtype) -> Tensor:
    """As `products`, [rows, out], on the tensor cores; `scale` is `blocked` float8_e4m3fn, `factor` multiplies it.

    In which order a byte's two codes come does not matter, as long as it is the same in both.
    """
    rows = codes.shape[0]
    padding = 0, 0, 0, -rows % _FP4_ROWS
    codes, code_scale = F.pad(codes, padding), blocked(F.pad(code_scale, padding)).view(torch.float8_e4m3fn)
    recipe = [F.ScalingType.BlockWise1x16, F.ScalingType.TensorWise]
    swizzle = [F.SwizzleType.SWIZZLE_32_4_4, F.SwizzleType.NO_SWIZZLE]
    y = F.scaled_mm(codes.view(torch.float4_e2m1fn_x2), packed.view(torch.float4_e2m1fn_x2).t(),
                    scale_a=[code_scale, torch.ones_like(factor)], scale_recipe_a=recipe, swizzle_a=swizzle,
                    scale_b=[scale, factor], scale_recipe_b=recipe, swizzle_b=swizzle, output_dtype=dtype)
    return y[:rows]


def _empty(codes: Tensor, packed: Tensor, code_scale: Tensor, scale: Tensor, row_scale: Tensor | None,
           dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape[0], packed.shape[0], dtype=dtype)


define("nvfp4_products", products, "CompositeExplicitAutograd",
       "Tensor packed, Tensor x_scale, Tensor scale, Tensor? row_scale, ScalarType dtype", _empty)
