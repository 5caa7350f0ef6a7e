"""Memory of this process and of its devices, as far as the system tells: peaks, and what is free."""

import contextlib
import importlib
import sys
from pathlib import Path
from types import ModuleType

import torch

_STATUS = Path("/proc/self/status")
_SYSTEM = Path("/proc/meminfo")
CONTEXT = 500_000_000  # bytes, of a CUDA context; and of a process whose size the system does not tell


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


def resident_memory() -> int | None:
    """Bytes of this process that are in memory now (on Linux and where psutil is)."""
    found = _line(_STATUS, "VmRSS")
    psutil = _module("psutil") if found is None else None
    return found if psutil is None else psutil.Process().memory_info().rss


def process_memory(device: torch.device) -> int:
    """Bytes that a process takes on a device before a model is there: on the host what this one has, once it has
    imported everything; on a GPU a context and the libraries' workspaces, of half a gigabyte or so."""
    return CONTEXT if device.type != "cpu" else resident_memory() or CONTEXT


def free_memory(device: torch.device) -> int | None:
    """Bytes that a new process could have on a device: free and reclaimable ones of the host, free ones of a GPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    found = _line(_SYSTEM, "MemAvailable")
    psutil = _module("psutil") if found is None else None
    return found if psutil is None else psutil.virtual_memory().available


def _line(file: Path, name: str) -> int | None:
    """Bytes that a line of a file in /proc says."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)


def _host_peak() -> int | None:
    if _STATUS.is_file():
        return _line(_STATUS, "VmHWM")
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
