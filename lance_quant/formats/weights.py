"""The tensors of one layer while it is worked on."""

from torch import Tensor

Weights = dict[str, Tensor]  # every tensor of one layer by its full name (layout.py), float32
