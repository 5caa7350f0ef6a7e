"""What an error in a weight does to what comes out of the model, measured on captured inputs.

What comes out are the final hidden states of an answer's tokens, and the velocities of a denoising step. Let y be
either, and r random signs on it. The gradient G of the sum of r * y with respect to a weight gives the change of y by
an error D of that weight: the mean of (sum_ij G_ij D_ij)^2 over r is |change|^2, to first order. Where errors are not
correlated this is sum_ij F_ij D_ij^2 with F = mean of G^2, for every rounding of the weight at once. Both y count
relative to their energy, so that answers and pictures weigh the same.

Layers are run forward once, with their inputs kept, and then backward one after another as `budget.measure` asks, so
that one layer's weights and gradients are in memory at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lance_quant import layout
from lance_quant.capture import Call, layer_around, load_all
from lance_quant.errors import InputError
from lance_quant.lance.config import LanceConfig
from lance_quant.lance.mot import Layer, RMSNorm, Streams
from lance_quant.layout import SUFFIX, Expert
from lance_quant.ours import Weights
from lance_quant.stats import model_fingerprint
from lance_quant.tensorfile import Checkpoint

PROBES = 4  # draws of r; the sum over a weight's elements averages as well
# Tokens, of answers and of latents each, whose hidden states are looked at; what these requests read comes on top.
TOKENS = 1024


class _GraphRow:
    """A cache row (lance.cache.CacheRow) that a gradient can pass: nothing is overwritten."""

    mask = None

    def __init__(self) -> None:
        self.length = 0
        self._past: tuple[Tensor, Tensor] | None = None

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """See CacheRow; for the one layer that a row serves here."""
        if self._past is not None:
            keys, values = (torch.cat([past[:, :self.length], new], 1)
                            for past, new in zip(self._past, (keys, values), strict=True))
        assert keys.shape[1] > self.length, "a call reads what no call before it left"
        self._past = keys, values
        return keys, values


class CapturedEffects:
    """F of every linear; see the module docstring and budget.Effects.

    Args:
        source: the float checkpoint that was captured; must stay open.
        config: its sizes.
        calls: of the captures.
        device: where layers run; hidden states wait on the CPU.

    Raises:
        InputError: only one of answers and latents was captured.
    """

    def __init__(self, source: Checkpoint, config: LanceConfig, calls: Sequence[Call], device: torch.device):
        self._source, self._config, self._device = source, config, device
        self._calls, self._wanted = selected(calls)
        self._inputs: list[list[Streams]] = []
        self._upstream: list[list[Streams]] = []  # by probe and call: the gradient of what the next layer takes in

    def of_layer(self, index: int, weights: Weights) -> dict[str, Tensor]:
        """See budget.Effects."""
        if not self._inputs:
            self._run_forward()
        assert index == len(self._inputs) - 1, "layers are asked for from the last to the first"
        with torch.enable_grad():
            layer = layer_around(self._config, index, weights)
            linears = {name: layer.get_submodule(name.removeprefix(f"{layout.LAYERS}.{index}.")).weight
                       for group in layout.groups(index) for name in group.linears if f"{name}.weight" in weights}
            for weight in linears.values():
                weight.requires_grad_(True)
            inputs = [{expert: x.to(self._device).detach().requires_grad_() for expert, x in streams.items()}
                      for streams in self._inputs.pop()]
            outputs = list(self._run(layer, inputs))
            return self._back(linears, inputs, outputs)

    def _back(self, linears: dict[str, Tensor], inputs: list[Streams], outputs: list[Streams]) -> dict[str, Tensor]:
        effects = {name: torch.zeros_like(weight) for name, weight in linears.items()}
        for probe, upstream in enumerate(self._upstream):
            seeds = [upstream[call][expert].to(self._device) for call, out in enumerate(outputs) for expert in out]
            found = iter(torch.autograd.grad(
                [x for out in outputs for x in out.values()],
                [*linears.values(), *(x for given in inputs for x in given.values())], seeds,
                retain_graph=probe + 1 < len(self._upstream), materialize_grads=True))
            for name in linears:
                effects[name] += next(found).square() / len(self._upstream)
            self._upstream[probe] = [{expert: next(found).cpu() for expert in given} for given in inputs]
        return effects

    @torch.no_grad()
    def _run_forward(self) -> None:
        states = [call.streams for call in self._calls]
        for index in range(layout.num_layers(self._source.specs)):
            self._inputs.append(states)
            weights = {name: self._source.read(name, torch.float32, self._device)
                       for name in layout.of_layer(self._source.specs, index)}
            outputs = self._run(layer_around(self._config, index, weights), states)
            states = [{expert: x.cpu() for expert, x in streams.items()} for streams in outputs]
        self._upstream = list(self._probes(states))

    def _run(self, layer: Layer, states: Sequence[Streams]) -> Iterator[Streams]:
        rows = {row: _GraphRow() for call in self._calls for row in call.rows}
        for call, streams in zip(self._calls, states, strict=True):
            for row, length in zip(call.rows, call.lengths, strict=True):
                rows[row].length = length
            yield layer({expert: x.to(self._device) for expert, x in streams.items()},
                        tuple(x.to(self._device) for x in call.rope), [rows[row] for row in call.rows], 0, call.causal)

    def _probes(self, states: Sequence[Streams]) -> Iterator[list[Streams]]:
        """Per draw of r: the gradient of r * y with respect to what the last layer gives."""
        ends = self.ends()
        energy = {expert: sum(float(ends[expert](states[call][expert]).square().sum())
                              for call, other in self._wanted.items() if other == expert) for expert in SUFFIX}
        generator = torch.Generator().manual_seed(0)
        for _ in range(PROBES):
            out = [{expert: torch.zeros_like(x) for expert, x in streams.items()} for streams in states]
            for call, expert in self._wanted.items():
                x = states[call][expert].detach().requires_grad_()
                with torch.enable_grad():
                    y = ends[expert](x)
                    signs = torch.randint(2, y.shape, generator=generator).mul_(2).sub_(1)
                    (out[call][expert],) = torch.autograd.grad((y * signs).sum() / energy[expert] ** 0.5, x)
            yield out

    def ends(self) -> dict[Expert, nn.Module]:
        """What turns an expert's last hidden states into what comes out."""
        return {"und": self._norm("und"), "gen": nn.Sequential(self._norm("gen"), self._velocity())}

    def _velocity(self) -> nn.Linear:
        weight, bias = (self._source.read(f"llm2vae.{part}", torch.float32) for part in ("weight", "bias"))
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        linear.weight, linear.bias = (nn.Parameter(x, requires_grad=False) for x in (weight, bias))
        return linear

    def _norm(self, expert: Expert) -> RMSNorm:
        weight = self._source.read(f"language_model.model.norm{SUFFIX[expert]}.weight", torch.float32)
        norm = RMSNorm(len(weight), self._config.rms_norm_eps)
        norm.weight = nn.Parameter(weight, requires_grad=False)
        return norm


