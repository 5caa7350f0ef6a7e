#!/usr/bin/env python3
"""Run quantized Lance on one task and say how far it is from the float model.

    python run_quant_eval.py --task t2i --model_path downloads/Lance_3B --awq_dir Lance_3B-AWQ-INT4 Lance_3B-NVFP4 \\
        --example_json prompts.json --baseline results/bf16 --save_path_gen results/quantized

Reads   MODEL_PATH (llm_config.json, tokenizer; the float weights only where no --baseline is given), one or more
        packed folders, ViT or VAE as the task needs, and the baseline's results folder
Writes  SAVE_PATH_GEN: a results folder per packed folder, comparison.json, report.md, report.html
Needs   4.3 GB (INT4) or 5.1 GB (NVFP4) for the weights of Lance_3B in mode ondemand, as much as bfloat16 in mode cached
Next    open report.html
"""

import argparse
import functools
from pathlib import Path

from lance_quant import distributed
from lance_quant.cli import script, task_arguments
from lance_quant.distributed import Team
from lance_quant.errors import InputError
from lance_quant.evaluation import report
from lance_quant.evaluation.compare import compare_run, run_entry, section
from lance_quant.evaluation.run_folder import Results, RunRecord, describe, drop_traces, require_source, run_task
from lance_quant.formats.packed_folder import PackedFolder
from lance_quant.inference.device import device_of, dtype_of
from lance_quant.inference.tasks import Settings, load_samples
from lance_quant.lance.runtime import Runtime
from lance_quant.storage.atomic import write_json
from quantized_linear import require_kernel, swap_linears


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    task_arguments.add_model(parser)
    task_arguments.add_task(parser)
    task_arguments.add_stream(parser)
    task_arguments.add_compile(parser)
    parser.add_argument("--awq_dir", type=Path, nargs="+", required=True,
                        help="packed folders from awq_apply.py or nvfp4_apply.py, or published ones")
    parser.add_argument("--mode", choices=["ondemand", "cached"], default="ondemand",
                        help="ondemand computes on the packed bytes; cached keeps linears in the compute dtype")
    task_arguments.add_kernel(parser)
    parser.add_argument("--baseline", type=Path,
                        help="results folder of run_baseline.py --save_latents; default: run the float model first")
    parser.add_argument("--save_path_gen", type=Path, required=True, help="results folder; must not exist")
    parser.add_argument("--save_latents", action="store_true", help="keep the traces that were compared")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(argv)
    with distributed.joined(args.device) as team:
        with team.agreed():
            settings = task_arguments.settings_of(args)
            samples = load_samples(args.example_json, settings, args.limit)
            packed = _open(args.awq_dir)
            task_arguments.paths_of(args)
            task_arguments.stream_of(args, team)
            team.require_free(args.save_path_gen)
            _require_comparable(args, settings, samples, packed)
            _require_kernel(args, packed)
        team.require_same(models=[one.meta for one in packed.values()], samples=[describe(one) for one in samples])
        with team.folder(args.save_path_gen) as folder:
            sections = _compare_all(args, settings, samples, packed, folder, team)
            if team.leads:
                write_json(folder / "comparison.json", sections)
                report.write(folder, sections)
                if not args.save_latents:
                    drop_traces(folder)
        if team.leads:
            script.log.info("%s", report.summary_table(sections))
            print(args.save_path_gen / "report.html")


def _open(folders: list[Path]) -> dict[str, PackedFolder]:
    """The packed folders by name, which names their results too."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names) or "baseline" in names:
        raise InputError(f"--awq_dir {' '.join(names)}: folders need different names, none of them 'baseline'")
    return {name: PackedFolder(folder) for name, folder in zip(names, folders, strict=True)}


def _require_comparable(args: argparse.Namespace, settings: Settings, samples: list,
                        packed: dict[str, PackedFolder]) -> None:
    """Raise InputError, before anything is loaded, unless baseline and packed folders compare."""
    if args.baseline:
        with Results(args.baseline) as baseline:
            baseline.require_same(settings, samples, dtype_of(args.dtype, device_of(args.device)))
        fingerprint, what = baseline.run["model"].get("fingerprint"), f"the model of baseline {args.baseline}"
    else:
        fingerprint = task_arguments.float_facts(args.model_path)["fingerprint"]
        what = f"--model_path {args.model_path}"
    for one in packed.values():
        require_source(one, fingerprint, what)


def _require_kernel(args: argparse.Namespace, packed: dict[str, PackedFolder]) -> None:
    """Raise InputError, before anything is loaded, if --kernel cannot run the packed folders."""
    if args.mode == "cached":
        if args.kernel != "auto":
            script.log.warning("of no effect with --mode cached: --kernel")
        return
    device = device_of(args.device)
    for one in packed.values():
        require_kernel(one, dtype_of(args.dtype, device), device, args.kernel)


def _compare_all(args: argparse.Namespace, settings: Settings, samples: list, packed: dict[str, PackedFolder],
                 folder: Path, team: Team) -> list[dict]:
    """Run and compare every packed folder, after the float model where there is no baseline; the report's sections,
    complete on the leader."""
    if not args.baseline:
        _run(args, settings, samples, folder / "baseline", team)
    with Results(args.baseline or folder / "baseline") as baseline:
        sections = [section(settings, baseline, folder)]
        for name, one in packed.items():
            compared = _compare(args, settings, samples, one, baseline, folder / name, team)
            if team.leads:
                sections[0]["runs"].append(run_entry(name, settings.task, compared, folder))
    return sections


def _compare(args: argparse.Namespace, settings: Settings, samples: list, packed: PackedFolder, baseline: Results,
             folder: Path, team: Team) -> list[dict]:
    """Run one packed folder and compare it; the model is gone when this returns, before the next one is loaded."""
    pipeline = _run(args, settings, samples, folder, team, packed)
    return compare_run(pipeline, samples, settings, baseline, folder, team)


def _run(args: argparse.Namespace, settings: Settings, samples: list, folder: Path, team: Team,
         packed: PackedFolder | None = None) -> Runtime:
    """Run the task with the float weights or with packed ones, into `folder`; return the model."""
    device = device_of(args.device)
    dtype = dtype_of(args.dtype, device)
    facts = packed.facts() if packed else task_arguments.float_facts(args.model_path)
    record = RunRecord(device, dtype, facts, vars(args))
    prepare = packed and functools.partial(swap_linears, folder=packed, dtype=dtype, device=device, mode=args.mode,
                                           kernel=args.kernel)
    folder.mkdir()
    with record.stage("load"):
        paths = task_arguments.paths_of(args)
        pipeline = task_arguments.load_to_run(args, paths, packed and packed.checkpoint.path, prepare)
    keep_trace = packed is None or settings.spec.makes != "text"  # of answers, only the baseline's trace is read
    run_task(pipeline, samples, settings, record, folder, keep_trace, task_arguments.stream_of(args, team), team)
    return pipeline


def command() -> None:
    """What the console script and `python run_quant_eval.py` start."""
    script.run(main)


if __name__ == "__main__":
    command()
