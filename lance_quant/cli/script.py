"""What the scripts share: how they start, log, fail and name their arguments.

`run(main)` turns the user's mistakes into one line and exit code 2, and leaves tracebacks to bugs. Logs and bars go to
stderr; stdout carries results only.
"""

import argparse
import errno
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from lance_quant.errors import InputError
from lance_quant.inference.device import DTYPES

log = logging.getLogger("lance_quant")

# The environment's fault, not ours: no space, quota, read-only or forbidden place, not a folder.
_USER_ERRNO = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR,
               errno.EISDIR}


def run(main: Callable[[], None]) -> None:
    """Call a script's `main` and end the process: 0 done, 2 the user's mistake, 130 interrupted."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill cleans up as an interrupt does
    try:
        main()
    except InputError as error:
        sys.exit(_complain(str(error)))
    except OSError as error:
        if error.errno not in _USER_ERRNO:
            raise
        sys.exit(_complain(f"{error.strerror}: {error.filename or 'while writing'}; nothing was left half written"))
    except KeyboardInterrupt:
        print("interrupted; nothing was left half written", file=sys.stderr)
        sys.exit(130)


def _complain(message: str) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2


def show(text: str) -> None:
    """Text on the terminal while it comes, as `--stream` asks for; on stderr, since stdout carries results only."""
    print(text, end="", file=sys.stderr, flush=True)


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose --help is the script's docstring and shows every default."""

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action: argparse.Action) -> str | None:
            return action.help if action.default in (None, False) else super()._get_help_string(action)

    return argparse.ArgumentParser(description=doc, formatter_class=Formatter, allow_abbrev=False)


def add_device(to: argparse.ArgumentParser, dtype: bool = True) -> None:
    """--device and, where the model runs, --dtype."""
    to.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or mps; auto takes the fastest there is")
    if dtype:
        to.add_argument("--dtype", choices=["auto", *DTYPES], default="auto",
                        help="compute dtype; auto is bfloat16 on a GPU (as the official code), float32 on the CPU")


def add_conversion(to: argparse.ArgumentParser) -> None:
    """What both quantization scripts take: source, statistics, output, recipe, device and --dry_run."""
    to.add_argument("--src", type=Path, required=True,
                    help="float checkpoint: a safetensors file, an index, or a folder that holds one")
    to.add_argument("--stats", type=Path, help="activation statistics (awq_merge_stats.py); not read by --dry_run")
    to.add_argument("--capture", type=Path, nargs="+", default=[],
                    help="layer inputs (awq_calibrate_single.py --capture): with them GPTQ rounds; one file per task")
    to.add_argument("--resume", action="store_true",
                    help="keep finished layers in OUT.work, so that the same command goes on after a kill")
    to.add_argument("--out", type=Path, help="folder to create; never overwritten; not written by --dry_run")
    to.add_argument("--recipe", choices=["ours", "published"], default="ours",
                    help="ours searches by second moments; published repeats Reza2kn/lance-quant tensor for tensor")
    to.add_argument("--head_bits", type=int, choices=[8, 16], default=16,
                    help="bits of the output head and the token embedding; published readers know only 16, bfloat16")
    to.add_argument("--dry_run", action="store_true", help="read headers only and print what would be written")
    to.add_argument("--threads", type=int, help="CPU threads, which change nothing but the time; default: all cores")
    add_device(to, dtype=False)


def set_threads(count: int | None) -> None:
    """What --threads asks for; None leaves torch's default, all cores or OMP_NUM_THREADS."""
    if count is None:
        return
    if count < 1:
        raise InputError(f"--threads {count} is not positive: leave it out to use all cores")
    torch.set_num_threads(count)


def require_file(path: Path, what: str) -> Path:
    """`path` if it is a file, else InputError."""
    if not path.is_file():
        raise InputError(f"{what} not found: {path}")
    return path
