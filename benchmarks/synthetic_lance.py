#!/usr/bin/env python3
"""Write a Lance checkpoint of any size with random weights: real shapes, names and file formats, no real weights.

    python -m benchmarks.synthetic_lance --out runs/synthetic --layers 36            # 24.7 GB, as Lance_3B
    python -m benchmarks.synthetic_lance --out runs/synthetic --layers 2 --video      # with the ViT inside
    python -m benchmarks.synthetic_lance --out runs/tiny --preset tiny

Reads   nothing
Writes  OUT/Lance_3B/{llm_config.json,model.safetensors,tokenizer files}, OUT/Qwen2.5-VL-ViT/, OUT/Wan2.2_VAE.pth
        (narrow, whatever the preset: nothing here measures the VAE)
Needs   0.4 GB of memory; about 2 minutes for 36 layers on a disk that writes 300 MB/s
Next    benchmarks/loader_memory.py, awq_apply.py --src OUT/Lance_3B --stats OUT/stats.pt

Weights are Gaussian with a few hot input columns per fusion group, activations lognormal with a few hot channels (the
statistics of a made-up calibration run lie in OUT/stats.pt), so that a quantizer has something to find. Every value
depends on the seed and its place only: layer 0 is the same in files of 2 and of 36 layers.
"""

import argparse
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from lance_quant.calibration.activation_stats import ActStats, LinearStats, model_fingerprint
from lance_quant.cli import script
from lance_quant.formats import layout
from lance_quant.lance.config import LanceConfig
from lance_quant.lance.mot import Lance
from lance_quant.lance.tokens import T2I_SYSTEM
from lance_quant.lance.vae import build_autoencoder, official_name
from lance_quant.storage.atomic import whole_folder, write_json
from lance_quant.storage.tensor_file import Checkpoint, TensorFileWriter, TensorSpec

_PIECE = 1 << 22  # values made at once
_HOT = 6  # hot input columns per fusion group
_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
             "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
             "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


@dataclass(frozen=True)
class Preset:
    """Sizes that llm_config.json does not fix by itself."""

    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    mrope: tuple[int, int, int]
    layers: int
    latent_table: int  # rows of the ignored position table
    vit: dict[str, object]


_VIT = {"hidden_act": "silu", "in_channels": 3, "in_chans": 3, "patch_size": 14, "spatial_merge_size": 2,
        "spatial_patch_size": 14, "temporal_patch_size": 2, "tokens_per_second": 2, "window_size": 112}
PRESETS = {
    "real": Preset(2048, 16, 2, 11008, 151936, (16, 24, 24), 36, 4096,
                   _VIT | {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
                           "out_hidden_size": 2048, "fullatt_block_indexes": [7, 15, 23, 31]}),
    # A layer of real shapes with next to nothing around it: 0.7 GB.
    "layer": Preset(2048, 16, 2, 11008, 704, (16, 24, 24), 1, 64,
                    _VIT | {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
                            "out_hidden_size": 2048, "fullatt_block_indexes": [1]}),
    "tiny": Preset(128, 4, 2, 256, 704, (4, 6, 6), 4, 64,
                   _VIT | {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
                           "out_hidden_size": 128, "fullatt_block_indexes": [1]}),
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--preset", choices=PRESETS, default="real",
                        help="real: the sizes of Lance_3B; layer: those of its layers, with little around them")
    parser.add_argument("--layers", type=int, help="decoder layers; default: the preset's")
    parser.add_argument("--video", action="store_true",
                        help="as Lance_3B_Video: the ViT in the checkpoint too, and its larger position table")
    parser.add_argument("--seed", type=int, default=0, help="of all weights")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(argv)
    write(args.out, PRESETS[args.preset], args.layers, args.video, args.seed)
    print(args.out)


def write(out: Path, preset: Preset, layers: int | None = None, video: bool = False, seed: int = 0) -> None:
    """Write the files above into the new folder `out`; the flags explain the arguments."""
    with whole_folder(out) as folder:
        model = folder / "Lance_3B"
        model.mkdir()
        video_token = write_tokenizer(model)
        config = write_config(model, preset, layers or preset.layers, video_token)
        vit = vit_tower(preset)
        write_vit(folder / "Qwen2.5-VL-ViT", preset, vit, seed)
        write_vae(folder / "Wan2.2_VAE.pth", seed)
        write_model(model / "model.safetensors", config, preset, vit if video else None, seed)
        write_stats(folder / "stats.pt", model, config, seed)


def write_tokenizer(folder: Path) -> int:
    """A byte-level BPE in Qwen2's files, learned from the templates; ids of the specials follow the vocabulary. Returns
    the id of <|video_pad|>."""
    learner = ByteLevelBPETokenizer()
    text = [f"<|im_start|>system\n{T2I_SYSTEM}", "user\n", "assistant\n", "Look at the image carefully and answer."]
    learner.train_from_iterator(text * 3, vocab_size=600, min_frequency=2, show_progress=False)
    learner.save_model(str(folder))
    first = len(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": False, "add_bos_token": False, "errors": "replace",
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None, "model_max_length": 131072,
        "added_tokens_decoder": {str(first + index): {"content": token, **flags}
                                 for index, token in enumerate(_SPECIALS)}})
    return first + _SPECIALS.index("<|video_pad|>")


