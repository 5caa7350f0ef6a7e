#!/usr/bin/env python3
"""Time one decoded token: real shapes, random weights, every format beside our own eager bfloat16 and beside the
official loop's way of caching.

    python -m benchmarks.decode                                              # 4 of 36 layers, on the CPU
    python -m benchmarks.decode --clock cpu --compile --formats bfloat16 int4
    python -m benchmarks.decode --device cuda --layers 36 --compile
    python -m benchmarks.decode --head_bits 16 8 --formats float32 bfloat16 int4

Reads   nothing; weights are made in place
Writes  nothing; the last line on stdout is the result as JSON. Milliseconds of a token with the layers asked for, of
        the head alone (no layer), of one layer, and of a whole token of 36 layers: measured with --layers 36, otherwise
        computed as head + 36 x layer
Needs   the weights of the formats together, understanding expert only: 5 GB for the default; 36 layers on a GPU: 32 GB.
        Head and embedding are one table here, which no time depends on

Rows: "official caching" makes a new cache tensor per layer and token and scatters the past and the token into it, asks
for rotary angles at every token and looks at every token; "eager" is our loop with separate projections; "merged" has
one matmul for q/k/v and one for gate/up; "compiled" what --compile does. All rows take turns, so that a busy machine is
unfair to none, and the median of the rounds counts.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.random_lance import FORMATS, REAL_LAYERS, compute_dtype, random_lance, random_values, real_config
from lance_quant.cli import script
from lance_quant.evaluation.run_folder import device_name, versions
from lance_quant.inference.device import device_of, dtype_of
from lance_quant.lance.cache import CacheRow
from lance_quant.lance.compiled import compile_steps
from lance_quant.lance.merge import merge_projections
from lance_quant.lance.mot import Lance
from lance_quant.lance.steps import Steps
from lance_quant.lance.tokens import TEMPLATE, Split, TokenSequence, mrope_positions
from lance_quant.lance.understanding import Decoding

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Row:
    """One way to decode: `run` decodes so many tokens behind a fresh prompt, of which the clock sees the decoding."""

    name: str
    model: Lance
    run: Callable[[int], float]


class GrowingRow(CacheRow):
    """A cache as the official loop keeps it: a layer's keys and values are a tensor that is replaced at every call."""

    def __init__(self, layers: int):
        self.length, self.mask = 0, None
        self._grown: dict[int, tuple[Tensor, Tensor]] = {}
        self._layers = layers

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """See CacheRow.extend."""
        past = torch.arange(self.length, device=keys.device)
        call = torch.arange(self.length, self.length + keys.shape[1], device=keys.device)
        grown = []
        for index, new in enumerate((keys.transpose(0, 1), values.transpose(0, 1))):
            whole = new.new_zeros((self.length + len(new), *new.shape[1:]))
            whole[call] = new
            if self.length:
                whole[past] = self._grown[layer][index]
            grown.append(whole)
        self._grown[layer] = tuple(grown)
        return tuple(part.transpose(0, 1) for part in grown)


def add_comparison(parser: argparse.ArgumentParser, layers: int, rounds: int) -> None:
    """What is compared, how large it is, and how it is timed; the defaults are the benchmark's."""
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["float32", "bfloat16", "int4", "nvfp4"],
                        help="of the linears; packed ones compute in --dtype")
    parser.add_argument("--baseline", choices=["bfloat16", "float32"], default="bfloat16",
                        help="the format that the others are compared with; always there")
    parser.add_argument("--layers", type=int, default=layers, help="decoder layers, of 36")
    parser.add_argument("--rounds", type=int, default=rounds, help="rounds; the median counts")
    parser.add_argument("--compile", action="store_true", help="also the compiled steps, warm-up not counted")
    parser.add_argument("--clock", choices=CLOCKS, default="wall",
                        help="cpu: processor time instead, for one thread on a machine with other work")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    script.add_device(parser)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    parser.add_argument("--head_bits", nargs="+", type=int, choices=[8, 16], default=[16],
                        help="of the packed formats' head and embedding, one row each; 16: the compute dtype")
    parser.add_argument("--past", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=8, help="tokens decoded per round")
    add_comparison(parser, layers=4, rounds=5)
    return parser.parse_args(argv)


def ours(name: str, model: Lance, args: argparse.Namespace, compiled: bool) -> Row:
    """Our loop; a compiled model can also run as if it were not."""
    room = args.past + args.tokens
    steps = model.steps if compiled else Steps()

    def make(capacity: int, longest: int) -> Decoding:
        return Decoding(model, model.config.vocab_size, capacity, longest)

    def run(count: int) -> float:
        model.steps = steps
        decoding, step = steps.loop(make, room, args.tokens, "benchmark")
        decoding.start(prompt(args.past), torch.empty(0), count, seed=0)
        start = now(args, model)
        for _ in range(count):
            step()
        return now(args, model) - start

    return Row(name, model, run)


