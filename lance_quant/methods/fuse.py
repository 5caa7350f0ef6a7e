"""Scale folding: a scale per channel moved between a linear and what precedes it (AWQ, SmoothQuant arXiv:2211.10438).

What a layer computes does not change. There are three places.

Norm to q/k/v and to gate/up, free per expert. A norm ends with y = x_hat * norm, a linear reads W y. Dividing `norm` by
s and multiplying the columns of W by s leaves W y as it was. The file stores norms in bfloat16, so the divided norm is
rounded; instead of keeping s and living with that error (3e-6 relative), the columns are multiplied by norm / norm_new,
which is what was really divided out. This holds for s = 1 too: the rounding of the norm itself goes into the weights.

up_proj to down_proj, free per expert: down(silu(gate) * up) is linear in up, so rows of up are divided by t and columns
of down multiplied.

v_proj to o_proj: attention averages values over tokens, channel by channel, and each key/value head serves a block of
query heads. So a channel of a key/value head may be divided by s if the columns of o_proj are multiplied by it in every
head of the block. An average mixes tokens of both experts: s must be the same in both, and divides the biases too. The
cache then holds v / s, which is consistent because every entry is made by the same weights.

Nothing is moved through q and k: their norms follow and would undo a scale per channel.
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


class Heads(NamedTuple):
    """How the columns of o_proj are laid out: kv blocks of `shared` query heads of `width` channels."""

    kv: int
    shared: int
    width: int

    def spread(self, s: Tensor) -> Tensor:
        """A scale per value channel [kv * width] as a scale per column of o_proj [kv * shared * width]."""
        return s.view(self.kv, 1, self.width).expand(-1, self.shared, -1).reshape(-1)

    def gather(self, x: Tensor) -> Tensor:
        """The mean over the query heads that share a value channel, [kv * shared * width] -> [kv * width]: the inverse
        of `spread` for scales."""
        return x.view(self.kv, self.shared, self.width).mean(1).reshape(-1)


def heads_of(q_norm: Tensor, v: Tensor, o: Tensor) -> Heads:
    """The head geometry, from shapes alone.

    Args:
        q_norm: [width].
        v: [kv * width, in] weight of v_proj.
        o: [out, heads * width] weight of o_proj.

    Raises:
        ValueError: the sizes do not divide one another.
    """
    width, values, columns = q_norm.shape[0], v.shape[0], o.shape[1]
    if values % width or columns % values:
        raise ValueError(f"heads of width {width} do not fit {values} value channels and {columns} columns of o_proj")
    return Heads(values // width, columns // values, width)


def divide_rows(weight: Tensor, bias: Tensor | None, s: Tensor) -> None:
    """Divide the outputs of a linear [out, in] by s [out], in place, its bias [out] included."""
    weight.div_(s[:, None])
    if bias is not None:
        bias.div_(s)


def multiply_columns(weight: Tensor, s: Tensor) -> None:
    """Multiply the inputs of a linear [out, in] by s [in], in place."""
    weight.mul_(s)
