"""The published recipe: what the scripts of Reza2kn/lance-quant@4edb848 write, tensor for tensor on the CPU.

It shares no arithmetic with int4.py, nvfp4.py and awq.py because it differs from them in ways that change bytes: the
source is rounded to bfloat16 first, codes are chosen with a float32 scale that is rounded afterwards, zero points are
clamped when packing and not while searching, scale floors differ between the two, NVFP4 has no global scale, and the
search multiplies 512 rows of seeded noise shaped by mean |x| instead of using second moments. Kept so that the files
people have can be reproduced and compared with ours; quality is the business of the other modules. Operations keep the
published order wherever float32 rounding depends on it. Where the published scripts replace a group size that does not
divide, this refuses.

Shape suffixes: o out, i in, g group, b block, r row of noise.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lance_quant.formats.base import Codec, Int4
from lance_quant.formats.int4 import LEVELS, pack_nibbles
from lance_quant.formats.nvfp4 import BLOCK, E2M1_MAX, MAGNITUDES

ROWS = 512
SEED = 0xC0DE
GRID = 20
FLOOR = 1e-5  # of activations, weight maxima, s, and scales while searching
PACKED_FLOOR = 1e-8  # of scales while packing; of amax for NVFP4


class Chosen(NamedTuple):
    """s [in], float32, and the exponent of the activation in it."""

    s: Tensor
    alpha: float


def _scale_for(act: Tensor, wmax: Tensor, alpha: float) -> Tensor:
    s = (act.pow(alpha) / wmax.pow(1.0 - alpha)).clamp(min=FLOOR)
    return s / (s.max() * s.min()).sqrt()


def _noise(act: Tensor) -> Tensor:
    generator = torch.Generator(act.device).manual_seed(SEED)
    return torch.randn(ROWS, act.numel(), device=act.device, generator=generator) * act


@torch.no_grad()
def search(weights: Sequence[Tensor], act_means: Sequence[Tensor], codec: Codec) -> Chosen | None:
    """The published grid search of a norm-fed group.

    Args:
        weights: [out, in] of every linear of the group, already rounded to bfloat16.
        act_means: mean |x| [in] of the linears that have statistics.

    Returns:
        The scale, or None where there are no statistics or all of them are zero.
    """
    usable = [act for act in act_means if act.sum() > 0]
    if not usable:
        return None
    act = torch.stack(usable).mean(dim=0).clamp(min=FLOOR)
    wmax = torch.stack([w.float().abs().amax(dim=0).clamp(min=FLOOR) for w in weights]).mean(dim=0)
    x_ri = _noise(act)
    exact = [x_ri @ w.float().t() for w in weights]
    fake_quant = _fake_quant(codec)
    best, least = 0.0, float("inf")
    for step in range(GRID + 1):
        s = _scale_for(act, wmax, step / GRID)
        error = 0.0
        for w, out in zip(weights, exact, strict=True):
            error += ((x_ri / s) @ fake_quant(w.float() * s).t() - out).pow(2).mean().item()
        if error < least:
            best, least = step / GRID, error
    return Chosen(_scale_for(act, wmax, best), best)


def _fake_quant(codec: Codec) -> Callable[[Tensor], Tensor]:
    if isinstance(codec, Int4):
        return lambda w: _fake_int4(w, codec.group_size)
    return _fake_nvfp4


def _fake_int4(w: Tensor, group_size: int) -> Tensor:
    w_ogi = w.reshape(w.shape[0], -1, group_size)
    high, low = w_ogi.amax(-1, keepdim=True), w_ogi.amin(-1, keepdim=True)
    scale = ((high - low) / LEVELS).clamp(min=FLOOR)
    zero = (-low / scale).round()
    code = (w_ogi / scale + zero).round().clamp(0, LEVELS)
    return ((code - zero) * scale).reshape(w.shape)


def _fake_nvfp4(w: Tensor) -> Tensor:
    w_obi = w.reshape(w.shape[0], -1, BLOCK)
    scale = w_obi.abs().amax(-1, keepdim=True).clamp(min=FLOOR) / E2M1_MAX
    magnitude = torch.tensor(MAGNITUDES, device=w.device)[_index(w_obi / scale)]
    return (torch.where(w_obi < 0, -magnitude, magnitude) * scale).reshape(w.shape)


def _index(ratio: Tensor) -> Tensor:
    """Index of the nearest magnitude, the lower of two equally near; equal to an argmin over eight distances."""
    size, index = ratio.abs(), torch.zeros_like(ratio, dtype=torch.int32)
    for lower, upper in zip(MAGNITUDES, MAGNITUDES[1:], strict=False):
        index += size > (lower + upper) / 2
    return index


@torch.no_grad()
def pack(w: Tensor, codec: Codec) -> dict[str, Tensor]:
    """Round a float32 weight [out, in] (scaled or not) as published; suffix -> tensor on disk."""
    return _pack_int4(w, codec.group_size) if isinstance(codec, Int4) else _pack_nvfp4(w)


def _pack_int4(w: Tensor, group_size: int) -> dict[str, Tensor]:
    w_ogi = w.reshape(w.shape[0], -1, group_size)
    high, low = w_ogi.amax(-1, keepdim=True), w_ogi.amin(-1, keepdim=True)
    scale = ((high - low) / LEVELS).clamp(min=PACKED_FLOOR)
    zero = (-low / scale).round().clamp(0, LEVELS)
    code_oi = (w_ogi / scale + zero).round().clamp(0, LEVELS).byte().reshape(w.shape)
    return {"qweight": pack_nibbles(code_oi), "scales": scale.squeeze(-1).bfloat16(), "zeros": zero.squeeze(-1).byte()}


def _pack_nvfp4(w: Tensor) -> dict[str, Tensor]:
    w_obi = w.reshape(w.shape[0], -1, BLOCK)
    scale = w_obi.abs().amax(-1, keepdim=True).clamp(min=PACKED_FLOOR) / E2M1_MAX
    ratio = w_obi / scale
    code_oi = (_index(ratio) | ((ratio < 0).int() << 3)).byte().reshape(w.shape)
    scale = scale.squeeze(-1).cpu()  # Apple GPUs cannot make float8
    return {"qweight": pack_nibbles(code_oi), "scales_fp8": scale.to(torch.float8_e4m3fn).view(torch.uint8),
            "scales_bf16": scale.bfloat16()}
