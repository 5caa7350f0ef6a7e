"""MLX's 4-bit formats (affine, NVFP4, MXFP4) as quantizers and codecs: what AWQ and GPTQ must know of a format.

The quantizers are those of lance_quant.formats.base, the codec is its TensorCodec. Unlike mlx_codes.quantize, which
repeats MLX, the grids here are the ones that leave the smallest weighted error, with scales (and biases) rounded to
what the file holds before codes are chosen. The formats and sizes are the same. There is no global scale.

Shape suffixes: o out, i in, g group.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from apple import mlx_codes
from apple.mlx_codes import Format
from lance_quant.formats import nvfp4
from lance_quant.formats.base import Grid, Measured, errors_by_definition, measured_by_definition, nearest_levels
from lance_quant.formats.int4 import pack_nibbles

_LEVELS = 15
_MIN_SCALE = 1e-7  # MLX's
_STARTS = (1.0, 0.9, 0.8)  # of the range, from which affine grids are refitted
_REFITS = 3  # rounds of least squares per start


class MlxWeight(NamedTuple):
    """A packed weight.

    packed: uint8 [out, in/2], even column in the low nibble
    scale: [out, groups], as the file holds it
    bias: [out, groups]; None in the floating-point formats
    """

    packed: Tensor
    scale: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class MlxQuantizer(ABC):
    """What the quantizers of all three formats share.

    dtype: of affine scales and biases in the file
    """

    fmt: Format
    dtype: torch.dtype

    @property
    def group_size(self) -> int:
        """Inputs per scale."""
        return self.fmt.group_size

    def runs_in_c(self, w: Tensor) -> bool:
        """Never, for a weight [out, in]: there is no C for these formats."""
        return False

    def global_scale(self, amax: float) -> float:
        """1: nothing is shared between weights."""
        return 1.0

    def quantize(self, w: Tensor, global_scale: float = 1.0) -> MlxWeight:
        """As MLX rounds a weight [out, in] in its file's dtype."""
        parts = mlx_codes.quantize(w.to(self.dtype), self.fmt)
        return MlxWeight(parts["weight"].view(torch.uint8), parts["scales"], parts.get("biases"))

    def fake_quant_io(self, w_io: Tensor, global_scale: float = 1.0) -> Tensor:
        """MLX's rounding of a transposed float32 weight: [in, out] -> [in, out]."""
        return mlx_codes.fake_quant_io(w_io, self.fmt)

    @abstractmethod
    def grid(self, w_io: Tensor, importance: Tensor, global_scale: float = 1.0) -> Grid:
        """Search every group's grid [groups, out] for a float32 weight [in, out] and importance [in]."""

    @abstractmethod
    def nearest(self, w_io: Tensor, grid: Grid) -> Tensor:
        """The nearest level of each value [n, out]; the grid's tensors broadcast against it."""

    @abstractmethod
    def encode(self, values: Tensor, grid: Grid, global_scale: float = 1.0) -> MlxWeight:
        """Pack values [out, in] that are levels of `grid` ([groups, out])."""

    @abstractmethod
    def storable(self, scale: Tensor, global_scale: float = 1.0) -> Tensor:
        """Positive scales [...], rounded to what the file can hold."""

    def round_io(self, w_io: Tensor, grid: Grid, global_scale: float = 1.0) -> tuple[MlxWeight, Tensor]:
        """The nearest levels of a float32 weight [in, out] in its groups' grids: packed, and as float32 [in, out]."""
        values = nearest_levels(self, w_io, grid)
        return self.encode(values.t().contiguous(), grid), values

    def measured(self, w: Tensor, importance: Tensor, global_scale: float = 1.0) -> Measured[MlxWeight]:
        """A weight [out, in] packed with searched grids, for importance [in], and its errors [2, out, groups]."""
        return measured_by_definition(self, w, importance, global_scale)

    def errors(self, w: Tensor, factors: Tensor, weights: Tensor, global_scales: Sequence[float]) -> Tensor:
        """Errors [1 + n, out, groups] of MLX's rounding of a weight [out, in] with columns multiplied [n, in]."""
        return errors_by_definition(self, w, factors, weights, global_scales)


