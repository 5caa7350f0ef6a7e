"""NVFP4, two-level block scaling: four-bit floats (E2M1), an E4M3 scale per 16 inputs, a global scale per tensor.

    w[o, i] = E2M1[code[o, i]] * E4M3[scale[o, i // 16]] * G

Without the global scale G the block scales of a trained layer (about 0.005) fall among E4M3's subnormals and lose
5-15 %. G is a power of two, so E4M3 * G has at most four significant bits and is exact in bfloat16: a file can carry
the scales twice, in the published `scales_bf16` and as bytes, without saying two different things. G leaves a factor of
448/256 below the E4M3 maximum, so that the scale search may enlarge a block's scale by 1.5. The scale is rounded to
E4M3 before the codes are chosen. Everything is float32 arithmetic and comparisons: no float8 dtype (Apple GPUs have
none). The format is NVIDIA's (Blackwell); the search for scales is after mit-han-lab/fouroversix.

E2M1: bit 3 is the sign, bits 2..0 count 0, 0.5, 1, 1.5, 2, 3, 4, 6. A value halfway between two goes to the smaller
magnitude; a negative value that rounds to zero keeps its sign (code 8), as in the published files.

The functions define the format in PyTorch. `Nvfp4Quantizer` searches and rounds by them, in C where that gives the same
bits. `Nvfp4` is the storage format.

Shape suffixes: o out, i in, b block; a block tensor has the axis of one block's inputs where `dim` says.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lance_quant.cpu import rounding
from lance_quant.cpu.weighted_sums import weighted_squares
from lance_quant.errors import InputError
from lance_quant.formats.base import Grid, Measured, Scaling, errors_by_definition, measured_by_definition
from lance_quant.formats.group_sizes import NVFP4_BLOCK
from lance_quant.formats.int4 import pack_nibbles, pack_nibbles_io, unpack_nibbles
from lance_quant.storage.tensor_file import TensorSpec

BLOCK = NVFP4_BLOCK
E2M1_MAX = 6.0
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SCALE_TARGET = 256  # largest E4M3 block scale we make; E4M3 ends at 448
E4M3_MAX = 448.0
# Scales tried, in E4M3 values above the one next to amax / 6, which comes first: 0.8 to 1.6 times it, each once.
SCALE_STEPS = (0, 1, 2, 3, 4, 5, 6, -1, -2, -3)
_LARGEST_BITS = 126  # 448
MIN_E4M3 = 2.0**-9  # smallest subnormal; also the scale of an all-zero block
_EXPONENT = 0x7F800000  # of a float32


class Nvfp4Weight(NamedTuple):
    """A packed linear weight.

    packed:       uint8 [out, in/2], even column in the low nibble
    scale:        [out, in/16]: uint8 bytes of E4M3, or bfloat16 values (published files, with global_scale 1)
    global_scale: multiplies every scale; a tensor [out, 1] where rows have different ones
    """

    packed: Tensor
    scale: Tensor
    global_scale: float | Tensor


def global_scale_for(amax: float) -> float:
    """Smallest power of two G with 6 * 256 * G >= amax; 1 for an all-zero tensor or one that is not finite.

    Linears that a runtime may merge (q/k/v, gate/up) get the G of their common amax.
    """
    if amax == 0 or not math.isfinite(amax):
        return 1.0  # `quantize` refuses what is not finite
    mantissa, exponent = math.frexp(amax / (E2M1_MAX * _SCALE_TARGET))
    return 2.0 ** max(exponent - (mantissa == 0.5), -100)  # -100: G times the smallest E4M3 stays a normal bfloat16


def _power_of_two(x: Tensor) -> Tensor:
    """2^floor(log2 x) of positive normal float32 values: the mantissa bits cleared."""
    return (x.view(torch.int32) & _EXPONENT).view(torch.float32)


def round_e4m3(x: Tensor) -> Tensor:
    """float32 [...], between 2^-9 and 448 -> nearest E4M3 value, ties to even, as float32."""
    step = _power_of_two(x).clamp_(min=2.0**-6).mul_(2.0**-3)
    return (x / step).round_().mul_(step)


def encode_e4m3(x: Tensor) -> Tensor:
    """Non-negative E4M3 values, float32 [...] -> their bytes, uint8 [...]."""
    return _bits_of(x).byte()


def decode_e4m3(code: Tensor) -> Tensor:
    """Bytes of non-negative E4M3 numbers, uint8 [...] -> their values, float32 [...]."""
    exponent, mantissa = (code >> 3).int(), (code & 7).float()
    unit = ((exponent.clamp(min=1) + (127 - 10)) << 23).view(torch.float32)  # 2^(e - 7 - 3)
    return (mantissa + 8 * (exponent > 0)).mul_(unit)


def _scales(sizes: Tensor, dim: int, global_scale: float | Tensor) -> Tensor:
    """E4M3 value of every block's scale, without G, from |weights|; `dim` is kept with size 1."""
    wanted = sizes.amax(dim, keepdim=True) / (E2M1_MAX * global_scale)
    return round_e4m3(wanted.clamp_(min=MIN_E4M3))


