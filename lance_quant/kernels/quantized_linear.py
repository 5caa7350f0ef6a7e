"""Weight-only quantized linear layers (W4A16) over packed bytes, the 8-bit head, and the swap into a model.

A layer holds the bytes of a packed folder under the names they have there and dequantizes them through
`lance_quant.formats`, the only definition of what the bytes mean. Weights are 4-bit, arithmetic is not (unless a kernel
that rounds activations too is asked for by name): this saves memory and its traffic, not multiplications. Two modes:

    ondemand  keep the packed bytes and compute on them, by the kernel that dispatch.py chooses
    cached    dequantize once, keep the result in the compute dtype and drop the packed bytes: as fast and as large as
              an unquantized model, never larger

`swap_linears` serves models that are still on `meta`, so a whole float model never exists.
"""

import logging
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lance_quant.errors import InputError
from lance_quant.formats import int8
from lance_quant.formats.base import Codec
from lance_quant.formats.blocks import dequantize_to
from lance_quant.formats.int4 import Int4, Int4Weight
from lance_quant.formats.int8 import Int8Weight
from lance_quant.formats.nvfp4 import Nvfp4, Nvfp4Weight
from lance_quant.formats.packed_folder import PackedFolder
from lance_quant.formats.weights import PackedWeight
from lance_quant.kernels import dispatch
from lance_quant.kernels.base import Kernel
from lance_quant.kernels.choices import KernelChoice, Mode
from lance_quant.storage.tensor_file import require_finite

log = logging.getLogger("lance_quant")


