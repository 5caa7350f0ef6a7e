#!/usr/bin/env python3
"""Fold LoRAs into a float Lance, so that the 4-bit weights made of it have learned them.

    python merge_lora.py --src downloads/Lance_3B --lora style.safetensors:0.8 --out Lance_3B-style

Reads   a float checkpoint, with configuration and tokenizer beside it; LoRA files (docs/lora.md)
Writes  OUT/model.safetensors and what lay beside the source; whole or not at all
Needs   one tensor in memory at a time, and space for the output
Next    awq_calibrate_single.py --model_path OUT; or serve it without merging: --lora of the scripts that run a model
"""

import argparse
from pathlib import Path

from lance_quant.cli import script
from lance_quant.errors import InputError


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    parser.add_argument("--src", type=Path, required=True,
                        help="float checkpoint: a safetensors file, an index, or a folder that holds one")
    parser.add_argument("--lora", action="append", required=True, metavar="FILE[:STRENGTH]",
                        help="LoRA file or PEFT folder: FILE, FILE:0.8, or per expert FILE:und=0.8,gen=0.5; may be "
                             "given several times")
    parser.add_argument("--out", type=Path, help="folder to create; not written by --dry_run")
    parser.add_argument("--dry_run", action="store_true", help="read the LoRAs and headers, and print what there is")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Merge, and print where."""
    args = parse_args(argv)
    from lance_quant.formats.lora_file import parse  # late, as torch takes seconds: --help does not wait for it
    from lance_quant.methods.merge_lora import merge

    if args.out is None and not args.dry_run:
        raise InputError("--out is needed unless --dry_run is given")
    script.result(merge(args.src, args.out or Path(), [parse(text) for text in args.lora], args.dry_run))


def command() -> None:
    """What the console script and `python merge_lora.py` start."""
    script.run(main)


if __name__ == "__main__":
    command()
