#!/usr/bin/env python3
"""Measure this machine: are all kernels right, how fast are they beside float ones, what does a model take.

    python -m benchmarks.machine --out runs/machine
    python -m benchmarks.machine --out runs/machine --device cuda --minutes 7.5

Reads   nothing; weights are made up, in the shapes of Lance_3B
Writes  OUT/machine.json, everything that was measured; OUT/machine.html, the same for a person, in one file
Needs   at most --minutes and a little; 4 GB of memory, 2 GB of disk while it runs
Next    send both files with a bug report, or to have this machine in the README's table

Sections, each in a process of its own, so that a crash is one line of the report and not its end:

    kernels    every kernel that can run here, in every format and dtype, against float64 (kernel_checks.py)
    attention  each of torch's attention paths, against float64 and timed
    steps      a guided step and decoded tokens, merged and compiled, beside the reference kernel
    linears    4-bit linears beside float ones and the published way of computing them (linear_kernels.py)
    decoding   milliseconds of a token (decode.py)
    denoising  milliseconds of a guided step (denoise.py)
    loading    a checkpoint of one layer, float and packed: seconds, and memory beside the model (loader_memory.py)
    memory     peak of a picture's first step (peak_memory.py)

A section that runs out of its share of --minutes keeps what it has. Ratios are of contestants that took turns in one
process; absolute times depend on what else the machine does, which `load` before and after tells.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import awq_apply
from benchmarks import decode, denoise, kernel_checks, linear_kernels, loader_memory, peak_memory, synthetic_lance
from benchmarks.child import Died, in_child, stream
from benchmarks.comparison import Comparison
from benchmarks.random_lance import real_config
from lance_quant.cli import script
from lance_quant.errors import InputError
from lance_quant.evaluation.run_folder import device_name, versions
from lance_quant.inference.device import device_of, dtype_of
from lance_quant.lance.config import LanceConfig
from lance_quant.storage import html
from lance_quant.storage.atomic import whole_folder, write_json
from lance_quant.storage.output_place import require_free

FORMAT = "lance-quant-machine/1"


@dataclass(frozen=True)
class Size:
    """How large everything is.

    linears: inputs and outputs of timed linears
    rows: of their activations
    check: inputs and outputs of checked linears
    picture: height and width in pixels of what is denoised
    layers: decoder layers of decoding; denoising has one
    preset: of synthetic_lance, for loading
    """

    config: LanceConfig
    linears: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    check: tuple[int, int]
    picture: tuple[int, int]
    layers: int
    preset: str


_TINY = LanceConfig(hidden_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                    intermediate_size=256, vocab_size=2048, rms_norm_eps=1e-6, rope_theta=1e6, mrope_section=(4, 6, 6))
SIZES = {"real": Size(real_config(1), ((2048, 11008), (11008, 2048)), (1, 16, 256, 2306), (2048, 512), (768, 768), 4,
                      "layer"),
         # Multiplications of a 768 x 768 step take a CPU minutes.
         "real_cpu": Size(real_config(1), ((2048, 11008), (11008, 2048)), (1, 16, 256, 1024), (2048, 512), (256, 256),
                          2, "layer"),
         "tiny": Size(_TINY, ((128, 256),), (1, 16), (128, 64), (64, 64), 1, "tiny")}


@dataclass(frozen=True)
class Job:
    """What a section needs to know."""

    device: torch.device
    dtype: torch.dtype
    threads: int
    size: Size
    compiled: bool

    def comparison(self, layers: int, rounds: int) -> Comparison:
        """Packed formats beside float ones; the baseline is what the weights would run in unpacked."""
        baseline = str(self.dtype).removeprefix("torch.")
        return Comparison((baseline, "int4", "nvfp4"), baseline, layers, rounds, self.device, self.dtype, self.compiled)


Rows = Iterator[dict[str, Any]]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="what to measure")
    parser.add_argument("--minutes", type=float, default=7.5, help="for all sections together")
    parser.add_argument("--size", choices=["real", "tiny"], default="real", help="tiny: seconds, and no meaning")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch on the CPU")
    parser.add_argument("--compile", action="store_true", help="compiled steps on a CPU too; on CUDA they always run")
    script.add_device(parser)
    args = parser.parse_args(argv)
    if args.minutes <= 0:
        raise InputError(f"--minutes {args.minutes:g}: there must be some time")
    return args


# --- sections: what runs in a process of its own, one dict per result -------------------------------------------------


def kernels(job: Job) -> Rows:
    """See above."""
    for found in kernel_checks.checks(job.device, *job.size.check):
        yield found.row()


def attention(job: Job) -> Rows:
    """See above; the shapes are those of denoising `size.picture`."""
    config, (height, width) = job.size.config, job.size.picture
    latents = height // 16 * (width // 16) + 2
    for found in kernel_checks.attention_checks(job.device, job.dtype, (config.num_attention_heads,
                                                config.num_key_value_heads), config.head_dim, latents, latents + 85):
        yield found.row()


def steps(job: Job) -> Rows:
    """See above."""
    config = replace(job.size.config, vocab_size=2048)
    for found in kernel_checks.step_checks(job.comparison(1, 1), config, *job.size.picture):
        yield found.row()


def linears(job: Job) -> Rows:
    """See above."""
    for n_in, n_out in job.size.linears:
        for rows in job.size.rows:
            for form in ("int4", "nvfp4"):
                cell = linear_kernels.Cell(n_in, n_out, rows, form)
                yield linear_kernels.measure(cell, job.dtype, job.device, every_path=False)


def decoding(job: Job) -> Rows:
    """See above."""
    plan = job.comparison(job.size.layers, rounds=5)
    found = decode.measure(plan, replace(job.size.config, num_hidden_layers=plan.layers), decode.Text(64, 8))
    yield from ({"way": name, **row} for name, row in found.items())


def denoising(job: Job) -> Rows:
    """See above."""
    found = denoise.measure(job.comparison(1, rounds=3), job.size.config, *job.size.picture)
    yield from ({"way": name, **row} for name, row in found.items())


def loading(job: Job) -> Rows:
    """See above."""
    with tempfile.TemporaryDirectory() as folder:
        source, packed = Path(folder) / "source", Path(folder) / "int4"
        synthetic_lance.write(source, synthetic_lance.PRESETS[job.size.preset], 1)
        start = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):
            awq_apply.main(["--src", str(source / "Lance_3B"), "--stats", str(source / "stats.pt"), "--out",
                            str(packed), "--device", "cpu"])
        yield {"way": "awq_apply.py", "seconds": round(time.perf_counter() - start, 1)}
        for way, awq_dir in (("float", None), ("int4", packed)):
            found = in_child(loader_memory.measure, source / "Lance_3B", awq_dir, job.device, job.dtype)
            yield {"way": f"load {way}", **found}


def memory(job: Job) -> Rows:
    """See above."""
    for form in job.comparison(1, 1).formats:
        case = peak_memory.Case("t2i", form, "any", 16, *job.size.picture, False, False, False, job.device, job.dtype)
        found = in_child(peak_memory.measure, case, replace(job.size.config, vocab_size=2048), job.threads)
        yield {"way": form, "weights": found["weights"], "peak": found["peak"]["denoise"]}


# Name -> what runs, and its share of the time.
SECTIONS: dict[str, tuple[Callable[[Job], Rows], float]] = {
    "kernels": (kernels, 0.18), "attention": (attention, 0.06), "steps": (steps, 0.10), "linears": (linears, 0.26),
    "decoding": (decoding, 0.13), "denoising": (denoising, 0.13), "loading": (loading, 0.08), "memory": (memory, 0.06)}


def _prepared(work: Callable[[Job], Rows], job: Job) -> Rows:
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    yield from work(job)


# --- the run --------------------------------------------------------------------------------------------------------


def measure(job: Job, sections: list[str], minutes: float) -> dict[str, dict[str, Any]]:
    """Section -> its rows, its seconds, and what ended it early, if anything did."""
    total = sum(SECTIONS[name][1] for name in sections)
    end, out = time.monotonic(), {}
    for name in sections:
        work, share = SECTIONS[name]
        end += 60 * minutes * share / total
        start, rows, failed = time.monotonic(), [], None
        script.log.info("%s, at most %.0f s ...", name, max(0.0, end - start))
        try:
            for row in stream(_prepared, work, job, seconds=max(1.0, end - start)):
                rows.append(row)
        except Died as error:
            failed = str(error).strip()
            script.log.warning("%s ended early: %s", name, failed.splitlines()[-1])
        out[name] = {"rows": rows, "seconds": round(time.monotonic() - start, 1), "failed": failed}
    return out


def hardware(device: torch.device) -> dict[str, Any]:
    """Names and sizes of what runs here."""
    found: dict[str, Any] = {
        "device": device_name(device), "cpu": device_name(torch.device("cpu")), "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(), "system": platform.platform()}
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        found |= {"compute_capability": f"{facts.major}.{facts.minor}", "gpu_memory_bytes": facts.total_memory,
                  "multiprocessors": facts.multi_processor_count, "cuda": torch.version.cuda,
                  "cudnn": torch.backends.cudnn.version(), "driver": _driver()}
    return found


def _driver() -> str | None:
    if (tool := shutil.which("nvidia-smi")) is None:
        return None
    done = subprocess.run([tool, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True,
                          check=False)
    return done.stdout.strip() or None


def load_average() -> float | None:
    """Processes that wanted to run in the last minute, on average; None where the system does not tell."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def packages() -> dict[str, str]:
    """Versions that kernels depend on."""
    found = versions()
    for name in ("triton", "comfy-kitchen", "safetensors", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def problems(result: dict[str, Any]) -> list[str]:
    """What went wrong, one line each."""
    lines = []
    for name, section in result["sections"].items():
        if section["failed"]:
            lines.append(f"{name}: {section['failed'].splitlines()[-1]}")
        for row in section["rows"]:
            if row.get("ok") is False:
                about = " ".join(str(row[key]) for key in ("what", "kernel", "format", "dtype") if row[key])
                error = row["note"] or f"error {row['error']:.2g}, at most {row['limit']:.2g} is right"
                lines.append(f"{name}: {about}, {row['rows']} rows: {error}")
    return lines


def summary(result: dict[str, Any]) -> list[str]:
    """The report in a few sentences."""
    checked = [row for section in result["sections"].values() for row in section["rows"] if "ok" in row]
    out = [f"{sum(row['ok'] for row in checked)} of {len(checked)} checks of values are right."]
    timed = [row for section in result["sections"].values() for row in section["rows"] if "ours_is_faster_by" in row]
    fewest, most = (choose((row["rows"] for row in timed), default=0) for choose in (min, max))
    for row in timed:
        if row["rows"] in (fewest, most):
            ratios = ", ".join(f"{value:.2f} x {name}" for name, value in row["ours_is_faster_by"].items())
            out.append(f"{row['format']} linear {row['n_in']} to {row['n_out']}, {row['rows']} rows, speed: {ratios}.")
    for name, key in (("decoding", "speedup"), ("denoising", "times_baseline")):
        for row in result["sections"].get(name, {}).get("rows", []):
            out.append(f"{name}, {row['way']}: {row[key]:.2f} x "
                       f"{'as fast as' if key == 'speedup' else 'the time of'} the first.")
    return out


def page(result: dict[str, Any]) -> str:
    """machine.html."""
    return html.render(Path(__file__).with_name("machine.html.jinja"), title="Lance-quant on this machine",
                       result=result, problems=problems(result), summary=summary(result))


def main(argv: list[str] | None = None) -> None:
    """Measure and write."""
    args = parse_args(argv)
    require_free(args.out)
    device = device_of(args.device)
    size = SIZES["tiny" if args.size == "tiny" else "real_cpu" if device.type == "cpu" else "real"]
    job = Job(device, dtype_of(args.dtype, device), args.threads, size, args.compile or device.type == "cuda")
    torch.set_num_threads(args.threads)
    start, before = time.monotonic(), load_average()
    sections = measure(job, args.sections, args.minutes)
    result = {"format": FORMAT, "size": args.size, "dtype": str(job.dtype).removeprefix("torch."),
              "threads": args.threads, "hardware": hardware(device), "versions": packages(),
              "load": [before, load_average()], "seconds": round(time.monotonic() - start, 1), "sections": sections}
    with whole_folder(args.out) as folder:
        write_json(folder / "machine.json", result)
        (folder / "machine.html").write_text(page(result), encoding="utf-8")
    for line in [*summary(result), *(f"PROBLEM  {line}" for line in problems(result))]:
        print(line)
    print(json.dumps({"out": str(args.out), "problems": len(problems(result)), "seconds": result["seconds"]}))


if __name__ == "__main__":
    script.run(main)
