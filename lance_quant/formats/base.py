"""Weight-only post-training quantization, its two halves: a quantizer chooses levels, a codec stores them.

A `Quantizer` is the numeric half: it searches the grid of every group, rounds to it and measures the error. AWQ and
GPTQ are written once, against it. A `Codec` is the storage format: which tensors and meta fields stand for a packed
weight, and which values its bytes mean; readers, kernels and planners need nothing else. Each format has one of either
(int4.py, nvfp4.py), frozen, cheap and without tensors.

Shape suffixes: o out, i in, g group, n number of candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from lance_quant.cpu.weighted_sums import weighted_squares
from lance_quant.storage.tensor_file import TensorSpec

Packed = TypeVar("Packed", bound=tuple[Any, ...])  # a format's packed weight, a NamedTuple of tensors
# Whether an AWQ scale was moved into what precedes a linear. searched: yes; unsearched: it could have been, but there
# are no statistics; plain: the published recipe does not scale this linear.
Scaling = Literal["searched", "unsearched", "plain"]


class Grid(NamedTuple):
    """The levels that the groups of a weight may take; inputs come first, as in `Quantizer.fake_quant_io`.

    scale: float32 [groups, out], what a code is multiplied by, exact in its stored type
    zero: float32 [groups, out], the code of 0; None where the format has none
    """

    scale: Tensor
    zero: Tensor | None

    def at(self, group: int | slice | Tensor) -> "Grid":
        """One group's grid [out], or that of several groups [n, out]."""
        return Grid(self.scale[group], None if self.zero is None else self.zero[group])


@dataclass(frozen=True)
class Measured(Generic[Packed]):
    """A packed weight and how far it is off.

    q: the packed weight
    sums: float32 [2, out, groups], weighted squares of the weight, and of the errors
    """

    q: Packed
    sums: Tensor


class Quantizer(Protocol[Packed]):
    """Grids, rounding and errors of a format. A weight is float32; `_io` marks inputs first.

    A `global_scale` is what the linears of one group share (NVFP4's scale per tensor); a format without one takes 1.
    """

    @property
    def group_size(self) -> int:
        """Inputs per scale."""

    def runs_in_c(self, w: Tensor) -> bool:
        """Whether `measured` and `errors` of a weight [out, in] run in C (cpu/rounding.py), to the same bits."""

    def global_scale(self, amax: float) -> float:
        """The global scale of linears whose largest |weight| is `amax`."""

    def quantize(self, w: Tensor, global_scale: float) -> Packed:
        """Round a float weight [out, in] to nearest, without a search. ValueError for NaN and Inf."""

    def fake_quant_io(self, w_io: Tensor, global_scale: float) -> Tensor:
        """Quantize and dequantize a transposed weight [in, out], equal to the bit to doing both."""

    def grid(self, w_io: Tensor, importance: Tensor, global_scale: float) -> Grid:
        """Search every group's grid for a weight [in, out], squared errors weighted by importance [in]."""

    def nearest(self, w_io: Tensor, grid: Grid) -> Tensor:
        """The nearest level of each value [n, out]; the grid's tensors broadcast against it."""

    def round_io(self, w_io: Tensor, grid: Grid, global_scale: float) -> tuple[Packed, Tensor]:
        """The nearest levels of a weight [in, out] in its groups' grids: packed, and as float32 [in, out]."""

    def measured(self, w: Tensor, importance: Tensor, global_scale: float) -> Measured[Packed]:
        """`grid` and `round_io` of a weight [out, in] in one pass; `measured_by_definition` says what that gives."""

    def errors(self, w: Tensor, factors: Tensor, weights: Tensor, global_scales: Sequence[float]) -> Tensor:
        """What `fake_quant_io` changes in a weight [out, in]; `errors_by_definition` says what that gives."""

    def storable(self, scale: Tensor, global_scale: float) -> Tensor:
        """Positive scales, float32 [...], rounded to what a file can hold."""

    def encode(self, values: Tensor, grid: Grid, global_scale: float) -> Packed:
        """Pack values [out, in] that are levels of `grid` ([groups, out]), exactly."""


