"""Reproducible reductions: sums of weighted squares in a fixed order, so that C (rounding.c) gives the same bits.

Shape suffixes: o out, i in, g group.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LANES = 8  # sums that run beside one another through a group


def weighted_squares(off_gio: Tensor, weight_gi: Tensor) -> Tensor:
    """Over each group the sum of squares times weights.

    Input i of a group goes to sum i mod 8, in order; then the sums are folded in halves. A group size that 8 does not
    divide has as many sums as the largest power of two that does.

    Args:
        off_gio: float32 [groups, size, out]; overwritten.
        weight_gi: float32 [groups, size].

    Returns:
        float32 [groups, out].
    """
    n_groups, size, n_out = off_gio.shape
    lanes = math.gcd(size, LANES)
    terms = off_gio.square_().mul_(weight_gi[..., None]).view(n_groups, size // lanes, lanes, n_out)
    total = terms[:, 0].clone()
    for step in range(1, size // lanes):
        total += terms[:, step]
    while lanes > 1:
        lanes //= 2
        total = total[:, :lanes] + total[:, lanes:]
    return total.squeeze(1)


def totals(parts: Sequence[Tensor]) -> list[float]:
    """Sums over outputs and groups, n numbers, rounded once.

    Args:
        parts: float32 [n, out, groups] each, some of the outputs. How outputs are divided among the parts does not
            matter, because the sums of rows are added up exactly.
    """
    rows = torch.cat([part.sum(2, dtype=torch.float64) for part in parts], 1)
    return [math.fsum(each) for each in rows.tolist()]
