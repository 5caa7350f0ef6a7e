"""AWQ, activation-aware weight quantization (arXiv:2306.00978): the grid search for a scale per input channel.

The columns of a weight are multiplied by s before rounding, and s is divided out in the norm or linear before, so that
columns which see large activations are rounded more finely. The best s is searched with the quantizer that writes the
file. For one linear the search minimises

    error(s) = sum_ij m2_j (What_ij - W_ij)^2 / sum_ij m2_j W_ij^2,   What = fake_quant(W * s) / s,

with m2_j = E[x_j^2]: the expected squared output error relative to the output, if channels are uncorrelated. That is a
closed form: no activations are drawn and no matrix is multiplied. A group counts the mean over its linears, so that 256
rows of v_proj weigh as much as 2048 of q_proj. s = 1 is a candidate: the search never loses to plain rounding.

The scale between v_proj and o_proj serves both experts. Its objective is the sum of the relative errors of the two
o_proj, so neither expert's larger activations or token count decide for the other.

Shape suffixes: o out, i in.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lance_quant.formats.base import Quantizer
from lance_quant.formats.blocks import Block, column_cut, map_blocks, relative_totals
from lance_quant.methods.fuse import Folded, Heads, fold_norm

ALPHA_STEPS = 20  # of the exponent between 0 and 1
_STRIDE = 4  # of the first look along the candidates; then half of it around the best, and so on
# Rows of each weight that are looked at, evenly spaced: errors are means over rows. On trained linears of 384 to 1536
# rows the choice costs 0.03 % with 512; 256 missed rows that dominate one of them, and cost 18 % there.
ROWS = 512
_FOLD = 64  # rows of which column_max makes one at a time
# Channels are never held to be quieter than this fraction of the loudest one: a channel that was silent during
# calibration need not stay silent, and would otherwise be traded away altogether.
FLOOR = 1e-4


@dataclass(frozen=True)
class Candidate:
    """A scale that may be tried.

    s: [in], geometric mean 1
    label: "s=1", "act^0.45" or "act^0.45/w^0.55"
    alpha: exponent of the activation, 0 for s = 1
    """

    s: Tensor
    label: str
    alpha: float


@dataclass(frozen=True)
class NormScale:
    """The best scale between a norm and the linears that read it.

    folded: the norm to store and the column factor (fuse.fold_norm)
    candidate: which scale it is
    before, after: error of every linear with s = 1 and with the candidate, of the rows that were looked at
    wmax: [in] largest |weight| of each column over all linears, scaled
    """

    folded: Folded
    candidate: Candidate
    before: tuple[float, ...]
    after: tuple[float, ...]
    wmax: Tensor


@dataclass(frozen=True)
class LinearScale:
    """The best scale between a linear and the linears that it feeds.

    candidate: which scale it is; its s [channels] is divided out of the feeding linear's rows
    columns: [in] factor of the weight columns of the fed linears
    before, after: error of every fed linear with s = 1 and with the candidate, of the rows that were looked at
    wmax: [in] of each fed linear, largest |weight| of each column, scaled
    """

    candidate: Candidate
    columns: Tensor
    before: tuple[float, ...]
    after: tuple[float, ...]
    wmax: tuple[Tensor, ...]


def candidates(rms: Tensor, wmax: Tensor) -> list[Candidate]:
    """Every scale [in] that may be tried, s = 1 first, neighbours alike.

    Args:
        rms: [in] root mean square of the activation, not negative.
        wmax: [in] largest |weight| of each column, averaged over the linears.
    """
    rms, wmax = _floored(rms), _floored(wmax)
    tried = [Candidate(torch.ones_like(rms), "s=1", 0.0)]
    for step in range(1, ALPHA_STEPS + 1):
        a = step / ALPHA_STEPS
        tried.append(Candidate(rms**a, f"act^{a:.2f}", a))
    for step in reversed(range(ALPHA_STEPS)):  # at a = 1 both families meet
        a = step / ALPHA_STEPS
        tried.append(Candidate(rms**a / wmax ** (1 - a), f"act^{a:.2f}/w^{1 - a:.2f}", a))
    return [replace(one, s=one.s / one.s.log().mean().exp()) for one in tried]


def _floored(x: Tensor) -> Tensor:
    largest = x.max()
    return x.clamp(min=FLOOR * largest) if largest > 0 else torch.ones_like(x)


@torch.no_grad()
def search(weights: Sequence[Tensor], norm: Tensor, m2: Tensor, quantizer: Quantizer) -> NormScale:
    """Search the scale of a group of linears behind a norm.

    Args:
        weights: float32 [out, in] of every linear that reads the norm, finite.
        norm: float32 [in] weight of the norm.
        m2: float32 [in] mean square of the activation.
        quantizer: of the format that will be written.

    Returns:
        The candidate with the smallest mean error among those tried; s = 1 where nothing is gained.
    """
    each = torch.stack([column_max(w) for w in weights])
    tried, wmax = candidates(m2.sqrt(), each.mean(0)), each.amax(0)
    folds = [fold_norm(norm, one.s) for one in tried]
    some = [_some_rows(w) for w in weights]
    errors, best = _descend(len(tried), lambda places: relative_errors(
        some, [folds[place].column for place in places], m2, quantizer, wmax))
    return NormScale(folds[best], tried[best], errors[0], errors[best], wmax * folds[best].column)


def _some_rows(w: Tensor) -> Tensor:
    return w[::math.ceil(w.shape[0] / ROWS)]


def _descend(count: int, errors_of: Callable[[Sequence[int]], list[tuple[float, ...]]]
             ) -> tuple[dict[int, tuple[float, ...]], int]:
    """Look for the smallest sum of errors along a row of candidates: every few of them, then around the best.

    Returns:
        The errors of those candidates that were tried, the first always among them, and the best; the first of equals.
    """
    errors: dict[int, tuple[float, ...]] = {}
    places, stride = list(range(0, count, _STRIDE)), _STRIDE
    while True:
        errors.update(zip(places, errors_of(places), strict=True))
        best = min(sorted(errors), key=lambda place: sum(errors[place]))
        stride //= 2
        if not stride:
            return errors, best
        places = [place for place in (best - stride, best + stride) if 0 <= place < count and place not in errors]


@torch.no_grad()
def search_fed(weights: Sequence[Tensor], m2s: Sequence[Tensor], quantizer: Quantizer,
               heads: Heads | None = None) -> LinearScale:
    """Search one scale for linears behind a linear: down_proj behind up_proj, both o_proj behind both v_proj.

    Args:
        weights: float32 [out, in] of the linears that share the scale, each a packing group of its own.
        m2s: float32 [in] mean square of each one's input.
        quantizer: of the format that will be written.
        heads: how columns share channels; None where every column has its own.

    Returns:
        The candidate with the smallest sum of relative errors among those tried; s = 1 where nothing is gained.
    """
    gather, spread = (heads.gather, heads.spread) if heads else (_same, _same)
    power = torch.stack([gather(m2 / m2.mean().clamp(min=torch.finfo(m2.dtype).tiny)) for m2 in m2s]).mean(0)
    wmax = [column_max(w) for w in weights]
    tried = candidates(power.sqrt(), torch.stack([gather(largest) for largest in wmax]).mean(0))
    columns = [spread(one.s) for one in tried]
    some = [(_some_rows(w), m2, largest) for w, m2, largest in zip(weights, m2s, wmax, strict=True)]

    def errors_of(places: Sequence[int]) -> list[tuple[float, ...]]:
        factors = [columns[place] for place in places]
        each = [relative_errors([w], factors, m2, quantizer, largest) for w, m2, largest in some]
        return [tuple(error for (error,) in one) for one in zip(*each, strict=True)]

    errors, best = _descend(len(tried), errors_of)
    return LinearScale(tried[best], columns[best], errors[0], errors[best],
                       tuple(largest * columns[best] for largest in wmax))


def _same(x: Tensor) -> Tensor:
    return x


def column_max(w: Tensor) -> Tensor:
    """Largest |weight| of every column: [out, in] -> [in], without a copy of the weight."""
    largest = w.new_zeros(min(_FOLD, w.shape[0]), w.shape[1])
    for rows in w.split(_FOLD):  # in the cache: a third of the time of amin and amax, torch.aminmax takes ten times it
        held = largest[:rows.shape[0]]
        torch.maximum(held, rows.abs(), out=held)
    return largest.amax(0)


@torch.no_grad()
def relative_errors(weights: Sequence[Tensor], columns: Sequence[Tensor], m2: Tensor, quantizer: Quantizer,
                    wmax: Tensor | None = None) -> list[tuple[float, ...]]:
    """error(s) of the module docstring: for each column factor in `columns` [in], one number per weight.

    Args:
        weights: float32 [out, in] of every linear of a group, finite.
        m2: float32 [in] mean square of the unscaled activation.
        wmax: [in] largest |weight| of each column over all weights; computed if not given.
    """
    if wmax is None:
        wmax = torch.stack([column_max(w) for w in weights]).amax(0)
    # The largest |w * s| of a group without touching its weights: rounding is monotonic, so this is exact.
    global_scales = [quantizer.global_scale(float((wmax * column).max())) for column in columns]
    m2, factors = importance(m2), torch.stack(list(columns))
    weight = torch.cat([m2[None], m2 / factors.square()])

    def block_errors(block: Block) -> Tensor:
        part = block.columns
        w = weights[block.weight][block.rows, part]
        return quantizer.errors(w, factors[:, part], weight[:, part], global_scales)

    cut = column_cut(quantizer, weights)
    return list(zip(*relative_totals(weights, cut, map_blocks(block_errors, weights, cut)), strict=True))


def importance(m2: Tensor) -> Tensor:
    """Mean squares [in] as weights [in] of squared errors: channels that were silent count a little (FLOOR)."""
    return _floored(m2.sqrt()) ** 2


@torch.no_grad()
def written_error(w: Tensor, back: Tensor, m2: Tensor) -> float:
    """error of the module docstring for weights [out, in] and what a file gives back, inputs of mean square m2 [in]."""
    weight = importance(m2)
    signal = float((w.square().sum(0) * weight).sum())
    return float(((back - w).square_().sum(0) * weight).sum()) / signal if signal > 0 else 0.0
