"""The three 4-bit formats of MLX in plain torch, equal to `mlx.core.quantize` bit for bit.

    affine   w = code * scale + bias, integers 0..15, scale and bias per 64 inputs in the weight's own dtype
    nvfp4    w = E2M1[code] * E4M3[scale], one byte per 16 inputs, no scale per tensor
    mxfp4    w = E2M1[code] * 2^(scale - 127), one byte per 32 inputs

Codes lie in uint32 words, input 8k + j in bits 4j. Affine codes are chosen with the float32 scale before it is rounded,
one end of each range is hit exactly, and 0 is not always a level. Floating-point codes are the entry of the table with
the smallest |w / scale - entry|, all in the weight's own dtype: halves go to the smaller magnitude, no code is -0, and
bfloat16 input does not give the codes of its float32 copy (0.6 % differ). That is what MLX 0.32 does on
the CPU, repeated here on purpose: a file must not depend on where it was made. It differs from
lance_quant.formats.nvfp4.
apple/mlx_codec.py writes the same formats better, for inputs of known size.

Shape suffixes: o out, i in, g group.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lance_quant.formats.int4 import pack_nibbles, unpack_nibbles
from lance_quant.formats.nvfp4 import decode_e4m3, nearest

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_TABLE = (*MAGNITUDES, *(-value for value in MAGNITUDES))
_MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # between neighbours
_LEVELS = 15
_MIN_SCALE = 1e-7  # MLX's


@dataclass(frozen=True)
class Format:
    """One of MLX's modes; `FORMATS` holds them all."""

    mode: str
    group_size: int

    def suffixes(self, dtype: torch.dtype) -> dict[str, tuple[torch.dtype, int]]:
        """Suffix -> (dtype on disk, inputs per element) of a weight of some dtype."""
        scale = dtype if self.mode == "affine" else torch.uint8
        rest = {"biases": (dtype, self.group_size)} if self.mode == "affine" else {}
        return {"weight": (torch.uint32, 8), "scales": (scale, self.group_size), **rest}

    @property
    def config(self) -> dict[str, Any]:
        """What config.json says under `quantization`."""
        return {"group_size": self.group_size, "bits": 4, "mode": self.mode}


FORMATS = {"4bit": Format("affine", 64), "nvfp4": Format("nvfp4", 16), "mxfp4": Format("mxfp4", 32)}


@torch.no_grad()
def quantize(w: Tensor, fmt: Format) -> dict[str, Tensor]:
    """Pack a weight as MLX does.

    Args:
        w: [out, in] finite, float32 or bfloat16; `in` a multiple of the group size.

    Returns:
        "weight" uint32 [out, in/8], "scales" [out, groups], and for affine "biases" [out, groups].

    Raises:
        ValueError: the group size does not divide `in`, or `w` holds NaN or Inf.
    """
    n_out, n_in = w.shape
    if n_in % fmt.group_size:
        raise ValueError(f"group size {fmt.group_size} does not divide {n_in} inputs")
    blocks_ogi = w.reshape(n_out, -1, fmt.group_size)
    code_ogi, scales = (_affine if fmt.mode == "affine" else _float4)(blocks_ogi, fmt)
    packed = pack_nibbles(code_ogi.reshape(n_out, n_in)).contiguous()
    return {"weight": packed.view(torch.uint32), **scales}


@torch.no_grad()
def dequantize(tensors: Mapping[str, Tensor], fmt: Format) -> Tensor:
    """What the bytes mean: float32 [out, in]. MLX rounds the same values to the dtype it computes in."""
    n_out, n_groups = tensors["scales"].shape
    code_ogi = unpack_nibbles(tensors["weight"].view(torch.uint8)).view(n_out, n_groups, -1)
    if fmt.mode == "affine":
        scale, bias = (tensors[name].float()[..., None] for name in ("scales", "biases"))
        return (code_ogi * scale + bias).view(n_out, -1)
    value_ogi = torch.tensor(_TABLE, device=code_ogi.device)[code_ogi.int()]
    return (value_ogi * _scale_values(tensors["scales"], fmt)[..., None]).view(n_out, -1)