def _magnitudes(sizes: Tensor, scale: Tensor) -> Tensor:
    """Nearest E2M1 magnitude of every |weight| / scale; overwrites `sizes`."""
    ratio = sizes.div_(scale).clamp_(max=E2M1_MAX)
    twice_step = _power_of_two(ratio).clamp_(1, 4)  # neighbours are 1/2 apart below 2, 1 below 4, 2 below 6
    # ceil(x - 1/2) rounds halves down; doubling, dividing by a power of two and subtracting 1/2 are exact here.
    return ratio.mul_(2).div_(twice_step).sub_(0.5).ceil_().mul_(twice_step).mul_(0.5)


def fault(q: Nvfp4Weight) -> str | None:
    """What no quantizer writes and a damaged file may hold, in a packed weight's scales; None if all is well. Every
    nibble of `packed` is a code."""
    if q.scale.dtype == torch.uint8:
        if q.scale.numel() and int(q.scale.max()) > _LARGEST_BITS:  # the sign is the highest bit, NaN all others
            return f"the E4M3 scale 0x{int(q.scale.max()):02X}, which is negative or NaN"
        return None
    scale = q.scale.float()
    if not bool((scale >= 0).all()):  # NaN is not
        return "a scale that is negative or NaN"
    if scale.numel() and E2M1_MAX * scale.max() > torch.finfo(torch.bfloat16).max:
        return f"a scale of {scale.max().item():.3g}, whose weights are beyond bfloat16"
    return None