class _BytesModule(nn.Module):
    """A module whose buffers `.to(dtype)` moves and never converts; the compute dtype is set once, when it is made."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # model.to(dtype) must move the scales, not round them, so `fn` is shown bytes.
        return super()._apply(lambda tensor: fn(tensor.view(torch.uint8)).view(tensor.dtype), recurse)


class PackedLinear(_BytesModule):
    """What the layers of both 4-bit formats share; see WQLinearINT4."""

    qweight: Tensor
    bias: Tensor | None
    cached: Tensor | None

    def __init__(self, in_features: int, out_features: int, codec: Codec, bias: bool, dtype: torch.dtype,
                 device: torch.device | str | None, mode: Mode, kernel: KernelChoice):
        super().__init__()
        if mode not in ("ondemand", "cached"):
            raise ValueError(f"mode {mode!r} is neither ondemand nor cached")
        codec.require_fits("this linear", (out_features, in_features))
        self.in_features, self.out_features = in_features, out_features
        self.codec, self.dtype, self.mode, self.kernel_choice = codec, dtype, mode, kernel
        self._chosen: tuple[torch.device, Kernel] | None = None
        self._specs = codec.specs((out_features, in_features))
        for suffix, spec in self._specs.items():
            if suffix != "scales_fp8":  # repeats scales_bf16 with less precision
                self.register_buffer(suffix, torch.empty(spec.shape, dtype=spec.dtype, device=device))
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None)
        self.register_buffer("cached", None, persistent=False)

    def _packed(self) -> PackedWeight:
        raise NotImplementedError

    def fill(self, q: PackedWeight, bias: Tensor | None) -> None:
        """Take over a packed weight [out, in], and a bias [out] that is converted to the compute dtype, with their
        device.

        Raises:
            ValueError: a bias is given to a layer without one, or none to a layer with one.
        """
        if (bias is None) != (self.bias is None):
            raise ValueError(f"this layer has {'no ' if self.bias is None else 'a '}bias, unlike its weight")
        for suffix, tensor in self._named(q).items():
            setattr(self, suffix, tensor)
        if self.mode == "cached":
            self.cached = dequantize_to(self.codec, q, self.dtype)
            for suffix in self._named(q):
                setattr(self, suffix, None)
        if bias is not None:
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
                self.kernel_choice, next(self.buffers()).device)

    def row_buffers(self) -> list[str]:
        """Names of the buffers that are there; each has one row per output."""
        return [name for name, _ in self.named_buffers()]

    def empty_like(self, out_features: int) -> "PackedLinear":
        """A layer of the same kind with another number of outputs, on meta."""
        raise NotImplementedError

    @staticmethod
    def stacked(linears: Sequence[nn.Module]) -> "PackedLinear | None":
        """`merge_rows`, for code that knows a layer but not this file."""
        return merge_rows(linears)

    def dequantize(self) -> Tensor:
        """float32 [out, in] (in cached mode: of what is kept, so rounded to the compute dtype)."""
        if self.cached is not None:
            return self.cached.float()
        return dequantize_to(self.codec, self._packed(), torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply: [..., in] in the compute dtype -> [..., out] in it.

        Raises:
            ValueError: `x` has another dtype or width.
            InputError: see `kernel`.
        """
        if self.cached is not None:
            return F.linear(x, self.cached, self.bias)
        _require_input(x, self.in_features, self.dtype)
        kernel = self.kernel()
        if x.requires_grad and torch.is_grad_enabled():  # the others have no gradient
            kernel = dispatch.choose("reference", self.codec, self.in_features, self.dtype, x.device)
        y = kernel.linear(x.reshape(-1, self.in_features), self._packed(), self.codec, self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def kernel(self) -> Kernel:
        """What computes this layer where it is now.

        Raises:
            InputError: a kernel was asked for by name and cannot compute it.
        """
        device = self.qweight.device
        if self._chosen is None or self._chosen[0] != device:
            chosen = dispatch.choose(self.kernel_choice, self.codec, self.in_features, self.dtype, device)
            self._chosen = device, chosen
        return self._chosen[1]

    def settle(self) -> None:
        """Choose the kernel now rather than when this first runs: torch.compile cannot follow the choice."""
        if self.cached is None:
            self.kernel()

    def extra_repr(self) -> str:
        """Shape, format and mode."""
        return (f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
                f"{self.codec}, {str(self.dtype).removeprefix('torch.')}, {self.mode}")


def _require_input(x: Tensor, n_in: int, dtype: torch.dtype) -> None:
    if x.dtype != dtype or x.shape[-1] != n_in:
        raise ValueError(f"expected {n_in} inputs in {dtype}, got {x.shape[-1]} in {x.dtype}")


class WQLinearINT4(PackedLinear):
    """Drop-in nn.Linear over INT4 bytes.

    Buffers: qweight uint8 [out, in/2], scales bfloat16 and zeros uint8 [out, in/group_size], bias in the compute dtype.
    They are empty until `fill`; on `meta` the layer costs nothing.

    Args:
        in_features, out_features, bias: as for nn.Linear.
        group_size: inputs per scale.
        dtype: compute dtype: of the bias, of the dequantized weight and of the inputs that are expected.
        device: where the buffers are; "meta" is fine.
        mode: "ondemand" or "cached", see the module docstring.
        kernel: what computes in mode ondemand, see dispatch.py.
    """

    scales: Tensor
    zeros: Tensor

    def __init__(self, in_features: int, out_features: int, group_size: int, bias: bool = True, *,
                 dtype: torch.dtype, device: torch.device | str | None = None, mode: Mode = "ondemand",
                 kernel: KernelChoice = "auto"):
        super().__init__(in_features, out_features, Int4(group_size), bias, dtype, device, mode, kernel)

    def empty_like(self, out_features: int) -> "WQLinearINT4":
        """A layer of the same kind with another number of outputs, on meta."""
        return WQLinearINT4(self.in_features, out_features, self.codec.group_size, self.bias is not None,
                            dtype=self.dtype, device="meta", mode=self.mode, kernel=self.kernel_choice)

    def _packed(self) -> Int4Weight:
        return Int4Weight(self.qweight, self.scales, self.zeros)


class WQLinearNVFP4(PackedLinear):
    """Drop-in nn.Linear over NVFP4 bytes.

    Buffers: qweight uint8 [out, in/2], scales_bf16 bfloat16 [out, in/16] or, slim, scales_e4m3 uint8 [out, in/16]; bias
    in the compute dtype. The published file's scales_fp8 is not kept. A slim layer's `global_scale` float32 [out, 1]
    comes from the meta and is no part of the state dict; it has a row per output because merged layers have several.

    Args:
        slim: the file holds scales_e4m3 instead of scales_bf16.
        Others: as for WQLinearINT4.
    """

    scales_bf16: Tensor
    scales_e4m3: Tensor
    global_scale: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True, slim: bool = False, *,
                 dtype: torch.dtype, device: torch.device | str | None = None, mode: Mode = "ondemand",
                 kernel: KernelChoice = "auto"):
        super().__init__(in_features, out_features, Nvfp4(slim), bias, dtype, device, mode, kernel)
        self.slim = slim
        ones = torch.ones(out_features, 1, dtype=torch.float32, device=device) if slim else None
        self.register_buffer("global_scale", ones, persistent=False)

    def fill(self, q: PackedWeight, bias: Tensor | None) -> None:
        """Take over an NVFP4 weight [out, in], and a bias [out] that is converted to the compute dtype."""
        super().fill(q, bias)
        if self.slim and isinstance(q, Nvfp4Weight):
            ones = torch.ones(self.out_features, 1, dtype=torch.float32, device=q.packed.device)
            self.global_scale = ones * q.global_scale if self.mode == "ondemand" else None

    def empty_like(self, out_features: int) -> "WQLinearNVFP4":
        """A layer of the same kind with another number of outputs, on meta."""
        return WQLinearNVFP4(self.in_features, out_features, self.bias is not None, self.slim,
                             dtype=self.dtype, device="meta", mode=self.mode, kernel=self.kernel_choice)

    def _packed(self) -> Nvfp4Weight:
        if self.global_scale is not None:
            return Nvfp4Weight(self.qweight, self.scales_e4m3, self.global_scale)
        return Nvfp4Weight(self.qweight, self.scales_bf16, 1.0)


