"""Make a function-preserving variant of a checkpoint with activation outliers, as large models have them.

    python -m lance_nano.outliers --model_path lance_nano/checkpoint/Lance_nano --out runs/outliers
    python -m lance_nano.outliers --model_path lance_nano/checkpoint/Lance_nano --out runs/like_lance \
        --factor 16 --fed_factor 0.125 --share 0.005

A few random channels are made `factor` times larger where they are produced and smaller where they are
consumed: norm -> q, k, v; norm -> gate, up; v -> o; up -> down. Values of both experts meet in one attention,
so the same v channels are scaled in both. With a power of two every scaling is exact in any float format: the
variant computes the same function bit for bit, up to the order of sums, but plain rounding to 4 bits destroys
it at large factors. Behind v and up a factor below 1 makes large weights instead: columns of o_proj and
down_proj, where the published ratios of Lance-3B have their outliers. The second command comes near those
ratios (benchmarks/outlier_ratios.py); the first is harsher than anything published. These outliers are put in
by construction; they say nothing about where the real Lance has any.
"""

from __future__ import annotations

import argparse
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lance_nano.export import MODEL_FOLDER, VAE_FILE, VIT_FOLDER
from lance_quant.cli import script
from lance_quant.errors import InputError
from lance_quant.formats import layout
from lance_quant.lance.config import LanceConfig, LancePaths
from lance_quant.storage.atomic import whole_folder


def _channels(width: int, share: float, generator: torch.Generator) -> Tensor:
    """At least one random channel of `width`."""
    return torch.randperm(width, generator=generator)[: max(1, round(share * width))]


def _scale_inputs(
    tensors: dict[str, Tensor], linears: tuple[str, ...], columns: Tensor, factor: float
) -> None:
    for linear in linears:
        tensors[f"{linear}.weight"][:, columns] /= factor


def _scale_outputs(tensors: dict[str, Tensor], linear: str, rows: Tensor, factor: float) -> None:
    for part in ("weight", "bias"):
        if f"{linear}.{part}" in tensors:
            tensors[f"{linear}.{part}"][rows] *= factor


def rescale(
    tensors: dict[str, Tensor],
    config: LanceConfig,
    factor: float,
    share: float,
    seed: int,
    fed_factor: float | None = None,
) -> dict[str, Tensor]:
    """A copy of a checkpoint's tensors with outlier channels; the function they compute is unchanged.

    Args:
        factor: a power of two above 1, the size of the outliers.
        share: of the channels of every site.
        fed_factor: a power of two, the size of the outliers behind v_proj and up_proj; None for `factor`.
    """
    fed_factor = factor if fed_factor is None else fed_factor
    if factor <= 1 or not math.log2(factor).is_integer():
        raise InputError(f"--factor {factor:g} must be a power of two above 1, so that the scaling is exact")
    if fed_factor <= 0 or not math.log2(fed_factor).is_integer():
        raise InputError(f"--fed_factor {fed_factor:g} must be a power of two, so that the scaling is exact")
    if not 0 < share <= 1:
        raise InputError(f"--share {share:g} must lie in (0, 1]")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    generator = torch.Generator().manual_seed(seed)
    for layer in range(config.num_hidden_layers):
        values = _channels(config.num_key_value_heads * config.head_dim, share, generator)
        for group in layout.groups(layer):
            width = tensors[f"{group.linears[0]}.weight"].shape[1]
            if group.norm is not None:
                channels = _channels(width, share, generator)
                tensors[f"{group.norm}.weight"][channels] *= factor
                _scale_inputs(tensors, group.linears, channels, factor)
            elif group.place == "mlp_out":
                channels = _channels(width, share, generator)
                _scale_outputs(tensors, group.linears[0].replace("down_proj", "up_proj"), channels, fed_factor)
                _scale_inputs(tensors, group.linears, channels, fed_factor)
            else:
                _scale_outputs(tensors, group.linears[0].replace("o_proj", "v_proj"), values, fed_factor)
                _scale_inputs(tensors, group.linears, _readers(values, config), fed_factor)
    return tensors


def _readers(values: Tensor, config: LanceConfig) -> Tensor:
    """The inputs of o_proj that carry some channels of v: one per query head of the channel's key head."""
    groups = config.num_attention_heads // config.num_key_value_heads
    key_head, channel = values // config.head_dim, values % config.head_dim
    heads = key_head[:, None] * groups + torch.arange(groups)
    return (heads * config.head_dim + channel[:, None]).flatten()


def write(
    paths: LancePaths, out: Path, factor: float, share: float, seed: int, fed_factor: float | None = None
) -> None:
    """Write the variant with its ViT and VAE into the new folder `out`, in the layout of `export`."""
    config = LanceConfig.load(paths.model / "llm_config.json")
    tensors = rescale(load_file(paths.model / "model.safetensors"), config, factor, share, seed, fed_factor)
    with whole_folder(out) as folder:
        shutil.copytree(
            paths.model, folder / MODEL_FOLDER, ignore=shutil.ignore_patterns("model.safetensors")
        )
        shutil.copytree(paths.vit, folder / VIT_FOLDER)
        shutil.copy(paths.vae, folder / VAE_FILE)
        facts = {
            "format": "pt",
            "outlier_factor": f"{factor:g}",
            "outlier_fed_factor": f"{factor if fed_factor is None else fed_factor:g}",
            "outlier_share": f"{share:g}",
            "seed": str(seed),
        }
        path = folder / MODEL_FOLDER / "model.safetensors"
        save_file(tensors, path, metadata=facts)
        path.chmod(0o644)  # safetensors writes for the owner only


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    parser.add_argument(
        "--model_path", type=Path, required=True, help="float model folder; ViT and VAE beside it"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to create; never overwritten")
    parser.add_argument("--factor", type=float, default=32.0, help="size of the outliers, a power of two")
    parser.add_argument(
        "--fed_factor", type=float, help="the same behind v_proj and up_proj, default: --factor"
    )
    parser.add_argument("--share", type=float, default=0.03, help="share of channels per site")
    parser.add_argument("--seed", type=int, default=0, help="which channels")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(argv)
    write(LancePaths.find(args.model_path), args.out, args.factor, args.share, args.seed, args.fed_factor)
    script.log.info("wrote %s", args.out / MODEL_FOLDER)


if __name__ == "__main__":
    script.run(main)
