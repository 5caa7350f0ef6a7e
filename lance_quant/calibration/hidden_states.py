"""Hidden states of one model on captured requests, between its layers and, in a layer, behind attention and MLPs.

A layer runs in two steps, as a pre-norm decoder layer is built: the residual stream plus o_proj of what was attended,
then plus down_proj of what the gated MLP makes. What these two linears read is what GPTQ must see, and costs most of
the layer. So it is kept until the step is taken, as far as there is room; otherwise it is made a second time.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lance_quant.calibration.decoder_calls import DecoderCall
from lance_quant.calibration.gradients import layer_around
from lance_quant.cpu import matmul
from lance_quant.formats import layout
from lance_quant.formats.layout import SUFFIX, Expert
from lance_quant.formats.weights import Weights
from lance_quant.lance.cache import CacheRow
from lance_quant.lance.config import LanceConfig
from lance_quant.lance.mot import DecoderLayer
from lance_quant.lance.steps import LayerParts

Fed = Literal["attn_out", "mlp_out"]  # the places whose linear adds to the residual stream
NORMS = {"attn_in": "input_layernorm", "mlp_in": "post_attention_layernorm", "mlp_out": "post_attention_layernorm"}
PIECE = 1024  # tokens that are worked on at once; the inputs of a real down_proj are 45 MB
ROOM = 1 << 30  # bytes of inputs that are kept from their measuring to the next step: 24k tokens of a real down_proj


class Piece(NamedTuple):
    """Some tokens of a call at a place of the layer.

    call: its place among the calls
    inputs: float32 [t, in] of the linears there
    stream: float32 [t, hidden], the residual stream beside them
    """

    call: int
    expert: Expert
    inputs: Tensor
    stream: Tensor


class HiddenStates:
    """One model's states; `calls` holds them as the streams of the requests' calls.

    Args:
        config: of the model.
        calls: with the inputs of layer 0, in order, with everything that they read.
        device: where layers run; states wait on the CPU.
    """

    def __init__(self, config: LanceConfig, calls: Sequence[DecoderCall], device: torch.device):
        self.calls = list(calls)
        self._config, self._device = config, device
        self._capacity: dict[int, int] = {}  # of each cache row
        for call in calls:
            for row, length in zip(call.rows, call.lengths, strict=True):
                self._capacity[row] = max(self._capacity.get(row, 0), length + call.length)
        self._inputs: dict[tuple[int, Expert], list[Tensor]] = defaultdict(list)  # by call, of the next step's linear
        self._behind: dict[tuple[int, Expert], list[Tensor]] = defaultdict(list)  # the stream behind the next step

    def tokens_of(self, expert: Expert) -> int:
        """Tokens that the expert runs."""
        return sum(call.streams[expert].shape[:2].numel() for call in self.calls if expert in call.streams)

    def normed(self, group: layout.Group, weights: Weights) -> Iterator[Piece]:
        """What a group of linears behind a norm reads, piece by piece; `weights` are the layer's."""
        norm = getattr(layer_around(self._config, group.layer, weights), NORMS[group.place] + SUFFIX[group.expert])
        for index, call in enumerate(self.calls):
            if group.expert in call.streams:
                for stream in self._pieces(call, group.expert):
                    yield Piece(index, group.expert, norm(stream), stream)

    def fed(self, place: Fed, layer: int, experts: Collection[Expert], weights: Weights) -> Iterator[Piece]:
        """What o_proj or down_proj of some experts reads, piece by piece; `weights` are the layer's, of which these
        linears themselves are not used."""
        around = layer_around(self._config, layer, weights)
        made = self._attended(around) if place == "attn_out" else self._gated(around, experts)
        for index, (call, streams) in enumerate(zip(self.calls, made, strict=True)):
            for expert in [expert for expert in call.streams if expert in experts]:
                pieces = zip(self._pieces(call, expert), streams[expert], strict=True)
                yield from (Piece(index, expert, inputs, stream) for stream, inputs in pieces)

    def _attended(self, layer: DecoderLayer) -> Iterator[dict[Expert, Iterator[Tensor]]]:
        """By call what o_proj reads; all calls run, since later ones look at the keys and values of earlier ones."""
        for suffix in SUFFIX.values():
            setattr(layer.self_attn, f"o_proj{suffix}", nn.Identity())
        rows = {row: self._row(capacity) for row, capacity in self._capacity.items()}
        for call in self.calls:
            for row, length in zip(call.rows, call.lengths, strict=True):
                rows[row].length = length
            streams = {expert: x.to(self._device) for expert, x in call.streams.items()}
            cos, sin = call.rope
            lengths = {expert: x.shape[1] for expert, x in streams.items()}
            attended = layer(streams, (cos.to(self._device), sin.to(self._device)), [rows[row] for row in call.rows], 0,
                             call.causal, LayerParts(layer.before, lambda _, x, lengths=lengths:
                                                     layer.self_attn.output(x, lengths)))
            yield {expert: iter(x.flatten(0, -2).split(PIECE)) for expert, x in attended.items()}

    def _row(self, capacity: int) -> CacheRow:
        return CacheRow(*torch.empty(2, 1, self._config.num_key_value_heads, capacity, self._config.head_dim,
                                     device=self._device))

    def _gated(self, layer: DecoderLayer, experts: Collection[Expert]) -> Iterator[dict[Expert, Iterator[Tensor]]]:
        """By call what down_proj reads."""
        for call in self.calls:
            yield {expert: self._gated_pieces(layer, call, expert) for expert in call.streams if expert in experts}

    def _gated_pieces(self, layer: DecoderLayer, call: DecoderCall, expert: Expert) -> Iterator[Tensor]:
        norm, mlp = (getattr(layer, part + SUFFIX[expert]) for part in (NORMS["mlp_out"], "mlp"))
        mlp.down_proj = nn.Identity()
        for stream in self._pieces(call, expert):
            yield mlp(norm(stream))

    def _pieces(self, call: DecoderCall, expert: Expert) -> Iterator[Tensor]:
        for piece in call.streams[expert].flatten(0, -2).split(PIECE):
            yield piece.to(self._device)

    def room_for(self, experts: Collection[Expert], width: int) -> bool:
        """Whether what a linear of some width reads can be kept for the next step: a matter of sizes alone."""
        return 4 * width * sum(map(self.tokens_of, experts)) <= ROOM

    def keep(self, piece: Piece) -> None:
        """Keep what the next step's linear reads; all of an expert's pieces, in order, or none."""
        self._inputs[piece.call, piece.expert].append(piece.inputs.cpu())

    def pass_by(self, piece: Piece, w: Tensor) -> None:
        """Take the next step for some tokens: the stream plus the linear `w` [out, in] of what it reads."""
        self._behind[piece.call, piece.expert].append((piece.stream + matmul.linear(piece.inputs, w)).cpu())

    def go_on(self, place: Fed, layer: int, weights: Weights) -> None:
        """Take the next step for all tokens: the states become those behind the attention, or behind the MLPs.

        Args:
            weights: of the layer, as they are to be used.
        """
        linears = {group.expert: weights[f"{group.linears[0]}.weight"] for group in layout.groups(layer)
                   if group.place == place and f"{group.linears[0]}.weight" in weights}
        for (index, expert), kept in self._inputs.items():
            for stream, inputs in zip(self._pieces(self.calls[index], expert), kept, strict=True):
                self.pass_by(Piece(index, expert, inputs.to(self._device), stream), linears[expert])
        left = linears.keys() - {expert for _, expert in self._behind}
        if any(left & call.streams.keys() for call in self.calls):
            for piece in self.fed(place, layer, left, weights):
                self.pass_by(piece, linears[piece.expert])
        self.calls = [replace(call, streams={expert: torch.cat(self._behind[index, expert]).view(x.shape)
                                             for expert, x in call.streams.items()})
                      for index, call in enumerate(self.calls)]
        self._inputs.clear()
        self._behind.clear()
