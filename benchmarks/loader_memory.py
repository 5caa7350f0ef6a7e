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


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(argv)
    device = device_of(args.device)
    dtype = dtype_of(args.dtype, device)
    packed = PackedFolder(args.awq_dir) if args.awq_dir else None
    prepare = packed and functools.partial(swap_linears, folder=packed, dtype=dtype, device=device)
    before, start = peak_memory(torch.device("cpu"))["host"], time.perf_counter()
    paths = LancePaths.find(args.model_path)
    pipeline = Runtime.load(paths, device, dtype, packed and packed.checkpoint.path, prepare)
    tensors = [*pipeline.model.parameters(), *pipeline.model.buffers()]
    model = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    rise = peak_memory(torch.device("cpu"))["host"] - before
    on_host = model if device.type == "cpu" else 0
    print(json.dumps({"model": model, "peak_above_start": rise, "beside_model": rise - on_host,
                      "seconds": round(time.perf_counter() - start, 1), "device": str(device),
                      "dtype": str(dtype).removeprefix("torch.")}))


if __name__ == "__main__":
    script.run(main)
