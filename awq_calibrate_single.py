#!/usr/bin/env python3
"""Measure what flows into Lance's 504 quantizable linears while it runs a task, or all of them.

    python awq_calibrate_single.py --task x2t_image --model_path downloads/Lance_3B \\
        --example_json questions.json --out calib/x2t_image.pt
    python awq_calibrate_single.py --task t2i --model_path downloads/Lance_3B \\
        --example_json prompts.json --out calib/t2i.pt
    python awq_calibrate_single.py --task all --model_path downloads/Lance_3B \\
        --example_json examples/samples --out calib/all.pt

Reads   MODEL_PATH; the ViT for x2t and the edits; the VAE's encoder for i2v and the edits: nothing is decoded
Writes  OUT: per linear sum |x|, sum x^2 and max |x| of every input channel, token and call counts (published format)
Needs   what run_baseline.py needs. t2i covers every timestep and both guidance branches; x2t_image alone leaves the
        generation expert without data, so run both; --task all runs every task that the folder given as
        --example_json has a TASK.json for, and merges them (a token is a token: videos weigh most)
Next    awq_merge_stats.py --inputs calib/x2t_image.pt calib/t2i.pt --out calib/all.pt; after --task all awq_apply.py
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lance_quant import distributed
from lance_quant.calibration import capture
from lance_quant.calibration.activation_stats import ActStats, Collector, coverage, merge, model_fingerprint
from lance_quant.cli import requests, script, task_arguments
from lance_quant.distributed import Team
from lance_quant.errors import InputError
from lance_quant.evaluation.run_folder import describe, versions
from lance_quant.formats import layout
from lance_quant.inference.tasks import load_samples, run_watched
from lance_quant.lance.config import LancePaths
from lance_quant.lance.runtime import Runtime
from lance_quant.lance.settings import TASKS, TIMED, Settings
from lance_quant.storage.tensor_file import Checkpoint

ALL = "all"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    task_arguments.add_model(parser)
    task_arguments.add_task(parser, steps_flag="--num_timesteps", more=(ALL,))
    parser.add_argument("--out", type=Path, required=True, help="statistics file (.pt); must not exist")
    parser.add_argument("--capture", type=Path,
                        help="also store what enters the first layer, for GPTQ (safetensors; must not exist; with "
                             "--task all one file per task, its name added)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(argv)
    with distributed.joined(args.device) as team:
        with team.agreed():
            jobs = [_job(one) for one in _tasks(args)]
            captures = [_capture_path(args, job) for job in jobs]
            for path in filter(None, [args.out, *captures]):
                team.require_free(path)
            with Checkpoint(args.model_path) as source:
                shapes = {name: spec.shape for name, spec in source.specs.items()}
                linears, fingerprint = layout.linears(layout.require_complete(shapes)), model_fingerprint(source)
        team.require_same(model=fingerprint, samples=[[describe(sample) for sample in job.samples] for job in jobs])
        pipeline = requests.source_of(args, jobs[0].paths).load()
        parts = [_measure(pipeline, job, linears, fingerprint, path, team)
                 for job, path in zip(jobs, captures, strict=True)]
        stats = parts[0] if len(parts) == 1 else merge(parts)
        if team.leads:
            stats.save(args.out)
            script.log.info("%s", coverage(stats, linears))
            print(args.out)


class Job(NamedTuple):
    """One task to run."""

    settings: Settings
    samples: list
    paths: LancePaths


def _job(args: argparse.Namespace) -> Job:
    settings = task_arguments.settings_of(args)
    paths = requests.paths_of(args, decodes=False)
    return Job(settings, load_samples(args.example_json, settings, args.limit), paths)


def _tasks(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The arguments of each task to run."""
    if args.task != ALL:
        return [args]
    files = {task: args.example_json / f"{task}.json" for task in TASKS}
    found = [task for task, path in files.items() if path.is_file()]
    if not found:
        raise InputError(f"--task all: --example_json {args.example_json} is no folder with any of "
                         f"{', '.join(path.name for path in files.values())}")
    script.log.info("tasks: %s", ", ".join(found))
    return [argparse.Namespace(**{**vars(args), "task": task, "example_json": files[task],
                                  "num_frames": args.num_frames if task in TIMED else None}) for task in found]


def _capture_path(args: argparse.Namespace, job: Job) -> Path | None:
    if args.capture is None or args.task != ALL:
        return args.capture
    return args.capture.with_stem(f"{args.capture.stem}_{job.settings.task}")


def _measure(pipeline: Runtime, job: Job, linears: Sequence[str], fingerprint: str, captured: Path | None,
             team: Team) -> ActStats:
    settings, samples, _ = job
    recording = capture.recording(pipeline.model, captured, settings.task, fingerprint, team)
    with Collector(pipeline.model, linears) as collector, recording as begin:
        run_watched(pipeline, team.share(samples), settings, team.share(range(len(samples))), begin)
    collector.pool(team)
    with team.agreed():
        return collector.stats(settings.task, {
            "model": fingerprint, "seed": settings.seed, "settings": settings.as_json(),
            "samples": [describe(sample)["key"] for sample in samples], "versions": versions()})


def command() -> None:
    """What the console script and `python awq_calibrate_single.py` start."""
    script.run(main)


if __name__ == "__main__":
    command()
