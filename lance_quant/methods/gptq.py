"""GPTQ (arXiv:2210.17323): rounding a weight column by column, each column's error made good by those still to come.

Nearest rounding minimises |What - W|; what matters is |(What - W) x| on the inputs that occur, and those are
correlated. With the Gram matrix (Hessian) H = sum x x^T the error of one column can be compensated by the others. Here:

- Static groups: every group's grid is searched on the original weight, so that columns can be rounded in the order of
  falling E[x^2] and the file needs no permutation.
- Afterwards every code is revisited, others fixed (coordinate descent), and every scale is refitted by least squares.
- In a model whose earlier layers are packed already, the inputs xq differ from the float model's x, and so does the
  residual stream rq from r, to which o_proj and down_proj add. The target is then moved towards what makes the outputs
  agree: W* = W + f (sum (W (x - xq) + r - rq) xq^T)(H + lam I)^-1, and H is that of xq.
- Tokens have weights, by what an error there does to the outputs (token_weights.py), in H and in the target.
- Tokens are held back from H. Where nearest rounding is better on them, it is kept.
- Where H is block-diagonal (GramStats.block), every block of inputs is a problem of its own.

Measured on trained linears (36 of all-MiniLM-L6-v2, output error of the whole model, docs/experiments.md).
What goes column by column runs in C where it can (cpu/rounding.py), to the same bits.
Weights are [in, out] here: a step of the loop then works on rows, which are contiguous. Suffixes: i in, o out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lance_quant.calibration.gram import GramStats
from lance_quant.cpu import cholesky, matmul, rounding
from lance_quant.cpu.threads import block_threads, map_threads
from lance_quant.formats.base import Grid, Quantizer, nearest_levels
from lance_quant.formats.blocks import Block, map_blocks

BLOCK = 128  # columns per step: what is behind a block is corrected once per block, by a matrix product
OUTPUTS = 512  # that a worker rounds at a time
SWEEPS = 2  # of coordinate descent; two more gain 2 %
ASYMMETRY = 0.75  # f; a trained two-expert model loses 9 % at 0.5 and 2 % at 1
ASYMMETRY_DAMPING = 0.05  # lam / mean diagonal
Factors = Sequence[tuple[slice, Tensor, Tensor]]  # see inverse_factors


@dataclass(frozen=True)
class GptqResult:
    """A weight on its grid.

    values: float32 [in, out], levels of `grid`
    method: "gptq" or "nearest"
    reason: why it is not gptq, else None
    before, after: squared error of the output, relative, of nearest rounding and as chosen, on held-back tokens; with
        what the residual stream lacks where that is known. None where none were held back
    """

    values: Tensor
    grid: Grid
    method: Literal["gptq", "nearest"]
    reason: str | None
    before: float | None = None
    after: float | None = None


@torch.no_grad()
def round_weight(w_io: Tensor, inputs: GramStats, quantizer: Quantizer, global_scale: float,
                 sweeps: int = SWEEPS, factors: Factors | None = None) -> GptqResult:
    """Round a weight [in, out] for inputs of some statistics, by the steps of the module docstring.

    Args:
        w_io: float32 [in, out], finite.
        inputs: what is known of the linear's inputs.
        quantizer, global_scale: of the format.
        sweeps: of coordinate descent, after GPTQ's one pass.
        factors: inverse_factors of the inputs, where another linear has needed them already.
    """
    importance = inputs.mean_square.clamp(min=1e-8 * float(inputs.mean_square.max()))
    if not torch.isfinite(importance).all() or inputs.n_tokens == 0 or not importance.max() > 0:
        grid = quantizer.grid(w_io, torch.ones_like(importance), global_scale)
        return GptqResult(nearest_levels(quantizer, w_io, grid), grid, "nearest", "no usable Gram matrix")
    plain = _grid(w_io, importance, quantizer, global_scale)
    nearest = nearest_levels(quantizer, w_io, plain)
    before = _held_error(w_io, nearest, inputs)
    target = aim(w_io, inputs)
    grid = plain if target is w_io or target is None else _grid(target, importance, quantizer, global_scale)
    if factors is None and target is not None:
        factors = inverse_factors(inputs)
    if target is None or factors is None:
        return GptqResult(nearest, plain, "nearest", "singular Gram matrix", before, before)
    values = _compensated(target, factors, grid, quantizer)
    del factors  # as large as the Gram matrix, 0.5 GB for a real down_proj
    values, grid = descend(target, values, grid, inputs, quantizer, global_scale, sweeps)
    after = _held_error(w_io, values, inputs)
    if before is not None and after is not None and not after <= before:
        return GptqResult(nearest, plain, "nearest", "better on held-back tokens", before, before)
    return GptqResult(values, grid, "gptq", None, before, after)


def _grid(w_io: Tensor, importance: Tensor, quantizer: Quantizer, global_scale: float) -> Grid:
    """Quantizer.grid, some outputs at a time: that fits a cache."""

    def search(block: Block) -> Grid:
        return quantizer.grid(w_io[:, block.rows].contiguous(), importance, global_scale)

    scales, zeros = zip(*map_blocks(search, [w_io.t()]), strict=True)
    return Grid(torch.cat(scales, 1), None if zeros[0] is None else torch.cat(zeros, 1))


def _held_error(w_io: Tensor, back_io: Tensor, inputs: GramStats) -> float | None:
    """Relative to the linear's own output, whatever the residual stream lacks already."""
    if not len(inputs.held):
        return None
    wanted = matmul.linear(inputs.held_float, w_io.t())
    signal = float(wanted.square().sum())
    if inputs.held_missing is not None:
        wanted += inputs.held_missing
    off = matmul.linear(inputs.held, back_io.t()).sub_(wanted)
    return float(off.square_().sum()) / signal if signal > 0 else None


