#!/usr/bin/env python3
"""Compare quantizers on a trained two-expert model: KL of answers and velocity error of pictures, on lance-nano.

    python benchmarks/fidelity_nano.py --seeds 0 1 2

Reads   lance_nano/checkpoint (or --model_path)
Writes  nothing that stays; the last line on stdout is the result as JSON: per format and method the mean over the seeds
        of `kl`, nats per token on the float model's own answers, and of `velocity`, relative error on its own
        trajectories, both on held-out samples, with every seed's values beside them
Needs   1.5 GB of memory; on one CPU core about 10 minutes per seed

A seed decides which samples calibrate and which are held out, and the noise of the pictures. rtn: nearest rounding,
nothing scaled. published: `--recipe published`. ours_diagonal: ours from statistics alone. ours: with --capture.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lance_nano import samples
from lance_nano.evaluate import RESOLUTION
from lance_nano.scenes import SIZE
from lance_quant import capture, cli, convert, layout, task_cli
from lance_quant.codec import Codec, Int4, Nvfp4
from lance_quant.compare import step_errors, token_divergence
from lance_quant.lance.config import LancePaths
from lance_quant.lance.pipeline import Pipeline
from lance_quant.packed import PackedFolder
from lance_quant.stats import ActStats, Collector, merge, model_fingerprint
from lance_quant.tasks import Settings, answer_all, draw_all, load_samples, replay
from lance_quant.tensorfile import Checkpoint
from quantized_linear import swap_linears

MODEL = Path(__file__).parent.parent / "lance_nano" / "checkpoint" / "Lance_nano"
TASKS = ("x2t_image", "t2i")
METHODS = ("rtn", "published", "ours_diagonal", "ours")
CODECS: dict[str, Codec] = {"int4": Int4(64), "nvfp4": Nvfp4()}
CPU = torch.device("cpu")


class Baseline(NamedTuple):
    """What the float model did on the held-out samples, and what that was asked for."""

    settings: dict[str, Settings]
    answers: list
    pictures: list


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__)
    parser.add_argument("--model_path", type=Path, default=MODEL, help="a model for 112 x 112 pictures")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="see above")
    parser.add_argument("--calibrate", type=int, default=32, help="calibration samples per task")
    parser.add_argument("--test", type=int, default=16, help="held-out samples per task")
    parser.add_argument("--steps", type=int, default=30, help="denoising steps")
    return parser.parse_args(argv)


def settings_of(task: str, file: Path, seed: int, args: argparse.Namespace) -> Settings:
    """The settings that the scripts' flags mean."""
    parser = argparse.ArgumentParser()
    task_cli.add_task(parser)
    flags = {"task": task, "example_json": file, "resolution": RESOLUTION, "video_height": SIZE, "video_width": SIZE,
             "validation_num_timesteps": args.steps, "seed": seed}
    return task_cli.settings_of(parser.parse_args([str(part) for name, value in flags.items()
                                                   for part in (f"--{name}", value)]))


def run(pipeline: Pipeline, settings: Settings, file: Path, limit: int, keep_trace: bool) -> list:
    """Answer or draw the first `limit` samples of a file."""
    samples = load_samples(file, settings, limit)
    if settings.task == "x2t_image":
        return list(answer_all(pipeline, samples, settings))
    return list(draw_all(pipeline, samples, settings, keep_trace))


def calibrate(pipeline: Pipeline, work: Path, seed: int, args: argparse.Namespace) -> ActStats:
    """Statistics of both tasks, and a capture of each in `work`."""
    with Checkpoint(args.model_path) as source:
        fingerprint, names = model_fingerprint(source), layout.linears(layout.num_layers(source.specs))
    parts = []
    for task in TASKS:
        file = work / f"samples/calibrate_{task}.json"
        with Collector(pipeline.model, names) as collector, \
                capture.recording(pipeline.model, work / f"{task}.safetensors", task, fingerprint):
            run(pipeline, settings_of(task, file, seed, args), file, args.calibrate, keep_trace=False)
        parts.append(collector.stats(task, {"model": fingerprint}))
    return merge(parts)


