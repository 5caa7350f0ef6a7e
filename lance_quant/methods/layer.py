"""AWQ then GPTQ on one decoder layer: scale, then round in the order in which data flows.

1. AWQ scales (awq.py) are searched and moved exactly (fuse.py): v_proj -> o_proj, one for both experts; up_proj ->
   down_proj; input norm -> q/k/v; post-attention norm -> gate/up. From here on the layer is another set of weights that
   computes the same function.
2. Every linear is rounded. Where the inputs of the layer are at hand GPTQ does it (gptq.py), in the order attention
   inputs, attention output, MLP inputs, MLP output, each on the inputs that the parts packed before it produce.
   Otherwise it goes to the nearest level of grids searched with E[x^2].
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lance_quant.calibration.activation_stats import ActStats
from lance_quant.calibration.gram import GramStats
from lance_quant.errors import InputError
from lance_quant.formats import layout
from lance_quant.formats.base import TensorCodec
from lance_quant.formats.blocks import quantize_measured, quantize_scaled
from lance_quant.formats.weights import Weights
from lance_quant.methods import awq, fuse, gptq
from lance_quant.methods.quantized_group import QuantizedGroup, QuantizedLinear, RoundingFacts

PLACES = ("attn_in", "attn_out", "mlp_in", "mlp_out")  # as data flows


class Activations(Protocol):
    """The inputs of every layer, in the float model and in the one packed so far, layer after layer."""

    @property
    def facts(self) -> Sequence[Mapping[str, Any]]:
        """What was captured, plain values for the meta."""

    def weigh_tokens(self) -> None:
        """Measure as how many every token counts, before the first layer; `load` brings that as well."""

    def begin_layer(self, index: int, target: Weights) -> None:
        """Take up a layer; `target` are its float weights, scales moved."""

    def gram_stats(self, group: layout.Group, current: Weights) -> Sequence[GramStats] | None:
        """Of the inputs of each of a group's linears, which differ in how much a token counts; None where no token
        reaches them. Of the MLPs' groups behind `pass_attention`.

        Args:
            current: the layer's weights with those linears replaced that are packed already.
        """

    def pass_attention(self, current: Weights) -> None:
        """Go on from the layer's attention to its MLPs."""

    def end_layer(self, current: Weights) -> None:
        """Go on to the next layer: this one's outputs become its inputs."""

    def save(self, path: Path) -> None:
        """Store where it is, between two layers, so that another run can go on from there."""

    def load(self, path: Path) -> None:
        """Go on from what `save` stored."""


@dataclass
class _Scaled:
    """A group after its scale was moved.

    wmax: [in] largest |weight| of each scaled column
    m2: [in] mean squares of the scaled inputs; None: no statistics
    candidate: the scale that won; None: none was searched
    before: errors with s = 1, per linear
    """

    wmax: Tensor
    m2: Tensor | None = None
    candidate: awq.Candidate | None = None
    before: tuple[float, ...] = ()


@dataclass
class _LayerState:
    """One layer while it is worked on: `weights` changes in place."""

    index: int
    weights: Weights
    stats: ActStats
    codec: TensorCodec
    sweeps: int = gptq.SWEEPS
    allocation: Mapping[str, TensorCodec | None] = field(default_factory=dict)
    scaled: dict[str, _Scaled] = field(default_factory=dict)
    moved: dict[str, Tensor] = field(default_factory=dict)

    def weight(self, linear: str) -> Tensor:
        return self.weights[f"{linear}.weight"]

    def mean_square(self, group: layout.Group) -> Tensor | None:
        known = [self.stats.linears[name].mean_square for name in group.linears if name in self.stats.linears]
        return torch.stack(known).mean(0).to(self.weight(group.linears[0]).device) if known else None

    def groups(self, place: str) -> list[layout.Group]:
        return [group for group in layout.groups(self.index)
                if group.place == place and f"{group.linears[0]}.weight" in self.weights]

    def codec_of(self, linear: str) -> TensorCodec | None:
        return self.allocation.get(linear, self.codec)


def quantize_layer(index: int, weights: Weights, stats: ActStats, codec: TensorCodec,
                   activations: Activations | None = None, allocation: Mapping[str, TensorCodec | None] | None = None,
                   moved: dict[str, Tensor] | None = None,
                   sweeps: int = gptq.SWEEPS) -> Iterator[tuple[layout.Group, QuantizedGroup]]:
    """Quantize one layer; yields its eight groups (four where one expert is alone) as they are finished.

    Args:
        index: of the layer.
        weights: all tensors of the layer, or of its understanding expert, float32. Changed in place: after the last
            group its norms and biases are those that belong to the packed linears. Norms hold bfloat16 values.
        stats: second moments for the scales; linears without any are not scaled.
        codec: the format.
        activations: inputs for GPTQ; None rounds to the nearest level.
        allocation: linears that are rounded to another format than `codec`, with which scales are searched.
        moved: gets the scales [in] or [out] between two linears, as formats/channel_scales.py names them.
        sweeps: of coordinate descent behind GPTQ.

    Raises:
        InputError: the head geometry of the layer does not fit.
    """
    state = _LayerState(index, weights, stats, codec, sweeps, allocation or {}, moved={} if moved is None else moved)
    _scale(state)
    current = dict(weights)
    if activations is not None:
        activations.begin_layer(index, weights)
    for place in PLACES:
        if activations is not None and place == "mlp_in":
            activations.pass_attention(current)
        for group in state.groups(place):
            started = time.perf_counter()
            inputs = None if activations is None else activations.gram_stats(group, current)
            done = _round_group(state, group, inputs, None if activations is None else current)
            yield group, replace(done, seconds=time.perf_counter() - started)
    if activations is not None:
        activations.end_layer(current)


