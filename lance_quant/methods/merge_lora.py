"""LoRA folded into float weights: W + strength * B A, so that what is quantized afterwards has learned it."""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from lance_quant.errors import InputError
from lance_quant.formats import layout, lora_file
from lance_quant.formats.lora_file import Factors, LoraUse
from lance_quant.methods import model_card
from lance_quant.methods.bars import bar
from lance_quant.storage.atomic import whole_folder
from lance_quant.storage.tensor_file import Checkpoint, TensorFileWriter, file_size, require_finite

log = logging.getLogger("lance_quant")


def merge(src: Path, out: Path, loras: Sequence[LoraUse], dry_run: bool = False) -> str:
    """Write a float folder with LoRAs folded in; tensors are read one by one.

    Args:
        src: float checkpoint: a file, an index or a folder; what lies beside it is copied.
        out: folder to create.
        loras: are added in float32 and rounded once, to the dtype of the tensor.
        dry_run: read headers and LoRAs only.

    Returns:
        The folder, or what it would take.

    Raises:
        InputError: a packed checkpoint, a LoRA of another model, a result that is not finite, or `out` exists.
    """
    if not loras:
        raise InputError("no LoRA is given: name at least one with --lora FILE")
    with Checkpoint(src) as source:
        layout.require_complete({name: spec.shape for name, spec in source.specs.items()})
        added = _added(source, loras)
        if dry_run:
            return f"linears: {len(added)}\noutput_bytes: {file_size(source.specs)}"
        with whole_folder(out) as folder:
            with TensorFileWriter(folder / "model.safetensors", source.specs) as writer:
                for name in bar(list(source.specs), "merge", True):
                    linear = name.removesuffix(".weight")
                    if name.endswith(".weight") and linear in added:
                        writer.write(name, _merged(source.read(name), added[linear], name))
                    else:
                        writer.write_pieces(name, source.pieces(name))
            for name, file in model_card.beside(source.path).items():
                shutil.copyfile(file, folder / name)
    log.info("%d LoRA in %d linears: %s", len(loras), len(added), out)
    return str(out)


def _added(source: Checkpoint, loras: Sequence[LoraUse]) -> dict[str, list[Factors]]:
    """Factors by linear, strengths in B."""
    shapes = {name.removesuffix(".weight"): (spec.shape[0], spec.shape[1]) for name, spec in source.specs.items()
              if name.endswith(".weight") and len(spec.shape) == 2 and not name.endswith("embed_tokens.weight")}
    added: dict[str, list[Factors]] = {}
    for use in loras:
        for linear, found in lora_file.taken(use, shapes).items():
            added.setdefault(linear, []).append(found)
    return added


def _merged(weight: Tensor, factors: Sequence[Factors], name: str) -> Tensor:
    """[out, in] in its own dtype."""
    whole = weight.float()
    for one in factors:
        whole.addmm_(one.b, one.a)
    merged = whole.to(weight.dtype)
    require_finite(merged, f"{name} with its LoRA")
    return merged


