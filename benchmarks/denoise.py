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
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.decode import GrowingRow, add_comparison, now
from benchmarks.random_lance import REAL_LAYERS, compute_dtype, random_lance, real_config
from lance_quant.cli import script
from lance_quant.evaluation.run_folder import device_name, versions
from lance_quant.formats.layout import SUFFIX
from lance_quant.inference.device import device_of, dtype_of
from lance_quant.lance.cache import CacheRow
from lance_quant.lance.compiled import compile_steps
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


def ours(name: str, model: Lance, packed: TokenSequence, batched: bool = True, compiled: bool = False) -> Row:
    """Our step, through the runtime's own denoiser; a compiled model can also run as if it were not."""
    denoiser = Denoiser(model, packed, Sampling(batch_guidance=batched))
    steps = model.steps if compiled else Steps()

    def step(x: Tensor) -> Tensor:
        model.steps = steps
        return denoiser.velocity(x, _TIME)

    return Row(name, model, step)


def official(name: str, model: Lance, packed: TokenSequence) -> Row:
    """The official way, restated on our layers."""
    denoiser = Denoiser(model, packed, Sampling())
    prefixes = [[(split, bounds) for split, bounds in zip(packed.splits, packed.bounds(), strict=True)
                 if split.content in kinds] for kinds in ((TEMPLATE, PROMPT), (TEMPLATE,))]
    rows = []
    for prefix in prefixes:
        row = GrowingRow(model.config.num_hidden_layers)
        for _, (start, end) in prefix[:-1]:  # without the closing token
            with torch.no_grad():
                model.read(model.embed(packed.ids[start:end]), packed.positions[:, start:end], [row], True)
        rows.append(row)
    start, end = packed.span(TARGET)
    frame = model.embed(packed.ids[[start, end - 1]])
    queries = [whole.positions[:, slice(*whole.span(TARGET))] for whole in (packed, packed.without_prompt())]

    @torch.no_grad()
    def step(x: Tensor) -> Tensor:
        passes = []
        for row, positions in zip(rows, queries, strict=True):
            latents = denoiser._embed(x, _TIME, 0, model.latent_pos_embed(denoiser.grid))
            sequence = torch.cat([frame[:1], latents, frame[1:]])
            rope = model.rope(positions)
            before = dict(row._grown)
            for index, layer in enumerate(model.language_model.model.layers):
                sequence = routed_layer(layer, sequence, rope, row, index)
            row._grown = before  # a denoising call leaves nothing behind
            norm = model.language_model.model.norm_moe_gen
            passes.append(model.llm2vae(norm(sequence[1:-1])))
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


def rows_of(form: str, args: argparse.Namespace, device: torch.device, packed: TokenSequence) -> list[Row]:
    """The ways of one format. The output head, which denoising does not use, is left out."""
    config = replace(real_config(args.layers), vocab_size=2048)
    dtype = compute_dtype(form, dtype_of(args.dtype, device))
    model, rows = random_lance(config, form, dtype, device), []
    if form == args.baseline:
        rows = [ours(f"{form} batched", model, packed), ours(f"{form} sequential", model, packed, batched=False),
                official(f"{form} official caching and routing", model, packed)]
        model = random_lance(config, form, dtype, device)
    merge_projections(model)
    compiled = args.compile and compile_steps(model)
    rows.append(ours(f"{form} merged", model, packed))
    if compiled:
        rows.append(ours(f"{form} compiled", model, packed, compiled=True))
    return rows


def timed(rows: list[Row], x: Tensor, args: argparse.Namespace) -> list[float]:
    """Median milliseconds of a step of each row."""
    for row in rows:
        row.step(x)
    rounds = []
    for _ in range(args.rounds):
        rounds.append([])
        for row in rows:
            start = now(args, row.model)
            row.step(x)
            rounds[-1].append((now(args, row.model) - start) * 1e3)
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    device = device_of(args.device)
    grid = latent_grid(args.height, args.width)
    packed = request(grid)
    x = torch.randn(grid[1] * grid[2], 48, generator=torch.Generator().manual_seed(0))
    found = {}
    for form in [args.baseline, *(form for form in args.formats if form != args.baseline)]:
        rows = rows_of(form, args, device, packed)
        there = x.to(device, rows[0].model.dtype)
        steps = timed(rows, there, args)
        for row in rows:
            row.model.language_model.model.layers = nn.ModuleList()
        for row, step, rest in zip(rows, steps, timed(rows, there, args), strict=True):
            layer = (step - rest) / args.layers
            whole = step if args.layers == REAL_LAYERS else rest + REAL_LAYERS * layer
            found[row.name] = {"step_ms": step, "rest_ms": rest, "layer_ms": layer, "whole_step_ms": whole}
    baseline = f"{args.baseline} batched"
    base = found[baseline]
    kind = "measured" if args.layers == REAL_LAYERS else "computed: rest + 36 x layer"
    print(f"{device_name(device)}, {args.layers} of {REAL_LAYERS} layers, 2 x {len(x)} latents, {args.clock} clock")
    print(f"{'ms per guided step':<40}{'layer':>10}{'rest':>9}{'whole step':>13}   times {baseline} "
          f"(whole step {kind})")
    for name, one in found.items():
        one["times_baseline"] = one["whole_step_ms"] / base["whole_step_ms"]
        print(f"{name:<40}{one['layer_ms']:>10.1f}{one['rest_ms']:>9.1f}{one['whole_step_ms']:>13.0f}"
              f"   {one['times_baseline']:.3f} x")
    print(json.dumps({"device": device_name(device), "layers": args.layers, "latents": len(x), "clock": args.clock,
                      "baseline": baseline, "packed_dtype": args.dtype, "rounds": args.rounds,
                      "whole_step": kind, "rows": found, "versions": versions()}))


if __name__ == "__main__":
    script.run(main)
