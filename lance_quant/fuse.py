"""Folding a per-channel scale into the RMSNorm before some linears, without changing what they compute.

A norm ends with y = x_hat * norm, a linear reads W y. Dividing `norm` by s and multiplying the columns of W by s leaves
W y as it was. The file stores norms in bfloat16, so the divided norm is rounded; instead of keeping s and living with
that error (3e-6 relative), the columns are multiplied by norm / norm_new, which is what was really divided out. This
holds for s = 1 too: the rounding of the norm itself goes into the weights.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Folded(NamedTuple):
    """norm: bfloat16 [in], to be stored; column: float [in], by which weight columns [out, in] are multiplied."""

    norm: Tensor
    column: Tensor


def fold_norm(norm: Tensor, s: Tensor) -> Folded:
    """Divide a norm weight by s, and say what the columns behind it must be multiplied by.

    Args:
        norm: [in] float32 or float64 norm weight.
        s: [in] positive scale.

    Returns:
        Folded, with norm_new * column == norm to the rounding of norm's dtype. Where norm / s vanishes in bfloat16 the
        channel keeps its norm (s = 1); where the norm is 0, nothing passes and the column factor is 1.
    """
    new = (norm / s).bfloat16()
    new = torch.where(new == 0, norm.bfloat16(), new)
    return Folded(new, torch.where(new == 0, torch.ones_like(norm), norm / new.to(norm.dtype)))
