"""4-bit palettes: every 32 rows of a weight share 16 values, found by k-means, as Core ML stores them.

k-means in one dimension needs no distances: in order of value a cluster is a run, its mean a difference of running
sums, and the next borders a binary search. Palettes hold float16, so the weights are counted as float16 first, of which
a group has some thousand different ones: a step costs microseconds and can be repeated until it settles. It starts from
three places (equal counts, equal widths, and in between: counts to the power of one third, which is best for many fine
clusters) and keeps the best per group.

Shape suffixes: g group of rows, n weight, l level (a float16 that occurs), e the end of a run of levels, c cluster.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lance_quant.errors import InputError
from lance_quant.storage.tensor_file import Checkpoint

ROWS = 32  # rows per palette
COLORS = 16
_STEPS = 60
_BINS = 512
_BLOCK = 1 << 24  # weights clustered at once: bounds the temporaries
_PATTERNS = 1 << 16  # of float16


class Palettized(NamedTuple):
    """codes: uint8 [out, in], 0..15. colors: float16 [out/32, 16], ascending."""

    codes: Tensor
    colors: Tensor


@torch.no_grad()
def palettize(w: Tensor) -> Palettized:
    """Cluster a weight [out, in], finite, `out` a multiple of 32, any float dtype.

    Raises:
        ValueError: 32 does not divide `out`, or `w` holds NaN, or more than float16 can hold.
    """
    if w.shape[0] % ROWS:
        raise ValueError(f"{w.shape[0]} rows are not a multiple of {ROWS}")
    step = max(1, _BLOCK // (ROWS * w.shape[1])) * ROWS
    parts = [_palettize_rows(w[row:row + step].half()) for row in range(0, w.shape[0], step)]
    return Palettized(torch.cat([part.codes for part in parts]), torch.cat([part.colors for part in parts]))


@torch.no_grad()
def values_of(p: Palettized) -> Tensor:
    """What codes and colors mean: float16 [out, in]."""
    values = torch.empty(p.codes.shape, dtype=torch.float16, device=p.codes.device)
    for rows, codes, colors in zip(values.split(ROWS), p.codes.split(ROWS), p.colors, strict=True):
        torch.take(colors, codes.long(), out=rows)
    return values


class _Counts(NamedTuple):
    """levels: float32 [l], ascending. count, total: float64 [g, e], weights below an end and their sum."""

    levels: Tensor
    count: Tensor
    total: Tensor


def _palettize_rows(w: Tensor) -> Palettized:
    weights_gn = w.reshape(w.shape[0] // ROWS, -1)
    counts = _count(weights_gn)
    if not torch.isfinite(counts.levels).all():
        raise ValueError("weight holds NaN, Inf or a value beyond float16")
    colors_gc = _cluster(counts).half().sort(1).values
    borders = (colors_gc[:, 1:].float() + colors_gc[:, :-1].float()) / 2
    wide_gn, codes_gn = weights_gn.float(), torch.zeros(weights_gn.shape, dtype=torch.uint8, device=w.device)
    for border_g1 in borders.split(1, 1):  # a third of the time of a binary search
        codes_gn += wide_gn > border_g1
    return Palettized(codes_gn.view(w.shape), colors_gc)


def _count(weights_gn: Tensor) -> _Counts:
    groups = len(weights_gn)
    rank_gn = _ordered(weights_gn.view(torch.int16)).int() + _PATTERNS // 2
    offset_g1 = torch.arange(groups, device=rank_gn.device, dtype=torch.int32)[:, None] * _PATTERNS
    found = torch.bincount((rank_gn + offset_g1).view(-1), minlength=groups * _PATTERNS).view(groups, _PATTERNS)
    used = found.any(0).nonzero().squeeze(1)
    levels = _ordered((used - _PATTERNS // 2).short()).view(torch.float16).float()
    count_gl = found[:, used].double()
    return _Counts(levels, *(F.pad(x.cumsum(1), (1, 0)) for x in (count_gl, count_gl * levels)))


def _ordered(bits: Tensor) -> Tensor:
    """Bits of float16 as int16 -> integers in the order of the values, and back."""
    return bits ^ (bits >> 15 & 0x7FFF)


def _cluster(counts: _Counts) -> Tensor:
    """Cluster centers [g, 16] with the smallest squared error among the starts."""
    best_gain = best = None
    for start in (_equal_counts, _equal_widths, _cube_root):
        centers = start(counts)
        for _ in range(_STEPS):
            centers, gain = _lloyd(counts, centers)
        if best is None:
            best_gain, best = gain, centers
        else:
            better = gain > best_gain
            best_gain, best = torch.where(better, gain, best_gain), torch.where(better[:, None], centers, best)
    return best


def _lloyd(counts: _Counts, centers_gc: Tensor) -> tuple[Tensor, Tensor]:
    """One step: means of the weights nearest to each center, and sum(count * mean^2), which k-means maximizes."""
    inner = torch.searchsorted(counts.levels, (centers_gc[:, 1:] + centers_gc[:, :-1]) / 2)
    ends = F.pad(F.pad(inner, (1, 0)), (0, 1), value=len(counts.levels))
    count, total = (sums.gather(1, ends).diff(dim=1) for sums in (counts.count, counts.total))
    means = torch.where(count > 0, total / count.clamp(min=1), centers_gc.double())
    return means.float(), (means.square() * count).sum(1)


def _shares(counts: _Counts) -> Tensor:
    return (torch.arange(COLORS, device=counts.levels.device) + 0.5) / COLORS


def _equal_counts(counts: _Counts) -> Tensor:
    return counts.levels[_places(counts, counts.count[:, -1:] * _shares(counts))]


def _places(counts: _Counts, rank_gc: Tensor) -> Tensor:
    """Which level the weight of some rank in its group has."""
    return torch.searchsorted(counts.count[:, 1:].contiguous(), rank_gc, right=True)


def _limits(counts: _Counts) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight [g, 1]."""
    size = counts.count[:, -1:]
    return tuple(counts.levels[_places(counts, rank)] for rank in (torch.zeros_like(size), size - 1))


def _equal_widths(counts: _Counts) -> Tensor:
    low, high = _limits(counts)
    return low + (high - low) * _shares(counts)


def _cube_root(counts: _Counts) -> Tensor:
    low, high = _limits(counts)
    edges = low + (high - low) * torch.linspace(0, 1, _BINS + 1, device=low.device)
    size = counts.count.gather(1, torch.searchsorted(counts.levels, edges, right=True)).diff(dim=1)
    mass = size.pow(1 / 3).cumsum(1)
    wanted = _shares(counts) * mass[:, -1:]
    return edges.gather(1, torch.searchsorted(mass, wanted).clamp(max=_BINS - 1))


def palettized(source: Checkpoint, name: str) -> Tensor:
    """A tensor of the model as float16: a matrix as the values of its palettes, anything else rounded.

    Raises:
        InputError: see palettize.
    """
    tensor = source.read(name)
    if tensor.dim() != 2:
        return tensor.half()
    try:
        return values_of(palettize(tensor))
    except ValueError as error:
        raise InputError(f"{source.path}: {name}: {error}") from error
