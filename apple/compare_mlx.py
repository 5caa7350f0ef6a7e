#!/usr/bin/env python3
"""Measure what an MLX folder's rounding changes in Lance's answers, pictures included, without MLX or a Mac.

    python -m apple.compare_mlx --model_path downloads/Lance_3B --example_json questions.json --mlx_dir A B

The folder's weights are dequantized into the understanding expert of our own runtime, which reads the pictures as
Lance does (MLX's text models cannot). The float model answers; both models then give a distribution in front of every
token of that answer.

Reads   the Lance folder that was extracted, with its ViT, x2t_image samples, folders made by apple/export_mlx.py
Writes  nothing; prints one JSON line per folder: bytes, relative error of the logits, KL in nats per token (mean over
        samples, standard error), share of tokens with the same first choice. The logits tell variants apart where a
        sure model's probabilities no longer do.
Needs   the float model's memory and as much again for one folder's weights
Next    choose a variant
"""

import argparse
import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from apple.mlx_codes import Format, dequantize
from lance_quant.cli import script
from lance_quant.errors import InputError
from lance_quant.evaluation.metrics import relative_error, token_divergence
from lance_quant.formats import layout
from lance_quant.inference.device import device_of, dtype_of
from lance_quant.lance.config import LancePaths
from lance_quant.lance.media import samples
from lance_quant.lance.media.vision import RESOLUTIONS
from lance_quant.lance.runtime import Runtime
from lance_quant.storage.atomic import read_json


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    parser.add_argument("--model_path", type=Path, required=True, help="Lance folder with the float checkpoint")
    parser.add_argument("--vit_path", type=Path, help="Qwen2.5-VL-ViT folder; default: beside the Lance folder")
    parser.add_argument("--example_json", type=Path, required=True, help="x2t_image sample file")
    parser.add_argument("--limit", type=int, help="take only this many samples")
    parser.add_argument("--resolution", choices=RESOLUTIONS, default="image_768res", help="preset for input pictures")
    parser.add_argument("--mlx_dir", type=Path, nargs="+", required=True, help="folders made by apple/export_mlx.py")
    script.add_device(parser)
    return parser.parse_args(argv)


def mlx_weights(folder: Path) -> dict[str, Tensor]:
    """Name in the extracted folder -> tensor, quantized ones as float32. InputError if it is no 4-bit MLX folder."""
    found = read_json(folder / "config.json", "model configuration").get("quantization") or {}
    if found.get("bits") != 4 or "group_size" not in found:
        raise InputError(f"{folder} was not made by apple/export_mlx.py: its config.json has no 4-bit quantization")
    fmt, out = Format(found.get("mode", "affine"), found["group_size"]), {}
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if not name.endswith((".scales", ".biases"))]:
        module, _, last = name.rpartition(".")
        parts = {suffix: tensors[f"{module}.{suffix}"] for suffix in ("weight", "scales", "biases")
                 if f"{module}.{suffix}" in tensors}
        out[name] = dequantize(parts, fmt) if last == "weight" and "scales" in parts else tensors[name]
    return out


def put_into(pipeline: Runtime, weights: dict[str, Tensor]) -> None:
    """Replace the understanding path of a loaded Lance. InputError if the folder is another model's."""
    language = pipeline.model.language_model
    own = {name: tensor for name, tensor in language.state_dict().items() if layout.expert_of(name) == "und"}
    odd = sorted(name for name in {*own, *weights}
                 if name not in own or name not in weights or own[name].shape != weights[name].shape)
    if odd:
        raise InputError(f"the MLX folder is not this model's: {len(odd)} tensors differ, first {odd[:5]}")
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)


def main(argv: list[str] | None = None) -> None:
    """Answer with the float model, then measure every folder."""
    args = parse_args(argv)
    device = device_of(args.device)
    paths, dtype = LancePaths.find(args.model_path, args.vit_path), dtype_of(args.dtype, device)
    pipeline = Runtime.load(paths, device, dtype)
    questions = samples.load("x2t_image", args.example_json)[:args.limit]
    asked = [pipeline.prompt_of(question, args.resolution) for question in questions]
    answers = [pipeline.answer(*request).ids for request in asked]
    exact = [pipeline.forced_logprobs(*request, ids).cpu() for request, ids in zip(asked, answers, strict=True)]
    for folder in args.mlx_dir:
        put_into(pipeline, mlx_weights(folder))
        rounded = [pipeline.forced_logprobs(*request, ids).cpu() for request, ids in zip(asked, answers, strict=True)]
        found = [token_divergence(*pair) for pair in zip(exact, rounded, strict=True)]
        kl = torch.stack([divergence.kl.mean() for divergence in found])
        same = sum(divergence.top1 for divergence in found) / len(found)
        spread = kl.std().item() / math.sqrt(len(kl)) if len(kl) > 1 else None
        print(json.dumps({"folder": folder, "bytes": (folder / "model.safetensors").stat().st_size,
                          "logit_error": relative_error(_centred(rounded), _centred(exact)),
                          "kl": kl.mean().item(), "kl_standard_error": spread, "same_top1": same,
                          "samples": len(kl)}, default=str))


def _centred(logprobs: list[Tensor]) -> Tensor:
    """All tokens' logits, up to the constant per token that probabilities do not know."""
    return torch.cat([values - values.mean(-1, keepdim=True) for values in logprobs])


if __name__ == "__main__":
    script.run(main)
