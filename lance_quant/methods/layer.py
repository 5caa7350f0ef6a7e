"""Our recipe for one decoder layer: scale, then round in the order in which data flows.

1. Scales (awq.py) are searched and moved exactly (fuse.py): v_proj -> o_proj, one for both experts; up_proj ->
   down_proj; input norm -> q/k/v; post-attention norm -> gate/up. From here on the layer is another set of weights that
   computes the same function.
2. Every linear is rounded: with GPTQ (gptq.py) where the inputs of the layer are at hand, in the order attention
   inputs, attention output, MLP inputs, MLP output, each on the inputs that the parts packed before it produce;
   otherwise to the nearest level of grids searched with E[x^2].
"""

import logging
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lance_quant.calibration import gram
from lance_quant.calibration.activation_stats import ActStats
from lance_quant.errors import InputError
from lance_quant.formats import layout
from lance_quant.formats.base import Codec, Kind, PackedWeight, quantize_measured, quantize_scaled
from lance_quant.formats.weights import Weights
from lance_quant.methods import awq, fuse, gptq

log = logging.getLogger("lance_quant")

PLACES = ("attn_in", "attn_out", "mlp_in", "mlp_out")  # as data flows
Choices = Mapping[str, Codec | None]  # linears that have a format of their own; None: bfloat16
BF16_ENTRY = {"n_bit": 16, "scheme": "bfloat16"}


class Activations(Protocol):
    """The inputs of every layer, in the float model and in the one packed so far, layer after layer.

    facts: what was captured, plain values for the meta
    """

    facts: Sequence[Mapping[str, Any]]

    def moments(self, group: layout.Group, target: Weights, current: Weights) -> Sequence[gram.GramStats] | None:
        """Of the inputs of each of a group's linears, which differ in how much a token counts; None where no token
        reaches them.

        Args:
            target: the layer's float weights, scales moved.
            current: the same with those linears replaced that are packed already.
        """

    def advance(self, layer: int, target: Weights, current: Weights) -> None:
        """Go on to the next layer: this one's outputs become its inputs."""

    def save(self, path: Path) -> None:
        """Store where it is, so that another run can go on from there."""

    def load(self, path: Path) -> None:
        """Go on from what `save` stored."""


@dataclass(frozen=True)
class Quantized:
    """A finished group.

    tensors: one dict suffix -> tensor per linear
    kind, context: for the meta entries
    label: which scale won
    before, after: relative error per linear, plainly rounded with s = 1 and as written, of uncorrelated inputs with the
        measured second moments; empty where they were not measured
    details: further meta fields per linear
    seconds: that the group took
    """

    tensors: Sequence[Mapping[str, Tensor]]
    kind: Kind
    context: float | None
    label: str
    before: Sequence[float] = ()
    after: Sequence[float] = ()
    details: Sequence[Mapping[str, Any]] = ()
    seconds: float = 0.0

    @property
    def alpha(self) -> float:
        """Exponent of the activation in the chosen scale, 0 for no scaling."""
        found = re.match(r"act\^([\d.]+)", self.label)
        return float(found[1]) if found else 0.0

    def entries(self, codecs: Iterable[Codec | None], shapes: Iterable[Sequence[int]]) -> Iterator[dict[str, Any]]:
        """Meta entry of every linear of the group; a codec of None: it stays in bfloat16."""
        for index, (codec, shape) in enumerate(zip(codecs, shapes, strict=True)):
            entry = BF16_ENTRY | {"shape": list(shape)} if codec is None \
                else codec.entry(shape, self.kind, self.context)
            if self.before:
                entry.update(candidate=self.label, alpha=self.alpha, error_before=self.before[index],
                             error_after=self.after[index])
            if self.details:
                entry.update(self.details[index])
            yield entry

    def __str__(self) -> str:
        if not self.before:
            return f"{self.label}  {self.seconds:.1f} s"
        methods = "/".join(sorted({entry["rounding"] for entry in self.details if "rounding" in entry}))
        text = f"{self.label:<18} {_decibel(self.before):5.1f} -> {_decibel(self.after):5.1f} dB  {methods:<12}"
        held = [(entry["held_nearest"], entry["held_after"]) for entry in self.details if "held_after" in entry]
        if held:
            nearest, after = zip(*held, strict=True)
            text += f" held-back tokens {_decibel(nearest):5.1f} -> {_decibel(after):5.1f} dB"
        return f"{text}  {self.seconds:.1f} s"


