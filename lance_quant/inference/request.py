"""Run requests: which model, loaded how, on which samples, with which settings.

Scripts make them from their flags, once; everything below reads these and no flags.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lance_quant.calibration.activation_stats import model_fingerprint
from lance_quant.errors import InputError
from lance_quant.formats.lora_file import LoraUse
from lance_quant.formats.packed_folder import PackedFolder
from lance_quant.inference.layer_offload import stream_layers
from lance_quant.inference.lora import attach, scales_of
from lance_quant.kernels.choices import KernelChoice, Mode
from lance_quant.kernels.quantized_linear import swap_linears
from lance_quant.lance.compiled import compile_steps
from lance_quant.lance.config import LancePaths
from lance_quant.lance.media.samples import Prompt, Question
from lance_quant.lance.mot import Lance
from lance_quant.lance.runtime import Runtime
from lance_quant.lance.settings import Offload, Settings
from lance_quant.storage.tensor_file import Checkpoint, file_size

log = logging.getLogger("lance_quant")

STREAMS_TO = ("cuda",)  # kinds of devices that layers can be streamed to


class PackedMode(NamedTuple):
    """How packed weights are computed with."""

    mode: Mode = "ondemand"
    kernel: KernelChoice = "auto"


@dataclass(frozen=True)
class ModelSource:
    """Where a model's parts lie, and how it is loaded.

    dtype: of the computation. offload, fix_quirks, vae_tiling: as in runtime.Runtime; offload "layers" loads into host
        memory and streams the decoder's layers from there (layer_offload.py).
    compiled: its steps are compiled (`load_to_run`).
    loras: put on what is loaded to run (lora.py).

    Raises:
        InputError: layers are to be streamed to what is no GPU, or to be compiled.
    """

    paths: LancePaths
    device: torch.device
    dtype: torch.dtype
    offload: Offload = "none"
    fix_quirks: bool = False
    vae_tiling: bool = False
    compiled: bool = False
    loras: tuple[LoraUse, ...] = ()

    def __post_init__(self) -> None:
        if self.offload != "layers":
            return
        if self.device.type not in STREAMS_TO:
            raise InputError("offload layers keeps weights in host memory and computes on a CUDA GPU; on "
                             f"{self.device} they are in host memory anyway: leave it out")
        if self.compiled:
            raise InputError("offload layers and compile do not go together: a compiled step expects weights that stay "
                             "where they are; leave one of them out")

    @property
    def weights_device(self) -> torch.device:
        """Where weights are loaded to."""
        return torch.device("cpu") if self.offload == "layers" else self.device

    def load(self, checkpoint: Path | None = None, prepare: Callable[[Lance], object] | None = None,
             merged: bool = False, scales: Mapping[str, Tensor] | None = None) -> Runtime:
        """The model, from `checkpoint` or the float weights; arguments as for Runtime.load, scales [in] or [out]
        as for lora.attach.

        Raises:
            InputError: a file is missing or does not fit the configuration.
        """
        runtime = Runtime.load(self.paths, self.weights_device, self.dtype, checkpoint, prepare,
                               fix_quirks=self.fix_quirks, offload=self.offload, vae_tiling=self.vae_tiling,
                               merged=merged)
        if self.loras:
            log.info("LoRA on %d linears", attach(runtime.model, self.loras, scales))
        if self.offload == "layers":
            stream_layers(runtime.model, self.device)
        return runtime

    def load_to_run(self, checkpoint: Path | None = None, prepare: Callable[[Lance], object] | None = None,
                    scales: Mapping[str, Tensor] | None = None) -> Runtime:
        """As `load`, made fast: projections merged, steps compiled if so asked. No linear can be watched in it.

        Args:
            scales: [in] or [out], see lora.attach.
        """
        runtime = self.load(checkpoint, prepare, merged=True, scales=scales)
        if self.compiled:
            compile_steps(runtime.model)
        return runtime

    def load_packed(self, packed: PackedFolder, how: PackedMode) -> Runtime:
        """As `load_to_run`, with an open packed folder's weights.

        Raises:
            InputError: they do not fit the configuration, or the kernel cannot run them here.
        """
        scales = scales_of(packed, self.paths.model) if self.loras else None
        return self.load_to_run(packed.checkpoint.path, lambda lance: swap_linears(
            lance, packed, self.dtype, self.weights_device, how.mode, how.kernel, self.device), scales)


@dataclass(frozen=True)
class RunRequest:
    """A task over samples, on a model.

    arguments: the command line, for run.json.
    on_text: gets questions and answers while they come; None: a bar instead.
    """

    settings: Settings
    samples: Sequence[Question | Prompt]
    source: ModelSource
    arguments: Mapping[str, Any]
    on_text: Callable[[str], None] | None = None


def has_float(model_path: Path) -> bool:
    """Whether a folder has float weights."""
    return any((model_path / name).is_file() for name in Checkpoint.CANDIDATES)


def packed_facts(packed: PackedFolder) -> dict[str, Any]:
    """What run.json says of packed weights; `fingerprint` is that of the float weights which they were made from, None
    where the folder does not say."""
    return {**packed.facts(), "fingerprint": packed.meta.get("source_fingerprint")}


def float_facts(model_path: Path) -> dict[str, Any]:
    """What run.json says of float weights: path, bytes on disk, bits per weight of the decoder's linears.

    Raises:
        InputError: there is no checkpoint.
    """
    with Checkpoint(model_path) as source:
        spec = next(spec for name, spec in source.specs.items() if name.endswith(".q_proj.weight"))
        return {"path": str(source.path), "format": str(spec.dtype).removeprefix("torch."),
                "bytes": file_size(source.specs), "fingerprint": model_fingerprint(source),
                "bits_per_weight": float(torch.finfo(spec.dtype).bits)}
