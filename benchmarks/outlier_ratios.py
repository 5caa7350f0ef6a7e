#!/usr/bin/env python3
"""Report how uneven a checkpoint's weights and activations are, beside what was published of Lance-3B.

    python -m benchmarks.outlier_ratios --model_path lance_nano/checkpoint/Lance_nano
    python -m benchmarks.outlier_ratios --model_path downloads/Lance_3B --stats stats.pt

Reads   a float checkpoint, one linear at a time; statistics of awq_calibrate_single.py or awq_merge_stats.py if given
Writes  nothing; prints two tables in Markdown and, as the last line, JSON
Needs   0.5 GB of memory; seconds for lance-nano, minutes for Lance_3B

Weights: the largest |weight| of any group of 64 inputs over that of the median group, per linear; by expert and kind
the median over the layers and the largest. An independent Gaussian gives about 2. Activations into norm-fed linears,
by channel mean |x|: `spread`, half the distance between the 16 % and 84 % quantiles of its logarithm (the deviation of
a lognormal), `hot`, the share of channels beyond 8 times the median, `largest` over the median; of the first, the
middle and the last layer.

The values of Lance-3B: weights from the public record of the lance-mlx project (commit 0b5b952, 509 linears); nobody
published its activations, and what stands for them is a fit to that project's quantization errors.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

from benchmarks.fidelity_synthetic import DEPTHS, GROUP, group_ratio
from lance_quant.calibration.activation_stats import ActStats, model_fingerprint
from lance_quant.cli import script
from lance_quant.formats import layout
from lance_quant.storage.tensor_file import Checkpoint

# Expert and kind -> median and largest ratio over the layers of Lance-3B.
LANCE = {"und down_proj": (13.10, 28.96), "und o_proj": (9.08, 20.06), "gen down_proj": (7.43, 10.02),
         "und v_proj": (2.65, 4.09), "all": (5.35, None)}
HOT = 8.0  # times the median channel


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    parser.add_argument("--model_path", type=Path, required=True, help="float Lance folder")
    parser.add_argument("--stats", type=Path, help="activation statistics of that model")
    return parser.parse_args(argv)


def weight_ratios(source: Checkpoint) -> dict[str, list[float]]:
    """Expert and kind -> ratio of every layer; `all`: of all linears."""
    found: dict[str, list[float]] = {}
    for name in layout.linears(layout.num_layers(source.specs)):
        ratio = group_ratio(source.read(f"{name}.weight", torch.float32), GROUP)
        for key in (f"{layout.expert_of(name)} {layout.kind_of(name)}", "all"):
            found.setdefault(key, []).append(ratio)
    return found


def spread_of(mean_abs: torch.Tensor) -> dict[str, float]:
    """Spread, share of hot channels and largest channel of mean |x| [in]; silent channels are left out."""
    heard = mean_abs[mean_abs > 0].double()
    low, high = heard.log().quantile(torch.tensor([0.16, 0.84], dtype=torch.float64)).tolist()
    size = heard / heard.median()
    return {"spread": (high - low) / 2, "hot": float((size > HOT).double().mean()), "largest": float(size.max())}


def activation_spreads(stats: ActStats, layers: int) -> dict[str, dict[str, float]]:
    """Place and depth -> spread_of, averaged over both experts and both norm-fed groups that have statistics."""
    out = {}
    for depth, index in zip(DEPTHS, (0, (layers - 1) // 2, layers - 1), strict=True):
        for expert in layout.EXPERTS:
            known = [stats.linears[group.linears[0]] for group in layout.groups(index)
                     if group.norm is not None and group.expert == expert and group.linears[0] in stats.linears]
            if known:
                rows = [spread_of(entry.sum_abs.float() / entry.n_tokens) for entry in known]
                out[f"{expert} {depth.name}"] = {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}
    return out


def weight_table(ratios: dict[str, list[float]]) -> str:
    """Median and largest ratio of each kind, and Lance-3B's."""
    lines = ["| weights | median | largest | Lance-3B median | largest |", "|---|---|---|---|---|"]
    for key, values in ratios.items():
        theirs = ["-" if value is None else f"{value:.2f}" for value in LANCE.get(key, (None, None))]
        lines.append(f"| {key} | {statistics.median(values):.2f} | {max(values):.2f} | {theirs[0]} | {theirs[1]} |")
    return "\n".join(lines)


def activation_table(spreads: dict[str, dict[str, float]]) -> str:
    """Spreads of each depth, and what was fitted to Lance-3B."""
    fitted = {depth.name: f"spread {depth.deviation:.2f}, {100 * depth.share:.1f} % x{depth.size:.0f}"
              for depth in DEPTHS}
    lines = ["| activations | spread | hot | largest | fitted to Lance-3B |", "|---|---|---|---|---|"]
    for key, row in spreads.items():
        lines.append(f"| {key} layer | {row['spread']:.2f} | {100 * row['hot']:.1f} % | x{row['largest']:.1f} | "
                     f"{fitted[key.split()[1]]} |")
    return "\n".join(lines)


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(argv)
    with Checkpoint(args.model_path) as source:
        layers, ratios = layout.num_layers(source.specs), weight_ratios(source)
        fingerprint = model_fingerprint(source)
        widths = {name: source.specs[f"{name}.weight"].shape[1] for name in layout.linears(layers)}
    print(weight_table(ratios))
    spreads = {}
    if args.stats:
        stats = ActStats.load(args.stats)
        stats.require_model(fingerprint, widths)
        spreads = activation_spreads(stats, layers)
        print(f"\n{activation_table(spreads)}")
    print(json.dumps({"model": args.model_path.name, "weights": {
        key: {"median": statistics.median(values), "largest": max(values)} for key, values in ratios.items()},
        "activations": spreads}))


if __name__ == "__main__":
    script.run(main)
