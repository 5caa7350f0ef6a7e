"""Blocked Cholesky factorization, inversion and triangular solves, for the large Gram matrices of GPTQ.

Nearly all of the work is matrix products (matmul.py). Everything is in place where it can be: a real down_proj's matrix
takes 0.5 GB.
"""

import torch
from torch import Tensor

from lance_quant.cpu import matmul

BLOCK = 512  # rows and columns that are left to the library
PANEL = 1024  # rows that are copied at a time


def cholesky_(a: Tensor) -> bool:
    """Replace a symmetric float32 matrix [n, n], of which the lower triangle is read, by its lower Cholesky factor.

    Returns:
        Whether there is one; if not, `a` holds nothing of use.
    """
    n = len(a)
    for start in range(0, n, BLOCK):
        end = min(start + BLOCK, n)
        for row in range(start, n if start else 0, PANEL):
            a[row:row + PANEL, start:end] -= matmul.linear(a[row:row + PANEL, :start], a[start:end, :start])
        corner, failed = torch.linalg.cholesky_ex(a[start:end, start:end])
        if int(failed):
            return False
        a[start:end, start:end] = corner
        a[start:end, end:] = 0
        if end < n:
            a[end:, start:end] = matmul.linear(a[end:, start:end], _inverse(corner))
    return True


def invert_lower_(a: Tensor) -> None:
    """Replace a lower triangular float32 matrix [n, n] by its inverse."""
    n = len(a)
    for start in range(0, n, BLOCK):
        end = min(start + BLOCK, n)
        corner = a[start:end, start:end]
        corner.copy_(_inverse(corner))
        if not start:
            continue
        # What is above is inverted already: B of [[A, 0], [B, C]] becomes -C^-1 B A^-1, some columns at a time.
        left = matmul.linear(corner, a[start:end, :start].t())
        for column in range(0, start, BLOCK):
            part = slice(column, column + BLOCK)
            a[start:end, part] = -matmul.linear(left[:, column:], a[column:start, part].t())


def solve_lower_(factor: Tensor, b: Tensor, transposed: bool = False) -> None:
    """Replace b by the x with factor x = b, or with factor^T x = b.

    Args:
        factor: float32 [n, n], lower triangular.
        b: float32 [n, m].
        transposed: take factor^T.
    """
    n = len(factor)
    starts = range(0, n, BLOCK)
    for start in reversed(starts) if transposed else starts:
        end = min(start + BLOCK, n)
        corner = _inverse(factor[start:end, start:end])
        if transposed:
            corner, beside, known = corner.t(), factor[end:, start:end].t(), b[end:]
        else:
            beside, known = factor[start:end, :start], b[:start]
        if len(known):
            b[start:end] -= matmul.linear(beside, known.t())
        b[start:end] = matmul.linear(corner, b[start:end].t())


def turn_(a: Tensor) -> None:
    """Reverse the order of rows and of columns of a matrix [n, n]."""
    n = len(a)
    for start in range(0, n // 2, BLOCK):
        end = min(start + BLOCK, n // 2)
        upper, lower = a[start:end], a[n - end:n - start]
        kept = upper.flip(0, 1)
        upper.copy_(lower.flip(0, 1))
        lower.copy_(kept)
    if n % 2:
        a[n // 2] = a[n // 2].flip(0)


def _inverse(lower: Tensor) -> Tensor:
    one = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, one, upper=False)
