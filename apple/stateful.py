"""What a Core ML package computes, in torch: some layers with a cache of fixed room, or one of the network's ends.

The ends hold one matrix each that is as large as eight layers, and are packages of their own.
Separate from the conversion, so that it can be checked wherever torch runs.

Letters in shapes: t new token, s token so far, d head width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from apple.decoder import DecoderConfig, DecoderLayer, rope_tables

START, END = "embedding", "head"
Piece = range | str  # layers, or START or END
_SMALLEST = 2.0**-10  # keeps the division finite where a token is all zeros


class WideRMSNorm(nn.Module):
    """The same norm without squares beyond float16: x is first divided by its largest magnitude.

    Residuals of this model family exceed 256, whose square float16 cannot hold. Any divisor gives the same result.
    The last cast does nothing in torch. It keeps the converter, which widens what meets a number, from widening every
    weight behind the norm as well.
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.root_eps = eps**0.5

    def forward(self, x: Tensor) -> Tensor:
        largest = x.abs().amax(-1, keepdim=True) + _SMALLEST
        small = x / largest
        square = small.square().mean(-1, keepdim=True) + (self.root_eps / largest).square()
        return (small * torch.rsqrt(square) * self.weight).to(x.dtype)


class Part(nn.Module):
    """Some layers with their cache."""

    def __init__(self, config: DecoderConfig, layers: range, context: int):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config, WideRMSNorm) for _ in layers)
        shape = (len(layers), config.num_key_value_heads, context, config.head_dim)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float16, device="cpu"), persistent=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        end = mask.shape[1]
        begin = end - mask.shape[0]
        for index, layer in enumerate(self.layers):
            def remember(k: Tensor, v: Tensor, index: int = index) -> tuple[Tensor, Tensor]:
                self.keys[index:index + 1, :, begin:end] = k.half()
                self.values[index:index + 1, :, begin:end] = v.half()
                past = (cache[index:index + 1, :, :end].to(k.dtype) for cache in (self.keys, self.values))
                return tuple(past)

            x = layer(x, (cos, sin), mask, remember)
        return x


class Start(nn.Module):
    """The embedding, in front of the first layer."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embed_tokens(ids)


class End(nn.Module):
    """The norm and the head behind the last layer."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.norm = WideRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.norm(x))


def build(tensors: Mapping[str, Tensor], config: DecoderConfig, piece: Piece, context: int) -> nn.Module:
    """The package as a torch module of the given tensors, named as in the extracted folder; keys must agree exactly."""
    with torch.device("meta"):
        module = Part(config, piece, context) if isinstance(piece, range) else {START: Start, END: End}[piece](config)
    renamed = {}
    for name, tensor in tensors.items():
        short = name.removeprefix("model.")
        if short.startswith("layers."):
            _, index, rest = short.split(".", 2)
            short = f"layers.{int(index) - piece.start}.{rest}"
        renamed[short] = tensor
    module.load_state_dict(renamed, assign=True)
    return module.eval().requires_grad_(False)


def example_inputs(config: DecoderConfig, piece: Piece, past: int, new: int) -> tuple[Tensor, ...]:
    """Inputs of the right shapes, float16: `new` tokens behind `past` ones."""
    if piece == START:
        return (torch.zeros(1, new, dtype=torch.int32),)
    hidden = torch.zeros(1, new, config.hidden_size).half()
    if piece == END:
        return (hidden,)
    return hidden, *(table.half() for table in step_inputs(config, past, new))


def step_inputs(config: DecoderConfig, past: int, new: int) -> tuple[Tensor, Tensor, Tensor]:
    """cos, sin [t, d] and mask [t, s] of `new` tokens behind `past` ones, float32: what a caller computes per step."""
    cos, sin = rope_tables(config, torch.arange(past, past + new))
    return cos, sin, torch.full((new, past + new), float("-inf")).triu(past + 1)
