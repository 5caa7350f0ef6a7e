#!/usr/bin/env python3
"""Measure what flows into Lance's 504 quantizable linears while it runs one task.

    python awq_calibrate_single.py --task x2t_image --model_path downloads/Lance_3B \\
        --example_json questions.json --out calib/x2t_image.pt
    python awq_calibrate_single.py --task t2i --model_path downloads/Lance_3B \\
        --example_json prompts.json --out calib/t2i.pt

Reads   MODEL_PATH, the ViT for x2t_image; never the VAE: latents are not decoded
Writes  OUT: per linear sum |x|, sum x^2 and max |x| of every input channel, token and call counts (published format)
Needs   what run_baseline.py needs. t2i covers every timestep and both guidance branches; x2t_image alone leaves the
        generation expert without data, so run both
Next    awq_merge_stats.py --inputs calib/x2t_image.pt calib/t2i.pt --out calib/all.pt
"""

import argparse
from collections import deque
from pathlib import Path

from lance_quant import cli, layout, task_cli
from lance_quant.files import require_free
from lance_quant.results import describe, versions
from lance_quant.stats import Collector, coverage, model_fingerprint
from lance_quant.tasks import answer_all, draw_all, load_samples
from lance_quant.tensorfile import Checkpoint


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__)
    task_cli.add_model(parser)
    task_cli.add_task(parser, steps_flag="--num_timesteps")
    parser.add_argument("--out", type=Path, required=True, help="statistics file (.pt); must not exist")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(argv)
    settings = task_cli.settings_of(args)
    paths = task_cli.paths_of(args, decodes=False)
    samples = load_samples(args.example_json, settings, args.limit)
    require_free(args.out)
    with Checkpoint(args.model_path) as source:
        linears = layout.linears(layout.require_linears({name: spec.shape for name, spec in source.specs.items()}))
        fingerprint = model_fingerprint(source)
    pipeline = task_cli.load(args, paths)
    run = answer_all if args.task == "x2t_image" else draw_all
    with Collector(pipeline.model, linears) as collector:
        deque(run(pipeline, samples, settings), maxlen=0)
    stats = collector.stats(args.task, {
        "model": fingerprint, "seed": args.seed, "settings": settings.as_json(),
        "samples": [describe(sample)["key"] for sample in samples], "versions": versions()})
    stats.save(args.out)
    cli.log.info("%s", coverage(stats, linears))
    print(args.out)


if __name__ == "__main__":
    cli.run(main)
