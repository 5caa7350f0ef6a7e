"""Rescaling an extracted understanding path for the rounding of MLX's formats, without changing what it computes.

The scales that lance_quant.awq searches for, between norm and q/k/v, norm and gate/up, v and o, up and down, are found
with MLX's own quantizer and folded into the float tensors; the file stays an ordinary MLX file. Alone in the
understanding path all four are free: no other expert shares the cache.

NVFP4 in MLX has no scale per tensor, and the block scales of a trained layer (about 0.005) fall among E4M3's
subnormals, or vanish. Powers of two move there for nothing: norms are divided by 2^k and the linears behind them
multiplied, so that the largest block scale is near 2^8; before that o and down take 2^j from v and up.

Shape suffixes: o out, i in.
"""

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apple.decoder import DecoderConfig
from apple.mlx_codes import Format, fake_quant_io, quantize_fitted
from lance_quant import awq, fuse, layout
from lance_quant.stats import ActStats
from lance_quant.tensorfile import Checkpoint

log = logging.getLogger("lance_quant")

_ROWS = 4096  # rows per call of the fit: bounds its temporaries at the embedding and the head
_NORM_FED, _FED = 8, 0  # log2 of the largest block scale aimed at, behind a norm and behind a linear


class MlxCodec:
    """What lance_quant.awq must know of a format to search scales for it."""

    def __init__(self, fmt: Format):
        self.fmt = fmt

    def context(self, amax: float) -> None:
        """Nothing is shared between weights."""

    def fake_quant_io(self, w_io: Tensor, context: None) -> Tensor:
        """MLX's rounding of a transposed float32 weight: [in, out] -> [in, out]."""
        return fake_quant_io(w_io, self.fmt)


