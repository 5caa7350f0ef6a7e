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
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.comparison import Comparison, add_comparison, comparison_of
from benchmarks.random_lance import FORMATS, REAL_LAYERS, random_lance, random_values, real_config
from lance_quant.cli import script
from lance_quant.lance.cache import CacheRow
from lance_quant.lance.compiled import compile_steps
from lance_quant.lance.config import LanceConfig
from lance_quant.lance.merge import merge_projections
from lance_quant.lance.mot import Lance
from lance_quant.lance.steps import Steps
from lance_quant.lance.tokens import TEMPLATE, Split, TokenSequence, mrope_positions
from lance_quant.lance.understanding import Decoding


@dataclass(frozen=True)
class Text:
    """What is decoded: `tokens` behind a prompt of `past`."""

    past: int
    tokens: int


@dataclass
class Row:
    """One way to decode: `run` decodes behind a fresh prompt and returns the seconds that the decoding took."""

    name: str
    model: Lance
    run: Callable[[], float]


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


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    parser.add_argument("--head_bits", nargs="+", type=int, choices=[8, 16], default=[16],
                        help="of the packed formats' head and embedding, one row each; 16: the compute dtype")
    parser.add_argument("--past", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=8, help="tokens decoded per round")
    add_comparison(parser, layers=4, rounds=5)
    return parser.parse_args(argv)


def ours(name: str, model: Lance, plan: Comparison, text: Text, compiled: bool = False) -> Row:
    """Our loop; a compiled model can also run as if it were not."""
    steps = model.steps if compiled else Steps()

    def make(capacity: int, longest: int) -> Decoding:
        return Decoding(model, model.config.vocab_size, capacity, longest)

    def run() -> float:
        model.steps = steps
        decoding, step = steps.loop(make, text.past + text.tokens, text.tokens, "benchmark")
        decoding.start(prompt(text.past), torch.empty(0), text.tokens, seed=0)
        start = plan.now()
        for _ in range(text.tokens):
            step()
        return plan.now() - start

    return Row(name, model, run)


def official(name: str, model: Lance, plan: Comparison, text: Text) -> Row:
    """The official loop's way, restated on our layers."""

    @torch.no_grad()
    def run() -> float:
        sequence = prompt(text.past)
        row = GrowingRow(model.config.num_hidden_layers)
        positions = mrope_positions(text.past + text.tokens, ())
        model.read(model.embed(sequence.ids[:-1]), positions[:, :text.past - 1], [row], True)
        token = int(sequence.ids[-1])
        start = plan.now()
        for place in range(text.past - 1, text.past - 1 + text.tokens):
            hidden = model.read(model.embed(torch.tensor([token])), positions[:, place:place + 1], [row], True)
            token = int(model.language_model.lm_head(hidden[0, -1:]).argmax())
        return plan.now() - start

    return Row(name, model, run)


def prompt(length: int) -> TokenSequence:
    """Text of so many made-up tokens."""
    return TokenSequence(torch.arange(1000, 1000 + length), mrope_positions(length, ()),
                         (Split(length, "causal", TEMPLATE),), ())


def rows_of(plan: Comparison, config: LanceConfig, text: Text, head_bits: Sequence[int]) -> list[Row]:
    """Every way that was asked for, the baseline first."""
    rows: list[Row] = []
    tables: dict[torch.dtype, Tensor] = {}
    for form, bits in contestants(plan, head_bits):
        dtype, table = plan.dtype_of(form), None
        if bits == 16:
            if dtype not in tables:
                shape = (config.vocab_size, config.hidden_size)
                tables[dtype] = random_values(shape, dtype, plan.device).mul_(0.02)
            table = tables[dtype]
        name = form if bits == 16 else f"{form}, 8-bit head,"
        model = random_lance(config, form, dtype, plan.device, ["und"], table, bits)
        if form == plan.baseline:
            rows += [ours(f"{form} eager", model, plan, text), official(f"{form} official caching", model, plan, text)]
            model = random_lance(config, form, dtype, plan.device, ["und"], table, bits)
        merge_projections(model)
        compiled = plan.compiled and compile_steps(model)
        rows.append(ours(f"{name} merged", model, plan, text))
        if compiled:
            rows.append(ours(f"{name} compiled", model, plan, text, compiled=True))
    return rows


def contestants(plan: Comparison, head_bits: Sequence[int]) -> list[tuple[str, int]]:
    """Formats, the baseline first, with the bits of their head; the choice of those is for packed formats."""
    return [(form, bits) for form in plan.ordered
            for bits in (dict.fromkeys(head_bits) if FORMATS[form] is not None else [16])]


def headless(rows: list[Row], plan: Comparison, text: Text) -> list[Row]:
    """Take the layers away: what is left of a token is the same for every way but for the head's dtype."""
    for row in rows:
        row.model.language_model.model.layers = nn.ModuleList()
        row.model.steps = Steps()
    return [ours(row.name, row.model, plan, text) for row in rows]


def measure(plan: Comparison, config: LanceConfig, text: Text,
            head_bits: Sequence[int] = (16,)) -> dict[str, dict[str, float]]:
    """Way -> milliseconds of a token, of its head, of one layer and of 36, and how much faster than the first way.

    `config` has the plan's number of layers.
    """
    rows = rows_of(plan, config, text, head_bits)
    tokens = plan.medians([row.run for row in rows])
    heads = plan.medians([row.run for row in headless(rows, plan, text)])
    found: dict[str, dict[str, float]] = {}
    for row, token, head in zip(rows, tokens, heads, strict=True):
        token_ms, head_ms = token / text.tokens * 1e3, head / text.tokens * 1e3
        layer_ms = (token_ms - head_ms) / plan.layers
        found[row.name] = {"token_ms": token_ms, "head_ms": head_ms, "layer_ms": layer_ms,
                           "whole_token_ms": plan.whole(token_ms, head_ms, layer_ms)}
    base = found[rows[0].name]
    for one in found.values():
        one["speedup_layer"], one["speedup"] = (base[part] / one[part] for part in ("layer_ms", "whole_token_ms"))
    return found


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    args = parse_args(argv)
    plan = comparison_of(args)
    found = measure(plan, real_config(args.layers), Text(args.past, args.tokens), args.head_bits)
    facts, baseline, kind = plan.facts(), next(iter(found)), plan.how("head")
    print(f"{facts['device']}, {args.layers} of {REAL_LAYERS} layers, prompt of {args.past}, {args.clock} clock")
    print(f"{'ms per token':<30}{'layer':>9}{'head':>9}{'whole token':>13}   times as fast as {baseline} "
          f"(whole token {kind})")
    for name, one in found.items():
        print(f"{name:<30}{one['layer_ms']:>9.2f}{one['head_ms']:>9.2f}{one['whole_token_ms']:>13.1f}"
              f"   layer {one['speedup_layer']:.2f} x, whole token {one['speedup']:.2f} x")
    print(json.dumps({**facts, "past": args.past, "baseline": baseline, "whole_token": kind, "rows": found}))


if __name__ == "__main__":
    script.run(main)
