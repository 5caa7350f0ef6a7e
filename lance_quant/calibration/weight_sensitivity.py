"""What an error in a weight does to what comes out of the model, measured on captured inputs.

With G the gradient of the outputs with respect to a weight (gradients.py), an error D of that weight changes them by
the mean of (sum_ij G_ij D_ij)^2 over the probes, to first order. Where errors are not correlated this is
sum_ij F_ij D_ij^2 with F = mean of G^2, for every rounding of the weight at once.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lance_quant.calibration.capture import load_of
from lance_quant.calibration.decoder_calls import Call, with_outputs, with_what_they_read
from lance_quant.calibration.gradients import Gradients, Use, ends_of, inside, layers_of
from lance_quant.errors import InputError
from lance_quant.formats import layout
from lance_quant.formats.layout import Expert
from lance_quant.formats.weights import Weights
from lance_quant.lance.config import LanceConfig
from lance_quant.lance.mot import DecoderLayer
from lance_quant.storage.tensor_file import Checkpoint

PROBES = 4  # draws of r; the sum over a weight's elements averages as well
# Tokens, of answers and of latents each, whose outputs are looked at; what these requests read comes on top.
TOKENS = 1024


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
        self._gradients: Gradients | None = None

    def of_layer(self, index: int, weights: Weights) -> dict[str, Tensor]:
        """See budget.Effects."""
        if self._gradients is None:
            self._gradients = Gradients(self._config, layers_of(self._source, self._device, self._calls),
                                        layout.num_layers(self._source.specs), ends_of(self._source, self._config),
                                        self._calls, self._wanted, self._device, PROBES)
        names = [name for group in layout.groups(index) for name in group.linears if f"{name}.weight" in weights]
        effects = {name: torch.zeros_like(weights[f"{name}.weight"]) for name in names}

        def watch(layer: DecoderLayer, _: Sequence[int]) -> tuple[list[Tensor], Use]:
            return [layer.get_submodule(inside(name, index)).weight.requires_grad_(True) for name in names], use

        def use(found: list[Tensor]) -> None:
            for name, gradient in zip(names, found, strict=True):
                effects[name] += gradient.square() / PROBES

        self._gradients.of_layer(index, weights, watch)
        return effects


def selected(calls: Sequence[Call]) -> tuple[list[Call], dict[int, Expert]]:
    """Some of the calls that something comes out of, evenly taken from all, about TOKENS tokens for either expert, and
    all that these read, in order; and which of them are the former, by place, with the expert whose output is wanted.

    Raises:
        InputError: only one of answers and latents was captured.
    """
    outputs, wanted = with_outputs(calls), set()
    for expert, what in (("und", "answers: capture an x2t task"), ("gen", "latents: capture a generation task")):
        own = [place for place, other in outputs.items() if other == expert]
        if not own:
            raise InputError(f"--bits_budget needs captures of both experts, and these hold no {what} as well")
        count = max(1, TOKENS * len(own) // sum(calls[place].tokens for place in own))
        wanted |= set(own[::max(1, len(own) // count)][:count])
    kept = with_what_they_read(calls, wanted)
    places = {place: index for index, place in enumerate(kept)}
    return ([calls[place] for place in kept],
            {places[place]: outputs[place] for place in sorted(wanted)})


def effects_of(src: Path, paths: Sequence[Path], device: torch.device) -> CapturedEffects:
    """The effects on some captures of a checkpoint.

    Raises:
        InputError: see capture.load and CapturedEffects.
    """
    config, calls, _ = load_of(src, paths)
    return CapturedEffects(Checkpoint(src), config, calls, device)
