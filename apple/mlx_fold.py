"""An extracted understanding path rounded for the activations that occur, into MLX's formats.

lance_quant's recipe (methods/layer.py) with MLX's formats: scales are searched and folded between norm and q/k/v, norm
and gate/up, v and o, up and down, and every linear is rounded to grids fitted to its inputs, with GPTQ where layer
inputs were captured. The head, which is 4 bits in MLX too, is treated in the same way behind the final norm; the
embedding has no inputs and gets fitted grids. What comes out is an ordinary MLX file.

NVFP4 in MLX has no scale per tensor, and the block scales of a trained layer (about 0.005) fall among E4M3's
subnormals, or vanish. Powers of two move there for nothing: norms are divided by 2^k and the linears behind them
multiplied, so that the largest block scale is near 2^8; before that o and down take 2^j from v and up.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apple.decoder import DecoderConfig
from apple.mlx_codec import MlxCodec
from apple.mlx_codes import Format
from lance_quant.calibration import capture, gram, token_weights
from lance_quant.calibration.activation_stats import ActStats
from lance_quant.calibration.decoder_calls import DecoderCall
from lance_quant.calibration.gradients import norm_around
from lance_quant.calibration.layer_inputs import LayerInputs
from lance_quant.calibration.token_weights import TokenWeights
from lance_quant.errors import InputError
from lance_quant.formats import layout
from lance_quant.formats.blocks import quantize_searched
from lance_quant.formats.weights import Weights
from lance_quant.methods import awq, fuse, gptq, layer
from lance_quant.storage.tensor_file import Checkpoint

log = logging.getLogger("lance_quant")

EMBEDDING, HEAD, NORM = "model.embed_tokens", "lm_head", "model.norm"
_ROWS = 8192  # of embedding and head at once: bounds their temporaries
_NORM_FED, _FED = 8, 0  # log2 of the largest block scale aimed at, behind a norm and behind a linear


@dataclass(frozen=True)
class Calibration:
    """What is known of the activations, of the model with some fingerprint.

    layer_inputs: layer inputs for GPTQ; None rounds to the nearest level of fitted grids
    """

    stats: ActStats
    fingerprint: str
    layer_inputs: LayerInputs | None = None

    @classmethod
    def load(cls, stats: Path, captures: Sequence[Path], fingerprint: str, source: Checkpoint,
             device: torch.device) -> "Calibration":
        """Read the files. InputError if they are another model's, or hold nothing that this path computes alone.

        Args:
            source: the extracted folder's tensors; must stay open.
        """
        measured = ActStats.load(stats)
        if not captures:
            return cls(measured, fingerprint)
        config, calls, facts = capture.load_all(captures, fingerprint)
        alone = understanding_only(calls)
        if not alone:
            raise InputError("the captures hold no call of the understanding path alone: capture x2t_image or "
                             "x2t_video (awq_calibrate_single.py --capture)")
        if len(alone) < len(calls):
            log.warning("%d of %d captured calls involve the generation expert, which is not part of this model, and "
                        "are left out", len(calls) - len(alone), len(calls))

        def weigh(running: Sequence[DecoderCall]) -> TokenWeights:
            norm = norm_around(source.read(f"{NORM}.weight", torch.float32), config.rms_norm_eps)
            return token_weights.measure(config, lambda _: lambda index: layer_weights(source, index, device),
                                     config.num_hidden_layers, {"und": norm}, running, device)

        return cls(measured, fingerprint, LayerInputs(config, alone, device, facts, weigh))


def understanding_only(calls: Sequence[DecoderCall]) -> list[DecoderCall]:
    """The calls that neither hold nor look back at a latent token."""
    mixed: set[int] = set()
    kept = []
    for call in calls:
        if "gen" in call.streams:
            mixed.update(call.rows)
        elif not mixed.intersection(call.rows):
            kept.append(call)
    return kept


def fitted_tensors(source: Checkpoint, folder: Path, fmt: Format, known: Calibration, device: torch.device,
                   record: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the MLX file, layer by layer, scales folded and weights rounded.

    Args:
        source: the extracted folder's tensors; their dtype is that of scales, norms and biases.
        device: where the work is done.
        record: filled with one entry per linear: scale, errors, how it was rounded.

    Raises:
        InputError: statistics of another model.
    """
    config = DecoderConfig.load(folder)
    _require_model(source, known, config.num_hidden_layers)
    dtype = source.specs[f"{NORM}.weight"].dtype
    codec = MlxCodec(fmt, dtype)
    if known.layer_inputs is not None:
        known.layer_inputs.weigh_tokens()
    for index in range(config.num_hidden_layers):
        weights = layer_weights(source, index, device)
        for name, tensor in layer_tensors(index, weights, codec, known, record):
            yield name, tensor if tensor.dtype in (torch.uint32, torch.uint8) else tensor.to(dtype)
    yield from _ends(source, codec, known, device, config.rms_norm_eps, record)


def layer_weights(source: Checkpoint, index: int, device: torch.device) -> Weights:
    """Lance's name -> float32 tensor, of one layer of an extracted folder."""
    return {layout.LLM_PREFIX + name: source.read(name, torch.float32, device) for name in source.specs
            if name.startswith(f"model.layers.{index}.")}


def _require_model(source: Checkpoint, known: Calibration, layers: int) -> None:
    widths = {}
    for name in layout.linears(layers):  # both experts have the same widths, and only one is here
        here = name.removeprefix(layout.LLM_PREFIX).replace(layout.SUFFIX["gen"], "")
        widths[name] = source.specs[f"{here}.weight"].shape[1]
    known.stats.require_model(known.fingerprint, widths)