@torch.no_grad()
def fake_quant_io(w_io: Tensor, fmt: Format) -> Tensor:
    """`dequantize(quantize(w))` of a transposed float32 weight, [in, out] -> [in, out], but for ties, which a search
    does not see."""
    w_oi = w_io.t().contiguous()
    if fmt.mode == "affine":
        return dequantize(quantize(w_oi, fmt), fmt).t().contiguous()
    blocks_ogi = w_oi.view(len(w_oi), -1, fmt.group_size)
    scale = _scale_values(_encode_scales(blocks_ogi.abs().amax(-1, keepdim=True) / 6.0, fmt), fmt)
    scale.clamp_(min=torch.finfo(torch.float32).tiny)  # a block that is stored as zeros stays so
    return nearest(blocks_ogi, scale).view(w_oi.shape).t().contiguous()


def _affine(blocks_ogi: Tensor, fmt: Format) -> tuple[Tensor, dict[str, Tensor]]:
    wide = blocks_ogi.float()
    low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
    _require_finite(high - low)
    below = low.abs() > high.abs()
    scale = ((high - low) / _LEVELS).clamp(min=_MIN_SCALE)
    scale, edge = torch.where(below, scale, -scale), torch.where(below, low, high)
    steps = (edge / scale).round()
    scale, bias = torch.where(steps != 0, edge / steps, scale), torch.where(steps != 0, edge, 0.0)
    code = ((wide - bias) / scale).round_().clamp_(0, _LEVELS).byte()
    return code, {"scales": scale.squeeze(-1).to(blocks_ogi.dtype), "biases": bias.squeeze(-1).to(blocks_ogi.dtype)}


def _float4(blocks_ogi: Tensor, fmt: Format) -> tuple[Tensor, dict[str, Tensor]]:
    wanted = blocks_ogi.abs().amax(-1).float() / 6.0
    _require_finite(wanted)
    stored = _encode_scales(wanted, fmt)
    scale = _scale_values(stored, fmt).to(blocks_ogi.dtype)[..., None]
    scale = scale.masked_fill(scale == 0, math.inf)  # a block whose scale vanishes gets codes 0
    return _nearest_entry(blocks_ogi / scale), {"scales": stored}


def _require_finite(ranges: Tensor) -> None:
    """NaN and Inf reach the range of their block."""
    if not torch.isfinite(ranges).all():
        raise ValueError("weight holds NaN or Inf")


def _encode_scales(wanted: Tensor, fmt: Format) -> Tensor:
    if fmt.mode == "nvfp4":
        return wanted.to(torch.float8_e4m3fn).view(torch.uint8)
    exponent = torch.where(wanted > 0, wanted.log2().ceil_(), 0.0)  # an empty block gets scale 1
    return (exponent + 127).clamp_(0, 254).byte()


def _scale_values(stored: Tensor, fmt: Format) -> Tensor:
    if fmt.mode == "nvfp4":
        return decode_e4m3(stored)
    return torch.exp2(stored.float() - 127)


def _nearest_entry(ratio: Tensor) -> Tensor:
    """Codes of w / scale, float32 or bfloat16. The bits of positive floats are ordered as they are, and integers are
    compared in a twentieth of the time that distances to all entries take."""
    integers = torch.int16 if ratio.dtype == torch.bfloat16 else torch.int32
    bits = ratio.view(integers)
    size = bits & torch.iinfo(integers).max
    code = torch.zeros(ratio.shape, dtype=torch.uint8, device=ratio.device)
    for middle in torch.tensor(_MIDDLES, dtype=ratio.dtype).view(integers).tolist():
        code += size > middle
    return code | ((bits < 0) & (code > 0)).byte() << 3
