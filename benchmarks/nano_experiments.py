#!/usr/bin/env python3
"""What 4 bits do to a trained Lance: the open questions, each answered on lance-nano with n scenes per seed.

    python benchmarks/nano_experiments.py tasks        # calibrate on x2t only, or on x2t and t2i?
    python benchmarks/nano_experiments.py group_size   # 128, 64 or 32 inputs per scale?
    python benchmarks/nano_experiments.py steps        # does the error compound over denoising steps?
    python benchmarks/nano_experiments.py timesteps    # calibrate on 2 timesteps or on all?

Reads   lance_nano/checkpoint (or --model_path, an outlier variant for instance)
Writes  nothing that stays; prints a table in Markdown and, as the last line, JSON
Needs   about 2 CPU-minutes per model and seed at n = 200; --workers runs them side by side

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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import awq_apply
import awq_calibrate_single
import awq_merge_stats
import nvfp4_apply
from lance_nano import evaluate, samples
from lance_nano.evaluate import RESOLUTION, Share
from lance_nano.scenes import SIZE
from lance_quant import cli, layout
from lance_quant.compare import relative_error, step_errors, token_divergence
from lance_quant.lance.generation import Sampling, Step
from lance_quant.lance.pipeline import Pipeline

MODEL = Path(__file__).parent.parent / "lance_nano" / "checkpoint" / "Lance_nano"
TASKS = ("x2t_image", "t2i")
CALIBRATION_SAMPLES = 48
TRACED = 16  # prompts and questions per seed whose velocities and token distributions are compared


@dataclass(frozen=True)
class Variant:
    """One model of an experiment: float (no folder), packed, or float rounded to 8 bits in memory."""

    name: str
    folder: Path | None = None
    eight_bit: bool = False


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__)
    parser.add_argument("experiment", choices=EXPERIMENTS, help="the question")
    parser.add_argument("--model_path", type=Path, default=MODEL, help="a lance-nano folder")
    parser.add_argument("--n", type=int, default=200, help="questions and captions per seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of scenes, captions and noise")
    parser.add_argument("--workers", type=int, default=1, help="models measured side by side")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Make the variants, measure each with every seed, print the table."""
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as work:
        variants = [Variant("float"), *EXPERIMENTS[args.experiment](args.model_path, Path(work))]
        jobs = [(args.model_path, variant, seed, args.n) for variant in variants for seed in args.seeds]
        with multiprocessing.get_context("spawn").Pool(args.workers, _one_thread) as pool:
            measured = pool.starmap(measure, jobs, chunksize=1)
    rows = [summarize(variant.name, [row for job, row in zip(jobs, measured, strict=True) if job[1] == variant])
            for variant in variants]
    print(table(rows))
    print(json.dumps({"experiment": args.experiment, "model": args.model_path.name, "n": args.n, "seeds": args.seeds,
                      "variants": rows}))


def _one_thread() -> None:
    torch.set_num_threads(1)


# --- the variants of each question ---------------------------------------------------------------------------------


def calibrate(model: Path, work: Path, name: str, tasks: Iterable[str], steps: int = 30) -> Path:
    """Statistics of `tasks` on training-like samples."""
    if not (work / "samples").exists():
        samples.write(work / "samples", CALIBRATION_SAMPLES, seed=0)
    parts = []
    for task in tasks:
        parts.append(work / f"{name}_{task}.pt")
        awq_calibrate_single.main([
            "--task", task, "--model_path", str(model), "--example_json", str(work / f"samples/calibrate_{task}.json"),
            "--resolution", RESOLUTION, "--video_height", str(SIZE), "--video_width", str(SIZE),
            "--num_timesteps", str(steps), "--device", "cpu", "--out", str(parts[-1])])
    awq_merge_stats.main(["--inputs", *map(str, parts), "--out", str(work / f"{name}.pt")])
    return work / f"{name}.pt"


def quantize(model: Path, stats: Path, out: Path, script: Any, *flags: str) -> Path:
    """A packed folder made by one of the apply scripts."""
    script.main(["--src", str(model), "--stats", str(stats), "--out", str(out), "--device", "cpu", *flags])
    return out


