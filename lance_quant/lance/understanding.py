"""Visual question answering: read the prompt into the cache, then decode token by token, greedily by default."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lance_quant.lance.cache import CacheRow, allocate
from lance_quant.lance.mot import Lance
from lance_quant.lance.tokens import VIT, LanceTokenizer, Packed, mrope_positions

MAX_NEW_TOKENS = 256  # the official limit


@dataclass(frozen=True)
class Choice:
    """How the next token is chosen: greedily (temperature 0, as officially), or drawn.

    temperature: divides the logits. top_p: only the likeliest tokens that together reach it are drawn from.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 42

    def pick(self, logits: Tensor, generator: torch.Generator) -> int:
        """A token by logits float32 [vocabulary]; drawn on the CPU, so that a seed means the same on every device."""
        if self.temperature == 0:
            return int(logits.argmax())
        shares, tokens = (logits.cpu() / self.temperature).softmax(-1).sort(descending=True)
        before = shares.cumsum(-1) - shares
        shares[before >= self.top_p] = 0  # never the likeliest: nothing is before it
        return int(tokens[torch.multinomial(shares, 1, generator=generator)])


GREEDY = Choice()


@torch.no_grad()
def answer(model: Lance, tokenizer: LanceTokenizer, prompt: Packed, vit_tokens: Tensor,
           max_new_tokens: int = MAX_NEW_TOKENS, on_token: Callable[[int], None] | None = None,
           choice: Choice = GREEDY) -> list[int]:
    """Answer ids, the closing <|im_end|> included if it came within the limit. Only <|im_end|> stops.

    Args:
        prompt: from tokens.pack_understanding.
        vit_tokens: [pads of the prompt, hidden].
        on_token: called with every new id; an exception that it raises ends the request.
    """
    length = len(prompt.ids)
    (row,) = allocate(model.config, [length + max_new_tokens], model.dtype, model.device)
    positions = mrope_positions(length + max_new_tokens, prompt.visuals)
    _prefill(model, prompt, vit_tokens, row)
    token, ids = int(prompt.ids[-1]), []
    generator = torch.Generator().manual_seed(choice.seed)
    for position in range(length - 1, length - 1 + max_new_tokens):
        hidden = model.read(model.embed(torch.tensor([token])), positions[:, position:position + 1], [row], True)
        token = choice.pick(_logits(model, hidden[0, -1:], len(tokenizer))[0], generator)
        ids.append(token)
        if on_token is not None:
            on_token(token)
        if token == tokenizer.im_end:
            break
    return ids


@torch.no_grad()
def forced_logits(model: Lance, tokenizer: LanceTokenizer, prompt: Packed, vit_tokens: Tensor,
                  answer_ids: Sequence[int]) -> Tensor:
    """Logits float32 [answer tokens, tokenizer size] that precede each given answer token, in one causal call."""
    length = len(prompt.ids) + len(answer_ids)
    (row,) = allocate(model.config, [length], model.dtype, model.device)
    positions = mrope_positions(length, prompt.visuals)
    _prefill(model, prompt, vit_tokens, row)
    fed = torch.tensor([int(prompt.ids[-1]), *answer_ids[:-1]])
    hidden = model.read(model.embed(fed), positions[:, row.length:row.length + len(fed)], [row], True)
    return _logits(model, hidden[0], len(tokenizer))


def _prefill(model: Lance, prompt: Packed, vit_tokens: Tensor, row: CacheRow) -> None:
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
