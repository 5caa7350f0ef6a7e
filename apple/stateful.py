"""Some layers of the understanding path with a cache of fixed room: what a Core ML package computes, in torch.

Separate from the conversion, so that it can be checked wherever torch runs.

Letters in shapes: t new token, s token so far, d head width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from apple.decoder import DecoderConfig, DecoderLayer, rope_tables

_SMALLEST = 2.0**-10  # keeps the division finite where a token is all zeros


class WideRMSNorm(nn.Module):
    """The same norm without squares beyond float16: x is first divided by its largest magnitude.

    Residuals of this model family exceed 256, whose square float16 cannot hold. Any divisor gives the same result.
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.root_eps = eps**0.5

    def forward(self, x: Tensor) -> Tensor:
        largest = x.abs().amax(-1, keepdim=True) + _SMALLEST
        small = x / largest
        square = small.square().mean(-1, keepdim=True) + (self.root_eps / largest).square()
        return small * torch.rsqrt(square) * self.weight


class Part(nn.Module):
    """Some layers with their cache; at the ends of the network the embedding, or norm and head, with them."""

    def __init__(self, config: DecoderConfig, layers: range, context: int):
        super().__init__()
        self.first, self.last = layers.start == 0, layers.stop == config.num_hidden_layers
        if self.first:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, WideRMSNorm) for _ in layers)
        if self.last:
            self.norm = WideRMSNorm(config.hidden_size, config.rms_norm_eps)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        shape = (len(layers), config.num_key_value_heads, context, config.head_dim)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float16), persistent=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        end = mask.shape[1]
        begin = end - mask.shape[0]
        if self.first:
            x = self.embed_tokens(x)
        for index, layer in enumerate(self.layers):
            def remember(k: Tensor, v: Tensor, index: int = index) -> tuple[Tensor, Tensor]:
                self.keys[index:index + 1, :, begin:end] = k.half()
                self.values[index:index + 1, :, begin:end] = v.half()
                past = (cache[index:index + 1, :, :end].to(k.dtype) for cache in (self.keys, self.values))
                return tuple(past)

            x = layer(x, (cos, sin), mask, remember)
        return self.lm_head(self.norm(x)) if self.last else x


def build(tensors: Mapping[str, Tensor], config: DecoderConfig, layers: range, context: int) -> Part:
    """The package as a torch module, filled from tensors named as in the extracted folder; keys must agree exactly."""
    part = Part(config, layers, context)
    renamed = {}
    for name, tensor in tensors.items():
        short = name.removeprefix("model.")
        if short.startswith("layers."):
            _, index, rest = short.split(".", 2)
            short = f"layers.{int(index) - layers.start}.{rest}"
        renamed[short] = tensor.float()
    part.load_state_dict(renamed)
    return part.eval().requires_grad_(False)


def example_inputs(config: DecoderConfig, layers: range, past: int, new: int) -> tuple[Tensor, ...]:
    """Inputs of the right shapes: `new` tokens behind `past` ones."""
    first = torch.zeros(1, new, dtype=torch.int32) if layers.start == 0 else torch.zeros(1, new, config.hidden_size)
    table = torch.zeros(new, config.head_dim)
    mask = torch.full((new, past + new), float("-inf")).triu(past + 1)
    return first, table, table, mask


def step_inputs(config: DecoderConfig, past: int, new: int) -> tuple[Tensor, Tensor, Tensor]:
    """cos, sin [t, d] and mask [t, s] of `new` tokens behind `past` ones, float32: what a caller computes per step."""
    cos, sin = rope_tables(config, torch.arange(past, past + new))
    return cos, sin, torch.full((new, past + new), float("-inf")).triu(past + 1)
