"""The definition as a kernel: dequantize the whole weight at every call (of an 8-bit head a block of rows), then
F.linear."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lance_quant.formats import int8
from lance_quant.formats.base import Codec
from lance_quant.formats.blocks import dequantize_to
from lance_quant.formats.weights import PackedWeight
from lance_quant.kernels.base import CALLS


class Reference:
    """The definition as a kernel."""

    name = "reference"

    def refusal(self, codec: Codec, n_in: int, dtype: torch.dtype, device: torch.device) -> str | None:
        """None: it serves every layer."""
        return None

    def linear(self, x: Tensor, q: PackedWeight, codec: Codec, bias: Tensor | None) -> Tensor:
        """Multiply: activations [rows, in], weight [out, in], bias [out] or None -> [rows, out] in the dtype of `x`."""
        CALLS.add("reference")
        return F.linear(x, dequantize_to(codec, q, x.dtype), bias)

    def int8_refusal(self, n_in: int, dtype: torch.dtype, device: torch.device) -> str | None:
        """None: it serves every layer."""
        return None

    def int8_linear(self, x: Tensor, q: int8.Int8Weight) -> Tensor:
        """Multiply: activations [rows, in], weight [out, in] -> [rows, out] in the dtype of `x`."""
        CALLS.add("reference int8")
        return int8.linear(x, q)