def layer_tensors(index: int, weights: Weights, codec: MlxCodec, known: Calibration,
                  record: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Name in the MLX file -> tensor, for all of one layer.

    Args:
        weights: Lance's name -> float32 tensor; in the end the folded float weights.
    """
    if codec.fmt.mode == "nvfp4":
        _shift_layer(index, weights)
    packed = set()
    for group, done in layer.quantize_layer(index, weights, known.stats, codec, known.layer_inputs):
        log.info("%-24s %s", group.name, done)
        for name, linear in zip(group.linears, done.linears, strict=True):
            short = name.removeprefix(layout.LLM_PREFIX)
            packed.add(f"{name}.weight")
            record[short] = {"candidate": done.label, "error_before": linear.before, "error_after": linear.after,
                             **({} if linear.facts is None else linear.facts.entry())}
            yield from ((f"{short}.{suffix}", part.cpu()) for suffix, part in linear.tensors.items())
    for name, tensor in weights.items():
        if name not in packed:
            yield name.removeprefix(layout.LLM_PREFIX), tensor.cpu()


def _shift_layer(index: int, weights: Weights) -> None:
    groups = {group.place: group for group in layout.groups(index) if group.expert == "und"}
    for place, kind in (("attn_out", "v_proj"), ("mlp_out", "up_proj")):
        _shift_fed(weights, groups[place].linears[0], layout.linear(index, "und", kind))
    for place in ("attn_in", "mlp_in"):
        _shift_norm_fed(weights, groups[place].norm, groups[place].linears)


def _exponent(weights: Sequence[Tensor], target: int) -> int:
    """k such that the largest block scale of 2^k w is in (2^(target-1), 2^target]."""
    largest = max(float(w.abs().amax()) for w in weights) / 6
    return target - math.ceil(math.log2(largest)) if largest else 0


def _shift_norm_fed(tensors: dict[str, Tensor], norm: str, linears: Sequence[str]) -> None:
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


def _ends(source: Checkpoint, codec: MlxCodec, known: Calibration, device: torch.device, eps: float,
          record: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Embedding, final norm and head."""
    embedding = source.read(f"{EMBEDDING}.weight", torch.float32, device)
    yield from _in_rows(EMBEDDING, embedding, lambda rows: _nearest(rows, torch.ones_like(rows[0]), codec), codec)
    ends = {f"{name}.weight": source.read(f"{name}.weight", torch.float32, device) for name in (NORM, HEAD)
            if f"{name}.weight" in source.specs}
    del embedding
    head, norm = ends.get(f"{HEAD}.weight"), ends[f"{NORM}.weight"]
    if head is not None:  # a tied head cannot be scaled apart from the embedding, and is not in the file
        if codec.fmt.mode == "nvfp4":
            _shift_norm_fed(ends, NORM, [HEAD])
        yield from head_tensors(head, norm, codec, known.layer_inputs, eps, record)
    yield f"{NORM}.weight", norm.cpu().to(codec.dtype)


def head_tensors(head: Tensor, norm: Tensor, codec: MlxCodec, layer_inputs: LayerInputs | None, eps: float,
                 record: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The head, scaled and rounded for what reaches it; `head` and `norm` are changed to what belongs together.

    Without captured inputs their mean squares are held to be those of the norm's weights: a norm leaves a mean square
    of 1 over its channels.
    """
    m2 = norm.square() if layer_inputs is None else _head_moments(layer_inputs, norm, eps).mean_square
    found = awq.search([head], norm, m2, codec.quantizer)
    norm.copy_(found.folded.norm)
    fuse.multiply_columns(head, found.folded.column)
    moments = None if layer_inputs is None else _head_moments(layer_inputs, norm, eps)
    importance, rounded = awq.importance(m2 / found.folded.column**2), []

    def pack(rows: Tensor) -> dict[str, Tensor]:
        if moments is None:
            return _nearest(rows, importance, codec)
        done = gptq.round_weight(rows.t().contiguous(), moments, codec.quantizer, 1.0)
        rounded.append(done.method)
        return codec.tensors(codec.quantizer.encode(done.values.t().contiguous(), done.grid))

    yield from _in_rows(HEAD, head, pack, codec)
    record[HEAD] = {"candidate": found.candidate.label, "error_before": found.before[0], "error_after": found.after[0],
                    "rounding": "/".join(sorted(set(rounded))) or "searched",
                    "gram_tokens": 0 if moments is None else moments.n_tokens}


def _head_moments(layer_inputs: LayerInputs, norm: Tensor, eps: float) -> gram.GramStats:
    """Of the head's inputs at text tokens; nothing is read off a picture's."""
    layer = norm_around(norm, eps)
    sums = gram.GramAccumulator(len(norm), norm.device)
    for exact, packed in layer_inputs.hidden():
        if exact.causal:
            sums.add(*(layer(call.streams["und"].to(norm.device)).flatten(0, -2) for call in (packed, exact)))
    return sums.stats()


def _nearest(rows: Tensor, importance: Tensor, codec: MlxCodec) -> dict[str, Tensor]:
    (packed,) = quantize_searched(codec.quantizer, [rows], importance, 1.0)
    return codec.tensors(packed)


def _in_rows(name: str, weight: Tensor, pack: Any, codec: MlxCodec) -> Iterator[tuple[str, Tensor]]:
    """A weight packed some rows at a time; as it is if the group size does not divide its width."""
    if weight.shape[1] % codec.group_size:
        yield f"{name}.weight", weight.cpu().to(codec.dtype)
        return
    parts = [pack(rows) for rows in weight.split(_ROWS)]
    for suffix in parts[0]:
        yield f"{name}.{suffix}", torch.cat([part[suffix].cpu() for part in parts])