def write_config(folder: Path, preset: Preset, layers: int, video_token: int) -> LanceConfig:
    """llm_config.json with the keys of the official one."""
    write_json(folder / "llm_config.json", {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
        "hidden_size": preset.hidden, "num_hidden_layers": layers, "num_attention_heads": preset.heads,
        "num_key_value_heads": preset.kv_heads, "intermediate_size": preset.intermediate,
        "vocab_size": preset.vocabulary, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu",
        "rope_scaling": {"type": "mrope", "mrope_section": list(preset.mrope)}, "tie_word_embeddings": True,
        "video_token_id": video_token, "vision_config": preset.vit})
    return LanceConfig.load(folder / "llm_config.json")


def vit_tower(preset: Preset) -> Qwen2_5_VisionTransformerPretrainedModel:
    """The vision tower on meta, for its names and shapes."""
    with torch.device("meta"):
        return Qwen2_5_VisionTransformerPretrainedModel._from_config(Qwen2_5_VLVisionConfig.from_dict(preset.vit))


def write_vit(folder: Path, preset: Preset, tower: torch.nn.Module, seed: int) -> None:
    """The ViT folder, in bfloat16 as the official one."""
    folder.mkdir()
    write_json(folder / "config.json", {**preset.vit, "model_type": "qwen2_5_vl"})
    specs = {name: TensorSpec(torch.bfloat16, tuple(value.shape)) for name, value in tower.state_dict().items()}
    write_random(folder / "vit.safetensors", specs, seed)


def write_vae(path: Path, seed: int) -> None:
    """A narrow Wan2.2 VAE under the official names."""
    torch.manual_seed(seed)
    autoencoder = build_autoencoder(encoder_width=8, decoder_width=12)
    torch.save({official_name(name): value for name, value in autoencoder.state_dict().items()}, path)


def write_model(path: Path, config: LanceConfig, preset: Preset, vit: torch.nn.Module | None, seed: int) -> None:
    """model.safetensors, all in float32, streamed."""
    with torch.device("meta"):
        model = Lance(config, torch.float32, torch.device("meta"))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if vit is not None:
        shapes |= {layout.VIT_PREFIX + name: tuple(value.shape) for name, value in vit.state_dict().items()}
    rows = preset.latent_table if vit is None else 31 * preset.latent_table
    shapes[layout.IGNORED] = (rows, config.hidden_size)
    write_random(path, {name: TensorSpec(torch.float32, shape) for name, shape in shapes.items()}, seed)


def write_random(path: Path, specs: dict[str, TensorSpec], seed: int) -> None:
    """A safetensors file of random values, made piece by piece."""
    hot = hot_columns(specs, seed)
    with TensorFileWriter(path, specs) as writer:
        for name, spec in tqdm(specs.items(), desc=path.name, unit="tensor", leave=False):
            writer.write_pieces(name, random_pieces(name, spec, hot.get(name), seed))


def random_pieces(name: str, spec: TensorSpec, gain: Tensor | None, seed: int) -> Iterator[Tensor]:
    """Values of one tensor: norms around 1, everything else Gaussian of a width that keeps activations near 1."""
    width = spec.shape[-1]
    rows = max(1, _PIECE // width)
    total = spec.nbytes // spec.dtype.itemsize // width
    for first in range(0, total, rows):
        count = min(rows, total - first)
        noise = torch.randn(count, width, generator=generator(seed, name, first))
        if len(spec.shape) == 1 and "norm" in name or name.endswith("ln_q.weight"):
            yield (1 + 0.1 * noise).flatten()
        else:
            yield (noise * (0.02 if gain is None else gain) * (2048 / max(width, 128)) ** 0.5).flatten()


def hot_columns(specs: dict[str, TensorSpec], seed: int) -> dict[str, Tensor]:
    """Standard deviation per input column of every quantizable linear; a few columns per group are 3 to 12 times
    the rest."""
    gains = {}
    if not any(name.startswith(layout.LAYERS) for name in specs):
        return gains
    for layer in range(layout.num_layers(specs)):
        for group in layout.groups(layer):
            width = specs[f"{group.linears[0]}.weight"].shape[1]
            draw = generator(seed, group.name)
            gain = torch.full((width,), 0.02)
            gain[torch.randperm(width, generator=draw)[:_HOT]] *= 3 + 9 * torch.rand(_HOT, generator=draw)
            gains |= {f"{name}.weight": gain for name in group.linears}
    return gains


def write_stats(path: Path, model: Path, config: LanceConfig, seed: int) -> None:
    """Statistics of a calibration that never ran: lognormal channels, a few of them hot."""
    linears = {}
    with Checkpoint(model) as source:
        for layer in range(config.num_hidden_layers):
            for group in layout.groups(layer):
                width = source.specs[f"{group.linears[0]}.weight"].shape[1]
                draw = generator(seed, group.name, 1)
                size = 0.3 * torch.exp(0.8 * torch.randn(width, generator=draw))
                size[torch.randperm(width, generator=draw)[:max(1, width // 400)]] *= 20
                tokens = 1 << 14
                entry = LinearStats(size * tokens, size.square() * 1.57 * tokens, 5 * size, tokens, 8)
                linears |= dict.fromkeys(group.linears, entry)
        run = {"run_id": f"synthetic-{seed}", "task": "synthetic", "model": model_fingerprint(source)}
    ActStats(linears, ["synthetic"], [run], len(linears)).save(path)


def generator(seed: int, name: str, index: int = 0) -> torch.Generator:
    """A generator that depends on the seed and the place only."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name} {index}".encode()))


if __name__ == "__main__":
    script.run(main)
