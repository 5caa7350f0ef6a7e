"""CPU kernels of the grid search and of GPTQ's loops, in C (rounding.c).

To the bit they give what int4.py, nvfp4.py, weighted_sums.py and gptq.py give in PyTorch, so a file does not depend on
whether there was a compiler. A weight of Lance is rounded a few dozen times while its scales and grids are searched.
PyTorch takes half a dozen passes over memory for each; here all of them run over a piece that stays in the first cache.
It is plain C: any CPU will do.
"""

import ctypes
import functools
import platform
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lance_quant.cpu import compile_c
from lance_quant.cpu.weighted_sums import LANES

_SOURCE = Path(__file__).with_name("rounding.c")

class Outputs(NamedTuple):
    """What the C functions give for a weight [out, in]; what was not asked for is empty.

    packed: uint8 [out, in/2]
    scale: [out, groups] as stored, bfloat16 or E4M3 bytes
    zero: uint8 [out, groups]; empty for NVFP4
    sums: float32 [2, out, groups], weighted_sums.weighted_squares of the weight and of what rounding changes
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor
    sums: Tensor


def serves(w: Tensor, group_size: int) -> bool:
    """Whether the C functions take this weight [out, in] on this machine. Compiles them if need be."""
    return w.device.type == "cpu" and w.dtype == torch.float32 and group_size % LANES == 0 \
        and w.shape[1] % group_size == 0 and unavailable() is None


def unavailable() -> str | None:
    """Why there are no C functions on this machine; None if there are."""
    return _library_or_reason()[1]


def quantize_int4(w: Tensor, group_size: int, importance: Tensor | None = None, rounds: Sequence[Sequence] = (),
                  pack: bool = True) -> Outputs:
    """int4.quantize, or with `importance` and rounds of moves int4.search_grid_io and int4.round_io.

    Args:
        w: float32 [out, in], of any strides.
        importance: float32 [in], weight of a squared error in each column.
        rounds: as int4.ROUNDS.
        pack: False: only grids.

    Raises:
        ValueError: NaN or Inf in `w`.
    """
    moves = [move for moves in rounds for move in moves]
    starts = bytes(index == 0 for moves in rounds for index in range(len(moves)))
    flat = (ctypes.c_float * (2 * len(moves)))(*(part for move in moves for part in move))
    out, wanted = _outputs(w, group_size, torch.bfloat16, True, importance, pack)
    weight = _contiguous(importance)
    _checked(_library().int4_quantize(ctypes.byref(_weight(w, group_size)), _address(weight), flat, starts, len(moves),
                                      _address(out.scale), _address(out.zero), ctypes.byref(wanted)))
    return out


def quantize_nvfp4(w: Tensor, group_size: int, global_scale: float, importance: Tensor | None = None,
                   steps: Sequence[int] = (), pack: bool = True) -> Outputs:
    """nvfp4.quantize, or with `importance` and `steps` nvfp4.search_scales_io and nvfp4.round_io.

    Args:
        w: float32 [out, in], of any strides.
        importance: float32 [in], weight of a squared error in each column.
        steps: as nvfp4.SCALE_STEPS.
        pack: False: only scales.

    Raises:
        ValueError: NaN or Inf in `w`.
    """
    out, wanted = _outputs(w, group_size, torch.uint8, False, importance, pack)
    weight = _contiguous(importance)
    _checked(_library().nvfp4_quantize(ctypes.byref(_weight(w, group_size)), _address(weight), global_scale,
                                       (ctypes.c_int32 * len(steps))(*steps), len(steps), _address(out.scale),
                                       ctypes.byref(wanted)))
    return out


def errors_int4(w: Tensor, group_size: int, factors: Tensor, weights: Tensor) -> Tensor:
    """base.errors_by_definition: weighted squares of the weight, and of what int4.quantize changes in it with its
    columns multiplied.

    Args:
        w: float32 [out, in], of any strides, finite.
        factors: float32 [n, in] of the columns.
        weights: float32 [1 + n, in], of the squares in `w`, and of the squared errors with each factor.

    Returns:
        float32 [1 + n, out, groups].
    """
    factors, weights = factors.contiguous(), weights.contiguous()
    out = _errors(w, group_size, len(factors))
    _checked(_library().int4_errors(ctypes.byref(_weight(w, group_size)), _address(factors), _address(weights),
                                    len(factors), _address(out)))
    return out


def errors_nvfp4(w: Tensor, group_size: int, factors: Tensor, weights: Tensor,
                 global_scales: Sequence[float]) -> Tensor:
    """As errors_int4, of nvfp4.quantize with each of `global_scales`: float32 [1 + n, out, blocks]."""
    factors, weights = factors.contiguous(), weights.contiguous()
    out = _errors(w, group_size, len(factors))
    _checked(_library().nvfp4_errors(ctypes.byref(_weight(w, group_size)), _address(factors), _address(weights),
                                     (ctypes.c_float * len(factors))(*global_scales), len(factors), _address(out)))
    return out


def revisit(values: Tensor, gradient: Tensor, local: Tensor, grids: "RowGrids", outputs: slice) -> None:
    """gptq._revisit of some outputs; `values` and `gradient` are updated in place.

    Args:
        values, gradient: float32 [n, out], contiguous.
        local: float32 [n, n].
        grids: of the n rows.
    """
    assert values.is_contiguous() and gradient.is_contiguous()
    _checked(_library().gptq_revisit(_address(values), _address(gradient), _address(local.contiguous()),
                                     ctypes.byref(grids), len(values), outputs.start, outputs.stop))


def propagate(block: Tensor, errors: Tensor, factor: Tensor, grids: "RowGrids", outputs: slice) -> None:
    """The loop of gptq.propagate over the rows of a block, for some outputs: they become their nearest levels, and
    `errors` what is handed on.

    Args:
        block, errors: float32 [n, out], contiguous.
        factor: float32 [n, n].
        grids: of the n rows.
    """
    assert block.is_contiguous() and errors.is_contiguous()
    _checked(_library().gptq_propagate(_address(block), _address(errors), _address(factor.contiguous()),
                                       ctypes.byref(grids), len(block), outputs.start, outputs.stop))


class RowGrids(ctypes.Structure):
    """`Grids` of rounding.c: the grids of some rows.

    Args:
        scale, zero: float32 [all groups, out]; zero is None for NVFP4.
        groups: int64 [n], the group that each row is in.
    """

    _fields_ = [("scales", ctypes.c_void_p), ("zeros", ctypes.c_void_p), ("groups", ctypes.c_void_p),
                ("n_out", ctypes.c_int64)]

    def __init__(self, scale: Tensor, zero: Tensor | None, groups: Tensor):
        self.tensors = scale.contiguous(), _contiguous(zero), groups.long().contiguous()  # kept alive
        super().__init__(*map(_address, self.tensors), scale.shape[1])


class _Weight(ctypes.Structure):
    """`Weight` of rounding.c."""

    _fields_ = [("values", ctypes.c_void_p), *((name, ctypes.c_int64) for name in (
        "n_out", "n_in", "out_stride", "in_stride", "group_size"))]


class _Wanted(ctypes.Structure):
    """`Wanted` of rounding.c."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("packed", "sums")]


