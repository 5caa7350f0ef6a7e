"""What a conversion is asked to do: format, recipe and sizes, checked against one another."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lance_quant.errors import InputError
from lance_quant.formats.base import Codec
from lance_quant.formats.int4 import Int4
from lance_quant.formats.nvfp4 import Nvfp4

CPU = torch.device("cpu")
Recipe = Literal["ours", "published"]  # "ours" is layer.py; metas of packed folders hold this word
HeadBits = Literal[8, 16]
Gptq = Literal["full", "light"]  # what is done with captures (calibration/layer_inputs.py)
Allocation = Mapping[str, Codec | None]  # linears that a budget gave a format of their own; None: bfloat16


@dataclass(frozen=True)
class Conversion:
    """How a float checkpoint becomes a packed folder.

    codec: the format
    recipe: "published" repeats the algorithm of Reza2kn/lance-quant (published.py)
    bits_budget: stored bits per quantized weight that group sizes may take together (bit_allocation.py); None: one size
    head_bits: of the output head and the token embedding, 8 (int8.py) or 16
    device: where searches and GPTQ run
    resume: keep finished layers beside the output (storage/resume.py), and go on from those that are there
    with_parts: also put ViT and VAE into the folder, as hard links where the disk allows, else as copies
    progress: show a bar where stderr is a terminal
    gptq: "light" is one pass on the float model's inputs

    Raises:
        InputError: the published recipe with something that was never published, or a budget for a format of one size.
    """

    codec: Codec
    recipe: Recipe = "ours"
    bits_budget: float | None = None
    head_bits: HeadBits = 16
    device: torch.device = CPU
    resume: bool = False
    with_parts: bool = False
    progress: bool = True
    gptq: Gptq = "full"

    def __post_init__(self) -> None:
        if self.bits_budget is not None and not isinstance(self.codec, Int4):
            raise InputError(f"a bits budget chooses INT4 group sizes, and {self.codec.name} has one: leave it out")
        if self.recipe != "published":
            return
        if isinstance(self.codec, Nvfp4) and self.codec.slim:
            raise InputError("--slim is not part of the published layout: use it with --recipe ours")
        if self.bits_budget is not None or self.head_bits != 16:
            flag = "--head_bits 8" if self.bits_budget is None else "--bits_budget"
            raise InputError(f"{flag} is not part of the published recipe: leave it out, or use --recipe ours")

    def sizes(self, from_captures: bool) -> dict[str, Any]:
        """What a meta and a resumed job must know of the sizes; `from_captures`: a budget goes by captures."""
        budget = {} if self.bits_budget is None else \
            {"bits_budget": self.bits_budget, "harm": "captures" if from_captures else "relative output error"}
        return budget if self.head_bits == 16 else {**budget, "head_bits": self.head_bits}
