#!/usr/bin/env python3
"""Quantize an extracted understanding path to a folder that mlx-lm runs, with or without MLX.

    python -m apple.export_mlx --src Lance_3B-und --format 4bit --out Lance_3B-und-MLX-4bit
    python -m apple.export_mlx --src Lance_3B-und --format 4bit --stats all.pt --capture x2t.safetensors --out Better
    mlx_lm.generate --model Lance_3B-und-MLX-4bit --prompt "Why is the sky blue?"

Without options the tensors are those of `mlx_lm.convert -q`, bit for bit, row by row: its own conversion to nvfp4 or
mxfp4 needs more than 19 GB for the embedding. With --stats the layers are first rescaled for Lance's activations and
their grids fitted to them (apple/mlx_fold.py), with --capture GPTQ rounds: the same format, size and speed. With --dwq
the scales are then trained on the float model's distributions over some texts (apple/dwq.py), as `mlx_lm.dwq` does.

Reads   a folder made by apple/extract_und.py; with --stats activation statistics of its source (awq_merge_stats.py),
        with --capture layer inputs of x2t tasks (awq_calibrate_single.py --capture); with --dwq one {"text": ...},
        {"messages": ...} or {"prompt": ..., "completion": ...} per line
Writes  OUT/model.safetensors (1.91 GB for Lance_3B), its index, config.json, tokenizer, export.json
Needs   2.4 GB of memory, with --stats 3.3 GB; --dwq two float models. CPU time is in apple/README.md
Next    mlx_lm.generate --model OUT on a Mac; apple/compare_mlx.py anywhere
"""

import argparse
import importlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from apple import mlx_fold
from apple.decoder import extraction_record
from apple.dwq import Training, distil
from apple.extract_und import TOKENIZER_FILES
from apple.mlx_codes import FORMATS, Format, quantize
from lance_quant import __version__
from lance_quant.cli import script
from lance_quant.errors import InputError
from lance_quant.formats.packed_folder import require_space
from lance_quant.inference.device import device_of
from lance_quant.storage.atomic import read_json, whole_folder, write_json
from lance_quant.storage.output_place import require_free
from lance_quant.storage.tensor_file import Checkpoint, TensorFileWriter, TensorSpec, file_size

log = logging.getLogger("lance_quant")

ROWS = 1024  # rows per call: MLX's temporaries are 79 bytes per weight, 24 GB for the whole embedding
Packer = Callable[[Tensor, Format], dict[str, Tensor]]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    parser.add_argument("--src", type=Path, required=True, help="folder made by apple/extract_und.py")
    parser.add_argument("--out", type=Path, help="folder to create; never overwritten; not written by --dry_run")
    parser.add_argument("--format", choices=FORMATS, required=True, help="4bit is affine, 64 inputs per scale")
    parser.add_argument("--stats", type=Path, help="activation statistics: fold scales and fit the grids")
    parser.add_argument("--capture", type=Path, nargs="+", default=[],
                        help="with --stats: layer inputs (awq_calibrate_single.py --capture), for GPTQ")
    parser.add_argument("--dwq", type=Path, help="texts to distil on, .jsonl; 4bit only")
    parser.add_argument("--learning_rate", type=float, default=Training.learning_rate, help="of --dwq")
    parser.add_argument("--epochs", type=int, default=Training.epochs, help="passes over the texts of --dwq")
    parser.add_argument("--max_tokens", type=int, default=Training.max_tokens, help="longest text of --dwq")
    script.add_device(parser, dtype=False)
    parser.add_argument("--packer", choices=PACKERS, default="ours",
                        help="who rounds; both give the same bytes, and ours needs no MLX")
    parser.add_argument("--dry_run", action="store_true", help="read headers only and print what would be written")
    return parser.parse_args(argv)


def is_quantized(spec: TensorSpec, fmt: Format) -> bool:
    """Whether mlx-lm quantizes a tensor: matrices whose width the group size divides, embedding and head included."""
    return len(spec.shape) == 2 and spec.shape[1] % fmt.group_size == 0


