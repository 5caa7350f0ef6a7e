"""Output gradients for Fisher information: a backward pass over captured calls, one layer in memory at a time.

The squares of these gradients are the diagonal of a Gauss-Newton (Fisher) matrix, estimated by Hutchinson's probes, as
in GuidedQuant (arXiv:2505.07004).

What comes out are the final hidden states that an answer's tokens are read off, and the velocities of a denoising step.
Let y be either, and r random signs on it. The gradient of the sum of r * y with respect to anything inside, squared and
averaged over r, says how much errors there change y, to first order. Both y count relative to their energy, so that
answers and pictures weigh the same.

Layers are run forward once, with their inputs kept, and then backward one after another, so that one layer's weights
are in memory at a time, with the graph of some requests.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lance_quant.calibration.decoder_calls import DecoderCall, requests
from lance_quant.formats import layout
from lance_quant.formats.layout import SUFFIX, Expert
from lance_quant.formats.weights import Weights
from lance_quant.lance.config import LanceConfig
from lance_quant.lance.mot import DecoderLayer, RMSNorm, Streams
from lance_quant.storage.tensor_file import Checkpoint

# What turns an expert's last hidden states into what comes out: the final norm and, for latents, the velocity.
OutputHeads = Mapping[Expert, nn.Module]
Use = Callable[[list[Tensor]], None]
# Given the layer and the places of the calls that it is about to run: what to differentiate by, a list that may still
# grow while the layer runs, and what takes the gradients, once per probe.
Watch = Callable[[DecoderLayer, Sequence[int]], tuple[list[Tensor], Use]]

TOGETHER = 4096  # tokens of requests whose graph of a layer is in memory at once; a single one may have more
_KEPT = torch.bfloat16  # of layer inputs and gradients between layers: 8 bits of them say enough


class _GraphRow:
    """A cache row (lance.cache.CacheRow) that a gradient can pass: nothing is overwritten."""

    mask = None

    def __init__(self) -> None:
        self.length = 0
        self._past: tuple[Tensor, Tensor] | None = None

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep a call's keys and values, and give all that the row has, [heads, entries, width] each, of the one layer
        that a row serves here."""
        end = self.length + keys.shape[1]
        if self._past is not None:
            keys, values = (torch.cat([past[:, :self.length], new], 1)
                            for past, new in zip(self._past, (keys, values), strict=True))
        assert keys.shape[1] == end, "a call reads what no call before it left"
        self._past = keys, values
        return keys, values


class Gradients:
    """Gradients at the inputs of every linear, layer by layer from the last one back.

    Args:
        config: sizes of the model.
        layers: the tensors of a layer, float32 on `device`; of the experts that `calls` have tokens for.
        count: number of layers.
        heads: of the experts that `wanted` names.
        calls: in order, with everything that they read.
        wanted: place in `calls` -> the expert whose output is looked at, of calls that no other reads. Of "und" these
            are the decoded tokens.
        device: where layers run; hidden states wait on the CPU.
        probes: draws of r.
    """

    def __init__(self, config: LanceConfig, layers: Callable[[int], Weights], count: int, heads: OutputHeads,
                 calls: Sequence[DecoderCall], wanted: Mapping[int, Expert], device: torch.device, probes: int):
        self.config, self.calls, self.wanted, self._heads, self._device = config, calls, wanted, heads, device
        self._groups = _groups(calls)
        self._inputs: list[list[Streams]] = []
        states = [call.streams for call in calls]
        with torch.no_grad():
            for index in range(count):
                self._inputs.append([_stored(streams) for streams in states])
                layer = layer_around(config, index, layers(index))
                states = [{expert: x.cpu() for expert, x in streams.items()} for streams in self.run(layer, states)]
            self.energy = {expert: sum(float(self._output(place, states[place][expert]).square().sum())
                                       for place, other in wanted.items() if other == expert)
                           for expert in sorted(set(wanted.values()))}
        # By probe and call: the gradient of what the next layer takes in.
        self._upstream = list(self._probes(states, probes))

    def run(self, layer: DecoderLayer, states: Sequence[Streams],
            places: Sequence[int] | None = None) -> Iterator[Streams]:
        """The outputs of a layer, call by call.

        Args:
            states: its inputs, of the calls at `places`; default all calls.
        """
        calls = self.calls if places is None else [self.calls[place] for place in places]
        rows = {row: _GraphRow() for call in calls for row in call.rows}
        for call, streams in zip(calls, states, strict=True):
            for row, length in zip(call.rows, call.lengths, strict=True):
                rows[row].length = length
            cos, sin = call.rope
            yield layer({expert: x.to(self._device) for expert, x in streams.items()},
                        (cos.to(self._device), sin.to(self._device)), [rows[row] for row in call.rows], 0, call.causal)

    def _output(self, place: int, x: Tensor) -> Tensor:
        """y of a wanted call, from what the last layer gives of its expert's stream."""
        expert = self.wanted[place]
        return self._heads[expert](x[:, -self.calls[place].decoded:] if expert == "und" else x)

    def _probes(self, states: Sequence[Streams], probes: int) -> Iterator[list[Streams]]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(probes):
            out = [{expert: torch.zeros_like(x) for expert, x in streams.items()} for streams in states]
            for place, expert in self.wanted.items():
                x = states[place][expert].detach().requires_grad_()
                with torch.enable_grad():
                    y = self._output(place, x)
                    signs = torch.randint(2, y.shape, generator=generator).mul_(2).sub_(1)
                    scale = self.energy[expert] ** 0.5 or 1.0
                    (out[place][expert],) = torch.autograd.grad((y * signs).sum() / scale, x)
            yield [_stored(streams) for streams in out]

    def of_layer(self, index: int, weights: Weights, watch: Watch) -> None:
        """Go back through a layer, some requests at a time; layers are asked for from the last to the first.

        Args:
            weights: the layer's tensors, float32.
            watch: what is looked at. Called anew for every group of requests, whose gradients are independent: squares
                of several add up.
        """
        assert index == len(self._inputs) - 1, "layers are asked for from the last to the first"
        kept = self._inputs.pop()
        for places in self._groups:
            with torch.enable_grad():
                layer = layer_around(self.config, index, weights)
                watched, use = watch(layer, places)
                inputs = [{expert: x.to(self._device, torch.float32).requires_grad_()
                           for expert, x in kept[place].items()} for place in places]
                outputs = list(self.run(layer, inputs, places))
            flat = [x for given in inputs for x in given.values()]
            for probe, upstream in enumerate(self._upstream):
                seeds = [upstream[place][expert].to(self._device, torch.float32)
                         for place, out in zip(places, outputs, strict=True) for expert in out]
                found = torch.autograd.grad([x for out in outputs for x in out.values()], [*watched, *flat], seeds,
                                            retain_graph=probe + 1 < len(self._upstream), materialize_grads=True)
                use(list(found[:len(watched)]))
                left = iter(found[len(watched):])
                for place, given in zip(places, inputs, strict=True):
                    upstream[place] = _stored({expert: next(left) for expert in given})


