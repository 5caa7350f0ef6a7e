#!/usr/bin/env python3
"""What 4 bits do to a trained Lance: the open questions, each answered on lance-nano with n scenes per seed.

    python -m benchmarks.nano_experiments tasks        # calibrate on x2t only, or on x2t and t2i?
    python -m benchmarks.nano_experiments group_size   # 128, 64 or 32 inputs per scale?
    python -m benchmarks.nano_experiments steps        # does the error compound over denoising steps?
    python -m benchmarks.nano_experiments timesteps    # calibrate on 2 timesteps or on all?

Several questions may be asked at once: what they have in common is measured once.

Reads   lance_nano/checkpoint (or --model_path, an outlier variant for instance)
Writes  nothing that stays; prints a table in Markdown per question and, as the last line, JSON
Needs   about 3 CPU-minutes per model and seed at n = 200; --workers runs them side by side

Rates are pooled over the seeds, with 95 % Wilson intervals. KL (nats per token, teacher-forced on the float model's own
answers) and velocity error (relative, on the float model's own trajectories) are means over the seeds, with their
standard deviation; they order variants whose rates are equal.
"""

import argparse
import json
import math
import multiprocessing
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks import lance_nano_harness as harness
from benchmarks.lance_nano_harness import TASKS
from lance_nano import evaluate
from lance_nano.evaluate import Share
from lance_quant.calibration.activation_stats import ActStats
from lance_quant.cli import script
from lance_quant.evaluation.metrics import relative_error
from lance_quant.formats import layout
from lance_quant.formats.base import Codec
from lance_quant.formats.int4 import Int4
from lance_quant.formats.nvfp4 import Nvfp4
from lance_quant.lance.generation import Sampling
from lance_quant.lance.runtime import Runtime
from lance_quant.lance.settings import SEED

CALIBRATION_SAMPLES = 48
TRACED = 16  # captions and questions per seed whose velocities and token distributions are compared


@dataclass(frozen=True)
class Quantized:
    """How a packed folder is made: format, method, tasks and denoising steps of the calibration."""

    codec: Literal["int4", "nvfp4"]
    method: str = "ours_diagonal"
    tasks: tuple[str, ...] = TASKS
    steps: int = 30
    group_size: int = 64

    def format(self) -> Codec:
        """The storage format."""
        return Int4(self.group_size) if self.codec == "int4" else Nvfp4()


Weights = Quantized | Literal["float", "8 bits"]  # 8 bits: the float model, rounded in memory

INT4, NVFP4 = Quantized("int4"), Quantized("nvfp4")
X2T_ONLY = {"INT4 g64, x2t only": replace(INT4, tasks=TASKS[:1]),  # gen expert rounded plainly
            "NVFP4, x2t only": replace(NVFP4, tasks=TASKS[:1])}
BOTH_TASKS = {"INT4 g64, x2t + t2i": INT4, "NVFP4, x2t + t2i": NVFP4}
TWO_STEPS = {"INT4 g64, 2 steps": replace(INT4, steps=2),  # what the published statistics saw
             "NVFP4, 2 steps": replace(NVFP4, steps=2)}
