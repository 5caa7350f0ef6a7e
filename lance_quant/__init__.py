"""lance-quant: ByteDance's Lance in 4 bits, and a runtime that needs nothing of the official source.

    storage      files on disk                       lance        the model: decoder, tokens, tasks, loader
    formats      what the bytes mean                 kernels      what computes packed linears
    cpu          C and float32 products              inference    running a model: Pipeline, tasks
    calibration  what is measured on a model         evaluation   how far a run is from its baseline
    methods      how weights are quantized           official     ByteDance's own source as a witness

The scripts at the root of the repository are thin over this package. From Python:

    from lance_quant import Pipeline, quantize

which, and all of __all__, comes from inference/pipeline.py when it is first asked for: importing lance_quant imports no
torch.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["InputError", "Pipeline", "Progress", "Sampling", "Stopped", "quantize"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.inference.pipeline"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
