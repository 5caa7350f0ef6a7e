"""Lance for training: both experts over one packed batch, with the checkpoint's own tensor names.

The state dict of `NanoLance` is `model.safetensors` and that of `NanoViT` is `vit.safetensors`: nothing is
renamed on export. What differs from the runtime is only what makes training fast: a batch axis, the text
prefix that all rows share computed once, tokens of the two experts held apart ([und | gen]) instead of
routed, and plain matrix products for attention (on a CPU the backward of masked SDPA costs more than
everything else together).

Letters: b batch, p prefix token, s token after the prefix, u understanding part of s, g generation part of s,
h head, k key/value head, d head width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EXPERTS = ("", "_moe_gen")
LATENT_TABLE_NAME = "latent_pos_embed.pos_embed"  # in every checkpoint, and ignored by every loader
TIME_FREQUENCIES = 128
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class NanoConfig:
    """Sizes; every width is a multiple of 64 so that quantization groups of 32 and 64 fit."""

    vocab_size: int
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 512
    mrope: tuple[int, int, int] = (4, 6, 6)
    rope_theta: float = 1e6
    eps: float = 1e-6
    latent_channels: int = 48
    latent_grid: int = 7
    vit_hidden: int = 96
    vit_layers: int = 3
    vit_heads: int = 3
    vit_intermediate: int = 256
    patch: int = 14
    patch_grid: int = 8

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden // self.heads


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half rope; cos and sin broadcast over heads."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


class SwiGLU(nn.Module):
    def __init__(self, width: int, intermediate: int, bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(width, intermediate, bias)
        self.up_proj = nn.Linear(width, intermediate, bias)
        self.down_proj = nn.Linear(intermediate, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    """The projections of both experts; `attend` mixes their tokens."""

    def __init__(self, config: NanoConfig):
        super().__init__()
        self.config = config
        kv_width = config.kv_heads * config.head_dim
        for suffix in EXPERTS:
            self.add_module("q_proj" + suffix, nn.Linear(config.hidden, config.hidden))
            self.add_module("k_proj" + suffix, nn.Linear(config.hidden, kv_width))
            self.add_module("v_proj" + suffix, nn.Linear(config.hidden, kv_width))
            self.add_module("o_proj" + suffix, nn.Linear(config.hidden, config.hidden, bias=False))
            self.add_module("q_norm" + suffix, nn.RMSNorm(config.head_dim, config.eps))
            self.add_module("k_norm" + suffix, nn.RMSNorm(config.head_dim, config.eps))

    def project(self, x: Tensor, suffix: str) -> tuple[Tensor, Tensor, Tensor]:
        """[b, s, hidden] -> normed q [b, s, h, d], normed k [b, s, k, d], v [b, s, k, d]."""
        heads = (*x.shape[:-1], -1, self.config.head_dim)
        q = getattr(self, "q_norm" + suffix)(getattr(self, "q_proj" + suffix)(x).view(heads))
        k = getattr(self, "k_norm" + suffix)(getattr(self, "k_proj" + suffix)(x).view(heads))
        return q, k, getattr(self, "v_proj" + suffix)(x).view(heads)

    def output(self, x: Tensor, suffix: str) -> Tensor:
        """The expert's output projection."""
        return getattr(self, "o_proj" + suffix)(x)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """q [b, h, s, d], k and v [b, k, t, d], bias [b or 1, 1, s, t] added to the scores -> [b, s, h * d]."""
    batch, heads, tokens, width = q.shape
    groups = heads // k.shape[1]
    grouped = (q * width**-0.5).reshape(batch, k.shape[1], groups * tokens, width)
    scores = (grouped @ k.mT).view(batch, k.shape[1], groups, tokens, -1) + bias[:, :, None]
    mixed = scores.softmax(-1).view(batch, k.shape[1], groups * tokens, -1) @ v
    return mixed.view(batch, heads, tokens, width).transpose(1, 2).flatten(2)