def merge_rows(linears: Sequence[nn.Module]) -> PackedLinear | None:
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
    parts = [linear for linear in linears if isinstance(linear, PackedLinear)]
    if len(parts) < len(linears) or len({part.kind() for part in parts}) > 1:
        return None
    first = parts[0]
    whole = first.empty_like(sum(part.out_features for part in parts))
    for name in first.row_buffers():
        setattr(whole, name, torch.cat([getattr(part, name) for part in parts]))
        rows = getattr(whole, name).split([part.out_features for part in parts])
        for part, own in zip(parts, rows, strict=True):
            setattr(part, name, own)
    for name in set(dict(whole.named_buffers())) - set(first.row_buffers()):
        setattr(whole, name, None)  # in cached mode the packed bytes are gone
    return whole


class _Int8Rows(_BytesModule):
    """What both 8-bit layers share: buffers `codes_int8` and `row_scales`, empty until `fill`."""

    codes_int8: Tensor
    row_scales: Tensor
    cached: Tensor | None

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, cached: bool):
        super().__init__()
        self.dtype, self._keep = dtype, cached
        for suffix, spec in int8.specs(shape).items():
            self.register_buffer(suffix, torch.empty(spec.shape, dtype=spec.dtype, device="meta"))
        self.register_buffer("cached", None, persistent=False)

    def fill(self, q: Int8Weight) -> None:
        """Take over a packed weight; cached layers keep its values in the compute dtype instead."""
        self.codes_int8, self.row_scales = q
        if self._keep:
            self.cached = torch.cat([int8.dequantize(part, self.dtype) for part in int8.blocks(q)])
            for suffix in int8.SUFFIXES:
                setattr(self, suffix, None)

    def file_keys(self, prefix: str) -> set[str]:
        """The tensors of a packed file that this layer accounts for; `prefix` is its module name."""
        return {f"{prefix}.{suffix}" for suffix in int8.SUFFIXES}


