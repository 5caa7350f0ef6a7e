"""4-bit palettes: every 32 rows of a weight share 16 values, found by k-means, as Core ML stores them.

k-means in one dimension needs no distances: on sorted values a cluster is a run, its mean a difference of running sums,
and the next borders a binary search, so a step costs microseconds and can be repeated until it settles. It starts from
three places (equal counts, equal widths, and in between: counts to the power of one third, which is best for many fine
clusters) and keeps the best per group.

Shape suffixes: g group of rows, n value, c cluster.
"""

from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 32  # rows per palette
COLORS = 16
_STEPS = 60
_BINS = 512
_BLOCK = 1 << 24  # values clustered at once: bounds the sort's temporaries


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
    if not torch.isfinite(w.half()).all():
        raise ValueError("weight holds NaN, Inf or a value beyond float16")
    step = max(1, _BLOCK // (ROWS * w.shape[1])) * ROWS
    parts = [_palettize_rows(w[row:row + step].float()) for row in range(0, w.shape[0], step)]
    return Palettized(torch.cat([part.codes for part in parts]), torch.cat([part.colors for part in parts]))


@torch.no_grad()
def values_of(p: Palettized) -> Tensor:
    """What codes and colors mean: float16 [out, in]."""
    values = torch.empty(p.codes.shape, dtype=torch.float16, device=p.codes.device)
    for rows, codes, colors in zip(values.split(ROWS), p.codes.split(ROWS), p.colors, strict=True):
        torch.take(colors, codes.long(), out=rows)
    return values


def _palettize_rows(w: Tensor) -> Palettized:
    values_gn = w.reshape(w.shape[0] // ROWS, -1)
    sorted_gn = values_gn.sort(1).values
    colors_gc = _cluster(sorted_gn).half().sort(1).values
    borders = (colors_gc[:, 1:].float() + colors_gc[:, :-1].float()) / 2
    codes_gn = torch.zeros(values_gn.shape, dtype=torch.uint8, device=w.device)
    for border_g1 in borders.split(1, 1):  # a third of the time of a binary search
        codes_gn += values_gn > border_g1
    return Palettized(codes_gn.view(w.shape), colors_gc)


def _cluster(sorted_gn: Tensor) -> Tensor:
    """Cluster centers [g, 16] with the smallest squared error among the starts."""
    sums_gn = torch.cat([sorted_gn.new_zeros(len(sorted_gn), 1), sorted_gn.double().cumsum(1)], 1)
    best_gain = best = None
    for start in (_equal_counts, _equal_widths, _cube_root):
        centers = start(sorted_gn)
        for _ in range(_STEPS):
            centers, gain = _lloyd(sorted_gn, sums_gn, centers)
        if best is None:
            best_gain, best = gain, centers
        else:
            better = gain > best_gain
            best_gain, best = torch.where(better, gain, best_gain), torch.where(better[:, None], centers, best)
    return best


def _lloyd(sorted_gn: Tensor, sums_gn: Tensor, centers_gc: Tensor) -> tuple[Tensor, Tensor]:
    """One step: means of the values nearest to each center, and sum(count * mean^2), which k-means maximizes."""
    borders = (centers_gc[:, 1:] + centers_gc[:, :-1]) / 2
    inner = torch.searchsorted(sorted_gn, borders)
    ends = torch.cat([inner.new_zeros(len(inner), 1), inner, inner.new_full((len(inner), 1), sorted_gn.shape[1])], 1)
    count, total = ends.diff(dim=1), sums_gn.gather(1, ends).diff(dim=1)
    means = torch.where(count > 0, total / count.clamp(min=1), centers_gc.double())
    return means.float(), (means.square() * count).sum(1)


def _equal_counts(sorted_gn: Tensor) -> Tensor:
    width = sorted_gn.shape[1]
    middle = ((torch.arange(COLORS, device=sorted_gn.device) + 0.5) * width / COLORS).long().clamp(max=width - 1)
    return sorted_gn[:, middle]


def _equal_widths(sorted_gn: Tensor) -> Tensor:
    share = (torch.arange(COLORS, device=sorted_gn.device) + 0.5) / COLORS
    return sorted_gn[:, :1] + (sorted_gn[:, -1:] - sorted_gn[:, :1]) * share


def _cube_root(sorted_gn: Tensor) -> Tensor:
    share = torch.linspace(0, 1, _BINS + 1, device=sorted_gn.device)
    edges = sorted_gn[:, :1] + (sorted_gn[:, -1:] - sorted_gn[:, :1]) * share
    counts = torch.searchsorted(sorted_gn, edges, right=True).diff(dim=1).float()
    mass = counts.pow(1 / 3).cumsum(1)
    wanted = (torch.arange(COLORS, device=sorted_gn.device) + 0.5) / COLORS * mass[:, -1:]
    return edges.gather(1, torch.searchsorted(mass, wanted).clamp(max=_BINS - 1))


def palettized(tensor: Tensor) -> Tensor:
    """A tensor of the model as float16: a matrix as the values of its palettes, anything else rounded."""
    return values_of(palettize(tensor)) if tensor.dim() == 2 else tensor.half()
