"""Flags that both quantization scripts take."""

import argparse
from pathlib import Path

from lance_quant.cli import script
from lance_quant.errors import InputError

_MOST_THREADS = 4096  # beyond any machine; more would fail in the operating system


def add_conversion(to: argparse.ArgumentParser) -> None:
    """Source, statistics, captures, output, recipe, --dry_run, threads and device."""
    to.add_argument("--src", type=Path, required=True,
                    help="float checkpoint: a safetensors file, an index, or a folder that holds one")
    to.add_argument("--stats", type=Path, help="activation statistics (awq_merge_stats.py); not read by --dry_run")
    to.add_argument("--capture", type=Path, nargs="+", default=[],
                    help="layer inputs (awq_calibrate_single.py --capture): with them GPTQ rounds; one file per task")
    to.add_argument("--gptq", choices=["full", "light"], default="full",
                    help="what is done with captures: light is one pass on the float model's inputs, most of the gain "
                         "in an eighth of the time")
    to.add_argument("--resume", action="store_true",
                    help="keep finished layers in OUT.work, so that the same command goes on after a kill")
    to.add_argument("--out", type=Path, help="folder to create; never overwritten; not written by --dry_run")
    to.add_argument("--recipe", choices=["ours", "published"], default="ours",
                    help="ours searches by second moments; published repeats Reza2kn/lance-quant tensor for tensor")
    to.add_argument("--head_bits", type=int, choices=[8, 16], default=16,
                    help="bits of the output head and the token embedding; published readers know only 16, bfloat16")
    to.add_argument("--with_parts", action="store_true",
                    help="also put ViT and VAE, found in or beside the folder of --src, into OUT: hard links where the "
                         "disk allows, else copies (4.2 GB)")
    to.add_argument("--dry_run", action="store_true", help="read headers only and print what would be written")
    to.add_argument("--threads", type=int, help="CPU threads, which change nothing but the time; default: all cores")
    script.add_device(to, dtype=False)


def set_threads(count: int | None) -> None:
    """What --threads asks for; None leaves torch's default, all cores or OMP_NUM_THREADS.

    Raises:
        InputError: it is not positive.
    """
    import torch  # late, as it takes seconds: --help does not wait for it

    if count is None:
        return
    if not 1 <= count <= _MOST_THREADS:
        raise InputError(f"--threads {count} must be from 1 to {_MOST_THREADS}: leave it out to use all cores")
    torch.set_num_threads(count)