class TensorCodec(Protocol[Packed]):
    """How a packed weight lies in a file: all that a recipe must know of a storage format."""

    @property
    def group_size(self) -> int:
        """Inputs per scale."""

    @property
    def quantizer(self) -> Quantizer[Packed]:
        """What chooses the levels that this format stores."""

    def dequantize(self, q: Packed) -> Tensor:
        """packed -> float32 [out, in]: what the bytes mean."""

    def tensors(self, q: Packed) -> dict[str, Tensor]:
        """What a packed weight [out, in] is on disk: suffix -> tensor."""


class Codec(TensorCodec[Packed], Protocol[Packed]):
    """A storage format of packed folders (packed_folder.py): file names, tensors, meta fields, sizes from shapes."""

    @property
    def name(self) -> str:
        """Short: int4 or nvfp4."""

    @property
    def state_file(self) -> str:
        """Name of the tensor file in a packed folder."""

    @property
    def meta_file(self) -> str:
        """Name of the meta JSON in a packed folder."""

    def require_fits(self, linear: str, shape: Sequence[int]) -> None:
        """Raise InputError, with the linear and the sizes that would work, if `shape` [out, in] cannot be packed."""

    def weight(self, tensors: dict[str, Tensor], global_scale: float | None) -> Packed:
        """The packed weight [out, in] of some `tensors`, and of the global scale that the meta has for it."""

    def specs(self, shape: Sequence[int]) -> dict[str, TensorSpec]:
        """Suffix -> dtype and shape on disk of a weight [out, in]."""

    def entry(self, shape: Sequence[int], scaling: Scaling, global_scale: float | None) -> dict[str, Any]:
        """The published meta fields of one weight; a file of the published recipe has no global scales (None)."""

    def header(self) -> dict[str, Any]:
        """The published meta fields of a file."""


def measured_by_definition(quantizer: Quantizer[Packed], w: Tensor, importance: Tensor,
                           global_scale: float) -> Measured[Packed]:
    """What Quantizer.measured gives: the searched grid, its nearest levels, and how far they are off.

    Args:
        w: float32 [out, in], finite.
        importance: float32 [in], weight of a squared error in each column.
    """
    w_io, weight_gi = _transposed(w), importance.reshape(-1, quantizer.group_size)
    q, back_io = quantizer.round_io(w_io, quantizer.grid(w_io, importance, global_scale), global_scale)
    errors = weighted_squares(back_io.sub_(w_io).view(*weight_gi.shape, -1), weight_gi)
    signals = weighted_squares(w_io.view(*weight_gi.shape, -1), weight_gi)
    return Measured(q, torch.stack([signals, errors]).transpose(1, 2))


def errors_by_definition(quantizer: Quantizer, w: Tensor, factors: Tensor, weights: Tensor,
                         global_scales: Sequence[float]) -> Tensor:
    """What Quantizer.errors gives: how much rounding to nearest changes in a weight whose columns are multiplied.

    Args:
        w: float32 [out, in], finite.
        factors: float32 [n, in] of the columns.
        weights: float32 [1 + n, in], of squares in `w` itself, and of squared errors with each factor.
        global_scales: one per factor.

    Returns:
        float32 [1 + n, out, groups]: weighted squares of `w` by group, then weighted squared errors.
    """
    w_io, weights_ngi = _transposed(w), weights.reshape(len(weights), -1, quantizer.group_size)
    found = []
    for factor, global_scale, weight_gi in zip(factors, global_scales, weights_ngi[1:], strict=True):
        scaled_io = w_io * factor[:, None]
        off_io = quantizer.fake_quant_io(scaled_io, global_scale).sub_(scaled_io)
        found.append(weighted_squares(off_io.view(*weight_gi.shape, -1), weight_gi))
    signals = weighted_squares(w_io.view(*weights_ngi.shape[1:], -1), weights_ngi[0])
    return torch.stack([signals, *found]).transpose(1, 2)


def _transposed(w: Tensor) -> Tensor:
    """A copy, which may be overwritten; `contiguous` makes none of a single output."""
    return w.t().clone(memory_format=torch.contiguous_format)


def nearest_levels(quantizer: Quantizer, w_io: Tensor, grid: Grid) -> Tensor:
    """The nearest level of every weight: float32 [in, out] and its groups' grids [groups, out] -> [in, out]."""
    blocks_gio = w_io.view(grid.scale.shape[0], -1, w_io.shape[1])
    zero = None if grid.zero is None else grid.zero[:, None]
    return quantizer.nearest(blocks_gio, Grid(grid.scale[:, None], zero)).view(w_io.shape)
