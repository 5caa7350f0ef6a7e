"""float32 matrix products on the CPU, by the faster of the two libraries that PyTorch brings.

PyTorch gives float32 products to MKL, which takes its AVX2 code on AMD processors even where they have AVX-512. oneDNN,
which PyTorch keeps for its other dtypes, uses what is there and takes half the time (benchmarks/RESULTS.md). The rule
depends on the machine alone and never on a measurement, so that a machine gives the same bits every time.

Inside `block_threads` (threads.py) a large product is cut into pieces by its shape alone, and gives the same bits on
any number of threads; outside the library's own threads share it.
"""

import functools
import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lance_quant.cpu.threads import in_block_threads, map_threads

_LARGE = 1 << 24  # multiplications; half a millisecond of a core, which is what handing work to a thread costs
_PIECE, _MOST_PIECES = 512, 16  # rows or columns: shorter pieces lose to packing the other factor anew for each


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., in] times [out, in] transposed, plus bias [out]: [..., out]. Views are fine; no gradient goes to a bias."""
    if torch.is_grad_enabled() and (x.requires_grad or w.requires_grad):
        return _Linear.apply(x, w, bias)
    return _linear(x, w, bias)


class _Linear(torch.autograd.Function):
    """`linear` whose gradients are such products, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if w.requires_grad else None, w)
        return _linear(x, w, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,), (x, w) = gradients, ctx.saved_tensors
        to_x = _linear(gradient, w.t(), None) if ctx.needs_input_grad[0] else None
        to_w = None if x is None else _linear(gradient.flatten(0, -2).t(), x.flatten(0, -2).t(), None)
        return to_x, to_w, None


def _linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    if not (in_block_threads() and x.device.type == "cpu" and x.numel() * len(w) >= _LARGE):
        return _product(x, w, bias)
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y = flat.new_empty(len(flat), len(w))
    if len(flat) >= len(w):
        map_threads(lambda rows: _into(y[rows], flat[rows], w, bias), _pieces(len(flat)))
    else:
        map_threads(lambda rows: _into(y[:, rows], flat, w[rows], None if bias is None else bias[rows]),
                    _pieces(len(w)))
    return y if x.dim() == 2 else y.view(*x.shape[:-1], len(w))


def _pieces(length: int) -> list[slice]:
    size = max(_PIECE, -(-length // _MOST_PIECES // 64) * 64)  # multiples of a register block
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _into(y: Tensor, x: Tensor, w: Tensor, bias: Tensor | None) -> None:
    """Put `_product` of two matrices into `y`, without a copy where the library can."""
    if bias is None and x.dtype == torch.float32 and not _onednn_is_faster():
        torch.mm(x, w.t(), out=y)
    else:
        y.copy_(_product(x, w, bias))


def _product(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    if x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() and w.numel() and _onednn_is_faster():
        flat = _dense(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]))
        y = torch.ops.mkldnn._linear_pointwise(flat, _dense(w), bias, "none", [], "")
        return y if x.dim() == 2 else y.view(*x.shape[:-1], len(w))
    return F.linear(x, w, bias)


def _dense(x: Tensor) -> Tensor:
    """The same values; oneDNN has no fast code for a part of the columns of a matrix."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()


@functools.cache
def _onednn_is_faster() -> bool:
    """An AMD processor with AVX-512, and a PyTorch that lets its oneDNN be called for float32."""
    wide = torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "AVX10"))
    return wide and _is_amd() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return "AuthenticAMD" in platform.processor()
