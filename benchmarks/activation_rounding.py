#!/usr/bin/env python3
"""What rounding activations costs in quality, beside what rounding weights has cost already, on lance-nano.

    python -m benchmarks.activation_rounding
    python -m benchmarks.activation_rounding --variant like_lance      # or outliers
    python -m benchmarks.activation_rounding --kernel native_w4a8 --format int4

Reads   lance_nano/checkpoint (or --model_path)
Writes  nothing that stays; prints a table in Markdown and, as the last line, JSON
Needs   1.5 GB of memory; on one CPU core about 15 minutes

Every 4-bit model runs twice: with `--kernel reference` (weights rounded) and with a kernel that rounds activations too:
`nvfp4_w4a4` (to NVFP4; simulated where there are no FP4 tensor cores, with the same products) or `native_w4a8` (to int8
per token, calls of more than 48 rows). Errors, rates and methods as in fidelity_nano.py, from one seed.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import lance_nano_harness as harness
from benchmarks.lance_nano_harness import Distance, Plan
from lance_quant.cli import script
from lance_quant.errors import InputError
from lance_quant.formats.base import Codec
from lance_quant.formats.int4 import Int4
from lance_quant.formats.nvfp4 import Nvfp4

METHODS = ("rtn", "ours_diagonal")
KERNELS = ("nvfp4_w4a4", "native_w4a8")
CODECS: dict[str, Codec] = {"nvfp4": Nvfp4(), "int4": Int4(64)}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    harness.add_model(parser)
    parser.add_argument("--methods", nargs="+", choices=METHODS,
                        help="how weights are rounded; default: both, or for native_w4a8 ours_diagonal")
    parser.add_argument("--kernel", choices=KERNELS, default=KERNELS[0], help="what rounds activations")
    parser.add_argument("--format", choices=CODECS, default="nvfp4", help="of the weights; nvfp4_w4a4: nvfp4")
    parser.add_argument("--seed", type=int, default=0, help="of the samples and the noise")
    harness.add_plan(parser, Plan(questions=64, captions=16, n=40, traced=8))
    args = parser.parse_args(argv)
    harness.plan_of(args)
    fitting = METHODS if args.kernel == "nvfp4_w4a4" else METHODS[1:]
    args.methods = args.methods or list(fitting)
    if not set(args.methods) <= set(fitting):
        raise InputError("native_w4a8 leaves linears without scales at 16 bits, and rtn has none: take --methods "
                         "ours_diagonal")
    if args.kernel == "nvfp4_w4a4" and args.format != "nvfp4":
        raise InputError(f"--kernel nvfp4_w4a4 multiplies NVFP4 weights, not {args.format}: take --format nvfp4")
    return args


def measure(args: argparse.Namespace) -> dict[tuple[str, str], Distance]:
    """Method and what is rounded -> how far such a model is off."""
    found, plan = {}, harness.plan_of(args)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = harness.variant_of(args.model_path, args.variant, work)
        stats = harness.calibrate(model, work, args.seed, plan.calibration, plan.sampling, captured=False)
        baseline = harness.baseline_of(harness.load(model), args.seed, plan)
        for method in args.methods:
            packed = harness.pack(model, work / f"{args.format} {method}", CODECS[args.format], method, stats)
            for rounded, kernel in (("weights", "reference"), ("weights and activations", args.kernel)):
                one = harness.distance(harness.load(model, packed, kernel), baseline, args.seed, plan)
                found[method, rounded] = one
                script.log.info("%s, %s: KL %.3e, velocity %.4f", method, rounded, one.kl,
                                statistics.fmean(one.velocity))
    return found


def row(method: str, rounded: str, found: Distance) -> dict[str, Any]:
    """One model, as numbers."""
    return {"method": method, "rounded": rounded, "kl": found.kl, "velocity": statistics.fmean(found.velocity),
            "answers": found.answers.value, "pictures": found.pictures.value}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = ["| weights by | rounded | KL per token | velocity error | exact answers | recognised pictures |",
             "|---|---|---|---|---|---|"]
    lines += [f"| {one['method']} | {one['rounded']} | {one['kl']:.1e} | {one['velocity']:.3f} | "
              f"{100 * one['answers']:.1f} % | {100 * one['pictures']:.1f} % |" for one in rows]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(argv)
    rows = [row(*name, found) for name, found in measure(args).items()]
    print(table(rows))
    settings = {key: value for key, value in vars(args).items() if key != "model_path"}
    print(json.dumps({**settings, **harness.machine(args.model_path), "models": rows}))


if __name__ == "__main__":
    script.run(main)
