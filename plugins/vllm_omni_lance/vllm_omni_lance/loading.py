"""Loading repairs: without them vllm-omni 0.30.0 loads Lance neither in bfloat16 nor in 4 bits.

1. Names. vllm (since 0.29) loads a shared embedding under its first name only. LancePipeline registers its language
   model three times and the weights come under the last name, `bagel.…`: that child goes to the front. It also makes
   the loader's check for missing weights cover the decoder.
2. Attributes. The generation expert's weights sit in a bare module, `gen_exp`. Quantization methods read attributes of
   a layer after loading (NVFP4's Marlin step: params_dtype), which that module has not got: they are copied.
3. Dispatch. On CUDA the two-expert linear looks at `weight` to choose a fused kernel. Packed layers have no `weight`
   (INT4) or one of bytes or words (NVFP4), for which there is no fused kernel: they take the path that gathers the rows
   of each expert and runs the quantization method on them.

4. Angles. The decoder's rotary angles are a matrix product of frequencies and positions, and autocast makes that
   bfloat16: whole numbers above 256 are no longer told apart, and an angle of 1000 radians is off by up to 2. They are
   computed with autocast off, in float32, as in the official code.

With them the frequencies are rounded to bfloat16 (and kept in float32), as the official `model.to(bfloat16)` does. The
weights are used with these: at position 1000, where edits put their source, the phase differs by up to 1.15 radians.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vllm_omni_lance.patching import replace

# What the quantization methods of vllm 0.30 read of a linear layer, beside what MoT layers copy themselves.
_READ_LATER = ("params_dtype", "scheme", "has_bias", "prefix", "orig_dtype", "quant_config", "output_partition_sizes",
               "logical_widths", "tp_rank", "tp_size", "input_size", "input_size_per_partition", "output_size",
               "output_size_per_partition")


def patch() -> None:
    """Apply all repairs."""
    from vllm_omni.diffusion.models.bagel.bagel_transformer import BagelRotaryEmbedding
    from vllm_omni.diffusion.models.bagel.mot.mot_qkv_parallel_linear import MoTQKVParallelLinear
    from vllm_omni.diffusion.models.bagel.mot.mot_row_parallel_linear import MoTRowParallelLinear
    from vllm_omni.diffusion.models.lance.pipeline_lance import LancePipeline

    for linear in (MoTQKVParallelLinear, MoTRowParallelLinear):
        replace(linear, "__init__", _then(share_attributes))
        replace(linear, "_mot_gemm_dispatch", _packed_rows_by_expert)
    replace(BagelRotaryEmbedding, "forward", _in_float32)
    replace(LancePipeline, "__init__", _then(put_bagel_first, round_frequencies))


def _then(*steps: Callable[[Any], None]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A constructor followed by `steps` on what it made."""
    def make(original: Callable[..., None]) -> Callable[..., None]:
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            for step in steps:
                step(self)

        return __init__

    return make


def put_bagel_first(pipeline: nn.Module) -> None:
    """Repair 1."""
    pipeline._modules = {"bagel": pipeline._modules["bagel"], **pipeline._modules}


def share_attributes(linear: nn.Module) -> None:
    """Repair 2."""
    for name in _READ_LATER:
        if hasattr(linear, name) and not hasattr(linear.gen_exp, name):
            setattr(linear.gen_exp, name, getattr(linear, name))


def is_packed(linear: nn.Module) -> bool:
    """Whether a linear's weights are codes in bytes or words, for which there is no fused two-expert kernel."""
    weight = getattr(linear, "weight", None)
    return weight is None or weight.dtype in (torch.uint8, torch.int32)


def _packed_rows_by_expert(original: Callable[..., Any]) -> Callable[..., Any]:
    """Repair 3."""
    def _mot_gemm_dispatch(self: Any, x: torch.Tensor, text_indices: torch.Tensor,
                           vae_indices: torch.Tensor) -> torch.Tensor:
        if is_packed(self):
            return self._mot_fallback(x, text_indices, vae_indices)
        return original(self, x, text_indices, vae_indices)

    return _mot_gemm_dispatch


def _in_float32(original: Callable[..., Any]) -> Callable[..., Any]:
    """Repair 4."""
    def forward(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            return original(self, x, position_ids)

    return forward


def round_frequencies(pipeline: nn.Module) -> None:
    """Round the rotary frequencies of decoder and ViT to bfloat16, kept in float32 for the angles."""
    for module in pipeline.modules():
        frequencies = module._buffers.get("inv_freq")
        if frequencies is not None and not frequencies.is_meta:
            module._buffers["inv_freq"] = frequencies.bfloat16().to(frequencies.dtype)
