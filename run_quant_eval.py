#!/usr/bin/env python3
"""Run quantized Lance on one task and say how far it is from the float model.

    python run_quant_eval.py --task t2i --model_path downloads/Lance_3B --awq_dir Lance_3B-AWQ-INT4 Lance_3B-NVFP4 \\
        --example_json prompts.json --baseline results/bf16 --save_path_gen results/quantized

    python run_quant_eval.py --task t2i --awq_dir Lance_3B-AWQ-INT4 Lance_3B-NVFP4 --example_json prompts.json \\
        --save_path_gen results/packed

Reads   one or more packed folders, ViT or VAE as the task needs, the baseline's results folder; MODEL_PATH (default:
        the first packed folder) for llm_config.json and tokenizer, and for the float weights where no --baseline is
        given. Without both, the first packed folder is the reference that the others are compared with
Writes  SAVE_PATH_GEN: a results folder per packed folder, comparison.json, report.md, report.html
Needs   4.3 GB (INT4) or 5.1 GB (NVFP4) for the weights of Lance_3B in mode ondemand, as much as bfloat16 in mode cached
Next    open report.html
"""

import argparse
from pathlib import Path

from lance_quant.cli import script, task_arguments


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    task_arguments.add_model(parser, packed=True, required=False)
    task_arguments.add_task(parser)
    task_arguments.add_stream(parser)
    task_arguments.add_compile(parser)
    parser.add_argument("--awq_dir", type=Path, nargs="+", required=True,
                        help="packed folders from awq_apply.py or nvfp4_apply.py, or published ones")
    task_arguments.add_kernel(parser)
    parser.add_argument("--baseline", type=Path,
                        help="results folder of run_baseline.py --save_latents; default: run the float model first, "
                             "or where there is none compare with the first packed folder")
    parser.add_argument("--save_path_gen", type=Path, required=True, help="results folder; must not exist")
    parser.add_argument("--save_latents", action="store_true", help="keep the traces that were compared")
    task_arguments.add_lora(parser)
    task_arguments.add_resume(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(argv)
    from lance_quant import distributed  # late, as torch takes seconds to import: --help does not wait for it
    from lance_quant.cli import requests
    from lance_quant.evaluation import evaluate, report
    from lance_quant.evaluation.run_folder import describe, drop_traces
    from lance_quant.evaluation.sample_store import require_resumable, run_work
    from lance_quant.inference.request import PackedMode
    from lance_quant.storage.atomic import write_json

    how = PackedMode(args.mode, args.kernel)
    args.model_path = args.model_path or args.awq_dir[0]
    with distributed.joined(args.device) as team:
        with team.agreed():
            request = requests.request_of(args, team)
            packed, reference = evaluate.open_folders(args.awq_dir, args.model_path, args.baseline)
            team.require_free(args.save_path_gen)
            require_resumable(args.save_path_gen, args.resume, team)
            evaluate.require_comparable(request, packed, args.baseline, reference and reference[1])
            everyone = [*packed.values(), *([reference[1]] if reference else [])]
            evaluate.require_kernel(request, everyone, how)
        team.require_same(models=[one.meta for one in everyone],
                          samples=[describe(sample) for sample in request.samples])
        run = {**packed, **({} if reference is None else dict([reference]))}
        job = evaluate.job_of(request, run, evaluate.baseline_fingerprint(request, args.baseline, reference), how,
                              args.save_latents)
        with run_work(args.save_path_gen, job, args.resume, team) as work:
            sections = evaluate.evaluate(request, packed, how, args.baseline, work, team, reference)
            if team.leads:
                write_json(work.folder / "comparison.json", sections)
                report.write(work.folder, sections)
                if not args.save_latents:
                    drop_traces(work.folder)
        if team.leads:
            script.log.info("%s", report.summary_table(sections))
            print(args.save_path_gen / "report.html")


def command() -> None:
    """What the console script and `python run_quant_eval.py` start."""
    script.run(main)


if __name__ == "__main__":
    command()
