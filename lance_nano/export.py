"""Write a trained lance-nano in the layout of the official download.

    python -m lance_nano.export --state runs/nano.pt --vae runs/vae.pt --out lance_nano/checkpoint

Writes  OUT/Lance_nano/{llm_config.json,model.safetensors,vocab.json,merges.txt,tokenizer_config.json},
        OUT/Qwen2.5-VL-ViT/{config.json,vit.safetensors}, OUT/Wan2.2_VAE.pth

The averaged weights are exported, decoder and ViT in bfloat16, the codec in float32 (22 MB together). Two
tensors exist for the official layout only: `latent_pos_embed.pos_embed`, which every loader ignores, and the
codec's second half of `conv1`, a constant log-variance.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from lance_nano.model import NanoConfig, latent_positions
from lance_nano.progress import require_state
from lance_nano.tokenizer import Words, write_tokenizer
from lance_nano.vae import frame_vae, official_state
from lance_quant.cli import script
from lance_quant.storage.atomic import whole_folder, write_json

MODEL_FOLDER, VIT_FOLDER, VAE_FILE = "Lance_nano", "Qwen2.5-VL-ViT", "Wan2.2_VAE.pth"
LATENT_TABLE = 64  # cells per side of the official position table


def vit_config(config: NanoConfig) -> dict:
    """The vision part of llm_config.json, with the official keys."""
    return {
        "depth": config.vit_layers,
        "hidden_act": "silu",
        "hidden_size": config.vit_hidden,
        "intermediate_size": config.vit_intermediate,
        "num_heads": config.vit_heads,
        "in_chans": 3,
        "out_hidden_size": config.hidden,
        "patch_size": config.patch,
        "spatial_merge_size": 2,
        "spatial_patch_size": config.patch,
        "window_size": 112,
        "fullatt_block_indexes": [config.vit_layers - 1],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    }


def llm_config(config: NanoConfig, words: Words) -> dict:
    """The content of llm_config.json, with the official keys; special ids are those of the tokenizer."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": words.id("<|endoftext|>"),
        "eos_token_id": words.id("<|im_end|>"),
        "vision_start_token_id": words.id("<|vision_start|>"),
        "vision_end_token_id": words.id("<|vision_end|>"),
        "vision_token_id": words.id("<|vision_pad|>"),
        "image_token_id": words.id("<|image_pad|>"),
        "video_token_id": words.id("<|video_pad|>"),
        "hidden_act": "silu",
        "hidden_size": config.hidden,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate,
        "max_position_embeddings": 128000,
        "max_window_layers": 70,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.eps,
        "rope_theta": config.rope_theta,
        "sliding_window": 32768,
        "tie_word_embeddings": True,  # as in the official file, and as untrue: see lm_head
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": vit_config(config),
        "rope_scaling": {"type": "mrope", "mrope_section": list(config.mrope)},
        "vocab_size": config.vocab_size,
    }


def export(state: dict, vae_state: dict, out: Path) -> None:
    """Write the checkpoint of a `train` state and a `train_vae` result into the new folder `out`."""
    config = NanoConfig(**{**state["config"], "mrope": tuple(state["config"]["mrope"])})
    halves: dict[str, dict] = {"lance": {}, "vit": {}}
    for name, tensor in state["average"].items():
        half, _, own_name = name.partition(".")
        halves[half][own_name] = tensor.bfloat16().contiguous()
    halves["lance"]["latent_pos_embed.pos_embed"] = latent_positions(config.hidden, LATENT_TABLE).bfloat16()
    vae = frame_vae()
    vae.load_state_dict(vae_state["model"])
    with whole_folder(out) as folder:
        model, vit = folder / MODEL_FOLDER, folder / VIT_FOLDER
        write_tokenizer(model)
        vit.mkdir()
        write_json(model / "llm_config.json", llm_config(config, Words(model)))
        write_json(vit / "config.json", {**vit_config(config), "in_channels": 3, "model_type": "qwen2_5_vl"})
        facts = {"format": "pt", "steps": str(state["step"]), "seed": str(state["seed"])}
        save_file(halves["lance"], model / "model.safetensors", metadata=facts)
        save_file(halves["vit"], vit / "vit.safetensors", metadata=facts)
        torch.save(official_state(vae), folder / VAE_FILE)
        for path in (model / "model.safetensors", vit / "vit.safetensors"):
            path.chmod(0o644)  # safetensors writes for the owner only


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    parser.add_argument("--state", type=Path, required=True, help="state file of lance_nano.train")
    parser.add_argument("--vae", type=Path, required=True, help="codec of lance_nano.train_vae")
    parser.add_argument("--out", type=Path, required=True, help="folder to create; never overwritten")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(argv)
    export(require_state(args.state, "training state"), require_state(args.vae, "codec"), args.out)
    script.log.info("wrote %s", args.out)


if __name__ == "__main__":
    script.run(main)
