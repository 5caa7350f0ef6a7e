"""Weight sensitivity: the diagonal of the Fisher matrix of every linear's weight, measured on captured requests.

As in SqueezeLLM (arXiv:2306.07629), here for the choice of group sizes (methods/bit_allocation.py). With G the gradient
of the outputs with respect to a weight (gradients.py), an error D of that weight changes them by the mean of
(sum_ij G_ij D_ij)^2 over the probes, to first order. Where errors are not correlated this is sum_ij F_ij D_ij^2 with
F = mean of G^2, for every rounding of the weight at once.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lance_quant.calibration.capture import load_of
from lance_quant.calibration.decoder_calls import DecoderCall, with_outputs, with_what_they_read
from lance_quant.calibration.gradients import Gradients, Use, inside, layers_of, output_heads_of
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


class CapturedSensitivity:
    """F of every linear; see the module docstring.

    Args:
        src: the float checkpoint that was captured; read when the first layer is asked for, and closed again.
        config: its sizes.
        calls: of the captures.
        device: where layers run; hidden states wait on the CPU.

    Raises:
        InputError: only one of answers and latents was captured.
    """

    def __init__(self, src: Path, config: LanceConfig, calls: Sequence[DecoderCall], device: torch.device):
        self._src, self._config, self._device = src, config, device
        self._calls, self._wanted = selected(calls)
        self._gradients: Gradients | None = None

    def of_layer(self, index: int, weights: Weights) -> dict[str, Tensor]:
        """F of a layer's linears, float32 [out, in], by module name; relative change of the outputs per squared error.

        Args:
            index: of the layer; layers are asked for from the last to the first. The first time, the requests run
                forward through the whole model.
            weights: the layer's tensors by full name, float32, scales moved.
        """
        if self._gradients is None:
            self._gradients = self._run_forward()
        names = [name for group in layout.groups(index) for name in group.linears if f"{name}.weight" in weights]
        fisher = {name: torch.zeros_like(weights[f"{name}.weight"]) for name in names}

        def watch(layer: DecoderLayer, _: Sequence[int]) -> tuple[list[Tensor], Use]:
            return [layer.get_parameter(f"{inside(name, index)}.weight").requires_grad_(True) for name in names], use

        def use(found: list[Tensor]) -> None:
            for name, gradient in zip(names, found, strict=True):
                fisher[name] += gradient.square() / PROBES

        self._gradients.of_layer(index, weights, watch)
        return fisher

    def _run_forward(self) -> Gradients:
        with Checkpoint(self._src) as source:
            return Gradients(self._config, layers_of(source, self._device, self._calls),
                             layout.num_layers(source.specs), output_heads_of(source, self._config), self._calls,
                             self._wanted, self._device, PROBES)


def selected(calls: Sequence[DecoderCall]) -> tuple[list[DecoderCall], dict[int, Expert]]:
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


def sensitivity_of(src: Path, paths: Sequence[Path], device: torch.device) -> CapturedSensitivity:
    """The sensitivity of a checkpoint's weights on some captures.

    Raises:
        InputError: a capture that is none, of another format or of another model, or captures of one expert alone.
    """
    config, calls, _ = load_of(src, paths)
    return CapturedSensitivity(src, config, calls, device)
