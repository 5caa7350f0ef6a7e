"""LoRA files (low-rank adaptation, arXiv:2106.09685) in the forms that trainers write, as pairs of factors by linear.

    PEFT      base_model.model.LINEAR.lora_A.weight, .lora_B.weight, adapter_config.json beside the file
    ComfyUI   diffusion_model.LINEAR.lora_A.weight or .lora_down.weight, .lora_up.weight, LINEAR.alpha
    kohya     lora_unet_LINEAR_WITH_UNDERSCORES.lora_down.weight, .lora_up.weight, .alpha

LINEAR is the module's name in a Lance checkpoint, with or without "_moe_gen". What is added to a linear is
scale * B A, scale = alpha / rank (alpha / sqrt(rank) for rank-stabilised LoRA, arXiv:2312.03732).
"""

import logging
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, float32

from lance_quant.errors import InputError
from lance_quant.formats import layout
from lance_quant.storage.schema import Positive, Schema, Size, read
from lance_quant.storage.tensor_file import TensorFile, require_finite

log = logging.getLogger("lance_quant")

_STRONGEST = 100.0
_FACTORS = {"lora_A": "A", "lora_B": "B", "lora_down": "A", "lora_up": "B", "alpha": "alpha"}
_PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.", "model.diffusion_model.", "lora_unet_",
             "lora_transformer_", "lora_te_", "lycoris_")
_OTHERS = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_w1_a": "LoHa", "hada_w1_b": "LoHa",
           "lokr_w1": "LoKr", "lokr_w1_a": "LoKr", "lokr_w2": "LoKr", "lora_mid": "a convolution's LoRA (lora_mid)",
           "lora_embedding_A": "LoRA of an embedding", "diff": "a full difference (diff)",
           "diff_b": "a difference of biases (diff_b)", "oft_blocks": "OFT", "a1.weight": "GLoRA"}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class _Config(Schema):
    """adapter_config.json of PEFT, as far as it decides what is added."""

    peft_type: Literal["LORA"] = "LORA"
    r: Size
    lora_alpha: Positive
    use_rslora: bool = False
    use_dora: Literal[False] = False
    fan_in_fan_out: Literal[False] = False
    bias: Literal["none"] = "none"
    modules_to_save: Annotated[list[str], Field(max_length=0)] | None = None
    rank_pattern: dict[str, Size] | None = None
    alpha_pattern: dict[str, Positive] | None = None


@dataclass(frozen=True)
class LoraUse:
    """A LoRA and how strongly it is taken, per expert; 0 leaves an expert alone.

    Raises:
        InputError: a strength that is no number from -100 to 100.
    """

    path: Path
    und: float = 1.0
    gen: float = 1.0

    def __post_init__(self) -> None:
        for name in ("und", "gen"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) \
                    or abs(value) > _STRONGEST:
                raise InputError(f"LoRA strength {name} {value!r} must be a number from -100 to 100")

    def strength(self, linear: str) -> float:
        """Of a linear: that of its expert; latents go in and out with the generation expert."""
        return self.gen if layout.expert_of(linear) == "gen" or linear.startswith(layout.LATENT_INTERFACE) else self.und

    def as_json(self) -> dict[str, Any]:
        """For run.json."""
        return {"path": str(self.path), "und": self.und, "gen": self.gen}


def parse(text: str) -> LoraUse:
    """FILE, FILE:0.8 or FILE:und=0.8,gen=0.5; colons of Windows drives belong to the file.

    Raises:
        InputError: a strength out of range.
    """
    path, colon, tail = text.rpartition(":")
    strengths = _strengths(tail) if colon and path else None
    return LoraUse(Path(text)) if strengths is None else LoraUse(Path(path), **strengths)


def _strengths(text: str) -> dict[str, float] | None:
    """Strength by expert; None where a text is none, but belongs to the file's name."""
    fields = [field.partition("=") for field in text.split(",")]
    try:
        if len(fields) == 1 and not fields[0][1]:
            return {"und": float(text), "gen": float(text)}
        if all(name.strip() in ("und", "gen") for name, _, _ in fields):
            return {"und": 0.0, "gen": 0.0} | {name.strip(): float(value) for name, _, value in fields}
    except ValueError:
        pass
    return None


@dataclass(frozen=True)
class Factors:
    """What is added to a linear: B A, scale included. a: float32 [rank, in]; b: float32 [out, rank]."""

    a: Tensor
    b: Tensor


