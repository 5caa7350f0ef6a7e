#!/usr/bin/env python3
"""Time one guided denoising step: real shapes, random weights, every format beside our own float one and beside the
official way of caching and routing.

    python -m benchmarks.denoise --baseline float32 --formats int4                # 1 of 36 layers, on the CPU
    python -m benchmarks.denoise --clock cpu --baseline float32 --formats int4 --height 256 --width 256
    python -m benchmarks.denoise --device cuda --layers 36 --compile --rounds 10

Reads   nothing; weights are made in place
Writes  nothing; the last line on stdout is the result as JSON. Milliseconds of a guided step (conditional and
        unconditional pass) with the layers asked for, without any layer, of one layer, and of a whole step of 36
        layers: measured with --layers 36, otherwise computed as rest + 36 x layer
Needs   the weights of one format at a time and the activations of 2 x 2306 tokens at 768 x 768: 3 GB for one layer

Rows: "official caching and routing" runs the two passes one after the other, makes a new cache tensor per layer and
pass, and gathers and scatters every activation by expert; "sequential" and "batched" are our two ways of guidance with
separate projections; "merged" has one matmul for q/k/v and one for gate/up; "compiled" what --compile does. Rows of a
format take turns, and the median of the rounds counts.
"""

import argparse
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.comparison import Comparison, add_comparison, comparison_of
from benchmarks.decode import GrowingRow
from benchmarks.random_lance import REAL_LAYERS, random_lance, real_config
from lance_quant.cli import script
from lance_quant.formats.layout import SUFFIX
from lance_quant.lance.cache import CacheRow
from lance_quant.lance.compiled import compile_steps
from lance_quant.lance.config import LanceConfig
from lance_quant.lance.generation import Denoiser, Sampling
from lance_quant.lance.merge import merge_projections
from lance_quant.lance.mot import DecoderLayer, Lance, Rope, _rotate
from lance_quant.lance.runtime import latent_grid
from lance_quant.lance.steps import Steps
from lance_quant.lance.tokens import PROMPT, TARGET, TEMPLATE, Grid, Split, TokenSequence, Visual, mrope_positions

_TEXT = (52, 28, 5)  # tokens of system, prompt and tail in an ordinary t2i request
_TIME = 0.9  # a guided timestep


@dataclass
class Row:
    """One way to make a step; `step` makes one at x_t [n, 48]."""

    name: str
    model: Lance
    step: Callable[[Tensor], Tensor]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    parser.add_argument("--height", type=int, default=768, help="of the picture")
    parser.add_argument("--width", type=int, default=768, help="of the picture")
    add_comparison(parser, layers=1, rounds=3)
    return parser.parse_args(argv)


def request(grid: Grid) -> TokenSequence:
    """A t2i request of made-up tokens."""
    head, prompt, tail = _TEXT
    cells = grid[0] * grid[1] * grid[2]
    splits = (Split(head, "causal", TEMPLATE), Split(prompt, "causal", PROMPT), Split(tail, "causal", TEMPLATE),
              Split(cells + 2, "noise", TARGET), Split(1, "causal", TEMPLATE))
    length = sum(split.length for split in splits)
    visuals = (Visual(head + prompt + tail + 1, grid),)
    return TokenSequence(torch.arange(length) % 1000, mrope_positions(length, visuals), splits, visuals)


def ours(name: str, model: Lance, sequence: TokenSequence, batched: bool = True, compiled: bool = False) -> Row:
    """Our step, through the runtime's own denoiser; a compiled model can also run as if it were not."""
    denoiser = Denoiser(model, sequence, Sampling(batch_guidance=batched))
    steps = model.steps if compiled else Steps()

    def step(x: Tensor) -> Tensor:
        model.steps = steps
        return denoiser.velocity(x, _TIME)

    return Row(name, model, step)


def official(name: str, model: Lance, sequence: TokenSequence) -> Row:
    """The official way, restated on our layers."""
    denoiser = Denoiser(model, sequence, Sampling())
    prefixes = [[(split, bounds) for split, bounds in zip(sequence.splits, sequence.bounds(), strict=True)
                 if split.content in kinds] for kinds in ((TEMPLATE, PROMPT), (TEMPLATE,))]
    rows = []
    for prefix in prefixes:
        row = GrowingRow(model.config.num_hidden_layers)
        for _, (start, end) in prefix[:-1]:  # without the closing token
            with torch.no_grad():
                model.read(model.embed(sequence.ids[start:end]), sequence.positions[:, start:end], [row], True)
        rows.append(row)
    start, end = sequence.span(TARGET)
    frame = model.embed(sequence.ids[[start, end - 1]])
    queries = [whole.positions[:, slice(*whole.span(TARGET))] for whole in (sequence, sequence.without_prompt())]

    @torch.no_grad()
    def step(x: Tensor) -> Tensor:
        passes = []
        for row, positions in zip(rows, queries, strict=True):
            latents = denoiser._embed(x, _TIME, 0, model.latent_pos_embed(denoiser.grid))
            x_th = torch.cat([frame[:1], latents, frame[1:]])
            rope = model.rope(positions)
            before = dict(row._grown)
            for index, layer in enumerate(model.language_model.model.layers):
                x_th = routed_layer(layer, x_th, rope, row, index)
            row._grown = before  # a denoising call leaves nothing behind
            norm = model.language_model.model.norm_moe_gen
            passes.append(model.llm2vae(norm(x_th[1:-1])))
        return denoiser._guide(*passes)

    return Row(name, model, step)


