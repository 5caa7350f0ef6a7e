"""Chat templates, token sequences and mRoPE positions (arXiv:2409.12191): what Lance reads of a request.

A sequence is a chain of splits. A causal split sees itself causally and everything before it; the other modes see
themselves whole and everything before them. Each visual is written <|vision_start|><|video_pad|><|vision_end|> (images
too), and its pad is repeated once per ViT or latent token.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import Qwen2Tokenizer

from lance_quant.errors import InputError
from lance_quant.storage.schema import read

# System prompts of the generation tasks, word for word (the apostrophes are U+2019); the edits' names what is edited.
T2I_SYSTEM = ("Describe the image by detailing the color, quantity, text, shape, size, texture, spatial relationships "
              "of the objects and background:")
VIDEO_SYSTEM = ("Describe the video by detailing the color, quantity, visible text, shape, size, texture, spatial "
                "relationships and motion/camera movements of the objects and background:")
EDIT_SYSTEM = ("Describe the key features of the input {0} (color, shape, size, texture, objects, background), then "
               "explain how the user’s text instruction should alter or modify the {0}. Generate a new {0} that meets "
               "the user’s requirements while maintaining consistency with the original input where appropriate.")
# A sample that gives only a reference answer is a captioning request: one of these is its system prompt.
CAPTION_SYSTEMS = (
    "Generate a detailed and accurate description of the {}, including all the key moments and visual details.",
    "Write an in-depth depiction of the {}, covering all its aspects.",
    "Write an exhaustive depiction of the given {}, capturing its essence and key moments.",
    "Describe the key features of the input {}, including color, shape, size, texture, objects, background.",
)
# What the official examples say in front of a question.
QUESTION_SYSTEMS = {"image": "Look at the image carefully and answer the question.",
                    "video": "Watch the video carefully and answer the question."}
_VISUAL = "<|vision_start|><|video_pad|><|vision_end|>"
_TEMPORAL_STEP = 2  # position units per visual frame (tokens_per_second 2, one second per frame)
_EDIT_TIME = 1000  # where an edit's ViT span begins on the time axis

Mode = Literal["causal", "full", "full_noise", "noise"]
# What a split holds, numbered as the official packer does, and how it is attended.
TEMPLATE, PROMPT, TARGET, CONDITION, VIT = -1, 0, 1, 2, 4
_MODES: dict[int, Mode] = {TEMPLATE: "causal", PROMPT: "causal", TARGET: "noise", CONDITION: "full_noise", VIT: "full"}
Grid = tuple[int, int, int]  # frames, rows, columns


class Split(NamedTuple):
    """A stretch of the sequence that is attended in one way; `content` is one of the constants above."""

    length: int
    mode: Mode
    content: int


class Visual(NamedTuple):
    """A run of pads: index of its first token, and its grid of tokens (frames, rows, columns)."""

    start: int
    grid: Grid

    @property
    def tokens(self) -> int:
        """How many pads there are."""
        return self.grid[0] * self.grid[1] * self.grid[2]


@dataclass(frozen=True)
class TokenSequence:
    """A prompt, with everything that is read beside its text: L tokens.

    ids: int64 [L]. positions: int64 [3, L], the time, row and column axes of mRoPE.
    splits: cover the sequence in order. visuals: its runs of pads.
    """

    ids: Tensor
    positions: Tensor
    splits: tuple[Split, ...]
    visuals: tuple[Visual, ...]

    def bounds(self) -> list[tuple[int, int]]:
        """First and one-past-last index of every split."""
        return _bounds(self.splits)

    def span(self, content: int) -> tuple[int, int]:
        """Bounds of the one split that holds `content`."""
        (found,) = [bounds for bounds, split in zip(self.bounds(), self.splits, strict=True)
                    if split.content == content]
        return found

    def without_prompt(self) -> "TokenSequence":
        """What the unconditional pass reads: the same sequence less its prompt, its positions counted anew."""
        dropped = [bounds for bounds, split in zip(self.bounds(), self.splits, strict=True) if split.content == PROMPT]
        first, end = dropped[0] if dropped else (0, 0)
        ids = torch.cat([self.ids[:first], self.ids[end:]])
        visuals = tuple(Visual(visual.start - (end - first if visual.start >= end else 0), visual.grid)
                        for visual in self.visuals)
        splits = tuple(split for split in self.splits if split.content != PROMPT)
        return TokenSequence(ids, _positions(len(ids), visuals, splits), splits, visuals)


def _bounds(splits: Sequence[Split]) -> list[tuple[int, int]]:
    ends = itertools.accumulate(split.length for split in splits)
    return [(end - split.length, end) for end, split in zip(ends, splits, strict=True)]


class LanceTokenizer:
    """The checkpoint's Qwen2 tokenizer and the special ids that Lance uses; no id is hard-coded."""

    FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")

    def __init__(self, folder: Path):
        missing = [name for name in self.FILES if not (Path(folder) / name).is_file()]
        if missing:
            raise InputError(f"tokenizer files missing in {folder}: {', '.join(missing)}")
        for name, kind in (("vocab.json", dict[str, int]), ("tokenizer_config.json", dict[str, Any])):
            read(kind, Path(folder) / name, "tokenizer file", "download it again")
        try:
            self._tokenizer = Qwen2Tokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # of Rust, of its own type: a bare Exception
            raise InputError(f"the tokenizer files in {folder} cannot be read ({' '.join(str(error).split())[:200]}); "
                             "download them again") from error
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


