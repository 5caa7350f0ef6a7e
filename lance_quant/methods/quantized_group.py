"""What a recipe yields: packed linears that read the same input, how they were made, and what the meta says of them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from lance_quant.formats.base import Codec, Scaling

BF16_ENTRY = {"n_bit": 16, "scheme": "bfloat16"}  # of the meta, for a linear that a budget left in bfloat16
Rounding = Literal["gptq", "searched", "nearest", "bfloat16"]


@dataclass(frozen=True)
class RoundingFacts:
    """How a linear was rounded, as the meta has it.

    rounding: "searched" is the nearest level of grids searched with E[x^2]
    gram_tokens: tokens in the Gram matrix
    reason: why it is not gptq, where that was to be expected
    held_nearest, held_after: relative output error on held-back tokens, of nearest rounding and as written
    outlier_ratio: the loudest input channel's root mean square over the median channel's, before any scale
    """

    rounding: Rounding
    gram_tokens: int | None = None
    reason: str | None = None
    held_nearest: float | None = None
    held_after: float | None = None
    outlier_ratio: float | None = None

    def entry(self) -> dict[str, Any]:
        """The meta fields: those that are known, in order."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class QuantizedLinear:
    """A linear as it is written.

    tensors: suffix -> tensor on disk
    before, after: relative output error of plain rounding with s = 1 and as written, of uncorrelated inputs with the
        measured second moments; None where not measured
    facts: how it was rounded; None where the recipe does not say
    """

    tensors: Mapping[str, Tensor]
    before: float | None = None
    after: float | None = None
    facts: RoundingFacts | None = None


@dataclass(frozen=True)
class QuantizedGroup:
    """A finished group.

    linears: in the order of the group's names
    scaling: whether a scale was moved into what precedes them
    global_scale: that the linears share; None in the published recipe
    label, alpha: which scale it is, and the exponent of the activation in it, 0 for no scale (awq.Candidate)
    seconds: that the group took
    """

    linears: Sequence[QuantizedLinear]
    scaling: Scaling
    global_scale: float | None
    label: str
    alpha: float
    seconds: float

    def entries(self, codecs: Sequence[Codec | None], shapes: Sequence[Sequence[int]]) -> Iterator[dict[str, Any]]:
        """Meta entry of every linear.

        Args:
            codecs: the format of each; None: it stays in bfloat16.
            shapes: [out, in] of each.
        """
        for linear, codec, shape in zip(self.linears, codecs, shapes, strict=True):
            entry = BF16_ENTRY | {"shape": list(shape)} if codec is None \
                else codec.entry(shape, self.scaling, self.global_scale)
            if linear.after is not None:
                entry.update(candidate=self.label, alpha=self.alpha, error_before=linear.before,
                             error_after=linear.after)
            if linear.facts is not None:
                entry.update(linear.facts.entry())
            yield entry

    def __str__(self) -> str:
        before = [linear.before for linear in self.linears if linear.before is not None]
        after = [linear.after for linear in self.linears if linear.after is not None]
        if not after:
            return f"{self.label}  {self.seconds:.1f} s"
        facts = [linear.facts for linear in self.linears if linear.facts is not None]
        methods = "/".join(sorted({one.rounding for one in facts}))
        text = f"{self.label:<18} {_decibel(before):5.1f} -> {_decibel(after):5.1f} dB  {methods:<12}"
        held = [(one.held_nearest, one.held_after) for one in facts
                if one.held_nearest is not None and one.held_after is not None]
        if held:
            nearest, written = zip(*held, strict=True)
            text += f" held-back tokens {_decibel(nearest):5.1f} -> {_decibel(written):5.1f} dB"
        return f"{text}  {self.seconds:.1f} s"


def _decibel(errors: Sequence[float]) -> float:
    """Signal-to-quantization-noise ratio of the mean error."""
    mean = sum(errors) / len(errors)
    return -10 * math.log10(mean) if mean else math.inf
