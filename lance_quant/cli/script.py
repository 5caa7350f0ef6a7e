"""How a script starts, logs and fails, and the flags that every one has.

`run(main)` turns the user's mistakes into one line and exit code 2, and leaves tracebacks to bugs. Logs and bars go to
stderr; stdout carries results only.
"""

import argparse
import errno
import logging
import signal
import sys
from collections.abc import Callable

from lance_quant.errors import InputError
from lance_quant.lance.settings import DTYPE_NAMES

log = logging.getLogger("lance_quant")

# The environment's fault, not ours: no space, quota, size limit, read-only or forbidden place, a name too long, not a
# folder, too many open files.
_USER_ERRNO = {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EISDIR,
               errno.EFBIG, errno.ENAMETOOLONG, errno.ENOTEMPTY, errno.ELOOP, errno.EMFILE, errno.ENFILE,
               getattr(errno, "EDQUOT", errno.ENOSPC)}  # Windows has no quota error


def run(main: Callable[[], None]) -> None:
    """Call a script's `main` and end the process: 0 done, 2 the user's mistake, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a console that lacks a character of a file's name is no failure
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    for name in ("SIGTERM", "SIGHUP", "SIGBREAK"):  # a polite kill, a closed terminal (POSIX), Ctrl-Break (Windows)
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, signal.default_int_handler)  # cleans up as an interrupt does
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


def result(text: object) -> None:
    """A line of what was asked for, on stdout."""
    print(text, file=sys.stdout)


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
    """--device and, where the model runs, --dtype; inference/device.py says what they mean."""
    to.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or mps; auto takes the fastest there is")
    if dtype:
        to.add_argument("--dtype", choices=["auto", *DTYPE_NAMES], default="auto",
                        help="compute dtype; auto is bfloat16 on a GPU (as the official code), float32 on the CPU")
