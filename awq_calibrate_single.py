#!/usr/bin/env python3
"""Measure what flows into Lance's 504 quantizable linears while it runs a task, or all of them.

    python awq_calibrate_single.py --task x2t_image --model_path downloads/Lance_3B \\
        --example_json questions.json --out calib/x2t_image.pt
    python awq_calibrate_single.py --task t2i --model_path downloads/Lance_3B \\
        --example_json prompts.json --limit 8 --out calib/t2i.pt
    python awq_calibrate_single.py --task all --model_path downloads/Lance_3B \\
        --example_json examples/samples --limit 4 --out calib/all.pt

Reads   MODEL_PATH; the ViT for x2t and the edits; the VAE's encoder for i2v and the edits: nothing is decoded
Writes  OUT: per linear sum |x|, sum x^2 and max |x| of every input channel, token and call counts (published format)
Needs   what run_baseline.py needs. t2i covers every timestep and both guidance branches; x2t_image alone leaves the
        generation expert without data, so run both; --task all runs every task that the folder given as
        --example_json has a TASK.json for, and merges them (a token is a token: videos weigh most).
        A picture takes the better part of an hour on a CPU core: after the first steps the whole is estimated, and
        --limit takes the first samples only (docs/durations.md)
Next    awq_merge_stats.py --inputs calib/x2t_image.pt calib/t2i.pt --out calib/all.pt; after --task all awq_apply.py
"""

import argparse
import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lance_quant.cli import script, task_arguments
from lance_quant.errors import InputError
from lance_quant.formats import layout
from lance_quant.lance.settings import TASKS, TIMED

ALL = "all"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    task_arguments.add_model(parser)
    task_arguments.add_task(parser, more=(ALL,))
    parser.add_argument("--out", type=Path, required=True, help="statistics file (.pt); must not exist")
    parser.add_argument("--capture", type=Path,
                        help="also store what enters the first layer, for GPTQ (safetensors; must not exist; with "
                             "--task all one file per task, its name added)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Check what was given, run every task under watch, save and say what is covered."""
    args = parse_args(argv)
    from lance_quant import distributed  # late, as torch takes seconds to import: --help does not wait for it
    from lance_quant.calibration.activation_stats import coverage, merge, model_fingerprint
    from lance_quant.cli import requests
    from lance_quant.evaluation.run_folder import describe, versions
    from lance_quant.inference.calibrate import Job, measure
    from lance_quant.inference.tasks import load_samples
    from lance_quant.storage.tensor_file import Checkpoint

    with distributed.joined(args.device) as team, contextlib.ExitStack() as outputs:
        with team.agreed():
            jobs = []
            for task, file in _sample_files(args.task, args.example_json).items():
                own = _arguments_for(task, file, vars(args))
                settings, paths = task_arguments.settings_of(own), requests.paths_of(own, decodes=False)
                captured = _capture_path(args.capture, task if args.task == ALL else None)
                jobs.append(Job(settings, load_samples(file, settings, args.limit), paths, captured))
            for path in filter(None, [args.out, *(job.capture for job in jobs)]):
                outputs.enter_context(team.reserved(path))
            with Checkpoint(args.model_path) as source:
                shapes = {name: spec.shape for name, spec in source.specs.items()}
                linears, fingerprint = layout.linears(layout.require_complete(shapes)), model_fingerprint(source)
        team.require_same(model=fingerprint, samples=[[describe(sample) for sample in job.samples] for job in jobs])
        runtime = requests.source_of(args, jobs[0].paths).load()
        parts = [measure(runtime, job, linears, fingerprint, versions(), team) for job in jobs]
        stats = parts[0] if len(parts) == 1 else merge(parts)
        if team.leads:
            stats.save(args.out)
            script.log.info("%s", coverage(stats, linears))
            print(args.out)


def _sample_files(task: str, example_json: Path) -> dict[str, Path]:
    """Each task to run, and its samples."""
    if task != ALL:
        return {task: example_json}
    files = {name: example_json / f"{name}.json" for name in TASKS}
    found = {name: path for name, path in files.items() if path.is_file()}
    if not found:
        raise InputError(f"--task all: --example_json {example_json} is no folder with any of "
                         f"{', '.join(path.name for path in files.values())}")
    script.log.info("tasks: %s", ", ".join(found))
    return found


def _arguments_for(task: str, file: Path, given: Mapping[str, Any]) -> argparse.Namespace:
    """The command line of one task; of several, those that know no frames are not told of any."""
    frames = given["num_frames"] if given["task"] != ALL or task in TIMED else None
    return argparse.Namespace(**{**given, "task": task, "example_json": file, "num_frames": frames})


def _capture_path(path: Path | None, task: str | None) -> Path | None:
    """Where a task's capture goes; `task` is None where it is the only one."""
    return path if path is None or task is None else path.with_stem(f"{path.stem}_{task}")


def command() -> None:
    """What the console script and `python awq_calibrate_single.py` start."""
    script.run(main)


if __name__ == "__main__":
    command()
