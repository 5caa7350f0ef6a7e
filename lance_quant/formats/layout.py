"""Tensor names of a Lance checkpoint: the 14 quantizable linears of a layer, their norms, experts and fusion groups.

The only place where they are spelled. Every layer holds two experts: `und` (text and ViT tokens, plain names) and
`gen` (VAE latent tokens, `_moe_gen` names). Attention linears carry the suffix themselves (`q_proj_moe_gen`), MLP
linears on their parent (`mlp_moe_gen.gate_proj`). Pure data, no torch.
"""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Literal, NamedTuple

from lance_quant.errors import InputError

Expert = Literal["und", "gen"]
EXPERTS: tuple[Expert, ...] = ("und", "gen")
LLM_PREFIX = "language_model."
LAYERS = "language_model.model.layers"
VIT_PREFIX = "vit_model."
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VOCABULARY = ("language_model.model.embed_tokens", "language_model.lm_head")  # one row per token
# In the file, never used: the model recomputes this fixed sinusoid (the official loader drops the tensor too).
IGNORED = "latent_pos_embed.pos_embed"

SUFFIX: dict[Expert, str] = {"und": "", "gen": "_moe_gen"}
LATENT_INTERFACE = ("vae2llm.", "llm2vae.", "time_embedder.")  # what generation needs beside the decoder
_LAYER = re.compile(rf"^{re.escape(LAYERS)}\.(\d{{1,9}})\.")


class Group(NamedTuple):
    """Linears of one layer and expert that read the same activation.

    name: e.g. "layers.7.attn_in.gen"; place is attn_in, attn_out, mlp_in or mlp_out.
    norm: the RMSNorm whose weight absorbs a per-channel scale, or None where no norm precedes.
    linears: module names, without ".weight".
    """

    layer: int
    place: str
    expert: Expert
    norm: str | None
    linears: tuple[str, ...]

    @property
    def name(self) -> str:
        """E.g. layers.7.attn_in.gen."""
        return f"layers.{self.layer}.{self.place}.{self.expert}"


def groups(layer: int) -> list[Group]:
    """The eight groups of a layer, in the order in which they are quantized (norm-fed ones first)."""
    return [_group(layer, place, expert) for place in ("attn_in", "mlp_in", "attn_out", "mlp_out")
            for expert in EXPERTS]


def _group(layer: int, place: str, expert: Expert) -> Group:
    root, suffix = f"{LAYERS}.{layer}", SUFFIX[expert]
    norm = {"attn_in": f"{root}.input_layernorm{suffix}",
            "mlp_in": f"{root}.post_attention_layernorm{suffix}"}.get(place)
    parts = {"attn_in": ("q_proj", "k_proj", "v_proj"), "attn_out": ("o_proj",),
             "mlp_in": ("gate_proj", "up_proj"), "mlp_out": ("down_proj",)}[place]
    if place.startswith("attn"):
        linears = tuple(f"{root}.self_attn.{part}{suffix}" for part in parts)
    else:
        linears = tuple(f"{root}.mlp{suffix}.{part}" for part in parts)
    return Group(layer, place, expert, norm, linears)


def linear(layer: int, expert: Expert, kind: str) -> str:
    """Module name of one linear, by its kind, one of KINDS."""
    return next(name for group in groups(layer) if group.expert == expert
                for name in group.linears if kind_of(name) == kind)


def head_norm(layer: int, expert: Expert) -> str:
    """The RMSNorm of the queries; its width is the head width."""
    return f"{LAYERS}.{layer}.self_attn.q_norm{SUFFIX[expert]}"


def of_layer(names: Collection[str], layer: int) -> list[str]:
    """Those of some tensor names that belong to one decoder layer."""
    return [name for name in names if name.startswith(f"{LAYERS}.{layer}.")]


def linears(num_layers: int) -> list[str]:
    """Module names of all quantizable linears: 14 per layer, 504 in the real model."""
    return [name for layer in range(num_layers) for group in groups(layer) for name in group.linears]


def expert_of(linear: str) -> Expert:
    """Which expert a quantizable linear belongs to."""
    return "gen" if "_moe_gen" in linear else "und"


def kind_of(linear: str) -> str:
    """Its kind without layer and expert: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj or down_proj."""
    return linear.rsplit(".", 1)[-1].removesuffix("_moe_gen")