def scale_layer(index: int, weights: Weights, stats: ActStats, codec: TensorCodec) -> dict[str, Tensor | None]:
    """The first step alone: move the scales of a layer, in place; arguments as for quantize_layer.

    Returns:
        By group name the mean squares [in] of its scaled inputs; None without statistics.
    """
    state = _LayerState(index, weights, stats, codec)
    _scale(state)
    return {name: scaled.m2 for name, scaled in state.scaled.items()}


def _scale(state: _LayerState) -> None:
    _scale_values(state)
    for group in state.groups("mlp_out"):
        _scale_up(state, group)
    for place in ("attn_in", "mlp_in"):
        for group in state.groups(place):
            _scale_norm(state, group)


def _scale_values(state: _LayerState) -> None:
    """v_proj -> o_proj: one scale for both experts, from those that have statistics."""
    groups = state.groups("attn_out")
    known = {group.expert: m2 for group in groups if (m2 := state.mean_square(group)) is not None}
    o = {group.expert: state.weight(group.linears[0]) for group in groups}
    names = {expert: layout.linear(state.index, expert, "v_proj") for expert in o}
    if not known:
        state.scaled.update({group.name: _unscaled(state, group) for group in groups})
        return
    heads = _heads(state)
    found = awq.search_fed([o[expert] for expert in known], list(known.values()), state.codec.quantizer, heads)
    before = dict(zip(known, found.before, strict=True))
    wmax = dict(zip(known, found.wmax, strict=True))
    for group in groups:
        expert, name = group.expert, names[group.expert]
        fuse.divide_rows(state.weight(name), state.weights.get(f"{name}.bias"), found.candidate.s)
        fuse.multiply_columns(o[expert], found.columns)
        state.moved |= {f"{name}.row": found.candidate.s, f"{group.linears[0]}.column": found.columns}
        state.scaled[group.name] = _Scaled(wmax[expert], known[expert] / found.columns**2, found.candidate,
                                           (before[expert],)) if expert in known else _unscaled(state, group)


def _heads(state: _LayerState) -> fuse.Heads:
    norm, v, o = (state.weight(layout.head_norm(state.index, "und")),
                  *(state.weight(layout.linear(state.index, "und", kind)) for kind in ("v_proj", "o_proj")))
    try:
        return fuse.heads_of(norm, v, o)
    except ValueError as error:
        raise InputError(f"layer {state.index}: {error}") from error


def _scale_up(state: _LayerState, group: layout.Group) -> None:
    """up_proj -> down_proj of one expert."""
    m2, down = state.mean_square(group), state.weight(group.linears[0])
    if m2 is None:
        state.scaled[group.name] = _unscaled(state, group)
        return
    found = awq.search_fed([down], [m2], state.codec.quantizer)
    up = layout.linear(state.index, group.expert, "up_proj")
    fuse.divide_rows(state.weight(up), state.weights.get(f"{up}.bias"), found.candidate.s)
    fuse.multiply_columns(down, found.columns)
    state.moved |= {f"{up}.row": found.candidate.s, f"{group.linears[0]}.column": found.columns}
    state.scaled[group.name] = _Scaled(found.wmax[0], m2 / found.columns**2, found.candidate, found.before)


def _scale_norm(state: _LayerState, group: layout.Group) -> None:
    """Norm -> the linears that read it. Without statistics the norm is still rounded exactly (fuse.fold_norm)."""
    assert group.norm is not None, "attention and MLP inputs are behind a norm"
    m2, weights = state.mean_square(group), [state.weight(name) for name in group.linears]
    norm = state.weight(group.norm)
    if m2 is None:
        folded, scaled = fuse.fold_norm(norm, torch.ones_like(norm)), _unscaled(state, group)
        state.scaled[group.name] = replace(scaled, wmax=scaled.wmax * folded.column)
    else:
        found = awq.search(weights, norm, m2, state.codec.quantizer)
        folded = found.folded
        state.scaled[group.name] = _Scaled(found.wmax, m2 / folded.column**2, found.candidate, found.before)
    for weight in weights:
        fuse.multiply_columns(weight, folded.column)
    state.weights[f"{group.norm}.weight"] = folded.norm.float()


