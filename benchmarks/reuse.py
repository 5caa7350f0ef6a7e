#!/usr/bin/env python3
"""Fewer passes of the denoiser: error against compute of velocity reuse and of second-order steps, on lance-nano.

    python -m benchmarks.reuse --captions 64 --workers 2
    python -m benchmarks.reuse --captions 4 --reference 60     # a look, in a minute

Reads   lance_nano/checkpoint (or --model_path)
Writes  nothing; prints a table in Markdown and, as the last line, JSON
Needs   10 CPU seconds a caption

Every sampler draws every held-out caption from the same noise. Compute is in passes of the model (a guided step is
two), relative to the official 30 Euler steps. Errors are relative, of the final latents: against the official sampler,
whose pictures users know, and against the exact flow, which it approximates (second-order steps, --reference of them,
at shift 1). A caption counts as recognised if the recogniser finds every thing in its place.
"""

import argparse
import functools
import json
import multiprocessing
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks import lance_nano_harness as harness
from lance_nano import evaluate
from lance_nano.evaluate import Share
from lance_nano.recognise import shows
from lance_nano.scenes import SIZE
from lance_quant.cli import script
from lance_quant.evaluation.metrics import relative_error
from lance_quant.lance.generation import Sampling, computed_steps, timesteps
from lance_quant.lance.runtime import Runtime

OFFICIAL = Sampling()
SAMPLERS: dict[str, Sampling] = {
    "Euler 30, official": OFFICIAL,
    **{f"Euler 30, reuse {span}": Sampling(reuse=span) for span in (0.06, 0.08, 0.1, 0.12, 0.15)},
    **{f"ab2 30, reuse {span}": Sampling(solver="ab2", reuse=span) for span in (0.0, 0.08, 0.12)},
    **{f"Euler {steps}": Sampling(num_timesteps=steps) for steps in (16, 12)},
    **{f"ab2 {steps}, shift {shift:g}": Sampling(num_timesteps=steps, timestep_shift=shift, solver="ab2")
       for steps, shift in ((16, 3.5), (12, 1.5), (10, 1.5), (12, 1.0), (8, 1.0))},
    **{f"ab2 20, shift {shift:g}, reuse 0.12": Sampling(20, shift, solver="ab2", reuse=0.12)
       for shift in (1.5, 1.0)},
}


class Drawn(NamedTuple):
    """One caption by one sampler: relative errors of its latents, and whether the recogniser sees the caption."""

    official: float
    exact: float
    recognised: bool


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    harness.add_model(parser, variant=False)
    parser.add_argument("--captions", type=int, default=64, help="held-out captions")
    parser.add_argument("--seed", type=int, default=0, help="decides the captions and their noise")
    parser.add_argument("--reference", type=int, default=240, help="second-order steps of the exact flow")
    parser.add_argument("--workers", type=int, default=1, help="captions at a time, a process each")
    return parser.parse_args(argv)


def passes(sampling: Sampling) -> int:
    """How often the model runs on the latents of one picture: once for a computed step, twice where it is guided."""
    times = timesteps(sampling).tolist()
    return sum(2 if sampling.guided(times[number]) else 1 for number in computed_steps(sampling))


@functools.cache
def _runtime(model: str) -> Runtime:
    torch.set_num_threads(1)
    return harness.load(Path(model))


def measure(model: str, seed: int, reference: int, index: int, count: int) -> dict[str, Drawn]:
    """Every sampler on the held-out caption number `index` of `count`."""
    runtime, caption = _runtime(model), evaluate.held_out_captions(count, seed)[index]

    def latents(sampling: Sampling) -> torch.Tensor:
        return runtime.sample(runtime.denoiser(caption.text, SIZE, SIZE, sampling), seed * 1_000_003 + index)

    exact = latents(Sampling(num_timesteps=reference, timestep_shift=1.0, solver="ab2"))
    official = latents(OFFICIAL)
    found = {}
    for name, sampling in SAMPLERS.items():
        ours = latents(sampling)
        picture = np.asarray(runtime.decode(ours))
        found[name] = Drawn(relative_error(ours, official), relative_error(ours, exact), shows(caption.scene, picture))
    return found


def table(found: Sequence[dict[str, Drawn]]) -> tuple[list[str], dict[str, dict[str, object]]]:
    """Rows of Markdown, and the same numbers by sampler."""
    rows = ["| sampler | passes | of official | error against official | against the exact flow | recognised |",
            "|---|---|---|---|---|---|"]
    numbers: dict[str, dict[str, object]] = {}
    for name, sampling in SAMPLERS.items():
        drawn = [one[name] for one in found]
        official, exact = (statistics.fmean(getattr(one, part) for one in drawn) for part in ("official", "exact"))
        share = Share(sum(one.recognised for one in drawn), len(drawn))
        count = passes(sampling)
        numbers[name] = {"passes": count, "official": official, "exact": exact, "recognised": share.value}
        rows.append(f"| {name} | {count} | {count / passes(OFFICIAL):.2f} | {official:.4f} | {exact:.4f} | "
                    f"{share.right} of {share.total} |")
    return rows, numbers


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    args = parse_args(argv)
    for name in ("captions", "reference", "workers"):
        harness.require_some(name, getattr(args, name))
    one = functools.partial(measure, str(args.model_path), args.seed, args.reference, count=args.captions)
    if args.workers == 1:
        found = [one(index) for index in range(args.captions)]
    else:
        with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
            found = pool.map(one, range(args.captions), chunksize=1)
    rows, numbers = table(found)
    print("\n".join(rows))
    print(json.dumps({"samplers": numbers, "captions": args.captions, "seed": args.seed, "reference": args.reference,
                      **harness.machine(args.model_path)}))


if __name__ == "__main__":
    script.run(main)
