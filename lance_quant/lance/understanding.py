"""Autoregressive decoding for visual question answering: greedy, or nucleus sampling (top-p, arXiv:1904.09751).

The prompt is read into the cache in one call per split (prefill), then the answer is decoded token by token.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lance_quant.lance.cache import CacheRow, allocate
from lance_quant.lance.mot import Lance
from lance_quant.lance.settings import GREEDY, MAX_NEW_TOKENS, SEED, TokenSampling
from lance_quant.lance.tokens import VIT, LanceTokenizer, TokenSequence, mrope_positions


def pick_token(sampling: TokenSampling, logits: Tensor, chance: Tensor) -> Tensor:
    """The next token, int64 [1].

    Args:
        sampling: how it is chosen.
        logits: float32 [vocabulary].
        chance: float32 [1] in [0, 1), on the same device.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1, keepdim=True)
    shares, tokens = (logits / sampling.temperature).softmax(-1).sort(descending=True)
    before = shares.cumsum(-1) - shares
    kept = before < sampling.top_p  # always the likeliest: nothing is before it
    ends = (shares * kept).cumsum(-1)
    place = torch.searchsorted(ends, chance * ends[-1:], right=True)
    return tokens[torch.minimum(place, kept.sum(-1, keepdim=True) - 1)]  # rounding may reach the very end


def chances(count: int, seed: int) -> Tensor:
    """What `count` picks are drawn with: float32 [count] in [0, 1), on the CPU, so that a seed means the same on every
    device."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


class Decoding:
    """Answering, one token a step. A step is the same work on the same memory every time and needs nothing from the
    host, which reads the finished tokens from `ids` when it likes; so a CUDA graph of one step is all of them.

    Args:
        valid: number of ids that the tokenizer has.
        capacity: longest prompt and answer together.
        longest: longest answer.
        sampling: how tokens are chosen.
    """

    def __init__(self, model: Lance, valid: int, capacity: int, longest: int, sampling: TokenSampling = GREEDY):
        self._model, self._valid, self._sampling = model, valid, sampling
        (self._row,) = allocate(model.config, [capacity], model.dtype, model.device, zeroed=True)
        shape = (1, 1, longest, model.config.head_dim)
        self._rope = tuple(torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in range(2))
        self._chances = torch.zeros(longest, device=model.device)
        self.ids = torch.zeros(longest, dtype=torch.long, device=model.device)
        self._token, self._index, self._place = (torch.zeros(1, dtype=torch.long, device=model.device)
                                                 for _ in range(3))

    @torch.no_grad()
    def start(self, prompt: TokenSequence, vit_tokens: Tensor, longest: int, seed: int) -> None:
        """Read a prompt and its ViT tokens [pads, hidden]; the next `longest` steps answer it."""
        self._row.reset()
        _prefill(self._model, prompt, vit_tokens, self._row)
        first = self._row.length
        rope = self._model.rope(mrope_positions(first + longest, prompt.visuals)[:, first:])
        for table, part in zip(self._rope, rope, strict=True):
            table[:, :, :longest] = part
        self._chances[:longest] = chances(longest, seed)
        self._token.copy_(prompt.ids[-1:])
        self._index.zero_()
        self._place.fill_(first)

    @torch.no_grad()
    def step(self) -> None:
        """Decode one token into `ids`."""
        model = self._model
        rope = tuple(table.index_select(2, self._index) for table in self._rope)
        self._row.next_at(self._place)
        streams = {"und": model.embed(self._token)[None]}
        hidden = model.language_model.model(streams, rope, [self._row], True, model.steps.layers)["und"]
        logits = _logits(model, hidden[0], self._valid)[0]
        self._token.copy_(pick_token(self._sampling, logits, self._chances.index_select(0, self._index)))
        self.ids.index_copy_(0, self._index, self._token)
        self._row.commit(1)
        self._place.add_(1)
        self._index.add_(1)


def _tokens_per_look(device: torch.device) -> int:
    """How often the host looks for the end, which makes it wait for the device. On a GPU rarely: up to 7 tokens are
    decoded in vain, which costs less than an idle GPU after every token."""
    return 1 if device.type == "cpu" else 8


def answer(model: Lance, tokenizer: LanceTokenizer, prompt: TokenSequence, vit_tokens: Tensor,
           max_new_tokens: int = MAX_NEW_TOKENS, on_token: Callable[[int], object] | None = None,
           sampling: TokenSampling = GREEDY, seed: int = SEED, look_every: int | None = None) -> list[int]:
    """Answer ids, the closing <|im_end|> included if it came within the limit. Only <|im_end|> stops.

    Args:
        prompt: from tokens.understanding_sequence.
        vit_tokens: [pads of the prompt, hidden].
        on_token: called with every new id; an exception that it raises ends the request.
        look_every: tokens after which the end is looked for; None: as suits the device. 1: nothing runs in vain, for
            those who measure what runs.
    """
    room = len(prompt.ids) + max_new_tokens

    def make(capacity: int, longest: int) -> Decoding:
        return Decoding(model, len(tokenizer), capacity, longest, sampling)

    decoding, step = model.steps.loop(make, room, max_new_tokens, sampling)
    decoding.start(prompt, vit_tokens, max_new_tokens, seed)
    each = look_every or _tokens_per_look(model.device)
    ids: list[int] = []
    while len(ids) < max_new_tokens:
        count = min(each, max_new_tokens - len(ids))
        for _ in range(count):
            step()
        for token in decoding.ids[len(ids):len(ids) + count].tolist():
            ids.append(token)
            if on_token is not None:
                on_token(token)
            if token == tokenizer.im_end:
                return ids
    return ids


@torch.no_grad()
def forced_logits(model: Lance, tokenizer: LanceTokenizer, prompt: TokenSequence, vit_tokens: Tensor,
                  answer_ids: Sequence[int]) -> Tensor:
    """Logits float32 [answer tokens, tokenizer size] that precede each given answer token, in one causal call."""
    length = len(prompt.ids) + len(answer_ids)
    (row,) = allocate(model.config, [length], model.dtype, model.device)
    positions = mrope_positions(length, prompt.visuals)
    _prefill(model, prompt, vit_tokens, row)
    fed = torch.tensor([int(prompt.ids[-1]), *answer_ids[:-1]])
    hidden = model.read(model.embed(fed), positions[:, row.length:row.length + len(fed)], [row], True)
    return _logits(model, hidden[0], len(tokenizer))


def _prefill(model: Lance, prompt: TokenSequence, vit_tokens: Tensor, row: CacheRow) -> None:
    """Read everything except the last token, which is the first decode step."""
    x = model.embed(prompt.ids)
    for (start, end), split in zip(prompt.bounds(), prompt.splits, strict=True):
        if split.content == VIT:
            x[start + 1:end - 1] = vit_tokens
        end = min(end, len(prompt.ids) - 1)
        model.read(x[start:end], prompt.positions[:, start:end], [row], split.mode == "causal")


def _logits(model: Lance, hidden_th: Tensor, valid: int) -> Tensor:
    """Next-token logits; the vocabulary's surplus, ids that no tokenizer has, is cut off."""
    return model.language_model.lm_head(hidden_th)[:, :valid].float()
