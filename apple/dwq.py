"""Distilled scales: training a 4-bit affine model's scales and biases on the float model's distributions, in torch.

The objective is that of `mlx_lm.dwq`: codes stay, everything else of the rounded model (scales and biases of the grids,
norms, biases of q/k/v) follows the gradient of KL(float || rounded) over the tokens of some texts, by Adam. It runs
wherever torch does and writes the same files. What comes out is measured on texts held back, after rounding to the
file's dtype, and only kept if it is better than what went in.

NVFP4 and MXFP4 have no scales that a gradient could move; for them there is nothing to distil.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer

from apple.decoder import Decoder, load_decoder
from lance_quant.errors import InputError
from lance_quant.formats.int4 import unpack_nibbles
from lance_quant.storage.atomic import parse_json

log = logging.getLogger("lance_quant")


@dataclass(frozen=True)
class Training:
    """How long and how fast; defaults are mlx-lm's, but for the number of samples, which is what the data holds.

    held_back: every n-th text is for measuring.
    """

    learning_rate: float = 1e-6
    batch_size: int = 4
    max_tokens: int = 1025
    epochs: int = 1
    held_back: int = 8


def read_texts(path: Path, tokenizer: Any, max_tokens: int) -> list[Tensor]:
    """Token ids [t] of every line: {"text": ...}, {"messages": [...]} or {"prompt": ..., "completion": ...}.

    Raises:
        InputError: missing file, a line of another form, or fewer than two usable lines.
    """
    if not path.is_file():
        raise InputError(f"distillation data not found: {path}")
    texts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            texts.append(torch.tensor(_ids(line, f"{path} line {number}", tokenizer)[:max_tokens]))
    texts = [ids for ids in texts if len(ids) > 1]
    if len(texts) < 2:
        raise InputError(f"{path} holds {len(texts)} texts of two tokens or more; at least 2 are needed, hundreds help")
    return texts


def _ids(line: str, where: str, tokenizer: Any) -> list[int]:
    row = parse_json(line.encode(), where)
    if isinstance(row, dict) and isinstance(row.get("messages"), list):
        turns = [(turn.get("role"), turn.get("content")) for turn in row["messages"] if isinstance(turn, dict)]
    elif isinstance(row, dict) and "prompt" in row and "completion" in row:
        turns = [("user", row["prompt"]), ("assistant", row["completion"])]
    elif isinstance(row, dict) and isinstance(row.get("text"), str):
        return tokenizer.encode(row["text"])
    else:
        raise InputError(f'{where} has neither "text", "messages" nor "prompt" and "completion"')
    # Lance's own form, whatever chat template the folder has.
    return tokenizer.encode("\n".join(f"<|im_start|>{role}\n{content}<|im_end|>" for role, content in turns))


class Grid(nn.Module):
    """Codes that stay and scales that learn, of a matrix [out, in]; also the linear or embedding that has them."""

    def __init__(self, tensors: dict[str, Tensor], bias: Tensor | None, lookup: bool):
        super().__init__()
        self.lookup = lookup
        self.register_buffer("packed", tensors["weight"].view(torch.uint8))
        self.scales, self.biases = (nn.Parameter(tensors[name].float()) for name in ("scales", "biases"))
        self.bias = None if bias is None else nn.Parameter(bias.float())

    def _values(self, rows: Any) -> Tensor:
        packed, scales = self.packed[rows], self.scales[rows]
        code = unpack_nibbles(packed).view(*scales.shape, -1)
        return (code * scales[..., None] + self.biases[rows][..., None]).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        return self._values(x) if self.lookup else F.linear(x, self._values(slice(None)), self.bias)


def rounded_decoder(folder: Path, tensors: dict[str, Tensor], device: torch.device) -> Decoder:
    """The decoder with its matrices replaced by their 4-bit grids, everything but the codes trainable, float32."""
    model = load_decoder(folder, torch.float32, device)
    for name, module in list(model.named_modules()):
        if f"{name}.scales" in tensors:
            parts = {suffix: tensors[f"{name}.{suffix}"].to(device) for suffix in ("weight", "scales", "biases")}
            grid = Grid(parts, getattr(module, "bias", None), isinstance(module, nn.Embedding))
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, grid)
    for name, parameter in model.named_parameters():
        if name in tensors:  # the norms, as the file stores them
            parameter.data = tensors[name].to(device).float()
        parameter.requires_grad_(True)
    return model


def _batches(texts: Sequence[Tensor], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids [b, t] padded with 0 behind, and which are real; causal attention keeps padding out of what precedes it."""
    for first in range(0, len(texts), size):
        rows = texts[first:first + size]
        lengths = torch.tensor([len(ids) for ids in rows])
        yield nn.utils.rnn.pad_sequence(list(rows), True), torch.arange(int(lengths.max())) < lengths[:, None]


def _divergence(teacher: Decoder, student: Decoder, ids: Tensor, real: Tensor, device: torch.device) -> Tensor:
    """KL in nats, mean over the real tokens."""
    ids, real = ids.to(device), real.to(device)
    with torch.no_grad():
        exact = teacher(ids)[real].float().log_softmax(-1)
    return F.kl_div(student(ids)[real].log_softmax(-1), exact, log_target=True, reduction="batchmean")


@torch.no_grad()
def _measure(teacher: Decoder, student: Decoder, texts: Sequence[Tensor], device: torch.device) -> float:
    batches = list(_batches(texts, 1))
    return sum(_divergence(teacher, student, *batch, device).item() for batch in batches) / len(batches)


def distil(folder: Path, tensors: dict[str, Tensor], data: Path, training: Training,
           device: torch.device) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Train the scales of a 4bit MLX model on texts.

    Args:
        folder: made by extract_und.py, the teacher.
        tensors: the MLX file's, as export_mlx packs them.

    Returns:
        Tensors of the same names, dtypes and shapes, and the KL on held-back texts before and after; the given tensors
        where training did not help.

    Raises:
        InputError: unusable data.
    """
    texts = read_texts(data, AutoTokenizer.from_pretrained(folder), training.max_tokens)
    held, seen = texts[::training.held_back], [ids for index, ids in enumerate(texts) if index % training.held_back]
    teacher = load_decoder(folder, torch.float32 if device.type == "cpu" else torch.bfloat16, device)
    student = rounded_decoder(folder, tensors, device)
    before = _measure(teacher, student, held, device)
    optimizer = torch.optim.Adam(student.parameters(), lr=training.learning_rate)
    batches = [batch for _ in range(training.epochs) for batch in _batches(seen, training.batch_size)]
    for batch in tqdm(batches, desc="distil", disable=None):
        optimizer.zero_grad()
        _divergence(teacher, student, *batch, device).backward()
        optimizer.step()
    learned = {name: parameter.detach().to(tensors[name].dtype).cpu() for name, parameter in student.named_parameters()}
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(learned[name])
    after = _measure(teacher, student, held, device)
    facts = {"kl_before": before, "kl_after": after, "texts": len(seen), "held_back": len(held)}
    if not after < before:
        log.warning("the distillation did not help (KL %.4g -> %.4g on held-back texts) and is not written", before,
                    after)
        return tensors, {**facts, "kept": False}
    return {**tensors, **learned}, {**facts, "kept": True}
