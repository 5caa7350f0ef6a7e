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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import awq_apply
import awq_calibrate_single
import awq_merge_stats
import nvfp4_apply
from lance_nano import evaluate, samples
from lance_nano.evaluate import RESOLUTION, Share
from lance_nano.scenes import SIZE
from lance_quant.cli import script
from lance_quant.evaluation.metrics import relative_error, step_errors, token_divergence
from lance_quant.formats import layout
from lance_quant.lance.generation import Sampling, Step
from lance_quant.lance.runtime import Runtime

MODEL = Path(__file__).parent.parent / "lance_nano" / "checkpoint" / "Lance_nano"
TASKS = ("x2t_image", "t2i")
CALIBRATION_SAMPLES = 48
TRACED = 16  # prompts and questions per seed whose velocities and token distributions are compared


@dataclass(frozen=True)
class Packed:
    """How a packed folder is made: format, tasks and denoising steps of the calibration, flags of the apply script."""

    format: Literal["int4", "nvfp4"]
    tasks: tuple[str, ...] = TASKS
    steps: int = 30
    flags: tuple[str, ...] = ()


Weights = Packed | Literal["float", "8 bits"]  # 8 bits: the float model, rounded in memory


def _int4(group_size: int, recipe: str) -> Packed:
    return Packed("int4", flags=("--group_size", str(group_size), "--recipe", recipe))


INT4, NVFP4 = _int4(64, "ours"), Packed("nvfp4")
X2T_ONLY = {"INT4 g64, x2t only": Packed("int4", TASKS[:1], flags=INT4.flags),  # gen expert rounded plainly
            "NVFP4, x2t only": Packed("nvfp4", TASKS[:1])}
BOTH_TASKS = {"INT4 g64, x2t + t2i": INT4, "NVFP4, x2t + t2i": NVFP4}
TWO_STEPS = {"INT4 g64, 2 steps": Packed("int4", steps=2, flags=INT4.flags),  # what the published statistics saw
             "NVFP4, 2 steps": Packed("nvfp4", steps=2)}
EXPERIMENTS: dict[str, Mapping[str, Weights]] = {
    "tasks": {"float": "float", **X2T_ONLY, **BOTH_TASKS},
    "group_size": {"float": "float", **{f"INT4 g{size}, {recipe}": _int4(size, recipe)
                                        for recipe in ("published", "ours") for size in (128, 64, 32)}},
    # 8 bits are the control: an error that compounds would show there too, a sixteenth as large.
    "steps": {"float": "float", "8 bits g64": "8 bits", **BOTH_TASKS},
    "timesteps": {"float": "float", **TWO_STEPS, "INT4 g64, 30 steps": INT4, "NVFP4, 30 steps": NVFP4}}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    parser.add_argument("experiments", choices=EXPERIMENTS, nargs="+", help="the questions")
    parser.add_argument("--model_path", type=Path, default=MODEL, help="a lance-nano folder")
    parser.add_argument("--n", type=int, default=200, help="questions and captions per seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of scenes, captions and noise")
    parser.add_argument("--workers", type=int, default=1, help="models measured side by side")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Make the weights of all questions, measure each with every seed, print the tables."""
    args = parse_args(argv)
    wanted = list(dict.fromkeys(weights for name in args.experiments for weights in EXPERIMENTS[name].values()))
    with tempfile.TemporaryDirectory() as work:
        folders = {weights: made(weights, args.model_path, Path(work)) for weights in wanted
                   if isinstance(weights, Packed)}
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
    print(json.dumps({"model": args.model_path.name, "n": args.n, "seeds": args.seeds, "experiments": tables}))


def _one_thread() -> None:
    torch.set_num_threads(1)


# --- the weights ---------------------------------------------------------------------------------------------------


def made(weights: Packed, model: Path, work: Path) -> Path:
    """A packed folder, by the scripts of the pipeline."""
    stats = calibrated(weights.tasks, weights.steps, model, work)
    out = work / "-".join([weights.format, stats.stem, *weights.flags]).replace("--", "")
    script = {"int4": awq_apply, "nvfp4": nvfp4_apply}[weights.format]
    script.main(["--src", str(model), "--stats", str(stats), "--out", str(out), "--device", "cpu", *weights.flags])
    return out


def calibrated(tasks: tuple[str, ...], steps: int, model: Path, work: Path) -> Path:
    """Merged statistics of `tasks` on training-like samples; made once."""
    merged = work / f"{'+'.join(tasks)}_{steps}.pt"
    if merged.exists():
        return merged
    if not (work / "samples").exists():
        samples.write(work / "samples", CALIBRATION_SAMPLES, seed=0)
    parts = []
    for task in tasks:
        parts.append(work / f"{task} of {merged.name}")
        awq_calibrate_single.main([
            "--task", task, "--model_path", str(model), "--example_json", str(work / f"samples/calibrate_{task}.json"),
            "--resolution", RESOLUTION, "--video_height", str(SIZE), "--video_width", str(SIZE),
            "--num_timesteps", str(steps), "--device", "cpu", "--out", str(parts[-1])])
    awq_merge_stats.main(["--inputs", *map(str, parts), "--out", str(merged)])
    return merged


# --- measuring ------------------------------------------------------------------------------------------------------


def load(model: Path, weights: Weights, folder: Path | None) -> Runtime:
    """A model on the CPU."""
    pipeline = evaluate.load(model, folder, "cpu", "float32")
    if weights == "8 bits":
        for name in layout.linears(pipeline.model.config.num_hidden_layers):
            weight = pipeline.model.get_submodule(name).weight
            weight.data = round_to_8_bits(weight.data)
    return pipeline


def round_to_8_bits(w: torch.Tensor, group_size: int = 64) -> torch.Tensor:
    """[out, in] rounded to 256 levels per group, minimum to maximum."""
    groups = w.reshape(w.shape[0], -1, group_size)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = ((high - low) / 255).clamp(min=1e-12)
    return (((groups - low) / step).round() * step + low).reshape(w.shape)


@torch.no_grad()
def measure(model: Path, weights: Weights, folder: Path | None, seed: int, n: int) -> dict[str, Any]:
    """Rates and errors of a model with one seed."""
    pipeline, reference = load(model, weights, folder), load(model, "float", None)
    questions = evaluate.held_out_questions(n, seed)
    captions = evaluate.held_out_captions(n, seed)
    answers = evaluate.total(evaluate.measure_answers(pipeline, questions))
    pictures, _ = evaluate.measure_pictures(pipeline, captions, seed, None)
    forced, free = velocity_errors(pipeline, reference, [caption.text for caption in captions[:TRACED]], seed)
    return {"answers": answers, "pictures": evaluate.total(pictures),
            "kl": answer_divergence(pipeline, reference, questions[:TRACED]), "velocity": forced, "free": free}


def answer_divergence(pipeline: Runtime, reference: Runtime, asked: list) -> float:
    """KL in nats per token, over the reference's own answers."""
    divergences = []
    with tempfile.TemporaryDirectory() as folder:
        for scene, question in asked:
            request = evaluate.request(scene, question, Path(folder))
            packed, vit_tokens = reference.ask(request, RESOLUTION)
            ids = reference.answer(packed, vit_tokens, evaluate.MAX_ANSWER_TOKENS).ids
            theirs = reference.forced_logprobs(packed, vit_tokens, ids)
            divergences.append(token_divergence(theirs, pipeline.forced_logprobs(packed, vit_tokens, ids)).kl)
    return torch.cat(divergences).mean().item()