class Int8Linear(_Int8Rows):
    """Drop-in nn.Linear without bias over 8-bit rows, which a kernel computes.

    Args:
        shape: (out, in).
        dtype: compute dtype, of the inputs and outputs.
        cached: dequantize once, and keep that.
        kernel: what computes otherwise, see dispatch.choose_int8.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, cached: bool = False,
                 kernel: KernelChoice = "auto"):
        super().__init__(shape, dtype, cached)
        self.out_features, self.in_features = shape
        self.kernel_choice = kernel
        self._chosen: tuple[torch.device, Kernel] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Multiply: [..., in] in the compute dtype -> [..., out] in it.

        Raises:
            ValueError: `x` has another dtype or width.
        """
        if self.cached is not None:
            return F.linear(x, self.cached)
        _require_input(x, self.in_features, self.dtype)
        kernel = self.kernel()
        if x.requires_grad and torch.is_grad_enabled():  # the others have no gradient
            kernel = dispatch.choose_int8("reference", self.in_features, self.dtype, x.device)
        y = kernel.int8_linear(x.reshape(-1, self.in_features), Int8Weight(self.codes_int8, self.row_scales))
        return y.view(*x.shape[:-1], self.out_features)

    def kernel(self) -> Kernel:
        """What computes this layer where it is now."""
        device = self.codes_int8.device
        if self._chosen is None or self._chosen[0] != device:
            chosen = dispatch.choose_int8(self.kernel_choice, self.in_features, self.dtype, device)
            self._chosen = device, chosen
        return self._chosen[1]

    def settle(self) -> None:
        """Choose the kernel now rather than when this first runs: torch.compile cannot follow the choice."""
        if self.cached is None:
            self.kernel()


