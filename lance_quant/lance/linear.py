"""Linear layers of the runtime: nn.Linear, by the faster library on a CPU (cpu/matmul.py)."""

import torch
from torch import Tensor, nn

from lance_quant.cpu import matmul


class Linear(nn.Linear):
    """nn.Linear that takes the faster library for float32 on a CPU where nothing needs a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():  # matmul has no gradient and reads /proc
            return super().forward(x)
        return matmul.linear(x, self.weight, self.bias)
