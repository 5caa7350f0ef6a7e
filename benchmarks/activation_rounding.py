#!/usr/bin/env python3
"""What rounding activations to NVFP4 costs in quality, beside what rounding weights has cost already, on lance-nano.

    python -m benchmarks.activation_rounding
    python -m benchmarks.activation_rounding --variant like_lance      # or outliers

Reads   lance_nano/checkpoint (or --model_path)
Writes  nothing that stays; prints a table in Markdown and, as the last line, JSON
Needs   1.5 GB of memory; on one CPU core about 15 minutes

Every NVFP4 model runs twice: with `--kernel reference` (weights in 4 bits) and with `--kernel nvfp4_w4a4` (activations
too; simulated where there are no FP4 tensor cores, with the same products). Errors, rates and methods as in
fidelity_nano.py, from one seed.
"""

import argparse
import json
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import fidelity_nano
from lance_nano import evaluate, export, outliers
from lance_quant.cli import script

METHODS = ("rtn", "ours_diagonal")
KERNELS = {"weights": "reference", "weights and activations": "nvfp4_w4a4"}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    parser.add_argument("--model_path", type=Path, default=fidelity_nano.MODEL, help="a lance-nano folder")
    parser.add_argument("--variant", choices=("plain", *fidelity_nano.VARIANTS), default="plain",
                        help="with outliers put in, see lance_nano/outliers.py: its defaults, or as large as Lance's")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="how weights are rounded")
    parser.add_argument("--seed", type=int, default=0, help="of the samples and the noise")
    parser.add_argument("--questions", type=int, default=64, help="that calibrate")
    parser.add_argument("--captions", type=int, default=16, help="that calibrate")
    parser.add_argument("--n", type=int, default=40, help="held-out questions, and captions")
    parser.add_argument("--traced", type=int, default=8, help="captions of those whose velocities are compared")
    parser.add_argument("--steps", type=int, default=30, help="denoising steps")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace) -> dict[tuple[str, str], dict[str, Any]]:
    """Method and what is rounded -> what fidelity_nano.distance found."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        work, model = Path(folder), args.model_path
        if args.variant != "plain":
            flags = fidelity_nano.VARIANTS[args.variant]
            outliers.main(["--model_path", str(model), "--out", str(work / "variant"), *flags])
            model = work / "variant" / export.MODEL_FOLDER
        stats = fidelity_nano.calibrate(model, work, args.seed, args)
        baseline = fidelity_nano.baseline_of(evaluate.load(model, None, "cpu", "float32"), args.seed, args)
        for method in args.methods:
            packed = fidelity_nano.pack(model, work, "nvfp4", method, stats)
            for rounded, kernel in KERNELS.items():
                pipeline = evaluate.load(model, packed, "cpu", "float32", kernel)
                found[method, rounded] = fidelity_nano.distance(pipeline, baseline, args.seed, args)
                script.log.info("%s, %s: KL %.3e, velocity %.4f", method, rounded, found[method, rounded]["kl"],
                             statistics.fmean(found[method, rounded]["velocity"]))
    return found


def row(method: str, rounded: str, found: dict[str, Any]) -> dict[str, Any]:
    """One model, as numbers."""
    return {"method": method, "rounded": rounded, "kl": found["kl"], "velocity": statistics.fmean(found["velocity"]),
            **{name: found[name].value for name in ("answers", "pictures")}}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = ["| weights by | rounded to NVFP4 | KL per token | velocity error | exact answers | recognised pictures |",
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
    print(json.dumps({**settings, "model": args.model_path.name, "cpu": platform.processor() or platform.machine(),
                      "torch": torch.__version__, "models": rows}))


if __name__ == "__main__":
    script.run(main)
