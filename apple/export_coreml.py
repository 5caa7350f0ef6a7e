#!/usr/bin/env python3
"""Convert an extracted understanding path to Core ML in 4 bits, with a stateful cache, on a Mac or on Linux.

    python -m apple.export_coreml --src Lance_3B-und --out Lance_3B-und-CoreML-4bit
    python -m apple.export_coreml --src Lance_3B-und --out Lance_3B-und-CoreML-palettized-4bit --storage float16

Every matrix becomes 4-bit indices into palettes of 16 values per 32 rows (apple/palette.py). The network is cut into
packages, converted one after the other, because the converter holds every weight several times over: the embedding,
some layers each, and the head. They take any number of new tokens up to the context; those with layers keep the
tokens' keys and values in their state:

    embedding   ids int32 [1, t] -> hidden_out float16 [1, t, width]
    layers      hidden float16 [1, t, width]; cos and sin float16 [t, head width] of the tokens' positions; mask
                float16 [t, s], 0 where a new token may look at one of s tokens so far, or -inf -> hidden_out
                state keys, values float16 [layers, kv heads, context, head width]
    head        hidden float16 [1, t, width] -> logits float16 [1, t, vocabulary]

`--storage float16` writes the same values as an ordinary float16 Hugging Face folder instead (the published form, as
large as the source), for trying out what palettes cost in any runtime. Both hold equal numbers.

Reads   a folder made by apple/extract_und.py
Writes  OUT/part_NN.mlpackage, OUT/coreml.json (the packages in order, sizes), tokenizer; or a Hugging Face folder
Needs   coremltools (requirements-apple.txt) for packages, and 6.3 GB of memory with 9 layers per package, less with
        fewer; --storage float16 2.4 GB. CPU time is in apple/README.md
Next    open in Xcode, or coremltools.models.MLModel on a Mac; float16: transformers
"""

import argparse
import importlib.util
import json
import logging
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from apple.decoder import DecoderConfig, extraction_record
from apple.extract_und import EMBEDDING, HEAD, TOKENIZER_FILES
from apple.palette import COLORS, ROWS, palettized
from apple.stateful import END, START, Piece, build
from lance_quant import __version__
from lance_quant.cli import script
from lance_quant.errors import InputError
from lance_quant.formats.packed_folder import require_space
from lance_quant.storage.atomic import read_json, whole_folder, write_json
from lance_quant.storage.output_place import require_free
from lance_quant.storage.tensor_file import Checkpoint, TensorFileWriter, TensorSpec, file_size

log = logging.getLogger("lance_quant")

# Of a weight file: its head, and what describes each tensor, take a line, tensors take whole ones; equal vectors from
# some size are stored once.
_LINE, _SHARED = 64, 200


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    parser.add_argument("--src", type=Path, required=True, help="folder made by apple/extract_und.py")
    parser.add_argument("--out", type=Path, help="folder to create; never overwritten; not written by --dry_run")
    parser.add_argument("--storage", choices=["palettes", "float16"], default="palettes",
                        help="palettes: 4-bit packages; float16: a Hugging Face folder with the same values")
    parser.add_argument("--context", type=int, default=2048, help="tokens that the cache can hold")
    parser.add_argument("--layers_per_part", type=int, default=9,
                        help="layers per package; more of them need more memory to convert")
    parser.add_argument("--dry_run", action="store_true", help="read headers only and print what would be written")
    return parser.parse_args(argv)


def require_rows(specs: Mapping[str, TensorSpec]) -> None:
    """Raise InputError unless every matrix has whole palettes."""
    odd = [name for name, spec in specs.items() if len(spec.shape) == 2 and spec.shape[0] % ROWS]
    if odd:
        raise InputError(f"palettes cover {ROWS} rows each, which does not divide those of {odd[:5]}")


def parts_of(layers: int, per_part: int) -> list[Piece]:
    """What every package holds, in order."""
    return [START, *(range(first, min(first + per_part, layers)) for first in range(0, layers, per_part)), END]


def names_of(specs: Mapping[str, TensorSpec], piece: Piece) -> list[str]:
    """The tensors of a package."""
    if isinstance(piece, range):
        wanted = [f"model.layers.{index}." for index in piece]
    else:
        wanted = {START: ["model.embed_tokens."], END: ["model.norm.", "lm_head."]}[piece]
    return [name for name in specs if name.startswith(tuple(wanted))]


def sources_of(specs: Mapping[str, TensorSpec], piece: Piece) -> dict[str, str]:
    """Tensor of a package -> the tensor of the folder that it is: another one where the head is the embedding."""
    wanted = {name: name for name in names_of(specs, piece)}
    if piece == END:
        wanted.setdefault(HEAD, EMBEDDING)
    return wanted