def _groups(calls: Sequence[DecoderCall]) -> list[list[int]]:
    """Places of requests that run together."""
    place_of = {id(call): place for place, call in enumerate(calls)}
    out: list[list[int]] = []
    tokens = 0
    for request in requests(calls):
        own = sum(call.tokens for call in request)
        if not out or tokens + own > TOGETHER:
            out.append([])
            tokens = 0
        out[-1] += [place_of[id(call)] for call in request]
        tokens += own
    return out


def _stored(streams: Streams) -> Streams:
    return {expert: x.detach().to("cpu", _KEPT) for expert, x in streams.items()}


def layer_around(config: LanceConfig, index: int, weights: Weights) -> DecoderLayer:
    """The runtime's layer around these tensors, without copying them."""
    with torch.device("meta"):
        layer = DecoderLayer(config)
    given = {inside(name, index): tensor for name, tensor in weights.items()}
    layer.load_state_dict({**layer.state_dict(), **given}, assign=True)  # an expert that is not given stays on meta
    return layer.requires_grad_(False)


def inside(name: str, index: int) -> str:
    """The name that a tensor or a module of a layer has inside of it."""
    return name.removeprefix(f"{layout.LAYERS}.{index}.")


def layers_of(source: Checkpoint, device: torch.device, calls: Sequence[DecoderCall]) -> Callable[[int], Weights]:
    """What reads the tensors of a layer, float32 on `device`, that some calls need."""
    experts = {expert for call in calls for expert in call.streams}
    return lambda index: {name: source.read(name, torch.float32, device)
                          for name in layout.of_layer(source.specs, index)
                          if layout.expert_of(name) in experts}


def output_heads_of(source: Checkpoint, config: LanceConfig) -> OutputHeads:
    """The final norms, and the velocity behind that of latents, where there is one; on the CPU."""
    norms = {expert: norm_around(source.read(f"language_model.model.norm{suffix}.weight", torch.float32),
                                 config.rms_norm_eps) for expert, suffix in SUFFIX.items()}
    if layout.understands_only(source.specs):
        return {"und": norms["und"]}
    return {"und": norms["und"], "gen": nn.Sequential(norms["gen"], _velocity(source))}


def _velocity(source: Checkpoint) -> nn.Linear:
    weight, bias = (source.read(f"llm2vae.{part}", torch.float32) for part in ("weight", "bias"))
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight, linear.bias = (nn.Parameter(x, requires_grad=False) for x in (weight, bias))
    return linear


def norm_around(weight: Tensor, eps: float) -> RMSNorm:
    """A norm with this weight [hidden], without copying it."""
    norm = RMSNorm(len(weight), eps)
    norm.weight = nn.Parameter(weight, requires_grad=False)
    return norm
