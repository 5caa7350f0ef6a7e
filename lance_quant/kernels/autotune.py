"""Autotuning: of two kernels that compute the same, take the one that is faster on this machine.

INT4 on CUDA where comfy-kitchen is installed can run on its kernel or on ours in Triton. Which is faster depends on the
GPU, the shape and the number of rows, and nobody has measured it. So the first call of a kind runs both on its own
weight, a few times each, and from then on the faster one serves. Times of neighbours on a busy GPU differ by a few
percent from try to try: comfy-kitchen must win by MARGIN, so that near ties do not depend on chance. `--kernel triton`
and `--kernel comfy_kitchen` time nothing.

Winners are kept in FILE in the user's cache folder (~/.cache/lance-quant), so a machine decides once and every process
after that rounds alike. A kind is the device's name, the versions of the kernels, shape, dtype and rows up to the next
power of two: another GPU or another version decides anew. Delete the file to decide again. Where it cannot be written,
the process decides for itself.

While a CUDA graph is recorded nothing can be timed, and Triton computes what was not timed before. (The decoding loop
runs every step before it records one.)
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lance_quant.formats.base import Codec
from lance_quant.formats.weights import PackedWeight
from lance_quant.kernels import comfy_kitchen, triton_w4a16
from lance_quant.kernels.ops import define, parts_of
from lance_quant.storage.user_cache import user_cache

log = logging.getLogger("lance_quant")

MARGIN = 0.9  # of the preferred one's time
FILE = "autotune.json"
_WARM_UPS, _TURNS = 3, 10


class Autotuned(comfy_kitchen.ComfyKitchen):
    """The faster of Triton's and comfy-kitchen's kernel; it serves what both can."""

    name = "triton or comfy_kitchen"

    def linear(self, x: Tensor, q: PackedWeight, codec: Codec, bias: Tensor | None) -> Tensor:
        """Multiply: activations [rows, in], weight [out, in], bias [out] or None -> [rows, out] in the dtype of `x`."""
        return torch.ops.lance_quant.autotuned_linear(x, q.packed, *parts_of(q), bias, codec.group_size)


class Winners:
    """Kind of call -> name of its fastest kernel: a JSON file that processes share.

    Args:
        folder: gives the folder of FILE; None for none. It is asked when a winner is looked up for the first time.
    """

    def __init__(self, folder: Callable[[], Path | None] = user_cache):
        self._folder = folder
        self._known: dict[str, str] | None = None

    def get(self, kind: str) -> str | None:
        """The winner for a kind; None where none was found yet."""
        if self._known is None:
            self._known = self._read()
        return self._known.get(kind)

    def put(self, kind: str, name: str, for_all: bool) -> None:
        """Keep a winner in this process, and if it holds `for_all`, in the file beside what others have written."""
        self._known = {**(self._known or {}), kind: name}
        if for_all:
            with contextlib.suppress(OSError):  # nowhere to write: this process alone knows
                self._write({**self._read(), kind: name})

    def _read(self) -> dict[str, str]:
        folder = self._folder()
        try:
            found = json.loads((folder / FILE).read_text(encoding="utf-8")) if folder else {}
        except (OSError, ValueError):  # not there yet, or cut short by a full disk: decide anew
            return {}
        return {str(kind): str(name) for kind, name in found.items()} if isinstance(found, dict) else {}

    def _write(self, winners: dict[str, str]) -> None:
        folder = self._folder()
        if folder is None:
            return
        # A folder of its own: another process, also in another container with the same home, may be writing too.
        with tempfile.TemporaryDirectory(prefix="autotune-", dir=folder) as own:
            partial = Path(own) / FILE
            partial.write_text(json.dumps(winners, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            os.replace(partial, folder / FILE)


class Autotuner:
    """Functions that compute the same, and which of them is the fastest for a kind of call.

    Args:
        contestants: by name; the first is preferred.
        seconds: times a call.
        may_time: whether a call can be timed now.
        winners: where winners are kept.
    """

    def __init__(self, contestants: dict[str, Callable[..., Tensor]], seconds: Callable[[Callable[[], object]], float],
                 may_time: Callable[[], bool], winners: Winners):
        self._contestants, self._seconds, self._may_time = contestants, seconds, may_time
        self._preferred = next(iter(contestants))
        self._winners = winners

    def run(self, kind: str, *args: Any) -> Tensor:
        """What a call gives, [rows, out], by the winner for its kind; the first call of a kind finds that out."""
        name = self._winners.get(kind)
        if name not in self._contestants:
            name = self._preferred
            if self._may_time():
                times = {name: self._time(name, kind, functools.partial(function, *args))
                         for name, function in self._contestants.items()}
                name = self._fastest(kind, times)
                # what failed may have failed for want of memory, and shall be tried again by the next process
                self._winners.put(kind, name, for_all=all(map(math.isfinite, times.values())))
        return self._contestants[name](*args)

    def _fastest(self, kind: str, times: dict[str, float]) -> str:
        best = min(times, key=lambda name: times[name])
        if not times[best] < MARGIN * times[self._preferred]:
            best = self._preferred
        log.info("%s: %s is taken (%s)", kind, best, ", ".join(f"{name} {1e6 * time:.0f} us"
                                                              for name, time in times.items()))
        return best

    def _time(self, name: str, kind: str, call: Callable[[], object]) -> float:
        try:
            return self._seconds(call)
        except Exception as error:  # noqa: BLE001 - a foreign kernel's failure must not end the run: another one can serve
            log.warning("%s: kernel %s failed when it was tried and is not taken (%s: %s)", kind, name,
                        type(error).__name__, error)
            return float("inf")


def _gpu_seconds(call: Callable[[], object]) -> float:
    """Seconds of a call on the current stream, its launch included, as in a loop that launches one after the other."""
    for _ in range(_WARM_UPS):
        call()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(_TURNS):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / _TURNS


@functools.cache
def _kernel_versions() -> str:
    """What may change which kernel is faster: the libraries, and our own kernels' source."""
    libraries = [f"{name} {_version(name)}" for name in ("torch", "triton", "comfy-kitchen")]
    files = [Path(__file__).with_name(f"{name}.py") for name in ("triton_kernels", "triton_w4a16")]
    source = b"".join(file.read_bytes() for file in files)
    return ", ".join([*libraries, f"kernels {hashlib.sha256(source).hexdigest()[:8]}"])


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


# The one autotuner of the process: what it has timed is decided for the machine.
AUTOTUNER = Autotuner({"triton": triton_w4a16.compute, "comfy_kitchen": comfy_kitchen.compute}, _gpu_seconds,
                      lambda: not torch.cuda.is_current_stream_capturing(), Winners())


def compute(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, row_scale: Tensor | None,
            bias: Tensor | None, group_size: int) -> Tensor:
    """Multiply by the faster kernel for so many rows, up to the next power of two: [rows, in] -> [rows, out].

    Args:
        x: [rows, in] activations.
        packed: uint8 [out, in/2] codes.
        scale, zero, row_scale: of `parts_of`.
        bias: [out] or None.
    """
    weight = packed, scale, zero, row_scale, bias, group_size
    rows, (n_out, half) = x.shape[0], packed.shape
    if not 0 < rows <= comfy_kitchen.ROWS:  # the same in both
        return triton_w4a16.compute(x, *weight)
    at_most = 1 << (rows - 1).bit_length()
    kind = (f"INT4 {2 * half} -> {n_out} for up to {at_most} rows in {x.dtype} on {_device_name(x.device)} "
            f"({_kernel_versions()})")
    return AUTOTUNER.run(kind, x, *weight)


define("autotuned_linear", compute, "CUDA")
