#!/usr/bin/env python3
"""The whole pipeline on a small model, in minutes on any machine: what `make demo` runs.

    python examples/demo.py --out demo_out

Reads   lance_nano/checkpoint (or --model_path)
Writes  OUT/samples, OUT/calib, OUT/int4, OUT/nvfp4, OUT/eval_x2t_image, OUT/eval_t2i, OUT/report.html, and
        OUT/side_by_side.png: the first held-out captions as the float model, INT4 and NVFP4 draw them from one noise
Next    open OUT/report.html; then the same commands, as printed, with the real weights
"""

import argparse
import json
import shlex
import textwrap
import time
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import awq_apply
import awq_calibrate_single
import awq_merge_stats
import nvfp4_apply
import run_quant_eval
from lance_nano import CHECKPOINT, samples
from lance_nano.evaluate import RESOLUTION
from lance_nano.scenes import SIZE
from lance_quant.cli import script
from lance_quant.evaluation import report
from lance_quant.storage.output_place import require_free

TASKS = ("x2t_image", "t2i")
COLUMNS, GAP, LABEL, LINE = 6, 8, 122, 15  # pictures a row; between them, left of them and per line of text, in pixels


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--model_path", type=Path, default=CHECKPOINT, help="a model for 112 x 112 pictures")
    parser.add_argument("--calibrate", type=int, default=24, help="calibration samples per task")
    parser.add_argument("--test", type=int, default=8, help="compared samples per task")
    parser.add_argument("--steps", type=int, default=30, help="denoising steps")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run every stage in order."""
    args = parse_args(argv)
    require_free(args.out)
    start, out = time.perf_counter(), args.out
    run(samples, "--out", out / "samples", "--n", max(args.calibrate, args.test))
    model = ["--model_path", args.model_path, "--resolution", RESOLUTION, "--video_height", SIZE, "--video_width", SIZE]
    for task in TASKS:
        run(awq_calibrate_single, "--task", task, *model, "--example_json", out / f"samples/calibrate_{task}.json",
            "--limit", args.calibrate, "--num_timesteps", args.steps, "--out", out / f"calib/{task}.pt",
            "--capture", out / f"calib/{task}.safetensors")
    stats = out / "calib/all.pt"
    run(awq_merge_stats, "--inputs", *(out / f"calib/{task}.pt" for task in TASKS), "--out", stats)
    known = ["--stats", stats, "--capture", *(out / f"calib/{task}.safetensors" for task in TASKS)]
    run(awq_apply, "--src", args.model_path, *known, "--out", out / "int4")
    run(nvfp4_apply, "--src", args.model_path, *known, "--out", out / "nvfp4", "--slim")
    for task in TASKS:
        run(run_quant_eval, "--task", task, *model, "--example_json", out / f"samples/test_{task}.json",
            "--limit", args.test, "--validation_num_timesteps", args.steps, "--awq_dir", out / "int4", out / "nvfp4",
            "--save_path_gen", out / f"eval_{task}")
    sections = [section for task in TASKS for section in rooted(out, f"eval_{task}")]
    report.write(out, sections)
    side_by_side(sections[-1], out).save(out / "side_by_side.png")
    print(f"\n{report.summary_table(sections)}\n")
    print(f"{time.perf_counter() - start:.0f} seconds; look at {out / 'report.html'}")


def run(script: object, *flags: object) -> None:
    """Run a script's main with these flags, after printing the command that does the same from a shell."""
    argv = [str(flag) for flag in flags]
    name = script.__name__
    command = f"python -m {name}" if "." in name else f"python {name}.py"
    print(f"\n$ {command} {shlex.join(argv)}", flush=True)
    script.main(argv)


def rooted(out: Path, folder: str) -> list[dict]:
    """The sections of an evaluation, with their folders relative to `out`."""
    sections = json.loads((out / folder / "comparison.json").read_text(encoding="utf-8"))
    for section in sections:
        for entry in (section["baseline"], *section["runs"]):
            entry["folder"] = f"{folder}/{entry['folder']}"
    return sections


def side_by_side(section: dict, root: Path) -> Image.Image:
    """The first pictures of a t2i comparison: a column per caption, a row per model, all from the same noise.

    Args:
        section: as in comparison.json; its folders are relative to `root`.
    """
    shown = section["runs"][0]["samples"][:COLUMNS]
    rows = [(f"float\n{bits(section['baseline'])}", section["baseline"]["folder"], [""] * len(shown))]
    rows += [(f"{run['model']['format'].upper()}\n{bits(run)}", run["folder"],
              [f"PSNR {sample['psnr']:.1f} dB" for sample in run["samples"]]) for run in section["runs"]]
    page = Image.new("RGB", corner(len(rows), len(shown)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for row, (label, folder, notes) in enumerate(rows):
        _, top = corner(row, 0)
        pen.text((GAP, top + SIZE // 3), label, "black", font)
        for column, sample in enumerate(shown):
            page.paste(Image.open(root / folder / sample["file"]), corner(row, column))
            pen.text((corner(row, column)[0], top + SIZE + 2), notes[column], "dimgray", font)
    for column, sample in enumerate(shown):
        pen.text((corner(0, column)[0], 0), textwrap.fill(sample["prompt"], 18), "black", font)
    return page


def corner(row: int, column: int) -> tuple[int, int]:
    """Left and top of a model's picture of a caption, in pixels."""
    return LABEL + column * (SIZE + GAP), 7 * LINE + row * (SIZE + LINE + GAP)


def bits(entry: dict) -> str:
    """What a model's decoder takes, for the picture."""
    return f"{entry['model']['bits_per_weight']:.2f} bits a weight"


if __name__ == "__main__":
    script.run(main)
