"""Gram (Hessian) accumulators: H = sum x x^T over the tokens that a linear reads, as GPTQ needs it (arXiv:2210.17323).

Collected from activations that arrive piece by piece, of the float model and of the model packed so far: their
difference gives the asymmetric target of GPTAQ (arXiv:2504.02692). Tokens may count differently (token_weights.py), and
some are held back from the sums, to judge what was made of them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lance_quant.cpu import matmul
from lance_quant.cpu.threads import map_threads

FEW_TOKENS = 2048  # below, the Gram matrix is noisy and a stronger damping is better
# Noisy? -> fraction of the mean diagonal that is added to it. Noisy as well: tokens that count differently, since few
# make up most of the sums, and those of few requests, which a Gram matrix in blocks is made of.
DAMPING = {False: 0.01, True: 0.1}
HELD_BACK = 2048  # most tokens that are kept for the comparison with nearest rounding
_RUN, _EVERY = 16, 8  # one in 8 runs of 16 consecutive tokens is held back, or fewer
_TILE = 1024  # rows and columns of a square matrix that are summed at once


@dataclass(frozen=True)
class GramStats:
    """What is known of the inputs of a linear.

    Tokens count in every sum and mean, some more than others, see GramAccumulator.

    gram: float32 [in, in], sum of xq xq^T over the tokens, xq the input in the model packed so far
    n_tokens: tokens in the sums
    counted: as how many they count together
    held: float32 [t, in], inputs xq of tokens that are not in the sums, times the root of what each counts; t may be 0
    held_float: float32 [t, in], the float model's inputs of the same tokens, likewise
    cross: float32 [in, in], sum of (x - xq) xq^T, x the same token's input in the float model; None where they agree
    cross_target: float32 [in, out], sum of xq (W (x - xq) + r - rq)^T for the one linear that reads these inputs, r the
        residual stream; then no cross
    held_missing: float32 [t, out], r - rq of the held-back tokens, likewise, with `cross_target`
    weighed: whether they count differently
    block: inputs that are summed with one another; others count as uncorrelated, and `gram` is block-diagonal
    """

    gram: Tensor
    n_tokens: int
    counted: float
    held: Tensor
    held_float: Tensor
    cross: Tensor | None = None
    cross_target: Tensor | None = None
    held_missing: Tensor | None = None
    weighed: bool = False
    block: int | None = None

    @property
    def spans(self) -> list[slice]:
        """The blocks of the Gram matrix, one where it is whole."""
        return _spans(len(self.gram), self.block)

    @property
    def mean_square(self) -> Tensor:
        """float32 [in] mean of xq^2."""
        return self.gram.diagonal() / (self.counted or 1.0)

    @property
    def damping(self) -> float:
        """Fraction of the mean diagonal that makes the Gram matrix safe to invert."""
        return DAMPING[self.weighed or self.block is not None or self.n_tokens < FEW_TOKENS]


class GramAccumulator:
    """Collects GramStats from activations that arrive piece by piece.

    Args:
        width: of the inputs.
        device: where the sums are kept.
        paired: whether float inputs differ from those of the packed model.
        weight: float32 [out, in] of a linear that alone reads these inputs and adds to the residual stream; None where
            several read them.
        counts: float32 [tokens] as how many each token counts, in the order in which they will arrive; None: as one.
        block: inputs that are summed with one another, of inputs that are not paired; None: all.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu", paired: bool = True,
                 weight: Tensor | None = None, counts: Tensor | None = None, block: int | None = None):
        assert block is None or not paired
        self._gram = torch.zeros(width, width, device=device)  # pages that nothing is summed in take no memory
        self._block, self._spans = block, _spans(width, block)
        self._weight = weight if paired else None
        self._cross = torch.zeros(width, width, device=device) if paired and weight is None else None
        self._cross_target = torch.zeros(width, len(weight), device=device) if paired and weight is not None else None
        self._held: list[list[Tensor]] = []
        self._counts = None if counts is None else counts.to(device)
        self._seen = self._kept = 0
        self._counted = 0.0

    @torch.no_grad()
    def add(self, packed: Tensor, exact: Tensor, missing: Tensor | None = None) -> None:
        """Add tokens, float32.

        Args:
            packed, exact: [t, in] their inputs in the packed and in the float model.
            missing: [t, out] the residual stream of the float model less that of the packed one; needed with `weight`.

        Raises:
            ValueError: no `missing` where it is needed.
        """
        held = self._is_held(torch.arange(self._seen, self._seen + len(packed), device=packed.device))
        parts = [packed, exact]
        if self._weight is not None:
            if missing is None:
                raise ValueError("a linear that adds to the residual stream needs what is missing there")
            parts.append(missing)
        counts = None if self._counts is None else self._counts[self._seen:self._seen + len(packed)]
        if counts is not None:
            parts = [part * counts.sqrt()[:, None] for part in parts]
        self._seen += len(packed)
        if held.any():
            self._held.append([part[held] for part in parts])
            parts = [part[~held] for part in parts]
            counts = None if counts is None else counts[~held]
        self._kept += len(parts[0])
        self._counted += len(parts[0]) if counts is None else float(counts.sum())
        self._add_products(*parts)

    def _add_products(self, packed: Tensor, exact: Tensor, missing: Tensor | None = None) -> None:
        for span in self._spans:  # what lies below the diagonal follows by symmetry
            _add_product(self._gram[span, span], packed[:, span], packed[:, span], above=True)
        if self._cross_target is not None and self._weight is not None and missing is not None:
            _add_product(self._cross_target, packed, matmul.linear(exact - packed, self._weight).add_(missing))
        elif self._cross is not None:
            _add_product(self._cross, exact - packed, packed)

    def _is_held(self, place: Tensor) -> Tensor:
        """Runs that follow no period, as requests of one length would, of all tokens if their number is known."""
        every = _EVERY if self._counts is None else max(_EVERY, len(self._counts) // HELD_BACK)
        mixed = (place // _RUN + 2) * 0x9E3779B1 % (1 << 32)  # then as MurmurHash3 ends; the first 15 runs stay
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            mixed = (mixed ^ (mixed >> shift)) * factor % (1 << 32)
        return (mixed < (1 << 32) // every) & (place < HELD_BACK * every)

    def stats(self) -> GramStats:
        """What was collected. The sums are handed over: nothing can be added afterwards."""
        assert self._counts is None or self._seen == len(self._counts), "a count for every token"
        for span in self._spans:
            _mirror(self._gram[span, span])
        held = [torch.cat(parts) for parts in zip(*self._held, strict=True)]
        if not held:
            held = [self._gram.new_empty(0, len(self._gram))] * 2
        return GramStats(self._gram, self._kept, self._counted, held[0], held[1], self._cross, self._cross_target,
                         held[2] if held[2:] else None, self._weighed(), self._block)

    def _weighed(self) -> bool:
        return self._counts is not None and bool((self._counts != self._counts[:1]).any())


def _spans(width: int, block: int | None) -> list[slice]:
    step = block or width
    return [slice(start, min(start + step, width)) for start in range(0, width, step)]


def _mirror(square: Tensor) -> None:
    """Copy what lies above the diagonal below it, in place."""
    for start in range(0, len(square), _TILE):
        end = start + _TILE
        square[end:, start:end] = square[start:end, end:].t()
        tile = square[start:end, start:end]
        tile.copy_(torch.triu(tile) + torch.triu(tile, 1).t())


def _add_product(total: Tensor, left: Tensor, right: Tensor, above: bool = False) -> None:
    """Add left^T right, of [t, n] and [t, m], to [n, m]; with `above` only the tiles on and above the diagonal."""

    def add(tile: tuple[slice, slice]) -> None:
        rows, columns = tile
        total[rows, columns].addmm_(left[:, rows].t(), right[:, columns])

    tiles = [(rows, columns) for rows in _tiles(left.shape[1]) for columns in _tiles(right.shape[1])
             if not above or columns.start >= rows.start]
    if total.device.type == "cpu":
        map_threads(add, tiles)
    else:
        list(map(add, tiles))


def _tiles(length: int) -> list[slice]:
    return [slice(start, start + _TILE) for start in range(0, length, _TILE)]