def routed_layer(layer: DecoderLayer, x_th: Tensor, rope: Rope, row: CacheRow, index: int) -> Tensor:
    """A layer on one sequence in its own order: <|vision_start|>, latents, <|vision_end|>."""
    attention, count = layer.self_attn, len(x_th)
    where = {"und": torch.tensor([0, count - 1], device=x_th.device),
             "gen": torch.arange(1, count - 1, device=x_th.device)}

    def routed(owner: nn.Module, part: str, source: Tensor) -> Tensor:
        out = None
        for expert, tokens in where.items():
            found = getattr(owner, part + SUFFIX[expert])(source[tokens])
            out = found.new_zeros((count, *found.shape[1:])) if out is None else out
            out[tokens] = found
        return out

    normed = routed(layer, "input_layernorm", x_th)
    q, k, v = (routed(attention, f"{part}_proj", normed).unflatten(-1, (-1, attention.head_dim)) for part in "qkv")
    q, k = routed(attention, "q_norm", q.float()), routed(attention, "k_norm", k.float())
    q, k, v = (part.transpose(0, 1) for part in (q, k, v))
    q, k = (_rotate(part[None], rope)[0].to(v.dtype) for part in (q, k))
    keys, values = row.extend(index, k, v)
    attended = F.scaled_dot_product_attention(q[None], keys[None], values[None], enable_gqa=True)[0]
    x_th = x_th + routed(attention, "o_proj", attended.transpose(0, 1).flatten(1))
    return x_th + routed(layer, "mlp", routed(layer, "post_attention_layernorm", x_th))


def rows_of(form: str, plan: Comparison, config: LanceConfig, sequence: TokenSequence) -> list[Row]:
    """The ways of one format."""
    dtype = plan.dtype_of(form)
    model, rows = random_lance(config, form, dtype, plan.device), []
    if form == plan.baseline:
        rows = [ours(f"{form} batched", model, sequence), ours(f"{form} sequential", model, sequence, batched=False),
                official(f"{form} official caching and routing", model, sequence)]
        model = random_lance(config, form, dtype, plan.device)
    merge_projections(model)
    compiled = plan.compiled and compile_steps(model)
    rows.append(ours(f"{form} merged", model, sequence))
    if compiled:
        rows.append(ours(f"{form} compiled", model, sequence, compiled=True))
    return rows


def timed(rows: list[Row], x: Tensor, plan: Comparison) -> list[float]:
    """Median milliseconds of a step of each row."""
    runs = [functools.partial(plan.seconds, functools.partial(row.step, x)) for row in rows]
    return [seconds * 1e3 for seconds in plan.medians(runs)]


def measure(plan: Comparison, config: LanceConfig, height: int, width: int) -> dict[str, dict[str, float]]:
    """Way -> milliseconds of a guided step, without any layer, of one layer and of 36, and the last relative to the
    first way's. `config` has the plan's number of layers; the output head, which denoising does not use, is left out.
    """
    config, grid = replace(config, vocab_size=2048), latent_grid(height, width)
    sequence = request(grid)
    x = torch.randn(grid[1] * grid[2], 48, generator=torch.Generator().manual_seed(0))
    found: dict[str, dict[str, float]] = {}
    for form in plan.ordered:
        rows = rows_of(form, plan, config, sequence)
        there = x.to(plan.device, rows[0].model.dtype)
        steps = timed(rows, there, plan)
        for row in rows:
            row.model.language_model.model.layers = nn.ModuleList()
        for row, step, rest in zip(rows, steps, timed(rows, there, plan), strict=True):
            layer = (step - rest) / plan.layers
            found[row.name] = {"step_ms": step, "rest_ms": rest, "layer_ms": layer,
                               "whole_step_ms": plan.whole(step, rest, layer)}
    base = next(iter(found.values()))["whole_step_ms"]
    for one in found.values():
        one["times_baseline"] = one["whole_step_ms"] / base
    return found


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    args = parse_args(argv)
    plan = comparison_of(args)
    found = measure(plan, real_config(args.layers), args.height, args.width)
    facts, baseline, kind = plan.facts(), next(iter(found)), plan.how("rest")
    _, rows, columns = latent_grid(args.height, args.width)
    print(f"{facts['device']}, {args.layers} of {REAL_LAYERS} layers, 2 x {rows * columns} latents, {args.clock} clock")
    print(f"{'ms per guided step':<40}{'layer':>10}{'rest':>9}{'whole step':>13}   times {baseline} "
          f"(whole step {kind})")
    for name, one in found.items():
        print(f"{name:<40}{one['layer_ms']:>10.1f}{one['rest_ms']:>9.1f}{one['whole_step_ms']:>13.0f}"
              f"   {one['times_baseline']:.3f} x")
    print(json.dumps({**facts, "latents": rows * columns, "baseline": baseline, "whole_step": kind, "rows": found}))


if __name__ == "__main__":
    script.run(main)
