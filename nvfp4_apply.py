#!/usr/bin/env python3
"""Quantize a Lance checkpoint to NVFP4: AWQ scales moved exactly, then GPTQ where layer inputs were captured.

    python nvfp4_apply.py --src Lance_3B/model.safetensors --stats calib/all.pt --out Lance_3B-NVFP4

Reads   a float checkpoint; activation statistics (awq_merge_stats.py); captures, if given
Writes  OUT/nvfp4_state_dict.safetensors and OUT/nvfp4_meta.json, for Lance_3B 5.09 GB, 4.39 GB with --slim, and
        OUT/quant_report.html
Needs   2 GB of memory (two layers) and the space for the output; 1.9 CPU seconds per layer of Lance_3B, so a minute or
        two, or as long as the disk takes. With --capture 7 GB and the captured states (down_proj's Gram matrix alone
        is 0.5 GB), and three to seven minutes per layer on one core, more with many tokens: meant for a GPU; with
        --gptq light 3 GB and three quarters of a minute
Next    run_quant_eval.py --awq_dir OUT
"""

import argparse

from lance_quant.cli import conversion_arguments, script
from lance_quant.errors import InputError
from lance_quant.formats.group_sizes import NVFP4_BLOCK


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    conversion_arguments.add_conversion(parser)
    parser.add_argument("--block_size", type=int, default=NVFP4_BLOCK,
                        help="inputs per scale; the format allows no other value")
    parser.add_argument("--slim", action="store_true",
                        help="store each scale once, as E4M3 bytes: the same values in 4.5 instead of 5.5 bits per"
                             " weight; readers of the published layout cannot open it")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Plan or convert, and print the result."""
    args = parse_args(argv)
    from lance_quant.formats.nvfp4 import Nvfp4  # late, as torch takes seconds to import: --help needs none of it
    from lance_quant.inference.device import device_of
    from lance_quant.methods import convert
    from lance_quant.methods.conversion import Conversion

    conversion_arguments.set_threads(args.threads)
    codec = Nvfp4(args.slim)
    if args.block_size != codec.group_size:
        raise InputError(f"--block_size {args.block_size}: NVFP4 has blocks of {codec.group_size}")
    conversion = Conversion(codec, args.recipe, head_bits=args.head_bits, device=device_of(args.device),
                            resume=args.resume, with_parts=args.with_parts, gptq=args.gptq)
    print(convert.run(args.src, args.stats, args.capture, args.out, conversion, args.dry_run))


def command() -> None:
    """What the console script and `python nvfp4_apply.py` start."""
    script.run(main)


if __name__ == "__main__":
    command()