class TextStream:
    """Ids to text while they come: `write` gets what each new id adds, once its characters are complete."""

    def __init__(self, tokenizer: LanceTokenizer, write: Callable[[str], None]):
        self._tokenizer, self._write = tokenizer, write
        self._pending: list[int] = []

    def add(self, token: int) -> None:
        """Take one id; the closing <|im_end|> writes nothing."""
        if token == self._tokenizer.im_end:
            return
        self._pending.append(token)
        text = self._tokenizer.decode(self._pending)
        if not text.endswith("\ufffd"):  # what an unfinished character decodes to
            self._write(text)
            self._pending = []


def _render(system: str, user: str, assistant: str) -> str:
    return (f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n"
            f"<|im_start|>assistant\n{assistant}<|im_end|>")


def _expand(base: list[int], pads: Sequence[int], grids: Sequence[Grid]) -> tuple[list[int], tuple[Visual, ...]]:
    """Repeat the pad at each index of `pads` once per token of its grid."""
    ids, visuals, copied = [], [], 0
    for pad, grid in zip(pads, grids, strict=True):
        ids += base[copied:pad]
        visuals.append(Visual(len(ids), grid))
        ids += [base[pad]] * visuals[-1].tokens
        copied = pad + 1
    return ids + base[copied:], tuple(visuals)


def _pack(ids: list[int], visuals: tuple[Visual, ...], spans: Sequence[tuple[int, int, int]]) -> TokenSequence:
    """Split a sequence at its spans (first, end, content); what lies between them is template text."""
    splits, index = [], 0
    for first, end, content in sorted(spans):
        splits += [Split(first - index, "causal", TEMPLATE), Split(end - first, _MODES[content], content)]
        index = end
    splits.append(Split(len(ids) - index, "causal", TEMPLATE))
    kept = tuple(split for split in splits if split.length)
    return TokenSequence(torch.tensor(ids), _positions(len(ids), visuals, kept), kept, visuals)


def _around(visual: Visual, content: int) -> tuple[int, int, int]:
    """The span of a visual with its <|vision_start|> and <|vision_end|>."""
    return visual.start - 1, visual.start + visual.tokens + 1, content


def _positions(length: int, visuals: Sequence[Visual], splits: Sequence[Split]) -> Tensor:
    """Positions [3, length] with what edits shift: the ViT span to time 1000, and the target onto its source.

    The target takes its source's positions on all axes only where both are of one length, as in the official code.
    """
    positions = mrope_positions(length, visuals)
    spans = {split.content: slice(*bounds) for bounds, split in zip(_bounds(splits), splits, strict=True)}
    if TARGET in spans and VIT in spans:
        positions[0, spans[VIT]] += _EDIT_TIME - int(positions[0, spans[VIT].start])
    if TARGET in spans and CONDITION in spans:
        source, target = (positions[:, spans[content]] for content in (CONDITION, TARGET))
        if source.shape == target.shape:
            positions[:, spans[TARGET]] = source
    return positions


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


