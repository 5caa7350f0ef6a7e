"""Packed folders, the on-disk format of a quantized model: one safetensors file and one meta JSON.

The layout is the one that Reza2kn/lance-quant published:

    awq_state_dict.safetensors   + awq_meta.json     INT4:  NAME.qweight, NAME.scales, NAME.zeros
    nvfp4_state_dict.safetensors + nvfp4_meta.json   NVFP4: NAME.qweight, NAME.scales_bf16, NAME.scales_fp8
                                                     slim:  NAME.qweight, NAME.scales_e4m3

NAME.weight is absent for every linear that the meta lists under `per_weight`; all other tensors are those of the float
checkpoint in bfloat16, with the norms already divided. Group sizes may differ; linears that a budget left in bfloat16
are listed under `kept_bf16`, and an 8-bit head and embedding (int8.py) under `head_weights`.

Published folders are read as they are; ours have more meta fields, which old readers ignore. A folder is checked when
it is opened, from headers alone: what the meta lists and what the file holds must agree exactly.
"""

import math
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field, field_validator

from lance_quant.errors import InputError
from lance_quant.formats import int4, int8, layout, nvfp4
from lance_quant.formats.base import Codec
from lance_quant.formats.int4 import Int4
from lance_quant.formats.nvfp4 import Nvfp4
from lance_quant.formats.weights import PackedWeight
from lance_quant.storage import atomic
from lance_quant.storage.output_place import require_free
from lance_quant.storage.resume import ResumeJob
from lance_quant.storage.schema import Schema, Shape, Size, parse
from lance_quant.storage.tensor_file import Checkpoint, TensorFileWriter, TensorSpec, file_size, write_tensors

SUFFIXES = ("qweight", "scales", "zeros", "scales_bf16", "scales_fp8", "scales_e4m3")
KEPT = "kept_bf16"  # the meta's table of linears that a budget left in bfloat16


class LinearSpec(NamedTuple):
    """A packed linear, from the meta alone.

    shape: (out, in)
    group_size: inputs per scale
    scheme: how it was made, as in the meta
    global_scale: NVFP4's power of two; None for INT4 and published files
    """

    shape: tuple[int, int]
    group_size: int
    scheme: str
    global_scale: float | None


class _Kept(Schema):
    """Meta entry of a linear that a budget left in bfloat16."""

    shape: Shape


class _Meta(Schema):
    """A packed folder's meta, as far as reading goes by it; the rest is a record for people."""

    layout: Literal["published", "slim"] = "published"
    per_weight: Annotated[dict[str, Any], Field(min_length=1)]
    kept_bf16: dict[str, _Kept] = {}
    source_fingerprint: str | None = None


class _Entry(Schema):
    """Meta entry of a packed weight."""

    shape: Shape
    size: Size  # of a group or block, under the format's own name
    scheme: str
    global_scale: float | None = None

    @field_validator("global_scale")
    @classmethod
    def _power_of_two(cls, value: float | None) -> float | None:
        if value is not None and not nvfp4.is_global_scale(value):
            raise ValueError("must be a positive power of two that keeps all weights within bfloat16")
        return value


class _Int4Entry(_Entry):
    n_bit: Literal[4]
    size: Size = Field(alias="group_size")


class _Nvfp4Entry(_Entry):
    size: Literal[16] = Field(alias="block_size")


