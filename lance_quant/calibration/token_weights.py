"""Token weights for GPTQ's Hessian, from squared output gradients (GuidedQuant, arXiv:2505.07004).

GPTQ minimises the error of a linear's output, summed over tokens as if all mattered the same. They do not: an answer is
read off its last tokens alone, in the last layer nothing else of queries and MLPs is ever used, and of a picture an
answer needs a few places. So every token counts by the squared gradient of the model's outputs (gradients.py) with
respect to what the linear gives for it, a Fisher diagonal over tokens: linears that read the same inputs, like q, k and
v, then have Gram matrices of their own. A part counts all tokens the same (EVEN), since gradients of few probes are
noisy and other requests come.

Measured on lance-nano, docs/experiments.md: a third to two fifths less KL of answers, a little less velocity error.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lance_quant.calibration.decoder_calls import DecoderCall, with_outputs, with_what_they_read
from lance_quant.calibration.gradients import Gradients, OutputHeads, Use, inside, layers_of, output_heads_of
from lance_quant.formats import layout
from lance_quant.formats.layout import Expert
from lance_quant.formats.weights import Weights
from lance_quant.lance.config import LanceConfig
from lance_quant.lance.mot import DecoderLayer
from lance_quant.lance.progress import progress
from lance_quant.storage.tensor_file import Checkpoint

log = logging.getLogger("lance_quant")

# Linear -> float32 [tokens]: as how many tokens each counts, 1 on average; tokens are those of its expert's streams in
# all calls, in order.
TokenWeights = Mapping[str, Tensor]

PROBES = 4  # draws of r; a single one leaves 2 to 7 % more KL
EVEN = 0.1  # what all tokens count alike; three tenths leave 2 to 5 % more KL
# Tokens whose inputs of all layers are kept at a time, 1.2 GB of Lance_3B. All layers are read twice for each chunk.
CHUNK = 8192


def of_checkpoint(source: Checkpoint, config: LanceConfig, calls: Sequence[DecoderCall],
                  device: torch.device) -> TokenWeights:
    """The token weights of captured calls of a checkpoint, see `measure`."""
    return measure(config, lambda needed: layers_of(source, device, needed), layout.num_layers(source.specs),
                   output_heads_of(source, config), calls, device)


def measure(config: LanceConfig, layers: Callable[[Sequence[DecoderCall]], Callable[[int], Weights]], count: int,
            heads: OutputHeads, calls: Sequence[DecoderCall], device: torch.device) -> TokenWeights:
    """As how many every token of some calls counts, for every linear: float32 [tokens], 1 on average.

    Args:
        config, count, heads, device: see Gradients.
        layers: given calls, what reads a layer for them; see Gradients.
        calls: in order, with everything that they read. Where no answer and no latent comes out of them, all tokens
            count the same.
    """
    squares, started = _SquaredGradients(calls), time.perf_counter()
    parts = list(_chunks(calls))
    with progress(total=2 * count * len(parts), desc="weigh tokens", unit="layer", disable=None) as bar:
        for expert, places in parts:
            kept = with_what_they_read(calls, places)
            needed = [calls[place] for place in kept]
            read = layers(needed)

            def counted(index: int, read: Callable[[int], Weights] = read) -> Weights:
                bar.update()
                return read(index)

            wanted = {kept.index(place): expert for place in places}
            gradients = Gradients(config, counted, count, heads, needed, wanted, device, PROBES)
            for index in reversed(range(count)):
                squares.add_layer(gradients, index, counted(index), kept, expert)
            squares.energy[expert] = squares.energy.get(expert, 0.0) + gradients.energy[expert]
    log.info("weighed the tokens of %d calls in %d parts: %.0f s", len(calls), len(parts),
             time.perf_counter() - started)
    return squares.token_weights(count)


def _chunks(calls: Sequence[DecoderCall]) -> Iterator[tuple[Expert, list[int]]]:
    """The calls that something comes out of, by expert, as many at a time as CHUNK allows with what they read."""
    outputs = with_outputs(calls)
    for expert in layout.EXPERTS:
        part: list[int] = []
        for place in (place for place, other in outputs.items() if other == expert):
            longer = [*part, place]
            if part and sum(calls[read].tokens for read in with_what_they_read(calls, longer)) > CHUNK:
                yield expert, part
                longer = [place]
            part = longer
        if part:
            yield expert, part


class _SquaredGradients:
    """Sums of squared gradients of every linear's output, by what comes out: answers and latents.

    energy: of what came out so far, by expert
    """

    def __init__(self, calls: Sequence[DecoderCall]):
        self.energy: dict[Expert, float] = {}
        self._found: dict[tuple[Expert, str], Tensor] = {}
        self._places: dict[Expert, list[slice | None]] = {}  # of each call's tokens, by the expert that runs them
        self._tokens: dict[Expert, int] = {}
        for expert in layout.EXPERTS:
            end, places = 0, []
            for call in calls:
                own = len(call.rows) * call.streams[expert].shape[1] if expert in call.streams else None
                places.append(None if own is None else slice(end, end + own))
                end += own or 0
            self._places[expert], self._tokens[expert] = places, end

    def add_layer(self, gradients: Gradients, index: int, weights: Weights, kept: Sequence[int],
                  out: Expert) -> None:
        """Go back through a layer.

        Args:
            kept: which calls the gradients are of.
            out: whose output they are of.
        """
        linears = [(name, group.expert) for group in layout.groups(index) for name in group.linears
                   if f"{name}.weight" in weights]

        def watch(layer: DecoderLayer, running: Sequence[int]) -> tuple[list[Tensor], Use]:
            watched: list[Tensor] = []
            seen: list[tuple[str, slice]] = []
            for name, expert in linears:
                own = (self._places[expert][kept[call]] for call in running)
                places = iter([place for place in own if place is not None])

                def observe(module: object, args: object, output: Tensor, name: str = name,
                            places: Iterator[slice] = places) -> None:
                    seen.append((name, next(places)))
                    watched.append(output)

                layer.get_submodule(inside(name, index)).register_forward_hook(observe)

            def use(found: list[Tensor]) -> None:
                for (name, place), gradient in zip(seen, found, strict=True):
                    self._of(out, name)[place] += gradient.square().sum(-1).flatten().cpu() \
                        * (gradients.energy[out] / PROBES)

            return watched, use

        gradients.of_layer(index, weights, watch)

    def _of(self, out: Expert, name: str) -> Tensor:
        if (out, name) not in self._found:
            self._found[out, name] = torch.zeros(self._tokens[layout.expert_of(name)])
        return self._found[out, name]

    def token_weights(self, count: int) -> TokenWeights:
        """What was added to `count` layers, answers and latents relative to their energy."""
        return {name: self._counts(sum((self._found[out, name] / (self.energy[out] or 1.0) for out in self.energy
                                        if (out, name) in self._found), torch.zeros(self._tokens[expert])))
                for name in layout.linears(count) if self._tokens[expert := layout.expert_of(name)]}

    @staticmethod
    def _counts(squares: Tensor) -> Tensor:
        mean = float(squares.mean())
        return torch.ones_like(squares) if mean == 0 else squares.mul((1 - EVEN) / mean).add_(EVEN)