def aim(w_io: Tensor, inputs: GramStats) -> Tensor | None:
    """W* of the module docstring [in, out]; `w_io` itself where the inputs agree, None where H is singular."""
    if inputs.cross_target is not None:
        moved = inputs.cross_target.clone()
    elif inputs.cross is not None:
        moved = matmul.linear(inputs.cross.t(), w_io.t())
    else:
        return w_io
    factor = inputs.gram.clone()
    factor.diagonal().add_(ASYMMETRY_DAMPING * float(factor.diagonal().mean()))
    if not cholesky.cholesky_(factor):
        return None
    cholesky.solve_lower_(factor, moved)
    cholesky.solve_lower_(factor, moved, transposed=True)
    return moved.mul_(ASYMMETRY).add_(w_io)


def inverse_factors(inputs: GramStats) -> Factors | None:
    """By block of the Gram matrix, the order in which its inputs are rounded and `inverse_factor` in it; None where one
    is singular."""
    found = []
    for span in inputs.spans:
        gram = inputs.gram[span, span]
        order = torch.argsort(gram.diagonal(), descending=True)
        factor = inverse_factor(gram, inputs.damping, order)
        if factor is None:
            return None
        found.append((span, order, factor))
    return found


def _compensated(target: Tensor, factors: Factors, grid: Grid, quantizer: Quantizer) -> Tensor:
    """GPTQ's pass over the blocks of the Gram matrix: levels [in, out]."""
    values, size = torch.empty_like(target), quantizer.group_size
    for span, order, factor in factors:
        own = grid.at(slice(span.start // size, span.stop // size))
        values[span] = propagate(target[span], order, factor, own, quantizer)
    return values


def inverse_factor(gram: Tensor, damping: float, order: Tensor) -> Tensor | None:
    """Upper Cholesky factor of the inverse of a damped Gram matrix [in, in], or None if there is none.

    Channels that were never seen get a unit diagonal: they are rounded to the nearest level and correct nothing.

    Args:
        order: [in] of rows and columns.
    """
    # H^-1 = U^T U with U = R^-1 where H = R R^T and R is upper triangular: the lower factor of H in reverse, turned.
    order = order.flip(0)
    factor = gram[order[:, None], order]  # the only matrix of this size that is made here
    diagonal = factor.diagonal()
    diagonal[diagonal <= 0] = float(diagonal.mean())
    diagonal.add_(damping * float(diagonal.mean()))
    if not cholesky.cholesky_(factor):
        return None
    cholesky.invert_lower_(factor)
    cholesky.turn_(factor)
    return factor if torch.isfinite(factor).all() else None


def propagate(w_io: Tensor, order: Tensor, factor: Tensor, grid: Grid, quantizer: Quantizer) -> Tensor:
    """The GPTQ loop: levels [in, out] for a weight [in, out].

    Args:
        order: [in] in which columns are rounded.
        factor: [in, in] of inverse_factor, for the Gram matrix in that order.
        grid: static grids of the weight's groups.
    """
    left, out = w_io[order], torch.empty_like(w_io)
    groups, in_c = order // quantizer.group_size, quantizer.runs_in_c(w_io.t())
    for start in range(0, len(order), BLOCK):
        end = min(start + BLOCK, len(order))
        block, own = left[start:end], factor[start:end, start:end].contiguous()
        errors = torch.empty_like(block)
        if in_c:
            grids = rounding.RowGrids(grid.scale, grid.zero, groups[start:end])
            map_threads(partial(rounding.propagate, block, errors, own, grids), _some_outputs(block.shape[1]))
        else:
            _propagate_block(block, errors, own, grid.at(groups[start:end]), quantizer)
        left[end:] -= matmul.linear(factor[start:end, end:].t(), errors.t())
    out[order] = left
    return out


def _some_outputs(n_out: int) -> list[slice]:
    return [slice(first, min(first + OUTPUTS, n_out)) for first in range(0, n_out, OUTPUTS)]


def _propagate_block(block: Tensor, errors: Tensor, factor: Tensor, grid: Grid, quantizer: Quantizer) -> None:
    """Round the rows of a block [n, out] in order, each one's error, handed on to the next; in place, errors too.

    Args:
        factor: [n, n] of those rows.
        grid: of every row.
    """
    diagonal = factor.diagonal().tolist()
    for row in range(len(block)):
        level = quantizer.nearest(block[row], grid.at(row))
        torch.sub(block[row], level, out=errors[row])
        errors[row] /= diagonal[row]
        block[row] = level
        # Not addr_, which rounds once where the processor can; rounding.c does this.
        block[row + 1:] -= factor[row, row + 1:, None] * errors[row]


def descend(target: Tensor, values: Tensor, grid: Grid, inputs: GramStats, quantizer: Quantizer,
            global_scale: float, sweeps: int = SWEEPS) -> tuple[Tensor, Grid]:
    """Revisit every code and every scale some times, each time taking what is best while all others are fixed.

    Args:
        target: [in, out] weight that is approximated.
        values: [in, out] levels of `grid`.

    Returns:
        Levels and grid; tr (values - target)^T H (values - target), H damped, never rises.
    """
    if not sweeps:
        return values, grid
    gram, values = inputs.gram, values.clone()
    damping = inputs.damping * float(gram.diagonal().mean())
    grid, size = Grid(grid.scale.clone(), grid.zero), quantizer.group_size
    span, off = size * max(1, BLOCK // size), values - target
    for _ in range(sweeps):
        for start in range(0, len(target), span):
            end = min(start + span, len(target))
            gradient = matmul.linear(gram[start:end], off.t()).add_(off[start:end], alpha=damping)
            local = gram[start:end, start:end].clone()
            local.diagonal().add_(damping)
            _revisit(values[start:end], gradient, local, start, grid, quantizer)
            with block_threads():  # threads would wait for one another after each of these short operations
                for group in range(start // size, end // size):
                    rows = slice(group * size - start, (group + 1) * size - start)
                    _refit(values[start:end][rows], gradient, local, rows, grid.scale[group], quantizer, global_scale)
            torch.sub(values[start:end], target[start:end], out=off[start:end])
    return values, grid


def _revisit(values: Tensor, gradient: Tensor, local: Tensor, start: int, grid: Grid, quantizer: Quantizer) -> None:
    """One sweep over the codes of some columns; `values` and `gradient` [n, out] are updated in place."""
    groups = torch.arange(start, start + len(values)) // quantizer.group_size
    if quantizer.runs_in_c(values.t()):
        grids = rounding.RowGrids(grid.scale, grid.zero, groups)
        map_threads(partial(rounding.revisit, values, gradient, local, grids), _some_outputs(values.shape[1]))
        return
    diagonal = local.diagonal().tolist()
    for row in range(len(values)):
        best = quantizer.nearest(values[row] - gradient[row] / diagonal[row], grid.at(int(groups[row])))
        moved = best - values[row]
        values[row] = best
        gradient += local[row, :, None] * moved  # as in _propagate_block


def _refit(values: Tensor, gradient: Tensor, local: Tensor, rows: slice, scale: Tensor, quantizer: Quantizer,
           global_scale: float) -> None:
    """Least-squares scales [out] of one group, codes fixed, where that is better after rounding; all in place."""
    units = values / scale
    curve = (units * (local[rows, rows] @ units)).sum(0)
    slope = (gradient[rows] * units).sum(0)
    wanted = scale - slope / curve.clamp(min=torch.finfo(curve.dtype).tiny)
    # Beyond a factor of two the codes would no longer be nearest to anything; an unused group has no curvature.
    sane = (curve > 0) & (wanted > 0.5 * scale) & (wanted < 2 * scale)
    new = torch.where(sane, quantizer.storable(torch.where(sane, wanted, scale), global_scale), scale)
    change = new - scale
    change = torch.where(change * (2 * slope + change * curve) < 0, change, 0)
    gradient.addmm_(local[:, rows], units * change)
    scale.add_(change)
    values.copy_(units * scale)
