"""What kernels take of a packed weight, the same for both formats, and their registration with torch."""

import functools
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from lance_quant.formats.int4 import Int4Weight
from lance_quant.formats.weights import PackedWeight


def parts_of(q: PackedWeight) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Scales (bfloat16, or uint8 bytes of E4M3), INT4's zero points, and float32 factors of rows [out, 1] or None."""
    if isinstance(q, Int4Weight):
        return q.scale, q.zero, None
    if isinstance(q.global_scale, Tensor) or q.global_scale == 1:
        return q.scale, None, q.global_scale if isinstance(q.global_scale, Tensor) else None
    factors = torch.full((q.packed.shape[0], 1), q.global_scale, dtype=torch.float32, device=q.packed.device)
    return q.scale, None, factors


Made = TypeVar("Made")


class Derived(Generic[Made]):
    """What a kernel makes of a weight's scales beyond the bytes of the file: made at first use, kept as long as they.

    Where a layer gets other tensors, as by `.to(device)` or merge_rows, it is made anew. Changing them in place is not
    noticed; packed layers never do.

    Args:
        make: its result must not hold the first tensor that it is given, which would then never be freed.
    """

    def __init__(self, make: Callable[..., Made]):
        self._make = make
        self._kept = WeakTensorKeyDictionary()

    def of(self, first: Tensor, second: Tensor | None) -> Made:
        """make(first, second), tensors of any shape, from the last time if they are the same tensors."""
        kept = self._kept.get(first)
        if kept is None or (None if kept[0] is None else kept[0]()) is not second:
            kept = None if second is None else TensorWeakRef(second), self._make(first, second)
            self._kept[first] = kept
        return kept[1]


def _on_its_gpu(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def guarded(x: Tensor, *weight: Any) -> Tensor:
        with torch.cuda.device_of(x):  # Triton launches on the current GPU, whichever its tensors are on
            return function(x, *weight)

    return guarded


_libraries: list[torch.library.Library] = []  # an op lives as long as its library


_PACKED = "Tensor packed, Tensor scale, Tensor? zero, Tensor? row_scale, Tensor? bias, int group_size"


def define(name: str, function: Callable[..., Tensor], device: str, weight: str = _PACKED,
           fake: Callable[..., Tensor] | None = None) -> None:
    """Make `function` the op torch.ops.lance_quant.NAME, which torch.compile treats as one node of its graph.

    Args:
        function: takes x [rows, in] and the arguments of `weight`, of which the first has a row per output.
        device: a dispatch key; CompositeExplicitAutograd is every device.
        weight: by default packed, the three of `parts_of`, bias [out] or None, and the group size.
        fake: an empty result for the same arguments; default [rows, out] in the dtype of x.
    """
    library = torch.library.Library("lance_quant", "FRAGMENT")
    library.define(f"{name}(Tensor x, {weight}) -> Tensor")
    library.impl(name, function if device == "CPU" else _on_its_gpu(function), device)
    torch.library.register_fake(f"lance_quant::{name}",
                                fake or (lambda x, packed, *_: x.new_empty(x.shape[0], packed.shape[0])), lib=library)
    _libraries.append(library)