def official(name: str, model: Lance, args: argparse.Namespace) -> Row:
    """The official loop's way, restated on our layers."""

    @torch.no_grad()
    def run(count: int) -> float:
        packed = prompt(args.past)
        row = GrowingRow(model.config.num_hidden_layers)
        positions = mrope_positions(args.past + count, ())
        model.read(model.embed(packed.ids[:-1]), positions[:, :args.past - 1], [row], True)
        token = int(packed.ids[-1])
        start = now(args, model)
        for place in range(args.past - 1, args.past - 1 + count):
            hidden = model.read(model.embed(torch.tensor([token])), positions[:, place:place + 1], [row], True)
            token = int(model.language_model.lm_head(hidden[0, -1:]).argmax())
        return now(args, model) - start

    return Row(name, model, run)


def prompt(length: int) -> TokenSequence:
    """Text of so many made-up tokens."""
    return TokenSequence(torch.arange(1000, 1000 + length), mrope_positions(length, ()),
                  (Split(length, "causal", TEMPLATE),), ())


def now(args: argparse.Namespace, model: Lance) -> float:
    """The clock, after the device has finished."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return CLOCKS[args.clock]()


def rows_of(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """Every way that was asked for, the baseline first."""
    config, rows = real_config(args.layers), []
    tables: dict[torch.dtype, Tensor] = {}
    for form, head_bits in contestants(args):
        dtype, table = compute_dtype(form, dtype_of(args.dtype, device)), None
        if head_bits == 16:
            if dtype not in tables:
                tables[dtype] = random_values((config.vocab_size, config.hidden_size), dtype, device).mul_(0.02)
            table = tables[dtype]
        name = form if head_bits == 16 else f"{form}, 8-bit head,"
        model = random_lance(config, form, dtype, device, ["und"], table, head_bits)
        if form == args.baseline:
            rows += [ours(f"{form} eager", model, args, compiled=False),
                     official(f"{form} official caching", model, args)]
            model = random_lance(config, form, dtype, device, ["und"], table, head_bits)
        merge_projections(model)
        compiled = args.compile and compile_steps(model)
        rows.append(ours(f"{name} merged", model, args, compiled=False))
        if compiled:
            rows.append(ours(f"{name} compiled", model, args, compiled=True))
    return rows


def contestants(args: argparse.Namespace) -> list[tuple[str, int]]:
    """Formats, the baseline first, with the bits of their head; the choice of those is for packed formats."""
    forms = dict.fromkeys([args.baseline, *args.formats])
    return [(form, bits) for form in forms
            for bits in (dict.fromkeys(args.head_bits) if FORMATS[form] is not None else [16])]


def timed(rows: list[Row], args: argparse.Namespace) -> list[float]:
    """Median milliseconds of a token of each row."""
    for row in rows:
        row.run(min(2, args.tokens))
    rounds = [[row.run(args.tokens) / args.tokens * 1e3 for row in rows] for _ in range(args.rounds)]
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def headless(rows: list[Row]) -> list[Row]:
    """Take the layers away: what is left of a token is the same for every way but for the head's dtype."""
    for row in rows:
        row.model.language_model.model.layers = nn.ModuleList()
        row.model.steps = Steps()
    return rows


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    device = device_of(args.device)
    rows = rows_of(args, device)
    tokens = timed(rows, args)
    config = real_config(args.layers)
    heads = timed([ours(row.name, one, args, compiled=False) for row, one in
                   zip(rows, (row.model for row in headless(rows)), strict=True)], args)
    found = {}
    for row, token, head in zip(rows, tokens, heads, strict=True):
        layer = (token - head) / config.num_hidden_layers
        found[row.name] = {"token_ms": token, "head_ms": head, "layer_ms": layer,
                           "whole_token_ms": token if args.layers == REAL_LAYERS else head + REAL_LAYERS * layer}
    baseline = rows[0].name
    base = found[baseline]
    kind = "measured" if args.layers == REAL_LAYERS else "computed: head + 36 x layer"
    print(f"{device_name(device)}, {args.layers} of {REAL_LAYERS} layers, prompt of {args.past}, {args.clock} clock")
    print(f"{'ms per token':<30}{'layer':>9}{'head':>9}{'whole token':>13}   times as fast as {baseline} "
          f"(whole token {kind})")
    for name, one in found.items():
        one["speedup_layer"], one["speedup"] = (base[part] / one[part] for part in ("layer_ms", "whole_token_ms"))
        print(f"{name:<30}{one['layer_ms']:>9.2f}{one['head_ms']:>9.2f}{one['whole_token_ms']:>13.1f}"
              f"   layer {one['speedup_layer']:.2f} x, whole token {one['speedup']:.2f} x")
    print(json.dumps({"device": device_name(device), "layers": args.layers, "past": args.past, "clock": args.clock,
                      "baseline": baseline, "packed_dtype": args.dtype, "rounds": args.rounds,
                      "whole_token": kind, "rows": found, "versions": versions()}))


if __name__ == "__main__":
    script.run(main)