def is_global_scale(value: object) -> bool:
    """Whether a meta's value can be a global scale: a power of two that keeps all weights within bfloat16."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 2.0**-126 <= value <= 2.0**100 \
        and math.frexp(value)[0] == 0.5


@torch.no_grad()
def quantize(w: Tensor, global_scale: float | None = None) -> Nvfp4Weight:
    """Round a linear weight to NVFP4, largest value of a block to +-6.

    Args:
        w: [out, in] finite weight, any float dtype.
        global_scale: a power of two, at least that of `global_scale_for(amax of w)`; default exactly that.

    Returns:
        Nvfp4Weight with E4M3 bytes; 4.5 bits per weight.

    Raises:
        ValueError: 16 does not divide `in`, or `w` holds NaN or Inf.
    """
    n_out, n_in = w.shape
    if n_in % BLOCK:
        raise ValueError(f"{n_in} inputs are not a multiple of the block size {BLOCK}")
    if global_scale is None:
        global_scale = global_scale_for(float(torch.linalg.vector_norm(w, math.inf)))
    blocks_obi = w.float().reshape(n_out, n_in // BLOCK, BLOCK)
    sizes_obi = blocks_obi.abs()
    scale = _scales(sizes_obi, 2, global_scale)
    if not torch.isfinite(scale).all():  # NaN and Inf reach the scale of their block
        raise ValueError("weight holds NaN or Inf")
    value = _magnitudes(sizes_obi, scale * global_scale)
    code_oi = _codes(value, blocks_obi).view(n_out, n_in)
    return Nvfp4Weight(pack_nibbles(code_oi), encode_e4m3(scale.squeeze(2)), global_scale)


@torch.no_grad()
def quantize_rows(x: Tensor) -> Nvfp4Weight:
    """`quantize` of every row by itself, without waiting for the device: for activations, as they come.

    Args:
        x: [rows, in], any float dtype; `in` is a multiple of 16.

    Returns:
        Nvfp4Weight with a global scale per row, float32 [rows, 1]. It is NaN for a row that holds NaN or Inf, and the
        codes of that row mean nothing.
    """
    blocks_rbi = x.float().unflatten(1, (-1, BLOCK))
    sizes_rbi = blocks_rbi.abs()
    amax = sizes_rbi.amax((1, 2), keepdim=True)
    octave = _power_of_two(amax)
    # global_scale_for: the smallest power of two that is at least amax / (6 * 256), which is amax / 1.5 / 2^10
    global_scale = torch.where(amax <= 1.5 * octave, octave * 2.0**-10, octave * 2.0**-9).clamp(min=2.0**-100)
    global_scale = torch.where(amax == 0, torch.ones_like(amax), global_scale)
    scale = _scales(sizes_rbi, 2, global_scale)
    code = _codes(_magnitudes(sizes_rbi, scale * global_scale), blocks_rbi).view(x.shape)
    global_scale = torch.where(amax.isfinite(), global_scale, torch.full_like(amax, math.nan))
    return Nvfp4Weight(pack_nibbles(code), encode_e4m3(scale.squeeze(2)), global_scale.squeeze(2))


def scale_values(q: Nvfp4Weight) -> Tensor:
    """float32 [out, in/16]: what a code is multiplied by. With E4M3 bytes it is exact in bfloat16."""
    scale = q.scale.float() if q.scale.is_floating_point() else decode_e4m3(q.scale)
    return scale * q.global_scale


@torch.no_grad()
def dequantize(q: Nvfp4Weight) -> Tensor:
    """The one definition of what the bytes mean: float32 [out, in] = E2M1 value * scale * G, exact."""
    n_out, n_blocks = q.scale.shape
    code = unpack_nibbles(q.packed).reshape(-1).int()
    value_obi = torch.index_select(_values(q.packed.device), 0, code).view(n_out, n_blocks, BLOCK)
    return value_obi.mul_(scale_values(q)[..., None]).view(n_out, -1)


@functools.cache
def _values(device: torch.device) -> Tensor:
    return torch.tensor([*MAGNITUDES, *(-value for value in MAGNITUDES)], device=device)


@torch.no_grad()
def fake_quant_io(w_io: Tensor, global_scale: float) -> Tensor:
    """`dequantize(quantize(w))` of a transposed float32 weight, without packing: [in, out] -> [in, out].

    Inputs come first for speed, as in int4.fake_quant_io.
    """
    blocks_bio = w_io.view(-1, BLOCK, w_io.shape[1])
    sizes_bio = blocks_bio.abs()
    scale = _scales(sizes_bio, 1, global_scale).mul_(global_scale)
    return _magnitudes(sizes_bio, scale).mul_(scale).copysign_(blocks_bio).view(w_io.shape)


@torch.no_grad()
def search_scales_io(w_io: Tensor, global_scale: float, importance: Tensor) -> Tensor:
    """The E4M3 scale of every block that leaves the smallest weighted error, among those near amax / 6.

    Larger ones help because E2M1 has no level between 4 and 6 (amax to 4: mit-han-lab/fouroversix), smaller
    ones clip; without weights by the inputs either can lose in the output.

    Args:
        w_io: float32 [in, out], finite.
        importance: float32 [in], weight of a squared error in each column, usually E[x^2].

    Returns:
        float32 [blocks, out], E4M3 value times global_scale; never worse than those of `quantize`.
    """
    sizes_bio = w_io.view(-1, BLOCK, w_io.shape[1]).abs()
    weight_bi = importance.view(-1, BLOCK)
    wanted = sizes_bio.amax(1, keepdim=True).div_(E2M1_MAX * global_scale).clamp_(MIN_E4M3, E4M3_MAX)
    steps = torch.tensor(SCALE_STEPS, dtype=torch.int32, device=w_io.device)[:, None, None, None]
    bits = (_bits_of(round_e4m3(wanted)) + steps).clamp_(1, _LARGEST_BITS)
    scales = _from_bits(bits).mul_(global_scale)  # [steps, blocks, 1, out]
    errors = _weighted_errors(sizes_bio, weight_bi, scales)  # rounding.c does the same
    least, best = errors[0], scales[0].clone()
    for error, scale in zip(errors[1:], scales[1:], strict=True):
        best.lerp_(scale, (error < least).float())  # exact, and ten times as fast as torch.where
        least = torch.minimum(least, error)
    return best.squeeze(1)


def _weighted_errors(sizes_bio: Tensor, weight_bi: Tensor, scales: Tensor) -> Tensor:
    """Sum over each block of weighted squared errors [n, blocks, 1, out] of n scales each, from |weights|, in as few
    passes over them as it takes.

    Adding 1.5 * 2^22 times a power of two and subtracting it again rounds to half of that power. Halves may go the
    other way than in _magnitudes, and a product with 1 / scale is not a quotient to the last bit: that changes an error
    by rounding.
    """
    exact, octave, rounded = (torch.empty_like(sizes_bio) for _ in range(3))
    errors, octave_bits = torch.empty_like(scales), octave.view(torch.int32)
    for inverse, error in zip(scales.reciprocal(), errors, strict=True):
        torch.mul(sizes_bio, inverse, out=exact)
        torch.clamp(exact, max=E2M1_MAX, out=rounded)
        torch.bitwise_and(rounded.view(torch.int32), _EXPONENT, out=octave_bits)
        octave.clamp_(min=1).mul_(1.5 * 2**22)
        error[:, 0] = weighted_squares(rounded.add_(octave).sub_(octave).sub_(exact), weight_bi)
    return errors.mul_(scales.square())


def _bits_of(x: Tensor) -> Tensor:
    """Non-negative E4M3 values (float32) -> their bytes, as int32."""
    normal = (x.view(torch.int32) >> 20) - (120 << 3)  # float32's exponent bias 127 against 7
    return torch.where(x < 2.0**-6, (x * 2.0**9).int(), normal)


def _from_bits(bits: Tensor) -> Tensor:
    """The inverse of _bits_of. Below 2^-6 the first term, which has no subnormals, is too large."""
    normal = ((bits << 20) + (120 << 23)).view(torch.float32)
    return torch.minimum(normal, 2 * normal - 2.0**-6)


@torch.no_grad()
def nearest(w_io: Tensor, scale: Tensor) -> Tensor:
    """The nearest E2M1 level: float32 [n, out] and scales (with the global one) that broadcast -> [n, out]."""
    return _magnitudes(w_io.abs(), scale).mul_(scale).copysign_(w_io)


@torch.no_grad()
def round_io(w_io: Tensor, scale: Tensor, global_scale: float) -> tuple[Nvfp4Weight, Tensor]:
    """The nearest levels of given scales, packed and as values.

    Args:
        w_io: float32 [in, out], finite.
        scale: float32 [blocks, out], an E4M3 value times global_scale.

    Returns:
        Nvfp4Weight of [out, in], and its `dequantize` as float32 [in, out].
    """
    blocks_bio = w_io.view(-1, BLOCK, w_io.shape[1])
    value_bio = _magnitudes(blocks_bio.abs(), scale[:, None])
    code_bio = _indices(value_bio).add_((blocks_bio < 0).float(), alpha=8)
    packed = pack_nibbles_io(code_bio.view(w_io.shape))
    values = value_bio.mul_(scale[:, None]).copysign_(blocks_bio).view(w_io.shape)
    return Nvfp4Weight(packed, encode_e4m3(scale.t() / global_scale), global_scale), values


@torch.no_grad()
def encode(values: Tensor, scale: Tensor, global_scale: float) -> Nvfp4Weight:
    """Pack values that are levels already, exactly.

    Args:
        values: float32 [out, in], every one a level of its block.
        scale: float32 [out, blocks], an E4M3 value times global_scale.
        global_scale: a power of two.
    """
    blocks_obi = values.view(*scale.shape, BLOCK)
    code_oi = _codes(_magnitudes(blocks_obi.abs(), scale[..., None]), blocks_obi).view(values.shape)
    return Nvfp4Weight(pack_nibbles(code_oi), encode_e4m3(scale / global_scale), global_scale)


def _codes(magnitude: Tensor, signed: Tensor) -> Tensor:
    """4-bit codes of E2M1 magnitudes, with the sign of `signed`."""
    return _indices(magnitude).byte() | ((signed < 0).byte() << 3)


def _indices(magnitude: Tensor) -> Tensor:
    """The inverse of MAGNITUDES, as float32."""
    return torch.minimum(torch.minimum(magnitude * 2, magnitude + 2), magnitude * 0.5 + 4)


@dataclass(frozen=True)
class Nvfp4Quantizer:
    """Scales, rounding and errors of NVFP4, in C where that runs. The methods are those of Quantizer."""

    group_size: ClassVar[int] = BLOCK

    def runs_in_c(self, w: Tensor) -> bool:
        """Whether `measured` and `errors` of a weight [out, in] run in C."""
        return rounding.serves(w, BLOCK)

    def global_scale(self, amax: float) -> float:
        """The power of two of `global_scale_for`."""
        return global_scale_for(amax)

    def quantize(self, w: Tensor, global_scale: float) -> Nvfp4Weight:
        """The module's `quantize` of a weight [out, in]."""
        if not self.runs_in_c(w):
            return quantize(w, global_scale)
        found = rounding.quantize_nvfp4(w, BLOCK, global_scale)
        return Nvfp4Weight(found.packed, found.scale, global_scale)

    def fake_quant_io(self, w_io: Tensor, global_scale: float) -> Tensor:
        """The module's `fake_quant_io`: [in, out] -> [in, out]."""
        return fake_quant_io(w_io, global_scale)

    def grid(self, w_io: Tensor, importance: Tensor, global_scale: float) -> Grid:
        """The scales [blocks, out] of `search_scales_io` for a weight [in, out] and importance [in]."""
        if not self.runs_in_c(w_io.t()):
            return Grid(search_scales_io(w_io, global_scale, importance), None)
        found = rounding.quantize_nvfp4(w_io.t(), BLOCK, global_scale, importance, SCALE_STEPS, pack=False)
        return Grid(decode_e4m3(found.scale.t().contiguous()).mul_(global_scale), None)

    def nearest(self, w_io: Tensor, grid: Grid) -> Tensor:
        """The module's `nearest`: [n, out] -> [n, out]."""
        return nearest(w_io, grid.scale)

    def round_io(self, w_io: Tensor, grid: Grid, global_scale: float) -> tuple[Nvfp4Weight, Tensor]:
        """The module's `round_io` of a weight [in, out]."""
        return round_io(w_io, grid.scale, global_scale)

    def measured(self, w: Tensor, importance: Tensor, global_scale: float) -> Measured[Nvfp4Weight]:
        """A weight [out, in] packed with searched scales, for importance [in], and its errors [2, out, blocks]."""
        if not self.runs_in_c(w):
            return measured_by_definition(self, w, importance, global_scale)
        found = rounding.quantize_nvfp4(w, BLOCK, global_scale, importance, SCALE_STEPS)
        return Measured(Nvfp4Weight(found.packed, found.scale, global_scale), found.sums)

    def errors(self, w: Tensor, factors: Tensor, weights: Tensor, global_scales: Sequence[float]) -> Tensor:
        """Errors [1 + n, out, blocks] of a weight [out, in] rounded to nearest with columns multiplied [n, in]."""
        if not self.runs_in_c(w):
            return errors_by_definition(self, w, factors, weights, global_scales)
        return rounding.errors_nvfp4(w, BLOCK, factors, weights, global_scales)

    def storable(self, scale: Tensor, global_scale: float) -> Tensor:
        """Scales [...] rounded to E4M3 times the global scale."""
        return round_e4m3((scale / global_scale).clamp(MIN_E4M3, E4M3_MAX)) * global_scale

    def encode(self, values: Tensor, grid: Grid, global_scale: float) -> Nvfp4Weight:
        """The module's `encode` of values [out, in] with a grid [blocks, out]."""
        return encode(values, grid.scale.t().contiguous(), global_scale)


