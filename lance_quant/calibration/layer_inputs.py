"""Layer inputs for GPTQ (arXiv:2210.17323): captured requests run again layer by layer, float and packed side by side.

GPTQ needs the Gram matrix of every linear's inputs: 485 MB for one real down_proj, 35 GB for all. So the inputs of
layer 0 are stored (capture.py) and every layer's are made again when its turn comes, with the real attention: once
through the float layer and once through the layer as it is packed so far, as GPTAQ does (arXiv:2504.02692). Two layers'
weights and one down_proj's Gram matrix are in memory at a time. Tokens count by token_weights.py.

The light way runs the float layer alone, on few tokens that count the same, and takes down_proj's inputs as correlated
in blocks only: an eighth of the time, most of the gain (docs/experiments.md).

A job takes these steps:

    weigh_tokens()                    once, before the first layer; reads all layers twice
    for every layer:
        begin_layer(index, target)
        gram_stats(group, current)    of its attention's linears
        pass_attention(current)
        gram_stats(group, current)    of its MLPs' linears
        end_layer(current)            behind it, `save` and `load` are allowed
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any, cast

import torch

from lance_quant.calibration import token_weights
from lance_quant.calibration.capture import load_of
from lance_quant.calibration.decoder_calls import DecoderCall, batched, thinned
from lance_quant.calibration.gram import GramAccumulator, GramStats
from lance_quant.calibration.hidden_states import Fed, HiddenStates, Piece
from lance_quant.calibration.token_weights import TokenWeights
from lance_quant.errors import InputError
from lance_quant.formats import layout
from lance_quant.formats.weights import Weights
from lance_quant.lance.config import LanceConfig
from lance_quant.storage.atomic import whole_file
from lance_quant.storage.tensor_file import Checkpoint, TensorFile, write_tensors

BATCH = 4096  # tokens of calls that run as one
LIGHT_TOKENS = 4096  # of the light way, of answers and of latents each; half as many lose 9 %, twice as many gain 5 %
_STORED = "token_weights."  # in front of a linear's name, in a stored state


class Step(Enum):
    """Where a job is."""

    UNWEIGHED = "before weigh_tokens"
    BETWEEN = "between two layers"
    ATTENTION = "in front of a layer's attention"
    MLP = "between a layer's attention and its MLPs"


class LayerInputs:
    """The inputs of each layer in turn, in the float model and in the packed one; see the module docstring.

    Args:
        config: of the model.
        calls: of one capture or several, with distinct row numbers.
        device: where layers run and Gram matrices are summed; hidden states wait on the CPU.
        facts: which captures these are, plain values for the meta.
        weigh: gives the weight of every token in calls as they are run; None: all count the same.
        light: see the module docstring; tokens are not weighed then.

    A step out of order is a bug: RuntimeError.
    """

    def __init__(self, config: LanceConfig, calls: Sequence[DecoderCall], device: torch.device,
                 facts: Sequence[dict[str, Any]] = (),
                 weigh: Callable[[Sequence[DecoderCall]], TokenWeights] | None = None, light: bool = False):
        assert weigh is None or not light
        self._device, self.facts = device, facts
        together = batched(thinned(calls, LIGHT_TOKENS) if light else calls, BATCH)
        self._exact = HiddenStates(config, together, device)
        self._packed = None if light else HiddenStates(config, together, device)
        self._block = config.hidden_size  # of the light way: one but for down_proj, of which Lance has six
        self._weigh = weigh
        self._token_weights: TokenWeights | None = None
        self._step = Step.BETWEEN if weigh is None else Step.UNWEIGHED
        self._index, self._target = -1, Weights()  # of the layer in hand
        self._measured: dict[str, list[GramStats]] = {}  # of the attention output's other expert

    def weigh_tokens(self) -> None:
        """Measure as how many every token counts, with the inputs of layer 0: a forward and a backward pass over all
        layers. `load` brings what an earlier run measured instead; without `weigh` there is nothing to do."""
        if self._weigh is not None:
            self._require(Step.UNWEIGHED)
            self._token_weights = self._weigh(self._exact.calls)
            self._step = Step.BETWEEN

    def begin_layer(self, index: int, target: Weights) -> None:
        """Take up a layer; `target` are its float weights, scales moved."""
        self._require(Step.BETWEEN)
        self._index, self._target, self._step = index, target, Step.ATTENTION

    @torch.no_grad()
    def gram_stats(self, group: layout.Group, current: Weights) -> list[GramStats] | None:
        """Gram matrices of the inputs of each of a group's linears; None where no token reaches them.

        Args:
            group: of the attention before `pass_attention`, of an MLP after it. Where attention was run, both experts
                are measured at once; elsewhere one at a time, since a Gram matrix of down_proj is as large as a layer.
            current: the layer's weights with those linears replaced that are packed already.

        Returns:
            One GramStats for each linear, the same one where tokens count the same.
        """
        self._require(Step.MLP if group.place.startswith("mlp") else Step.ATTENTION)
        reached = {expert for expert in layout.EXPERTS if self._exact.tokens_of(expert)}
        if group.expert not in reached:
            return None
        if group.name not in self._measured:
            wanted = [other for other in layout.groups(self._index) if other.place == group.place
                      and other.expert in reached and (group.place == "attn_out" or other.expert == group.expert)]
            self._measured = self._measure(wanted, current)
        return self._measured.pop(group.name)

    @torch.no_grad()
    def pass_attention(self, current: Weights) -> None:
        """Go on to the MLPs: the states become those behind this layer's attention."""
        self._require(Step.ATTENTION)
        self._go_on("attn_out", current)
        self._step = Step.MLP

    @torch.no_grad()
    def end_layer(self, current: Weights) -> None:
        """Go on to the next layer: this one's outputs become its inputs."""
        self._require(Step.MLP)
        self._go_on("mlp_out", current)
        self._target, self._step = Weights(), Step.BETWEEN

    def _require(self, step: Step) -> None:
        if self._step is not step:
            raise RuntimeError(f"layer inputs are {self._step.value}, not {step.value}")

    def _measure(self, groups: Sequence[layout.Group], current: Weights) -> dict[str, list[GramStats]]:
        # What is packed so far shows in the inputs only behind the first packed linear of the model.
        paired = self._packed is not None and (
            any(a is not b for a, b in zip(self._exact.calls, self._packed.calls, strict=True))
            or any(current[name] is not self._target[name] for name in self._target))
        grams = {group.expert: self._accumulators(group, paired) for group in groups}
        for exact, packed in self._pieces(groups, current):
            for accumulator in dict.fromkeys(grams[packed.expert]):
                accumulator.add(packed.inputs, exact.inputs, exact.stream - packed.stream)
        done = {one: one.stats() for one in dict.fromkeys(one for own in grams.values() for one in own)}
        return {group.name: [done[one] for one in grams[group.expert]] for group in groups}

    def _pieces(self, groups: Sequence[layout.Group], current: Weights) -> Iterator[tuple[Piece, Piece]]:
        """What linears of one place read in the float and in the packed model, which is the float one in the light
        way. Where it leads to the next step, the float model takes that, and the packed one keeps what it can."""
        place, packed_model = groups[0].place, self._packed
        if place == "attn_in" or place == "mlp_in":
            yield from _pairs(self._exact.normed(groups[0], self._target),
                              None if packed_model is None else packed_model.normed(groups[0], current))
            return
        fed, experts = cast(Fed, place), {group.expert for group in groups}
        linears = {group.expert: self._target[f"{group.linears[0]}.weight"] for group in groups}
        keeps = packed_model is not None and packed_model.room_for(experts, linears[groups[0].expert].shape[1])
        followed = None if packed_model is None else packed_model.fed(fed, self._index, experts, current)
        for exact, packed in _pairs(self._exact.fed(fed, self._index, experts, self._target), followed):
            yield exact, packed
            self._exact.pass_by(exact, linears[exact.expert])
            if packed_model is not None and keeps:
                packed_model.keep(packed)

    def _accumulators(self, group: layout.Group, paired: bool) -> list[GramAccumulator]:
        """One for each linear; the same one where tokens count the same."""
        weight = self._target[f"{group.linears[0]}.weight"]
        fed = weight if group.norm is None else None
        if self._packed is None:
            one = GramAccumulator(weight.shape[1], self._device, paired=False, block=self._block)
            return [one] * len(group.linears)
        if self._token_weights is None:
            return [GramAccumulator(weight.shape[1], self._device, paired, fed)] * len(group.linears)
        return [GramAccumulator(weight.shape[1], self._device, paired, fed, self._token_weights[name])
                for name in group.linears]

    def _go_on(self, place: Fed, current: Weights) -> None:
        self._exact.go_on(place, self._index, self._target)
        if self._packed is not None:
            self._packed.go_on(place, self._index, current)

    def hidden(self) -> Iterator[tuple[DecoderCall, DecoderCall]]:
        """The calls as they stand, in the float model and in the packed one: after the last layer, its outputs.

        Not in the light way, where the packed model is not run.
        """
        assert self._packed is not None
        return zip(self._exact.calls, self._packed.calls, strict=True)

    def save(self, path: Path) -> None:
        """Store the hidden states of both models and the token weights, so that another run can go on from here."""
        self._require(Step.BETWEEN)
        path.unlink(missing_ok=True)  # of a layer that was not journalled
        tensors = {f"{which}.{index}.{expert}": x for which, calls in self._states()
                   for index, call in enumerate(calls) for expert, x in call.streams.items()}
        tensors |= {_STORED + name: x for name, x in (self._token_weights or {}).items()}
        with whole_file(path) as partial:
            write_tensors(partial, tensors)

    def load(self, path: Path) -> None:
        """Go on from what `save` stored, in place of `weigh_tokens`.

        Raises:
            InputError: another version of this program left it.
        """
        with TensorFile(path) as file:
            wanted = {f"{which}.{index}.{expert}": tuple(x.shape) for which, calls in self._states()
                      for index, call in enumerate(calls) for expert, x in call.streams.items()}
            kept = [name for name in file.specs if name.startswith(_STORED)]
            if {name: spec.shape for name, spec in file.specs.items() if name not in kept} != wanted \
                    or bool(kept) != (self._weigh is not None):
                raise InputError(f"{path} was left by another version of lance-quant: delete {path.parent} and start "
                                 "again")
            for which, model in self._models():
                model.calls = [replace(call, streams={expert: file.read(f"{which}.{index}.{expert}")
                                                      for expert in call.streams})
                               for index, call in enumerate(model.calls)]
            self._token_weights = {name.removeprefix(_STORED): file.read(name) for name in kept} or None
        self._step = Step.BETWEEN

    def _models(self) -> list[tuple[str, HiddenStates]]:
        return [(name, model) for name, model in (("exact", self._exact), ("packed", self._packed))
                if model is not None]

    def _states(self) -> list[tuple[str, list[DecoderCall]]]:
        return [(name, model.calls) for name, model in self._models()]


def _pairs(exact: Iterator[Piece], packed: Iterator[Piece] | None) -> Iterator[tuple[Piece, Piece]]:
    """Pieces side by side; each with itself where there is one model."""
    return ((piece, piece) for piece in exact) if packed is None else zip(exact, packed, strict=True)


def layer_inputs_of(src: Path, paths: Sequence[Path], device: torch.device, light: bool = False) -> LayerInputs:
    """The layer inputs of some captures of a checkpoint, with tokens weighed by its gradients, or the `light` way.

    Raises:
        InputError: a capture that is none, of another format or of another model; a checkpoint that is none.
    """
    config, calls, facts = load_of(src, paths)

    def weigh(running: Sequence[DecoderCall]) -> TokenWeights:
        with Checkpoint(src) as source:
            return token_weights.of_checkpoint(source, config, running, device)

    return LayerInputs(config, calls, device, facts, None if light else weigh, light)
