"""8-bit integers with one scale per row, for the output head and the token embedding.

    w[o, i] = code[o, i] * scale[o]

In bfloat16 they are more than a quarter of a packed Lance_3B. One scale per row of 2048 is enough at 8 bits: for normal
weights the error is a ten-thousandth of the energy. The scale is rounded to bfloat16, as stored, before the codes are
chosen; a product of 7-bit code and 8-bit scale is exact in float32. Codes are symmetric, -127..127.

Also the layers that run such weights, and their place in a packed folder:

    NAME.codes_int8 int8 [out, in]    NAME.row_scales bfloat16 [out]    instead of NAME.weight

with NAME.weight listed under `head_weights` in the meta.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lance_quant.errors import InputError
from lance_quant.formats import layout
from lance_quant.kernels import dispatch
from lance_quant.storage.tensor_file import Checkpoint, TensorSpec, require_finite

SUFFIXES = ("codes_int8", "row_scales")
SCHEME = "sym_int8_per_row"
META_KEY = "head_weights"
LARGEST = 127
MIN_SCALE = 1e-20  # keeps an all-zero row finite; a normal number in bfloat16
_BLOCK = 1 << 22  # weights that are dequantized at once


class Int8Weight(NamedTuple):
    """A weight with one scale per row.

    codes: int8 [out, in], -127..127
    scale: bfloat16 [out]
    """

    codes: Tensor
    scale: Tensor


@torch.no_grad()
def quantize(w: Tensor) -> Int8Weight:
    """Round a weight [out, in] to 8 bits, nearest level.

    Raises:
        ValueError: `w` holds NaN or Inf.
    """
    largest = w.float().abs().amax(1)
    if not torch.isfinite(largest).all():
        raise ValueError("weight holds NaN or Inf")
    scale = (largest / LARGEST).clamp_(min=MIN_SCALE).bfloat16()
    codes = (w.float() / scale.float()[:, None]).round_().clamp_(-LARGEST, LARGEST)
    return Int8Weight(codes.to(torch.int8), scale)


@torch.no_grad()
def dequantize(q: Int8Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """[out, in]: code times scale, exact in float32, rounded once to `dtype`."""
    return (q.codes.float() * q.scale.float()[:, None]).to(dtype)


def blocks(q: Int8Weight) -> Iterator[Int8Weight]:
    """The weight, a few rows at a time."""
    rows = max(1, _BLOCK // q.codes.shape[1])
    for codes, scale in zip(q.codes.split(rows), q.scale.split(rows), strict=True):
        yield Int8Weight(codes, scale)


def linear(x: Tensor, q: Int8Weight) -> Tensor:
    """The definition: [rows, in] -> [rows, out] by the dequantized weight, which exists a few rows at a time."""
    y, begin = x.new_empty(len(x), len(q.codes)), 0
    for part in blocks(q):
        end = begin + len(part.codes)
        y[:, begin:end] = F.linear(x, dequantize(part, x.dtype))
        begin = end
    return y


def specs(shape: Sequence[int]) -> dict[str, TensorSpec]:
    """Suffix -> dtype and shape on disk of a weight [out, in]."""
    return {"codes_int8": TensorSpec(torch.int8, (shape[0], shape[1])),
            "row_scales": TensorSpec(torch.bfloat16, (shape[0],))}


def entry(shape: Sequence[int]) -> dict[str, Any]:
    """The meta fields of one weight."""
    return {"shape": list(shape), "n_bit": 8, "scheme": SCHEME}


def shapes_of(meta: Mapping[str, Any], where: str) -> dict[str, tuple[int, int]]:
    """Shape [out, in] of every 8-bit weight that a meta lists, by module name.

    Args:
        where: the folder, as error messages name it.

    Raises:
        InputError: a name or a field that this version does not know.
    """
    listed = meta.get(META_KEY, {})
    if not isinstance(listed, dict):
        raise InputError(f"{where}: {META_KEY} in the meta is no table of weights")
    known = {f"{name}.weight" for name in layout.VOCABULARY}
    for name, found in listed.items():
        shape = found.get("shape") if isinstance(found, dict) else None
        if name not in known or not isinstance(shape, list) or len(shape) != 2 or found != entry(shape) \
                or not all(isinstance(size, int) and size > 0 for size in shape):
            raise InputError(f"{where}: meta entry {name!r} in {META_KEY} is unknown to this version: {found!r}")
    return {name.removesuffix(".weight"): tuple(found["shape"]) for name, found in listed.items()}


def quantize_rows(pieces: Iterable[Tensor], width: int) -> Iterator[Int8Weight]:
    """Pack a weight [out, width] that arrives flat, in consecutive pieces: rows as soon as they are whole."""
    left = torch.empty(0)
    for piece in pieces:
        flat = torch.cat([left, piece.float()])
        whole = len(flat) // width * width
        if whole:
            yield quantize(flat[:whole].view(-1, width))
        left = flat[whole:]
    assert not len(left), "pieces do not end with a row"


class _Rows(nn.Module):
    """What both layers share: buffers `codes_int8` and `row_scales`, empty until `fill`."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, cached: bool):
        super().__init__()
        self.dtype, self._keep = dtype, cached
        for suffix, spec in specs(shape).items():
            self.register_buffer(suffix, torch.empty(spec.shape, dtype=spec.dtype, device="meta"))
        self.register_buffer("cached", None, persistent=False)

    def fill(self, q: Int8Weight) -> None:
        """Take over a packed weight; cached layers keep its values in the compute dtype instead."""
        self.codes_int8, self.row_scales = q
        if self._keep:
            self.cached = torch.cat([dequantize(part, self.dtype) for part in blocks(q)])
            self.codes_int8 = self.row_scales = None

    def file_keys(self, prefix: str) -> set[str]:
        """The tensors of a packed file that this layer accounts for; `prefix` is its module name."""
        return {f"{prefix}.{suffix}" for suffix in SUFFIXES}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # model.to(dtype) must move the scales, not round them: `fn` is shown bytes.
        return super()._apply(lambda tensor: fn(tensor.view(torch.uint8)).view(tensor.dtype), recurse)


