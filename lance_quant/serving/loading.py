"""The models that a server holds: a float folder, packed ones beside it, or the small Lance of this package."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lance_nano import CHECKPOINT
from lance_quant.calibration.activation_stats import ActStats
from lance_quant.errors import InputError
from lance_quant.formats.int4 import Int4
from lance_quant.formats.packed_folder import is_packed
from lance_quant.inference.pipeline import Pipeline
from lance_quant.methods import convert
from lance_quant.methods.conversion import Conversion

log = logging.getLogger("lance_quant")

_SMALL_SIZE, _SMALL_PRESET = {"height": 112, "width": 112}, "image_112res"


@dataclass(frozen=True)
class Loaded:
    """Pipelines by name, and what to ask of each where a request does not say: picture sizes and input presets.

    sizes_on_disk: bytes of each model's weights
    """

    pipelines: dict[str, Pipeline]
    sizes: dict[str, dict[str, int]]
    presets: dict[str, str]
    sizes_on_disk: dict[str, int]


def names_of(model: Path | None, packed: Sequence[Path]) -> list[str]:
    """How requests call the models of these folders.

    Raises:
        InputError: two have one name.
    """
    folders = [*packed] or [CHECKPOINT if model is None else model]
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        raise InputError(f"folders need different names, which requests call them by: {', '.join(names)}")
    return names


def load(model: Path | None, packed: Sequence[Path], **options: Any) -> Loaded:
    """Load them.

    Args:
        model: float folder, or packed one that is whole; None: lance-nano, and 4 bits of it beside it.
        packed: folders whose weights are served instead of the float ones, with `model`'s configuration.
        options: as for Pipeline.load.
    """
    names = names_of(model, packed)
    if model is None and not packed:
        log.info("no --model_path: the small Lance of this package, which knows shapes and digits at 112 x 112, in "
                 "floating point and in 4 bits")
        pipelines = _small(names[0], options)
    elif packed:
        pipelines = {name: Pipeline.load(model or folder, packed=None if model is None else folder, **options)
                     for name, folder in zip(names, packed, strict=True)}
    else:
        assert model is not None
        pipelines = {names[0]: Pipeline.load(model, **options)}
    small = [name for name, one in pipelines.items() if one.runtime.model.config.is_small]
    return Loaded(pipelines, dict.fromkeys(small, _SMALL_SIZE), dict.fromkeys(small, _SMALL_PRESET),
                  {name: _bytes_of(one) for name, one in pipelines.items()})


def _small(name: str, options: dict[str, Any]) -> dict[str, Pipeline]:
    """lance-nano, and the same rounded to 4 bits without calibration, made now."""
    with _packed_small() as folder:
        packed = Pipeline.load(CHECKPOINT, packed=folder, **options)
    return {name: Pipeline.load(CHECKPOINT, **{**options, "mode": "ondemand", "kernel": "auto"}),
            f"{name}-int4": packed}


@contextlib.contextmanager
def _packed_small() -> Iterator[Path]:
    with TemporaryDirectory(prefix="lance-") as place:
        stats, out = Path(place) / "stats.pt", Path(place) / "int4"
        level = log.level
        log.setLevel(logging.ERROR)  # that nothing was calibrated is meant
        try:
            ActStats({}, ["none"], [{"run_id": "none", "task": "none"}], 0).save(stats)
            convert.convert(CHECKPOINT, stats, out, Conversion(Int4()))
        finally:
            log.setLevel(level)
        yield out


def _bytes_of(pipeline: Pipeline) -> int:
    """Bytes of a model's tensors in memory, ViT and VAE not counted."""
    model = pipeline.runtime.model
    return sum(tensor.numel() * tensor.element_size() for tensor in {
        id(one): one for one in [*model.parameters(), *model.buffers()]}.values())


def require_folders(model: Path | None, packed: Sequence[Path]) -> None:
    """Raise InputError for folders that are no models, before the first one is loaded."""
    for folder in packed:
        if not is_packed(folder):
            raise InputError(f"--awq_dir {folder} is no packed folder: it has no awq_meta.json or nvfp4_meta.json")
    if model is not None and not (model / "llm_config.json").is_file():
        raise InputError(f"--model_path {model} is no Lance folder: it has no llm_config.json")
    names_of(model, packed)