def plan(specs: Mapping[str, TensorSpec], fmt: Format) -> dict[str, TensorSpec]:
    """Name, dtype and shape of everything in the new file."""
    out: dict[str, TensorSpec] = {}
    for name, spec in specs.items():
        if not is_quantized(spec, fmt):
            out[name] = spec
            continue
        for suffix, (dtype, inputs) in fmt.suffixes(spec.dtype).items():
            out[f"{name.removesuffix('weight')}{suffix}"] = TensorSpec(dtype, (spec.shape[0], spec.shape[1] // inputs))
    return out


def planned_bytes(specs: Mapping[str, TensorSpec], fmt: Format) -> int:
    """Exact size of the new file from the headers of the old one."""
    return file_size(plan(specs, fmt))


def mlx_quantize(w: Tensor, fmt: Format) -> dict[str, Tensor]:
    """`mlx.core.quantize` of a torch weight [out, in], float32 or bfloat16."""
    import mlx.core as mx

    def back(array: Any) -> Tensor:
        if array.dtype == mx.bfloat16:
            return torch.frombuffer(bytearray(array.view(mx.uint16)), dtype=torch.bfloat16).view(array.shape)
        dtype = {mx.uint32: torch.uint32, mx.uint8: torch.uint8, mx.float32: torch.float32}[array.dtype]
        return torch.frombuffer(bytearray(array), dtype=dtype).view(array.shape)

    bits = w.view(torch.int16) if w.dtype == torch.bfloat16 else w  # numpy knows no bfloat16
    array = mx.array(bits.numpy()).view(mx.bfloat16 if w.dtype == torch.bfloat16 else mx.float32)
    parts = mx.quantize(array, group_size=fmt.group_size, bits=4, mode=fmt.mode)
    return {name: back(part) for name, part in zip(("weight", "scales", "biases"), parts, strict=False)}


PACKERS = {"ours": quantize, "mlx": mlx_quantize}


def packer_of(name: str) -> Packer:
    """The function behind --packer. InputError if MLX is wanted and absent."""
    if name == "mlx":
        try:
            importlib.import_module("mlx.core")
        except ImportError as error:  # on Linux also of the package alone, which has no backend
            raise InputError("--packer mlx: MLX is not installed here (requirements-apple.txt); use --packer ours"
                             ) from error
    return PACKERS[name]


def pack_rows(w: Tensor, fmt: Format, packer: Packer) -> dict[str, Tensor]:
    """A weight [out, in] in `fmt`, a few rows at a time."""
    parts = [packer(w[row:row + ROWS], fmt) for row in range(0, w.shape[0], ROWS)]
    return {suffix: torch.cat([part[suffix] for part in parts]) for suffix in parts[0]}


def plain_tensors(source: Checkpoint, fmt: Format, packer: Packer) -> Iterator[tuple[str, Tensor]]:
    """Everything as `mlx_lm.convert -q` stores it."""
    for name, spec in source.specs.items():
        w = source.read(name)
        if not is_quantized(spec, fmt):
            yield name, w
            continue
        try:
            packed = pack_rows(w, fmt, packer)
        except ValueError as error:
            raise InputError(f"{source.path}: {name}: {error}") from error
        for suffix, tensor in packed.items():
            yield f"{name.removesuffix('weight')}{suffix}", tensor


class Calibrated(NamedTuple):
    """Where activations are known from; see mlx_fold.Calibration."""

    stats: Path
    captures: Sequence[Path]
    device: torch.device

    def load(self, fingerprint: str, source: Checkpoint) -> mlx_fold.Calibration:
        """Read the files, of the model with this fingerprint, which `source` was extracted from."""
        return mlx_fold.Calibration.load(self.stats, self.captures, fingerprint, source, self.device)


def export(src: Path, out: Path, fmt: Format, packer: Packer, calibrated: Calibrated | None = None,
           refine: Callable[[dict[str, Tensor]], tuple[dict[str, Tensor], dict[str, Any]]] | None = None
           ) -> dict[str, Any]:
    """Write the folder; returns what export.json says.

    Args:
        calibrated: fold scales and fit the weights to activations.
        refine: called with the packed tensors; gives the ones to write, and facts about them (see dwq.distil).

    Raises:
        InputError: `src` was not made by extract_und.py, `out` exists, the statistics are another model's, or the
            disk is too small.
    """
    require_free(out)
    facts = extraction_record(src)
    with Checkpoint(src) as source:
        size = planned_bytes(source.specs, fmt)
        require_space(out, size)
        planned, linears = plan(source.specs, fmt), {}
        if calibrated is None:
            stream, origin = plain_tensors(source, fmt, packer), {}
        else:
            known = calibrated.load(facts["source_fingerprint"], source)
            stream = mlx_fold.fitted_tensors(source, src, fmt, known, calibrated.device, linears)
            origin = {"calibration_runs": known.stats.runs,
                      "captures": [] if known.layer_inputs is None else list(known.layer_inputs.facts),
                      "linears": linears}
        stream, refined = tqdm(stream, desc=f"pack to {fmt.mode}", total=len(planned), disable=None), None
        if refine is not None:
            tensors, refined = refine(dict(stream))
            stream = tensors.items()
        with whole_folder(out) as folder:
            with TensorFileWriter(folder / "model.safetensors", planned) as writer:
                for name, tensor in stream:
                    writer.write(name, tensor)
            record = {"tool": f"lance-quant {__version__}", "source": facts, "quantization": fmt.config,
                      "dwq": refined, "bytes": size, **origin,
                      "rounded_by": "mlx" if packer is mlx_quantize and calibrated is None else "lance-quant"}
            _write_texts(src, folder, planned, fmt, record)
    return record


def _write_texts(src: Path, folder: Path, specs: Mapping[str, TensorSpec], fmt: Format,
                 record: Mapping[str, Any]) -> None:
    """What mlx-lm wants beside the tensors: their index, config.json with the format, tokenizer; and the record."""
    config = read_json(src / "config.json", "model configuration")
    config = {**config, "quantization": fmt.config, "quantization_config": fmt.config}
    write_json(folder / "config.json", dict(sorted(config.items())))
    weight_map = dict.fromkeys(sorted(specs), "model.safetensors")
    total = {"total_size": sum(spec.nbytes for spec in specs.values())}
    write_json(folder / "model.safetensors.index.json", {"metadata": total, "weight_map": weight_map})
    for name in ("generation_config.json", *TOKENIZER_FILES):
        if (src / name).is_file():
            shutil.copyfile(src / name, folder / name)
    write_json(folder / "export.json", record)


def refiner(args: argparse.Namespace) -> Callable[..., Any] | None:
    """What --dwq means, checked before anything is read; None without it."""
    if args.dwq is None:
        return None
    if args.format != "4bit":
        raise InputError(f"--dwq trains affine scales, and {args.format} has none: use --format 4bit")
    if not args.dwq.is_file():
        raise InputError(f"distillation data not found: {args.dwq}")
    if args.learning_rate <= 0 or args.epochs < 1 or args.max_tokens < 2:
        raise InputError(f"--learning_rate {args.learning_rate}, --epochs {args.epochs} and --max_tokens "
                         f"{args.max_tokens} must be positive, and the last 2 or more")
    training = Training(args.learning_rate, epochs=args.epochs, max_tokens=args.max_tokens)
    device = device_of(args.device)
    return lambda tensors: distil(args.src, tensors, args.dwq, training, device)


def main(argv: list[str] | None = None) -> None:
    """Plan or export, and print the result."""
    args = parse_args(argv)
    fmt = FORMATS[args.format]
    if args.dry_run:
        extraction_record(args.src)
        with Checkpoint(args.src) as source:
            print(f"output_bytes: {planned_bytes(source.specs, fmt)}")
        return
    if args.out is None:
        raise InputError("--out is needed unless --dry_run is given")
    if args.capture and args.stats is None:
        raise InputError("--capture rounds after the scales that --stats finds: give both")
    if args.stats is not None and args.packer != "ours":
        raise InputError("--stats rounds to grids of its own: leave --packer out")
    calibrated = None if args.stats is None else Calibrated(args.stats, args.capture, device_of(args.device))
    record = export(args.src, args.out, fmt, packer_of(args.packer), calibrated, refiner(args))
    log.info("wrote %s: %s", args.out, json.dumps({name: record[name] for name in ("rounded_by", "bytes", "dwq")}))
    print(args.out)


if __name__ == "__main__":
    script.run(main)