class PackedFolder:
    """A packed folder, open for reading.

    format: "int4" or "nvfp4"
    slim: True for NVFP4 without the duplicate scales
    meta: the meta JSON
    linears: module name -> LinearSpec
    kept: module name -> (out, in) of linears that a budget left in bfloat16
    head: module name -> (out, in) of an 8-bit head and embedding (int8.py)
    checkpoint: all tensors of the file by name

    Raises:
        InputError: no meta file, or meta and tensors disagree; the first five disagreements are named.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.format = _format_of(self.path)
        base = Int4 if self.format == "int4" else Nvfp4
        self.meta: dict[str, Any] = atomic.read_json(self.path / base.meta_file, "packed meta")
        meta = _parse_meta(self.meta, self.path)
        self.slim = meta.layout == "slim"
        self.linears = {name.removesuffix(".weight"): _linear_spec(name, entry, self.format, self.slim)
                        for name, entry in meta.per_weight.items()}
        self.kept = {name.removesuffix(".weight"): (entry.shape[0], entry.shape[1])
                     for name, entry in meta.kept_bf16.items()}
        self.head = int8.shapes_of(self.meta, str(self.path))
        self.checkpoint = Checkpoint(self.path / base.state_file)
        try:
            self._require_agreement()
        except InputError:
            self.checkpoint.close()
            raise

    def codec(self, linear: str) -> Codec:
        """The format of one linear (group sizes may differ)."""
        return Int4(self.linears[linear].group_size) if self.format == "int4" else Nvfp4(self.slim)

    def read_weight(self, linear: str, device: torch.device | str = "cpu") -> PackedWeight:
        """The packed weight [out, in] of a linear, on `device`.

        Raises:
            InputError: a scale or zero point that no quantizer writes.
        """
        codec, spec = self.codec(linear), self.linears[linear]
        tensors = {suffix: self.checkpoint.read(f"{linear}.{suffix}", device=device)
                   for suffix in codec.specs(spec.shape) if suffix != "scales_fp8"}
        q = codec.weight(tensors, spec.global_scale)
        _require_no_fault(int4.fault(q) if isinstance(q, int4.Int4Weight) else nvfp4.fault(q), f"{self.path}: {linear}")
        return q

    def read_head(self, module: str, device: torch.device | str = "cpu") -> int8.Int8Weight:
        """The 8-bit weight [out, in] of an output head or embedding listed in `head`, on `device`.

        Raises:
            InputError: a scale or code that no quantizer writes.
        """
        q = int8.Int8Weight(*(self.checkpoint.read(f"{module}.{suffix}", device=device) for suffix in int8.SUFFIXES))
        _require_no_fault(int8.fault(q), f"{self.path}: {module}")
        return q

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per quantized weight: scales, zero points and what a budget left in bfloat16 included."""
        return bits_per_weight(self.checkpoint.specs,
                               {**{name: spec.shape for name, spec in self.linears.items()}, **self.kept})

    def facts(self) -> dict[str, Any]:
        """What a run records of its weights: path, format, bytes of the file, bits per quantized weight."""
        return {"path": str(self.checkpoint.path), "format": self.format,
                "bytes": file_size(self.checkpoint.specs), "bits_per_weight": self.bits_per_weight}

    def _require_agreement(self) -> None:
        specs, wrong = self.checkpoint.specs, []
        expected = {f"{name}.{suffix}": spec for name, linear in self.linears.items()
                    for suffix, spec in self.codec(name).specs(linear.shape).items()}
        expected |= {f"{name}.{suffix}": spec for name, shape in self.head.items()
                     for suffix, spec in int8.specs(shape).items()}
        expected |= {f"{name}.weight": TensorSpec(torch.bfloat16, shape) for name, shape in self.kept.items()}
        for name, spec in expected.items():
            if name not in specs:
                wrong.append(f"{name} is missing")
            elif specs[name] != spec:
                wrong.append(f"{name} is {_text(specs[name])}, not {_text(spec)}")
        for name in specs:
            base, _, last = name.rpartition(".")
            if last in (*SUFFIXES, *int8.SUFFIXES) and name not in expected:
                wrong.append(f"{name} belongs to no listed linear")
            elif name not in expected and (base in self.head or base in self.linears and not _is_bias(
                    last, specs[name], self.linears[base])):
                wrong.append(f"{name} beside a packed weight")
        if wrong:
            raise InputError(f"{self.path}: meta and tensors disagree in {len(wrong)} places, first: "
                             f"{'; '.join(wrong[:5])}")

    def close(self) -> None:
        """Close the file."""
        self.checkpoint.close()

    def __enter__(self) -> "PackedFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _require_no_fault(fault: str | None, what: str) -> None:
    if fault is not None:
        raise InputError(f"{what} holds {fault}: the packed file is damaged, download or make it again")


def is_packed(path: Path) -> bool:
    """Whether a folder has the meta of packed weights."""
    return any((path / codec.meta_file).is_file() for codec in (Int4, Nvfp4))


def _format_of(path: Path) -> str:
    found = [codec.name for codec in (Int4, Nvfp4) if (path / codec.meta_file).is_file()]
    if len(found) > 1:
        raise InputError(f"{path} holds {Int4.meta_file} and {Nvfp4.meta_file}: keep each format in its own folder")
    if found:
        return found[0]
    raise InputError(f"no packed model in {path}: neither {Int4.meta_file} nor {Nvfp4.meta_file} is there")


def _parse_meta(raw: Any, path: Path) -> "_Meta":
    """The typed fields of a meta. Its tables are parsed entry by entry, so that an error names one weight."""
    meta = parse(_Meta, raw, f"packed meta of {path}", "update lance-quant if the folder is newer than it")
    for name in (*meta.per_weight, *meta.kept_bf16):
        if not name.endswith(".weight"):
            raise InputError(f"{path}: meta entry {name!r} is not that of a weight")
    both = sorted(meta.per_weight.keys() & meta.kept_bf16.keys())
    if both:
        raise InputError(f"{path}: meta lists {both[0]!r} as packed and in {KEPT}: it is damaged, make it again")
    return meta


