"""safetensors files read and written by offsets, one tensor at a time.

The safetensors package maps a whole file into memory, which a machine with less memory than the file refuses
(28.4 GB for Lance_3B_Video), and saves only dicts that are complete in memory. Here a reader takes the header and
then reads what is asked for by its position, converted piece by piece, and a writer is told every name, dtype and
shape first and then takes the tensors in any order. What the writer makes is byte for byte what
`safetensors.torch.save_file` makes.
"""

import hashlib
import json
import math
import os
import re
import struct
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from lance_quant.errors import InputError
from lance_quant.storage.atomic import parse_json
from lance_quant.storage.schema import Schema, read

# In the order in which safetensors lays tensors out (of one dtype, by name). F4 and F6 are left out: their shapes count
# elements smaller than a byte, which torch's do not.
DTYPES = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    **({"F8_E8M0": torch.float8_e8m0fnu} if hasattr(torch, "float8_e8m0fnu") else {}),  # torch 2.7
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
_RANK = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}
_ROUNDED = (torch.bfloat16, torch.float16)  # in which a finite float32 may become infinite
_LONGEST_HEADER = 100_000_000  # the limit of the safetensors package: no file makes us read 25 GB as JSON
_MOST_TENSORS = 100_000  # Lance_3B_Video has 1411
_SMALLEST = 1024  # elements of a matrix that is looked at for zeros
_PIECE = 1 << 24  # bytes read at once: converting a 1.2 GB table needs 16 MB beside its result


