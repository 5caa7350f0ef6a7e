#!/usr/bin/env python3
"""Write a packed Lance's understanding path for stock transformers and vLLM, as compressed-tensors.

    python -m apple.export_compressed_tensors --src Lance_3B-AWQ-INT4 --out Lance_3B-und-W4A16

The architecture is that of extract_und.py (`glm4_moe`, every layer dense), the weights are those of the packed folder:
INT4 as `pack-quantized`, NVFP4 with 16-bit activations as `nvfp4-pack-quantized`. Codes, zero points and scales are
carried over bit for bit; nothing is rounded anew.

Reads   a packed folder (awq_apply.py, nvfp4_apply.py, or a published one); the float weights are not needed
Writes  OUT/model.safetensors (for Lance_3B 2.74 GB in INT4, 2.81 GB in NVFP4), config.json with its
        quantization_config, generation_config.json, the tokenizer
Needs   0.1 GB of memory and the space for the output; to run it, transformers with compressed-tensors, or vLLM
        (requirements-vllm.txt)
Next    AutoModelForCausalLM.from_pretrained(OUT), vllm serve OUT

The layouts (compressed-tensors 0.20, read and run):

    pack-quantized          weight_packed int32 [out, in/8], code of column 8 j + n in bits 4 n; weight_scale
                            [out, groups]; weight_zero_point int32 [out/8, groups], packed along the outputs;
                            weight_shape int64 [2]
    nvfp4-pack-quantized    weight_packed uint8 [out, in/2]; weight_scale E4M3 [out, in/16]; weight_global_scale float32
                            [1], which divides the block scales
"""

import argparse
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apple import extract_und
from lance_quant.cli import script
from lance_quant.errors import InputError
from lance_quant.formats import layout
from lance_quant.formats.int4 import Int4Weight
from lance_quant.formats.nvfp4 import Nvfp4Weight
from lance_quant.formats.packed_folder import SUFFIXES, PackedFolder, require_space
from lance_quant.lance.config import LanceConfig
from lance_quant.lance.tokens import LanceTokenizer
from lance_quant.serving import weight_layouts
from lance_quant.storage.atomic import read_json, whole_folder, write_json
from lance_quant.storage.output_place import require_free
from lance_quant.storage.tensor_file import TensorFileWriter, TensorSpec, file_size

WORD = 8  # codes in 32 bits


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    parser.add_argument("--src", type=Path, required=True, help="packed folder")
    parser.add_argument("--model_path", type=Path,
                        help="folder with llm_config.json and tokenizer files; default: the packed folder")
    parser.add_argument("--out", type=Path, help="folder to create; never overwritten; not written by --dry_run")
    parser.add_argument("--dry_run", action="store_true", help="read headers only and print what would be written")
    return parser.parse_args(argv)


def linears_of(packed: PackedFolder) -> list[str]:
    """The packed linears of the understanding path."""
    return [name for name in packed.linears if extract_und.why_left_out(f"{name}.weight") is None]


def plan(packed: PackedFolder, config: LanceConfig) -> dict[str, TensorSpec]:
    """Name in the new folder -> dtype and shape.

    Raises:
        InputError: the folder has an 8-bit head, is not of this configuration, or has outputs that fill no word.
    """
    if packed.head:
        raise InputError(f"{packed.path} has an 8-bit head and embedding (--head_bits 8), which this layout does not "
                         "hold: pack it again without --head_bits")
    parts = {f"{name}.{suffix}" for name in packed.linears for suffix in SUFFIXES}
    floats = {name: spec for name, spec in packed.checkpoint.specs.items() if name not in parts}
    whole = floats | {f"{name}.weight": TensorSpec(torch.bfloat16, tuple(linear.shape))
                      for name, linear in packed.linears.items()}
    kept = [name for name, reason in extract_und.account(whole, config, str(packed.path)).items() if reason is None]
    specs: dict[str, TensorSpec] = {}
    for name in kept:
        linear = name.removesuffix(".weight")
        found = _specs_of(packed, linear) if linear in packed.linears else {name: floats[name]}
        specs |= {key.removeprefix(layout.LLM_PREFIX): spec for key, spec in found.items()}
    return specs


