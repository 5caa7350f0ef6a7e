"""From a request to the packed sequence that Lance reads: tokenizer, templates, splits and 3-D positions.

A sequence is a chain of splits. A causal split sees itself causally and everything before it; a full or noise split
sees itself whole and everything before it. Each visual is written <|vision_start|><|video_pad|><|vision_end|> (images
too), and its pad is repeated once per ViT or latent token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import Qwen2Tokenizer

from lance_quant.errors import InputError

T2I_SYSTEM = ("Describe the image by detailing the color, quantity, text, shape, size, texture, spatial relationships "
              "of the objects and background:")
# A sample that gives only a reference answer is a captioning request: one of these is its system prompt.
CAPTION_SYSTEMS = (
    "Generate a detailed and accurate description of the {}, including all the key moments and visual details.",
    "Write an in-depth depiction of the {}, covering all its aspects.",
    "Write an exhaustive depiction of the given {}, capturing its essence and key moments.",
    "Describe the key features of the input {}, including color, shape, size, texture, objects, background.",
)
_VISUAL = "<|vision_start|><|video_pad|><|vision_end|>"
_TEMPORAL_STEP = 2  # position units per visual frame (tokens_per_second 2, one second per frame)

Mode = Literal["causal", "full", "noise"]
# What a split holds, numbered as the official packer does.
TEMPLATE, PROMPT, TARGET, VIT = -1, 0, 1, 4


class Split(NamedTuple):
    """A stretch of the sequence that is attended in one way; `content` is TEMPLATE, PROMPT, TARGET or VIT."""

    length: int
    mode: Mode
    content: int


class Visual(NamedTuple):
    """A run of pads: index of its first token, and its grid of tokens (frames, rows, columns)."""

    start: int
    grid: tuple[int, int, int]


@dataclass(frozen=True)
class Packed:
    """A packed sequence of L tokens.

    ids: int64 [L]. positions: int64 [3, L], the time, row and column axes of mRoPE.
    splits: cover the sequence in order. visuals: its runs of pads.
    """

    ids: Tensor
    positions: Tensor
    splits: tuple[Split, ...]
    visuals: tuple[Visual, ...]

    def bounds(self) -> list[tuple[int, int]]:
        """First and one-past-last index of every split."""
        ends = torch.tensor([split.length for split in self.splits]).cumsum(0).tolist()
        return [(end - split.length, end) for end, split in zip(ends, self.splits, strict=True)]


class LanceTokenizer:
    """The checkpoint's Qwen2 tokenizer and the special ids that Lance uses; no id is hard-coded."""

    FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")

    def __init__(self, folder: Path):
        missing = [name for name in self.FILES if not (Path(folder) / name).is_file()]
        if missing:
            raise InputError(f"tokenizer files missing in {folder}: {', '.join(missing)}")
        self._tokenizer = Qwen2Tokenizer.from_pretrained(str(folder), local_files_only=True)
        self.im_end = self._id("<|im_end|>")
        self.vision_start = self._id("<|vision_start|>")
        self.vision_end = self._id("<|vision_end|>")
        self.video_pad = self._id("<|video_pad|>")

    def _id(self, token: str) -> int:
        found = self._tokenizer.convert_tokens_to_ids(token)
        if found is None or found == self._tokenizer.unk_token_id:
            raise InputError(f"this tokenizer has no {token}: is it the one of a Lance checkpoint?")
        return found

    def __len__(self) -> int:
        """Number of ids that exist; the model's vocabulary is larger and its surplus must never be generated."""
        return len(self._tokenizer)

    def encode(self, text: str, literal: bool = False) -> list[int]:
        """Ids of a text; `literal` reads special-token strings in it as ordinary text."""
        return self._tokenizer(text, add_special_tokens=False, split_special_tokens=literal)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return self._tokenizer.decode(list(ids))


def _render(system: str, user: str, assistant: str) -> str:
    return (f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n"
            f"<|im_start|>assistant\n{assistant}<|im_end|>")


def _expand(ids: list[int], pad: int, grids: Sequence[tuple[int, int, int]]) -> tuple[list[int], list[Visual]]:
    """Repeat each single pad once per token of its grid."""
    expanded, visuals, waiting = [], [], list(grids)
    for token in ids:
        if token == pad and waiting:
            grid = waiting.pop(0)
            visuals.append(Visual(len(expanded), grid))
            expanded += [pad] * (grid[0] * grid[1] * grid[2])
        else:
            expanded.append(token)
    return expanded, visuals


