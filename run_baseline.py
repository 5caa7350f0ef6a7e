#!/usr/bin/env python3
"""Run Lance on one task, float or packed: the baseline that other runs are compared with.

    python run_baseline.py --task t2i --model_path downloads/Lance_3B --example_json prompts.json \\
        --save_path_gen results/bf16 --save_latents

Reads   MODEL_PATH: llm_config.json, tokenizer and model.safetensors; or a packed folder, which --config_path completes
        where it holds weights alone. The ViT for x2t_image, x2t_video and the edits; the VAE for everything but x2t
Writes  SAVE_PATH_GEN/{prompt.json,run.json}, pictures, clips or result.json; with --save_latents also what
        run_quant_eval.py compares with (latents.safetensors or logits.safetensors)
Needs   the model in the compute dtype (12.4 GB for Lance_3B in bfloat16) or its packed bytes; host memory beside it
        stays below 2 GB; --backend official runs ByteDance's code instead, which needs a checkout, its own Python, ViT
        and VAE
Next    awq_calibrate_single.py, or run_quant_eval.py --baseline SAVE_PATH_GEN
"""

import argparse
from pathlib import Path

from lance_quant.cli import script, task_arguments
from lance_quant.errors import InputError
from lance_quant.official.request import add_official


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    task_arguments.add_model(parser, packed=True)
    task_arguments.add_task(parser)
    task_arguments.add_stream(parser)
    task_arguments.add_compile(parser)
    task_arguments.add_kernel(parser)
    parser.add_argument("--backend", choices=["native", "official"], default="native",
                        help="what runs the model: this package, or ByteDance's own code in a process of its own "
                             "(docs/official_source.md)")
    add_official(parser)
    parser.add_argument("--save_path_gen", type=Path, required=True, help="results folder; must not exist")
    parser.add_argument("--save_latents", action="store_true",
                        help="keep every step's x_t and velocity, or every answer token's log-probabilities "
                             "(t2i at 768: 27 MB a picture; t2v at 640, 49 frames: 240 MB a clip; x2t: 0.6 MB a "
                             "token)")
    task_arguments.add_lora(parser)
    task_arguments.add_resume(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(argv)
    from lance_quant import distributed  # late, as torch takes seconds to import: --help does not wait for it
    from lance_quant.cli import requests
    from lance_quant.evaluation.evaluate import job_of, open_baseline, require_kernel, run_model
    from lance_quant.evaluation.run_folder import describe
    from lance_quant.evaluation.sample_store import require_resumable, run_work
    from lance_quant.inference.request import PackedMode

    if args.backend == "official":
        from lance_quant.official import request as official
        from lance_quant.official.results import run_official

        if args.config_path or (args.mode, args.kernel) != ("ondemand", "auto"):
            raise InputError("--config_path, --mode and --kernel are for packed weights, which --backend official does "
                             "not run")
        run_official(official.request_of(args), args.save_path_gen, args.save_latents, args.resume)
        print(args.save_path_gen)
        return
    if args.official_src or args.official_python:
        raise InputError("--official_src and --official_python go with --backend official")
    how = PackedMode(args.mode, args.kernel)
    with distributed.joined(args.device) as team:
        with team.agreed():
            request = requests.request_of(args, team)
            packed, fingerprint = open_baseline(args.model_path, how)
            team.require_free(args.save_path_gen)
            require_resumable(args.save_path_gen, args.resume, team)
            if packed is not None:
                require_kernel(request, [packed], how)
        team.require_same(model=fingerprint, samples=[describe(sample) for sample in request.samples])
        job = job_of(request, {} if packed is None else {"": packed}, fingerprint, how, args.save_latents)
        with run_work(args.save_path_gen, job, args.resume, team) as work:
            run_model(request, packed, how, work.folder, args.save_latents, work.store("run"), team)
        if team.leads:
            print(args.save_path_gen)


def command() -> None:
    """What the console script and `python run_baseline.py` start."""
    script.run(main)


if __name__ == "__main__":
    command()
