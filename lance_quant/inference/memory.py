"""Peak memory of this process, on the host and on a GPU, as far as the system tells."""

import contextlib
import importlib
import sys
from pathlib import Path
from types import ModuleType

import torch

_STATUS = Path("/proc/self/status")


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` start anew (for the host on Linux only)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets VmHWM, see proc(5)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, int | None]:
    """Highest use since reset_peak_memory in bytes: of the process on the host (None where the system does not tell),
    and of torch on a CUDA device."""
    peak = {"host": _host_peak()}
    if device.type == "cuda":
        peak["cuda"] = torch.cuda.max_memory_allocated(device)
    return peak


def _host_peak() -> int | None:
    if _STATUS.is_file():
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)
    resource = _module("resource")  # not on Windows
    if resource is not None:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    psutil = _module("psutil")  # ComfyUI has it
    return None if psutil is None else getattr(psutil.Process().memory_info(), "peak_wset", None)


def _module(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