def _unscaled(state: _LayerState, group: layout.Group) -> _Scaled:
    """Errors of plain rounding, with nothing known of the inputs."""
    weights = [state.weight(name) for name in group.linears]
    one, wmax = torch.ones_like(weights[0][0]), torch.stack([awq.column_max(w) for w in weights]).amax(0)
    return _Scaled(wmax, before=awq.relative_errors(weights, [one], one, state.codec.quantizer, wmax)[0])


class _Stored(NamedTuple):
    """A linear as it is written: packed, or (no codec) in bfloat16.

    facts: how it was rounded
    error: its awq.written_error, where that is known already
    """

    codec: TensorCodec | None
    q: Any
    facts: RoundingFacts
    error: float | None = None

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.q} if self.codec is None else self.codec.tensors(self.q)

    def back(self) -> Tensor:
        """float32 [out, in]."""
        return self.q.float() if self.codec is None else self.codec.dequantize(self.q)


def _round_group(state: _LayerState, group: layout.Group, inputs: Sequence[GramStats] | None,
                 current: Weights | None) -> QuantizedGroup:
    """Round the linears of a group, and put what they give back into `current`, if the next groups run on it."""
    scaled, weights = state.scaled[group.name], [state.weight(name) for name in group.linears]
    # The largest |weight| of the group, without touching its weights: rounding is monotonic, so this is exact.
    global_scale = state.codec.quantizer.global_scale(float(scaled.wmax.max()))
    stored = _stored(state, group, inputs, global_scale)
    known = torch.ones_like(weights[0][0]) if scaled.m2 is None else scaled.m2
    m2, linears = state.mean_square(group), []
    for name, w, before, one in zip(group.linears, weights, scaled.before, stored, strict=True):
        facts, error = one.facts, one.error
        if current is not None or error is None:
            back = one.back()
            error = awq.written_error(w, back, known) if error is None else error
            if current is not None:
                current[f"{name}.weight"] = back
        if current is not None and inputs is None and one.codec is not None:
            facts = replace(facts, reason="no captured tokens")
        if m2 is not None:
            facts = replace(facts, outlier_ratio=_outlier_ratio(m2))
        linears.append(QuantizedLinear(one.tensors(), before, error, facts))
    label, alpha = ("s=1", 0.0) if scaled.candidate is None else (scaled.candidate.label, scaled.candidate.alpha)
    return QuantizedGroup(linears, "unsearched" if scaled.m2 is None else "searched", global_scale, label, alpha, 0.0)


def _stored(state: _LayerState, group: layout.Group, inputs: Sequence[GramStats] | None,
            global_scale: float) -> list[_Stored]:
    """The linears of a group in the formats that they are written in, those of one format together."""
    codecs = [state.codec_of(name) for name in group.linears]
    weights, m2 = [state.weight(name) for name in group.linears], state.scaled[group.name].m2
    stored = {index: _Stored(None, w.bfloat16(), RoundingFacts("bfloat16"))
              for index, (w, codec) in enumerate(zip(weights, codecs, strict=True)) if codec is None}
    for codec in dict.fromkeys(codec for codec in codecs if codec is not None):
        own = [index for index, other in enumerate(codecs) if other == codec]
        known = None if inputs is None else [inputs[index] for index in own]
        done = _round([weights[index] for index in own], m2, known, codec, global_scale, state.sweeps)
        stored |= zip(own, done, strict=True)
    return [stored[index] for index in range(len(weights))]


def _round(weights: Sequence[Tensor], m2: Tensor | None, inputs: Sequence[GramStats] | None, codec: TensorCodec,
           global_scale: float, sweeps: int) -> list[_Stored]:
    """Linears [out, in] of a group that get the same format; `m2` [in] is None without statistics."""
    if inputs is not None:
        shared = len(inputs) > 1 and all(own is inputs[0] for own in inputs)
        factors = gptq.inverse_factors(inputs[0]) if shared else None
        return [_with_gptq(w, own, codec, global_scale, sweeps, factors)
                for w, own in zip(weights, inputs, strict=True)]
    if m2 is None:
        return [_Stored(codec, q, RoundingFacts("nearest"))
                for q in quantize_scaled(codec.quantizer, weights, None, global_scale)]
    packed, errors = quantize_measured(codec.quantizer, weights, awq.importance(m2), global_scale)
    return [_Stored(codec, q, RoundingFacts("searched"), error) for q, error in zip(packed, errors, strict=True)]


def _outlier_ratio(m2: Tensor) -> float:
    return float((m2.max() / m2.median().clamp(min=torch.finfo(m2.dtype).tiny)).sqrt())


def _with_gptq(w: Tensor, inputs: GramStats, codec: TensorCodec, global_scale: float, sweeps: int,
               factors: gptq.Factors | None) -> _Stored:
    done = gptq.round_weight(w.t().contiguous(), inputs, codec.quantizer, global_scale, sweeps, factors)
    facts = RoundingFacts(done.method, inputs.n_tokens, done.reason, done.before, done.after)
    return _Stored(codec, codec.quantizer.encode(done.values.t().contiguous(), done.grid, global_scale), facts)
