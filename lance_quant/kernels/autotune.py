"""INT4 on CUDA where comfy-kitchen is there: its kernel or ours in Triton, whichever is faster, found out by trying.

Which one that is depends on the GPU, the shape and the number of rows, and nobody has measured it. So the first call of
a kind runs both on its own weight, a few times each, and the process keeps to the faster one. Times of neighbours on a
busy GPU differ by a few percent from try to try; comfy-kitchen must win by MARGIN, so that what is about equally fast
is computed by the same kernel in every run. `--kernel triton` and `--kernel comfy_kitchen` try nothing.

While a CUDA graph is recorded nothing can be timed, and Triton computes what was not tried before. (The decoding loop
runs every step before it records one.)
"""

import functools
import logging
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from lance_quant.formats.base import Codec, PackedWeight
from lance_quant.kernels import comfy_kitchen, triton_w4a16
from lance_quant.kernels.ops import define, parts_of

log = logging.getLogger("lance_quant")

MARGIN = 0.9  # of the preferred one's time
_WARM_UPS, _TURNS = 3, 10


class Fastest(comfy_kitchen.ComfyKitchen):
    """See kernels.Kernel; it can serve what both can."""

    name = "triton or comfy_kitchen"

    def linear(self, x: Tensor, q: PackedWeight, codec: Codec, bias: Tensor | None) -> Tensor:
        """See kernels.Kernel."""
        return torch.ops.lance_quant.fastest_linear(x, q.packed, *parts_of(q), bias, codec.group_size)


class Race:
    """Functions that compute the same, and which of them is the fastest for a kind of call.

    Args:
        contestants: by name; the first is preferred.
        seconds: times a call.
        may_time: whether a call can be timed now.
    """

    def __init__(self, contestants: dict[str, Callable[..., Tensor]], seconds: Callable[[Callable[[], object]], float],
                 may_time: Callable[[], bool]):
        self._contestants, self._seconds, self._may_time = contestants, seconds, may_time
        self._preferred = next(iter(contestants))
        self._won: dict[Hashable, str] = {}

    def run(self, kind: Hashable, *args: object) -> Tensor:
        """What a call gives, by the winner for its kind; the first call of a kind finds that out."""
        name = self._won.get(kind)
        if name is None:
            name = self._preferred
            if self._may_time():
                name = self._won[kind] = self._fastest(kind, args)
        return self._contestants[name](*args)

    def _fastest(self, kind: Hashable, args: tuple) -> str:
        times = {name: self._time(name, kind, functools.partial(function, *args))
                 for name, function in self._contestants.items()}
        best = min(times, key=times.get)
        if not times[best] < MARGIN * times[self._preferred]:
            best = self._preferred
        log.info("%s: %s is taken (%s)", kind, best, ", ".join(f"{name} {1e6 * time:.0f} us"
                                                              for name, time in times.items()))
        return best

    def _time(self, name: str, kind: Hashable, call: Callable[[], object]) -> float:
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


_RACE = Race({"triton": triton_w4a16.compute, "comfy_kitchen": comfy_kitchen.compute}, _gpu_seconds,
             lambda: not torch.cuda.is_current_stream_capturing())


def compute(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, row_scale: Tensor | None,
            bias: Tensor | None, group_size: int) -> Tensor:
    """[rows, in] -> [rows, out] by the faster kernel for so many rows, up to the next power of two."""
    weight = packed, scale, zero, row_scale, bias, group_size
    rows, (n_out, half) = x.shape[0], packed.shape
    if not 0 < rows <= comfy_kitchen.ROWS:  # the same in both
        return triton_w4a16.compute(x, *weight)
    at_most = 1 << (rows - 1).bit_length()
    return _RACE.run(f"INT4 {2 * half} -> {n_out} for up to {at_most} rows in {x.dtype} on {x.device}", x, *weight)


define("fastest_linear", compute, "CUDA")
