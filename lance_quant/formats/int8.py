"""Symmetric int8 with one scale per output row, for the output head and the token embedding.

    w[o, i] = code[o, i] * scale[o]

In bfloat16 they are more than a quarter of a packed Lance_3B. One scale per row of 2048 is enough at 8 bits: for normal
weights the error is a ten-thousandth of the energy. The scale is rounded to bfloat16, as stored, before the codes are
chosen; a product of 7-bit code and 8-bit scale is exact in float32. Codes are symmetric, -127..127.

Their place in a packed folder:

    NAME.codes_int8 int8 [out, in]    NAME.row_scales bfloat16 [out]    instead of NAME.weight

with NAME.weight listed under `head_weights` in the meta.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lance_quant.errors import InputError
from lance_quant.formats import layout
from lance_quant.storage.schema import Schema, Shape, parse
from lance_quant.storage.tensor_file import TensorSpec

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


def fault(q: Int8Weight) -> str | None:
    """What no quantizer writes and a damaged file may hold, in a weight of 8 bits; None if all is well."""
    scale = q.scale.float()
    if not bool((scale > 0).all()):  # NaN is not
        return "a row scale that is not positive"
    if scale.numel() and LARGEST * scale.max() > torch.finfo(torch.bfloat16).max:
        return f"a row scale of {scale.max().item():.3g}, whose weights are beyond bfloat16"
    if q.codes.numel() and int(q.codes.min()) < -LARGEST:
        return f"the code {int(q.codes.min())}, below -{LARGEST}"
    return None


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
    """The weight [out, in], a few rows at a time."""
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


class _Entry(Schema):
    """Meta entry of a weight of 8 bits."""

    shape: Shape
    n_bit: int
    scheme: str


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
    listed = parse(dict[str, _Entry], meta.get(META_KEY, {}), f"{where}: {META_KEY} in the meta")
    known = {f"{name}.weight" for name in layout.VOCABULARY}
    for name, found in listed.items():
        if name not in known or found.model_dump() != entry(found.shape):
            raise InputError(f"{where}: meta entry {name!r} in {META_KEY} is unknown to this version: {found!r}")
    return {name.removesuffix(".weight"): (found.shape[0], found.shape[1]) for name, found in listed.items()}


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
