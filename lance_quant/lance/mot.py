"""Mixture of transformers (arXiv:2411.04996): a Qwen2.5-VL decoder (arXiv:2502.13923) with two experts per layer.

VAE latent tokens go through the generation expert (`*_moe_gen` weights), all other tokens through the understanding
expert; attention joins them. A call therefore carries one *stream* of tokens per expert through all layers, and only
the keys, queries and values of a layer are put side by side. Order inside a call does not matter where attention is
bidirectional, and causal calls have one stream, so tokens are never gathered or scattered.

Modules carry the checkpoint's own names, so that its keys and theirs must agree exactly. Nothing here touches the
`.weight` of a decoder linear: any of them may hold packed weights.

Letters in shapes: b cache row, t token, h head (or hidden), d head_dim.
"""

import math
from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lance_quant.formats.layout import SUFFIX, Expert
from lance_quant.lance.cache import CacheRow
from lance_quant.lance.config import LATENT_CHANNELS, MAX_LATENT_FRAMES, MAX_LATENT_SIZE, TIME_FREQUENCIES, LanceConfig
from lance_quant.lance.linear import Linear
from lance_quant.lance.steps import LayerParts, Steps

Streams = dict[Expert, Tensor]  # expert -> [b, t, features]; "gen" absent where a call has no latent tokens
Rope = tuple[Tensor, Tensor]  # cos and sin, [b, 1, t, d], tokens in stream order


class RMSNorm(nn.Module):
    """Root-mean-square norm: computed in float32, rounded to the input's dtype, then scaled by the weight."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width], in the dtype that `x` and the weight promote to."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class Rotary(nn.Module):
    """Multimodal rotary position embedding (mRoPE, arXiv:2409.12191).

    The frequencies are dealt out to three axes, time, rows and columns, in sections.
    """

    inv_freq: Tensor
    axis: Tensor

    def __init__(self, config: LanceConfig):
        super().__init__()
        self.theta, self.head_dim, self.sections = config.rope_theta, config.head_dim, config.mrope_section
        self.register_buffer("inv_freq", torch.empty(self.head_dim // 2), persistent=False)
        self.register_buffer("axis", torch.empty(self.head_dim // 2, dtype=torch.long), persistent=False)

    def compute_buffers(self, rounding: torch.dtype, device: torch.device) -> None:
        """Fill what no checkpoint holds. The official code casts the frequencies with the weights, so that in
        bfloat16 they are off by up to 0.4 %, and the model is used that way: `rounding` is that dtype."""
        powers = torch.arange(0, self.head_dim, 2).float() / self.head_dim
        self.inv_freq = (1.0 / self.theta**powers).to(rounding).float().to(device)
        self.axis = torch.repeat_interleave(torch.arange(3), torch.tensor(self.sections)).to(device)

    def forward(self, positions_b3t: Tensor, dtype: torch.dtype) -> Rope:
        """Cosines and sines for positions [b, 3, t], computed in float32 and rounded to `dtype`."""
        angles_btd = positions_b3t[:, self.axis].transpose(1, 2).float() * self.inv_freq
        angles_btd = torch.cat([angles_btd, angles_btd], -1)[:, None]
        return angles_btd.cos().to(dtype), angles_btd.sin().to(dtype)


def _rotate(x_bhtd: Tensor, rope: Rope) -> Tensor:
    first, second = x_bhtd.chunk(2, -1)
    return x_bhtd * rope[0] + torch.cat([-second, first], -1) * rope[1]


class Attention(nn.Module):
    """Grouped-query attention (arXiv:2305.13245) with q/k norms: projections per expert, one attention over all tokens.

    What lies around the attention itself is in `project` and `output`: neither knows the cache or its length.
    """

    def __init__(self, config: LanceConfig):
        super().__init__()
        self.head_dim = config.head_dim
        width, kv_width = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.widths = [width, kv_width, kv_width]
        for suffix in SUFFIX.values():
            self.add_module(f"q_proj{suffix}", Linear(width, width))
            self.add_module(f"k_proj{suffix}", Linear(width, kv_width))
            self.add_module(f"v_proj{suffix}", Linear(width, kv_width))
            self.add_module(f"o_proj{suffix}", Linear(width, width, bias=False))
            self.add_module(f"q_norm{suffix}", RMSNorm(config.head_dim, config.rms_norm_eps))
            self.add_module(f"k_norm{suffix}", RMSNorm(config.head_dim, config.rms_norm_eps))

    def project(self, streams: Streams, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries, rotated keys and values [b, h, t, d] of all streams, side by side."""
        projected = [self._project(x, SUFFIX[expert], "gen" in streams) for expert, x in streams.items()]
        q_bhtd, k_bhtd, v_bhtd = (torch.cat(parts, 2) if len(parts) > 1 else parts[0]
                                  for parts in zip(*projected, strict=True))
        q_bhtd, k_bhtd = (_rotate(x, rope).to(v_bhtd.dtype) for x in (q_bhtd, k_bhtd))
        return q_bhtd, k_bhtd, v_bhtd

    def _project(self, x: Tensor, suffix: str, wide: bool) -> tuple[Tensor, Tensor, Tensor]:
        merged = getattr(self, f"qkv_proj{suffix}", None)  # lance/merge.py makes it
        if merged is None:
            parts = [getattr(self, f"{part}_proj{suffix}")(x) for part in "qkv"]
        else:
            parts = merged(x).split(self.widths, -1)
        q_bhtd, k_bhtd, v_bhtd = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        if wide:  # calls with latent tokens keep q and k in float32 from the norm through the rotation
            q_bhtd, k_bhtd = q_bhtd.float(), k_bhtd.float()
        return getattr(self, f"q_norm{suffix}")(q_bhtd), getattr(self, f"k_norm{suffix}")(k_bhtd), v_bhtd

    def output(self, attended_bhtd: Tensor, lengths: dict[Expert, int]) -> Streams:
        """What each stream gets of the attended tokens [b, h, t, d]: [b, t, hidden] for its own t of them.

        Args:
            lengths: tokens of each stream, in stream order.
        """
        parts = attended_bhtd.transpose(1, 2).flatten(2).split(list(lengths.values()), 1)
        return {expert: getattr(self, f"o_proj{SUFFIX[expert]}")(part)
                for expert, part in zip(lengths, parts, strict=True)}