def weight_bytes(specs: Mapping[str, TensorSpec], piece: Piece) -> int:
    """Exact size of a package's weight file, if no two of the model's own vectors are equal."""
    wanted = {ours: specs[theirs].shape for ours, theirs in sources_of(specs, piece).items()}
    blobs, zeros = [], []
    for name, shape in wanted.items():
        if len(shape) == 1:
            blobs.append(2 * shape[0])
            continue
        blobs += [shape[0] * shape[1] // 2, shape[0] // ROWS * COLORS * 2]
        if name != EMBEDDING and f"{name.removesuffix('weight')}bias" not in wanted:
            zeros.append(2 * shape[0])  # Core ML's linear has a bias
    blobs += [*{size for size in zeros if size >= _SHARED}, *(size for size in zeros if size < _SHARED)]
    return _LINE + sum(_LINE + math.ceil(size / _LINE) * _LINE for size in blobs)


def planned_bytes(specs: Mapping[str, TensorSpec], layers: int, per_part: int) -> int:
    """Exact size of all packages' weight files; programs and manifests, about 1 MB for 36 layers, come on top."""
    return sum(weight_bytes(specs, piece) for piece in parts_of(layers, per_part))


def holds(piece: Piece) -> str:
    """What a package is made of, in words."""
    return f"layers {piece.start} to {piece.stop - 1}" if isinstance(piece, range) else piece


def export_packages(src: Path, out: Path, context: int, per_part: int) -> dict[str, Any]:
    """Write the packages; returns what coreml.json says.

    Raises:
        InputError: coremltools is absent, `out` exists, or the folder does not fit.
    """
    if importlib.util.find_spec("coremltools") is None:
        raise InputError("coremltools is not installed (requirements-apple.txt); --storage float16 works without it")
    require_free(out)
    config, facts = DecoderConfig.load(src), extraction_record(src)
    from apple import coreml_parts  # imports coremltools: takes seconds, and warns

    with Checkpoint(src) as source, whole_folder(out) as folder:
        require_rows(source.specs)
        size = planned_bytes(source.specs, config.num_hidden_layers, per_part)
        require_space(out, size)
        parts = {f"part_{index:02d}.mlpackage": piece
                 for index, piece in enumerate(parts_of(config.num_hidden_layers, per_part))}
        for name, piece in tqdm(parts.items(), desc="convert", disable=None):
            coreml_parts.convert(_part(source, config, piece, context), config, piece, context).save(str(folder / name))
            log.info("%s  %s", name, holds(piece))
        record = {"tool": f"lance-quant {__version__}", "source": facts, "context": context, "parts": list(parts),
                  "holds": [holds(piece) for piece in parts.values()], "rope_theta": config.rope_theta,
                  "weight_bytes": size, "bytes": _size(folder)}
        write_json(folder / "coreml.json", record)
        _copy_texts(src, folder, ("generation_config.json", *TOKENIZER_FILES))
    return record


def _part(source: Checkpoint, config: DecoderConfig, piece: Piece, context: int) -> nn.Module:
    tensors = {ours: palettized(source, theirs) for ours, theirs in sources_of(source.specs, piece).items()}
    return build(tensors, config, piece, context)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _copy_texts(src: Path, folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (src / name).is_file():
            shutil.copyfile(src / name, folder / name)


def float16_specs(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """What --storage float16 writes."""
    return {name: spec._replace(dtype=torch.float16) for name, spec in specs.items()}


def export_float16(src: Path, out: Path) -> dict[str, Any]:
    """Write the Hugging Face folder with palettized values; returns what export.json says. InputError as above."""
    require_free(out)
    facts = extraction_record(src)
    with Checkpoint(src) as source, whole_folder(out) as folder:
        require_rows(source.specs)
        size = file_size(float16_specs(source.specs))
        require_space(out, size)
        with TensorFileWriter(folder / "model.safetensors", float16_specs(source.specs)) as writer:
            for name in tqdm(source.specs, desc="palettize", disable=None):
                writer.write(name, palettized(source, name))
        config = read_json(src / "config.json", "model configuration")
        write_json(folder / "config.json", {**config, "torch_dtype": "float16"})
        record = {"tool": f"lance-quant {__version__}", "source": facts, "bytes": size,
                  "palettes": {"colors": COLORS, "rows": ROWS}}
        write_json(folder / "export.json", record)
        _copy_texts(src, folder, ("generation_config.json", *TOKENIZER_FILES))
    return record


def dry_run(src: Path, storage: str, per_part: int) -> str:
    """Exact bytes of the weight files, from headers."""
    extraction_record(src)
    config = DecoderConfig.load(src)
    with Checkpoint(src) as source:
        require_rows(source.specs)
        if storage == "float16":
            return f"output_bytes: {file_size(float16_specs(source.specs))}"
        return f"output_bytes: {planned_bytes(source.specs, config.num_hidden_layers, per_part)} and programs"


def main(argv: list[str] | None = None) -> None:
    """Plan or export, and print the result."""
    args = parse_args(argv)
    if args.context < 2 or args.layers_per_part < 1:
        raise InputError(f"--context {args.context} must be 2 or more, --layers_per_part {args.layers_per_part} 1")
    if args.dry_run:
        print(dry_run(args.src, args.storage, args.layers_per_part))
        return
    if args.out is None:
        raise InputError("--out is needed unless --dry_run is given")
    if args.storage == "float16":
        record = export_float16(args.src, args.out)
    else:
        record = export_packages(args.src, args.out, args.context, args.layers_per_part)
    log.info("wrote %s: %s", args.out, json.dumps({"bytes": record["bytes"]}))
    print(args.out)


if __name__ == "__main__":
    script.run(main)