def _linear_spec(name: str, raw: Any, format_name: str, slim: bool) -> LinearSpec:
    what = f"meta of {name}"
    kind: type[_Entry] = _Int4Entry if format_name == "int4" else _Nvfp4Entry
    entry = parse(kind, raw, what, "update lance-quant if the folder is newer than it")
    (Int4(entry.size) if format_name == "int4" else Nvfp4()).require_fits(name, entry.shape)
    if slim and entry.global_scale is None:
        raise InputError(f"{what} lacks ['global_scale'], which layout slim needs; make the folder again")
    known = (Int4 if format_name == "int4" else Nvfp4).SCHEMES.values()
    if entry.scheme not in known:
        raise InputError(f"{what}: scheme {entry.scheme[:80]!r} is none of {', '.join(sorted(set(known)))}; "
                         "update lance-quant if it is newer")
    return LinearSpec((entry.shape[0], entry.shape[1]), entry.size, entry.scheme, entry.global_scale)


def _is_bias(last: str, spec: TensorSpec, linear: LinearSpec) -> bool:
    return last == "bias" and spec.shape == linear.shape[:1] and spec.dtype.is_floating_point


def _text(spec: TensorSpec) -> str:
    return f"{str(spec.dtype).removeprefix('torch.')} {list(spec.shape)}"


@dataclass
class PackedWriter:
    """Where a conversion puts its tensors and its meta (`new_folder`)."""

    tensors: TensorFileWriter
    meta: dict[str, Any]
    texts: dict[str, str] = field(default_factory=dict)  # further files by name
    copies: dict[str, Path] = field(default_factory=dict)  # files to copy, by name
    tensor_files: dict[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)  # small ones, by file name
    links: dict[str, Path] = field(default_factory=dict)  # large files to link to, or copy, by path in the folder


@contextmanager
def new_folder(path: Path, codec: Codec, specs: Mapping[str, TensorSpec],
               work: ResumeJob | None = None) -> Iterator[PackedWriter]:
    """Create a packed folder, whole or not at all; `specs` says what its file will hold.

    Args:
        path: of the folder.
        codec: names its files.
        specs: dtype and shape of every tensor, by name.
        work: keeps what is written if the block fails, and tells which tensors an earlier run wrote; without it an
            unfinished folder is removed.

    Raises:
        InputError: `path` exists, or its disk has less free space than the file needs.
    """
    require_free(path)
    done = [] if work is None else [name for layer in work.layers for name in layer["tensors"]]
    if not done:
        require_space(path, file_size(specs))
    with atomic.whole_folder(path) if work is None else nullcontext(work.folder) as folder:
        with TensorFileWriter(folder / codec.state_file, specs, done) as tensors:
            writer = PackedWriter(tensors, {})
            yield writer
        for name, text in writer.texts.items():
            atomic.write_text(folder / name, text)
        for name, small in writer.tensor_files.items():
            write_tensors(folder / name, small)
        for name, file in writer.copies.items():
            shutil.copyfile(file, folder / name)
        for name, file in writer.links.items():
            atomic.link_or_copy(file, folder / name)
        atomic.write_json(folder / codec.meta_file, writer.meta)
    if work is not None:
        work.publish(path)


def require_space(path: Path, needed: int) -> None:
    """Raise InputError if the disk of `path`, which need not exist yet, has fewer than `needed` bytes free."""
    there = next(parent for parent in Path(path).absolute().parents if parent.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise InputError(f"{path} needs {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free")


def bits_per_weight(specs: Mapping[str, TensorSpec], shapes: Mapping[str, tuple[int, ...]]) -> float:
    """Stored bits per quantized weight; `shapes` are those of the decoder's linears, in bfloat16 or not."""
    kept = {f"{name}.weight" for name in shapes}
    stored = sum(spec.nbytes for name, spec in specs.items() if name.rpartition(".")[2] in SUFFIXES or name in kept)
    return 8 * stored / sum(math.prod(shape) for shape in shapes.values())


def table(specs: Mapping[str, TensorSpec]) -> str:
    """Number of tensors and bytes by kind: packed ones by linear, others by where they belong."""
    count = Counter(map(_kind, specs))
    size = sizes(specs)
    width = max(map(len, count))
    lines = [f"{kind:<{width}}  {count[kind]:>7}  {size[kind]:>14}" for kind in count]
    return "\n".join([f"{'kind':<{width}}  tensors           bytes", *lines])


def sizes(specs: Mapping[str, TensorSpec]) -> dict[str, int]:
    """Bytes by kind, as `table` lists them."""
    out: Counter[str] = Counter()
    for name, spec in specs.items():
        out[_kind(name)] += spec.nbytes
    return dict(out)


def _kind(name: str) -> str:
    base, _, last = name.rpartition(".")
    if last in SUFFIXES:
        return f"{layout.kind_of(base)} packed"
    if last == "weight" and layout.kind_of(base) in layout.KINDS:
        return f"{layout.kind_of(base)} bfloat16"
    if name.startswith(layout.LAYERS):
        return "layer norms and biases"
    return base.removeprefix(layout.LLM_PREFIX) if name.startswith(layout.LLM_PREFIX) else name.split(".")[0]