def _weight(w: Tensor, group_size: int) -> _Weight:
    return _Weight(w.data_ptr(), *w.shape, *w.stride(), group_size)


def _outputs(w: Tensor, group_size: int, scale: torch.dtype, has_zero: bool, importance: Tensor | None,
             pack: bool) -> tuple[Outputs, _Wanted]:
    def empty(*shape: int, dtype: torch.dtype = torch.uint8, wanted: bool = True) -> Tensor:
        return torch.empty(shape if wanted else 0, dtype=dtype, device="cpu")

    n_out, n_in = w.shape
    groups, measured = n_in // group_size, pack and importance is not None
    out = Outputs(empty(n_out, n_in // 2, wanted=pack), empty(n_out, groups, dtype=scale),
                    empty(n_out, groups, wanted=has_zero),
                    empty(2, n_out, groups, dtype=torch.float32, wanted=measured))
    return out, _Wanted(_address(out.packed), _address(out.sums))


def _errors(w: Tensor, group_size: int, n: int) -> Tensor:
    return torch.empty(1 + n, w.shape[0], w.shape[1] // group_size, dtype=torch.float32, device="cpu")


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _address(x: Tensor | None) -> int | None:
    return None if x is None or not x.numel() else x.data_ptr()


def _checked(status: int) -> None:
    if status < 0:
        raise MemoryError("no memory for one group of 16 outputs")
    if status:
        raise ValueError("weight holds NaN or Inf")


def _library() -> ctypes.CDLL:
    library, reason = _library_or_reason()
    if library is None:
        raise RuntimeError(f"the C functions are not available: {reason}")
    return library


_loading = threading.Lock()  # workers come here at once


def _library_or_reason() -> tuple[ctypes.CDLL | None, str | None]:
    """The compiled file, or why there is none."""
    with _loading:
        return _loaded()


@functools.cache
def _loaded() -> tuple[ctypes.CDLL | None, str | None]:
    if compile_c.level() == "plain" and compile_c.is_x86(platform.machine()):
        return None, "this CPU has no AVX2"  # without rounding in registers it would be no faster
    library, reason = compile_c.load(_SOURCE)
    if library is not None:
        _declare(library)
    return library, reason


def _declare(library: ctypes.CDLL) -> None:
    """Argument types of the C functions."""
    pointer, number, small, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    library.int4_quantize.argtypes = [pointer, pointer, pointer, ctypes.c_char_p, small, pointer, pointer, pointer]
    library.nvfp4_quantize.argtypes = [pointer, pointer, real, pointer, small, pointer, pointer]
    library.int4_errors.argtypes = [pointer, pointer, pointer, number, pointer]
    library.nvfp4_errors.argtypes = [pointer, pointer, pointer, pointer, number, pointer]
    library.gptq_revisit.argtypes = library.gptq_propagate.argtypes = [pointer] * 4 + [number] * 3
