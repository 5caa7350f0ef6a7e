#!/usr/bin/env python3
"""Where the bits go: INT4 with one group size, against a budget of the same size, on lance-nano.

    python -m benchmarks.bits_budget --seeds 0 1 2

Reads   lance_nano/checkpoint (or --model_path)
Writes  nothing that stays; prints a table in Markdown and, as the last line on stdout, JSON: per variant its bits per
        quantized weight, bytes of the file, linears by format, `velocity`, relative error on the float model's own
        trajectories, and `kl`, nats per token on its own answers, both on held-out samples, with every seed's values
Needs   1.5 GB of memory per worker; on one CPU core about 6 minutes per seed

A seed decides which samples calibrate and which are held out, and the noise of the pictures. Rounding is from
statistics ("nearest") or from captures ("gptq"). A budget's sensitivity is the relative output error, from statistics,
or what captures say (lance_quant/calibration/weight_sensitivity.py). head8: the output head and the token embedding in
8 bits.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import lance_nano_harness as harness
from benchmarks.lance_nano_harness import CPU, Baseline, Plan, captures_in
from lance_quant.calibration import weight_sensitivity
from lance_quant.calibration.activation_stats import ActStats
from lance_quant.calibration.layer_inputs import layer_inputs_of
from lance_quant.cli import script
from lance_quant.formats import layout
from lance_quant.formats.int4 import Int4
from lance_quant.formats.packed_folder import PackedFolder
from lance_quant.formats.weights import Weights
from lance_quant.lance.generation import Sampling
from lance_quant.lance.runtime import Runtime
from lance_quant.methods import bit_allocation, convert
from lance_quant.methods.conversion import Conversion
from lance_quant.storage.tensor_file import Checkpoint


@dataclass(frozen=True)
class Variant:
    """One packed model: `gptq` rounds from captures; `measured` takes a budget's sensitivity from them."""

    group_size: int = 64
    gptq: bool = False
    budget: float | None = None
    measured: bool = False
    head_bits: int = 16

    def __str__(self) -> str:
        sensitivity = "measured" if self.measured else "output error"
        size = f"g{self.group_size}" if self.budget is None else f"budget {self.budget:g}, {sensitivity}"
        return f"{size}{', head8' if self.head_bits == 8 else ''}, {'gptq' if self.gptq else 'nearest'}"


def variants(budgets: list[float], roundings: list[str]) -> list[Variant]:
    """What is compared."""
    out = []
    for gptq in (rounding == "gptq" for rounding in roundings):
        out += [Variant(size, gptq) for size in (64, 32)]
        out += [Variant(64, gptq, bits, measured) for bits in budgets for measured in (False, True)]
        out.append(Variant(64, gptq, head_bits=8))
    return out


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    harness.add_model(parser, variant=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="see above")
    harness.add_plan(parser, Plan(questions=64, captions=24, n=60, traced=12, steps=10))
    parser.add_argument("--roundings", nargs="+", choices=("nearest", "gptq"), default=["nearest", "gptq"],
                        help="from statistics, or from captures")
    parser.add_argument("--budgets", type=float, nargs="+", default=[4.375, 4.75],
                        help="bits per quantized weight: those of group sizes 64 and 32")
    parser.add_argument("--workers", type=int, default=1, help="seeds measured side by side")
    args = parser.parse_args(argv)
    harness.plan_of(args)
    return args


class Shared:
    """Sensitivities that are measured once for all variants: scales, and so weights, are the same."""

    def __init__(self, sensitivity: bit_allocation.Sensitivity):
        self._sensitivity, self._layers = sensitivity, {}

    def of_layer(self, index: int, weights: Weights) -> Mapping[str, torch.Tensor]:
        """Those of a layer, as bit_allocation.Sensitivity."""
        if index not in self._layers:
            self._layers[index] = self._sensitivity.of_layer(index, weights)
        return self._layers[index]