class Affine(MlxQuantizer):
    """code * scale + bias. A Grid's zero is -bias / scale, a float: the bias is what rounding -zero * scale gives."""

    def grid(self, w_io: Tensor, importance: Tensor, global_scale: float = 1.0) -> Grid:
        """Of MLX's own grids, and ranges pulled in and refitted to their codes by least squares, the best of each
        group for squared errors weighted by `importance` [in]."""
        blocks_gio, weight_g1i = w_io.view(-1, self.group_size, w_io.shape[1]), importance.view(-1, 1, self.group_size)
        best: tuple[Tensor, ...] = ()
        for scale, bias, refits in self._starts(blocks_gio):
            for left in reversed(range(refits + 1)):
                code_gio = _codes(blocks_gio, scale, bias)
                away_gio = torch.addcmul(bias, code_gio, scale).sub_(blocks_gio)
                found = (torch.bmm(weight_g1i, away_gio.square_()), scale, bias)
                best = tuple(torch.where(found[0] < best[0], new, old)
                             for new, old in zip(found, best, strict=True)) if best else found
                if left:
                    scale, bias = self._refitted(code_gio, blocks_gio, weight_g1i, scale)
        _, scale, bias = (part.squeeze(1) for part in best)
        return Grid(scale, -bias / scale)

    def _starts(self, blocks_gio: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Scales and biases [g, 1, o], as stored, and how often to refit them."""
        parts = mlx_codes.quantize(blocks_gio.flatten(0, 1).t(), self.fmt)
        scale, bias = (self._stored(parts[name]).t().contiguous()[:, None] for name in ("scales", "biases"))
        yield scale, bias, 0
        low, high = blocks_gio.amin(1, keepdim=True), blocks_gio.amax(1, keepdim=True)
        for start in _STARTS:
            yield self.storable((high - low) / _LEVELS * start), self._stored(low * start), _REFITS

    def _refitted(self, code_gio: Tensor, blocks_gio: Tensor, weight_g1i: Tensor, scale: Tensor
                  ) -> tuple[Tensor, Tensor]:
        """Scale and bias by weighted least squares of the blocks on their codes."""
        weight_g1i = weight_g1i / weight_g1i.sum(2, keepdim=True)
        code_middle, middle = torch.bmm(weight_g1i, code_gio), torch.bmm(weight_g1i, blocks_gio)
        spread = torch.bmm(weight_g1i, code_gio.square()) - code_middle.square()
        slope = (torch.bmm(weight_g1i, code_gio * blocks_gio) - code_middle * middle) / spread
        scale = self.storable(torch.where(spread > 0, slope, scale))  # a group of one code has no slope
        return scale, self._stored(middle - scale * code_middle)

    def _stored(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).float()

    def _bias(self, grid: Grid) -> Tensor:
        assert grid.zero is not None, "an affine grid has a zero"
        return self._stored(-grid.zero * grid.scale)

    def nearest(self, w_io: Tensor, grid: Grid) -> Tensor:
        """The nearest level of each value [n, out]; the grid's tensors broadcast against it."""
        bias = self._bias(grid)
        return _codes(w_io, grid.scale, bias).mul_(grid.scale).add_(bias)

    def storable(self, scale: Tensor, global_scale: float = 1.0) -> Tensor:
        """Scales [...] rounded to the file's dtype, positive."""
        return self._stored(scale.clamp(min=_MIN_SCALE))

    def encode(self, values: Tensor, grid: Grid, global_scale: float = 1.0) -> MlxWeight:
        """Pack values [out, in] near levels of `grid` ([groups, out]): a refitted scale moves the levels, but for the
        rounding of the bias, and that is where they settle."""
        bias = self._bias(grid).t().contiguous()
        blocks_ogi = values.view(*bias.shape, -1)
        code_oi = _codes(blocks_ogi, grid.scale.t()[..., None], bias[..., None]).view(values.shape).byte()
        return MlxWeight(pack_nibbles(code_oi), grid.scale.t().contiguous().to(self.dtype), bias.to(self.dtype))


def _codes(values: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return ((values - bias) / scale).round_().clamp_(0, _LEVELS)


class _Float4(MlxQuantizer):
    """E2M1 times a scale."""

    @abstractmethod
    def _bytes(self, scale: Tensor) -> Tensor:
        """Scales [out, groups] as the file holds them."""

    def nearest(self, w_io: Tensor, grid: Grid) -> Tensor:
        """The nearest level of each value [n, out]; the grid's tensors broadcast against it."""
        return nvfp4.nearest(w_io, grid.scale)

    def encode(self, values: Tensor, grid: Grid, global_scale: float = 1.0) -> MlxWeight:
        """Pack values [out, in] that are levels of `grid` ([groups, out]), exactly."""
        scale = grid.scale.t().contiguous()
        per_block = scale.repeat_interleave(self.group_size // nvfp4.BLOCK, 1)
        return MlxWeight(nvfp4.encode(values, per_block, 1.0).packed, self._bytes(scale), None)


class Nvfp4(_Float4):
    """NVFP4 as MLX has it: without a scale per tensor."""

    def grid(self, w_io: Tensor, importance: Tensor, global_scale: float = 1.0) -> Grid:
        """The scales [blocks, out] of nvfp4.search_scales_io, without a scale per tensor."""
        return Grid(nvfp4.search_scales_io(w_io, 1.0, importance), None)

    def storable(self, scale: Tensor, global_scale: float = 1.0) -> Tensor:
        """Scales [...] rounded to E4M3."""
        return nvfp4.round_e4m3(scale.clamp(nvfp4.MIN_E4M3, nvfp4.E4M3_MAX))

    def _bytes(self, scale: Tensor) -> Tensor:
        return nvfp4.encode_e4m3(scale)


class Mxfp4(_Float4):
    """MXFP4: powers of two, 32 inputs each."""

    def grid(self, w_io: Tensor, importance: Tensor, global_scale: float = 1.0) -> Grid:
        """The power of two that MLX takes or half of it, whichever leaves the smaller error weighted by `importance`
        [in]. Twice of it has no level that MLX's lacks."""
        blocks_gio = w_io.view(-1, self.group_size, w_io.shape[1])
        weight_gi = importance.view(-1, 1, self.group_size)
        largest = blocks_gio.abs().amax(1, keepdim=True) / nvfp4.E2M1_MAX
        plain = _power_of_two(torch.where(largest > 0, largest.log2().ceil(), 0.0))
        half = _power_of_two(plain.log2() - 1)
        errors = [torch.bmm(weight_gi, nvfp4.nearest(blocks_gio, scale).sub_(blocks_gio).square_())
                  for scale in (plain, half)]
        return Grid(torch.where(errors[1] < errors[0], half, plain).squeeze(1), None)

    def storable(self, scale: Tensor, global_scale: float = 1.0) -> Tensor:
        """Scales [...] rounded to a power of two."""
        return _power_of_two(scale.log2().round())

    def _bytes(self, scale: Tensor) -> Tensor:
        return (scale.log2() + 127).byte()


def _power_of_two(exponent: Tensor) -> Tensor:
    return torch.exp2(exponent.clamp(-126, 127))  # what a float32 is exact for


QUANTIZERS: dict[str, type[MlxQuantizer]] = {"affine": Affine, "nvfp4": Nvfp4, "mxfp4": Mxfp4}


@dataclass(frozen=True)
class MlxCodec:
    """How a packed weight lies in an MLX file.

    dtype: of the file's norms, and of affine scales and biases
    """

    fmt: Format
    dtype: torch.dtype

    @property
    def group_size(self) -> int:
        """Inputs per scale."""
        return self.fmt.group_size

    @property
    def quantizer(self) -> MlxQuantizer:
        """What chooses the levels that this format stores."""
        return QUANTIZERS[self.fmt.mode](self.fmt, self.dtype)

    def dequantize(self, q: MlxWeight) -> Tensor:
        """packed -> float32 [out, in]."""
        return mlx_codes.dequantize(self.tensors(q), self.fmt)

    def tensors(self, q: MlxWeight) -> dict[str, Tensor]:
        """weight uint32 [out, in/8], scales and, of affine weights, biases [out, groups]."""
        rest = {} if q.bias is None else {"biases": q.bias}
        return {"weight": q.packed.contiguous().view(torch.uint32), "scales": q.scale, **rest}
