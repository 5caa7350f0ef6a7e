#!/usr/bin/env python3
"""Check `lance-quant plan` against measured peaks: real shapes, random weights made in place, every stage of a question
and of a picture on the CPU.

    python -m benchmarks.plan_check                                    # 1 of 36 layers, 256 x 256, minutes
    python -m benchmarks.plan_check --formats int4 --layers 4 --height 512 --width 512

Reads   nothing; weights are made in place
Writes  nothing; the last line on stdout is the result as JSON, all sizes in bytes: by task, format and stage what was
        planned and what was measured (benchmarks/peak_memory.py, a process each), and their ratio

What is compared is the resident memory of the process, Python and libraries included. How much that is before a model
is there, the plan measures, in both cases.
"""

import argparse
import json

import torch

from benchmarks import peak_memory
from benchmarks.child import in_child
from benchmarks.random_lance import FORMATS, compute_dtype, real_config
from lance_nano import CHECKPOINT
from lance_quant.cli import script
from lance_quant.evaluation.run_folder import device_name, versions
from lance_quant.formats import layout
from lance_quant.inference import memory_plan
from lance_quant.inference.memory import resident_memory
from lance_quant.inference.memory_plan import Files, How
from lance_quant.lance.config import LanceConfig
from lance_quant.lance.mot import Lance
from lance_quant.lance.settings import Settings
from lance_quant.lance.tokens import LanceTokenizer
from lance_quant.storage.tensor_file import TensorSpec

_VIT_SIZES = {"hidden_size": 1280, "intermediate_size": 3420}
_TASKS = {"x2t": "x2t_image", "t2i": "t2i"}
# What a stage of peak_memory.py is in a plan: the prompt is read in the stage behind it.
_STAGES = {"look": ("look",), "answer": ("prompt", "answer"), "denoise": ("prompt", "denoise, guided"),
           "decode": ("decode",)}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=_TASKS, default=list(_TASKS), help="what runs")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["float32", "int4"], help="of the linears")
    parser.add_argument("--layers", type=int, default=1, help="decoder layers, of 36")
    parser.add_argument("--height", type=int, default=256, help="of the picture that t2i makes")
    parser.add_argument("--width", type=int, default=256, help="of the picture that t2i makes")
    parser.add_argument("--no_decode", action="store_true", help="leave the VAE out, which takes minutes")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of packed linears")
    parser.add_argument("--vae_tiling", action="store_true", help="as for run_baseline.py")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure, plan, print."""
    args = parse_args(argv)
    rows = []
    base = in_child(process)
    print(f"{device_name(torch.device('cpu'))}; GB, planned / measured; {base / 1e9:.2f} before a model is there")
    for case in peak_memory.cases_of(argparse.Namespace(
            **vars(args), offload=["none"], head_bits=16, sequential_guidance=False, vae=not args.no_decode,
            device="cpu")):
        config = real_config(args.layers)
        measured = in_child(peak_memory.measure, case, config, args.threads)["peak"]
        found = planned(case, config, base)
        for stage, bytes_ in measured.items():
            row = {"task": case.task, "format": case.format, "stage": stage, "planned": found[stage],
                   "measured": bytes_, "ratio": round(found[stage] / bytes_, 3)}
            rows.append(row)
            print(f"{case.task} {case.format:<11}{stage:<8}{found[stage] / 1e9:.2f} / {bytes_ / 1e9:.2f} = "
                  f"{row['ratio']:.2f}", flush=True)
    print(json.dumps({"device": device_name(torch.device("cpu")), "layers": args.layers, "process": base,
                      "rows": rows, "versions": versions()}))


def process() -> int:
    """Bytes of a process with everything imported, and no model."""
    import lance_quant.lance.vae  # noqa: F401 - diffusers

    return resident_memory() or 0


def planned(case: peak_memory.Case, config: LanceConfig, base: int) -> dict[str, int]:
    """Peaks by stage as peak_memory.py names and measures them: a first request, whose VAE was not there before."""
    files = files_of(config, case.format)
    how = How(compute_dtype(case.format, case.dtype), True, offload="vae_vit", vae_tiling=case.vae_tiling)
    settings = Settings(_TASKS[case.task], height=case.height, width=case.width, max_new_tokens=4)
    plan = memory_plan.plan(files, settings, how, base)
    found = {ours: max(plan.stages[name] for name in names) for ours, names in _STAGES.items()
             if set(names) <= plan.stages.keys()}
    if "answer" in found:  # --offload none: the ViT is still there
        found["answer"] += files.vit_parameters * how.dtype.itemsize
    return found


def files_of(config: LanceConfig, form: str) -> Files:
    """What headers would say of random_lance's model."""
    with torch.device("meta"):
        model = Lance(config, torch.float32, torch.device("meta"))
    specs: dict[str, TensorSpec] = {name: TensorSpec(torch.float32, tuple(value.shape))
                                    for name, value in model.state_dict().items()}
    codec = FORMATS[form]
    if codec is not None:
        for name in layout.linears(config.num_hidden_layers):
            shape = specs.pop(f"{name}.weight").shape
            specs |= {f"{name}.{suffix}": spec for suffix, spec in codec.specs(shape).items()}
    return Files(config, specs, codec is not None, LanceTokenizer(CHECKPOINT), memory_plan.VIT_PARAMETERS, _VIT_SIZES,
                 memory_plan.VAE_WIDTHS, ())


if __name__ == "__main__":
    script.run(main)