def baseline_of(pipeline: Pipeline, work: Path, seed: int, args: argparse.Namespace) -> Baseline:
    """The float model on the held-out samples."""
    files = {task: work / f"samples/test_{task}.json" for task in TASKS}
    settings = {task: settings_of(task, file, seed, args) for task, file in files.items()}
    return Baseline(settings, *(run(pipeline, settings[task], files[task], args.test, True) for task in TASKS))


def pack(work: Path, format_: str, method: str, stats: ActStats, args: argparse.Namespace) -> Path:
    """Quantize with one method; the folder."""
    out = work / f"{format_}-{method}"
    if method == "rtn":
        stats = ActStats({}, [], [{"run_id": "none"}], 0)
    activations = capture.replay_of(args.model_path, [work / f"{task}.safetensors" for task in TASKS], CPU) \
        if method == "ours" else None
    recipe = "published" if method == "published" else "ours"
    with Checkpoint(args.model_path) as source:
        convert.quantize_checkpoint(source, stats, CODECS[format_], out, recipe, CPU, False, activations)
    return out


@torch.no_grad()
def distance(folder: Path, baseline: Baseline, args: argparse.Namespace) -> dict[str, float]:
    """How far a packed model is from the baseline on its own tokens and trajectories."""
    with PackedFolder(folder) as packed:
        pipeline = Pipeline.load(LancePaths.find(args.model_path), CPU, torch.float32, packed.checkpoint.path,
                                 lambda model: swap_linears(model, packed, torch.float32, CPU, "cached"))
    kl: list[Tensor] = []
    for done in baseline.answers:
        prompt, vit_tokens = pipeline.ask(done.question, baseline.settings["x2t_image"].resolution)
        kl.append(token_divergence(done.logprobs, pipeline.forced_logprobs(prompt, vit_tokens, done.answer.ids)).kl)
    errors: list[float] = []
    for done in baseline.pictures:
        x, velocity = (torch.stack([getattr(step, part) for step in done.steps]) for part in ("x", "velocity"))
        times = torch.tensor([step.t for step in done.steps])
        errors += step_errors(replay(pipeline, done.prompt, baseline.settings["t2i"], x, times), velocity)
    return {"kl": torch.cat(kl).mean().item(), "velocity": statistics.fmean(errors)}


def measure(seed: int, args: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """format -> method -> metric of one seed."""
    out: dict[str, dict[str, dict[str, float]]] = {name: {} for name in CODECS}
    pipeline = Pipeline.load(LancePaths.find(args.model_path), CPU, torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        samples.write(work / "samples", max(args.calibrate, args.test), seed)
        stats = calibrate(pipeline, work, seed, args)
        baseline = baseline_of(pipeline, work, seed, args)
        for name in CODECS:
            for method in METHODS:
                started = time.perf_counter()
                packed = pack(work, name, method, stats, args)
                seconds = time.perf_counter() - started
                out[name][method] = found = distance(packed, baseline, args)
                print(f"seed {seed}  {name:<6} {method:<14} KL {found['kl']:.3e}  velocity {found['velocity']:.4f}  "
                      f"packed in {seconds:.0f} s", file=sys.stderr)
    return out


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(argv)
    runs = [measure(seed, args) for seed in args.seeds]
    result: dict[str, object] = {"seeds": args.seeds, "cpu": platform.processor() or platform.machine(),
                                 "torch": torch.__version__, "calibrate": args.calibrate, "test": args.test}
    for key in ("kl", "velocity"):
        values = {name: {method: [run[name][method][key] for run in runs] for method in METHODS} for name in CODECS}
        result[key] = {name: {method: statistics.fmean(each) for method, each in methods.items()}
                       for name, methods in values.items()}
        result[f"{key}_by_seed"] = values
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