def both_formats(model: Path, stats: Path, work: Path, name: str) -> list[Variant]:
    """INT4 g64 and NVFP4 from one statistics file."""
    return [Variant(f"INT4 g64, {name}", quantize(model, stats, work / f"int4 {name}", awq_apply)),
            Variant(f"NVFP4, {name}", quantize(model, stats, work / f"nvfp4 {name}", nvfp4_apply, "--slim"))]


def tasks_experiment(model: Path, work: Path) -> list[Variant]:
    """x2t only leaves the generation expert to plain rounding."""
    return [variant for name, tasks in (("x2t only", TASKS[:1]), ("x2t + t2i", TASKS))
            for variant in both_formats(model, calibrate(model, work, name, tasks), work, name)]


def group_size_experiment(model: Path, work: Path) -> list[Variant]:
    """Both recipes, at three sizes."""
    stats = calibrate(model, work, "all", TASKS)
    return [Variant(f"INT4 g{size}, {recipe}", quantize(model, stats, work / f"{recipe} {size}", awq_apply,
                                                        "--group_size", str(size), "--recipe", recipe))
            for recipe in ("published", "ours") for size in (128, 64, 32)]


def steps_experiment(model: Path, work: Path) -> list[Variant]:
    """8 bits as the control: an error that compounds would show there too, a hundredth as large."""
    return [Variant("8 bits g64", eight_bit=True),
            *both_formats(model, calibrate(model, work, "all", TASKS), work, "x2t + t2i")]


def timesteps_experiment(model: Path, work: Path) -> list[Variant]:
    """Two steps are what the published statistics saw."""
    return [variant for name, steps in (("2 steps", 2), ("30 steps", 30))
            for variant in both_formats(model, calibrate(model, work, name, TASKS, steps), work, name)]


EXPERIMENTS: dict[str, Callable[[Path, Path], list[Variant]]] = {
    "tasks": tasks_experiment, "group_size": group_size_experiment, "steps": steps_experiment,
    "timesteps": timesteps_experiment}


# --- measuring one variant -----------------------------------------------------------------------------------------


def load(model: Path, variant: Variant) -> Pipeline:
    """The variant's model on the CPU."""
    pipeline = evaluate.load(model, variant.folder, "cpu", "float32")
    if variant.eight_bit:
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
def measure(model: Path, variant: Variant, seed: int, n: int) -> dict[str, Any]:
    """Rates and errors of a variant with one seed."""
    pipeline, reference = load(model, variant), load(model, Variant("float"))
    questions = evaluate.held_out_questions(n, seed)
    captions = evaluate.held_out_captions(n, seed)
    answers = evaluate.total(evaluate.measure_answers(pipeline, questions))
    pictures, _ = evaluate.measure_pictures(pipeline, captions, seed, None)
    forced, free = velocity_errors(pipeline, reference, [caption.text for caption in captions[:TRACED]], seed)
    return {"answers": answers, "pictures": evaluate.total(pictures),
            "kl": answer_divergence(pipeline, reference, questions[:TRACED]), "velocity": forced, "free": free}


def answer_divergence(pipeline: Pipeline, reference: Pipeline, asked: list) -> float:
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


def velocity_errors(pipeline: Pipeline, reference: Pipeline, texts: list[str],
                    seed: int) -> tuple[list[float], list[float]]:
    """Per step, means over the prompts: velocity error on the reference's trajectory, and the error of x_t when the
    model follows its own."""
    sampling, forced, free = Sampling(seed=seed), [], []
    for text in texts:
        theirs, ours = trajectory(reference, text, sampling), trajectory(pipeline, text, sampling)
        denoiser = pipeline.denoiser(text, SIZE, SIZE, sampling)
        replayed = torch.stack([denoiser.velocity(step.x, step.t) for step in theirs])
        forced.append(step_errors(replayed, torch.stack([step.velocity for step in theirs])))
        free.append([relative_error(mine.x, his.x) for mine, his in zip(ours, theirs, strict=True)])
    return [[statistics.fmean(step) for step in zip(*errors, strict=True)] for errors in (forced, free)]


def trajectory(pipeline: Pipeline, text: str, sampling: Sampling) -> list[Step]:
    """All steps of a free run."""
    steps: list[Step] = []
    pipeline.sample(pipeline.denoiser(text, SIZE, SIZE, sampling), sampling, steps.append)
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
    cli.run(main)