def mrope_positions(length: int, visuals: Sequence[Visual]) -> Tensor:
    """Positions [3, length] of a sequence: text counts on all axes, a visual spreads over time, rows and columns.

    After a visual the count goes on from the largest position on any axis, as in Qwen2.5-VL.
    """
    pieces, index, position = [], 0, 0
    for visual in visuals:
        text = visual.start - index
        pieces.append(torch.arange(position, position + text).expand(3, text))
        position += text
        frames, rows, columns = (torch.arange(size) for size in visual.grid)
        axes = torch.meshgrid(frames * _TEMPORAL_STEP, rows, columns, indexing="ij")
        pieces.append(torch.stack([axis.flatten() for axis in axes]) + position)
        index = visual.start + pieces[-1].shape[1]
        position = int(pieces[-1].max()) + 1
    pieces.append(torch.arange(position, position + length - index).expand(3, length - index))
    return torch.cat(pieces, 1)


def pack_understanding(tokenizer: LanceTokenizer, system: str, question: str, grid: tuple[int, int, int]) -> Packed:
    """The prompt of an x2t request, up to and including the newline after "assistant".

    Args:
        grid: merged ViT tokens as (frames, rows, columns).
    """
    base = tokenizer.encode(_render(system, _VISUAL + question, ""))[:-1]  # without the closing <|im_end|>
    ids, visuals = _expand(base, tokenizer.video_pad, [grid])
    if len(visuals) != 1:
        raise InputError("the tokenizer does not keep <|video_pad|> whole: is it the one of a Lance checkpoint?")
    first = visuals[0].start - 1
    spanned = grid[0] * grid[1] * grid[2] + 2
    splits = (Split(first, "causal", TEMPLATE), Split(spanned, "full", VIT),
              Split(len(ids) - first - spanned, "causal", TEMPLATE))
    return Packed(torch.tensor(ids), mrope_positions(len(ids), visuals), splits, tuple(visuals))


def pack_generation(tokenizer: LanceTokenizer, prompt: str, grid: tuple[int, int, int],
                    fix_quirks: bool = False) -> Packed:
    """The sequence of a t2i request: system, prompt, template tail, noise span, closing token.

    Args:
        grid: latent cells as (frames, rows, columns).
        fix_quirks: False finds the prompt as the official code does, by searching its ids in the whole sequence
            (which fails for a prompt that merges with the template, a leading newline for one, and can hit the
            system text), and reads special-token strings inside the prompt as special tokens. True builds the spans
            one by one and takes the prompt literally.
    """
    if fix_quirks:
        head, _, tail = _render(T2I_SYSTEM, "\0", _VISUAL).partition("\0")
        pieces = [tokenizer.encode(head), tokenizer.encode(prompt, literal=True), tokenizer.encode(tail)]
        base, first, count = sum(pieces, []), len(pieces[0]), len(pieces[1])
    else:
        base = tokenizer.encode(_render(T2I_SYSTEM, prompt, _VISUAL).strip())
        wanted = tokenizer.encode(prompt)
        first, count = _find(base, wanted, prompt), len(wanted)
    # From the end: the target's visual is the last one, whatever the prompt holds.
    target = len(base) - 1 - base[::-1].index(tokenizer.video_pad)
    base_head, visual_tail = base[:target], base[target + 1:]
    cells = grid[0] * grid[1] * grid[2]
    ids = base_head + [tokenizer.video_pad] * cells + visual_tail
    visuals = (Visual(target, grid),)
    splits = [Split(first, "causal", TEMPLATE), Split(count, "causal", PROMPT),
              Split(target - 1 - first - count, "causal", TEMPLATE), Split(cells + 2, "noise", TARGET),
              Split(len(visual_tail) - 1, "causal", TEMPLATE)]
    return Packed(torch.tensor(ids), mrope_positions(len(ids), visuals),
                  tuple(split for split in splits if split.length), visuals)


def _find(base: list[int], wanted: list[int], prompt: str) -> int:
    for first in range(len(base) - len(wanted) + 1):
        if base[first:first + len(wanted)] == wanted:
            return first
    raise InputError(f"the prompt {prompt[:40]!r} merges with the template and cannot be located in it, as in the "
                     "official code: remove leading newlines and spaces, or use --fix_quirks")