def _attend(q_bhtd: Tensor, k_bhtd: Tensor, v_bhtd: Tensor, rows: Sequence[CacheRow], layer: int,
            causal: bool) -> Tensor:
    """Put keys and values into each row's cache; attention [b, h, t, d] of the call's tokens over past and call."""
    each = [_attend_row(q_bhtd[index], *row.extend(layer, k_bhtd[index], v_bhtd[index]), row.mask, causal)
            for index, row in enumerate(rows)]
    return each[0][None] if len(each) == 1 else torch.stack(each)


def _attend_row(q_htd: Tensor, k_htd: Tensor, v_htd: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Scaled dot-product attention of t queries over the past and themselves; causal is aligned to the end.

    mask: [1, keys], for one query over a cache with free room.
    """
    queries, keys = q_htd.shape[1], k_htd.shape[1]
    if queries == 1:  # the heads that share keys are as many queries of one head
        grouped = q_htd.reshape(k_htd.shape[0], -1, q_htd.shape[2])
        attended = F.scaled_dot_product_attention(grouped[None], k_htd[None], v_htd[None], attn_mask=mask)
        return attended.reshape(q_htd.shape)
    aligned = causal and queries == keys
    if causal and not aligned:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q_htd.device).tril(keys - queries)
    return F.scaled_dot_product_attention(q_htd[None], k_htd[None], v_htd[None], attn_mask=mask, is_causal=aligned,
                                          enable_gqa=True)[0]


class MLP(nn.Module):
    """Gated SiLU feed-forward (SwiGLU, arXiv:2002.05202) of one expert."""

    def __init__(self, config: LanceConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        merged = getattr(self, "gate_up_proj", None)  # lance/merge.py makes it
        gate, up = (self.gate_proj(x), self.up_proj(x)) if merged is None else merged(x).chunk(2, -1)
        return self.down_proj(F.silu(gate).mul_(up))  # in place: the largest activations of a denoising step


class DecoderLayer(nn.Module):
    """One pre-norm decoder layer with both experts.

    `before` and `after` are all of it but the attention. They depend on the shapes of the call alone, not on its past,
    so that one compilation of them serves every layer and every step.
    """

    def __init__(self, config: LanceConfig):
        super().__init__()
        self.self_attn = Attention(config)
        for suffix in SUFFIX.values():
            self.add_module(f"mlp{suffix}", MLP(config))
            self.add_module(f"input_layernorm{suffix}", RMSNorm(config.hidden_size, config.rms_norm_eps))
            self.add_module(f"post_attention_layernorm{suffix}", RMSNorm(config.hidden_size, config.rms_norm_eps))

    def _each(self, part: str, streams: Streams) -> Streams:
        return {expert: getattr(self, part + SUFFIX[expert])(x) for expert, x in streams.items()}

    def before(self, streams: Streams, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries, rotated keys and values of the call, [b, h, t, d] each (Attention.project)."""
        return self.self_attn.project(self._each("input_layernorm", streams), rope)

    def after(self, streams: Streams, attended_bhtd: Tensor) -> Streams:
        """The layer's output [b, t, hidden] per expert, from its input and what was attended, [b, h, t, d]."""
        attended = self.self_attn.output(attended_bhtd, {expert: x.shape[1] for expert, x in streams.items()})
        streams = {expert: x + attended[expert] for expert, x in streams.items()}
        fed = self._each("mlp", self._each("post_attention_layernorm", streams))
        return {expert: x + fed[expert] for expert, x in streams.items()}

    def forward(self, streams: Streams, rope: Rope, rows: Sequence[CacheRow], layer: int, causal: bool,
                parts: LayerParts | None = None) -> Streams:
        """Run the layer, of number `layer`, or `parts` in the place of its own `before` and `after`."""
        before, after = parts or (self.before, self.after)
        q_bhtd, k_bhtd, v_bhtd = before(streams, rope)
        return after(streams, _attend(q_bhtd, k_bhtd, v_bhtd, rows, layer, causal))


class Decoder(nn.Module):
    """Embedding, layers and the final norm of each expert."""

    def __init__(self, config: LanceConfig):
        super().__init__()
        # A weight that is given is not initialized: on meta that imports torch._dynamo, 4 s of CPU.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size,
                                         _weight=torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.rotary = Rotary(config)
        for suffix in SUFFIX.values():
            self.add_module(f"norm{suffix}", RMSNorm(config.hidden_size, config.rms_norm_eps))

    def forward(self, streams: Streams, rope: Rope, rows: Sequence[CacheRow], causal: bool,
                parts: Sequence[LayerParts] | None = None) -> Streams:
        """Run one call; its keys and values lie behind each row's past until `CacheRow.commit`.

        Args:
            streams: expert -> [b, t, hidden]; a causal call has the "und" stream only.
            rope: for all tokens, in stream order.
            rows: the b cache rows; their lengths may differ.
            parts: per layer, what runs around its attention (Steps.layers, for a call that comes again and again in
                the same shape, so that compiling it pays); None: the layer's own.
        """
        assert not (causal and "gen" in streams), "latent tokens attend to one another in both directions"
        for index, layer in enumerate(self.layers):
            streams = layer(streams, rope, rows, index, causal, parts and parts[index])
        return {expert: getattr(self, f"norm{SUFFIX[expert]}")(x) for expert, x in streams.items()}


class LanguageModel(nn.Module):
    """The decoder and its output head (never tied, whatever llm_config.json says)."""

    def __init__(self, config: LanceConfig):
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)


