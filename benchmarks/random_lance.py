"""Lance's language model in its real shape with random weights, made in place: what the benchmarks of speed and memory
run. No file is read or written, and a packed model never exists in floats."""

import itertools
from collections.abc import Collection

import torch
from torch import Tensor, nn

from lance_quant.formats import int8, layout
from lance_quant.formats.base import Codec
from lance_quant.formats.int4 import Int4, Int4Weight
from lance_quant.formats.layout import EXPERTS, Expert
from lance_quant.formats.nvfp4 import Nvfp4, Nvfp4Weight
from lance_quant.kernels.quantized_linear import Int8Embedding, Int8Linear, WQLinearINT4, WQLinearNVFP4
from lance_quant.lance.config import LanceConfig
from lance_quant.lance.mot import Lance
from lance_quant.storage.tensor_file import TensorSpec

REAL_LAYERS = 36
_GROUP = 64
_TILE = 1 << 20  # values drawn; larger tensors repeat them, since speed does not depend on values
_INT8_SCALE, _INT4_SCALE, _NVFP4_SCALE = 0.00027, 0.0043, 0.0065  # give weights the width of the float ones
FORMATS: dict[str, Codec | None] = {"float32": None, "bfloat16": None, "int4": Int4(_GROUP), "nvfp4": Nvfp4(),
                                    "nvfp4_slim": Nvfp4(slim=True)}


def real_config(layers: int = REAL_LAYERS) -> LanceConfig:
    """The shape of Lance_3B, with so many layers."""
    return LanceConfig(hidden_size=2048, num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=2,
                       intermediate_size=11008, vocab_size=151936, rms_norm_eps=1e-6, rope_theta=1e6,
                       mrope_section=(16, 24, 24))


def compute_dtype(form: str, packed: torch.dtype) -> torch.dtype:
    """What a format computes in; packed ones compute in `packed`."""
    return packed if FORMATS[form] is not None else getattr(torch, form)


def random_lance(config: LanceConfig, form: str, dtype: torch.dtype, device: torch.device,
                 experts: Collection[Expert] = EXPERTS, vocabulary: Tensor | None = None,
                 head_bits: int = 16) -> Lance:
    """A model with linears of one of the FORMATS.

    Args:
        dtype: see compute_dtype.
        experts: those that are needed. What is specific to the other one stays on the meta device.
        vocabulary: a table of that dtype that is head and embedding, which saves memory; by default both are made.
        head_bits: 8 keeps head and embedding as `awq_apply.py --head_bits 8` stores them.
    """
    with torch.device("meta"):
        model = Lance(config, dtype, device).to(dtype)
    if vocabulary is not None:
        for part in (model.language_model.lm_head, model.language_model.model.embed_tokens):
            part.weight = nn.Parameter(vocabulary, requires_grad=False)
    if head_bits == 8:
        shape = (config.vocab_size, config.hidden_size)
        for name, layer in zip(layout.VOCABULARY, (Int8Embedding(shape, dtype), Int8Linear(shape, dtype)),
                               strict=True):
            codes = random_values(shape, torch.uint8, device).view(torch.int8)
            layer.fill(int8.Int8Weight(codes, torch.full(shape[:1], _INT8_SCALE, dtype=torch.bfloat16, device=device)))
            model.set_submodule(name, layer)
    if FORMATS[form] is not None:
        for name in layout.linears(config.num_hidden_layers):
            if layout.expert_of(name) in experts:
                _pack(model, name, FORMATS[form], dtype, device)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta and ("_moe_gen" not in name or "gen" in experts):
            owner, _, last = name.rpartition(".")
            values = random_values(parameter.shape, dtype, device).mul_(0.02).add_(1 if "norm" in name else 0)
            setattr(model.get_submodule(owner), last, nn.Parameter(values, requires_grad=False))
    model.compute_buffers(dtype)
    return model.eval()


def _pack(model: Lance, name: str, codec: Codec, dtype: torch.dtype, device: torch.device) -> None:
    owner, _, last = name.rpartition(".")
    linear = getattr(model.get_submodule(owner), last)
    n_out, n_in, biased = linear.out_features, linear.in_features, linear.bias is not None
    how = {"bias": biased, "dtype": dtype, "device": "meta"}
    if isinstance(codec, Int4):
        layer = WQLinearINT4(n_in, n_out, codec.group_size, **how)
    else:
        layer = WQLinearNVFP4(n_in, n_out, slim=codec.slim, **how)
    layer.fill(_packed(codec, (n_out, n_in), device),
               random_values((n_out,), dtype, device).mul_(0.02) if biased else None)
    setattr(model.get_submodule(owner), last, layer)


def _packed(codec: Codec, shape: tuple[int, int], device: torch.device) -> Int4Weight | Nvfp4Weight:
    """Random codes under one scale."""
    specs: dict[str, TensorSpec] = codec.specs(shape)
    codes = random_values(specs["qweight"].shape, torch.uint8, device)
    if isinstance(codec, Int4):
        full = {name: torch.full(specs[name].shape, value, dtype=specs[name].dtype, device=device)
                for name, value in (("scales", _INT4_SCALE), ("zeros", 8))}
        return Int4Weight(codes, full["scales"], full["zeros"])
    name, value = ("scales_e4m3", 0x38) if codec.slim else ("scales_bf16", _NVFP4_SCALE)  # 0x38: 1 in E4M3
    scales = torch.full(specs[name].shape, value, dtype=specs[name].dtype, device=device)
    return Nvfp4Weight(codes, scales, _NVFP4_SCALE if codec.slim else 1.0)


def random_values(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Standard normal numbers, or random bytes."""
    out = torch.empty(shape, dtype=dtype, device=device)
    if out.is_meta:
        return out
    flat, generator = out.view(-1), torch.Generator(device).manual_seed(0)
    tile = flat[:_TILE]
    if dtype == torch.uint8:
        tile.random_(generator=generator)
    else:
        tile.normal_(generator=generator)
    for first in itertools.count(_TILE, _TILE):
        if first >= len(flat):
            return out
        part = flat[first:first + _TILE]
        part.copy_(tile[:len(part)])


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights and buffers; without those on the meta device, unless all of the model is there."""
    tensors = [*model.parameters(), *model.buffers()]
    kept = [tensor for tensor in tensors if not tensor.is_meta] or tensors
    return sum(tensor.numel() * tensor.itemsize for tensor in {id(tensor): tensor for tensor in kept}.values())
