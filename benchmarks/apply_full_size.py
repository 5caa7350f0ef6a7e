#!/usr/bin/env python3
"""Measure what awq_apply.py and nvfp4_apply.py need on a checkpoint of real shapes, beside the published search.

    python -m benchmarks.apply_full_size --work runs/apply --layers 2
    python -m benchmarks.apply_full_size --work runs/apply --layers 36 --formats int4

Reads   nothing; the checkpoint is made (synthetic_lance.py): 1.9 GB plus 0.63 GB per layer and copy
Writes  WORK, removed at the end; a table in Markdown on stdout, and the result as JSON as the last line
Needs   for `published` 2.5 GB of memory for INT4 and 4.5 GB for NVFP4; on one CPU core 1 and 4 minutes

Everything runs in a process of its own, one after another, with the same number of threads. `ours` is the script from
start to end: a layer's time is that of reading, searching and writing all layers over their number, `rest` what comes
before and after (start, embedding and head). `published` is the published search and packing
(lance_quant/methods/published.py; its NVFP4 with the table of distances that the published script makes) of one expert
of one layer in memory, times two,
without reading and writing. `disk` reads the whole checkpoint and writes as many bytes as the output has, no more.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import awq_apply
import nvfp4_apply
from benchmarks import synthetic_lance
from benchmarks.child import in_child
from lance_quant.calibration.activation_stats import ActStats
from lance_quant.cli import script
from lance_quant.evaluation.run_folder import device_name
from lance_quant.formats import layout
from lance_quant.formats.base import Codec
from lance_quant.formats.int4 import Int4
from lance_quant.formats.nvfp4 import E2M1_MAX, MAGNITUDES, Nvfp4
from lance_quant.inference.memory import peak_memory
from lance_quant.methods import convert, plan, published
from lance_quant.storage.tensor_file import Checkpoint, file_size

LAYERS = 36  # of Lance_3B
FORMATS: dict[str, tuple[Any, Codec]] = {"int4": (awq_apply, Int4()), "nvfp4": (nvfp4_apply, Nvfp4())}
_PIECE = 1 << 24


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder to create, and to remove at the end")
    parser.add_argument("--layers", type=int, default=2, help="decoder layers of the checkpoint")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="which to measure")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of every run")
    parser.add_argument("--preset", choices=synthetic_lance.PRESETS, default="real", help="real: the sizes of Lance_3B")
    return parser.parse_args(argv)


class Clock:
    """Seconds of wall clock and of CPU, all threads, since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """So far."""
        return {"seconds": time.perf_counter() - self._wall, "cpu_seconds": time.process_time() - self._cpu}


def ours(name: str, source: Path, out: Path) -> dict[str, float]:
    """The script, from start to end; `layers_...` up to the moment when the last layer is written."""
    script, clock, marks = FORMATS[name][0], Clock(), []
    run, copy_rest = convert._Job.run, convert._copy_rest

    def timed_run(*args: Any) -> Any:
        marks.append(clock.read())
        return run(*args)

    def timed_rest(*args: Any) -> None:
        marks.append(clock.read())
        copy_rest(*args)

    with mock.patch.object(convert._Job, "run", timed_run), mock.patch.object(convert, "_copy_rest", timed_rest):
        script.main(["--src", str(source / "Lance_3B"), "--stats", str(source / "stats.pt"), "--out", str(out),
                     "--device", "cpu"])
    start, end = marks
    total = clock.read()
    return {**total, **{f"layers_{key}": end[key] - start[key] for key in total}}


def published_expert(name: str, source: Path, out: Path) -> dict[str, float]:
    """Search and packing of one expert's linears of layer 0 by the published recipe."""
    stats, codec = ActStats.load(source / "stats.pt"), FORMATS[name][1]
    with Checkpoint(source / "Lance_3B") as checkpoint:
        groups = [group for group in layout.groups(0) if group.expert == "und"]
        weights = {linear: checkpoint.read(f"{linear}.weight", torch.bfloat16)
                   for group in groups for linear in group.linears}
    clock = Clock()
    with torch.no_grad(), mock.patch.object(published, "_index", _index_by_distances):
        for group in groups:
            own = [weights[linear] for linear in group.linears]
            means = [stats.linears[linear].sum_abs.float() / stats.linears[linear].n_tokens for linear in group.linears]
            chosen = None if group.norm is None else published.search(own, means, codec)
            for w in own:
                published.pack(w.float() if chosen is None else w.float() * chosen.s, codec)
    return clock.read()


