"""The names in a Lance checkpoint: the 14 quantizable linears of a layer, their norms, experts and fusion groups.

The only place where they are spelled. Every layer holds two experts: `und` (text and ViT tokens, plain names) and
`gen` (VAE latent tokens, `_moe_gen` names). Attention linears carry the suffix themselves (`q_proj_moe_gen`), MLP
linears on their parent (`mlp_moe_gen.gate_proj`). Pure data, no torch.
"""

import re
from collections.abc import Collection, Mapping
from typing import Literal, NamedTuple

from lance_quant.errors import InputError

Expert = Literal["und", "gen"]
EXPERTS: tuple[Expert, ...] = ("und", "gen")
LLM_PREFIX = "language_model."
LAYERS = "language_model.model.layers"
VIT_PREFIX = "vit_model."
# In the file, never used: the model recomputes this fixed sinusoid (the official loader drops the tensor too).
IGNORED = "latent_pos_embed.pos_embed"

SUFFIX: dict[Expert, str] = {"und": "", "gen": "_moe_gen"}
_LAYER = re.compile(rf"^{re.escape(LAYERS)}\.(\d+)\.")


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
    if found != set(range(max(found) + 1)):
        gap = min(set(range(max(found) + 1)) - found)
        raise InputError(f"decoder layer {gap} is missing from this checkpoint (layers go up to {max(found)})")
    return len(found)


def require_linears(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Check that every layer has its 14 linears (2-D) and 4 norms (1-D, of matching width); return the layer count.

    Raises:
        InputError: naming the first five that are missing or have a wrong shape.
    """
    count = num_layers(shapes)
    expected = [group for layer in range(count) for group in groups(layer)]
    missing = [f"{name}.weight" for group in expected
               for name in (*group.linears, *([group.norm] if group.norm else []))
               if f"{name}.weight" not in shapes]
    if missing:
        raise InputError(f"{len(missing)} tensors are missing from this checkpoint, first {missing[:5]}")
    wrong = [f"{name}.weight {list(shapes[f'{name}.weight'])}" for group in expected for name in group.linears
             if not _fits(shapes, group, name)]
    if wrong:
        raise InputError(f"{len(wrong)} linears have a shape that does not fit their layer, first {wrong[:5]}")
    return count


def _fits(shapes: Mapping[str, tuple[int, ...]], group: Group, linear: str) -> bool:
    shape = shapes[f"{linear}.weight"]
    if len(shape) != 2:
        return False
    bias = shapes.get(f"{linear}.bias")
    width = shapes[f"{group.linears[0]}.weight"][-1] if group.norm is None else shapes[f"{group.norm}.weight"][0]
    return shape[1] == width and bias in (None, (shape[0],))