def _memory(flat: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor [n], without a copy."""
    return flat.view(torch.uint8).numpy().data


class TensorSpec(NamedTuple):
    """What a tensor is before it exists: enough to plan a file to the byte."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


class _Entry(NamedTuple):
    spec: TensorSpec
    start: int  # absolute offset in the file


def _entry(name: str, item: Mapping[str, Any], data: int) -> _Entry:
    """A header's entry, checked; `data` is where the file's tensors begin."""
    if item["dtype"] not in DTYPES:
        raise ValueError(f"{name}: dtype {item['dtype']!r} is none of {', '.join(DTYPES)}")
    spec = TensorSpec(DTYPES[item["dtype"]], tuple(item["shape"]))
    first, last = item["data_offsets"]
    if any(not isinstance(size, int) or size < 0 for size in (*spec.shape, first)) or last - first != spec.nbytes:
        raise ValueError(f"{name}: shape {list(spec.shape)} does not fit data_offsets {[first, last]}")
    return _Entry(spec, data + first)


class _Positional:
    """A file that several threads may read by position: by preadv or, where there is none (Windows), in turn."""

    def __init__(self, path: Path):
        self._path = path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close
        self._cursor = threading.Lock()
        self.size = os.fstat(self._file.fileno()).st_size

    def read(self, start: int, length: int) -> bytearray:
        """`length` bytes from byte `start` on; InputError where the file ends before."""
        buffer = bytearray(length)
        self.fill(memoryview(buffer), start)
        return buffer

    def fill(self, view: memoryview, start: int) -> None:
        """Bytes from byte `start` on, as many as `view` holds; InputError where the file ends before."""
        done = 0
        while done < len(view):
            got = self._read_into(view[done:done + _PIECE], start + done)
            if got == 0:
                raise InputError(f"{self._path} became shorter while it was read")
            done += got

    def _read_into(self, view: memoryview, start: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [view], start)
        with self._cursor:
            self._file.seek(start)
            return self._file.readinto(view)

    def close(self) -> None:
        """Close the file; tensors that were read stay valid."""
        self._file.close()


class TensorFile:
    """One safetensors file, open for reading.

    Raises:
        InputError: the file is missing, truncated or not safetensors.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"checkpoint file not found: {path}")
        self._file = _Positional(self.path)
        try:
            self._entries = self._parse_header()
        except BaseException:
            self._file.close()
            raise

    def _parse_header(self) -> dict[str, _Entry]:
        size = self._file.size
        length = struct.unpack("<Q", self._file.read(0, 8))[0] if size >= 8 else 0
        if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
            raise InputError(f"{self.path} is not a safetensors file, or is truncated: {size} bytes, "
                             f"header length {length}; download it again")
        header = parse_json(self._file.read(8, length), f"{self.path} is not safetensors: its header")
        try:
            header.pop("__metadata__", None)
            if len(header) > _MOST_TENSORS:
                raise ValueError(f"{len(header)} tensors are more than {_MOST_TENSORS}")
            entries = {name: _entry(name, item, 8 + length) for name, item in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{self.path} has a header that is not safetensors: {error!r}") from error
        end = 8 + length
        for name, entry in sorted(entries.items(), key=lambda pair: (pair[1].start, pair[1].spec.nbytes)):
            if entry.start != end:
                raise InputError(f"{self.path} has a header that is not safetensors: {name} starts at byte "
                                 f"{entry.start}, not {end}; download it again")
            end += entry.spec.nbytes
        if end != size:
            wrong = "is truncated" if end > size else "goes on behind its last tensor"
            raise InputError(f"{self.path} {wrong}: its header promises {end} bytes, the file has {size}; "
                             "download it again")
        return entries

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Name -> dtype and shape of every tensor, in file order."""
        return {name: entry.spec for name, entry in self._entries.items()}

    def read_bytes(self, name: str, start: int, length: int) -> bytearray:
        """`length` raw bytes of a tensor from byte `start` of it (fewer at its end)."""
        spec, offset = self._entries[name]
        return self._file.read(offset + start, min(length, spec.nbytes - start))

    def read(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """A tensor in its shape, as `dtype` (floating-point tensors only; default as stored), on `device`.

        Read and converted in pieces of 16 MB, so that host memory beside the result stays at two pieces.
        """
        spec = self._entries[name].spec
        target = dtype if dtype is not None and spec.dtype.is_floating_point else spec.dtype
        out, first = torch.empty(math.prod(spec.shape), dtype=target, device=device), 0
        for piece in self.pieces(name):
            out[first:first + len(piece)].copy_(piece)
            first += len(piece)
        return out.reshape(spec.shape)

    def stored(self, name: str, into: Tensor | None = None) -> Tensor:
        """A tensor as stored, on the CPU, read straight into its memory without arithmetic: for a thread that reads
        while others compute.

        Args:
            into: a contiguous tensor of the same dtype and shape that is overwritten; the system has to clear new
                memory first, which takes as long as reading from its cache.
        """
        spec, offset = self._entries[name]
        out = torch.empty(spec.shape, dtype=spec.dtype) if into is None else into
        assert (out.dtype, tuple(out.shape)) == spec, (name, out.dtype, tuple(out.shape), spec)
        self._file.fill(_memory(out.view(-1)), offset)
        return out

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A tensor as stored, flat, in consecutive CPU pieces of 16 MB: a 1.2 GB table never needs 1.2 GB."""
        spec, offset = self._entries[name]
        numel, per_piece = math.prod(spec.shape), _PIECE // spec.dtype.itemsize
        for first in range(0, numel, per_piece):
            start, count = first * spec.dtype.itemsize, min(per_piece, numel - first) * spec.dtype.itemsize
            yield torch.frombuffer(self._file.read(offset + start, count), dtype=spec.dtype)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Index(Schema):
    """model.safetensors.index.json."""

    weight_map: Annotated[dict[str, str], Field(min_length=1)]


class Checkpoint:
    """All tensors of a checkpoint: one safetensors file, or the shards of an index, under one set of names.

    Args:
        path: a safetensors file, an index (`*.safetensors.index.json`), or a folder that holds
            model.safetensors, model.safetensors.index.json or ema.safetensors (taken in this order).

    An index cannot reach out of its folder: it names files in it, by plain names, and every tensor is read from the
    file that the index gives it. Such a file may be a link, as in the cache of the Hugging Face hub: links are made by
    who owns the disk, not by who wrote the index.

    Raises:
        InputError: a file is missing or malformed, or the index and its shards disagree.
    """

    CANDIDATES = ("model.safetensors", "model.safetensors.index.json", "ema.safetensors")

    def __init__(self, path: Path):
        self.path = self._resolve(Path(path))
        if self.path.name.endswith(".json"):
            weight_map = _weight_map(self.path)
            files = [self.path.parent / shard for shard in sorted(set(weight_map.values()))]
        else:
            weight_map, files = None, [self.path]
        self._home: dict[str, TensorFile] = {}
        self._files: list[TensorFile] = []
        try:
            for file in files:
                self._add(TensorFile(file), weight_map)
            if weight_map is not None and (gone := sorted(weight_map.keys() - self._home.keys())):
                raise InputError(f"checkpoint index {self.path} and its shards disagree on {len(gone)} tensors, "
                                 f"first {gone[:5]}; download the checkpoint again")
        except BaseException:
            self.close()
            raise
        self.specs = {name: home.specs[name] for home in self._files for name in home.specs}

    def _add(self, file: TensorFile, weight_map: Mapping[str, str] | None) -> None:
        """Take a file's tensors, all of which the index must place there."""
        self._files.append(file)
        if weight_map is not None:
            odd = sorted(name for name in file.specs if weight_map.get(name) != file.path.name)
            if odd:
                raise InputError(f"checkpoint index {self.path} and its shards disagree on {len(odd)} tensors of "
                                 f"{file.path.name}, first {odd[:5]}; download the checkpoint again")
        self._home.update(dict.fromkeys(file.specs, file))

    @classmethod
    def _resolve(cls, path: Path) -> Path:
        if not path.is_dir():
            if not path.exists():
                raise InputError(f"checkpoint not found: {path}")
            return path
        for candidate in cls.CANDIDATES:
            if (path / candidate).is_file():
                return path / candidate
        raise InputError(f"no checkpoint in {path}: expected one of {', '.join(cls.CANDIDATES)}")

    def read(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """As TensorFile.read: in its shape, from the shard that holds it."""
        return self._home[name].read(name, dtype, device)

    def stored(self, name: str, into: Tensor | None = None) -> Tensor:
        """As TensorFile.stored: in its shape, from the shard that holds it."""
        return self._home[name].stored(name, into)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """As TensorFile.pieces: flat, from the shard that holds it."""
        return self._home[name].pieces(name)

    def fingerprint(self, names: Iterable[str]) -> str:
        """SHA-256 over name, dtype, shape and both ends (4 KB each) of the named tensors.

        Tells two trainings of one architecture apart without reading 25 GB, and is the same for a single file and
        for its shards.
        """
        digest = hashlib.sha256()
        for name in sorted(names):
            spec, home = self.specs[name], self._home[name]
            digest.update(f"{name} {CODES[spec.dtype]} {list(spec.shape)}\n".encode())
            digest.update(home.read_bytes(name, 0, 4096))
            digest.update(home.read_bytes(name, max(0, spec.nbytes - 4096), 4096))
        return digest.hexdigest()

    def close(self) -> None:
        """Close all shards."""
        for file in self._files:
            file.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor -> file of an index; files are plain names in its folder."""
    found = read(_Index, path, "checkpoint index", "download the checkpoint again").weight_map
    for name, shard in found.items():
        if re.fullmatch(r"[^/\\:\0]{1,200}\.safetensors", shard) is None:
            raise InputError(f"checkpoint index {path}: {name!r} is in {shard[:80]!r}, which is no plain name of "
                             "a .safetensors file beside the index")
    return found


def require_finite(tensor: Tensor, what: str) -> None:
    """Raise InputError if a floating-point tensor of any shape holds NaN or Inf: nothing made of it means anything."""
    if tensor.is_floating_point() and tensor.numel() and not _is_finite(tensor):
        raise InputError(f"{what} holds NaN or Inf: the checkpoint is damaged, download it again")


def require_written(tensor: Tensor, what: str) -> None:
    """Raise InputError if a weight is all zeros, whatever its shape from two dimensions on: no training leaves one, but
    a download into a file of the full size that broke off does."""
    large = tensor.dim() >= 2 and tensor.numel() >= _SMALLEST
    if large and not tensor.flatten()[:_SMALLEST].any() and not tensor.any():  # mostly, the first elements say enough
        raise InputError(f"{what} is all zeros: the file was not downloaded to its end; download it again")


def _is_finite(tensor: Tensor) -> bool:
    """By the sum, which NaN and Inf reach and which takes a twentieth of the time; it may overflow, so the largest
    magnitude has the last word."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(torch.linalg.vector_norm(tensor, math.inf)))


def _header(specs: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """The file's first bytes (length prefix and padded JSON) and each tensor's absolute offset."""
    order = sorted(specs, key=lambda name: (_RANK[specs[name].dtype], name))
    header, offsets, position = {}, {}, 0
    for name in order:
        spec = specs[name]
        offsets[name] = position
        header[name] = {"dtype": CODES[spec.dtype], "shape": list(spec.shape),
                        "data_offsets": [position, position + spec.nbytes]}
        position += spec.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {name: start + offset for name, offset in offsets.items()}


def file_size(specs: Mapping[str, TensorSpec]) -> int:
    """Exact size in bytes of the safetensors file that holds these tensors."""
    return len(_header(specs)[0]) + sum(spec.nbytes for spec in specs.values())


class TensorFileWriter:
    """A safetensors file whose tensors arrive one by one, in any order.

    Use as a context manager; leaving the block checks that every declared tensor was written.

    Args:
        done: tensors that an earlier writer of the same specs has put into the file, which then must exist.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec], done: Collection[str] = ()):
        self._specs = dict(specs)
        self._missing = set(specs) - set(done)
        header, self._offsets = _header(specs)
        self._file = open(path, "r+b" if done else "wb")  # noqa: SIM115 - closed by __exit__
        self._file.write(header)
        self._file.truncate(file_size(specs))

    def write(self, name: str, tensor: Tensor) -> None:
        """Store a tensor that has the declared dtype and shape."""
        spec = self._specs[name]
        assert (tensor.dtype, tuple(tensor.shape)) == spec, (name, tensor.dtype, tuple(tensor.shape), spec)
        self.write_pieces(name, [tensor.detach().reshape(-1)])

    def write_pieces(self, name: str, pieces: Iterable[Tensor]) -> None:
        """Store a tensor that arrives flat, in consecutive pieces; each is converted to the declared dtype."""
        assert name in self._missing, f"{name} written twice"
        spec, written = self._specs[name], 0
        self._file.seek(self._offsets[name])
        for piece in pieces:
            flat = piece.to(spec.dtype).cpu().contiguous()
            if spec.dtype != piece.dtype and spec.dtype in _ROUNDED:
                require_finite(flat, f"{name} holds values beyond {spec.dtype}'s range: as stored it")
            written += self._file.write(_memory(flat))
        assert written == spec.nbytes, (name, written, spec)
        self._missing.discard(name)

    def flush(self) -> None:
        """Bring everything written so far to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> "TensorFileWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if kind is None:
                assert not self._missing, f"declared and never written: {sorted(self._missing)[:5]}"
                self.flush()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A file of these tensors, of any shape."""
    with TensorFileWriter(path, {name: TensorSpec(x.dtype, tuple(x.shape)) for name, x in tensors.items()}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
