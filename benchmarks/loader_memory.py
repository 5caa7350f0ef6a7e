#!/usr/bin/env python3
"""Measure the host memory that loading a model needs beside the model itself.

    python -m benchmarks.synthetic_lance --out runs/synthetic
    python -m benchmarks.loader_memory --model_path runs/synthetic/Lance_3B --dtype bfloat16
    python -m benchmarks.loader_memory --model_path runs/synthetic/Lance_3B --awq_dir runs/int4 --dtype bfloat16

Reads   a model folder, and a packed folder if given
Writes  nothing; the last line on stdout is the result as JSON, all sizes in bytes: `model`, what the loaded tensors
        hold; `peak_above_start`, how far the process's resident memory rose; `beside_model`, the difference
"""

import argparse
import functools
import json
import time
from pathlib import Path
from typing import Any

import torch

from lance_quant.cli import script
from lance_quant.formats.packed_folder import PackedFolder
from lance_quant.inference.device import device_of, dtype_of
from lance_quant.inference.memory import peak_memory
from lance_quant.lance.config import LancePaths
from lance_quant.lance.runtime import Runtime
from quantized_linear import swap_linears


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    parser.add_argument("--model_path", type=Path, required=True, help="Lance folder")
    parser.add_argument("--awq_dir", type=Path, help="packed folder that replaces the float weights")
    script.add_device(parser)
    return parser.parse_args(argv)


def measure(model_path: Path, awq_dir: Path | None, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Load a model in this process: bytes and seconds, see above. Bytes are None where the system does not tell."""
    packed = PackedFolder(awq_dir) if awq_dir else None
    prepare, checkpoint = None, None
    if packed is not None:
        prepare = functools.partial(swap_linears, folder=packed, dtype=dtype, device=device)
        checkpoint = packed.checkpoint.path
    before, start = _host_peak(), time.perf_counter()
    runtime = Runtime.load(LancePaths.find(model_path), device, dtype, checkpoint, prepare)
    seconds, after = time.perf_counter() - start, _host_peak()
    tensors = [*runtime.model.parameters(), *runtime.model.buffers()]
    model = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    rise = None if before is None or after is None else after - before
    on_host = model if device.type == "cpu" else 0
    return {"model": model, "peak_above_start": rise, "beside_model": None if rise is None else rise - on_host,
            "seconds": round(seconds, 1), "device": str(device), "dtype": str(dtype).removeprefix("torch.")}


def _host_peak() -> int | None:
    return peak_memory(torch.device("cpu"))["host"]


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(argv)
    device = device_of(args.device)
    print(json.dumps(measure(args.model_path, args.awq_dir, device, dtype_of(args.dtype, device))))


if __name__ == "__main__":
    script.run(main)