def _decibel(errors: Sequence[float]) -> float:
    mean = sum(errors) / len(errors)
    return -10 * math.log10(mean) if mean else math.inf


@dataclass
class _Scaled:
    """Of a group: largest |weight| of each scaled column, mean squares of the scaled inputs (None: no statistics), the
    scale that won, errors with s = 1."""

    wmax: Tensor
    m2: Tensor | None = None
    label: str = "s=1"
    before: tuple[float, ...] = ()


@dataclass
class _Layer:
    """One layer while it is worked on: `weights` changes in place."""

    index: int
    weights: Weights
    stats: ActStats
    codec: Codec
    choices: Choices = field(default_factory=dict)
    scaled: dict[str, _Scaled] = field(default_factory=dict)

    def weight(self, linear: str) -> Tensor:
        return self.weights[f"{linear}.weight"]

    def mean_square(self, group: layout.Group) -> Tensor | None:
        known = [self.stats.linears[name].mean_square for name in group.linears if name in self.stats.linears]
        return torch.stack(known).mean(0).to(self.weight(group.linears[0]).device) if known else None

    def groups(self, place: str) -> list[layout.Group]:
        return [group for group in layout.groups(self.index)
                if group.place == place and f"{group.linears[0]}.weight" in self.weights]


def quantize_layer(index: int, weights: Weights, stats: ActStats, codec: Codec, activations: Activations | None = None,
                   choices: Choices | None = None) -> Iterator[tuple[layout.Group, Quantized]]:
    """Quantize one layer; yields its eight groups (four where one expert is alone) as they are finished.

    Args:
        index: of the layer.
        weights: all tensors of the layer, or of its understanding expert, float32. Changed in place: after the last
            group its norms and biases are those that belong to the packed linears. Norms hold bfloat16 values.
        stats: second moments for the scales; linears without any are not scaled.
        codec: the format.
        activations: inputs for GPTQ; None rounds to the nearest level.
        choices: linears that are rounded to another format than `codec`, with which scales are searched.
    """
    layer = _Layer(index, weights, stats, codec, choices or {})
    _scale(layer)
    current = dict(weights)
    for place in PLACES:
        for group in layer.groups(place):
            started = time.perf_counter()
            moments = None if activations is None else activations.moments(group, weights, current)
            done = _round_group(layer, group, moments, None if activations is None else current)
            yield group, _timed(done, started)
    if activations is not None:
        activations.advance(index, weights, current)


def scale_layer(index: int, weights: Weights, stats: ActStats, codec: Codec) -> dict[str, Tensor | None]:
    """The first step alone: move the scales of a layer, in place; arguments as for quantize_layer.

    Returns:
        By group name the mean squares [in] of its scaled inputs; None without statistics.
    """
    layer = _Layer(index, weights, stats, codec)
    _scale(layer)
    return {name: scaled.m2 for name, scaled in layer.scaled.items()}


def _scale(layer: _Layer) -> None:
    _scale_values(layer)
    for group in layer.groups("mlp_out"):
        _scale_up(layer, group)
    for place in ("attn_in", "mlp_in"):
        for group in layer.groups(place):
            _scale_norm(layer, group)


def _timed(done: Quantized, started: float) -> Quantized:
    return Quantized(**{**vars(done), "seconds": time.perf_counter() - started})


