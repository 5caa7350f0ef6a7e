"""float32 matrix products on the CPU, by the faster of the two libraries that PyTorch brings.

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


def linear(x: Tensor, w: Tensor) -> Tensor:
    """float32 [n, in] times float32 [out, in] transposed: [n, out]. Either may be a transposed view."""
    if x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() and w.numel() and _onednn_is_faster():
        return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return F.linear(x, w)


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
