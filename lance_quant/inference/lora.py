"""LoRA on a loaded model, float or packed: a low-rank branch beside a linear, whose weights stay as they are.

    y = W x + strength * B (A x)

A packed linear reads other channels than the float one (AWQ moved scales), so A's columns and B's rows are scaled as
the conversion says (formats/channel_scales.py), once, when the LoRA is put on. Merged projections get one branch for
all of their parts. Several LoRAs add up.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lance_quant.errors import InputError
from lance_quant.formats import channel_scales, layout, lora_file
from lance_quant.formats.lora_file import Factors, LoraUse
from lance_quant.formats.packed_folder import PackedFolder
from lance_quant.lance.mot import Lance
from lance_quant.storage.tensor_file import Checkpoint

_PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

def linears_of(model: Lance) -> dict[str, tuple[int, int]]:
    """[out, in] of the linears that a LoRA may be for, by their names in a checkpoint; of merged ones their parts."""
    return {part: (len(rows), _width(module, "in_features")) for name, module in model.named_modules()
            for part, rows in _parts_of(name, module, model).items()}


def attach(model: Lance, loras: Sequence[LoraUse], scales: Mapping[str, Tensor] | None = None) -> int:
    """Put LoRAs on a model, before its steps are compiled or its layers streamed.

    Args:
        scales: [in] or [out], what the conversion of a packed model moved (channel_scales.py); None or empty: nothing.

    Returns:
        How many linears have a branch.

    Raises:
        InputError: a file is no LoRA, or for another model.
    """
    if not loras:
        return 0
    shapes, total = linears_of(model), dict[str, list[Factors]]()
    for use in loras:
        for linear, found in lora_file.taken(use, shapes).items():
            total.setdefault(linear, []).append(found)
    count = 0
    for name, module in list(model.named_modules()):
        parts = {part: rows for part, rows in _parts_of(name, module, model).items() if part in total}
        if parts:
            _branch(module, parts, total, scales or {}, model.dtype)
            count += len(parts)
    return count


def _parts_of(name: str, module: nn.Module, model: Lance) -> dict[str, range]:
    """Rows of a linear by the names of its parts in a checkpoint: itself, or what was merged into it."""
    if not hasattr(module, "in_features") or not hasattr(module, "out_features"):
        return {}
    owner, _, last = name.rpartition(".")
    kind = last.removesuffix("_moe_gen")
    if kind not in _PARTS:
        return {name: range(_width(module, "out_features"))}
    config = model.config
    values = config.num_key_value_heads * config.head_dim
    sizes = (config.hidden_size, values, values) if kind == "qkv_proj" else (config.intermediate_size,) * 2
    found, start = {}, 0
    for part, size in zip(_PARTS[kind], sizes, strict=True):
        found[f"{owner}.{part}{last.removeprefix(kind)}"] = range(start, start + size)
        start += size
    return found


def _width(module: nn.Module, side: str) -> int:
    """in_features or out_features, which packed linears have as well."""
    width: int = getattr(module, side)
    return width


def _branch(module: nn.Module, parts: Mapping[str, range], total: Mapping[str, Sequence[Factors]],
            scales: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Give a linear its branch: A [ranks, in] of all parts one under the other, B [out, ranks] with 0 between them."""
    tensor = next(iter([*module.parameters(), *module.buffers()]))
    a = torch.cat([_down(linear, one, scales) for linear in parts for one in total[linear]])
    b = torch.zeros(_width(module, "out_features"), len(a))
    at = 0
    for linear, rows in parts.items():
        for one in total[linear]:
            row = channel_scales.row_of(linear, scales)
            rank = one.b.shape[1]
            b[rows.start:rows.stop, at:at + rank] = one.b if row is None else one.b / row[:, None]
            at += rank
    module.register_buffer("lora_a", a.to(tensor.device, dtype), persistent=False)
    module.register_buffer("lora_b", b.to(tensor.device, dtype), persistent=False)
    module.register_forward_hook(_add)


def _down(linear: str, one: Factors, scales: Mapping[str, Tensor]) -> Tensor:
    column = channel_scales.column_of(linear, scales)
    return one.a if column is None else one.a * column


def _add(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
    """The hook: what the linear gives, and the branch."""
    return y + F.linear(F.linear(args[0], module.lora_a), module.lora_b)  # type: ignore[arg-type] # buffers


def scales_of(packed: PackedFolder, model: Path) -> dict[str, Tensor]:
    """What the conversion of a packed folder moved, [in] or [out] by name; of published folders, from the float weights
    in `model`.

    Raises:
        InputError: the folder does not say, and it cannot be told from the float weights.
    """
    found = channel_scales.load(packed.path)
    if found is not None:
        return found
    if packed.meta.get("recipe", "published") != "published":
        raise InputError(f"{packed.path} was packed before LoRA could go on it: it has no {channel_scales.FILE}; pack "
                         "it again, which gives the same weights and this file beside them")
    try:
        source = Checkpoint(model)
    except InputError:
        raise InputError(f"{packed.path} does not say by what its norms were divided, and {model} has no float weights "
                         "to tell it from: give --model_path with the float model, or pack the folder again") from None
    with source:
        return _from_norms(source, packed.checkpoint)


def _from_norms(source: Checkpoint, packed: Checkpoint) -> dict[str, Tensor]:
    scales: dict[str, Tensor] = {}
    for index in range(layout.num_layers(source.specs)):
        names = [f"{group.norm}.weight" for group in layout.groups(index) if group.norm is not None]
        before, after = ({name: one.read(name, torch.float32) for name in names if name in one.specs}
                         for one in (source, packed))
        scales |= channel_scales.norm_columns(before, after, index)
    return scales


