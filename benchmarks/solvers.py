#!/usr/bin/env python3
"""Compare the solvers by how far few steps land from many: relative error of the final latents, mean over prompts.

    python -m benchmarks.solvers
    python -m benchmarks.solvers --model_path lance_nano/checkpoint/Lance_nano --video_height 112 --video_width 112

Reads   a model folder (default: the golden checkpoint, whose weights are random) and a t2i sample file
Writes  nothing; the last line on stdout is the result as JSON. The reference is Euler with --reference steps; guidance,
        shift and noise are the official ones throughout
Needs   (reference + 2 x the sum of --steps) x up to 2 calls of the model per prompt
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from lance_quant.cli import script
from lance_quant.evaluation.metrics import relative_error
from lance_quant.inference.device import device_of, dtype_of
from lance_quant.lance.config import LancePaths
from lance_quant.lance.generation import Sampling
from lance_quant.lance.media import samples
from lance_quant.lance.runtime import Runtime

GOLDENS = Path(__file__).parent.parent / "tests" / "goldens"
SOLVERS = ("euler", "ab2")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    parser.add_argument("--model_path", type=Path, default=GOLDENS / "checkpoint" / "Lance_3B", help="Lance folder")
    parser.add_argument("--example_json", type=Path, default=GOLDENS / "inputs" / "t2i.json", help="t2i sample file")
    parser.add_argument("--limit", type=int, default=4, help="prompts")
    parser.add_argument("--video_height", type=int, default=96, help="height of the pictures")
    parser.add_argument("--video_width", type=int, default=128, help="width of the pictures")
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 12, 16, 20, 30, 60], help="numbers of steps")
    parser.add_argument("--reference", type=int, default=960, help="Euler steps of the reference")
    script.add_device(parser)
    return parser.parse_args(argv)


def errors(pipeline: Runtime, prompt: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """Solver -> relative error of the final latents for every number of steps, of one prompt."""

    def latents(solver: str, steps: int) -> torch.Tensor:
        sampling = replace(Sampling(), solver=solver, num_timesteps=steps)
        denoiser = pipeline.denoiser(prompt, args.video_height, args.video_width, sampling)
        return pipeline.sample(denoiser)

    reference = latents("euler", args.reference)
    return {solver: [relative_error(latents(solver, steps), reference) for steps in args.steps] for solver in SOLVERS}


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    args = parse_args(argv)
    device = device_of(args.device)
    pipeline = Runtime.load(LancePaths.find(args.model_path), device, dtype_of(args.dtype, device))
    prompts = samples.load("t2i", args.example_json)[:args.limit]
    found = [errors(pipeline, prompt.text, args) for prompt in prompts]
    means = {solver: [sum(one[solver][index] for one in found) / len(found) for index in range(len(args.steps))]
             for solver in SOLVERS}
    print("steps  " + "".join(f"{solver:>12}" for solver in SOLVERS))
    for index, steps in enumerate(args.steps):
        print(f"{steps:>5}  " + "".join(f"{means[solver][index]:>12.4f}" for solver in SOLVERS))
    print(json.dumps({"steps": args.steps, "relative_error": means, "reference_steps": args.reference,
                      "prompts": len(prompts), "model": str(args.model_path)}))


if __name__ == "__main__":
    script.run(main)
