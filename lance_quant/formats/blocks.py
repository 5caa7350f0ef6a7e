"""Cache blocking: weights are searched, packed and unpacked in pieces, by single-threaded workers.

The pieces of a layer are too short for torch's own threads, which would wait for one another after every operation
(`map_blocks`, cpu/threads.py: measurements). What comes out does not depend on how a weight is cut, nor on the number
of workers.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lance_quant.cpu.threads import Found, map_threads
from lance_quant.cpu.weighted_sums import totals
from lance_quant.formats.base import Measured, Packed, Quantizer, TensorCodec


class Block(NamedTuple):
    """A piece of one weight [out, in] of a group.

    weight: which of them
    """

    weight: int
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


def column_cut(quantizer: Quantizer, weights: Sequence[Tensor]) -> int | None:
    """How `blocks` and `map_blocks` are to cut the weights [out, in] of a group: the C functions take rows as they are,
    PyTorch needs a long innermost axis, that of the outputs."""
    return None if quantizer.runs_in_c(weights[0]) else quantizer.group_size


def map_blocks(function: Callable[[Block], Found], weights: Sequence[Tensor],
               group_size: int | None = None) -> list[Found]:
    """Call `function` on every block of some weights [out, in], in order; on the CPU with single-threaded workers,
    torch.get_num_threads() many.

    Blocks that fit a cache are too short for torch's own threads: at each operation they would wait for one another
    (measured on a loaded 4-core machine: 242 s instead of 1.3 s for one MLP group). What a block gives does not depend
    on the number of workers.
    """
    cut = blocks(weights, group_size)
    return map_threads(function, cut) if weights[0].device.type == "cpu" else [function(block) for block in cut]


def quantize_scaled(quantizer: Quantizer[Packed], weights: Sequence[Tensor], scale: Tensor | None,
                    global_scale: float) -> list[Packed]:
    """Pack the weights [out, in] of a group, columns multiplied by `scale` [in] (None: as they are).

    Raises:
        ValueError: NaN or Inf in a weight.
    """

    def quantize(block: Block) -> Packed:
        w = weights[block.weight][block.rows, block.columns]
        return quantizer.quantize(w if scale is None else w * scale[block.columns], global_scale)

    cut = column_cut(quantizer, weights)
    return _joined(blocks(weights, cut), map_blocks(quantize, weights, cut))


def quantize_searched(quantizer: Quantizer[Packed], weights: Sequence[Tensor], importance: Tensor,
                      global_scale: float) -> list[Packed]:
    """Pack the weights [out, in] of a group with grids searched for inputs of some importance [in]."""
    return quantize_measured(quantizer, weights, importance, global_scale)[0]


def quantize_measured(quantizer: Quantizer[Packed], weights: Sequence[Tensor], importance: Tensor,
                      global_scale: float) -> tuple[list[Packed], list[float]]:
    """As quantize_searched, and with each weight's squared error relative to its square, both weighted.

    Args:
        weights: float32 [out, in] of the linears of a group, finite.
        importance: float32 [in], weight of a squared error in each column.
        global_scale: that the group shares.
    """

    def quantize(block: Block) -> Measured[Packed]:
        w = weights[block.weight][block.rows, block.columns]
        return quantizer.measured(w, importance[block.columns], global_scale)

    cut = column_cut(quantizer, weights)
    found = map_blocks(quantize, weights, cut)
    errors = [error for (error,) in relative_totals(weights, cut, [part.sums for part in found])]
    return _joined(blocks(weights, cut), [part.q for part in found]), errors


def relative_totals(weights: Sequence[Tensor], cut: int | None, found: Sequence[Tensor]) -> list[tuple[float, ...]]:
    """For each weight the totals of n kinds of error, relative to that of its squares; an all-zero weight has none.

    Args:
        weights: [out, in] each.
        cut: as in `blocks`.
        found: float32 [1 + n, rows, groups] of each block: sums of weighted squares, then of the n errors.
    """
    rows: dict[tuple[int, int], list[Tensor]] = {}
    for block, part in zip(blocks(weights, cut), found, strict=True):
        rows.setdefault((block.weight, block.rows.start), []).append(part)
    by_weight: list[list[Tensor]] = [[] for _ in weights]
    for (index, _), parts in rows.items():
        by_weight[index].append(torch.cat(parts, 2) if len(parts) > 1 else parts[0])
    return [tuple(error / signal if signal > 0 else 0.0 for error in errors)
            for signal, *errors in map(totals, by_weight)]


def _joined(cut: Sequence[Block], parts: Sequence[Packed]) -> list[Packed]:
    """The weights of a group from their blocks."""
    across: dict[tuple[int, int], list[Packed]] = {}
    for block, part in zip(cut, parts, strict=True):
        across.setdefault((block.weight, block.rows.start), []).append(part)
    down: dict[int, list[Packed]] = {}
    for (index, _), row in across.items():
        down.setdefault(index, []).append(_concatenated(row, 1))
    return [_concatenated(rows, 0) for rows in down.values()]


def _concatenated(parts: Sequence[Packed], dim: int) -> Packed:
    if len(parts) == 1:
        return parts[0]
    fields = [torch.cat(field, dim) if isinstance(field[0], Tensor) else field[0] for field in zip(*parts, strict=True)]
    return type(parts[0])(*fields)


def dequantize_to(codec: TensorCodec[Packed], q: Packed, dtype: torch.dtype) -> Tensor:
    """`codec.dequantize(q)` in another dtype, [out, in], a few rows at a time: float32 never exists whole."""
    packed: Tensor = q[0]  # uint8 [out, in/2] in every format
    shape = (packed.shape[0], packed.shape[1] * 2)
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    for rows in row_slices(shape, packed.device):
        part = type(q)(*(field[rows] if isinstance(field, Tensor) else field for field in q))
        out[rows] = codec.dequantize(part)
    return out
