"""Packed training batches of the tasks that show the model something: edits, clips, and questions about clips.

Order, positions and spans are those of the runtime's own sequences (lance_quant.lance.tokens), so that nothing is
described twice. A row is laid out as [und | gen] behind the system prefix that all rows share: first all text and ViT
tokens, then an edit's source latents, then the target's. Source latents, and a clip's given first frame, are clean and
have t = 0.

A row without its prompt is what the official sampler reads unconditionally: what precedes the target stands at
conditional positions, the target at positions that were counted without the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lance_nano.data import HIDDEN, IGNORE
from lance_nano.model import NanoLance
from lance_quant.lance.generation import TEXT_ONLY, Given
from lance_quant.lance.tokens import CONDITION, PROMPT, TARGET, VIT, Split, TokenSequence


class Row(NamedTuple):
    """One sequence behind the prefix, in stream order: `und` text and ViT tokens, then `gen` latents.

    ids: int64 [und]. positions: int64 [und + gen, 3]. seen: bool [und + gen, und + gen], query by key.
    visual: int64 [n], where `vit_tokens` [n, hidden] go in `ids`. source: [c, 48] clean latents before the target's.
    """

    ids: Tensor
    positions: Tensor
    seen: Tensor
    visual: Tensor
    vit_tokens: Tensor
    source: Tensor
    fixed: int
    grids: tuple[tuple[int, int, int], ...]


class VisualBatch(NamedTuple):
    """Rows padded to one length. Letters as in model.py."""

    prefix: Tensor
    ids: Tensor
    positions: Tensor
    bias: Tensor
    rows: list[Row]


def row(sequence: TokenSequence, prefix: int, given: Given = TEXT_ONLY, conditional: bool = True) -> Row:
    """A generation request, or a question with its answer behind it, as a training row.

    Args:
        sequence: of the runtime. prefix: how many of its first tokens all rows share.
        given: ViT tokens, source latents and first frame, as the runtime takes them.
        conditional: False leaves the prompt out.
    """
    positions, split_of = sequence.positions.clone(), _split_numbers(sequence.splits)
    kept = torch.ones(len(sequence.ids), dtype=torch.bool)
    targets = [split for split in sequence.splits if split.content == TARGET]
    if targets:
        start, end = sequence.span(TARGET)
        kept[end:] = False  # the closing token, which no latent sees
        if not conditional:
            kept[slice(*sequence.span(PROMPT))] = False
            bare = sequence.without_prompt()
            positions[:, start:end] = bare.positions[:, slice(*bare.span(TARGET))]
    latent = _latent_tokens(sequence)
    kept[:prefix] = False
    order = torch.cat([(kept & ~latent).nonzero()[:, 0], (kept & latent).nonzero()[:, 0]])
    whole = torch.tensor([split.mode != "causal" for split in sequence.splits])[split_of]
    together = (split_of[:, None] == split_of[None]) & whole[:, None]
    seen = together | torch.ones_like(together).tril()
    und = order[: int((kept & ~latent).sum())]
    empty = torch.empty(0, 48)
    return Row(
        sequence.ids[und],
        positions[:, order].T,
        seen[order][:, order],
        torch.isin(und, _vit_tokens(sequence)).nonzero()[:, 0],
        torch.empty(0, 0) if given.vit_tokens is None else given.vit_tokens,
        empty if given.source is None else given.source.reshape(-1, 48),
        0 if given.first is None else given.first[..., 0].numel(),
        tuple(visual.grid for visual in sequence.visuals if bool(latent[visual.start])),
    )


def _split_numbers(splits: Sequence[Split]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(splits)), torch.tensor([split.length for split in splits]))


def _tokens_of(sequence: TokenSequence, contents: tuple[int, ...]) -> Tensor:
    """Indices of the pads in splits that hold one of `contents`."""
    found = [torch.empty(0, dtype=torch.int64)]
    for (start, end), split in zip(sequence.bounds(), sequence.splits, strict=True):
        if split.content in contents:
            found.append(torch.arange(start + 1, end - 1))
    return torch.cat(found)


def _vit_tokens(sequence: TokenSequence) -> Tensor:
    return _tokens_of(sequence, (VIT,))


def _latent_tokens(sequence: TokenSequence) -> Tensor:
    latent = torch.zeros(len(sequence.ids), dtype=torch.bool)
    latent[_tokens_of(sequence, (CONDITION, TARGET))] = True
    return latent


def batch(rows: list[Row], prefix_ids: Tensor) -> VisualBatch:
    """Rows of one number of latents, their text padded on the right to one length."""
    longest, count = max(len(one.ids) for one in rows), len(prefix_ids)
    gen = len(rows[0].positions) - len(rows[0].ids)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    positions = torch.zeros(len(rows), longest + gen, 3, dtype=torch.int64)
    seen = torch.eye(longest + gen, dtype=torch.bool).repeat(len(rows), 1, 1)
    for index, one in enumerate(rows):
        places = torch.cat([torch.arange(len(one.ids)), torch.arange(longest, longest + gen)])
        ids[index, : len(one.ids)] = one.ids
        positions[index, places] = one.positions
        seen[index, places[:, None], places] = one.seen
    bias = F.pad(torch.where(seen, 0.0, HIDDEN), (count, 0))[:, None]
    return VisualBatch(prefix_ids, ids, positions, bias, rows)


def _understood(lance: NanoLance, packed: VisualBatch) -> Tensor:
    """Embeddings [b, u, hidden] of the text, with ViT tokens in their places."""
    und = lance.language_model.model.embed_tokens(packed.ids)
    for index, one in enumerate(packed.rows):
        if len(one.visual):
            und = und.index_put((torch.tensor(index), one.visual), one.vit_tokens.to(und))
    return und


def velocity(lance: NanoLance, packed: VisualBatch, noisy: Tensor, t: Tensor) -> Tensor:
    """Velocity [b, cells, 48] of the target's `noisy` latents [b, cells, 48] at t [b]; a given first frame is to be
    clean in `noisy`, and its velocity means nothing."""
    source = torch.stack([one.source for one in packed.rows])
    clean, cells = source.shape[1], noisy.shape[1]
    times = t[:, None].expand(-1, cells).clone()
    times[:, : packed.rows[0].fixed] = 0
    times = torch.cat([t.new_zeros(len(t), clean), times], 1)
    places = torch.cat([lance.places(grid) for grid in packed.rows[0].grids])
    gen = lance.vae2llm(torch.cat([source, noisy], 1)) + lance.time_embedder(times) + places
    _, gen = lance.run(packed.prefix, _understood(lance, packed), gen, packed.positions, packed.bias)
    return lance.llm2vae(lance.language_model.model.norm_moe_gen(gen[:, clean:]))


def answer_loss(lance: NanoLance, packed: VisualBatch, answers: list[int]) -> Tensor:
    """Mean cross-entropy of the last `answers[i]` tokens of row i, each foretold by the one in front of it."""
    und, _ = lance.run(packed.prefix, _understood(lance, packed), None, packed.positions, packed.bias)
    labels = torch.full_like(packed.ids, IGNORE)
    for index, (one, count) in enumerate(zip(packed.rows, answers, strict=True)):
        labels[index, len(one.ids) - count - 1 : len(one.ids) - 1] = one.ids[-count:]
    wanted = labels != IGNORE
    logits = lance.language_model.lm_head(lance.language_model.model.norm(und[wanted]))
    return F.cross_entropy(logits, labels[wanted])


def answered(prompt: TokenSequence, answer: list[int]) -> TokenSequence:
    """A question's sequence (understanding_sequence) with the ids of its answer behind it."""
    last = prompt.splits[-1]
    assert last.mode == "causal", "a question ends with text"
    following = int(prompt.positions[:, -1].max()) + 1 + torch.arange(len(answer))
    return TokenSequence(
        torch.cat([prompt.ids, torch.tensor(answer)]),
        torch.cat([prompt.positions, following.expand(3, -1)], 1),
        (*prompt.splits[:-1], last._replace(length=last.length + len(answer))),
        prompt.visuals,
    )
