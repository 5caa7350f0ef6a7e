"""Names of the kernels for packed linears, as --kernel takes them. No torch in here: --help shows them."""

from typing import Literal, get_args

KernelChoice = Literal["auto", "reference", "native", "triton", "comfy_kitchen", "native_w4a8", "nvfp4_w4a4"]
KERNEL_CHOICES: tuple[KernelChoice, ...] = get_args(KernelChoice)
Mode = Literal["ondemand", "cached"]  # compute on the packed bytes, or unpack them once
