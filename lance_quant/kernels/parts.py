"""What kernels take of a packed weight, the same for both formats, and their registration with torch."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lance_quant.codec import PackedWeight
from lance_quant.int4 import Int4Weight


def parts_of(q: PackedWeight) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Scales (bfloat16, or uint8 bytes of E4M3), INT4's zero points, and float32 factors of rows [out, 1] or None."""
    if isinstance(q, Int4Weight):
        return q.scale, q.zero, None
    if isinstance(q.global_scale, Tensor) or q.global_scale == 1:
        return q.scale, None, q.global_scale if isinstance(q.global_scale, Tensor) else None
    factors = torch.full((q.packed.shape[0], 1), q.global_scale, dtype=torch.float32, device=q.packed.device)
    return q.scale, None, factors


def _on_its_gpu(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def guarded(x: Tensor, *weight: Any) -> Tensor:
        with torch.cuda.device_of(x):  # Triton launches on the current GPU, whichever its tensors are on
            return function(x, *weight)

    return guarded


_libraries: list[torch.library.Library] = []  # an op lives as long as its library


_PACKED = "Tensor packed, Tensor scale, Tensor? zero, Tensor? row_scale, Tensor? bias, int group_size"


def define(name: str, function: Callable[..., Tensor], device: str, weight: str = _PACKED) -> None:
    """Make `function` the op torch.ops.lance_quant.NAME, which torch.compile treats as one node of its graph.

    Args:
        function: takes x [rows, in] and the arguments of `weight`, of which the first has a row per output.
        weight: by default packed, the three of `parts_of`, bias [out] or None, and the group size.
    """
    library = torch.library.Library("lance_quant", "FRAGMENT")
    library.define(f"{name}(Tensor x, {weight}) -> Tensor")
    library.impl(name, _on_its_gpu(function) if device == "CUDA" else function, device)
    torch.library.register_fake(f"lance_quant::{name}",
                                lambda x, packed, *_: x.new_empty(x.shape[0], packed.shape[0]), lib=library)
    _libraries.append(library)