def num_layers(names: Collection[str]) -> int:
    """Number of decoder layers in a checkpoint, by its tensor names.

    Raises:
        InputError: there is no layer, or the numbering has a gap.
    """
    found = {int(match[1]) for match in map(_LAYER.match, names) if match}
    if not found:
        raise InputError(f"no Lance decoder in this checkpoint: no tensor is named {LAYERS}.N.*")
    if max(found) + 1 > len(found):
        gap = next(number for number in range(len(found) + 1) if number not in found)
        raise InputError(f"decoder layer {gap} is missing from this checkpoint (layers go up to {max(found)})")
    return len(found)


def require_complete(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Check that these are the tensors of a float Lance checkpoint, all of them and no others; return the layer count.

    Sizes are taken from a few tensors and every other one must agree with them. A ViT (`vit_model.*`) and the ignored
    position table may be there or not, and a fine-tune for understanding alone may lack LATENT_INTERFACE.

    Raises:
        InputError: naming the first five that are missing, unexpected or of a wrong shape.
    """
    count = num_layers(shapes)
    expected = _table(count, shapes)
    if understands_only(shapes):
        expected = {name: shape for name, shape in expected.items() if not name.startswith(LATENT_INTERFACE)}
    found = {name for name in shapes if name != IGNORED and not name.startswith(VIT_PREFIX)}
    for word, names in (("missing from", expected.keys() - found), ("unknown in", found - expected.keys())):
        if names:
            raise InputError(f"{len(names)} tensors are {word} this checkpoint, first {sorted(names)[:5]}")
    wrong = [f"{name} {list(shapes[name])} instead of {list(shape)}" for name, shape in expected.items()
             if shapes[name] != shape]
    if wrong:
        raise InputError(f"{len(wrong)} tensors have a shape that does not fit the others, first {wrong[:5]}")
    return count


def understands_only(names: Collection[str]) -> bool:
    """Whether a checkpoint has nothing of LATENT_INTERFACE, without which no latents go in or out."""
    return not any(name.startswith(LATENT_INTERFACE) for name in names)


def _table(count: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the language model and its latent interface, with the shape that the sizes in `shapes` imply."""
    def size(name: str, axis: int = 0) -> int:
        return shapes[name][axis] if len(shapes.get(name, ())) > axis else -1

    hidden, words = size("language_model.model.norm.weight"), size("language_model.model.embed_tokens.weight")
    waves, channels = size("time_embedder.mlp.0.weight", 1), size("llm2vae.weight")
    table = {"language_model.model.embed_tokens.weight": (words, hidden),
             "language_model.lm_head.weight": (words, hidden),
             **{f"language_model.model.norm{suffix}.weight": (hidden,) for suffix in SUFFIX.values()},
             "vae2llm.weight": (hidden, channels), "vae2llm.bias": (hidden,),
             "llm2vae.weight": (channels, hidden), "llm2vae.bias": (channels,),
             "time_embedder.mlp.0.weight": (hidden, waves), "time_embedder.mlp.0.bias": (hidden,),
             "time_embedder.mlp.2.weight": (hidden, hidden), "time_embedder.mlp.2.bias": (hidden,)}
    for layer in range(count):
        for expert in EXPERTS:
            table |= _layer_table(layer, expert, hidden, size)
    return table


def _layer_table(layer: int, expert: Expert, hidden: int, size: Callable[..., int]) -> dict[str, tuple[int, ...]]:
    """The tensors of one expert in one layer; both experts must have the sizes of layer 0's understanding expert."""
    queries, values = (size(f"{linear(0, 'und', kind)}.weight") for kind in ("q_proj", "v_proj"))
    inner, head = size(f"{linear(0, 'und', 'up_proj')}.weight"), size(f"{head_norm(0, 'und')}.weight")
    rows = {"q_proj": (queries, hidden), "k_proj": (values, hidden), "v_proj": (values, hidden),
            "o_proj": (hidden, queries), "gate_proj": (inner, hidden), "up_proj": (inner, hidden),
            "down_proj": (hidden, inner)}
    table: dict[str, tuple[int, ...]] = {}
    for kind, shape in rows.items():
        name = linear(layer, expert, kind)
        table[f"{name}.weight"] = shape
        if kind in ("q_proj", "k_proj", "v_proj"):
            table[f"{name}.bias"] = shape[:1]
    table |= {f"{group.norm}.weight": (hidden,) for group in groups(layer) if group.expert == expert and group.norm}
    queries_norm = head_norm(layer, expert)
    return table | {f"{name}.weight": (head,) for name in (queries_norm, queries_norm.replace(".q_norm", ".k_norm"))}