class Int8Embedding(_Int8Rows):
    """Drop-in nn.Embedding over 8-bit rows, of which those asked for are dequantized; arguments as Int8Linear, shape
    (tokens, width)."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, cached: bool = False):
        super().__init__(shape, dtype, cached)
        self.num_embeddings, self.embedding_dim = shape

    def forward(self, ids: Tensor) -> Tensor:
        """Look up: token ids [...] -> [..., width] in the compute dtype."""
        if self.cached is not None:
            return F.embedding(ids, self.cached)
        return (F.embedding(ids, self.codes_int8).float() * self.row_scales[ids].float()[..., None]).to(self.dtype)


def swap_linears(model: nn.Module, folder: PackedFolder | Path, dtype: torch.dtype, device: torch.device | str,
                 mode: Mode = "ondemand", kernel: KernelChoice = "auto",
                 runs_on: torch.device | None = None) -> list[str]:
    """Replace exactly the linears that a packed folder lists, and an 8-bit head and embedding (formats/int8.py), and
    fill them from its file.

    Args:
        model: its module names are those of the checkpoint; may be on `meta`.
        folder: open folder, or the path of one.
        dtype: compute dtype of the new layers.
        device: where their buffers go, one layer at a time.
        mode: see the module docstring.
        kernel: what computes in mode ondemand, see dispatch.py.
        runs_on: where they will compute, if that is elsewhere than `device`.

    Returns:
        Names of the replaced modules.

    Raises:
        InputError: a listed linear is no nn.Linear of the model, or its shape or bias differs; the first five are
            named and the model is left as it was. Or `kernel` was asked for by name and cannot serve one of them.
    """
    if not isinstance(folder, PackedFolder):
        with PackedFolder(folder) as opened:
            return swap_linears(model, opened, dtype, device, mode, kernel, runs_on)
    modules = dict(model.named_modules())
    wrong = [text for name in folder.linears if (text := _misfit(name, modules.get(name), folder))]
    if wrong:
        raise InputError(f"{folder.path} does not fit this model in {len(wrong)} linears, first: "
                         f"{'; '.join(wrong[:5])}")
    if mode == "ondemand":
        require_kernel(folder, dtype, runs_on or torch.device(device), kernel)
    head = swap_int8_head(model, folder, dtype, device, mode, kernel)
    for name in folder.linears:
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, _filled(name, folder, dtype, device, mode, kernel))
    return [*folder.linears, *head]


def require_kernel(folder: PackedFolder, dtype: torch.dtype, device: torch.device, kernel: KernelChoice) -> None:
    """Raise InputError if a kernel was asked for by name and cannot run one of the folder's linears here.

    Of their values only the first one's are looked at, which shows how a file was made.
    """
    if kernel == "auto":
        return
    choices = {name: dispatch.choice_for(kernel, spec.scheme) for name, spec in folder.linears.items()}
    if kernel not in choices.values():
        raise InputError(f"{folder.path}: kernel {kernel} cannot run any of its linears: it needs scales that were "
                         f"moved from the inputs into the weights (statistics when quantizing); take --kernel auto")
    for name, choice in choices.items():
        dispatch.choose(choice, folder.codec(name), folder.linears[name].shape[1], dtype, device)
    for name in list(folder.linears)[:1]:
        dispatch.require_values(kernel, folder.read_weight(name), f"{folder.path}: {name}")
    if kept := sum(choice != kernel for choice in choices.values()):
        log.info("%s: %d of %d linears keep 16-bit activations, as their scales were not moved from the inputs",
                 folder.path, kept, len(choices))


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
            kernel: KernelChoice) -> PackedLinear:
    spec = folder.linears[name]
    n_out, n_in = spec.shape
    has_bias = f"{name}.bias" in folder.checkpoint.specs
    kernel = dispatch.choice_for(kernel, spec.scheme)
    layer: PackedLinear
    if folder.format == "int4":
        layer = WQLinearINT4(n_in, n_out, spec.group_size, has_bias, dtype=dtype, device="meta", mode=mode,
                             kernel=kernel)
    else:
        layer = WQLinearNVFP4(n_in, n_out, has_bias, folder.slim, dtype=dtype, device="meta", mode=mode, kernel=kernel)
    bias = folder.checkpoint.read(f"{name}.bias", dtype, device) if has_bias else None
    q = folder.read_weight(name, device)
    if bias is not None:
        require_finite(bias, f"{folder.path}: {name}.bias")
    if mode == "ondemand":
        dispatch.require_values(kernel, q, f"{folder.path}: {name}")
    layer.fill(q, bias)
    return layer


def swap_int8_head(model: nn.Module, folder: PackedFolder, dtype: torch.dtype, device: torch.device | str,
                   mode: Mode = "ondemand", kernel: KernelChoice = "auto") -> list[str]:
    """Replace exactly the head and embedding that a packed folder lists in 8 bits, and fill them from its file.

    Args:
        As for swap_linears; `folder` is open.

    Returns:
        Names of the replaced modules.

    Raises:
        InputError: a listed module is not in the model, is another kind of layer, or has another shape; the model is
            left as it was.
    """
    modules = dict(model.named_modules())
    made = {name: _int8_layer(name, modules.get(name), shape, dtype, mode == "cached", kernel)
            for name, shape in folder.head.items()}
    for name, layer in made.items():
        layer.fill(folder.read_head(name, device))
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, layer)
    return list(made)


def _int8_layer(name: str, module: nn.Module | None, shape: tuple[int, int], dtype: torch.dtype, cached: bool,
                kernel: KernelChoice) -> Int8Linear | Int8Embedding:
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear | nn.Embedding) or tuple(module.weight.shape) != shape:
        found = "nothing" if module is None else f"a {type(module).__name__}"
        found += f" {list(weight.shape)}" if isinstance(weight, Tensor) else ""
        raise InputError(f"the file holds {name} in 8 bits, {list(shape)}; the model has {found} there")
    if isinstance(module, nn.Linear):
        return Int8Linear(shape, dtype, cached, kernel)
    return Int8Embedding(shape, dtype, cached)