def fitted_tensors(source: Checkpoint, folder: Path, fmt: Format, stats: ActStats,
                   fingerprint: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the MLX file, layer by layer, scales folded and grids fitted.

    Args:
        source: the extracted folder's tensors; their dtype is that of scales, norms and biases.
        fingerprint: of the Lance checkpoint that was extracted.

    Raises:
        InputError: statistics of another model.
    """
    config = DecoderConfig.load(folder)
    _require_model(source, stats, fingerprint, config.num_hidden_layers)
    dtype = source.specs["model.norm.weight"].dtype
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        tensors = {name: source.read(name, torch.float32) for name in source.specs if name.startswith(prefix)}
        squares = {name.removeprefix(layout.LLM_PREFIX): entry.mean_square for name, entry in stats.linears.items()
                   if name.startswith(layout.LLM_PREFIX + prefix) and layout.expert_of(name) == "und"}
        labels = fold_layer(tensors, squares, index, fmt, config)
        log.info("layer %-3d %s", index, "  ".join(labels))
        yield from _packed(tensors, squares, fmt, dtype)
    ends = {name: source.read(name) for name in source.specs if not name.startswith("model.layers.")}
    if fmt.mode == "nvfp4" and "lm_head.weight" in ends:  # a tied head cannot be scaled apart from the embedding
        _shift_norm_fed(ends, "model.norm", ["lm_head"])
    yield from _packed(ends, {}, fmt, dtype)


def _require_model(source: Checkpoint, stats: ActStats, fingerprint: str, layers: int) -> None:
    widths = {}
    for name in layout.linears(layers):  # both experts have the same widths, and only one is here
        here = name.removeprefix(layout.LLM_PREFIX).replace(layout.SUFFIX["gen"], "")
        widths[name] = source.specs[f"{here}.weight"].shape[1]
    stats.require_model(fingerprint, widths)


def fold_layer(tensors: dict[str, Tensor], squares: dict[str, Tensor], index: int, fmt: Format,
               config: DecoderConfig) -> list[str]:
    """Fold the best scales of one layer into its tensors, in place.

    Args:
        tensors: name in the extracted folder -> float32 tensor, all of the layer.
        squares: linear -> mean square [in] of its input; divided by the scale's square where one is folded.

    Returns:
        One label per group, for the log.
    """
    groups = {group.place: group for group in layout.groups(index) if group.expert == "und"}
    names = {place: [name.removeprefix(layout.LLM_PREFIX) for name in group.linears] for place, group in groups.items()}
    norms = {place: groups[place].norm.removeprefix(layout.LLM_PREFIX) for place in ("attn_in", "mlp_in")}
    (o,), (down,), v, up = names["attn_out"], names["mlp_out"], names["attn_in"][2], names["mlp_in"][1]
    if fmt.mode == "nvfp4":
        for behind, before in ((o, v), (down, up)):
            _shift_fed(tensors, behind, before)
        for place in norms:
            _shift_norm_fed(tensors, norms[place], names[place])
    heads = fuse.Heads(config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads,
                       config.head_dim)
    labels = [_fold_fed(tensors, squares, o, v, MlxCodec(fmt), heads),
              _fold_fed(tensors, squares, down, up, MlxCodec(fmt), None)]
    return labels + [_fold_norm(tensors, squares, norms[place], names[place], MlxCodec(fmt)) for place in norms]


def _fold_fed(tensors: dict[str, Tensor], squares: dict[str, Tensor], behind: str, before: str, codec: Any,
              heads: fuse.Heads | None) -> str:
    if behind not in squares:
        return "no statistics"
    found = awq.search_fed([tensors[f"{behind}.weight"]], [squares[behind]], codec, heads)
    fuse.divide_rows(tensors[f"{before}.weight"], tensors.get(f"{before}.bias"), found.s)
    fuse.multiply_columns(tensors[f"{behind}.weight"], found.columns)
    squares[behind] = squares[behind] / found.columns**2
    return found.label


def _fold_norm(tensors: dict[str, Tensor], squares: dict[str, Tensor], norm: str, linears: list[str],
               codec: Any) -> str:
    if linears[0] not in squares:
        return "no statistics"
    weights = [tensors[f"{name}.weight"] for name in linears]
    choice = awq.search(weights, tensors[f"{norm}.weight"], squares[linears[0]], codec)
    tensors[f"{norm}.weight"] = choice.folded.norm.float()
    for name, w in zip(linears, weights, strict=True):
        fuse.multiply_columns(w, choice.folded.column)
        squares[name] = squares[name] / choice.folded.column**2
    return choice.label


def _exponent(weights: list[Tensor], target: int) -> int:
    """k such that the largest block scale of 2^k w is in (2^(target-1), 2^target]."""
    largest = max(float(w.abs().amax()) for w in weights) / 6
    return target - math.ceil(math.log2(largest)) if largest else 0


def _shift_norm_fed(tensors: dict[str, Tensor], norm: str, linears: list[str]) -> None:
    factor = 2.0 ** _exponent([tensors[f"{name}.weight"] for name in linears], _NORM_FED)
    tensors[f"{norm}.weight"].div_(factor)
    for name in linears:
        tensors[f"{name}.weight"].mul_(factor)


def _shift_fed(tensors: dict[str, Tensor], behind: str, before: str) -> None:
    factor = 2.0 ** _exponent([tensors[f"{behind}.weight"]], _FED)
    tensors[f"{behind}.weight"].mul_(factor)
    for part in ("weight", "bias"):
        if f"{before}.{part}" in tensors:
            tensors[f"{before}.{part}"].div_(factor)


def _packed(tensors: dict[str, Tensor], squares: dict[str, Tensor], fmt: Format,
            dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or tensor.shape[1] % fmt.group_size:
            yield name, tensor.to(dtype)
            continue
        linear = name.removesuffix(".weight")
        known = squares.get(linear)
        importance = torch.ones(tensor.shape[1]) if known is None else awq.importance(known)
        parts = [quantize_fitted(tensor[row:row + _ROWS], fmt, importance, dtype)
                 for row in range(0, tensor.shape[0], _ROWS)]
        for suffix in parts[0]:
            yield f"{linear}.{suffix}", torch.cat([part[suffix] for part in parts])