def load(path: Path, linears: Mapping[str, tuple[int, int]]) -> tuple[dict[str, Factors], list[str]]:
    """Read a LoRA.

    Args:
        path: a safetensors file, or a folder of PEFT.
        linears: [out, in] of the linears that it may be for, by name.

    Returns:
        Factors by linear, and the keys that name no linear of the model.

    Raises:
        InputError: another kind of adapter, no key of which fits, shapes that do not fit, or NaN.
    """
    file, config = _files(Path(path))
    parts: dict[str, dict[str, Tensor]] = {}
    unknown = []
    with TensorFile(file) as opened:
        for key in opened.specs:
            _require_lora(key, file)
            linear, part = _split(key, linears)
            if linear is None or part is None:
                unknown.append(key)
                continue
            value = opened.read(key, float32)
            require_finite(value, f"{file}: {key}")
            if part in parts.setdefault(linear, {}):
                raise InputError(f"{file}: {key} is the second {part} of {linear}: the file mixes two forms")
            parts[linear][part] = value
    if not parts:
        raise InputError(f"{file} is for another model: none of its {len(unknown)} keys names a linear of this one, "
                         f"first {unknown[:3]}")
    return {linear: _factors(linear, found, linears[linear], config, file) for linear, found in parts.items()}, unknown


def taken(use: LoraUse, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Factors]:
    """The factors of a LoRA by linear, its strength in B; linears of strength 0 are left out. See `load`.

    Args:
        shapes: [out, in] of the linears that it may be for.
    """
    factors, unknown = load(use.path, shapes)
    if unknown:
        log.warning("%s: %d of its keys name no linear of this model and are left out, first %s", use.path,
                    len(unknown), ", ".join(unknown[:3]))
    found = {linear: Factors(one.a, one.b * use.strength(linear)) for linear, one in factors.items()
             if use.strength(linear)}
    if not found:
        log.warning("%s: its strength is 0 for all linears that it is for: it changes nothing", use.path)
    return found


def _files(path: Path) -> tuple[Path, _Config | None]:
    if path.is_dir():
        return path / WEIGHTS, read(_Config, path / CONFIG, "LoRA configuration", "only plain LoRA is supported")
    if not path.is_file():
        raise InputError(f"LoRA not found: {path}")
    beside = path.parent / CONFIG
    if path.name == WEIGHTS and beside.is_file():
        return path, read(_Config, beside, "LoRA configuration", "only plain LoRA is supported")
    return path, None


def _require_lora(key: str, file: Path) -> None:
    last = key.rsplit(".", 1)[-1]
    for mark, kind in _OTHERS.items():
        if last == mark or f".{mark}." in f"{key}.":
            raise InputError(f"{file} holds {kind} ({key[:120]}), and only plain LoRA is supported: merge it into the "
                             "float model with its own tool")


def _split(key: str, linears: Collection[str]) -> tuple[str | None, str | None]:
    """The linear and the part ("A", "B", "alpha") that a key names; None where there is none."""
    found = re.fullmatch(r"(.*)\.(lora_A|lora_B|lora_down|lora_up|alpha)(\.default)?(\.weight)?", key)
    if found is None:
        return None, None
    name = found[1]
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    if name in linears:
        return name, _FACTORS[found[2]]
    flat = _flat(name)
    match = [linear for linear in linears if _flat(linear) == flat]
    return (match[0] if len(match) == 1 else None), _FACTORS[found[2]]


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _factors(linear: str, parts: Mapping[str, Tensor], shape: tuple[int, int], config: _Config | None,
             file: Path) -> Factors:
    if not {"A", "B"} <= parts.keys():
        raise InputError(f"{file}: {linear} has no lora_{'A' if 'A' not in parts else 'B'}: the file is incomplete")
    a, b = parts["A"], parts["B"]
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != shape or not a.shape[0]:
        raise InputError(f"{file}: {linear} is {list(shape)}, and its factors are {list(b.shape)} and {list(a.shape)}: "
                         "the LoRA is for another model")
    return Factors(a, b * _scale(linear, a.shape[0], parts.get("alpha"), config))


def _scale(linear: str, rank: int, alpha: Tensor | None, config: _Config | None) -> float:
    if alpha is not None:
        return float(alpha.reshape(-1)[0]) / rank
    if config is None:
        return 1.0
    given = next((value for pattern, value in (config.alpha_pattern or {}).items() if _fits(pattern, linear)),
                 config.lora_alpha)
    return given / (math.sqrt(rank) if config.use_rslora else rank)


def _fits(pattern: str, linear: str) -> bool:
    """As PEFT matches its patterns: the end of a module's name, behind a dot."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", linear) is not None
    except re.error:
        raise InputError(f"LoRA configuration: pattern {pattern[:80]!r} is no regular expression") from None
