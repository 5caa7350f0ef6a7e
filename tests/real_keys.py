"""Names and shapes of the real checkpoints, and files that consist of their headers only.

A header followed by a hole of the right size: sparse, so 28 GB take a few hundred kilobytes of disk.
"""

import contextlib
import json
import math
from pathlib import Path

import torch

from lance_quant.formats import layout
from lance_quant.storage.tensor_file import TensorFileWriter, TensorSpec

LAYERS, HIDDEN, MLP, KV, HEAD, VOCAB = 36, 2048, 11008, 256, 128, 151936
POSITIONS = {"Lance_3B": 4096, "Lance_3B_Video": 31 * 4096}
SOURCE_BYTES = {"Lance_3B": 24_740_959_280, "Lance_3B_Video": 28_422_373_336}


def shapes(model: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of "Lance_3B" or "Lance_3B_Video"."""
    out: dict[str, tuple[int, ...]] = {
        "language_model.model.embed_tokens.weight": (VOCAB, HIDDEN), "language_model.lm_head.weight": (VOCAB, HIDDEN),
        "language_model.model.norm.weight": (HIDDEN,), "language_model.model.norm_moe_gen.weight": (HIDDEN,),
        "time_embedder.mlp.0.weight": (HIDDEN, 256), "time_embedder.mlp.0.bias": (HIDDEN,),
        "time_embedder.mlp.2.weight": (HIDDEN, HIDDEN), "time_embedder.mlp.2.bias": (HIDDEN,),
        "vae2llm.weight": (HIDDEN, 48), "vae2llm.bias": (HIDDEN,),
        "llm2vae.weight": (48, HIDDEN), "llm2vae.bias": (48,),
        "latent_pos_embed.pos_embed": (POSITIONS[model], HIDDEN),
    }
    for layer in range(LAYERS):
        out.update(_layer(f"{layout.LAYERS}.{layer}"))
    if model == "Lance_3B_Video":
        out.update(_vit())
    return out


def _layer(root: str) -> dict[str, tuple[int, ...]]:
    out: dict[str, tuple[int, ...]] = {}
    for suffix in ("", "_moe_gen"):
        for part, width in (("q", HIDDEN), ("k", KV), ("v", KV)):
            out[f"{root}.self_attn.{part}_proj{suffix}.weight"] = (width, HIDDEN)
            out[f"{root}.self_attn.{part}_proj{suffix}.bias"] = (width,)
        out[f"{root}.self_attn.o_proj{suffix}.weight"] = (HIDDEN, HIDDEN)
        out[f"{root}.self_attn.q_norm{suffix}.weight"] = out[f"{root}.self_attn.k_norm{suffix}.weight"] = (HEAD,)
        out[f"{root}.mlp{suffix}.gate_proj.weight"] = out[f"{root}.mlp{suffix}.up_proj.weight"] = (MLP, HIDDEN)
        out[f"{root}.mlp{suffix}.down_proj.weight"] = (HIDDEN, MLP)
        out[f"{root}.input_layernorm{suffix}.weight"] = (HIDDEN,)
        out[f"{root}.post_attention_layernorm{suffix}.weight"] = (HIDDEN,)
    return out


def _vit() -> dict[str, tuple[int, ...]]:
    out: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (1280, 3, 2, 14, 14), "merger.ln_q.weight": (1280,),
        "merger.mlp.0.weight": (5120, 5120), "merger.mlp.0.bias": (5120,),
        "merger.mlp.2.weight": (2048, 5120), "merger.mlp.2.bias": (2048,),
    }
    block = {"norm1.weight": (1280,), "norm2.weight": (1280,),
             "attn.qkv.weight": (3840, 1280), "attn.qkv.bias": (3840,),
             "attn.proj.weight": (1280, 1280), "attn.proj.bias": (1280,),
             "mlp.gate_proj.weight": (3420, 1280), "mlp.gate_proj.bias": (3420,),
             "mlp.up_proj.weight": (3420, 1280), "mlp.up_proj.bias": (3420,),
             "mlp.down_proj.weight": (1280, 3420), "mlp.down_proj.bias": (1280,)}
    out.update({f"blocks.{index}.{name}": shape for index in range(32) for name, shape in block.items()})
    return {layout.VIT_PREFIX + name: shape for name, shape in out.items()}


def write_headers_only(folder: Path, model: str) -> Path:
    """A sparse file that looks like the real model.safetensors to everything that reads headers."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes(model).items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path = folder / f"{model}.safetensors"
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def full_size(folder, codec, model):
    """A sparse packed folder with the headers of the real model; `codec` of formats."""
    linears = set(layout.linears(36))
    specs, per_weight = {}, {}
    for name, shape in shapes(model).items():
        linear = name.removesuffix(".weight")
        if name.endswith(".weight") and linear in linears:
            specs |= {f"{linear}.{suffix}": spec for suffix, spec in codec.specs(shape).items()}
            per_weight[name] = codec.entry(shape, "plain", None if codec.name == "int4" else 2.0**-10)
        else:
            specs[name] = TensorSpec(torch.bfloat16, shape)
    folder.mkdir()
    with contextlib.suppress(AssertionError), TensorFileWriter(folder / codec.state_file, specs):
        pass  # declared and never written: the header, and a hole
    (folder / codec.meta_file).write_text(json.dumps({**codec.header(), "per_weight": per_weight}))
    return folder


def configured(folder):
    """Give the llm_config.json of a small model the sizes of the real one."""
    config = json.loads((folder / "llm_config.json").read_text())
    config |= {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HIDDEN // HEAD,
               "num_key_value_heads": KV // HEAD, "intermediate_size": MLP, "vocab_size": VOCAB,
               "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    (folder / "llm_config.json").write_text(json.dumps(config))
