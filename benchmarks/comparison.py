"""Side-by-side timing: all ways to compute the same take turns in one process, and the median of the rounds counts.

What the benchmarks of decoding and denoising share. A busy machine is then unfair to no way, and only ratios of one run
are ever reported.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.random_lance import FORMATS, REAL_LAYERS, compute_dtype
from lance_quant.cli import script
from lance_quant.evaluation.run_folder import device_name, versions
from lance_quant.inference.device import device_of, dtype_of

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Comparison:
    """What is compared, how large it is, and how it is timed.

    formats: of the linears, keys of random_lance.FORMATS
    baseline: the format that the others are compared with; always measured, and first
    layers: decoder layers, of 36
    dtype: what packed formats compute in
    compiled: also the steps that --compile makes
    clock: wall, or cpu, the processor time of this process
    """

    formats: tuple[str, ...]
    baseline: str
    layers: int
    rounds: int
    device: torch.device
    dtype: torch.dtype
    compiled: bool = False
    clock: str = "wall"

    @property
    def ordered(self) -> list[str]:
        """The formats, the baseline first."""
        return list(dict.fromkeys([self.baseline, *self.formats]))

    def dtype_of(self, form: str) -> torch.dtype:
        """What a format computes in."""
        return compute_dtype(form, self.dtype)

    def now(self) -> float:
        """The clock in seconds, after the device has finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()
        return CLOCKS[self.clock]()

    def seconds(self, run: Callable[[], object]) -> float:
        """How long a call takes."""
        start = self.now()
        run()
        return self.now() - start

    def medians(self, runs: Sequence[Callable[[], float]]) -> list[float]:
        """Median over the rounds of what each run returns, its own seconds. The runs take turns, after a warm-up."""
        for run in runs:
            run()
        rounds = [[run() for run in runs] for _ in range(self.rounds)]
        return [statistics.median(column) for column in zip(*rounds, strict=True)]

    def whole(self, measured: float, rest: float, layer: float) -> float:
        """What 36 layers take: as measured, or computed from one layer."""
        return measured if self.layers == REAL_LAYERS else rest + REAL_LAYERS * layer

    def how(self, rest: str) -> str:
        """Where the figure of 36 layers comes from."""
        return "measured" if self.layers == REAL_LAYERS else f"computed: {rest} + {REAL_LAYERS} x layer"

    def facts(self) -> dict[str, object]:
        """What stands in the result beside the figures."""
        return {"device": device_name(self.device), "layers": self.layers, "clock": self.clock,
                "packed_dtype": str(self.dtype).removeprefix("torch."), "rounds": self.rounds, "versions": versions()}


def add_comparison(parser: argparse.ArgumentParser, layers: int, rounds: int) -> None:
    """The flags of a Comparison; the defaults are the benchmark's."""
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["float32", "bfloat16", "int4", "nvfp4"],
                        help="of the linears; packed ones compute in --dtype")
    parser.add_argument("--baseline", choices=["bfloat16", "float32"], default="bfloat16",
                        help="the format that the others are compared with; always there")
    parser.add_argument("--layers", type=int, default=layers, help="decoder layers, of 36")
    parser.add_argument("--rounds", type=int, default=rounds, help="rounds; the median counts")
    parser.add_argument("--compile", action="store_true", help="also the compiled steps, warm-up not counted")
    parser.add_argument("--clock", choices=CLOCKS, default="wall",
                        help="cpu: processor time instead, for one thread on a machine with other work")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    script.add_device(parser)


def comparison_of(args: argparse.Namespace) -> Comparison:
    """What `add_comparison`'s flags mean; sets torch's threads."""
    torch.set_num_threads(args.threads)
    device = device_of(args.device)
    return Comparison(tuple(args.formats), args.baseline, args.layers, args.rounds, device,
                      dtype_of(args.dtype, device), args.compile, args.clock)
