"""The understanding path as a plain decoder: the form that a standard runtime gives it, in 100 lines of torch.

Text positions are equal on all three axes of Lance's rotary embedding, which makes it the ordinary one. Modules carry
the names of the extracted folder, so that its keys and theirs agree. Used to report what a lossy form costs, by the
distillation, and (with a cache) by the Core ML conversion.

Letters in shapes: b batch, t token, s token attended to, h hidden, d head width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lance_quant.errors import InputError
from lance_quant.lance.config import DecoderSizes, LanceConfig
from lance_quant.lance.mot import MLP, RMSNorm
from lance_quant.storage.atomic import read_json
from lance_quant.storage.schema import Positive, Schema, parse, read
from lance_quant.storage.tensor_file import Checkpoint

MAKE = "make the folder with apple/extract_und.py"
Rope = tuple[Tensor, Tensor]  # cos and sin, [t, d]
Remember = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # the call's keys and values -> all keys and values


class _Fields(DecoderSizes):
    """config.json of a folder made by extract_und.py."""

    model_type: Literal["glm4_moe", "qwen2"]
    rope_theta: Positive
    use_qk_norm: bool = False
    tie_word_embeddings: bool


class _Extraction(Schema):
    """extraction.json, as far as exports go by it."""

    source_fingerprint: str
    arch: Literal["glm4_moe", "qwen2"]


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the decoder; field names as in config.json. use_qk_norm is False in the lossy qwen2 form."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    use_qk_norm: bool = True
    tie_word_embeddings: bool = False

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def of(cls, config: LanceConfig, use_qk_norm: bool = True) -> "DecoderConfig":
        """The understanding path of a Lance."""
        shared = {name: getattr(config, name) for name in cls.__dataclass_fields__ if hasattr(config, name)}
        return cls(**shared, use_qk_norm=use_qk_norm)

    @classmethod
    def load(cls, folder: Path) -> "DecoderConfig":
        """Read config.json of a folder made by extract_und.py. InputError if it is another model's."""
        found = read(_Fields, Path(folder) / "config.json", "model configuration", MAKE)
        return cls(**found.model_dump(exclude={"model_type"}))


def extraction_record(folder: Path) -> dict[str, Any]:
    """What extract_und.py wrote of a folder. InputError if it did not make it."""
    path, what = Path(folder) / "extraction.json", "extraction record"
    record: dict[str, Any] = read_json(path, what)
    parse(_Extraction, record, f"{what} {path}", MAKE)
    return record


def rope_tables(config: DecoderConfig, positions: Tensor) -> Rope:
    """Cosines and sines [t, d] of positions [t], float32, frequencies not rounded."""
    powers = torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim
    angles_td = positions.float()[:, None] * (1.0 / config.rope_theta**powers)
    angles_td = torch.cat([angles_td, angles_td], -1)
    return angles_td.cos(), angles_td.sin()


def causal_mask(length: int, device: torch.device | str = "cpu") -> Tensor:
    """[t, t], 0 where a token may look and -inf where not."""
    return torch.full((length, length), float("-inf"), device=device).triu(1)


def rotate(x_btd: Tensor, rope: Rope) -> Tensor:
    """Rotary embedding of [..., t, d], halves convention."""
    first, second = x_btd.chunk(2, -1)
    return x_btd * rope[0] + torch.cat([-second, first], -1) * rope[1]


class Attention(nn.Module):
    """Grouped-query attention with biased projections and a norm per head."""

    def __init__(self, config: DecoderConfig, norm: type[nn.Module]):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (config.num_attention_heads, config.num_key_value_heads,
                                                    config.head_dim)
        width, kv_width = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, out) for out in (width, kv_width, kv_width))
        self.o_proj = nn.Linear(width, width, bias=False)
        if config.use_qk_norm:
            self.q_norm, self.k_norm = (norm(config.head_dim, config.rms_norm_eps) for _ in range(2))
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(self, x_bth: Tensor, rope: Rope, mask_ts: Tensor, remember: Remember | None) -> Tensor:
        q = rotate(self.q_norm(self.q_proj(x_bth).unflatten(-1, (self.heads, self.head_dim))).transpose(1, 2), rope)
        k = rotate(self.k_norm(self.k_proj(x_bth).unflatten(-1, (self.kv_heads, self.head_dim))).transpose(1, 2), rope)
        v = self.v_proj(x_bth).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        if remember is not None:
            k, v = remember(k, v)
        k, v = (x.repeat_interleave(self.heads // self.kv_heads, 1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) * self.head_dim**-0.5 + mask_ts
        return self.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """One pre-norm layer."""

    def __init__(self, config: DecoderConfig, norm: type[nn.Module] = RMSNorm):
        super().__init__()
        self.self_attn, self.mlp = Attention(config, norm), MLP(config)
        self.input_layernorm, self.post_attention_layernorm = (
            norm(config.hidden_size, config.rms_norm_eps) for _ in range(2))

    def forward(self, x_bth: Tensor, rope: Rope, mask_ts: Tensor, remember: Remember | None = None) -> Tensor:
        x_bth = x_bth + self.self_attn(self.input_layernorm(x_bth), rope, mask_ts, remember)
        return x_bth + self.mlp(self.post_attention_layernorm(x_bth))


class Body(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, config: DecoderConfig, norm: type[nn.Module]):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, norm) for _ in range(config.num_hidden_layers))
        self.norm = norm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """The whole understanding path."""

    def __init__(self, config: DecoderConfig, norm: type[nn.Module] = RMSNorm):
        super().__init__()
        self.config, self.model = config, Body(config, norm)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, ids_bt: Tensor) -> Tensor:
        """Logits [b, t, vocabulary] of token ids [b, t], causal, positions from 0."""
        length, dtype = ids_bt.shape[1], self.model.norm.weight.dtype
        rope = tuple(table.to(dtype) for table in rope_tables(self.config, torch.arange(length, device=ids_bt.device)))
        mask, x = causal_mask(length, ids_bt.device).to(dtype), self.model.embed_tokens(ids_bt)
        for layer in self.model.layers:
            x = layer(x, rope, mask)
        return self.lm_head(self.model.norm(x))


def load_decoder(folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu",
                 norm: type[nn.Module] = RMSNorm) -> Decoder:
    """The decoder of a folder made by extract_und.py, filled tensor by tensor.

    Raises:
        InputError: keys or shapes do not agree exactly.
    """
    config = DecoderConfig.load(folder)
    with torch.device("meta"):
        model = Decoder(config, norm)
    with Checkpoint(folder) as source:
        wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
                  if not (config.tie_word_embeddings and name == "lm_head.weight" and name not in source.specs)}
        found = {name: spec.shape for name, spec in source.specs.items()}
        if wanted != found:
            odd = sorted(set(wanted.items()) ^ set(found.items()))
            raise InputError(f"{source.path} does not fit its config.json in {len(odd)} places, first {odd[:5]}")
        tensors = {name: source.read(name, dtype, device) for name in wanted}
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False)
