"""AWQ as Reza2kn/lance-quant@4edb848 published it, repeated tensor for tensor on the CPU.

Kept so that the files people have can be reproduced and compared with; quality is the business of the other modules.
It shares no arithmetic with int4.py, nvfp4.py and awq.py, because it differs from them in ways that change bytes:

- The source is rounded to bfloat16 first, and codes are chosen with a float32 scale that is rounded afterwards.
- Zero points are clamped when packing and not while searching; scale floors differ between the two.
- NVFP4 has no global scale.
- The search multiplies 512 rows of seeded noise shaped by mean |x| instead of using second moments.

Operations keep the published order wherever float32 rounding depends on it. Where the published scripts replace a group
size that does not divide, this refuses.

Shape suffixes: o out, i in, g group, b block, r row of noise.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lance_quant.calibration.activation_stats import ActStats
from lance_quant.formats import layout
from lance_quant.formats.base import Codec
from lance_quant.formats.int4 import LEVELS, Int4, pack_nibbles
from lance_quant.formats.nvfp4 import BLOCK, E2M1_MAX, MAGNITUDES
from lance_quant.formats.weights import Weights
from lance_quant.methods.quantized_group import QuantizedGroup, QuantizedLinear

ROWS = 512
SEED = 0xC0DE
ALPHA_STEPS = 20  # of the exponent between 0 and 1
FLOOR = 1e-5  # of activations, weight maxima, s, and scales while searching
PACKED_FLOOR = 1e-8  # of scales while packing; of amax for NVFP4


class PublishedScale(NamedTuple):
    """s [in], float32, and the exponent of the activation in it."""

    s: Tensor
    alpha: float


def quantize_layer(index: int, weights: Weights, stats: ActStats,
                   codec: Codec) -> Iterator[tuple[layout.Group, QuantizedGroup]]:
    """Quantize one layer by the published recipe; yields its eight groups as they are finished.

    Args:
        index: of the layer.
        weights: all tensors of the layer, float32; norms are changed in place to those of the packed linears.
        stats: mean |x| of the linears that have statistics.
        codec: the format; Nvfp4 in the published layout.
    """
    for group in layout.groups(index):
        started = time.perf_counter()
        linears = [weights[f"{name}.weight"].bfloat16() for name in group.linears]
        done = _quantize_group(group, linears, weights, stats, codec)
        yield group, replace(done, seconds=time.perf_counter() - started)


def _quantize_group(group: layout.Group, linears: Sequence[Tensor], weights: Weights, stats: ActStats,
                    codec: Codec) -> QuantizedGroup:
    known = [stats.linears[name] for name in group.linears if name in stats.linears]
    means = [(entry.sum_abs.float() / entry.n_tokens).to(linears[0].device) for entry in known]
    if group.norm is None:
        return QuantizedGroup([_linear(w.float(), codec) for w in linears], "plain", None, "no scale", 0.0, 0.0)
    found = search(linears, means, codec)
    if found is None:
        return QuantizedGroup([_linear(w.float(), codec) for w in linears], "unsearched", None, "no scale", 0.0, 0.0)
    norm = f"{group.norm}.weight"
    weights[norm] = (weights[norm].bfloat16().float() / found.s).bfloat16()
    label = f"act^{found.alpha:.2f}/w^{1 - found.alpha:.2f}"
    return QuantizedGroup([_linear(w.float() * found.s, codec) for w in linears], "searched", None, label,
                          found.alpha, 0.0)


def _linear(w: Tensor, codec: Codec) -> QuantizedLinear:
    return QuantizedLinear(pack(w, codec))


def _scale_for(act: Tensor, wmax: Tensor, alpha: float) -> Tensor:
    s = (act.pow(alpha) / wmax.pow(1.0 - alpha)).clamp(min=FLOOR)
    return s / (s.max() * s.min()).sqrt()


def _noise(act: Tensor) -> Tensor:
    generator = torch.Generator(act.device).manual_seed(SEED)
    return torch.randn(ROWS, act.numel(), device=act.device, generator=generator) * act


@torch.no_grad()
def search(weights: Sequence[Tensor], act_means: Sequence[Tensor], codec: Codec) -> PublishedScale | None:
    """The published grid search for the scale of a group behind a norm.

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
    for step in range(ALPHA_STEPS + 1):
        s = _scale_for(act, wmax, step / ALPHA_STEPS)
        error = 0.0
        for w, out in zip(weights, exact, strict=True):
            error += ((x_ri / s) @ fake_quant(w.float() * s).t() - out).pow(2).mean().item()
        if error < least:
            best, least = step / ALPHA_STEPS, error
    return PublishedScale(_scale_for(act, wmax, best), best)


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