class TimestepEmbedder(nn.Module):
    """Sinusoid of t in [0, 1] (not multiplied by 1000) and a two-layer perceptron."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(Linear(TIME_FREQUENCIES, hidden_size), nn.SiLU(),
                                 Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Embedding [n, hidden] in `dtype` of timesteps [n], the sinusoid in float32."""
        half = TIME_FREQUENCIES // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device).float() / half)
        angles = t.float()[:, None] * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(dtype))


class LatentPositions(nn.Module):
    """Fixed sinusoids over time, rows and columns of the latent grid, one third of the width each.

    The official model keeps the product of the three tables (a gigabyte at 31 x 64 x 64 positions, also in the
    checkpoint, where it is ignored); the three factors give the same values.
    """

    t: Tensor
    h: Tensor
    w: Tensor

    def __init__(self, hidden_size: int):
        super().__init__()
        third = hidden_size // 3 // 2 * 2
        self.widths = (third, third, hidden_size - 2 * third)
        for name, count, width in zip("thw", self._counts(), self.widths, strict=True):
            self.register_buffer(name, torch.empty(count, width), persistent=False)

    @staticmethod
    def _counts() -> tuple[int, int, int]:
        return MAX_LATENT_FRAMES, MAX_LATENT_SIZE, MAX_LATENT_SIZE

    def compute_buffers(self, dtype: torch.dtype, device: torch.device) -> None:
        """Fill the tables in float64 and round them to `dtype`, as the official code does with the weights."""
        for name, count, width in zip("thw", self._counts(), self.widths, strict=True):
            omega = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width / 2))
            angles = torch.arange(count, dtype=torch.float64)[:, None] * omega
            setattr(self, name, torch.cat([angles.sin(), angles.cos()], 1).float().to(dtype).to(device))

    def forward(self, grid: tuple[int, int, int]) -> Tensor:
        """Position embedding [cells, hidden] of a latent grid (frames, rows, columns)."""
        parts = [table[:size].view([-1 if a == axis else 1 for a in range(3)] + [table.shape[1]]).expand(*grid, -1)
                 for axis, (table, size) in enumerate(zip((self.t, self.h, self.w), grid, strict=True))]
        return torch.cat(parts, -1).flatten(0, 2)