def velocity_errors(pipeline: Runtime, reference: Runtime, texts: list[str],
                    seed: int) -> tuple[list[float], list[float]]:
    """Per step, means over the prompts: velocity error on the reference's trajectory, and the error of x_t when the
    model follows its own."""
    forced, free = [], []
    for text in texts:
        theirs, ours = trajectory(reference, text, seed), trajectory(pipeline, text, seed)
        denoiser = pipeline.denoiser(text, SIZE, SIZE, Sampling())
        replayed = torch.stack([denoiser.velocity(step.x, step.t) for step in theirs])
        forced.append(step_errors(replayed, torch.stack([step.velocity for step in theirs])))
        free.append([relative_error(mine.x, his.x) for mine, his in zip(ours, theirs, strict=True)])
    return [[statistics.fmean(step) for step in zip(*errors, strict=True)] for errors in (forced, free)]


def trajectory(pipeline: Runtime, text: str, seed: int) -> list[Step]:
    """All steps of a free run."""
    steps: list[Step] = []
    pipeline.sample(pipeline.denoiser(text, SIZE, SIZE, Sampling()), seed, steps.append)
    return steps


# --- the table -----------------------------------------------------------------------------------------------------


def summarize(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One variant over its seeds."""
    def pooled(key: str) -> dict[str, Any]:
        share = Share(sum(row[key].right for row in rows), sum(row[key].total for row in rows))
        return {"rate": share.value, "interval": share.interval(), "n": share.total}

    def spread(values: list[float]) -> dict[str, float]:
        return {"mean": statistics.fmean(values), "deviation": statistics.stdev(values) if len(values) > 1 else 0.0}

    def by_step(key: str) -> list[float]:
        return [statistics.fmean(step) for step in zip(*(row[key] for row in rows), strict=True)]

    return {"variant": name, "answers": pooled("answers"), "pictures": pooled("pictures"),
            "kl": spread([row["kl"] for row in rows]),
            "velocity": spread([statistics.fmean(row["velocity"]) for row in rows]),
            "velocity_by_step": by_step("velocity"), "free_by_step": by_step("free")}


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
