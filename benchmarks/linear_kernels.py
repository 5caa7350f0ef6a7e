#!/usr/bin/env python3
"""Time packed linears beside float ones and beside the published way of computing them.

    OMP_NUM_THREADS=1 python -m benchmarks.linear_kernels
    python -m benchmarks.linear_kernels --device cuda --dtype bfloat16
    OMP_NUM_THREADS=1 python -m benchmarks.linear_kernels --paths --rows 8 12 16 24 32 48 64 --formats int4

Reads   nothing; weights are random
Writes  nothing; a table on stderr, and the last line on stdout is the result as JSON: per cell the milliseconds of
        every contestant, and how many times faster ours is than each of the others. Contestants take turns within one
        run and the fastest turn of each counts, so that a busy machine slows all of them or none; every turn has
        another copy of the weight, as many as it takes to leave the caches. Also there, where they can run: the
        kernels that are chosen by name (comfy_kitchen; native_w4a8 and nvfp4_w4a4 round activations, and compute
        something else), and tinygemm (INT4 on CUDA)
Needs   2 GB
"""

import argparse
import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lance_quant.cli import script
from lance_quant.errors import InputError
from lance_quant.evaluation.run_folder import device_name
from lance_quant.formats.base import Codec
from lance_quant.formats.int4 import Int4, Int4Weight
from lance_quant.formats.nvfp4 import MAGNITUDES, Nvfp4, Nvfp4Weight
from lance_quant.formats.weights import PackedWeight
from lance_quant.inference.device import device_of, dtype_of
from lance_quant.kernels import comfy_kitchen, cpu, dispatch, nvfp4_w4a4, ops
from lance_quant.kernels.choices import KERNEL_CHOICES

FORMATS: dict[str, Codec] = {"int4": Int4(64), "nvfp4": Nvfp4(), "nvfp4_slim": Nvfp4(slim=True)}
_COLD = 128 << 20  # bytes between two uses of a copy: four times the largest cache of one of our machines
_TURNS, _SECONDS = (2, 400), 1.0  # fewest and most turns of a contestant, and its time when the fewest are enough


