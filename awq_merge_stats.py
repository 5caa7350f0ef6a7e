#!/usr/bin/env python3
"""Add the activation statistics of several calibration runs of one model.

    python awq_merge_stats.py --inputs calib/t2i.pt calib/x2t_image.pt --out calib/all.pt

Reads   statistics files (awq_calibrate_single.py), ours or published ones
Writes  one statistics file; a table of what it covers goes to the log
Needs   a second and a few MB
Next    awq_apply.py --stats OUT, nvfp4_apply.py --stats OUT
"""

import argparse
from pathlib import Path

from lance_quant.cli import script
from lance_quant.errors import InputError
from lance_quant.formats import layout
from lance_quant.storage.output_place import require_free


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    parser.add_argument("--inputs", type=Path, nargs="+", required=True, help="statistics files of one model")
    parser.add_argument("--out", type=Path, required=True, help="file to create; never overwritten")
    parser.add_argument("--weights", type=float, nargs="+",
                        help="one positive factor per input for its token counts and sums; default: every token counts"
                             " alike, so a longer run weighs more")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Merge, save, say what is covered."""
    args = parse_args(argv)
    # late, as torch takes seconds to import: --help needs none of it
    from lance_quant.calibration.activation_stats import ActStats, coverage, merge

    require_free(args.out)
    merged = merge([ActStats.load(path) for path in args.inputs], args.weights)
    if not merged.linears:
        raise InputError("no file of --inputs has data of any linear; calibrate again")
    covered = coverage(merged, layout.linears(layout.num_layers(merged.linears)))
    merged.save(args.out)
    script.log.info("%s", covered)
    print(args.out)


def command() -> None:
    """What the console script and `python awq_merge_stats.py` start."""
    script.run(main)


if __name__ == "__main__":
    command()