EXPERIMENTS: dict[str, Mapping[str, Weights]] = {
    "tasks": {"float": "float", **X2T_ONLY, **BOTH_TASKS},
    "group_size": {"float": "float", **{f"INT4 g{size}, {name}": replace(INT4, group_size=size, method=method)
                                        for name, method in (("published", "published"), ("ours", "ours_diagonal"))
                                        for size in (128, 64, 32)}},
    # 8 bits are the control: an error that compounds would show there too, a sixteenth as large.
    "steps": {"float": "float", "8 bits g64": "8 bits", **BOTH_TASKS},
    "timesteps": {"float": "float", **TWO_STEPS, "INT4 g64, 30 steps": INT4, "NVFP4, 30 steps": NVFP4}}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    parser.add_argument("experiments", choices=EXPERIMENTS, nargs="+", help="the questions")
    harness.add_model(parser, variant=False)
    parser.add_argument("--n", type=int, default=200, help="questions and captions per seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of scenes, captions and noise")
    parser.add_argument("--workers", type=int, default=1, help="models measured side by side")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Make the weights of all questions, measure each with every seed, print the tables."""
    args = parse_args(argv)
    wanted = list(dict.fromkeys(weights for name in args.experiments for weights in EXPERIMENTS[name].values()))
    with tempfile.TemporaryDirectory() as work:
        folders = made([weights for weights in wanted if isinstance(weights, Quantized)], args.model_path, Path(work))
        jobs = [(args.model_path, weights, folders.get(weights), seed, args.n)
                for weights in wanted for seed in args.seeds]
        with multiprocessing.get_context("spawn").Pool(args.workers, _one_thread) as pool:
            measured = pool.starmap(measure, jobs, chunksize=1)
    per_weights = {weights: [row for job, row in zip(jobs, measured, strict=True) if job[1] == weights]
                   for weights in wanted}
    tables = {name: [summarize(label, per_weights[weights]) for label, weights in EXPERIMENTS[name].items()]
              for name in args.experiments}
    for name, rows in tables.items():
        print(f"{name}:\n\n{table(rows)}\n")
    print(json.dumps({**harness.machine(args.model_path), "n": args.n, "seeds": args.seeds, "experiments": tables}))


def _one_thread() -> None:
    torch.set_num_threads(1)


# --- the weights ---------------------------------------------------------------------------------------------------


def made(wanted: list[Quantized], model: Path, work: Path) -> dict[Quantized, Path]:
    """Their packed folders; statistics that several share are collected once."""
    stats: dict[tuple[tuple[str, ...], int], ActStats] = {}
    folders = {}
    for index, weights in enumerate(wanted):
        seen = weights.tasks, weights.steps
        if seen not in stats:
            stats[seen] = harness.calibrate(model, work, 0, dict.fromkeys(weights.tasks, CALIBRATION_SAMPLES),
                                            Sampling(num_timesteps=weights.steps), captured=False, noise=SEED)
        folders[weights] = harness.pack(model, work / f"packed {index}", weights.format(), weights.method, stats[seen])
    return folders


# --- measuring ------------------------------------------------------------------------------------------------------


def load(model: Path, weights: Weights, folder: Path | None) -> Runtime:
    """A model on the CPU."""
    runtime = harness.load(model, folder)
    if weights == "8 bits":
        for name in layout.linears(runtime.model.config.num_hidden_layers):
            weight = runtime.model.get_submodule(name).weight
            weight.data = round_to_8_bits(weight.data)
    return runtime


def round_to_8_bits(w: torch.Tensor, group_size: int = 64) -> torch.Tensor:
    """[out, in] rounded to 256 levels per group, minimum to maximum."""
    groups = w.reshape(w.shape[0], -1, group_size)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = ((high - low) / 255).clamp(min=1e-12)
    return (((groups - low) / step).round() * step + low).reshape(w.shape)


@dataclass(frozen=True)
class Measured:
    """A model with one seed: right answers and recognised pictures, KL per token; by step, means over the captions,
    the velocity error on the float model's trajectory (`forced`), and the error of x_t where the model follows its own
    (`free`)."""

    answers: Share
    pictures: Share
    kl: float
    forced: list[float]
    free: list[float]


@torch.no_grad()
def measure(model: Path, weights: Weights, folder: Path | None, seed: int, n: int) -> Measured:
    """Rates and errors of a model with one seed."""
    runtime, reference = load(model, weights, folder), load(model, "float", None)
    asked = evaluate.held_out_questions(n, seed)
    captions = evaluate.held_out_captions(n, seed)
    answers = evaluate.total(evaluate.measure_answers(runtime, asked))
    pictures, _ = evaluate.measure_pictures(runtime, captions, seed, None)
    forced, free = velocity_errors(runtime, reference, [caption.text for caption in captions[:TRACED]], seed)
    requests = harness.requests_of(reference, asked[:TRACED])
    ids = [reference.answer(*request, evaluate.MAX_ANSWER_TOKENS).ids for request in requests]
    theirs = [reference.forced_logprobs(*request, one) for request, one in zip(requests, ids, strict=True)]
    kl = harness.token_kl(runtime, requests, ids, theirs).mean().item()
    return Measured(answers, evaluate.total(pictures), kl, forced, free)


def velocity_errors(runtime: Runtime, reference: Runtime, texts: list[str],
                    seed: int) -> tuple[list[float], list[float]]:
    """`forced` and `free` of a Measured."""
    sampling, free = Sampling(), []
    traces = [harness.trajectory(reference, text, sampling, seed) for text in texts]
    for text, theirs in zip(texts, traces, strict=True):
        ours = harness.trajectory(runtime, text, sampling, seed)
        free.append([relative_error(mine.x, his.x) for mine, his in zip(ours, theirs, strict=True)])
    return (harness.mean_by_step(harness.velocity_errors(runtime, texts, traces, sampling)),
            harness.mean_by_step(free))


# --- the table -----------------------------------------------------------------------------------------------------


def summarize(name: str, rows: list[Measured]) -> dict[str, Any]:
    """One variant over its seeds."""
    def spread(values: list[float]) -> dict[str, float]:
        return {"mean": statistics.fmean(values), "deviation": statistics.stdev(values) if len(values) > 1 else 0.0}

    return {"variant": name, "answers": harness.pooled([row.answers for row in rows]),
            "pictures": harness.pooled([row.pictures for row in rows]), "kl": spread([row.kl for row in rows]),
            "velocity": spread([statistics.fmean(row.forced) for row in rows]),
            "velocity_by_step": harness.mean_by_step([row.forced for row in rows]),
            "free_by_step": harness.mean_by_step([row.free for row in rows])}


def table(rows: list[dict[str, Any]]) -> str:
    """The summary as a Markdown table; velocity and drift at the first, middle and last step."""
    lines = ["| model | exact answers | recognised pictures | KL per token | velocity error | … at step 1, 15, 30 | "
             "x_t error at step 2, 15, 30 |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        rates = [f"{100 * row[key]['rate']:.1f} % ({100 * row[key]['interval'][0]:.1f} … "
                 f"{100 * row[key]['interval'][1]:.1f})" for key in ("answers", "pictures")]
        errors = [f"{row[key]['mean']:.2g} ± {row[key]['deviation']:.1g}" for key in ("kl", "velocity")]
        forced, free = row["velocity_by_step"], row["free_by_step"]
        last = len(forced) - 1
        picked = [", ".join(_short(values[index]) for index in indices)
                  for values, indices in ((forced, (0, last // 2, last)), (free, (1, last // 2, last)))]
        lines.append("| " + " | ".join([row["variant"], *rates, *errors, *picked]) + " |")
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:.2g}" if math.isfinite(value) else "inf"


if __name__ == "__main__":
    script.run(main)