def understanding_sequence(tokenizer: LanceTokenizer, system: str, question: str, grid: Grid) -> TokenSequence:
    """The prompt of an x2t request, up to and including the newline after "assistant".

    Args:
        grid: merged ViT tokens as (frames, rows, columns).
    """
    require_no_visual(system, "the system prompt")
    require_no_visual(question, "the question")
    base = tokenizer.encode(_render(system, _VISUAL + question, ""))[:-1]  # without the closing <|im_end|>
    pads = _pads(base, tokenizer.video_pad, 1)
    ids, visuals = _expand(base, pads[:1], [grid])
    return _pack(ids, visuals, [_around(visuals[0], VIT)])


def generation_sequence(tokenizer: LanceTokenizer, system: str, prompt: str, target: Grid,
                    sources: Sequence[tuple[int, Grid]] = (), fix_quirks: bool = False) -> TokenSequence:
    """The sequence of a generation request: system, sources, prompt, template tail, noise span, closing token.

    Args:
        system: T2I_SYSTEM, VIDEO_SYSTEM or a filled EDIT_SYSTEM.
        target: latent cells as (frames, rows, columns).
        sources: an edit's (VIT, merged grid) and (CONDITION, latent grid), in this order.
        fix_quirks: False finds the prompt as the official code does, by searching its ids in the whole sequence
            (which fails for a prompt that merges with the template, a leading newline for one, and can hit the
            system text), and reads special-token strings inside the prompt as special tokens. True builds the spans
            one by one and takes the prompt literally.
    """
    contents, grids = [content for content, _ in sources], [grid for _, grid in sources]
    shown = _VISUAL * len(sources)
    if fix_quirks:
        head, _, tail = _render(system, shown + "\0", _VISUAL).partition("\0")
        pieces = [tokenizer.encode(head), tokenizer.encode(prompt, literal=True), tokenizer.encode(tail)]
        base, wanted = sum(pieces, []), pieces[1]
    else:
        require_no_visual(prompt, "the prompt")
        base = tokenizer.encode(_render(system, shown + prompt, _VISUAL).strip())
        wanted = tokenizer.encode(prompt)
    # The sources come first and the target last, whatever the prompt holds.
    pads = _pads(base, tokenizer.video_pad, len(sources) + 1)
    ids, visuals = _expand(base, [*pads[:len(sources)], pads[-1]], [*grids, target])
    spans = [_around(visual, content) for visual, content in zip(visuals, [*contents, TARGET], strict=True)]
    if fix_quirks:
        first = len(pieces[0]) + sum(visual.tokens - 1 for visual in visuals[:-1])
    else:
        first = _find(ids, wanted, prompt, spans)
    return _pack(ids, visuals, [*spans, (first, first + len(wanted), PROMPT)])


def _pads(base: list[int], pad: int, expected: int) -> list[int]:
    found = [index for index, token in enumerate(base) if token == pad]
    if len(found) < expected:
        raise InputError("the tokenizer does not keep <|video_pad|> whole: is it the one of a Lance checkpoint?")
    return found


def require_no_visual(text: str, what: str) -> None:
    """Raise InputError for a text with the tokens that stand for a picture's place: which of them is the picture would
    be decided by where they stand, in the official code as well."""
    for token in ("<|video_pad|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"):
        if token in text:
            raise InputError(f"{what} {text[:40]!r} holds {token}, which marks the place of a picture: leave it out")


def _find(ids: list[int], wanted: list[int], prompt: str, spans: Sequence[tuple[int, int, int]]) -> int:
    """Where the prompt's ids first occur; they must not be those of a visual."""
    for first in range(len(ids) - len(wanted) + 1):
        if ids[first:first + len(wanted)] == wanted:
            end = first + len(wanted)
            if any(first < span_end and span_first < end for span_first, span_end, _ in spans):
                break
            return first
    raise InputError(f"the prompt {prompt[:40]!r} merges with the template and cannot be located in it, as in the "
                     "official code: remove leading newlines and spaces, or use --fix_quirks")