def selected(calls: Sequence[Call]) -> tuple[list[Call], dict[int, Expert]]:
    """Some requests' last calls, evenly taken from all, about TOKENS tokens for either expert, and all calls that these
    read, in order; and which of them are last calls, by place, with the expert whose output is wanted.

    Raises:
        InputError: only one of answers and latents was captured.
    """
    last = _last_calls(calls)
    wanted: set[int] = set()
    for expert, what in (("und", "answers: capture an x2t task"), ("gen", "latents: capture a generation task")):
        own = [place for place in last if ("gen" in calls[place].streams) == (expert == "gen")]
        if not own:
            raise InputError(f"--bits_budget needs captures of both experts, and these hold no {what} as well")
        count = max(1, TOKENS * len(own) // sum(calls[place].tokens for place in own))
        wanted |= set(own[::max(1, len(own) // count)][:count])
    kept = _with_what_they_read(calls, wanted)
    places = {place: index for index, place in enumerate(kept)}
    return ([replace(calls[place], streams=dict(calls[place].streams)) for place in kept],
            {places[place]: "gen" if "gen" in calls[place].streams else "und" for place in sorted(wanted)})


def _last_calls(calls: Sequence[Call]) -> list[int]:
    """Places of the calls that no later call reads."""
    out, read = [], {}  # read: row -> the longest past that a later call reads
    for place in reversed(range(len(calls))):
        call = calls[place]
        if not any(read.get(row, 0) > length for row, length in zip(call.rows, call.lengths, strict=True)):
            out.append(place)
        read.update({row: max(length, read.get(row, 0)) for row, length in zip(call.rows, call.lengths, strict=True)})
    return out[::-1]


def _with_what_they_read(calls: Sequence[Call], wanted: set[int]) -> list[int]:
    kept, read = [], {}
    for place in reversed(range(len(calls))):
        call = calls[place]
        if place in wanted or any(read.get(row, 0) > length
                                  for row, length in zip(call.rows, call.lengths, strict=True)):
            kept.append(place)
            read.update({row: max(length, read.get(row, 0))
                         for row, length in zip(call.rows, call.lengths, strict=True)})
    return kept[::-1]


def effects_of(src: Path, paths: Sequence[Path], device: torch.device) -> CapturedEffects:
    """The effects on some captures of a checkpoint.

    Raises:
        InputError: see capture.load and CapturedEffects.
    """
    source = Checkpoint(src)
    config, calls, _ = load_all(paths, model_fingerprint(source))
    return CapturedEffects(source, config, calls, device)
