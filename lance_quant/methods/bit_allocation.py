"""Mixed-precision bit allocation: a group size, or bfloat16, for every linear, under a total size.

A budget is in stored bits per quantized weight: all bytes that stand for the decoder's linears (codes, scales, zero
points, and weights that stay in bfloat16) times 8, over the number of their weights. Every way to store a linear has a
rate, its bytes, and a distortion, and distortions add up: which ways are best together is a knapsack. Greedy steps
along each linear's lower convex hull (Shoham and Gersho 1988), the most distortion removed per byte first, solve it but
for the last step that does not fit.

The distortion of a rounding is sum_ij F_ij (What_ij - W_ij)^2, with a sensitivity F. From statistics alone
F_ij = E[x_j^2] / E|W x|^2: the relative output error of the linear, as in awq.py, so every linear's output counts as
much as any other's. With captures, F says what an error does to the model's final hidden states
(calibration/weight_sensitivity.py).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lance_quant.calibration.activation_stats import ActStats
from lance_quant.cpu.threads import block_threads_on
from lance_quant.errors import InputError
from lance_quant.formats import layout
from lance_quant.formats.base import Codec
from lance_quant.formats.blocks import quantize_measured
from lance_quant.formats.int4 import Int4
from lance_quant.formats.weights import Weights
from lance_quant.methods import awq
from lance_quant.methods.bars import bar
from lance_quant.methods.conversion import Conversion
from lance_quant.methods.layer import scale_layer
from lance_quant.storage.resume import ResumeJob
from lance_quant.storage.tensor_file import Checkpoint, require_finite

SIZES = (128, 64, 32)  # group sizes that are tried, cheapest first
BF16_BITS = 16


class Option(NamedTuple):
    """One way to store a linear.

    group_size: None for bfloat16
    nbytes: on disk
    distortion: sensitivity-weighted squared error, in any unit that is the same for all linears
    """

    group_size: int | None
    nbytes: int
    distortion: float


class Sensitivity(Protocol):
    """Measured weights of squared errors in the weights of a model."""

    def of_layer(self, index: int, weights: Weights) -> Mapping[str, Tensor]:
        """F [out, in] of every linear of a layer, by module name; layers are asked for from the last to the first.

        Args:
            weights: the layer's tensors by full name, float32, scales moved.
        """


def choose(source: Checkpoint, shapes: Mapping[str, tuple[int, ...]], stats: ActStats, conversion: Conversion,
           sensitivity: Sensitivity | None, work: ResumeJob | None = None) -> dict[str, Codec | None]:
    """The format of every linear under the conversion's budget; nothing where there is none.

    Every layer is scaled as it will be and measured, so this takes about as long again as the conversion.

    Args:
        source: the float checkpoint.
        shapes: [out, in] of its linears.
        stats: second moments of this model.
        conversion: its budget, device and format.
        sensitivity: None for the relative output error.
        work: keeps what was measured, for the next run of a job.

    Raises:
        InputError: the budget is below the smallest choice, or a weight holds NaN or Inf.
    """
    if conversion.bits_budget is None:
        return {}
    nbytes = limit(shapes, conversion.bits_budget)

    def measured() -> dict[str, list[Option]]:
        found: dict[str, list[Option]] = {}
        # From the last layer to the first: gradients are handed down that way.
        for index in bar(range(layout.num_layers(source.specs))[::-1], "measure", conversion.progress):
            weights = {name: source.stored(name).to(conversion.device, torch.float32)
                       for name in layout.of_layer(source.specs, index)}
            for name, weight in weights.items():
                require_finite(weight, name)
            with block_threads_on(conversion.device):
                found |= measure(index, weights, stats, conversion.codec, sensitivity)
        return found

    options = measured() if work is None else work.kept("options", measured)
    chosen = allocate({name: [Option(*option) for option in options[name]] for name in shapes}, nbytes)
    return {name: None if option.group_size is None else Int4(option.group_size) for name, option in chosen.items()}


def options_of(shape: Sequence[int]) -> list[tuple[int | None, int]]:
    """Group size and bytes of every way to store a linear [out, in], cheapest first; bfloat16 is the last."""
    fitting = [size for size in SIZES if shape[1] % size == 0]
    sizes = [(size, sum(part.nbytes for part in Int4(size).specs(shape).values())) for size in fitting]
    return [*sizes, (None, math.prod(shape) * BF16_BITS // 8)]


def limit(shapes: Mapping[str, Sequence[int]], bits: float) -> int:
    """The bytes that a budget means.

    Raises:
        InputError: no choice is as small as that, or all linears would stay in bfloat16.
    """
    weights = sum(math.prod(shape) for shape in shapes.values())
    least = sum(options_of(shape)[0][1] for shape in shapes.values())
    if not bits * weights >= 8 * least:  # nor where it is no number
        # Rounded up: the number in the message must be accepted.
        raise InputError(f"--bits_budget {bits:g}: the smallest choice for this model takes "
                         f"{math.ceil(8e4 * least / weights) / 1e4:.4f} bits per quantized weight; give that or more")
    if bits >= BF16_BITS:
        raise InputError(f"--bits_budget {bits:g}: every linear would stay in bfloat16 and nothing be packed; give "
                         f"less than {BF16_BITS}")
    return math.floor(bits * weights / 8)


def allocate(options: Mapping[str, Sequence[Option]], nbytes: int) -> dict[str, Option]:
    """The choice of each linear; together at most `nbytes`.

    Args:
        options: by linear, at least one each.

    Raises:
        ValueError: the smallest options together are larger.
    """
    hulls = {name: hull(found) for name, found in options.items()}
    chosen = {name: steps[0] for name, steps in hulls.items()}
    left = nbytes - sum(option.nbytes for option in chosen.values())
    if left < 0:
        raise ValueError(f"the smallest options take {nbytes - left} bytes, more than {nbytes}")
    steps = [(gain(old, new), name, old, new) for name, found in hulls.items() for old, new in pairwise(found)]
    # On a hull gains fall, so a linear's steps come in order; ties are broken by name, to be the same everywhere.
    for _, name, old, new in sorted(steps, key=lambda step: (-step[0], step[1], step[3].nbytes)):
        if chosen[name] == old and new.nbytes - old.nbytes <= left:
            chosen[name] = new
            left -= new.nbytes - old.nbytes
    return chosen


def gain(old: Option, new: Option) -> float:
    """Distortion removed per byte added."""
    return (old.distortion - new.distortion) / (new.nbytes - old.nbytes)


def hull(options: Sequence[Option]) -> list[Option]:
    """Those options that are best for some price per byte, by size; each adds less per byte than the one before."""
    out: list[Option] = []
    for option in sorted(options, key=lambda option: (option.nbytes, option.distortion)):
        if out and option.distortion >= out[-1].distortion:
            continue  # larger and no better
        while len(out) > 1 and gain(out[-1], option) >= gain(out[-2], out[-1]):
            out.pop()
        out.append(option)
    return out


@torch.no_grad()
def measure(index: int, weights: Weights, stats: ActStats, codec: Codec,
            sensitivity: Sensitivity | None) -> dict[str, list[Option]]:
    """Every way to store each linear of a layer, with its distortion: what `allocate` takes.

    Args:
        index: of the layer.
        weights: its tensors by full name, float32, linears [out, in]; scales are moved in place.
        stats: second moments; linears without any count as if their inputs were equally loud.
        codec: the format whose scales are moved.
        sensitivity: None for the relative output error.
    """
    scaled = scale_layer(index, weights, stats, codec)
    found = {} if sensitivity is None else sensitivity.of_layer(index, weights)
    out = {}
    for group in (group for group in layout.groups(index) if group.name in scaled):
        for name in group.linears:
            w, m2 = weights[f"{name}.weight"], scaled[group.name]
            weight = awq.importance(torch.ones_like(w[0]) if m2 is None else m2)
            out[name] = list(_options(w, weight, found.get(name)))
    return out


def _options(w: Tensor, importance: Tensor, sensitivity: Tensor | None) -> Iterator[Option]:
    for size, nbytes in options_of(w.shape):
        back, error = _rounded(w, importance, size)
        yield Option(size, nbytes, error if sensitivity is None
                     else float((back.sub_(w).square_() * sensitivity).sum()))


def _rounded(w: Tensor, importance: Tensor, size: int | None) -> tuple[Tensor, float]:
    """What a file gives back for a weight [out, in], and the relative output error."""
    if size is None:
        back, signal = w.bfloat16().float(), float(w.square().sum(0) @ importance)
        return back, float((back - w).square_().sum(0) @ importance) / signal if signal > 0 else 0.0
    codec = Int4(size)
    (q,), (error,) = quantize_measured(codec.quantizer, [w], importance, 1.0)
    return codec.dequantize(q), error