@dataclass(frozen=True)
class Nvfp4:
    """The storage format.

    slim: store the E4M3 bytes only (4.5 bits per weight) instead of the published pair of scale tensors (5.5), of which
        readers use the bfloat16 one. The values are the same.
    """

    slim: bool = False
    name: ClassVar[str] = "nvfp4"
    state_file: ClassVar[str] = "nvfp4_state_dict.safetensors"
    meta_file: ClassVar[str] = "nvfp4_meta.json"
    SCHEMES: ClassVar[dict[Scaling, str]] = {"searched": "nvfp4_awq", "unsearched": "nvfp4_minmax",
                                             "plain": "nvfp4_minmax"}

    @property
    def group_size(self) -> int:
        """The block size, which the format fixes."""
        return BLOCK

    @property
    def quantizer(self) -> Nvfp4Quantizer:
        """What chooses the levels that this format stores."""
        return Nvfp4Quantizer()

    def require_fits(self, linear: str, shape: Sequence[int]) -> None:
        """Raise InputError, with the linear and its width, if `shape` [out, in] cannot be packed."""
        if shape[-1] % BLOCK:
            raise InputError(f"NVFP4 needs a multiple of {BLOCK} inputs; {linear} has {shape[-1]}")

    def dequantize(self, q: Nvfp4Weight) -> Tensor:
        """The module's `dequantize`: float32 [out, in]."""
        return dequantize(q)

    def tensors(self, q: Nvfp4Weight) -> dict[str, Tensor]:
        """qweight uint8 [out, in/2], and the scales [out, in/16] once (slim) or in both published types."""
        if self.slim:
            return {"qweight": q.packed, "scales_e4m3": q.scale}
        scale = scale_values(q).cpu().bfloat16()  # cpu: Apple GPUs cannot make float8
        return {"qweight": q.packed, "scales_bf16": scale,
                "scales_fp8": scale.float().to(torch.float8_e4m3fn).view(torch.uint8)}

    def weight(self, tensors: dict[str, Tensor], global_scale: float | None) -> Nvfp4Weight:
        """The packed weight [out, in] of some `tensors`. `scales_fp8` is not read: it repeats `scales_bf16` with less
        precision."""
        if not self.slim:
            return Nvfp4Weight(tensors["qweight"], tensors["scales_bf16"], 1.0)
        assert global_scale is not None, "a slim folder without global scales is refused when it is opened"
        return Nvfp4Weight(tensors["qweight"], tensors["scales_e4m3"], global_scale)

    def specs(self, shape: Sequence[int]) -> dict[str, TensorSpec]:
        """Suffix -> dtype and shape on disk of a weight [out, in]."""
        n_out, n_in = shape
        per_block = (n_out, n_in // BLOCK)
        packed = {"qweight": TensorSpec(torch.uint8, (n_out, n_in // 2))}
        if self.slim:
            return {**packed, "scales_e4m3": TensorSpec(torch.uint8, per_block)}
        return {**packed, "scales_bf16": TensorSpec(torch.bfloat16, per_block),
                "scales_fp8": TensorSpec(torch.uint8, per_block)}

    def entry(self, shape: Sequence[int], scaling: Scaling, global_scale: float | None) -> dict[str, Any]:
        """The published meta fields of one weight; the published recipe has no global scale (None) to name."""
        shared = {} if global_scale is None else {"global_scale": global_scale}
        return {"shape": list(shape), "block_size": BLOCK, "scheme": self.SCHEMES[scaling], **shared}

    def header(self) -> dict[str, Any]:
        """The published meta fields of a file."""
        return {"block_size": BLOCK, "scheme": "nvfp4_e2m1_block_fp8scale",
                "fp4_lut_pos": list(MAGNITUDES), "layout": "slim" if self.slim else "published"}
