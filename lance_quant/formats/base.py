"""The one place where the two formats meet: what a quantizer, a file and a reader must know of each.

A `Codec` turns float weights into packed ones and back, names the tensors and the meta fields of a packed file, and
plans them from a shape alone. Everything above (search, conversion, folders) is written once, against the protocol.

Shape suffixes: o out, i in.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from lance_quant.cpu import rounding
from lance_quant.cpu.weighted_sums import totals, weighted_squares
from lance_quant.errors import InputError
from lance_quant.formats import int4, nvfp4
from lance_quant.formats.int4 import Int4Weight
from lance_quant.formats.nvfp4 import Nvfp4Weight
from lance_quant.storage.tensor_file import TensorSpec

PackedWeight = Int4Weight | Nvfp4Weight
# searched: scaled into what precedes it; unsearched: it could be, but there are no statistics; plain: the published
# recipe does not scale it.
Kind = Literal["searched", "unsearched", "plain"]


class Grid(NamedTuple):
    """The levels that the groups of a weight may take; inputs come first, as in fake_quant_io.

    step: float32 [groups, out], what a code is multiplied by, exact in its stored type
    zero: float32 [groups, out], the code of 0; None where the format has none
    """

    step: Tensor
    zero: Tensor | None

    def at(self, group: int | Tensor) -> "Grid":
        """One group's grid [out], or several groups' [n, out]."""
        return Grid(self.step[group], None if self.zero is None else self.zero[group])


class Measured(NamedTuple):
    """A packed weight, and float32 [2, out, groups]: the sums of its weighted squares and weighted squared errors."""

    q: PackedWeight
    sums: Tensor


class Codec(Protocol):
    """A 4-bit format. Frozen, cheap, without tensors."""

    name: str
    state_file: str
    meta_file: str
    SCHEMES: dict[Kind, str]  # what the meta calls them

    @property
    def group_size(self) -> int:
        """Inputs per scale."""

    def runs_in_c(self, w: Tensor) -> bool:
        """Whether `measured` and `errors` of a weight [out, in] run in C, see rounding.py."""

    def require_fits(self, linear: str, shape: Sequence[int]) -> None:
        """Raise InputError, with the linear and the sizes that would work, if `shape` [out, in] cannot be packed."""

    def context(self, amax: float) -> float | None:
        """What the linears of one group share, from the largest |weight| among them; None if nothing."""

    def quantize(self, w: Tensor, context: float | None) -> PackedWeight:
        """float [out, in] -> packed. ValueError for NaN and Inf."""

    def dequantize(self, q: PackedWeight) -> Tensor:
        """packed -> float32 [out, in]."""

    def fake_quant_io(self, w_io: Tensor, context: float | None) -> Tensor:
        """dequantize(quantize(w)) of a transposed float32 weight [in, out], equal to the bit."""

    def grid(self, w_io: Tensor, importance: Tensor, context: float | None) -> Grid:
        """Search every group's grid for a float32 weight [in, out], squared errors weighted by importance [in]."""

    def nearest(self, w_io: Tensor, grid: Grid) -> Tensor:
        """The nearest level of each value [n, out]; the grid's tensors broadcast against it."""

    def round_io(self, w_io: Tensor, grid: Grid, context: float | None) -> tuple[PackedWeight, Tensor]:
        """The nearest levels of a float32 weight [in, out] in its groups' grids: packed, and as float32 [in, out]."""

    def measured(self, w: Tensor, importance: Tensor, context: float | None) -> Measured:
        """`grid` and `round_io` of a float32 weight [out, in], see measured_by_definition."""

    def errors(self, w: Tensor, factors: Tensor, weights: Tensor, contexts: Sequence[float | None]) -> Tensor:
        """What `fake_quant_io` changes in a float32 weight [out, in], see errors_by_definition."""

    def storable(self, step: Tensor, context: float | None) -> Tensor:
        """Positive steps, float32, rounded to what a file can hold."""

    def encode(self, values: Tensor, grid: Grid, context: float | None) -> PackedWeight:
        """Pack values [out, in] that are levels of `grid` ([groups, out]), exactly."""

    def tensors(self, q: PackedWeight) -> dict[str, Tensor]:
        """What a packed weight is on disk: suffix -> tensor."""

    def weight(self, tensors: dict[str, Tensor], entry: dict[str, Any]) -> PackedWeight:
        """The inverse of `tensors`, with the meta entry of the weight."""

    def specs(self, shape: Sequence[int]) -> dict[str, TensorSpec]:
        """Suffix -> dtype and shape on disk of a weight [out, in]."""

    def entry(self, shape: Sequence[int], kind: Kind, context: float | None) -> dict[str, Any]:
        """The published meta fields of one weight."""

    def header(self) -> dict[str, Any]:
        """The published meta fields of a file."""


