"""Captured requests run again layer by layer, for what GPTQ must know of every linear's inputs.

GPTQ needs the Gram matrix of every linear's inputs: 485 MB for one real down_proj, 35 GB for all. So the inputs of
layer 0 are stored (capture.py) and every layer's are made again when its turn comes, with the real attention: once
through the float layer and once through the layer as it is packed so far. Two layers' weights and one down_proj's Gram
matrix are in memory at a time.

In the Gram matrices tokens count by how much an error there does to what comes out of the model (relevance.py).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lance_quant.calibration import gram, token_weights
from lance_quant.calibration.capture import load_of
from lance_quant.calibration.decoder_calls import Call, batched
from lance_quant.calibration.gradients import inside, layer_around
from lance_quant.calibration.token_weights import Relevance
from lance_quant.errors import InputError
from lance_quant.formats import layout
from lance_quant.formats.layout import SUFFIX, Expert
from lance_quant.formats.weights import Weights
from lance_quant.lance.cache import CacheRow
from lance_quant.lance.config import LanceConfig
from lance_quant.lance.mot import DecoderLayer, Streams
from lance_quant.storage.atomic import whole_file
from lance_quant.storage.tensor_file import Checkpoint, TensorFile, write_tensors

BATCH = 4096  # tokens of calls that run as one
_PIECE = 1024  # tokens that go through an MLP at once; the inputs of a real down_proj are 45 MB
_NORMS = {"attn_in": "input_layernorm", "mlp_in": "post_attention_layernorm", "mlp_out": "post_attention_layernorm"}


class Replay:
    """The inputs of each layer in turn, in the float model and in the packed one: see ours.Activations.

    Args:
        config: of the model.
        calls: of one capture or several, with distinct row numbers.
        device: where layers run and Gram matrices are summed; hidden states wait on the CPU.
        facts: which captures these are.
        weigh: how much each token counts in calls as they are run, see relevance.py; None: all the same.
    """

    def __init__(self, config: LanceConfig, calls: Sequence[Call], device: torch.device,
                 facts: Sequence[dict[str, Any]] = (), weigh: Callable[[Sequence[Call]], Relevance] | None = None):
        self._config, self._device, self.facts = config, device, facts
        self._exact = self._packed = batched(calls, BATCH)
        self._weigh = weigh
        self._relevance: Relevance | None = None
        self._attended = False  # whether the states are those between attention and MLP
        self._ends: dict[int, int] = {}
        for call in calls:
            for row, length in zip(call.rows, call.lengths, strict=True):
                self._ends[row] = max(self._ends.get(row, 0), length + call.length)
        self._found: dict[str, list[gram.GramStats]] = {}

    @torch.no_grad()
    def moments(self, group: layout.Group, target: Weights, current: Weights) -> list[gram.GramStats] | None:
        """See ours.Activations; places come in the order of ours.PLACES. Where attention was run, both experts are
        measured at once; elsewhere one at a time, since a Gram matrix of down_proj is as large as a layer."""
        assert group.place.startswith("mlp") or not self._attended, "the attention of this layer is behind us"
        if group.place.startswith("mlp") and not self._attended:
            self._go_on(self._past_attention, group.layer, target, current)
            self._attended = True
        if not any(group.expert in call.streams for call in self._exact):
            return None
        if group.name not in self._found:
            wanted = [other for other in layout.groups(group.layer) if other.place == group.place
                      and (group.place == "attn_out" or other.expert == group.expert)
                      and any(other.expert in call.streams for call in self._exact)]
            self._found = self._measure(wanted, target, current)
        return self._found.pop(group.name)

    def _measure(self, groups: Sequence[layout.Group], target: Weights,
                 current: Weights) -> dict[str, list[gram.GramStats]]:
        # What is packed so far shows in the inputs only behind the first packed linear of the model.
        paired = any(a is not b for a, b in zip(self._exact, self._packed, strict=True)) \
            or any(current[name] is not target[name] for name in target)
        sums = {group.name: self._sums(group, paired, target) for group in groups}
        exact, packed = self._inputs(groups, target, self._exact), self._inputs(groups, current, self._packed)
        for (name, x, stream), (_, xq, stream_q) in zip(exact, packed, strict=True):
            for part in dict.fromkeys(sums[name]):
                part.add(xq, x, stream - stream_q)
        found = {part: part.moments() for part in dict.fromkeys(part for parts in sums.values() for part in parts)}
        return {name: [found[part] for part in parts] for name, parts in sums.items()}

    def _sums(self, group: layout.Group, paired: bool, target: Weights) -> list[gram.GramAccumulator]:
        """One for each linear; the same one where tokens count the same."""
        weight = target[f"{group.linears[0]}.weight"]
        fed = weight if group.norm is None else None
        if self._counts() is None:
            return [gram.GramAccumulator(weight.shape[1], self._device, paired, fed)] * len(group.linears)
        return [gram.GramAccumulator(weight.shape[1], self._device, paired, fed, self._counts()[name])
                for name in group.linears]

    def _counts(self) -> Relevance | None:
        """As how many every token counts, measured when that is first needed: with the inputs of layer 0. A job that
        goes on behind that layer has loaded them."""
        if self._relevance is None and self._weigh is not None:
            assert self._exact is self._packed, "layers are packed already"
            self._relevance = self._weigh(self._exact)
        return self._relevance

    def _inputs(self, groups: Sequence[layout.Group], weights: Weights,
                calls: Sequence[Call]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Group, its inputs [tokens, in] and the residual stream [tokens, hidden] beside them, piece by piece."""
        layer, place = layer_around(self._config, groups[0].layer, weights), groups[0].place
        if place == "attn_out":
            yield from self._attention_outputs(groups, layer, calls)
            return
        (group,) = groups
        norm, mlp = (getattr(layer, part + SUFFIX[group.expert]) for part in (_NORMS[place], "mlp"))
        mlp.down_proj = nn.Identity()  # what is left of the MLP gives down_proj's inputs
        for call in calls:
            if group.expert in call.streams:
                for stream in call.streams[group.expert].flatten(0, -2).split(_PIECE):
                    stream = stream.to(self._device)
                    yield group.name, norm(stream) if place.endswith("_in") else mlp(norm(stream)), stream

    def _attention_outputs(self, groups: Sequence[layout.Group], layer: DecoderLayer,
                           calls: Sequence[Call]) -> Iterator[tuple[str, Tensor, Tensor]]:
        seen: dict[str, Tensor] = {}
        for group in groups:
            def observe(_: nn.Module, args: tuple[Tensor, ...], name: str = group.name) -> None:
                seen[name] = args[0].flatten(0, -2)

            layer.get_submodule(inside(group.linears[0], group.layer)).register_forward_pre_hook(observe)
        for call, _ in zip(calls, self._after_attention(layer, calls), strict=True):
            for group in groups:
                if group.expert in call.streams:
                    stream = call.streams[group.expert].to(self._device)
                    yield group.name, seen.pop(group.name), stream.flatten(0, -2)

    def _after_attention(self, layer: DecoderLayer, calls: Iterable[Call]) -> Iterator[Streams]:
        """Each call's streams with what attention adds to them."""
        for suffix in SUFFIX.values():
            setattr(layer, f"mlp{suffix}", _Zero())
        rows = {row: self._row(end) for row, end in self._ends.items()}
        for call in calls:
            for row, length in zip(call.rows, call.lengths, strict=True):
                rows[row].length = length
            streams = {expert: x.to(self._device) for expert, x in call.streams.items()}
            rope = tuple(x.to(self._device) for x in call.rope)
            yield layer(streams, rope, [rows[row] for row in call.rows], 0, call.causal)

    def _row(self, capacity: int) -> CacheRow:
        return CacheRow(*torch.empty(2, 1, self._config.num_key_value_heads, capacity, self._config.head_dim,
                                     device=self._device))

    @torch.no_grad()
    def advance(self, layer: int, target: Weights, current: Weights) -> None:
        """See ours.Activations."""
        if not self._attended:
            self._go_on(self._past_attention, layer, target, current)
        self._go_on(self._past_mlp, layer, target, current)
        self._attended = False

    def _go_on(self, step: Callable[[DecoderLayer, Sequence[Call]], list[Call]], index: int, target: Weights,
               current: Weights) -> None:
        """Replace the states of both models."""
        self._exact, self._packed = (step(layer_around(self._config, index, weights), calls)
                                     for weights, calls in ((target, self._exact), (current, self._packed)))

    def _past_attention(self, layer: DecoderLayer, calls: Sequence[Call]) -> list[Call]:
        return [replace(call, streams={expert: x.cpu() for expert, x in streams.items()})
                for call, streams in zip(calls, self._after_attention(layer, calls), strict=True)]

    def _past_mlp(self, layer: DecoderLayer, calls: Sequence[Call]) -> list[Call]:
        return [replace(call, streams={expert: self._fed(layer, expert, x) for expert, x in call.streams.items()})
                for call in calls]

    def _fed(self, layer: DecoderLayer, expert: Expert, streams: Tensor) -> Tensor:
        norm, mlp = (getattr(layer, part + SUFFIX[expert]) for part in (_NORMS["mlp_in"], "mlp"))
        pieces = (x.to(self._device) for x in streams.flatten(0, -2).split(_PIECE))
        return torch.cat([(x + mlp(norm(x))).cpu() for x in pieces]).view(streams.shape)

    def hidden(self) -> Iterator[tuple[Call, Call]]:
        """The calls as they stand, in the float model and in the packed one: after the last layer, its outputs."""
        return zip(self._exact, self._packed, strict=True)

    def save(self, path: Path) -> None:
        """See ours.Activations: the hidden states of both models, and how much their tokens count."""
        path.unlink(missing_ok=True)  # of a layer that was not journalled
        tensors = {f"{which}.{index}.{expert}": x for which, calls in self._states()
                   for index, call in enumerate(calls) for expert, x in call.streams.items()}
        tensors |= {f"relevance.{name}": x for name, x in (self._relevance or {}).items()}
        with whole_file(path) as partial:
            write_tensors(partial, tensors)

    def load(self, path: Path) -> None:
        """See ours.Activations.

        Raises:
            InputError: another version of this program left it.
        """
        file = TensorFile(path)
        try:
            wanted = {f"{which}.{index}.{expert}": tuple(x.shape) for which, calls in self._states()
                      for index, call in enumerate(calls) for expert, x in call.streams.items()}
            kept = [name for name in file.specs if name.startswith("relevance.")]
            if {name: spec.shape for name, spec in file.specs.items() if name not in kept} != wanted \
                    or bool(kept) != (self._weigh is not None):
                raise InputError(f"{path} was left by another version of lance-quant: delete {path.parent} and start "
                                 "again")
            self._exact, self._packed = (
                [replace(call, streams={expert: file.read(f"{which}.{index}.{expert}") for expert in call.streams})
                 for index, call in enumerate(calls)]
                for which, calls in self._states())
            self._relevance = {name.removeprefix("relevance."): file.read(name) for name in kept} or None
        finally:
            file.close()

    def _states(self) -> list[tuple[str, list[Call]]]:
        return [("exact", self._exact), ("packed", self._packed)]


class _Zero(nn.Module):
    """An MLP that adds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def replay_of(src: Path, paths: Sequence[Path], device: torch.device) -> Replay:
    """The replay of some captures of a checkpoint.

    Raises:
        InputError: see `capture.load`; also a checkpoint that is none.
    """
    config, calls, facts = load_of(src, paths)

    def weigh(running: Sequence[Call]) -> Relevance:
        with Checkpoint(src) as source:
            return token_weights.of_checkpoint(source, config, running, device)

    return Replay(config, calls, device, facts, weigh)
