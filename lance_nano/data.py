"""Packed batches in the official templates, positions and visibility.

A question row holds one picture and several independent questions about it (branches that do not see each
other). A picture row holds one caption and several (noise, time) copies of its latents. The system prefix is
the same in all rows and is kept once.

Half of the rows without a caption put their template tail where the official sampler puts it: the
unconditional cache there keeps the conditional positions, so the tail stands as if the caption were still in
front of it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lance_nano.tokenizer import PICTURE_SYSTEM, UNDERSTANDING_SYSTEM, Words

IGNORE = -100
HIDDEN = -1e4
IMAGE_GRID = 4
LATENT_GRID = 7
TAIL = "<|im_end|>\n<|im_start|>assistant\n"


def prefix_text(system: str) -> str:
    """The rendered template up to where the user text begins."""
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"


class QuestionBatch(NamedTuple):
    """Letters as in model.py; `labels` [b, u] is the next token where an answer is predicted, else IGNORE."""

    prefix: Tensor
    ids: Tensor
    positions: Tensor
    bias: Tensor
    labels: Tensor

    def to(self, device: str) -> QuestionBatch:
        """The batch on a device."""
        return QuestionBatch(*(tensor.to(device) for tensor in self))


class PictureBatch(NamedTuple):
    """ids [b, u] is what follows the prefix; the latents take the last copies * 49 positions."""

    prefix: Tensor
    ids: Tensor
    positions: Tensor
    bias: Tensor

    def to(self, device: str) -> PictureBatch:
        """The batch on a device."""
        return PictureBatch(*(tensor.to(device) for tensor in self))


class _Sheet:
    """Token tables of one batch: position, branch (0 is seen by all), bidirectional span (-1: causal)."""

    def __init__(self, rows: int, und: int, gen: int = 0):
        total = und + gen
        self.ids = np.zeros((rows, und), np.int64)
        self.positions = np.zeros((rows, total, 3), np.int64)
        self.branch = np.zeros((rows, total), np.int64)
        self.span = np.full((rows, total), -1, np.int64)
        self.valid = np.zeros((rows, total), bool)

    def bias(self, prefix: int) -> Tensor:
        """[b, 1, s, prefix + s]: 0 where the query may see the key, HIDDEN elsewhere."""
        branch, span = torch.from_numpy(self.branch), torch.from_numpy(self.span)
        index = torch.arange(branch.shape[1])
        causal = index[None, :, None] >= index[None, None, :]
        together = (span[:, :, None] == span[:, None, :]) & (span[:, :, None] >= 0)
        same = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
        seen = torch.from_numpy(self.valid)[:, None, :] & same & (causal | together)
        seen |= torch.eye(len(index), dtype=torch.bool)
        bias = torch.where(seen, 0.0, HIDDEN)
        return torch.nn.functional.pad(bias, (prefix, 0))[:, None]


def _grid(side: int, start: int) -> np.ndarray:
    """[side * side, 3] positions of one frame that begins at `start`."""
    cell = np.arange(side * side)
    return np.stack((cell * 0, cell // side, cell % side), -1) + start


class Packer:
    """Packs texts with one tokenizer."""

    def __init__(self, words: Words):
        self.words = words
        self.question_prefix = words.ids(prefix_text(UNDERSTANDING_SYSTEM))
        self.picture_prefix = words.ids(prefix_text(PICTURE_SYSTEM))
        self.tail = words.ids(TAIL)
        self.end = words.id("<|im_end|>")
        self.start_id, self.end_id = words.id("<|vision_start|>"), words.id("<|vision_end|>")
        self.pad_id = words.id("<|video_pad|>")

    def question_batch(self, rows: list[list[tuple[str, tuple[int, ...]]]]) -> QuestionBatch:
        """rows: per picture the (question, answer ids) pairs; an answer may be a part, or end with `end`."""
        branches = [[(self.words.ids(text) + self.tail, ids) for text, ids in row] for row in rows]
        cells, start = IMAGE_GRID**2, len(self.question_prefix)
        visual = cells + 2
        longest = max(sum(len(prompt) + len(answer) for prompt, answer in row) for row in branches)
        sheet = _Sheet(len(rows), visual + longest)
        sheet.ids[:, :visual] = [self.start_id, *[self.pad_id] * cells, self.end_id]
        sheet.valid[:, :visual] = True
        sheet.span[:, :visual] = 0
        sheet.positions[:, 0] = start
        sheet.positions[:, 1 : cells + 1] = _grid(IMAGE_GRID, start + 1)
        sheet.positions[:, cells + 1] = start + 1 + IMAGE_GRID
        labels = np.full(sheet.ids.shape, IGNORE)
        for index, row in enumerate(branches):
            at = visual
            for number, (prompt, answer) in enumerate(row, start=1):
                stop = at + len(prompt) + len(answer)
                sheet.ids[index, at:stop] = prompt + answer
                sheet.valid[index, at:stop] = True
                sheet.branch[index, at:stop] = number
                sheet.positions[index, at:stop] = start + IMAGE_GRID + 2 + np.arange(stop - at)[:, None]
                labels[index, at + len(prompt) - 1 : stop - 1] = answer
                at = stop
        return QuestionBatch(
            torch.tensor(self.question_prefix),
            torch.from_numpy(sheet.ids),
            torch.from_numpy(sheet.positions),
            sheet.bias(start),
            torch.from_numpy(labels),
        )

    def picture_batch(self, captions: list[str], dropped: list[str | None], copies: int) -> PictureBatch:
        """captions: the texts in front of the tail, "" where the caption is dropped.
        dropped: for such a row, the caption whose length still shifts the tail, or None."""
        texts = [(self.words.ids(text) if text else ()) + self.tail for text in captions]
        longest, cells, start = max(map(len, texts)), LATENT_GRID**2, len(self.picture_prefix)
        und = longest + 2 * copies
        sheet = _Sheet(len(texts), und, copies * cells)
        for index, text in enumerate(texts):
            count = len(text)
            shift = len(self.words.ids(dropped[index])) if dropped[index] else 0
            sheet.ids[index, :count] = text
            sheet.valid[index, :count] = True
            sheet.positions[index, :count] = start + shift + np.arange(count)[:, None]
            begin = start + count
            for copy in range(copies):
                pair, block = longest + 2 * copy, slice(und + copy * cells, und + (copy + 1) * cells)
                sheet.ids[index, pair : pair + 2] = self.start_id, self.end_id
                sheet.positions[index, pair] = begin
                sheet.positions[index, pair + 1] = begin + 1 + LATENT_GRID
                sheet.positions[index, block] = _grid(LATENT_GRID, begin + 1)
                for part in (slice(pair, pair + 2), block):
                    sheet.valid[index, part] = True
                    sheet.branch[index, part] = copy + 1
                    sheet.span[index, part] = copy
        return PictureBatch(
            torch.tensor(self.picture_prefix),
            torch.from_numpy(sheet.ids),
            torch.from_numpy(sheet.positions),
            sheet.bias(start),
        )
