#!/usr/bin/env python3
"""Quantize a Lance checkpoint to INT4: AWQ scales moved exactly, then GPTQ where layer inputs were captured.

    python awq_apply.py --src Lance_3B/model.safetensors --stats calib/all.pt --out Lance_3B-AWQ-INT4

Reads   a float checkpoint; activation statistics (awq_merge_stats.py); captures, if given
Writes  OUT/awq_state_dict.safetensors and OUT/awq_meta.json, 4.31 GB for Lance_3B at group size 64, and
        OUT/quant_report.html
Needs   2 GB of memory (two layers) and the space for the output; 1.3 CPU seconds per layer of Lance_3B, so a minute or
        two, or as long as the disk takes. With --capture 7 GB and the captured states (down_proj's Gram matrix alone
        is 0.5 GB), and three to seven minutes per layer on one core, more with many tokens: meant for a GPU; with
        --gptq light 3 GB and three quarters of a minute
Next    run_quant_eval.py --awq_dir OUT
"""

import argparse

from lance_quant.cli import conversion_arguments, script
from lance_quant.formats.group_sizes import INT4_GROUP_SIZE


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    conversion_arguments.add_conversion(parser)
    parser.add_argument("--group_size", type=int, default=INT4_GROUP_SIZE,
                        help="inputs per scale: 64 is 4.375 bits per weight, 128 is 4.1875, 32 is 4.75")
    parser.add_argument("--bits_budget", type=float,
                        help="choose 128, 64 or 32 inputs per scale, or bfloat16, for every linear, so that all take at"
                             " most this many stored bits per weight; by --capture, if given, else by --stats")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Plan or convert, and print the result."""
    args = parse_args(argv)
    from lance_quant.formats.int4 import Int4  # late, as torch takes seconds to import: --help needs none
    from lance_quant.inference.device import device_of
    from lance_quant.methods import convert
    from lance_quant.methods.conversion import Conversion

    conversion_arguments.set_threads(args.threads)
    conversion = Conversion(Int4(args.group_size), args.recipe, args.bits_budget, args.head_bits,
                            device_of(args.device), args.resume, args.with_parts, gptq=args.gptq)
    print(convert.run(args.src, args.stats, args.capture, args.out, conversion, args.dry_run))


def command() -> None:
    """What the console script and `python awq_apply.py` start."""
    script.run(main)


if __name__ == "__main__":
    command()
