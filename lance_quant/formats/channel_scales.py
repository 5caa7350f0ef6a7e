"""channel_scales.sft: what a conversion moved between linears, beside a packed folder's own files.

AWQ divides the channels between two linears by scales and multiplies the weights behind them, so a packed linear reads
other inputs and gives other outputs than the float one of its name. Whatever is to go beside a packed linear and was
made for the float one (a LoRA) needs these, float32:

    NORM.column, LINEAR.column    [in]   float input = packed input x column, of the linears behind a norm and of o_proj
                                         and down_proj
    LINEAR.row                    [out]  packed output = float output / row, of v_proj and up_proj

What is not listed was not moved. The packed file and its meta are the same with and without this file. It is a
safetensors file under another ending, so that a packed folder has one file of weights.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lance_quant.errors import InputError
from lance_quant.formats import layout
from lance_quant.storage.tensor_file import TensorFile, require_finite

FILE = "channel_scales.sft"


def load(folder: Path) -> dict[str, Tensor] | None:
    """The scales of a packed folder, float32 [in] or [out] by name; None where it has no such file.

    Raises:
        InputError: it holds anything but positive numbers.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    with TensorFile(path) as file:
        found = {name: file.read(name, torch.float32) for name in file.specs}
    for name, scale in found.items():
        require_finite(scale, f"{path}: {name}")
        if scale.dim() != 1 or not bool((scale != 0).all()):
            raise InputError(f"{path}: {name} must be a row of numbers other than 0; pack the folder again")
    return found


def column_of(linear: str, scales: Mapping[str, Tensor]) -> Tensor | None:
    """[in], by which inputs of a packed linear are multiplied to be those of the float one; None: they are."""
    own = scales.get(f"{linear}.column")
    norm = None if own is not None else norm_of(linear)
    return own if norm is None else scales.get(f"{norm}.column")


def row_of(linear: str, scales: Mapping[str, Tensor]) -> Tensor | None:
    """[out], by which outputs of a float linear are divided to be those of the packed one; None: they are."""
    return scales.get(f"{linear}.row")


def norm_of(linear: str) -> str | None:
    """The norm whose output a quantizable linear reads; None for o_proj, down_proj and what is in no layer."""
    if not linear.startswith(f"{layout.LAYERS}."):
        return None
    index = int(linear.removeprefix(f"{layout.LAYERS}.").split(".")[0])
    return next((group.norm for group in layout.groups(index) if linear in group.linears), None)


def norm_columns(before: Mapping[str, Tensor], after: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    """What the norms of a layer were divided by, `NORM.column` [in] -> float32; where nothing passes a norm, 1.

    Args:
        before, after: weights by tensor name, the layer's norms [in] among them.
    """
    found = {}
    for group in layout.groups(layer):
        name = f"{group.norm}.weight"
        if group.norm is not None and name in before and name in after:
            old, new = before[name].float().cpu(), after[name].float().cpu()
            ratio = torch.where((new == 0) | (old == 0), torch.ones_like(old), old / new)
            found[f"{group.norm}.column"] = ratio
    return found
