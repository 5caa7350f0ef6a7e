"""Linear layers of the runtime: nn.Linear, by the faster library on a CPU (cpu/matmul.py)."""

import torch
from torch import Tensor, nn

from lance_quant.cpu import matmul
from lance_quant.cpu.threads import in_block_threads


class Linear(nn.Linear):
    """nn.Linear that takes the faster library for float32 on a CPU where nothing is trained.

    Inside `block_threads` its gradients take it, too: those of calibration are the same on any number of threads.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and not in_block_threads()):
            return super().forward(x)  # matmul reads /proc, and gives no gradient to a bias
        return matmul.linear(x, self.weight, self.bias)
