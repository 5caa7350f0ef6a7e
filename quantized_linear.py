"""Linear layers over packed 4-bit weights, in plain PyTorch, and the swap that puts them into a model.

A layer holds the bytes of a packed folder under the names they have there and dequantizes them through
`lance_quant.int4` and `lance_quant.nvfp4`, the only definition of what the bytes mean. Weights are 4-bit, arithmetic is
not: this saves memory, not multiplications. Two modes:

    ondemand  keep the packed bytes and dequantize in every forward
    cached    dequantize once, keep the result in the compute dtype and drop the packed bytes: as fast and as large as
              an unquantized model, never larger

`swap_linears` serves models that are still on `meta`, so a whole float model never exists.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lance_quant.codec import Codec, Int4, Nvfp4, PackedWeight, dequantize_to
from lance_quant.errors import InputError
from lance_quant.int4 import Int4Weight
from lance_quant.nvfp4 import Nvfp4Weight
from lance_quant.packed import PackedFolder
from lance_quant.tensorfile import require_finite

Mode = Literal["ondemand", "cached"]


class _PackedLinear(nn.Module):
    """What both formats share; see WQLinearINT4."""

    def __init__(self, in_features: int, out_features: int, codec: Codec, bias: bool, dtype: torch.dtype,
                 device: torch.device | str | None, mode: Mode):
        super().__init__()
        if mode not in ("ondemand", "cached"):
            raise ValueError(f"mode {mode!r} is neither ondemand nor cached")
        codec.require_fits("this linear", (out_features, in_features))
        self.in_features, self.out_features = in_features, out_features
        self.codec, self.dtype, self.mode = codec, dtype, mode
        self._specs = codec.specs((out_features, in_features))
        for suffix, spec in self._specs.items():
            if suffix != "scales_fp8":  # repeats scales_bf16 with less precision
                self.register_buffer(suffix, torch.empty(spec.shape, dtype=spec.dtype, device=device))
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None)
        self.register_buffer("cached", None, persistent=False)

    def _packed(self) -> PackedWeight:
        raise NotImplementedError

    def fill(self, q: PackedWeight, bias: Tensor | None) -> None:
        """Take over a packed weight, and a bias that is converted to the compute dtype, with their device."""
        for suffix, tensor in self._named(q).items():
            setattr(self, suffix, tensor)
        if self.mode == "cached":
            self.cached = dequantize_to(self.codec, q, self.dtype)
            for suffix in self._named(q):
                setattr(self, suffix, None)
        if self.bias is not None:
            self.bias = bias.to(self.dtype)

    def _named(self, q: PackedWeight) -> dict[str, Tensor]:
        suffixes = [suffix for suffix in self._specs if suffix != "scales_fp8"]
        return dict(zip(suffixes, (field for field in q if isinstance(field, Tensor)), strict=True))

    def file_keys(self, prefix: str) -> set[str]:
        """The tensors of a packed file that this layer accounts for, in either mode; `prefix` is its module name."""
        own = set(self._specs) | ({"bias"} if self.bias is not None else set())
        return {f"{prefix}.{suffix}" for suffix in own}

    def dequantize(self) -> Tensor:
        """float32 [out, in] (in cached mode: of what is kept, so rounded to the compute dtype)."""
        if self.cached is not None:
            return self.cached.float()
        return dequantize_to(self.codec, self._packed(), torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] in the compute dtype -> [..., out]."""
        weight = self.cached if self.cached is not None else dequantize_to(self.codec, self._packed(), self.dtype)
        return F.linear(x, weight, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # model.to(dtype) must move the scales, not round them, so `fn` is shown bytes; the compute dtype is set once,
        # when the layer is made.
        return super()._apply(lambda tensor: fn(tensor.view(torch.uint8)).view(tensor.dtype), recurse)

    def extra_repr(self) -> str:
        """Shape, format and mode."""
        return (f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
                f"{self.codec}, {str(self.dtype).removeprefix('torch.')}, {self.mode}")


class WQLinearINT4(_PackedLinear):
    """Drop-in nn.Linear over INT4 bytes.

    Buffers: qweight uint8 [out, in/2], scales bfloat16 and zeros uint8 [out, in/group_size], bias in the compute dtype.
    They are empty until `fill`; on `meta` the layer costs nothing.

    Args:
        in_features, out_features, bias: as for nn.Linear.
        group_size: inputs per scale.
        dtype: compute dtype: of the bias, of the dequantized weight and of the inputs that are expected.
        device: where the buffers are; "meta" is fine.
        mode: "ondemand" or "cached", see the module docstring.
    """

    def __init__(self, in_features: int, out_features: int, group_size: int, bias: bool = True, *,
                 dtype: torch.dtype, device: torch.device | str | None = None, mode: Mode = "ondemand"):
        super().__init__(in_features, out_features, Int4(group_size), bias, dtype, device, mode)

    def _packed(self) -> Int4Weight:
        return Int4Weight(self.qweight, self.scales, self.zeros)


class WQLinearNVFP4(_PackedLinear):
    """Drop-in nn.Linear over NVFP4 bytes.

    Buffers: qweight uint8 [out, in/2], scales_bf16 bfloat16 [out, in/16] or, slim, scales_e4m3 uint8 [out, in/16]; bias
    in the compute dtype. The published file's scales_fp8 is not kept. `global_scale` is a float, from the meta.

    Args:
        slim: the file holds scales_e4m3 instead of scales_bf16.
        Others: as for WQLinearINT4.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, slim: bool = False, *,
                 dtype: torch.dtype, device: torch.device | str | None = None, mode: Mode = "ondemand"):
        super().__init__(in_features, out_features, Nvfp4(slim), bias, dtype, device, mode)
        self.global_scale = 1.0

    def fill(self, q: Nvfp4Weight, bias: Tensor | None) -> None:
        """See _PackedLinear.fill."""
        self.global_scale = q.global_scale
        super().fill(q, bias)

    def _packed(self) -> Nvfp4Weight:
        return Nvfp4Weight(self.qweight, self.scales_e4m3 if self.codec.slim else self.scales_bf16, self.global_scale)


def swap_linears(model: nn.Module, folder: PackedFolder | Path, dtype: torch.dtype, device: torch.device | str,
                 mode: Mode = "ondemand") -> list[str]:
    """Replace exactly the linears that a packed folder lists, and fill them from its file.

    Args:
        model: its module names are those of the checkpoint; may be on `meta`.
        folder: open folder, or the path of one.
        dtype: compute dtype of the new layers.
        device: where their buffers go, one layer at a time.
        mode: see the module docstring.

    Returns:
        Names of the replaced modules.

    Raises:
        InputError: a listed linear is no nn.Linear of the model, or its shape or bias differs; the first five are
            named and the model is left as it was.
    """
    if not isinstance(folder, PackedFolder):
        with PackedFolder(folder) as opened:
            return swap_linears(model, opened, dtype, device, mode)
    modules = dict(model.named_modules())
    wrong = [text for name in folder.linears if (text := _misfit(name, modules.get(name), folder))]
    if wrong:
        raise InputError(f"{folder.path} does not fit this model in {len(wrong)} linears, first: "
                         f"{'; '.join(wrong[:5])}")
    for name in folder.linears:
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, _filled(name, folder, dtype, device, mode))
    return list(folder.linears)


def _misfit(name: str, module: nn.Module | None, folder: PackedFolder) -> str | None:
    shape, has_bias = folder.linears[name].shape, f"{name}.bias" in folder.checkpoint.specs
    if module is None:
        return f"{name} is not in the model"
    if not isinstance(module, nn.Linear):
        return f"{name} is a {type(module).__name__}, not a Linear"
    if (module.out_features, module.in_features) != shape:
        return f"{name} is {[module.out_features, module.in_features]} in the model and {list(shape)} in the file"
    if (module.bias is not None) != has_bias:
        return f"{name} has {'a' if has_bias else 'no'} bias in the file, unlike the model"
    return None


def _filled(name: str, folder: PackedFolder, dtype: torch.dtype, device: torch.device | str, mode: Mode) -> nn.Module:
    spec = folder.linears[name]
    n_out, n_in = spec.shape
    has_bias = f"{name}.bias" in folder.checkpoint.specs
    shared = {"bias": has_bias, "dtype": dtype, "device": "meta", "mode": mode}
    if folder.format == "int4":
        layer = WQLinearINT4(n_in, n_out, spec.group_size, **shared)
    else:
        layer = WQLinearNVFP4(n_in, n_out, slim=folder.slim, **shared)
    bias = folder.checkpoint.read(f"{name}.bias", dtype, device) if has_bias else None
    q = folder.read_weight(name, device)
    for tensor in (part for part in (*q, bias) if isinstance(part, Tensor)):
        require_finite(tensor, f"{folder.path}: {name}")
    layer.fill(q, bias)
    return layer