@dataclass(frozen=True)
class Int4:
    """Asymmetric 4-bit integers, one scale and zero point per `group_size` inputs."""

    group_size: int = 64
    name: ClassVar[str] = "int4"
    state_file: ClassVar[str] = "awq_state_dict.safetensors"
    meta_file: ClassVar[str] = "awq_meta.json"

    SCHEMES: ClassVar[dict[Kind, str]] = {"searched": "asym_int4_grouped_awq",
                                          "unsearched": "asym_int4_grouped_no_awq",
                                          "plain": "asym_int4_grouped_minmax"}

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise InputError(f"group size {self.group_size} is not positive")

    def runs_in_c(self, w: Tensor) -> bool:
        """See Codec."""
        return rounding.serves(w, self.group_size)

    def require_fits(self, linear: str, shape: Sequence[int]) -> None:
        """See Codec."""
        width = shape[-1]
        if width % 2 or width % self.group_size:
            fitting = [size for size in (16, 32, 64, 128, 256) if width % size == 0]
            raise InputError(f"group size {self.group_size} does not divide the {width} inputs of {linear}; "
                             f"sizes that work there: {', '.join(map(str, fitting)) or f'none but {width}'}")

    def context(self, amax: float) -> None:
        """Nothing is shared."""

    def quantize(self, w: Tensor, context: None = None) -> Int4Weight:
        """See int4.quantize."""
        if not rounding.serves(w, self.group_size):
            return int4.quantize(w, self.group_size)
        found = rounding.quantize_int4(w, self.group_size)
        return Int4Weight(found.packed, found.scale, found.zero)

    def dequantize(self, q: Int4Weight) -> Tensor:
        """See int4.dequantize."""
        return int4.dequantize(q)

    def fake_quant_io(self, w_io: Tensor, context: None = None) -> Tensor:
        """See int4.fake_quant_io."""
        return int4.fake_quant_io(w_io, self.group_size)

    def grid(self, w_io: Tensor, importance: Tensor, context: None = None) -> Grid:
        """See int4.search_grid_io."""
        if not rounding.serves(w_io.t(), self.group_size):
            scale, zero = int4.search_grid_io(w_io, self.group_size, importance)
            return Grid(scale.float(), zero)
        found = rounding.quantize_int4(w_io.t(), self.group_size, importance, int4.ROUNDS, pack=False)
        return Grid(found.scale.t().float().contiguous(), found.zero.t().float().contiguous())

    def nearest(self, w_io: Tensor, grid: Grid) -> Tensor:
        """See int4.nearest."""
        return int4.nearest(w_io, grid.step, grid.zero)

    def round_io(self, w_io: Tensor, grid: Grid, context: None = None) -> tuple[Int4Weight, Tensor]:
        """See int4.round_io."""
        return int4.round_io(w_io, grid.step, grid.zero)

    def measured(self, w: Tensor, importance: Tensor, context: None = None) -> Measured:
        """See Codec."""
        if not rounding.serves(w, self.group_size):
            return measured_by_definition(self, w, importance, context)
        found = rounding.quantize_int4(w, self.group_size, importance, int4.ROUNDS)
        return Measured(Int4Weight(found.packed, found.scale, found.zero), found.sums)

    def errors(self, w: Tensor, factors: Tensor, weights: Tensor, contexts: Sequence[None]) -> Tensor:
        """See Codec."""
        if not rounding.serves(w, self.group_size):
            return errors_by_definition(self, w, factors, weights, contexts)
        return rounding.errors_int4(w, self.group_size, factors, weights)

    def storable(self, step: Tensor, context: None = None) -> Tensor:
        """Rounded to bfloat16."""
        return step.clamp(min=int4.MIN_SCALE).bfloat16().float()

    def encode(self, values: Tensor, grid: Grid, context: None = None) -> Int4Weight:
        """See int4.encode."""
        return int4.encode(values, grid.step.t().contiguous(), grid.zero.t().contiguous())

    def tensors(self, q: Int4Weight) -> dict[str, Tensor]:
        """See Codec."""
        return {"qweight": q.packed, "scales": q.scale, "zeros": q.zero}

    def weight(self, tensors: dict[str, Tensor], entry: dict[str, Any]) -> Int4Weight:
        """See Codec."""
        return Int4Weight(tensors["qweight"], tensors["scales"], tensors["zeros"])

    def specs(self, shape: Sequence[int]) -> dict[str, TensorSpec]:
        """See Codec."""
        n_out, n_in = shape
        per_group = (n_out, n_in // self.group_size)
        return {"qweight": TensorSpec(torch.uint8, (n_out, n_in // 2)),
                "scales": TensorSpec(torch.bfloat16, per_group), "zeros": TensorSpec(torch.uint8, per_group)}

    def entry(self, shape: Sequence[int], kind: Kind, context: None = None) -> dict[str, Any]:
        """See Codec."""
        return {"shape": list(shape), "n_bit": 4, "group_size": self.group_size, "scheme": self.SCHEMES[kind]}

    def header(self) -> dict[str, Any]:
        """See Codec."""
        return {"n_bit": 4, "group_size": self.group_size, "scheme": self.SCHEMES["searched"]}


@dataclass(frozen=True)
class Nvfp4:
    """Two-level NVFP4.

    slim: store the E4M3 bytes only (4.5 bits per weight) instead of the published pair of scale tensors (5.5), of which
        readers use the bfloat16 one. The values are the same.
    """

    slim: bool = False
    name: ClassVar[str] = "nvfp4"
    state_file: ClassVar[str] = "nvfp4_state_dict.safetensors"
    meta_file: ClassVar[str] = "nvfp4_meta.json"

    SCHEMES: ClassVar[dict[Kind, str]] = {"searched": "nvfp4_awq", "unsearched": "nvfp4_minmax",
                                          "plain": "nvfp4_minmax"}

    @property
    def group_size(self) -> int:
        """The block size, which the format fixes."""
        return nvfp4.BLOCK

    def runs_in_c(self, w: Tensor) -> bool:
        """See Codec."""
        return rounding.serves(w, nvfp4.BLOCK)

    def require_fits(self, linear: str, shape: Sequence[int]) -> None:
        """See Codec."""
        if shape[-1] % nvfp4.BLOCK:
            raise InputError(f"NVFP4 needs a multiple of {nvfp4.BLOCK} inputs; {linear} has {shape[-1]}")

    def context(self, amax: float) -> float:
        """The group's power of two."""
        return nvfp4.global_scale_for(amax)

    def quantize(self, w: Tensor, context: float | None) -> Nvfp4Weight:
        """See nvfp4.quantize."""
        if context is None or not rounding.serves(w, nvfp4.BLOCK):
            return nvfp4.quantize(w, context)
        found = rounding.quantize_nvfp4(w, nvfp4.BLOCK, context)
        return Nvfp4Weight(found.packed, found.scale, context)

    def dequantize(self, q: Nvfp4Weight) -> Tensor:
        """See nvfp4.dequantize."""
        return nvfp4.dequantize(q)

    def fake_quant_io(self, w_io: Tensor, context: float) -> Tensor:
        """See nvfp4.fake_quant_io."""
        return nvfp4.fake_quant_io(w_io, context)

    def grid(self, w_io: Tensor, importance: Tensor, context: float) -> Grid:
        """See nvfp4.search_scales_io."""
        if not rounding.serves(w_io.t(), nvfp4.BLOCK):
            return Grid(nvfp4.search_scales_io(w_io, context, importance), None)
        found = rounding.quantize_nvfp4(w_io.t(), nvfp4.BLOCK, context, importance, nvfp4.SCALE_STEPS, pack=False)
        return Grid(nvfp4.decode_e4m3(found.scale.t().contiguous()).mul_(context), None)

    def nearest(self, w_io: Tensor, grid: Grid) -> Tensor:
        """See nvfp4.nearest."""
        return nvfp4.nearest(w_io, grid.step)

    def round_io(self, w_io: Tensor, grid: Grid, context: float) -> tuple[Nvfp4Weight, Tensor]:
        """See nvfp4.round_io."""
        return nvfp4.round_io(w_io, grid.step, context)

    def measured(self, w: Tensor, importance: Tensor, context: float) -> Measured:
        """See Codec."""
        if not rounding.serves(w, nvfp4.BLOCK):
            return measured_by_definition(self, w, importance, context)
        found = rounding.quantize_nvfp4(w, nvfp4.BLOCK, context, importance, nvfp4.SCALE_STEPS)
        return Measured(Nvfp4Weight(found.packed, found.scale, context), found.sums)

    def errors(self, w: Tensor, factors: Tensor, weights: Tensor, contexts: Sequence[float]) -> Tensor:
        """See Codec."""
        if not rounding.serves(w, nvfp4.BLOCK):
            return errors_by_definition(self, w, factors, weights, contexts)
        return rounding.errors_nvfp4(w, nvfp4.BLOCK, factors, weights, contexts)

    def storable(self, step: Tensor, context: float) -> Tensor:
        """Rounded to E4M3 times the global scale."""
        return nvfp4.round_e4m3((step / context).clamp(nvfp4.MIN_E4M3, nvfp4.E4M3_MAX)) * context

    def encode(self, values: Tensor, grid: Grid, context: float) -> Nvfp4Weight:
        """See nvfp4.encode."""
        return nvfp4.encode(values, grid.step.t().contiguous(), context)

    def tensors(self, q: Nvfp4Weight) -> dict[str, Tensor]:
        """See Codec."""
        if self.slim:
            return {"qweight": q.packed, "scales_e4m3": q.scale}
        scale = nvfp4.scale_values(q).cpu().bfloat16()  # cpu: Apple GPUs cannot make float8
        return {"qweight": q.packed, "scales_bf16": scale,
                "scales_fp8": scale.float().to(torch.float8_e4m3fn).view(torch.uint8)}

    def weight(self, tensors: dict[str, Tensor], entry: dict[str, Any]) -> Nvfp4Weight:
        """See Codec. `scales_fp8` is not read: it repeats `scales_bf16` with less precision."""
        if self.slim:
            return Nvfp4Weight(tensors["qweight"], tensors["scales_e4m3"], entry["global_scale"])
        return Nvfp4Weight(tensors["qweight"], tensors["scales_bf16"], 1.0)

    def specs(self, shape: Sequence[int]) -> dict[str, TensorSpec]:
        """See Codec."""
        n_out, n_in = shape
        per_block = (n_out, n_in // nvfp4.BLOCK)
        packed = {"qweight": TensorSpec(torch.uint8, (n_out, n_in // 2))}
        if self.slim:
            return {**packed, "scales_e4m3": TensorSpec(torch.uint8, per_block)}
        return {**packed, "scales_bf16": TensorSpec(torch.bfloat16, per_block),
                "scales_fp8": TensorSpec(torch.uint8, per_block)}

    def entry(self, shape: Sequence[int], kind: Kind, context: float | None = None) -> dict[str, Any]:
        """See Codec; without a context (published recipe) there is no global scale to name."""
        shared = {} if context is None else {"global_scale": context}
        return {"shape": list(shape), "block_size": nvfp4.BLOCK, "scheme": self.SCHEMES[kind], **shared}

    def header(self) -> dict[str, Any]:
        """See Codec."""
        return {"block_size": nvfp4.BLOCK, "scheme": "nvfp4_e2m1_block_fp8scale",
                "fp4_lut_pos": list(nvfp4.MAGNITUDES), "layout": "slim" if self.slim else "published"}


class Block(NamedTuple):
    """A piece of one weight [out, in] of a group."""

    index: int  # which weight
    rows: slice
    columns: slice


# Weights in a block, whose temporaries stay in the cache that cores share (CPU) or small (GPU). In PyTorch a quarter of
# that is as fast on one thread, but threads then wait for the interpreter between operations: 12 s for a layer on four
# of them where these take 5. The C functions run without the interpreter, on half of it.
_CPU_BLOCK, _GPU_BLOCK = 1 << 20, 1 << 24
_CPU_ROWS = 512  # the innermost axis of a transposed block: long enough for vectorized loops


def row_slices(shape: Sequence[int], device: torch.device) -> list[slice]:
    """Cut a weight [out, in] into rows whose temporaries stay in a core's cache (CPU) or small (GPU)."""
    step = max(1, (_CPU_BLOCK // 2 if device.type == "cpu" else _GPU_BLOCK) // shape[1])
    return [slice(row, row + step) for row in range(0, shape[0], step)]


def blocks(weights: Sequence[Tensor], group_size: int | None = None) -> list[Block]:
    """Cut the weights [out, in] of a group into blocks, in order.

    Args:
        group_size: columns may be cut between groups of so many; None: blocks are whole rows.
    """
    return [Block(index, rows, columns) for index, w in enumerate(weights)
            for rows, columns in _cuts(w.shape, w.device, group_size)]


def _cuts(shape: Sequence[int], device: torch.device, group_size: int | None) -> Iterator[tuple[slice, slice]]:
    if group_size is None or device.type != "cpu":
        yield from ((rows, slice(None)) for rows in row_slices(shape, device))
        return
    width = max(1, _CPU_BLOCK // _CPU_ROWS // group_size) * group_size
    for row in range(0, shape[0], _CPU_ROWS):
        yield from ((slice(row, row + _CPU_ROWS), slice(column, column + width))
                    for column in range(0, shape[1], width))


def column_cut(codec: Codec, weights: Sequence[Tensor]) -> int | None:
    """How `blocks` and `map_blocks` are to cut the weights of a group: the C functions take rows as they are, PyTorch
    needs a long innermost axis, that of the outputs."""
    return None if codec.runs_in_c(weights[0]) else codec.group_size


def map_blocks(function: Callable[[Block], Any], weights: Sequence[Tensor], group_size: int | None = None) -> list[Any]:
    """Call `function` on every block, in order; on the CPU with single-threaded workers, torch.get_num_threads() many.

    Blocks that fit a cache are too short for torch's own threads: at each operation they would wait for one another
    (measured on a loaded 4-core machine: 242 s instead of 1.3 s for one MLP group). What a block gives does not depend
    on the number of workers.
    """
    cut = blocks(weights, group_size)
    return map_threads(function, cut) if weights[0].device.type == "cpu" else [function(block) for block in cut]


def map_threads(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """Call `function` on every item, in order, with single-threaded workers, torch.get_num_threads() many."""
    with block_threads() as workers:
        if workers == 1 or len(items) == 1:
            return [function(item) for item in items]
        # Said in every thread: bmm goes by the thread's own OpenMP setting, not by the process's.
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, items))


_workers: int | None = None  # of map_blocks, inside block_threads


@contextmanager
def block_threads() -> Iterator[int]:
    """Inside, torch's own operations take one thread, and map_blocks as many workers as they took threads before.

    A layer is hundreds of short operations between blocks, and after each of them torch's threads wait for one another:
    on a loaded 4-core machine a layer took 33 CPU-seconds that way, and 5 with one thread.
    """
    global _workers
    outer, before = _workers, torch.get_num_threads()
    _workers = outer or before
    torch.set_num_threads(1)
    try:
        yield _workers
    finally:
        torch.set_num_threads(before)
        _workers = outer


def quantize_scaled(codec: Codec, weights: Sequence[Tensor], scale: Tensor | None,
                    context: float | None) -> list[PackedWeight]:
    """Pack the weights [out, in] of a group, columns multiplied by `scale` [in] (None: as they are)."""

    def quantize(block: Block) -> PackedWeight:
        w = weights[block.index][block.rows, block.columns]
        return codec.quantize(w if scale is None else w * scale[block.columns], context)

    cut = column_cut(codec, weights)
    return _joined(blocks(weights, cut), map_blocks(quantize, weights, cut))


def quantize_searched(codec: Codec, weights: Sequence[Tensor], importance: Tensor,
                      context: float | None) -> list[PackedWeight]:
    """Pack the weights [out, in] of a group with grids searched for inputs of some importance [in]."""
    return quantize_measured(codec, weights, importance, context)[0]


def quantize_measured(codec: Codec, weights: Sequence[Tensor], importance: Tensor,
                      context: float | None) -> tuple[list[PackedWeight], list[float]]:
    """As quantize_searched, and with each weight's squared error relative to its square, both weighted."""

    def quantize(block: Block) -> Measured:
        return codec.measured(weights[block.index][block.rows, block.columns], importance[block.columns], context)

    cut = column_cut(codec, weights)
    found = map_blocks(quantize, weights, cut)
    errors = [error for (error,) in relative_totals(weights, cut, [part.sums for part in found])]
    return _joined(blocks(weights, cut), [part.q for part in found]), errors


def measured_by_definition(codec: Codec, w: Tensor, importance: Tensor, context: float | None) -> Measured:
    """What Codec.measured gives: the searched grid, its nearest levels, and how far they are off.

    Args:
        w: float32 [out, in], finite.
        importance: float32 [in], weight of a squared error in each column.
    """
    w_io, weight_gi = _transposed(w), importance.reshape(-1, codec.group_size)
    q, back_io = codec.round_io(w_io, codec.grid(w_io, importance, context), context)
    errors = weighted_squares(back_io.sub_(w_io).view(*weight_gi.shape, -1), weight_gi)
    signals = weighted_squares(w_io.view(*weight_gi.shape, -1), weight_gi)
    return Measured(q, torch.stack([signals, errors]).transpose(1, 2))


def errors_by_definition(codec: Codec, w: Tensor, factors: Tensor, weights: Tensor,
                         contexts: Sequence[float | None]) -> Tensor:
    """What Codec.errors gives: how much plain rounding changes in a weight whose columns are multiplied by a factor.

    Args:
        w: float32 [out, in], finite.
        factors: float32 [n, in].
        weights: float32 [1 + n, in], of squares in `w` itself, and of squared errors with each factor.
        contexts: see Codec, one per factor.

    Returns:
        float32 [1 + n, out, groups]: weighted squares of `w` by group, then weighted squared errors.
    """
    w_io, weights_ngi = _transposed(w), weights.reshape(len(weights), -1, codec.group_size)
    found = []
    for factor, context, weight_gi in zip(factors, contexts, weights_ngi[1:], strict=True):
        scaled_io = w_io * factor[:, None]
        off_io = codec.fake_quant_io(scaled_io, context).sub_(scaled_io)
        found.append(weighted_squares(off_io.view(*weight_gi.shape, -1), weight_gi))
    signals = weighted_squares(w_io.view(*weights_ngi.shape[1:], -1), weights_ngi[0])
    return torch.stack([signals, *found]).transpose(1, 2)


def _transposed(w: Tensor) -> Tensor:
    """A copy, which may be overwritten; `contiguous` makes none of a single output."""
    return w.t().clone(memory_format=torch.contiguous_format)


def relative_totals(weights: Sequence[Tensor], cut: int | None, found: Sequence[Tensor]) -> list[tuple[float, ...]]:
    """For each weight the totals of n kinds of error, relative to that of its squares; an all-zero weight has none.

    Args:
        cut: as in `blocks`.
        found: float32 [1 + n, rows, groups] of each block: sums of weighted squares, then of the n errors.
    """
    rows: dict[tuple[int, int], list[Tensor]] = {}
    for block, part in zip(blocks(weights, cut), found, strict=True):
        rows.setdefault((block.index, block.rows.start), []).append(part)
    by_weight: list[list[Tensor]] = [[] for _ in weights]
    for (index, _), parts in rows.items():
        by_weight[index].append(torch.cat(parts, 2) if len(parts) > 1 else parts[0])
    return [tuple(error / signal if signal > 0 else 0.0 for error in errors)
            for signal, *errors in map(totals, by_weight)]


def nearest_levels(codec: Codec, w_io: Tensor, grid: Grid) -> Tensor:
    """The nearest level of every weight [in, out] in its group's grid."""
    blocks_gio = w_io.view(grid.step.shape[0], -1, w_io.shape[1])
    zero = None if grid.zero is None else grid.zero[:, None]
    return codec.nearest(blocks_gio, Grid(grid.step[:, None], zero)).view(w_io.shape)


def _joined(cut: Sequence[Block], parts: Sequence[PackedWeight]) -> list[PackedWeight]:
    """The weights of a group from their blocks."""
    across: dict[tuple[int, int], list[PackedWeight]] = {}
    for block, part in zip(cut, parts, strict=True):
        across.setdefault((block.index, block.rows.start), []).append(part)
    down: dict[int, list[PackedWeight]] = {}
    for (index, _), row in across.items():
        down.setdefault(index, []).append(_concatenated(row, 1))
    return [_concatenated(rows, 0) for rows in down.values()]


def _concatenated(parts: Sequence[PackedWeight], dim: int) -> PackedWeight:
    if len(parts) == 1:
        return parts[0]
    fields = [torch.cat(field, dim) if isinstance(field[0], Tensor) else field[0] for field in zip(*parts, strict=True)]
    return type(parts[0])(*fields)


def dequantize_to(codec: Codec, q: PackedWeight, dtype: torch.dtype) -> Tensor:
    """`codec.dequantize(q)` in another dtype, [out, in], a few rows at a time: float32 never exists whole."""
    shape = (q.packed.shape[0], q.packed.shape[1] * 2)
    out = torch.empty(shape, dtype=dtype, device=q.packed.device)
    for rows in row_slices(shape, q.packed.device):
        part = type(q)(*(field[rows] if isinstance(field, Tensor) else field for field in q))
        out[rows] = codec.dequantize(part)
    return out