class Layer(nn.Module):
    def __init__(self, config: NanoConfig):
        super().__init__()
        self.self_attn = Attention(config)
        for suffix in EXPERTS:
            self.add_module("mlp" + suffix, SwiGLU(config.hidden, config.intermediate))
            self.add_module("input_layernorm" + suffix, nn.RMSNorm(config.hidden, config.eps))
            self.add_module("post_attention_layernorm" + suffix, nn.RMSNorm(config.hidden, config.eps))

    def forward(self, prefix, und, gen, rope, bias) -> tuple[Tensor, Tensor, Tensor | None]:
        """prefix [1, p, hidden], und [b, u, hidden], gen [b, g, hidden] or None; the rest as in `run`."""
        prefix_rope, row_rope, prefix_bias = rope
        qp, kp, vp = self._heads(prefix, "", prefix_rope)
        q, k, v = self._rows(und, gen, row_rope)
        batch = und.shape[0]
        k = torch.cat((kp.expand(batch, -1, -1, -1), k), 2)
        v = torch.cat((vp.expand(batch, -1, -1, -1), v), 2)
        mixed = attend(q, k, v, bias)
        prefix = self._finish(prefix, attend(qp, kp, vp, prefix_bias), "")
        split = und.shape[1]
        und = self._finish(und, mixed[:, :split], "")
        return prefix, und, None if gen is None else self._finish(gen, mixed[:, split:], "_moe_gen")

    def _project(self, x: Tensor, suffix: str) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn.project(getattr(self, "input_layernorm" + suffix)(x), suffix)

    def _heads(self, x: Tensor, suffix: str, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (part.transpose(1, 2) for part in self._project(x, suffix))
        return rotate(q, *rope), rotate(k, *rope), v

    def _rows(
        self, und: Tensor, gen: Tensor | None, rope: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        if gen is None:
            return self._heads(und, "", rope)
        pairs = zip(self._project(und, ""), self._project(gen, "_moe_gen"), strict=True)
        q, k, v = (torch.cat(pair, 1).transpose(1, 2) for pair in pairs)
        return rotate(q, *rope), rotate(k, *rope), v

    def _finish(self, x: Tensor, mixed: Tensor, suffix: str) -> Tensor:
        x = x + self.self_attn.output(mixed, suffix)
        return x + getattr(self, "mlp" + suffix)(getattr(self, "post_attention_layernorm" + suffix)(x))


class Decoder(nn.Module):
    """Embeddings, layers and both final norms (`language_model.model`)."""

    def __init__(self, config: NanoConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden, config.eps)
        self.norm_moe_gen = nn.RMSNorm(config.hidden, config.eps)


class LanguageModel(nn.Module):
    def __init__(self, config: NanoConfig):
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden, config.vocab_size, bias=False)


class TimeEmbedder(nn.Module):
    """t in [0, 1], any shape -> [..., hidden]."""

    def __init__(self, hidden: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * TIME_FREQUENCIES, hidden), nn.SiLU(), nn.Linear(hidden, hidden)
        )

    def forward(self, t: Tensor) -> Tensor:
        index = torch.arange(TIME_FREQUENCIES, device=t.device)
        angle = t[..., None] * torch.exp(-math.log(10000.0) * index / TIME_FREQUENCIES)
        return self.mlp(torch.cat((angle.cos(), angle.sin()), -1))


def sincos(width: int, position: Tensor) -> Tensor:
    """[n] positions -> [n, width]: sines, then cosines, computed in float64 like the official table."""
    omega = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angle = position.double()[:, None] * omega
    return torch.cat((angle.sin(), angle.cos()), -1).float()


def latent_positions(hidden: int, grid: int, frames: int = 1) -> Tensor:
    """The fixed embedding [frames * grid * grid, hidden] of latents in raster order."""
    third = hidden // 3 // 2 * 2
    cell = torch.arange(frames * grid * grid)
    time, row, column = cell // grid**2, cell // grid % grid, cell % grid
    return torch.cat((sincos(third, time), sincos(third, row), sincos(hidden - 2 * third, column)), -1)


