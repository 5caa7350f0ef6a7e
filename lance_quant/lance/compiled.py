"""torch.compile and CUDA graphs for the steps that recur: what lies around the attention of every layer is compiled,
and on CUDA a decoded token is one graph.

Only what recurs is compiled, that is decoding and denoising steps: what lies before and after the attention of a layer
(`before` and `after` of mot.DecoderLayer), whose code serves all layers, all steps and, since they do not see the
cache, all lengths of it. A compilation of the whole step would fuse no more, since attention is a library call either
way, and take 36 times as long. On CUDA, a decoding step as a whole is recorded as a graph, so that one launch runs it.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch

from lance_quant.lance.mot import Lance
from lance_quant.lance.steps import LayerParts, Loop, Steps

log = logging.getLogger("lance_quant")

_ROOM = 512  # tokens by which a decoding's memory is rounded up, so that it serves other requests too
_WARM_UPS = 3  # steps before a graph is recorded: libraries and kernels set themselves up in the first


def compile_steps(model: Lance) -> bool:
    """Compile a loaded model's steps when they first run; False, with a warning, where this machine has no compiler."""
    try:
        torch.compile(_probe)(torch.ones(8, device=model.device))
    except Exception as error:  # noqa: BLE001 - whatever a compiler's absence looks like, running without is possible
        reason = (str(error).strip() or "it gave no reason").splitlines()[0]
        log.warning("--compile: nothing can be compiled here, the run goes on without (%s: %s). A C++ compiler "
                    "(CPU) or triton (CUDA) is needed", type(error).__name__, reason)
        return False
    for module in model.modules():
        settle = getattr(module, "settle", None)
        if settle is not None:  # packed linears choose a kernel when they first run, which cannot be compiled
            settle()
    model.steps = CompiledSteps(model)
    return True


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + 1


class CompiledSteps(Steps):
    """The compiled steps of one model, and the last decoding loop, kept warm for the next request."""

    def __init__(self, model: Lance):
        self.seconds: dict[str, float] = {}
        self.layers = [LayerParts(torch.compile(layer.before), torch.compile(layer.after))
                       for layer in model.layers()]
        self._device = model.device
        self._kept: tuple[Hashable, Any, Callable[[], None]] | None = None

    @contextlib.contextmanager
    def first(self, what: str) -> Iterator[None]:
        """Tell the user that the block, if it is the first of its kind, compiles, and keep its seconds."""
        if what in self.seconds:
            yield
            return
        log.info("compiling the %s ...", what)
        start = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[what] = time.perf_counter() - start
        log.info("compiled the %s in %.1f s", what, self.seconds[what])

    def loop(self, make: Callable[[int, int], Loop], room: int, longest: int,
             kind: Hashable) -> tuple[Loop, Callable[[], None]]:
        """As Steps.loop, with its step compiled and warm."""
        capacity, longest = (-(-size // _ROOM) * _ROOM for size in (room, longest))
        key = (capacity, longest, kind)
        if self._kept is None or self._kept[0] != key:
            self._kept = None  # its memory first
            made = make(capacity, longest)
            with self.first(f"decoding step, {capacity} tokens"):
                step = _graph(made.step, self._device) if self._device.type == "cuda" else made.step
                step()  # it is not started: what it decodes means nothing
            self._kept = key, made, step
        return self._kept[1:]


def _graph(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """A step that touches the same memory of a GPU every time, recorded as a CUDA graph."""
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return replay