def pack(variant: Variant, work: Path, stats: ActStats, model: Path, sensitivity: Shared) -> Path:
    """The variant's folder."""
    captures, out = captures_in(work), work / "packed" / str(variant)
    layer_inputs = layer_inputs_of(model, captures, CPU) if variant.gptq else None
    conversion = Conversion(Int4(variant.group_size), bits_budget=variant.budget, head_bits=variant.head_bits,
                            progress=False)
    with Checkpoint(model) as source:
        convert.quantize_checkpoint(source, stats, out, conversion, layer_inputs,
                                    sensitivity if variant.measured else None)
    return out


def describe(folder: Path) -> dict[str, object]:
    """Size of a packed model, and its linears by expert, kind and format."""
    with PackedFolder(folder) as packed:
        formats = {name: f"g{spec.group_size}" for name, spec in packed.linears.items()}
        formats |= dict.fromkeys(packed.kept, "bf16")
        count = Counter(f"{layout.expert_of(name)} {layout.kind_of(name)} {size}" for name, size in formats.items())
        return {"bits": packed.bits_per_weight, "bytes": packed.facts()["bytes"],
                "formats": dict(sorted(count.items()))}


def measure(seed: int, args: argparse.Namespace) -> dict[str, dict]:
    """Variant -> size and distances, with one seed."""
    torch.set_num_threads(1)
    out, plan, model = {}, harness.plan_of(args), args.model_path
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        stats = harness.calibrate(model, work, seed, plan.calibration, plan.sampling)
        baseline = harness.baseline_of(harness.load(model), seed, plan)
        sensitivity = Shared(weight_sensitivity.sensitivity_of(model, captures_in(work), CPU))
        for variant in variants(args.budgets, args.roundings):
            packed = pack(variant, work, stats, model, sensitivity)
            found = distance(harness.load(model, packed), baseline, plan.sampling)
            out[str(variant)] = {**describe(packed), **found}
            print(f"seed {seed}  {variant!s:<36} velocity {found['velocity']:.4f}  KL {found['kl']:.3e}",
                  file=sys.stderr)
    return out


@torch.no_grad()
def distance(runtime: Runtime, baseline: Baseline, sampling: Sampling) -> dict[str, float]:
    """How far a model is from the baseline on the baseline's own tokens and trajectories; rates are not counted."""
    requests = harness.requests_of(runtime, baseline.asked)
    traced = [caption.text for caption in baseline.captions[:len(baseline.traces)]]
    errors = harness.velocity_errors(runtime, traced, baseline.traces, sampling)
    return {"velocity": statistics.fmean(error for steps in errors for error in steps),
            "kl": harness.token_kl(runtime, requests, baseline.ids, baseline.logprobs).mean().item()}


def summary(runs: list[dict[str, dict]]) -> list[dict[str, object]]:
    """One row per variant, means over the seeds and every seed's values."""
    rows = []
    for name in runs[0]:
        each = [run[name] for run in runs]
        rows.append({"variant": name, "bits": max(row["bits"] for row in each), "bytes": each[0]["bytes"],
                     "formats": [row["formats"] for row in each]}
                    | {key: statistics.fmean(row[key] for row in each) for key in ("velocity", "kl")}
                    | {f"{key}_by_seed": [row[key] for row in each] for key in ("velocity", "kl")})
    return rows


def table(rows: list[dict]) -> str:
    """The summary in Markdown, with the range over the seeds."""
    lines = ["| variant | bits | file, bytes | velocity | KL |", "|---|---|---|---|---|"]
    for row in rows:
        cells = [f"{row[key]:.4g} ({min(row[f'{key}_by_seed']):.3g} .. {max(row[f'{key}_by_seed']):.3g})"
                 for key in ("velocity", "kl")]
        lines.append(f"| {row['variant']} | {row['bits']:.4f} | {row['bytes']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(argv)
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        rows = summary(pool.starmap(measure, [(seed, args) for seed in args.seeds], chunksize=1))
    print(table(rows))
    print(json.dumps({"seeds": args.seeds, **harness.machine(args.model_path), "questions": args.questions,
                      "captions": args.captions, "n": args.n, "traced": args.traced, "steps": args.steps,
                      "variants": rows}))


if __name__ == "__main__":
    script.run(main)
