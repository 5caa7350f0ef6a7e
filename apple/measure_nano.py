#!/usr/bin/env python3
"""Measure what calibration gains in MLX's three 4-bit formats, at the same size, on lance-nano.

    python -m apple.measure_nano

For every seed: --n questions for calibration, as seen in training, and --n held-out ones for the measurement, with
pictures. Every format is written as MLX rounds (plain), with activation statistics, and with statistics and captured
layer inputs (GPTQ); apple/compare_mlx.py then measures them side by side.

Reads   lance_nano/checkpoint (or --model_path)
Writes  nothing that stays; prints a table in Markdown and, as the last line, JSON
Needs   70 CPU-seconds per seed and 1 GB of memory; neither MLX nor a Mac
Next    apple/README.md
"""

import argparse
import io
import json
import logging
import statistics
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import awq_calibrate_single
from apple import compare_mlx, export_mlx, extract_und
from apple.mlx_codes import FORMATS
from lance_nano import samples
from lance_quant.cli import script

log = logging.getLogger("lance_quant")

MODEL = Path(__file__).resolve().parents[1] / "lance_nano" / "checkpoint" / "Lance_nano"
WAYS = ("plain", "stats", "stats + capture")
RESOLUTION = "image_112res"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    parser.add_argument("--model_path", type=Path, default=MODEL, help="a lance-nano folder")
    parser.add_argument("--n", type=int, default=64, help="questions for calibration, and as many held-out ones")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of scenes and questions")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table."""
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as work:
        _quietly(extract_und.main, "--src", args.model_path, "--out", Path(work) / "und")
        rows = [row for seed in args.seeds for row in measure(args.model_path, Path(work), seed, args.n)]
    print(table(rows))
    print(json.dumps({"model": args.model_path.name, "n": args.n, "seeds": args.seeds, "rows": rows}))


def measure(model: Path, work: Path, seed: int, n: int) -> list[dict[str, Any]]:
    """One row per format and way."""
    asked, stats, capture = work / f"samples{seed}", work / f"{seed}.pt", work / f"{seed}.safetensors"
    samples.write(asked, n, seed)
    _quietly(awq_calibrate_single.main, "--task", "x2t_image", "--model_path", model, "--resolution", RESOLUTION,
             "--example_json", asked / "calibrate_x2t_image.json", "--device", "cpu", "--out", stats, "--capture",
             capture)
    more = {"plain": (), "stats": ("--stats", stats), "stats + capture": ("--stats", stats, "--capture", capture)}
    made = {(fmt, way): work / f"{fmt} {way} {seed}" for fmt in FORMATS for way in WAYS}
    for (fmt, way), out in made.items():
        _quietly(export_mlx.main, "--src", work / "und", "--format", fmt, "--out", out, "--packer", "ours",
                 "--device", "cpu", *more[way])
    lines = _quietly(compare_mlx.main, "--model_path", model, "--resolution", RESOLUTION, "--device", "cpu",
                     "--example_json", asked / "test_x2t_image.json", "--mlx_dir", *made.values()).splitlines()
    rows = [{**json.loads(line), "format": fmt, "way": way, "seed": seed}
            for (fmt, way), line in zip(made, lines, strict=True)]
    log.info("seed %d\n%s", seed, table(rows))
    return rows


def _quietly(script: Any, *flags: object) -> str:
    """What a script's main would print."""
    with redirect_stdout(io.StringIO()) as shown:
        script([str(flag) for flag in flags])
    return shown.getvalue()


def table(rows: list[dict[str, Any]]) -> str:
    """Per format and way: bytes, relative error of the logits and KL, each as mean ± deviation over the seeds."""
    lines = ["| format | calibration | bytes | relative error of the logits | KL per token |", "|---|---|---|---|---|"]
    for fmt in FORMATS:
        for way in WAYS:
            own = [row for row in rows if (row["format"], row["way"]) == (fmt, way)]
            error, kl = ([row[key] for row in own] for key in ("logit_error", "kl"))
            lines.append(f"| {fmt} | {way} | {own[0]['bytes']:,} | {_spread(error, 3)} | {_spread(kl, 5)} |")
    return "\n".join(lines)


def _spread(values: list[float], digits: int) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ± {deviation:.{digits}f}"


if __name__ == "__main__":
    script.run(main)
