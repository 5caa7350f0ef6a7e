"""Linear layers over packed 4-bit weights, in plain PyTorch, and the swap that puts them into a model.

A layer holds the bytes of a packed folder under the names they have there and dequantizes them through
`lance_quant.formats.int4` and `lance_quant.formats.nvfp4`, the only definition of what the bytes mean. Weights are
4-bit, arithmetic is not: this saves memory and its traffic, not multiplications. Two modes:

    ondemand  keep the packed bytes and compute on them, with the kernel that suits device, dtype and format
              (lance_quant.kernels)
    cached    dequantize once, keep the result in the compute dtype and drop the packed bytes: as fast and as large as
              an unquantized model, never larger

`swap_linears` serves models that are still on `meta`, so a whole float model never exists.
"""

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lance_quant.errors import InputError
from lance_quant.formats import int8
from lance_quant.formats.base import Codec, Int4, Nvfp4, PackedWeight, dequantize_to
from lance_quant.formats.int4 import Int4Weight
from lance_quant.formats.nvfp4 import Nvfp4Weight
from lance_quant.formats.packed_folder import PackedFolder
from lance_quant.kernels import dispatch
from lance_quant.storage.tensor_file import require_finite

Mode = Literal["ondemand", "cached"]


class _PackedLinear(nn.Module):
    """What both formats share; see WQLinearINT4."""

    def __init__(self, in_features: int, out_features: int, codec: Codec, bias: bool, dtype: torch.dtype,
                 device: torch.device | str | None, mode: Mode, kernel: dispatch.Choice):
        super().__init__()
        if mode not in ("ondemand", "cached"):
            raise ValueError(f"mode {mode!r} is neither ondemand nor cached")
        codec.require_fits("this linear", (out_features, in_features))
        self.in_features, self.out_features = in_features, out_features
        self.codec, self.dtype, self.mode, self.choice = codec, dtype, mode, kernel
        self._kernel: tuple[torch.device, dispatch.Kernel] | None = None
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

    def kind(self) -> Hashable:
        """Equal for layers whose rows may follow one another in one layer."""
        return (type(self), self.codec, self.in_features, self.bias is None, self.dtype, self.mode,
                self.choice, next(self.buffers()).device)

    def row_buffers(self) -> list[str]:
        """Names of the buffers that are there; each has one row per output."""
        return [name for name, _ in self.named_buffers()]

    def empty_like(self, out_features: int) -> "_PackedLinear":
        """A layer of the same kind with another number of outputs, on meta."""
        raise NotImplementedError

    @staticmethod
    def stacked(linears: Sequence[nn.Module]) -> "_PackedLinear | None":
        """See merge_rows; for code that knows a layer but not this file."""
        return merge_rows(linears)

    def dequantize(self) -> Tensor:
        """float32 [out, in] (in cached mode: of what is kept, so rounded to the compute dtype)."""
        if self.cached is not None:
            return self.cached.float()
        return dequantize_to(self.codec, self._packed(), torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] in the compute dtype -> [..., out]."""
        if self.cached is not None:
            return F.linear(x, self.cached, self.bias)
        if x.dtype != self.dtype or x.shape[-1] != self.in_features:
            raise ValueError(f"expected {self.in_features} inputs in {self.dtype}, got {x.shape[-1]} in {x.dtype}")
        kernel = self.kernel()
        if x.requires_grad and torch.is_grad_enabled():  # the others have no gradient
            kernel = dispatch.choose("reference", self.codec, self.in_features, self.dtype, x.device)
        y = kernel.linear(x.reshape(-1, self.in_features), self._packed(), self.codec, self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def kernel(self) -> dispatch.Kernel:
        """What computes this layer where it is now; InputError if one was asked for that cannot."""
        device = self.qweight.device
        if self._kernel is None or self._kernel[0] != device:
            self._kernel = device, dispatch.choose(self.choice, self.codec, self.in_features, self.dtype, device)
        return self._kernel[1]

    def settle(self) -> None:
        """Choose the kernel now rather than when this first runs: torch.compile cannot follow the choice."""
        if self.cached is None:
            self.kernel()

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
        kernel: what computes in mode ondemand, see lance_quant.kernels.
    """

    def __init__(self, in_features: int, out_features: int, group_size: int, bias: bool = True, *,
                 dtype: torch.dtype, device: torch.device | str | None = None, mode: Mode = "ondemand",
                 kernel: dispatch.Choice = "auto"):
        super().__init__(in_features, out_features, Int4(group_size), bias, dtype, device, mode, kernel)

    def empty_like(self, out_features: int) -> "WQLinearINT4":
        """See _PackedLinear.empty_like."""
        return WQLinearINT4(self.in_features, out_features, self.codec.group_size, self.bias is not None,
                            dtype=self.dtype, device="meta", mode=self.mode, kernel=self.choice)

    def _packed(self) -> Int4Weight:
        return Int4Weight(self.qweight, self.scales, self.zeros)