def _index_by_distances(ratio: Tensor) -> Tensor:
    """Equal to published._index, in the way that the published script takes."""
    table = torch.tensor(MAGNITUDES, device=ratio.device)
    return (ratio.abs().clamp(max=E2M1_MAX)[..., None] - table).abs().argmin(-1).int()


def disk(name: str, source: Path, out: Path) -> dict[str, float]:
    """Read every tensor, write as many bytes as the output has."""
    clock, zeros = Clock(), bytes(_PIECE)
    with Checkpoint(source / "Lance_3B") as checkpoint, open(out, "wb") as file:
        for tensor in checkpoint.specs:
            for _ in checkpoint.pieces(tensor):
                pass
        left = file_size(plan.plan(checkpoint.specs, FORMATS[name][1]))
        while left > 0:
            left -= file.write(zeros[:min(left, _PIECE)])
    return clock.read()


def on_threads(function: Callable[..., dict[str, float]], threads: int, *args: Any) -> dict[str, float]:
    """What `function` returns with so many threads, and this process's `peak_rss` in bytes."""
    torch.set_num_threads(threads)
    result = function(*args)
    peak = peak_memory(torch.device("cpu"))["host"]
    return {**result, "peak_rss": float("nan") if peak is None else peak}


def measure(name: str, source: Path, work: Path, layers: int, threads: int) -> dict[str, Any]:
    """All rows of one format; seconds are those of a layer, but for `disk`, `rest` and `full_model`."""
    out, written = work / name, work / f"{name}.bytes"
    mine = in_child(on_threads, ours, threads, name, source, out)
    shutil.rmtree(out)
    theirs = in_child(on_threads, published_expert, threads, name, source, out)
    both = in_child(on_threads, disk, threads, name, source, written)
    written.unlink()
    keys = ("seconds", "cpu_seconds")
    layer = {"ours": {key: mine[f"layers_{key}"] / layers for key in keys} | {"peak_rss": mine["peak_rss"]},
             "published": {key: 2 * theirs[key] for key in keys} | {"peak_rss": theirs["peak_rss"]}}
    rest = {key: mine[key] - mine[f"layers_{key}"] for key in keys}
    return {**layer, "rest": rest, "disk": {key: both[key] for key in keys},
            "times_faster": {key: layer["published"][key] / layer["ours"][key] for key in keys},
            "full_model": {"ours": LAYERS * layer["ours"]["seconds"] + rest["seconds"],
                           "published_search": LAYERS * layer["published"]["seconds"]}}


def table(results: dict[str, Any]) -> str:
    """The result for a person."""
    lines = ["| per layer | seconds | CPU seconds | peak memory |", "|---|---|---|---|"]
    for name, found in results.items():
        lines += [f"| {name} {row} | {found[row]['seconds']:.2f} | {found[row]['cpu_seconds']:.2f} | "
                  f"{found[row]['peak_rss'] / 1e9:.2f} GB |" for row in ("published", "ours")]
        faster, full = found["times_faster"], found["full_model"]
        lines.append(f"| {name} times faster | {faster['seconds']:.1f} | {faster['cpu_seconds']:.1f} | |")
        lines.append(f"| {name} {LAYERS} layers: published search {full['published_search'] / 60:.1f} min; ours, all "
                     f"included, {full['ours'] / 60:.1f} min | | | |")
        lines.append(f"| {name} rest / disk alone, this checkpoint | {found['rest']['seconds']:.2f} / "
                     f"{found['disk']['seconds']:.2f} | {found['rest']['cpu_seconds']:.2f} / "
                     f"{found['disk']['cpu_seconds']:.2f} | |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(argv)
    args.work.mkdir(parents=True)
    try:
        source = args.work / "source"
        synthetic_lance.main(["--out", str(source), "--preset", args.preset, "--layers", str(args.layers)])
        results = {name: measure(name, source, args.work, args.layers, args.threads) for name in args.formats}
    finally:
        shutil.rmtree(args.work)
    print(table(results))
    print(json.dumps({"layers": args.layers, "threads": args.threads, "cpu": device_name(torch.device("cpu")),
                      "torch": str(torch.__version__), **results}))


if __name__ == "__main__":
    script.run(main)
