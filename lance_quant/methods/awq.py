"""The search for per-channel scales, by the error of the quantizer that writes the file.

AWQ (arXiv:2306.00978) multiplies the columns of a weight by s before rounding and divides them out in the norm before,
so that columns which see large activations are rounded more finely. Which s is best is tried out. For one linear

    error(s) = sum_ij m2_j (What_ij - W_ij)^2 / sum_ij m2_j W_ij^2,   What = fake_quant(W * s) / s,

with m2_j = E[x_j^2]: the expected squared output error relative to the output, if channels are uncorrelated. It is a
closed form, so no activations are drawn and no matrix is multiplied; a group counts the mean over its linears, so that
256 rows of v_proj weigh as much as 2048 of q_proj. s = 1 is a candidate: the search never loses to plain rounding.
The scale between v_proj and o_proj serves both experts; its objective is the sum of the relative errors of the two
o_proj, so that neither expert's larger activations or token count decide for the other.

Shape suffixes: o out, i in.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lance_quant.formats.base import Block, Codec, column_cut, map_blocks, relative_totals
from lance_quant.methods.fuse import Folded, Heads, fold_norm

GRID = 20  # steps of the exponent between 0 and 1
_STRIDE = 4  # of the first look along the candidates; then half of it around the best, and so on
# Rows of each weight that are looked at, evenly spaced: errors are means over rows. On trained linears of 384 to 1536
# rows the choice costs 0.03 % with 512; 256 missed rows that dominate one of them, and cost 18 % there.
ROWS = 512
_FOLD = 64  # rows of which column_max makes one at a time
# Channels are never held to be quieter than this fraction of the loudest one: a channel that was silent during
# calibration need not stay silent, and would otherwise be traded away altogether.
FLOOR = 1e-4


@dataclass(frozen=True)
class Choice:
    """The best candidate for a group.

    folded: the norm to store and the column factor, see fuse.fold_norm
    label: "s=1", "act^0.45" or "act^0.45/w^0.55"
    before, after: error of every linear with s = 1 and with the choice, of the rows that were looked at
    wmax: [in] largest |weight| of each column over all linears, scaled as chosen
    """

    folded: Folded
    label: str
    before: tuple[float, ...]
    after: tuple[float, ...]
    wmax: Tensor


@dataclass(frozen=True)
class Scale:
    """The best candidate for linears that a linear feeds.

    s: [channels] to divide out of the feeding linear's rows
    columns: [in] factor of the weight columns of the fed linears
    label, before, after: as in Choice
    wmax: [in] of each linear, as in Choice
    """

    s: Tensor
    columns: Tensor
    label: str
    before: tuple[float, ...]
    after: tuple[float, ...]
    wmax: tuple[Tensor, ...]


def candidates(rms: Tensor, wmax: Tensor) -> list[tuple[str, Tensor]]:
    """Label and scale [in] of everything that may be tried, s = 1 first, neighbours alike; geometric means are 1.

    Args:
        rms: [in] root mean square of the activation, not negative.
        wmax: [in] largest |weight| of each column, averaged over the linears.
    """
    rms, wmax = _floored(rms), _floored(wmax)
    tried = [("s=1", torch.ones_like(rms))]
    for step in range(1, GRID + 1):
        a = step / GRID
        tried.append((f"act^{a:.2f}", rms**a))
    for step in reversed(range(GRID)):  # at a = 1 both families meet
        a = step / GRID
        tried.append((f"act^{a:.2f}/w^{1 - a:.2f}", rms**a / wmax ** (1 - a)))
    return [(label, s / s.log().mean().exp()) for label, s in tried]


def _floored(x: Tensor) -> Tensor:
    largest = x.max()
    return x.clamp(min=FLOOR * largest) if largest > 0 else torch.ones_like(x)


@torch.no_grad()
def search(weights: Sequence[Tensor], norm: Tensor, m2: Tensor, codec: Codec) -> Choice:
    """Find the scale of a norm-fed group.

    Args:
        weights: float32 [out, in] of every linear that reads the norm, finite.
        norm: float32 [in] weight of the norm.
        m2: float32 [in] mean square of the activation.
        codec: the format that will be written.

    Returns:
        The candidate with the smallest mean error among those tried; s = 1 where nothing is gained.
    """
    each = torch.stack([column_max(w) for w in weights])
    tried, wmax = candidates(m2.sqrt(), each.mean(0)), each.amax(0)
    folds = [fold_norm(norm, s) for _, s in tried]
    some = [_some_rows(w) for w in weights]
    errors, best = _descend(len(tried), lambda places: relative_errors(
        some, [folds[place].column for place in places], m2, codec, wmax))
    return Choice(folds[best], tried[best][0], errors[0], errors[best], wmax * folds[best].column)


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
def search_fed(weights: Sequence[Tensor], m2s: Sequence[Tensor], codec: Codec, heads: Heads | None = None) -> Scale:
    """Find one scale for linears behind a linear: down_proj behind up_proj, both o_proj behind both v_proj.

    Args:
        weights: float32 [out, in] of the linears that share the scale, each a packing group of its own.
        m2s: float32 [in] mean square of each one's input.
        codec: the format that will be written.
        heads: how columns share channels; None where every column has its own.

    Returns:
        The candidate with the smallest sum of relative errors among those tried; s = 1 where nothing is gained.
    """
    gather, spread = (heads.gather, heads.spread) if heads else (_same, _same)
    power = torch.stack([gather(m2 / m2.mean().clamp(min=torch.finfo(m2.dtype).tiny)) for m2 in m2s]).mean(0)
    wmax = [column_max(w) for w in weights]
    tried = candidates(power.sqrt(), torch.stack([gather(largest) for largest in wmax]).mean(0))
    columns = [spread(s) for _, s in tried]
    some = [(_some_rows(w), m2, largest) for w, m2, largest in zip(weights, m2s, wmax, strict=True)]

    def errors_of(places: Sequence[int]) -> list[tuple[float, ...]]:
        factors = [columns[place] for place in places]
        each = [relative_errors([w], factors, m2, codec, largest) for w, m2, largest in some]
        return [tuple(error for (error,) in one) for one in zip(*each, strict=True)]

    errors, best = _descend(len(tried), errors_of)
    return Scale(tried[best][1], columns[best], tried[best][0], errors[0], errors[best],
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
def relative_errors(weights: Sequence[Tensor], columns: Sequence[Tensor], m2: Tensor, codec: Codec,
                    wmax: Tensor | None = None) -> list[tuple[float, ...]]:
    """error(s) of the module docstring: for each column factor in `columns` [in], one number per weight.

    Args:
        wmax: [in] largest |weight| of each column over all weights; computed if not given.
    """
    if wmax is None:
        wmax = torch.stack([column_max(w) for w in weights]).amax(0)
    # The largest |w * s| of a group without touching its weights: rounding is monotonic, so this is exact.
    contexts = [codec.context(float((wmax * column).max())) for column in columns]
    m2, factors = importance(m2), torch.stack(list(columns))
    weight = torch.cat([m2[None], m2 / factors.square()])

    def block_errors(block: Block) -> Tensor:
        part = block.columns
        return codec.errors(weights[block.index][block.rows, part], factors[:, part], weight[:, part], contexts)

    cut = column_cut(codec, weights)
    return list(zip(*relative_totals(weights, cut, map_blocks(block_errors, weights, cut)), strict=True))


def importance(m2: Tensor) -> Tensor:
    """Mean squares [in] as weights of squared errors: channels that were silent count a little, see FLOOR."""
    return _floored(m2.sqrt()) ** 2


@torch.no_grad()
def written_error(w: Tensor, back: Tensor, m2: Tensor) -> float:
    """error of the module docstring for weights [out, in] and what a file gives back, inputs of mean square m2 [in]."""
    weight = importance(m2)
    signal = float((w.square().sum(0) * weight).sum())
    return float(((back - w).square_().sum(0) * weight).sum()) / signal if signal > 0 else 0.0
