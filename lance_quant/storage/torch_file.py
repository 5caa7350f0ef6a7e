"""Files of torch.save, read without running anything that they hold (weights_only)."""

from pathlib import Path
from typing import Any

import torch

from lance_quant.errors import InputError


def load(path: Path, what: str, advice: str, mmap: bool = False) -> Any:
    """The plain values and tensors of a file, on the CPU.

    Args:
        what: names the kind of file in the error, e.g. "statistics file".
        advice: what to do about a damaged one.
        mmap: map tensors into memory instead of reading them.

    Raises:
        InputError: missing, damaged, or holds more than tensors and plain values.
    """
    if not Path(path).is_file():
        raise InputError(f"{what} not found: {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        # The unpickler raises anything on damaged bytes (TypeError, IndexError, OSError, ...), and torch's own message
        # advises to load the file unsafely.
        raise InputError(f"{path} is no {what}, is damaged, or holds more than tensors and plain values; "
                         f"{advice}") from error
