#!/usr/bin/env python3
"""Compare quantizers on made-up layers with the outliers that were published of Lance-3B, of both kinds.

    python -m benchmarks.fidelity_synthetic --seeds 0 1 2
    python -m benchmarks.fidelity_synthetic --shrink 1 --tokens 8192 --seeds 0     # Lance's own widths: hours

Reads   nothing
Writes  nothing; prints a table in Markdown and, as the last line, JSON: `e2e_relmse`, squared error of what the layers
        add to the residual stream relative to its square, and `kind_relmse`, by kind of linear the geometric mean over
        layers and experts of the same on the float model's inputs; both on held-out tokens, with every seed's values
Needs   1 GB of memory at --shrink 8; on one CPU core about 2 minutes per seed and kind of outliers

Three decoder layers of Lance's structure: two experts, grouped heads, biases, q/k norms; widths divided by --shrink.
Weights are Gaussian times a lognormal gain, per row and column (`rows`) or per entry (`entries`), as wide as it takes
to reach, for that kind of linear, the published ratio of the largest |weight| of a group to the median group. Channels
into norm-fed linears spread as fitted to the published trials: lognormal, and a few hot ones, in the norm's weight. The
correlation between channels is invented: a falling spectrum of directions. So is everything that nobody published. The
code is the real one: statistics, searches, fusions, capture and replay, packing, and the runtime's layer; but nothing
comes out of three layers, so that all tokens count alike in GPTQ.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lance_quant.calibration.activation_stats import ActStats, LinearStats
from lance_quant.calibration.decoder_calls import DecoderCall
from lance_quant.calibration.layer_inputs import LayerInputs
from lance_quant.cli import script
from lance_quant.evaluation.run_folder import device_name
from lance_quant.formats import layout
from lance_quant.formats.base import Codec
from lance_quant.formats.int4 import Int4
from lance_quant.formats.layout import EXPERTS
from lance_quant.formats.nvfp4 import Nvfp4
from lance_quant.formats.weights import Weights
from lance_quant.lance.cache import CacheRow
from lance_quant.lance.config import LanceConfig
from lance_quant.lance.mot import DecoderLayer, Rotary
from lance_quant.methods import gptq, layer, published

CPU = torch.device("cpu")
GROUP = 64  # inputs per group in the published ratios
# Largest |weight| of a group over that of the median group: published medians over layers, by expert and kind; what is
# not named there takes the median over all linears.
RATIOS = {("und", "down_proj"): 13.10, ("und", "o_proj"): 9.08, ("gen", "down_proj"): 7.43, ("und", "v_proj"): 2.65,
          ("gen", "v_proj"): 2.65}
TYPICAL = 5.35
METHODS: dict[str, list[tuple[str, Codec]]] = {
    "int4": [("rtn_g128", Int4(128)), ("rtn_g64", Int4(64)), ("published", Int4(64)), ("ours_diagonal", Int4(64)),
             ("ours_light", Int4(64)), ("ours", Int4(64))],
    "nvfp4": [("rtn", Nvfp4()), ("published", Nvfp4()), ("ours_diagonal", Nvfp4()),
              ("ours_light", Nvfp4()), ("ours", Nvfp4())]}
CAPTURED = ("ours_light", "ours")  # those that see the layers' inputs


@dataclass(frozen=True)
class Depth:
    """Channels into the norm-fed linears of a layer: deviation of the logarithm, share of hot ones, their size."""

    name: str
    deviation: float
    share: float = 0.0
    size: float = 1.0


DEPTHS = (Depth("first", 0.4, 0.01, 15), Depth("middle", 0.35), Depth("last", 0.8, 0.005, 20))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights and tokens")
    parser.add_argument("--shrink", type=int, choices=(1, 2, 4, 8), default=8, help="Lance's widths are divided by it")
    parser.add_argument("--outliers", nargs="+", choices=GAINS, default=list(GAINS), help="where large weights lie")
    parser.add_argument("--formats", nargs="+", choices=METHODS, default=list(METHODS), help="which to measure")
    parser.add_argument("--tokens", type=int, default=8192, help="per expert, that calibrate")
    parser.add_argument("--held_out", type=int, default=2048, help="per expert, that are judged")
    return parser.parse_args(argv)


def config_of(shrink: int, layers: int = len(DEPTHS)) -> LanceConfig:
    """Lance_3B's structure with its widths divided; MLPs are rounded up to a multiple of 128."""
    return LanceConfig(hidden_size=2048 // shrink, num_hidden_layers=layers, num_attention_heads=16,
                       num_key_value_heads=2, intermediate_size=-(-11008 // shrink // 128) * 128, vocab_size=128,
                       rms_norm_eps=1e-6, rope_theta=1e6, mrope_section=(16 // shrink, 24 // shrink, 24 // shrink))


# --- weights and tokens ---------------------------------------------------------------------------------------------


def _by_row_and_column(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape[0], 1, generator=generator) + torch.randn(1, shape[1], generator=generator)


def _by_entry(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


GAINS: dict[str, Callable[..., Tensor]] = {"rows": _by_row_and_column, "entries": _by_entry}


def group_ratio(w: Tensor, group_size: int = GROUP) -> float:
    """Largest |weight| of any group of a weight [out, in] over that of the median group."""
    largest = w.abs().unflatten(1, (-1, group_size)).amax(2)
    return float(largest.max() / largest.median())


def draw_weight(shape: tuple[int, ...], ratio: float, outliers: str, generator: torch.Generator) -> Tensor:
    """A weight [out, in] of mean square 1 whose group ratio is `ratio`, or that of a Gaussian if that is larger."""
    noise, log_gain = torch.randn(shape, generator=generator), GAINS[outliers](shape, generator)
    low, high = 0.0, 1.5
    for _ in range(12):  # bisection: the ratio rises with the deviation; 1.5 / 2^12 is enough
        middle = (low + high) / 2
        low, high = (low, middle) if group_ratio(noise * (middle * log_gain).exp()) > ratio else (middle, high)
    w = noise * (low * log_gain).exp()
    return w / w.square().mean().sqrt()


def draw_channels(width: int, depth: Depth, generator: torch.Generator) -> Tensor:
    """Sizes [width] of the channels behind a norm, mean square 1."""
    size = (depth.deviation * torch.randn(width, generator=generator)).exp()
    hot = torch.randperm(width, generator=generator)[:math.ceil(depth.share * width)]
    size[hot] *= depth.size
    return size / size.square().mean().sqrt()


def draw_layer(config: LanceConfig, index: int, depth: Depth, outliers: str, seed: int) -> Weights:
    """All tensors of a layer."""
    generator = torch.Generator().manual_seed(1000 * seed + index)
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in DecoderLayer(config).state_dict().items()}
    weights: Weights = {}
    for name, shape in shapes.items():
        linear = name.removesuffix(".weight")
        kind, expert = layout.kind_of(linear), layout.expert_of(linear)
        if len(shape) == 2:
            w = draw_weight(shape, RATIOS.get((expert, kind), TYPICAL), outliers, generator)
            # Outputs near 1 for inputs near 1; what is added to the stream is smaller than the stream.
            w *= (0.5 if kind in ("o_proj", "down_proj") else 1.0) / math.sqrt(shape[1])
        elif name.endswith(".bias"):
            w = 0.3 * torch.randn(shape, generator=generator)
        elif "layernorm" in name:
            w = draw_channels(shape[0], depth, generator)
        else:
            w = 1 + 0.1 * torch.randn(shape, generator=generator)
        weights[f"{layout.LAYERS}.{index}.{name}"] = w
    return weights


def draw_calls(config: LanceConfig, tokens: int, seed: int) -> list[DecoderCall]:
    """Requests with `tokens` per expert in all: text that is read, then latents that see it and one another.

    Hidden states have directions of falling strength, others per expert, which all requests of all seeds share.
    """
    text, latents, width = 64, 62, config.hidden_size
    rotary = Rotary(config)
    rotary.compute_buffers(torch.float32, CPU)
    generator = torch.Generator().manual_seed(77_000 + seed)
    shared = torch.Generator().manual_seed(5)
    mixing = {expert: torch.randn(width, width, generator=shared) / width**0.5 for expert in EXPERTS}
    strength = torch.arange(1, width + 1) ** -0.5
    strength *= (width / strength.square().sum()).sqrt()

    def states(expert: str, count: int) -> Tensor:
        return (torch.randn(1, count, width, generator=generator) * strength) @ mixing[expert]

    def rope(start: int, count: int) -> tuple[Tensor, Tensor]:
        return rotary(torch.arange(start, start + count).expand(1, 3, -1), torch.float32)

    calls = []
    for row in range(max(1, tokens // text)):
        calls.append(DecoderCall((row,), (0,), True, {"und": states("und", text - 2)}, rope(0, text - 2)))
        calls.append(DecoderCall((row,), (text - 2,), False, {"und": states("und", 2), "gen": states("gen", latents)},
                          rope(text - 2, 2 + latents)))
    return calls


# --- running layers -------------------------------------------------------------------------------------------------


def run(config: LanceConfig, index: int, weights: Weights, calls: list[DecoderCall],
        watched: tuple[str, ...] = ()) -> tuple[list[DecoderCall], dict[str, Tensor]]:
    """One layer over all calls: its outputs, and inputs [tokens, in] of the watched linears."""
    prefix = f"{layout.LAYERS}.{index}."
    with torch.device("meta"):
        layer = DecoderLayer(config)
    layer.load_state_dict({name.removeprefix(prefix): w for name, w in weights.items()}, assign=True)
    layer.requires_grad_(False)
    seen: dict[str, list[Tensor]] = {name: [] for name in watched}
    for name, found in seen.items():
        layer.get_submodule(name.removeprefix(prefix)).register_forward_pre_hook(
            lambda _, args, found=found: found.append(args[0].flatten(0, -2)))
    rows: dict[int, CacheRow] = {}
    out = []
    for call in calls:
        for row, length in zip(call.rows, call.lengths, strict=True):
            rows.setdefault(row, CacheRow(*torch.empty(2, 1, config.num_key_value_heads, 128, config.head_dim)))
            rows[row].length = length
        out.append(replace(call, streams=layer(call.streams, call.rope, [rows[row] for row in call.rows], 0,
                                               call.causal)))
    return out, {name: torch.cat(found) for name, found in seen.items()}


def statistics_of(config: LanceConfig, layers: list[Weights], calls: list[DecoderCall]) -> ActStats:
    """What calibration would have saved of these calls."""
    linears: dict[str, LinearStats] = {}
    for index, weights in enumerate(layers):
        names = tuple(name for group in layout.groups(index) for name in group.linears)
        calls, seen = run(config, index, weights, calls, names)
        linears |= {name: LinearStats(x.abs().sum(0), x.square().sum(0), x.abs().amax(0), len(x), 1)
                    for name, x in seen.items()}
    return ActStats(linears, ["synthetic"], [{"run_id": "synthetic"}], len(linears))


def quantize(index: int, weights: Weights, method: str, codec: Codec, stats: ActStats,
             layer_inputs: LayerInputs) -> tuple[Weights, Weights]:
    """A layer packed with one method: as it is run, and the float layer with the same scales."""
    if method.startswith("rtn"):
        stats = ActStats({}, [], [{"run_id": "none"}], 0)
    target = {name: w.clone() for name, w in weights.items()}
    groups = published.quantize_layer(index, target, stats, codec) if method == "published" else \
        layer.quantize_layer(index, target, stats, codec, layer_inputs if method in CAPTURED else None,
                             sweeps=0 if method == "ours_light" else gptq.SWEEPS)
    packed: Weights = {}
    for group, done in groups:
        for name, linear in zip(group.linears, done.linears, strict=True):
            w = target[f"{name}.weight"]
            packed[f"{name}.weight"] = codec.dequantize(codec.weight(dict(linear.tensors), done.global_scale))
            if method == "published" and group.norm is not None:  # it returns norms only
                target[f"{name}.weight"] = w * weights[f"{group.norm}.weight"] / target[f"{group.norm}.weight"]
    target = {name: w.float() for name, w in target.items()}
    return {**target, **packed}, target


@dataclass
class Contender:
    """One method on its way through the layers.

    state: held-out calls in its own packed model
    errors: by kind, log of the relative error of every linear so far
    """

    method: str
    codec: Codec
    state: list[DecoderCall]
    layer_inputs: LayerInputs
    errors: dict[str, list[float]]

    def layer(self, config: LanceConfig, index: int, weights: Weights, stats: ActStats,
              exact: list[DecoderCall]) -> None:
        """Pack a layer, judge its linears on the float model's held-out states `exact`, and move on."""
        packed, target = quantize(index, weights, self.method, self.codec, stats, self.layer_inputs)
        names = tuple(name for group in layout.groups(index) for name in group.linears)
        _, seen = run(config, index, target, exact, names)
        for name, x in seen.items():
            w = target[f"{name}.weight"]
            off = (x @ (packed[f"{name}.weight"] - w).t()).square().sum() / (x @ w.t()).square().sum()
            self.errors.setdefault(layout.kind_of(name), []).append(math.log(float(off)))
        self.state, _ = run(config, index, packed, self.state)


def streams(calls: list[DecoderCall]) -> Iterator[Tensor]:
    """All hidden states of all calls."""
    for call in calls:
        yield from call.streams.values()


def relative(wanted: list[DecoderCall], got: list[DecoderCall], start: list[DecoderCall]) -> float:
    """Squared error of what was added since `start`, relative to its square."""
    triples = list(zip(streams(wanted), streams(got), streams(start), strict=True))
    error = sum(float((b - a).square().sum()) for a, b, _ in triples)
    return error / sum(float((a - c).square().sum()) for a, _, c in triples)


@torch.no_grad()
def measure(outliers: str, seed: int, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """format/method -> `e2e` and error by kind, of one seed."""
    config = config_of(args.shrink)
    layers = [draw_layer(config, index, depth, outliers, seed) for index, depth in enumerate(DEPTHS)]
    calibration, held_out = (draw_calls(config, count, seed + part * 500)
                             for part, count in enumerate((args.tokens, args.held_out)))
    stats = statistics_of(config, layers, calibration)
    out: dict[str, dict[str, Any]] = {}
    for format_ in args.formats:
        for method, codec in METHODS[format_]:
            contender = Contender(method, codec, held_out,
                                  LayerInputs(config, calibration, CPU, light=method == "ours_light"), {})
            exact = held_out
            for index, weights in enumerate(layers):
                contender.layer(config, index, weights, stats, exact)
                exact, _ = run(config, index, weights, exact)
            found = {"e2e": relative(exact, contender.state, held_out),
                     **{kind: math.exp(statistics.fmean(logs)) for kind, logs in contender.errors.items()}}
            out[f"{format_} {method}"] = found
            print(f"{outliers:<8} seed {seed}  {format_:<6} {method:<14} e2e {found['e2e']:.3e}", file=sys.stderr)
    return out


def table(means: dict[str, dict[str, dict[str, float]]]) -> str:
    """One row per kind of outliers and method."""
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lines = [["outliers", "method", "e2e", "of published", *kinds], ["---"] * (4 + len(kinds))]
    for outliers, methods in means.items():
        for name, found in methods.items():
            published = methods[f"{name.split()[0]} published"]["e2e"]
            lines.append([outliers, name, f"{found['e2e']:.2e}", f"{found['e2e'] / published:.2f}",
                          *(f"{found[kind]:.1e}" for kind in kinds)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(argv)
    runs = {outliers: [measure(outliers, seed, args) for seed in args.seeds] for outliers in args.outliers}
    means = {outliers: {name: {key: statistics.fmean(each[name][key] for each in found) for key in found[0][name]}
                        for name in found[0]} for outliers, found in runs.items()}
    print(table(means))
    print(json.dumps({
        "seeds": args.seeds, "shrink": args.shrink, "tokens": args.tokens, "held_out": args.held_out,
        "cpu": device_name(torch.device("cpu")), "torch": str(torch.__version__),
        "e2e_relmse": {outliers: {name: row["e2e"] for name, row in rows.items()} for outliers, rows in means.items()},
        "e2e_relmse_by_seed": {outliers: {name: [each[name]["e2e"] for each in found] for name in found[0]}
                               for outliers, found in runs.items()},
        "kind_relmse": {outliers: {name: {key: value for key, value in row.items() if key != "e2e"}
                                   for name, row in rows.items()} for outliers, rows in means.items()}}))


if __name__ == "__main__":
    script.run(main)