class Lance(nn.Module):
    """Everything that the file model.safetensors holds for the language model and its latent interface.

    `dtype` is the compute dtype: it is said here and never read from a weight, which may be packed.
    `steps` says how steps that recur are run; compiled.compile_steps replaces it, nothing else does.
    """

    def __init__(self, config: LanceConfig, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.config, self.dtype, self.device = config, dtype, device
        self.steps = Steps()
        self.language_model = LanguageModel(config)
        self.time_embedder = TimestepEmbedder(config.hidden_size)
        self.vae2llm = Linear(LATENT_CHANNELS, config.hidden_size)
        self.llm2vae = Linear(config.hidden_size, LATENT_CHANNELS)
        self.latent_pos_embed = LatentPositions(config.hidden_size)

    def drop_latent_interface(self) -> None:
        """Leave out what a checkpoint for understanding alone lacks (layout.LATENT_INTERFACE)."""
        del self.time_embedder, self.vae2llm, self.llm2vae

    def compute_buffers(self, rotary_rounding: torch.dtype) -> None:
        """Fill every buffer that no checkpoint holds."""
        self.language_model.model.rotary.compute_buffers(rotary_rounding, self.device)
        self.latent_pos_embed.compute_buffers(self.dtype, self.device)

    def layers(self) -> list[DecoderLayer]:
        """The decoder's layers, in order."""
        return list(cast(Iterable[DecoderLayer], self.language_model.model.layers))

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings [t, hidden] of ids [t]."""
        return self.language_model.model.embed_tokens(ids.to(self.device))

    def rope(self, positions_3t: Tensor) -> Rope:
        """Rotary cosines and sines of one sequence's positions [3, t]."""
        return self.language_model.model.rotary(positions_3t[None].to(self.device), self.dtype)

    def read(self, x_th: Tensor, positions_3t: Tensor, rows: Sequence[CacheRow], causal: bool) -> Tensor:
        """Read understanding tokens [t, hidden] into the cache of every given row; final hidden states [b, t, hidden].

        Each row reads the same tokens at the same positions, behind its own past.
        """
        streams: Streams = {"und": x_th.expand(len(rows), -1, -1)}
        hidden = self.language_model.model(streams, self.rope(positions_3t), rows, causal)["und"]
        for row in rows:
            row.commit(x_th.shape[0])
        return hidden