def _scale_values(layer: _Layer) -> None:
    """v_proj -> o_proj: one scale for both experts, from those that have statistics."""
    groups = layer.groups("attn_out")
    known = {group.expert: m2 for group in groups if (m2 := layer.mean_square(group)) is not None}
    o = {group.expert: layer.weight(group.linears[0]) for group in groups}
    names = {expert: layout.linear(layer.index, expert, "v_proj") for expert in o}
    if not known:
        layer.scaled.update({group.name: _unscaled(layer, group) for group in groups})
        return
    heads = _heads(layer)
    found = awq.search_fed([o[expert] for expert in known], list(known.values()), layer.codec, heads)
    before = dict(zip(known, found.before, strict=True))
    wmax = dict(zip(known, found.wmax, strict=True))
    for group in groups:
        expert, name = group.expert, names[group.expert]
        fuse.divide_rows(layer.weight(name), layer.weights.get(f"{name}.bias"), found.s)
        fuse.multiply_columns(o[expert], found.columns)
        layer.scaled[group.name] = _Scaled(wmax[expert], known[expert] / found.columns**2, found.label,
                                           (before[expert],)) if expert in known else _unscaled(layer, group)


def _heads(layer: _Layer) -> fuse.Heads:
    norm, v, o = (layer.weight(layout.head_norm(layer.index, "und")),
                  *(layer.weight(layout.linear(layer.index, "und", kind)) for kind in ("v_proj", "o_proj")))
    try:
        return fuse.heads_of(norm, v, o)
    except ValueError as error:
        raise InputError(f"layer {layer.index}: {error}") from error


def _scale_up(layer: _Layer, group: layout.Group) -> None:
    """up_proj -> down_proj of one expert."""
    m2, down = layer.mean_square(group), layer.weight(group.linears[0])
    if m2 is None:
        layer.scaled[group.name] = _unscaled(layer, group)
        return
    found = awq.search_fed([down], [m2], layer.codec)
    up = layout.linear(layer.index, group.expert, "up_proj")
    fuse.divide_rows(layer.weight(up), layer.weights.get(f"{up}.bias"), found.s)
    fuse.multiply_columns(down, found.columns)
    layer.scaled[group.name] = _Scaled(found.wmax[0], m2 / found.columns**2, found.label, found.before)


def _scale_norm(layer: _Layer, group: layout.Group) -> None:
    """Norm -> the linears that read it. Without statistics the norm is still rounded exactly (fuse.fold_norm)."""
    m2, weights = layer.mean_square(group), [layer.weight(name) for name in group.linears]
    norm = layer.weight(group.norm)
    if m2 is None:
        folded, scaled = fuse.fold_norm(norm, torch.ones_like(norm)), _unscaled(layer, group)
        layer.scaled[group.name] = replace(scaled, wmax=scaled.wmax * folded.column)
    else:
        choice = awq.search(weights, norm, m2, layer.codec)
        folded = choice.folded
        layer.scaled[group.name] = _Scaled(choice.wmax, m2 / folded.column**2, choice.label, choice.before)
    for weight in weights:
        fuse.multiply_columns(weight, folded.column)
    layer.weights[f"{group.norm}.weight"] = folded.norm.float()


def _unscaled(layer: _Layer, group: layout.Group) -> _Scaled:
    """Errors of plain rounding, with nothing known of the inputs."""
    weights = [layer.weight(name) for name in group.linears]
    one, wmax = torch.ones_like(weights[0][0]), torch.stack([awq.column_max(w) for w in weights]).amax(0)
    return _Scaled(wmax, before=awq.relative_errors(weights, [one], one, layer.codec, wmax)[0])