class WQLinearNVFP4(_PackedLinear):
    """Drop-in nn.Linear over NVFP4 bytes.

    Buffers: qweight uint8 [out, in/2], scales_bf16 bfloat16 [out, in/16] or, slim, scales_e4m3 uint8 [out, in/16]; bias
    in the compute dtype. The published file's scales_fp8 is not kept. A slim layer's `global_scale` float32 [out, 1]
    comes from the meta and is no part of the state dict; it has a row per output because merged layers have several.

    Args:
        slim: the file holds scales_e4m3 instead of scales_bf16.
        Others: as for WQLinearINT4.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, slim: bool = False, *,
                 dtype: torch.dtype, device: torch.device | str | None = None, mode: Mode = "ondemand",
                 kernel: dispatch.Choice = "auto"):
        super().__init__(in_features, out_features, Nvfp4(slim), bias, dtype, device, mode, kernel)
        ones = torch.ones(out_features, 1, dtype=torch.float32, device=device) if slim else None
        self.register_buffer("global_scale", ones, persistent=False)

    def fill(self, q: Nvfp4Weight, bias: Tensor | None) -> None:
        """See _PackedLinear.fill."""
        super().fill(q, bias)
        if self.codec.slim:
            ones = torch.ones(self.out_features, 1, dtype=torch.float32, device=q.packed.device)
            self.global_scale = ones * q.global_scale if self.mode == "ondemand" else None

    def empty_like(self, out_features: int) -> "WQLinearNVFP4":
        """See _PackedLinear.empty_like."""
        return WQLinearNVFP4(self.in_features, out_features, self.bias is not None, self.codec.slim,
                             dtype=self.dtype, device="meta", mode=self.mode, kernel=self.choice)

    def _packed(self) -> Nvfp4Weight:
        if self.codec.slim:
            return Nvfp4Weight(self.qweight, self.scales_e4m3, self.global_scale)
        return Nvfp4Weight(self.qweight, self.scales_bf16, 1.0)


def merge_rows(linears: Sequence[nn.Module]) -> "WQLinearINT4 | WQLinearNVFP4 | None":
    """One packed linear that computes torch.cat([linear(x) for linear in linears], -1) in one call.

    The packed rows are concatenated as they are, since rows of either format are independent. No second copy stays:
    the buffers of `linears` become views of the merged ones, so the old layers go on working and dropping them frees
    nothing more. Merge when the model is on its device: `.to(device)` copies old and merged layers separately.

    Args:
        linears: filled layers that read the same input.

    Returns:
        The merged layer, or None where there is none: a member is no packed linear, or they differ in format, group
        size, inputs, presence of a bias, dtype, device, mode or kernel. Global scales of NVFP4 may differ.
    """
    if not all(isinstance(linear, _PackedLinear) for linear in linears) or len({part.kind() for part in linears}) > 1:
        return None
    first = linears[0]
    whole = first.empty_like(sum(linear.out_features for linear in linears))
    for name in first.row_buffers():
        setattr(whole, name, torch.cat([getattr(linear, name) for linear in linears]))
        rows = getattr(whole, name).split([linear.out_features for linear in linears])
        for linear, part in zip(linears, rows, strict=True):
            setattr(linear, name, part)
    for name in set(dict(whole.named_buffers())) - set(first.row_buffers()):
        setattr(whole, name, None)  # in cached mode the packed bytes are gone
    return whole


def swap_linears(model: nn.Module, folder: PackedFolder | Path, dtype: torch.dtype, device: torch.device | str,
                 mode: Mode = "ondemand", kernel: dispatch.Choice = "auto") -> list[str]:
    """Replace exactly the linears that a packed folder lists, and an 8-bit head and embedding
    (lance_quant/formats/int8.py), and fill them from its file.

    Args:
        model: its module names are those of the checkpoint; may be on `meta`.
        folder: open folder, or the path of one.
        dtype: compute dtype of the new layers.
        device: where their buffers go, one layer at a time.
        mode: see the module docstring.
        kernel: what computes in mode ondemand, see lance_quant.kernels.

    Returns:
        Names of the replaced modules.

    Raises:
        InputError: a listed linear is no nn.Linear of the model, or its shape or bias differs; the first five are
            named and the model is left as it was. Or `kernel` was asked for by name and cannot serve one of them.
    """
    if not isinstance(folder, PackedFolder):
        with PackedFolder(folder) as opened:
            return swap_linears(model, opened, dtype, device, mode, kernel)
    modules = dict(model.named_modules())
    wrong = [text for name in folder.linears if (text := _misfit(name, modules.get(name), folder))]
    if wrong:
        raise InputError(f"{folder.path} does not fit this model in {len(wrong)} linears, first: "
                         f"{'; '.join(wrong[:5])}")
    if mode == "ondemand":
        require_kernel(folder, dtype, torch.device(device), kernel)
    head = int8.swap(model, folder, dtype, device, cached=mode == "cached", kernel=kernel)
    for name in folder.linears:
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, _filled(name, folder, dtype, device, mode, kernel))
    return [*folder.linears, *head]


def require_kernel(folder: PackedFolder, dtype: torch.dtype, device: torch.device, kernel: dispatch.Choice) -> None:
    """Raise InputError if a kernel was asked for by name and cannot run one of the folder's linears here.

    Of their values only the first one's are looked at, which shows how a file was made.
    """
    if kernel != "auto":
        for name, spec in folder.linears.items():
            dispatch.choose(kernel, folder.codec(name), spec.shape[1], dtype, device)
        for name in list(folder.linears)[:1]:
            dispatch.require_values(kernel, folder.read_weight(name), f"{folder.path}: {name}")


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


def _filled(name: str, folder: PackedFolder, dtype: torch.dtype, device: torch.device | str, mode: Mode,
            kernel: dispatch.Choice) -> nn.Module:
    spec = folder.linears[name]
    n_out, n_in = spec.shape
    has_bias = f"{name}.bias" in folder.checkpoint.specs
    shared = {"bias": has_bias, "dtype": dtype, "device": "meta", "mode": mode, "kernel": kernel}
    if folder.format == "int4":
        layer = WQLinearINT4(n_in, n_out, spec.group_size, **shared)
    else:
        layer = WQLinearNVFP4(n_in, n_out, slim=folder.slim, **shared)
    bias = folder.checkpoint.read(f"{name}.bias", dtype, device) if has_bias else None
    q = folder.read_weight(name, device)
    for tensor in (part for part in (*q, bias) if isinstance(part, Tensor)):
        require_finite(tensor, f"{folder.path}: {name}")
    if mode == "ondemand":
        dispatch.require_values(kernel, q, f"{folder.path}: {name}")
    layer.fill(q, bias)
    return layer
