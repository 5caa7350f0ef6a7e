"""Packed 4-bit linear layers for any model: the public door to lance_quant.kernels.quantized_linear.

    from quantized_linear import swap_linears

    model = ...                                        # nn.Modules named as in the checkpoint, on device "meta"
    swap_linears(model, Path("Lance_3B-int4"), torch.bfloat16, "cpu")

WQLinearINT4    drop-in nn.Linear over INT4 bytes: a scale and zero point per group of inputs
WQLinearNVFP4   drop-in nn.Linear over NVFP4 bytes: a scale per 16 inputs
swap_linears    replace a model's linears by those of a packed folder, layer by layer, and fill them
merge_rows      lay packed linears that read the same input one under the other: one call instead of several
require_kernel  refuse, before anything is loaded, a --kernel that cannot run a folder on this machine
"""

from lance_quant.kernels.quantized_linear import (
    WQLinearINT4,
    WQLinearNVFP4,
    merge_rows,
    require_kernel,
    swap_linears,
)

__all__ = ["WQLinearINT4", "WQLinearNVFP4", "merge_rows", "require_kernel", "swap_linears"]