class Cell(NamedTuple):
    """One shape, one number of rows, one format."""

    n_in: int
    n_out: int
    rows: int
    format: str


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    parser.add_argument("--shapes", nargs="+", default=["2048x11008", "11008x2048"], help="INxOUT")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 256, 1024], help="rows of activations")
    parser.add_argument("--formats", choices=FORMATS, nargs="+", default=["int4", "nvfp4"], help="packed formats")
    parser.add_argument("--paths", action="store_true", help="time every path of our kernel, not only the chosen one")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall",
                        help="cpu: seconds of this process on a CPU, which do not count waiting for other programs; "
                             "with one thread only")
    script.add_device(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(argv)
    device = device_of(args.device)
    dtype = dtype_of(args.dtype, device)
    if args.clock == "cpu" and (device.type != "cpu" or torch.get_num_threads() > 1):
        raise InputError("--clock cpu needs --device cpu and one thread; set OMP_NUM_THREADS=1")
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    results = []
    for shape in args.shapes:
        n_in, n_out = sizes(shape)
        for name in args.formats:
            for rows in args.rows:
                cell = Cell(n_in, n_out, rows, name)
                results.append(measure(cell, dtype, device, args.paths, clock))
                script.log.info("%s", line(results[-1]))
    print(json.dumps({"device": device_name(device), "dtype": str(dtype).removeprefix("torch."), "clock": args.clock,
                      "load": round(os.getloadavg()[0], 1), "torch": str(torch.__version__), "cells": results}))


def sizes(shape: str) -> tuple[int, int]:
    """INxOUT as numbers."""
    n_in, _, n_out = shape.partition("x")
    if not (n_in.isdigit() and n_out.isdigit() and int(n_in) % 64 == 0 and int(n_in) and int(n_out)):
        raise InputError(f"--shapes {shape}: expected INxOUT with IN a multiple of 64, as 2048x11008")
    return int(n_in), int(n_out)


@torch.inference_mode()
def measure(cell: Cell, dtype: torch.dtype, device: torch.device, every_path: bool,
            clock: Callable[[], float] = time.perf_counter) -> dict:
    """The cell, milliseconds of every contestant, and the times by which ours (chosen path) is faster."""
    codec = FORMATS[cell.format]
    contestants = dict(_contestants(cell, codec, dtype, device, every_path))
    seconds = _best(list(contestants.values()), device, clock)
    ms = {name: round(value * 1e3, 3) for name, value in zip(contestants, seconds, strict=True)}
    ratios = {name: round(value / ms["ours"], 2) for name, value in ms.items() if name != "ours"}
    return {**cell._asdict(), "ms": ms, "ours_is_faster_by": ratios}


def line(result: dict) -> str:
    """A cell for the eye."""
    head = f"{result['format']:10} {result['n_in']:>5} -> {result['n_out']:<5} rows {result['rows']:<5}"
    return head + "  ".join(f"{name} {ms:.2f}" + (f" ({result['ours_is_faster_by'][name]:.2f} x)"
                                                  if name != "ours" else "") for name, ms in result["ms"].items())


def _contestants(cell: Cell, codec: Codec, dtype: torch.dtype, device: torch.device,
                 every_path: bool) -> Iterator[tuple[str, Callable[[int], object]]]:
    """Name and call; the number that a call gets picks the copy of the weight."""
    x = torch.randn(cell.rows, cell.n_in, device=device)
    for name, kind in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        weights = _copies(lambda kind=kind: torch.randn(cell.n_out, cell.n_in, device=device).to(kind))
        yield name, _calls(weights, functools.partial(F.linear, x.to(kind)))
    packed = _copies(lambda: random_weight(codec, cell.n_out, cell.n_in, device))
    x_own = x.to(dtype)
    yield "published", _calls(packed, lambda q: F.linear(x_own, published(q, dtype)))
    kernel = dispatch.choose("triton" if device.type == "cuda" else "auto", codec, cell.n_in, dtype, device)
    yield "ours", _calls(packed, lambda q: kernel.linear(x_own, q, codec, None))
    yield from _others(kernel.name, cell, codec, packed, x_own)
    if every_path:
        for name, function in _paths(device, codec, dtype).items():
            yield name, _calls(packed, lambda q, function=function: function(x_own, q))


def _others(ours: str, cell: Cell, codec: Codec, packed: list[PackedWeight],
            x: Tensor) -> Iterator[tuple[str, Callable[[int], object]]]:
    """What else computes such a layer here: kernels that run by name, and tinygemm."""
    for name in KERNEL_CHOICES:
        simulated = name == "nvfp4_w4a4" and nvfp4_w4a4.without_tensor_cores(x.device) is not None
        if name in ("auto", "reference", ours) or simulated:
            continue
        with contextlib.suppress(InputError):
            kernel = dispatch.choose(name, codec, cell.n_in, x.dtype, x.device)
            dispatch.require_values(name, packed[0], "the made-up weight")
            yield name, _calls(packed, lambda q, kernel=kernel: kernel.linear(x, q, codec, None))
    if x.is_cuda and isinstance(codec, Int4) and x.dtype == torch.bfloat16 and cell.n_in % 128 == cell.n_out % 8 == 0:
        repacked = [tinygemm_weight(q) for q in packed]
        multiply = torch.ops.aten._weight_int4pack_mm
        yield "tinygemm", _calls(repacked, lambda q: multiply(x, q[0], codec.group_size, q[1]))


def tinygemm_weight(q: Int4Weight) -> tuple[Tensor, Tensor]:
    """A weight as `aten._weight_int4pack_mm` takes it: codes in an order of its own, and `scales_and_zeros`."""
    return torch.ops.aten._convert_weight_to_int4pack(even_high(q.packed), 8), scales_and_zeros(q, torch.bfloat16)


def even_high(packed: Tensor) -> Tensor:
    """Packed bytes with the even column in the high nibble."""
    return (packed << 4) | (packed >> 4)


def scales_and_zeros(q: Int4Weight, dtype: torch.dtype) -> Tensor:
    """[groups, out, 2]: S and Z of (code - 8) * S + Z."""
    return torch.stack(comfy_kitchen.scales_and_zeros(q.scale, q.zero, dtype), -1).contiguous()


def _paths(device: torch.device, codec: Codec,
           dtype: torch.dtype) -> dict[str, Callable[[Tensor, PackedWeight], object]]:
    if device.type == "cpu":
        return {"dot": lambda x, q: cpu.dot(x, cpu.weight_of(q, codec.group_size), None),
                "gemm": lambda x, q: cpu.gemm(x, cpu.weight_of(q, codec.group_size), None)}
    from lance_quant.kernels import triton_kernels

    size = codec.group_size
    return {"gemv": lambda x, q: triton_kernels.gemv(x, q.packed, *ops.parts_of(q), None, size),
            "tile": lambda x, q: triton_kernels.tile(x, q.packed, *ops.parts_of(q), None, size),
            "gemm": lambda x, q: F.linear(x, triton_kernels.unpack(q.packed, *ops.parts_of(q), size, dtype))}


def _copies(make: Callable[[], Tensor | PackedWeight]) -> list:
    """As many weights as fill _COLD bytes, two at least."""
    first = make()
    fields = [first] if isinstance(first, Tensor) else [part for part in first if isinstance(part, Tensor)]
    size = sum(part.numel() * part.itemsize for part in fields)
    return [first, *(make() for _ in range(max(1, _COLD // size)))]


def _calls(weights: list, function: Callable[..., object]) -> Callable[[int], object]:
    return lambda turn: function(weights[turn % len(weights)])


def random_weight(codec: Codec, n_out: int, n_in: int, device: torch.device) -> PackedWeight:
    """A packed weight [out, in] of random codes, scales below 0.01 and, for INT4, zero points."""
    shape = (n_out, n_in // codec.group_size)
    codes = torch.randint(0, 256, (n_out, n_in // 2), dtype=torch.uint8, device=device)
    scale = torch.rand(shape, device=device).mul_(0.01).bfloat16()
    if isinstance(codec, Int4):
        return Int4Weight(codes, scale, torch.randint(0, 16, shape, dtype=torch.uint8, device=device))
    if codec.slim:
        return Nvfp4Weight(codes, torch.randint(1, 120, shape, dtype=torch.uint8, device=device), 2.0**-10)
    return Nvfp4Weight(codes, scale, 1.0)


def published(q: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The weight as Reza2kn/lance-quant's modules make it at every call: unpacked to wide integers, then scaled."""
    low, high = q.packed & 15, q.packed >> 4
    if isinstance(q, Int4Weight):
        codes = torch.stack((low, high), -1).flatten(-2).to(torch.int16)
        groups = codes.view(*q.scale.shape, -1) - q.zero[..., None].to(torch.int16)
        return (groups.to(dtype) * q.scale[..., None].to(dtype)).view(codes.shape)
    codes = torch.stack((low, high), -1).flatten(-2).to(torch.int64)
    sizes = torch.tensor(MAGNITUDES, dtype=dtype, device=codes.device)[codes & 7]
    values = torch.where(codes >= 8, -sizes, sizes)
    scale = q.scale if q.scale.is_floating_point() else q.scale.view(torch.float8_e4m3fn).float() * q.global_scale
    return (values.view(*scale.shape, -1) * scale[..., None].to(dtype)).view(codes.shape)


def _best(calls: list[Callable[[int], object]], device: torch.device, clock: Callable[[], float]) -> list[float]:
    """The fastest turn of each, in seconds; they take turns, slow ones fewer."""
    best, spent = [float("inf")] * len(calls), [0.0] * len(calls)
    for turn in range(_TURNS[1]):
        for index, call in enumerate(calls):
            if turn < _TURNS[0] or spent[index] < _SECONDS:
                seconds = _seconds(functools.partial(call, turn), device, clock)
                best[index], spent[index] = min(best[index], seconds), spent[index] + seconds
    return best


def _seconds(call: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    if device.type == "mps":
        torch.mps.synchronize()
        start = clock()
        call()
        torch.mps.synchronize()
        return clock() - start
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = clock()
    call()
    return clock() - start


if __name__ == "__main__":
    script.run(main)