def _specs_of(packed: PackedFolder, name: str) -> dict[str, TensorSpec]:
    linear = packed.linears[name]
    n_out, n_in = linear.shape
    if packed.format == "nvfp4":
        parts = {"weight_packed": TensorSpec(torch.uint8, (n_out, n_in // 2)),
                 "weight_scale": TensorSpec(torch.float8_e4m3fn, (n_out, n_in // 16)),
                 "weight_global_scale": TensorSpec(torch.float32, (1,))}
    else:
        if n_out % WORD or n_in % WORD:
            raise InputError(f"{name} is {n_out} x {n_in}: compressed-tensors packs {WORD} codes in a word")
        groups = n_in // linear.group_size
        parts = {"weight_packed": TensorSpec(torch.int32, (n_out, n_in // WORD)),
                 "weight_scale": TensorSpec(torch.bfloat16, (n_out, groups)),
                 "weight_zero_point": TensorSpec(torch.int32, (n_out // WORD, groups)),
                 "weight_shape": TensorSpec(torch.int64, (2,))}
    return {f"{name}.{suffix}": spec for suffix, spec in parts.items()}


def int4_tensors(q: Int4Weight) -> dict[str, Tensor]:
    """A packed INT4 weight [out, in] as pack-quantized, by suffix.

    Its codes are signed there, code - 8, and stored with the 8 added again: the same bits, zero points too.
    """
    n_out, half = q.packed.shape
    lanes = q.zero.view(n_out // WORD, WORD, -1).int()
    words = torch.zeros(n_out // WORD, lanes.shape[2], dtype=torch.int32)
    for lane in range(WORD):
        words |= lanes[:, lane] << 4 * lane
    return {"weight_packed": q.packed.contiguous().view(torch.int32), "weight_scale": q.scale,
            "weight_zero_point": words, "weight_shape": torch.tensor([n_out, 2 * half])}


def nvfp4_tensors(q: Nvfp4Weight, global_scale: float, linear: str) -> dict[str, Tensor]:
    """A packed NVFP4 weight [out, in] as nvfp4-pack-quantized, by suffix.

    Args:
        global_scale: a power of two, so that its reciprocal is exact.
        linear: the weight's name, for the message.

    Raises:
        InputError: see weight_layouts.modelopt_tensors.
    """
    parts = weight_layouts.modelopt_tensors(q, global_scale, linear)
    return {"weight_packed": parts["weight"], "weight_scale": parts["weight_scale"],
            "weight_global_scale": torch.tensor([1 / global_scale])}


def quantization_config(packed: PackedFolder) -> dict[str, Any]:
    """`quantization_config` of config.json; linears of other group sizes, or left in bfloat16 by a budget, by name."""
    names = linears_of(packed)
    short = {name: name.removeprefix(layout.LLM_PREFIX) for name in names}
    sizes = {name: packed.linears[name].group_size for name in names}
    groups: dict[str, Any] = {}
    for index, (size, _) in enumerate(Counter(sizes.values()).most_common()):
        targets = ["Linear"] if index == 0 else [short[name] for name in names if sizes[name] == size]
        groups[f"group_{index}"] = {"targets": targets, "weights": _arguments(packed.format, size),
                                    "input_activations": None, "output_activations": None}
    ignored = [name.removeprefix(layout.LLM_PREFIX) for group in _groups(packed) for name in group.linears
               if name not in packed.linears]
    return {"quant_method": "compressed-tensors", "quantization_status": "compressed", "kv_cache_scheme": None,
            "format": "pack-quantized" if packed.format == "int4" else "nvfp4-pack-quantized",
            "config_groups": groups, "ignore": ["lm_head", *ignored]}


def _groups(packed: PackedFolder) -> list[layout.Group]:
    """Linears of the understanding path that read the same input."""
    return [group for layer in range(layout.num_layers(packed.checkpoint.specs)) for group in layout.groups(layer)
            if group.expert == "und"]


def _arguments(format_: str, size: int) -> dict[str, Any]:
    shared = {"num_bits": 4, "dynamic": False, "group_size": size, "observer": None, "actorder": None}
    if format_ == "int4":
        return {**shared, "type": "int", "symmetric": False, "strategy": "group", "zp_dtype": "torch.int8"}
    return {**shared, "type": "float", "symmetric": True, "strategy": "tensor_group",
            "scale_dtype": "torch.float8_e4m3fn"}


def export(src: Path, model: Path, out: Path) -> None:
    """Write the folder, whole or not at all.

    Args:
        model: folder with llm_config.json and tokenizer.

    Raises:
        InputError: see plan; also `out` exists, its disk is too small, or a block scale cannot be stored exactly.
    """
    require_free(out)
    raw = read_json(model / "llm_config.json", "model configuration")
    config = LanceConfig.load(model / "llm_config.json")
    tokenizer = LanceTokenizer(model)
    with PackedFolder(src) as packed:
        specs = plan(packed, config)
        require_space(out, file_size(specs))
        with whole_folder(out) as folder:
            with TensorFileWriter(folder / "model.safetensors", specs) as writer:
                _write(packed, specs, writer)
            settings = extract_und.model_config(raw, config, "glm4_moe", tied=False, dtype="bfloat16",
                                                eos=tokenizer.im_end)
            write_json(folder / "config.json", {**settings, "quantization_config": quantization_config(packed)})
            write_json(folder / "generation_config.json", extract_und.generation_config(settings, len(tokenizer)))
            extract_und.copy_tokenizer(model, folder)


def _write(packed: PackedFolder, specs: Mapping[str, TensorSpec], writer: TensorFileWriter) -> None:
    """Every linear once, one in memory at a time; then the rest, as it is."""
    written: set[str] = set()
    names = linears_of(packed)
    shared = _global_scales(packed, names)
    for name in names:
        weight = packed.read_weight(name)
        parts = int4_tensors(weight) if isinstance(weight, Int4Weight) else nvfp4_tensors(weight, shared[name], name)
        for suffix, tensor in parts.items():
            key = f"{name}.{suffix}".removeprefix(layout.LLM_PREFIX)
            writer.write(key, tensor)
            written.add(key)
    for key in specs.keys() - written:
        writer.write_pieces(key, extract_und.finite_pieces(packed.checkpoint, layout.LLM_PREFIX + key))


def _global_scales(packed: PackedFolder, names: list[str]) -> dict[str, float]:
    """By linear, the one global scale of those that vLLM fuses; nothing for INT4."""
    if packed.format == "int4":
        return {}
    found: dict[str, float] = {}
    for group in _groups(packed):
        own = [name for name in group.linears if name in names]
        if own:
            weights = [weight for weight in map(packed.read_weight, own) if isinstance(weight, Nvfp4Weight)]
            known = [packed.linears[name].global_scale for name in own]
            found |= dict.fromkeys(own, weight_layouts.shared_global_scale(weights, known))
    return found


def main(argv: list[str] | None = None) -> None:
    """Plan or export, and print the result."""
    args = parse_args(argv)
    model = args.src if args.model_path is None else args.model_path
    if args.dry_run:
        with PackedFolder(args.src) as packed:
            specs = plan(packed, LanceConfig.load(model / "llm_config.json"))
        print(f"{len(specs)} tensors\noutput_bytes: {file_size(specs)}")
        return
    if args.out is None:
        raise InputError("--out is needed unless --dry_run is given")
    export(args.src, model, args.out)
    print(args.out)


if __name__ == "__main__":
    script.run(main)