class Int8Linear(_Rows):
    """Drop-in nn.Linear without bias over 8-bit rows, which a kernel computes (lance_quant.kernels).

    Args:
        shape: (out, in).
        dtype: compute dtype, of the inputs and outputs.
        cached: dequantize once, and keep that.
        kernel: what computes otherwise, see kernels.choose_int8.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, cached: bool = False,
                 kernel: dispatch.Choice = "auto"):
        super().__init__(shape, dtype, cached)
        self.out_features, self.in_features = shape
        self.choice = kernel
        self._kernel: tuple[torch.device, dispatch.Kernel] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] in the compute dtype -> [..., out]."""
        if self.cached is not None:
            return F.linear(x, self.cached)
        if x.dtype != self.dtype or x.shape[-1] != self.in_features:
            raise ValueError(f"expected {self.in_features} inputs in {self.dtype}, got {x.shape[-1]} in {x.dtype}")
        kernel = self.kernel()
        if x.requires_grad and torch.is_grad_enabled():  # the others have no gradient
            kernel = dispatch.choose_int8("reference", self.in_features, self.dtype, x.device)
        y = kernel.int8_linear(x.reshape(-1, self.in_features), Int8Weight(self.codes_int8, self.row_scales))
        return y.view(*x.shape[:-1], self.out_features)

    def kernel(self) -> dispatch.Kernel:
        """What computes this layer where it is now."""
        device = self.codes_int8.device
        if self._kernel is None or self._kernel[0] != device:
            self._kernel = device, dispatch.choose_int8(self.choice, self.in_features, self.dtype, device)
        return self._kernel[1]

    def settle(self) -> None:
        """Choose the kernel now rather than when this first runs: torch.compile cannot follow the choice."""
        if self.cached is None:
            self.kernel()


class Int8Embedding(_Rows):
    """Drop-in nn.Embedding over 8-bit rows, of which those asked for are dequantized; arguments as Int8Linear, shape
    (tokens, width)."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, cached: bool = False):
        super().__init__(shape, dtype, cached)
        self.num_embeddings, self.embedding_dim = shape

    def forward(self, ids: Tensor) -> Tensor:
        """[...] -> [..., width]."""
        if self.cached is not None:
            return F.embedding(ids, self.cached)
        return (F.embedding(ids, self.codes_int8).float() * self.row_scales[ids].float()[..., None]).to(self.dtype)


class Folder(Protocol):
    """What swapping needs of a packed folder (packed.PackedFolder)."""

    checkpoint: Checkpoint
    head: Mapping[str, tuple[int, int]]


def swap(model: nn.Module, folder: Folder, dtype: torch.dtype, device: torch.device | str,
         cached: bool = False, kernel: dispatch.Choice = "auto") -> list[str]:
    """Replace exactly the head and embedding that a packed folder lists in 8 bits, and fill them from its file.

    Args:
        model: its module names are those of the checkpoint; may be on `meta`.
        dtype: compute dtype.
        cached, kernel: see Int8Linear.

    Returns:
        Names of the replaced modules.

    Raises:
        InputError: a listed module is not in the model, is another kind of layer, or has another shape.
    """
    modules = dict(model.named_modules())
    made = {name: _layer_for(name, modules.get(name), shape, dtype, cached, kernel)
            for name, shape in folder.head.items()}
    for name, layer in made.items():
        q = Int8Weight(*(folder.checkpoint.read(f"{name}.{suffix}", device=device) for suffix in SUFFIXES))
        require_finite(q.scale, f"{folder.checkpoint.path}: {name}")
        layer.fill(q)
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, layer)
    return list(made)


def _layer_for(name: str, module: nn.Module | None, shape: tuple[int, int], dtype: torch.dtype, cached: bool,
               kernel: dispatch.Choice) -> _Rows:
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear | nn.Embedding) or tuple(weight.shape) != shape:
        found = "nothing" if module is None else f"a {type(module).__name__}"
        found += f" {list(weight.shape)}" if isinstance(weight, Tensor) else ""
        raise InputError(f"the file holds {name} in 8 bits, {list(shape)}; the model has {found} there")
    if isinstance(module, nn.Linear):
        return Int8Linear(shape, dtype, cached, kernel)
    return Int8Embedding(shape, dtype, cached)
