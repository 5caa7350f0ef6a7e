#!/usr/bin/env python3
"""Measure what quantizing costs: seconds and peak memory of one layer at Lance's real shapes, method by method.

    OMP_NUM_THREADS=1 python -m benchmarks.quantize_cost --tokens 8192
    python -m benchmarks.quantize_cost --device cuda --tokens 65536

Reads   nothing; weights and tokens are made up
Writes  nothing; prints a table in Markdown and, as the last line, JSON: by method `seconds` of wall clock,
        `cpu_seconds` of all threads, `peak_bytes` of the process, `layer_bytes` of the float32 layer in it,
        `device_peak_bytes` on a GPU, and `full_model_hours`: the layers of Lance_3B times CPU seconds, or on a GPU
        times seconds
Needs   5 GB of memory; on one CPU core about 15 minutes at 8192 tokens, nearly all of it for `ours`

Every method runs in a process of its own: its peak is nobody else's. rtn: nearest rounding. published: `--recipe
published`. ours_diagonal: ours from statistics. ours: with --capture, where `inputs_seconds` are what it takes to make
the layer's inputs and Gram matrices again and `relevance_seconds` what weighing the tokens takes; both grow with the
tokens, the rest does not. ours_light: with `--gptq light` besides, which takes 4096 tokens of each expert at most. What
a run does once (reading, writing, copying what is outside of the layers) is not in these figures.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from benchmarks import fidelity_synthetic
from benchmarks.child import in_child
from lance_quant.calibration import token_weights
from lance_quant.calibration.activation_stats import ActStats, LinearStats
from lance_quant.calibration.decoder_calls import DecoderCall
from lance_quant.calibration.layer_inputs import LayerInputs
from lance_quant.cli import script
from lance_quant.cpu.threads import block_threads_on
from lance_quant.evaluation.run_folder import device_name
from lance_quant.formats import layout
from lance_quant.formats.base import Codec
from lance_quant.formats.int4 import Int4
from lance_quant.formats.nvfp4 import Nvfp4
from lance_quant.formats.weights import Weights
from lance_quant.inference.device import device_of
from lance_quant.inference.memory import peak_memory
from lance_quant.lance.config import LATENT_CHANNELS, LanceConfig
from lance_quant.lance.linear import Linear
from lance_quant.lance.mot import DecoderLayer, RMSNorm
from lance_quant.methods import gptq, layer, published

METHODS = ("rtn", "published", "ours_diagonal", "ours_light", "ours")
CODECS: dict[str, Codec] = {"int4": Int4(64), "nvfp4": Nvfp4()}
LAYERS = 36  # of Lance_3B


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="which to measure")
    parser.add_argument("--format", choices=CODECS, default="int4", help="what is written")
    parser.add_argument("--tokens", type=int, default=8192, help="of the capture, both experts together")
    parser.add_argument("--shrink", type=int, choices=(1, 2, 4, 8), default=1, help="divides Lance's widths")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where layers are quantized")
    return parser.parse_args(argv)


class Timed(LayerInputs):
    """Layer inputs that know how long they took, and how long the weighing of tokens in that."""

    seconds = relevance_seconds = 0.0

    def gram_stats(self, *args: Any) -> Any:
        """See LayerInputs."""
        return self._timed(super().gram_stats, *args)

    def pass_attention(self, *args: Any) -> None:
        """See LayerInputs."""
        self._timed(super().pass_attention, *args)

    def end_layer(self, *args: Any) -> None:
        """See LayerInputs."""
        self._timed(super().end_layer, *args)

    def _timed(self, function: Any, *args: Any) -> Any:
        started = time.perf_counter()
        result = function(*args)
        _wait(self._device)
        self.seconds += time.perf_counter() - started
        return result


def timed_layer_inputs(config: LanceConfig, weights: Weights, tokens: int, device: torch.device,
                       light: bool = False) -> Timed:
    """Of made-up requests to a model of this one layer."""
    norm, velocity = RMSNorm(config.hidden_size, config.rms_norm_eps), Linear(config.hidden_size, LATENT_CHANNELS)
    torch.nn.init.ones_(norm.weight)
    torch.nn.init.normal_(velocity.weight, std=0.02)
    torch.nn.init.zeros_(velocity.bias)
    heads = {"gen": torch.nn.Sequential(norm, velocity).requires_grad_(False)}

    def read(_: int) -> Weights:
        return {name: w.clone() for name, w in weights.items()}  # a real one is read beside the layer in hand

    def weigh(calls: Sequence[DecoderCall]) -> token_weights.TokenWeights:
        started = time.perf_counter()
        found = token_weights.measure(config, lambda _: read, 1, heads, calls, device)
        _wait(device)
        layer_inputs.relevance_seconds = time.perf_counter() - started
        return found

    layer_inputs = Timed(config, fidelity_synthetic.draw_calls(config, tokens // 2, 0), device,
                         weigh=None if light else weigh, light=light)
    return layer_inputs


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def made_up_layer(config: LanceConfig, device: torch.device) -> Weights:
    """A layer of Gaussian weights."""
    torch.manual_seed(0)
    with torch.device("meta"):
        layer = DecoderLayer(config)
    weights = {}
    for name, value in layer.state_dict().items():
        w = torch.empty(value.shape, device=device).normal_(std=0.02)
        weights[f"{layout.LAYERS}.0.{name}"] = w.add_(1) if "norm" in name else w
    return weights


def made_up_stats(config: LanceConfig, weights: Weights) -> ActStats:
    """Statistics with lognormal channels: what they hold does not change what a search costs."""
    generator = torch.Generator().manual_seed(1)
    linears = {}
    for group in layout.groups(0):
        size = torch.randn(weights[f"{group.linears[0]}.weight"].shape[1], generator=generator).mul_(0.5).exp_()
        linears |= dict.fromkeys(group.linears, LinearStats(size * 100, size.square() * 150, size * 4, 100, 1))
    return ActStats(linears, ["synthetic"], [{"run_id": "synthetic"}], len(linears))


@torch.no_grad()
def measure(method: str, format_: str, where: str, tokens: int, shrink: int) -> dict[str, float]:
    """Quantize one layer with one method, in this process; the flags explain the arguments."""
    device, codec = torch.device(where), CODECS[format_]
    config = fidelity_synthetic.config_of(shrink, layers=1)
    weights = made_up_layer(config, device)
    stats = ActStats({}, [], [{"run_id": "none"}], 0) if method == "rtn" else made_up_stats(config, weights)
    layer_inputs = None
    if method in ("ours", "ours_light"):
        layer_inputs = timed_layer_inputs(config, weights, tokens, device, light=method == "ours_light")
    sweeps = 0 if method == "ours_light" else gptq.SWEEPS
    groups = published.quantize_layer(0, weights, stats, codec) if method == "published" else \
        layer.quantize_layer(0, weights, stats, codec, layer_inputs, sweeps=sweeps)
    layer_bytes = sum(w.nbytes for w in weights.values())
    started, cpu = time.perf_counter(), cpu_seconds()
    with nullcontext() if method == "published" else block_threads_on(device):  # as a conversion does
        if layer_inputs is not None:
            layer_inputs.weigh_tokens()
        for group, done in groups:
            print(f"{method:<14} {group.name:<22} {done.seconds:7.1f} s", file=sys.stderr, flush=True)
    _wait(device)
    peak = peak_memory(torch.device("cpu"))["host"]
    found = {"seconds": time.perf_counter() - started, "cpu_seconds": cpu_seconds() - cpu, "layer_bytes": layer_bytes,
             "peak_bytes": float("nan") if peak is None else peak}
    if layer_inputs is not None:
        found["inputs_seconds"] = layer_inputs.seconds
        found["relevance_seconds"] = layer_inputs.relevance_seconds
    if device.type == "cuda":
        found["device_peak_bytes"] = torch.cuda.max_memory_allocated()
    found["full_model_hours"] = found["seconds" if device.type == "cuda" else "cpu_seconds"] * LAYERS / 3600
    return found


def cpu_seconds() -> float:
    """That this process has used so far."""
    return time.process_time()


def table(results: dict[str, dict[str, float]]) -> str:
    """One row per method."""
    head = ["method", "seconds per layer", "of that inputs", "weighing tokens", "CPU seconds", "peak memory",
            f"{LAYERS} layers"]
    lines = [head, ["---"] * len(head)]
    for method, found in results.items():
        inputs, weighing = (f"{found[key]:.0f}" if key in found else "-"
                            for key in ("inputs_seconds", "relevance_seconds"))
        peak = f"{found['peak_bytes'] / 1e9:.2f} GB"
        if "device_peak_bytes" in found:
            peak += f", GPU {found['device_peak_bytes'] / 1e9:.2f} GB"
        lines.append([method, f"{found['seconds']:.1f}", inputs, weighing, f"{found['cpu_seconds']:.0f}", peak,
                      f"{found['full_model_hours']:.2f} h"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(argv)
    device_of(args.device)
    results = {}
    for method in args.methods:
        results[method] = in_child(measure, method, args.format, args.device, args.tokens, args.shrink)
        print(f"{method}: {json.dumps(results[method])}", file=sys.stderr, flush=True)
    print(table(results))
    print(json.dumps({"format": args.format, "tokens": args.tokens, "shrink": args.shrink, "device": args.device,
                      "threads": torch.get_num_threads(), "cpu": device_name(torch.device("cpu")),
                      "torch": str(torch.__version__), "methods": results}))


if __name__ == "__main__":
    script.run(main)
