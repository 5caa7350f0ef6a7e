"""Fused projections: q/k/v and gate/up as one matmul each, for models that only run.

Linears that read the same input are laid one under the other after loading: fewer and larger matmuls, the same bytes.
Afterwards the separate linears are gone, and with them the names that calibration, captures and packed folders go by,
so this is the last thing done to a model.
"""

from collections.abc import Sequence

import torch
from torch import nn

from lance_quant.formats.layout import SUFFIX
from lance_quant.lance.mot import Lance


def merge_projections(model: Lance) -> int:
    """Merge what can be merged, group by group, so that memory rises by one group's weights only; number of groups.

    A group stays as it is where its linears are of different kinds (one of them packed, say).
    """
    count = 0
    for layer in model.layers():
        for suffix in SUFFIX.values():
            attention, mlp = layer.self_attn, getattr(layer, f"mlp{suffix}")
            count += _merge(attention, [f"{part}_proj{suffix}" for part in "qkv"], f"qkv_proj{suffix}")
            count += _merge(mlp, ["gate_proj", "up_proj"], "gate_up_proj")
    return count


def _merge(owner: nn.Module, names: Sequence[str], merged: str) -> bool:
    linears = [getattr(owner, name) for name in names]
    whole = stacked(linears)
    if whole is None:
        return False
    for name in names:
        delattr(owner, name)
    owner.add_module(merged, whole)
    return True


def stacked(linears: Sequence[nn.Module]) -> nn.Module | None:
    """One linear whose outputs are those of all, in order; None where they are of different kinds.

    Linears that are no nn.Linear say themselves whether and how they can be stacked, in a class method
    `stacked` of the same meaning.
    """
    kinds = {type(linear) for linear in linears}
    if len(kinds) > 1 or len({linear.bias is None for linear in linears}) > 1:
        return None
    (kind,) = kinds
    if not issubclass(kind, nn.Linear):
        return kind.stacked(linears) if hasattr(kind, "stacked") else None
    parts = [linear for linear in linears if isinstance(linear, nn.Linear)]
    whole = kind(parts[0].in_features, sum(part.out_features for part in parts), parts[0].bias is not None,
                 device="meta")
    for name, _ in list(whole.named_parameters()):
        rows = torch.cat([getattr(part, name).detach() for part in parts])
        setattr(whole, name, nn.Parameter(rows, requires_grad=False))
    return whole
