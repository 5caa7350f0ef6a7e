"""Peak memory by shapes alone: code runs on the meta device, and the bytes of all tensors alive at once are counted.

Attention counts with its output alone, as flash attention does (arXiv:2205.14135; PyTorch's kernels for CPU and CUDA
both keep no matrix of scores), and packed linears with what their kernels allocate. Not counted: the libraries'
workspaces, and what an allocator keeps of freed memory.
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lance_quant.formats.base import Codec
from lance_quant.formats.weights import PackedWeight
from lance_quant.kernels.cpu import BLOCK, gemm_dtype
from lance_quant.kernels.triton_w4a16 import TILE_ROWS


class Alive(TorchDispatchMode):
    """Bytes of all tensors that were made inside and are still there: `now`, and the `peak` so far."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what it returns."""
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._known:
                    self._known.add(key)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, key, size)
        return out

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def leave_out(self, module: nn.Module) -> None:
        """Do not count a module that was made before, nor views of its tensors. It must stay as long as this counts."""
        tensors = [*module.parameters(), *module.buffers()]
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    @contextlib.contextmanager
    def rise(self, into: dict[str, int], name: str, base: int) -> Iterator[None]:
        """Note as `into[name]` how far above `base` bytes the block's peak is."""
        self.peak = self.now
        yield
        into[name] = self.peak - base


@contextlib.contextmanager
def counted() -> Iterator[Alive]:
    """Count what is made inside."""
    with mock.patch.object(F, "scaled_dot_product_attention", flash), Alive() as alive:
        yield alive


def flash(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
    """Attention [b, h, t, d] that allocates its output alone."""
    return torch.empty_like(q)


class Allocations:
    """A kernel for packed linears (kernels.Kernel) that allocates what the CUDA one does, and computes nothing."""

    name = "allocations"

    def linear(self, x: Tensor, q: PackedWeight, codec: Codec, bias: Tensor | None) -> Tensor:
        """[rows, in] -> [rows, out], see kernels.Kernel; many rows have their weight unpacked as a whole."""
        return unpacking(x, q.packed.shape[0], 2 * q.packed.shape[1])


def unpacking(x: Tensor, n_out: int, n_in: int) -> Tensor:
    """An output [rows, n_out] for `x` [rows, n_in], made while an unpacked weight is there if there are many rows."""
    unpacked = x.new_empty(n_out, n_in) if len(x) > TILE_ROWS else None
    out = x.new_empty(len(x), n_out)
    del unpacked
    return out


class Unpacking(nn.Module):
    """A linear without a weight, which allocates as a packed one does: on CUDA the unpacked weight as well; on a CPU
    (kernels/cpu.py) inputs and outputs in what the GEMM computes in, and the outputs of a block of weights."""

    def __init__(self, n_in: int, n_out: int, on_cpu: bool):
        super().__init__()
        self.n_in, self.n_out, self.on_cpu = n_in, n_out, on_cpu

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        flat = x.reshape(-1, self.n_in)
        out = self._blockwise(flat) if self.on_cpu else unpacking(flat, self.n_out, self.n_in)
        return out.view(*x.shape[:-1], self.n_out)

    def _blockwise(self, x: Tensor) -> Tensor:
        dtype = gemm_dtype(x.dtype)
        wide, y = x.to(dtype), x.new_empty(len(x), self.n_out, dtype=dtype)
        part = wide.new_empty(len(x), min(self.n_out, BLOCK // self.n_in))
        del part
        return y.to(x.dtype)