def _round_group(layer: _Layer, group: layout.Group, moments: Sequence[gram.GramStats] | None,
                 current: Weights | None) -> Quantized:
    scaled, codecs = layer.scaled[group.name], [layer.choices.get(name, layer.codec) for name in group.linears]
    weights = [layer.weight(name) for name in group.linears]
    # The largest |weight| of the group, without touching its weights: rounding is monotonic, so this is exact.
    context = layer.codec.context(float(scaled.wmax.max()))
    known = torch.ones_like(weights[0][0]) if scaled.m2 is None else scaled.m2
    rounded = {index: _Rounded(None, w.bfloat16(), {"rounding": "bfloat16"})
               for index, (w, codec) in enumerate(zip(weights, codecs, strict=True)) if codec is None}
    for codec in dict.fromkeys(codec for codec in codecs if codec is not None):
        own = [index for index, other in enumerate(codecs) if other == codec]
        known_of = None if moments is None else [moments[index] for index in own]
        rounded |= zip(own, _round([weights[index] for index in own], scaled.m2, known_of, codec, context), strict=True)
    details = [rounded[index].details for index in range(len(weights))]
    if current is not None and moments is None:
        details = [{**entry, "reason": "no captured tokens"} if entry["rounding"] != "bfloat16" else entry
                   for entry in details]
    if (m2 := layer.mean_square(group)) is not None:
        details = [{**entry, "outlier_ratio": _outlier_ratio(m2)} for entry in details]
    after = []
    for index, (name, w) in enumerate(zip(group.linears, weights, strict=True)):
        error, back = rounded[index].error, None
        if current is not None or error is None:
            back = rounded[index].back()
        if current is not None:
            current[f"{name}.weight"] = back
        after.append(awq.written_error(w, back, known) if error is None else error)
    kind = "unsearched" if scaled.m2 is None else "searched"
    tensors = [rounded[index].tensors() for index in range(len(weights))]
    return Quantized(tensors, kind, context, scaled.label, scaled.before, after, details)


class _Rounded(NamedTuple):
    """A linear as it is written, packed or (no codec) in bfloat16, what the meta says of it, and its awq.written_error
    where that is known already."""

    codec: Codec | None
    q: PackedWeight | Tensor
    details: dict[str, Any]
    error: float | None = None

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.q} if self.codec is None else self.codec.tensors(self.q)

    def back(self) -> Tensor:
        """float32 [out, in]."""
        return self.q.float() if self.codec is None else self.codec.dequantize(self.q)


def _round(weights: Sequence[Tensor], m2: Tensor | None, moments: Sequence[gram.GramStats] | None, codec: Codec,
           context: float | None) -> list[_Rounded]:
    """Linears of a group that get the same format."""
    if moments is not None:
        packed, details = zip(*(_with_gptq(w, own, codec, context) for w, own in zip(weights, moments, strict=True)),
                              strict=True)
    elif m2 is None:
        packed = quantize_scaled(codec, weights, None, context)
        details = [{"rounding": "nearest"}] * len(weights)
    else:
        packed, errors = quantize_measured(codec, weights, awq.importance(m2), context)
        return [_Rounded(codec, q, {"rounding": "searched"}, error) for q, error in zip(packed, errors, strict=True)]
    return [_Rounded(codec, q, entry) for q, entry in zip(packed, details, strict=True)]


def _outlier_ratio(m2: Tensor) -> float:
    """The loudest channel's root mean square over the median channel's, before any scale."""
    return float((m2.max() / m2.median().clamp(min=torch.finfo(m2.dtype).tiny)).sqrt())


def _with_gptq(w: Tensor, moments: gram.GramStats, codec: Codec,
               context: float | None) -> tuple[PackedWeight, dict[str, Any]]:
    done = gptq.round_weight(w.t().contiguous(), moments, codec, context)
    details: dict[str, Any] = {"rounding": done.method, "gram_tokens": moments.n_tokens}
    if done.reason is not None:
        details["reason"] = done.reason
    if done.before is not None:
        details.update(held_nearest=done.before, held_after=done.after)
    return codec.encode(done.values.t().contiguous(), done.grid, context), details
