"""Devices and compute dtypes by name: what "auto", "cuda:1" or "bfloat16" mean on this machine."""

import torch

from lance_quant.errors import InputError, require_one_of
from lance_quant.lance.settings import DTYPE_NAMES

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}


def device_of(name: str) -> torch.device:
    """The device of a name: cpu, cuda, cuda:N, mps, or auto, the fastest that there is.

    Raises:
        InputError: this machine has none such.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device {name!r} is no torch device: use cpu, cuda, cuda:N, mps or auto") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name}: this torch sees {torch.cuda.device_count()} CUDA devices; use cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device mps: this torch sees no Apple GPU; use cpu")
    if device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"device {name!r} is not supported: use cpu, cuda, cuda:N, mps or auto")
    return device


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype of a name; auto is bfloat16 on a GPU, as in the official code, and float32 on a CPU.

    Raises:
        InputError: there is none of that name.
    """
    require_one_of("dtype", name, ("auto", *DTYPES))
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return DTYPES[name]
