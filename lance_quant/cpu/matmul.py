"""float32 GEMM on the CPU, by the faster of the two libraries that PyTorch brings.

PyTorch gives float32 products to MKL, which takes its AVX2 code on AMD processors even where they have AVX-512. oneDNN,
which PyTorch keeps for its other dtypes, uses what is there and takes half the time (benchmarks/RESULTS.md). The rule
depends on the machine alone and never on a measurement, so that a machine gives the same bits every time.
"""

import functools
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., in] times [out, in] transposed, plus bias [out] -> [..., out].

    Views are fine. On the CPU in float32 there is no gradient.
    """
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
