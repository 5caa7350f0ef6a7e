"""Planning from headers: every tensor that a conversion writes, before a weight is read.

That is how the output file can be laid out first, and how --dry_run can promise its exact size.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lance_quant.calibration.activation_stats import ActStats, model_fingerprint
from lance_quant.errors import InputError
from lance_quant.formats import int8, layout, packed_folder
from lance_quant.formats.base import Codec
from lance_quant.lance.loader import FLOATS
from lance_quant.methods import bit_allocation, model_card
from lance_quant.methods.conversion import Allocation, Conversion, HeadBits
from lance_quant.storage.atomic import size_text
from lance_quant.storage.tensor_file import Checkpoint, TensorSpec, file_size


def shapes_of(specs: Mapping[str, TensorSpec], codec: Codec) -> dict[str, tuple[int, ...]]:
    """Shape [out, in] of every linear that will be quantized, by module name.

    Raises:
        InputError: not a float Lance checkpoint, or a width that the codec cannot pack.
    """
    if any(name.rpartition(".")[2] in (*packed_folder.SUFFIXES, *int8.SUFFIXES) for name in specs):
        raise InputError("this checkpoint is packed already: give the float one")
    count = layout.require_complete({name: spec.shape for name, spec in specs.items()})
    shapes = {name: specs[f"{name}.weight"].shape for name in layout.linears(count)}
    for name, spec in specs.items():
        if spec.dtype not in FLOATS:
            raise InputError(f"{name} is {str(spec.dtype).removeprefix('torch.')}, and a float checkpoint holds "
                             "float32, bfloat16, float16 or float64: convert it first")
    for name, shape in shapes.items():
        codec.require_fits(name, shape)
    return shapes


def plan(specs: Mapping[str, TensorSpec], codec: Codec, allocation: Allocation | None = None,
         head_bits: HeadBits = 16) -> dict[str, TensorSpec]:
    """Name, dtype and shape of everything that a run writes, from the source's headers.

    Args:
        specs: of the source.
        codec: the format.
        allocation: linears that have another format than `codec`.
        head_bits: of the output head and the token embedding.

    Raises:
        InputError: as shapes_of.
    """
    formats: dict[str, Codec | None] = {**dict.fromkeys(shapes_of(specs, codec), codec), **(allocation or {})}
    out: dict[str, TensorSpec] = {}
    for name, spec in specs.items():
        module = name.removesuffix(".weight")
        own = formats.get(module) if module != name else None
        if own is not None:
            out.update({f"{module}.{suffix}": part for suffix, part in own.specs(spec.shape).items()})
        elif module != name and module in layout.VOCABULARY and head_bits == 8:
            out.update({f"{module}.{suffix}": part for suffix, part in int8.specs(spec.shape).items()})
        else:
            out[name] = spec._replace(dtype=torch.bfloat16) if spec.dtype.is_floating_point else spec
    return out


def require_fitting(stats: ActStats, source: Checkpoint, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise InputError if the statistics are those of another model, or of linears with other inputs."""
    stats.require_model(model_fingerprint(source), {name: shape[1] for name, shape in shapes.items()})


def dry_run(src: Path, conversion: Conversion, stats_path: Path | None = None,
            sensitivity: bit_allocation.Sensitivity | None = None) -> str:
    """The plan as text: a table by kind, bits per weight, and the exact size of the file as the last line.

    Headers say it all, but for a budget: what it chooses depends on weights and statistics, which are then read.

    Args:
        src: the float checkpoint.
        conversion: what would be done.
        stats_path: activation statistics, for a budget.
        sensitivity: for a budget, as in bit_allocation.choose.

    Raises:
        InputError: a budget without statistics, or one that is too small; as shapes_of.
    """
    with Checkpoint(src) as source:
        shapes = shapes_of(source.specs, conversion.codec)
        allocation: Allocation = {}
        if conversion.bits_budget is not None:
            if stats_path is None:
                raise InputError("--dry_run with --bits_budget needs --stats: what is chosen, and so the size, depends "
                                 "on them")
            stats = ActStats.load(stats_path)
            require_fitting(stats, source, shapes)
            allocation = bit_allocation.choose(source, shapes, stats, conversion, sensitivity)
        specs = plan(source.specs, conversion.codec, allocation, conversion.head_bits)
        parts = model_card.parts_of(source.path, source.specs) if conversion.with_parts else {}
        bits = packed_folder.bits_per_weight(specs, shapes)
    size, chosen = file_size(specs), f"{_counted(allocation)}\n" if allocation else ""
    chosen += "".join(f"beside it {name}, {size_text(file.stat().st_size)}\n" for name, file in parts.items())
    return (f"{packed_folder.table(specs)}\n{chosen}{bits:.4f} bits per quantized weight, {size_text(size)}\n"
            f"output_bytes: {size}")


def _counted(allocation: Allocation) -> str:
    """How many linears of each kind have which format."""
    count = Counter((layout.kind_of(name), "bf16" if codec is None else f"g{codec.group_size}")
                    for name, codec in allocation.items())
    return "\n".join(f"{kind:<9} " + "  ".join(f"{size} x {number}" for (other, size), number in sorted(count.items())
                                               if other == kind) for kind in layout.KINDS)
