"""Weights in memory: the float tensors of one layer, and packed weights of either format."""

from torch import Tensor

from lance_quant.formats.int4 import Int4Weight
from lance_quant.formats.nvfp4 import Nvfp4Weight

Weights = dict[str, Tensor]  # every tensor of one layer by its full name (layout.py), float32
PackedWeight = Int4Weight | Nvfp4Weight