class NanoLance(nn.Module):
    def __init__(self, config: NanoConfig):
        super().__init__()
        self.config = config
        self.language_model = LanguageModel(config)
        self.time_embedder = TimeEmbedder(config.hidden)
        self.vae2llm = nn.Linear(config.latent_channels, config.hidden)
        self.llm2vae = nn.Linear(config.hidden, config.latent_channels)
        self.register_buffer(
            "latent_table", latent_positions(config.hidden, config.latent_grid), persistent=False
        )
        half = torch.arange(0, config.head_dim, 2).float() / config.head_dim
        self.register_buffer("inverse_frequency", config.rope_theta**-half, persistent=False)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Fan-in normal, residual outputs shrunk by depth, a zero velocity head."""
        residual = (2 * self.config.layers) ** -0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
                if "o_proj" in name or "down_proj" in name:
                    module.weight.mul_(residual)
        nn.init.normal_(self.language_model.model.embed_tokens.weight, std=0.5)
        self.language_model.lm_head.weight.mul_(0.5)
        nn.init.zeros_(self.llm2vae.weight)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """[b, s, 3] positions (t, h, w) -> cos and sin [b, 1, s, d]."""
        axis = torch.repeat_interleave(torch.arange(3), torch.tensor(self.config.mrope)).to(positions.device)
        angle = positions[..., axis].float() * self.inverse_frequency
        angle = torch.cat((angle, angle), -1)[:, None]
        return angle.cos(), angle.sin()

    def run(self, prefix_ids: Tensor, und: Tensor, gen: Tensor | None, positions: Tensor, bias: Tensor):
        """All layers. prefix_ids [p]; und [b, u, hidden]; gen [b, g, hidden] or None; positions [b, u + g, 3]
        of the tokens after the prefix; bias [b, 1, u + g, p + u + g]. Returns und and gen before the final
        norm."""
        prefix = self.language_model.model.embed_tokens(prefix_ids)[None]
        count = prefix.shape[1]
        causal = torch.full((count, count), -1e4, device=und.device).triu(1)[None, None]
        places = torch.arange(count, device=und.device)[None, :, None].expand(1, -1, 3)
        rope = self.rope(places), self.rope(positions), causal
        for layer in self.language_model.model.layers:
            prefix, und, gen = layer(prefix, und, gen, rope, bias)
        return und, gen

    def places(self, grid: tuple[int, int, int]) -> Tensor:
        """The fixed embedding [cells, hidden] of a latent grid (frames, rows, columns), a square one."""
        return latent_positions(self.config.hidden, grid[1], grid[0]).to(self.latent_table.device)

    def logits(self, batch, image_tokens: Tensor, wanted: Tensor) -> Tensor:
        """Next-token logits [n, vocab] at the `wanted` [b, u] positions of a `data.QuestionBatch`."""
        und = self.language_model.model.embed_tokens(batch.ids)
        tokens = image_tokens.shape[1]
        und = torch.cat((und[:, :1], image_tokens, und[:, 1 + tokens :]), 1)
        und, _ = self.run(batch.prefix, und, None, batch.positions, batch.bias)
        return self.language_model.lm_head(self.language_model.model.norm(und[wanted]))

    def velocity(self, batch, noisy: Tensor, t: Tensor) -> Tensor:
        """Velocity [b, copies * cells, 48] for a `data.PictureBatch`; noisy alike, t [b, copies]."""
        cells = self.latent_table.shape[0]
        time = self.time_embedder(t).repeat_interleave(cells, 1)
        gen = self.vae2llm(noisy) + time + self.latent_table.repeat(t.shape[1], 1)
        und = self.language_model.model.embed_tokens(batch.ids)
        _, gen = self.run(batch.prefix, und, gen, batch.positions, batch.bias)
        return self.llm2vae(self.language_model.model.norm_moe_gen(gen))


class PatchEmbed(nn.Module):
    """The official 3-D convolution; an image is repeated over both frames, so its taps add."""

    def __init__(self, config: NanoConfig):
        super().__init__()
        self.proj = nn.Conv3d(3, config.vit_hidden, (2, config.patch, config.patch), bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        """[b, n, 3 * patch * patch] -> [b, n, vit_hidden]."""
        return F.linear(patches, self.proj.weight.sum(2).flatten(1))


class VisionAttention(nn.Module):
    def __init__(self, config: NanoConfig):
        super().__init__()
        self.heads = config.vit_heads
        self.qkv = nn.Linear(config.vit_hidden, 3 * config.vit_hidden)
        self.proj = nn.Linear(config.vit_hidden, config.vit_hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(attend(rotate(q, cos, sin), rotate(k, cos, sin), v, x.new_zeros(1, 1, 1, 1)))


class VisionBlock(nn.Module):
    def __init__(self, config: NanoConfig):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.vit_hidden, config.eps)
        self.norm2 = nn.RMSNorm(config.vit_hidden, config.eps)
        self.attn = VisionAttention(config)
        self.mlp = SwiGLU(config.vit_hidden, config.vit_intermediate, bias=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    """Four neighbouring patches to one token of the decoder's width."""

    def __init__(self, config: NanoConfig):
        super().__init__()
        merged = 4 * config.vit_hidden
        self.ln_q = nn.RMSNorm(config.vit_hidden, config.eps)
        self.mlp = nn.Sequential(nn.Linear(merged, merged), nn.GELU(), nn.Linear(merged, config.hidden))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.ln_q(x).view(x.shape[0], x.shape[1] // 4, -1))


class NanoViT(nn.Module):
    """The Qwen2.5-VL tower for the one size 112 x 112: one window holds the whole picture."""

    def __init__(self, config: NanoConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.vit_layers))
        self.merger = Merger(config)
        for name, table in zip(("cos", "sin"), self._rope(), strict=True):
            self.register_buffer(name, table, persistent=False)
        self.register_buffer("mean", torch.tensor(PIXEL_MEAN), persistent=False)
        self.register_buffer("std", torch.tensor(PIXEL_STD), persistent=False)
        self._initialise()

    def _rope(self) -> Iterator[Tensor]:
        """Tables [patches, head width] in merge order: 2 x 2 blocks of patches, blocks in raster order."""
        grid, width = self.config.patch_grid, self.config.vit_hidden // self.config.vit_heads // 2
        frequency = 10000.0 ** -(torch.arange(0, width, 2).float() / width)
        rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
        parts = []
        for index in (rows, columns):
            order = index.view(grid // 2, 2, grid // 2, 2).permute(0, 2, 1, 3).reshape(-1)
            parts.append(order[:, None] * frequency)
        angle = torch.cat((*parts, *parts), -1)
        yield angle.cos()
        yield angle.sin()

    @torch.no_grad()
    def _initialise(self) -> None:
        residual = (2 * self.config.vit_layers) ** -0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)
                if name.endswith(("attn.proj", "down_proj")):
                    module.weight.mul_(residual)
        nn.init.normal_(self.patch_embed.proj.weight, std=(6 * self.config.patch**2) ** -0.5)

    def forward(self, pictures_u8: Tensor) -> Tensor:
        """uint8 [b, 112, 112, 3] -> merged tokens [b, 16, hidden] in raster order."""
        grid, patch = self.config.patch_grid // 2, self.config.patch
        x = (pictures_u8.float() / 255 - self.mean) / self.std
        x = x.view(-1, grid, 2, patch, grid, 2, patch, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)
        x = self.patch_embed(x.reshape(x.shape[0], 4 * grid * grid, 3 * patch * patch))
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.merger(x)
