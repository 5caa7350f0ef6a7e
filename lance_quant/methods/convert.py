"""Post-training quantization of a checkpoint, layer by layer: the loop behind awq_apply.py and nvfp4_apply.py.

While a decoder layer is scaled, packed and written, the next is read. Everything outside of the layers is copied in
pieces. So memory stays at about two layers however large the model is.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lance_quant import __version__
from lance_quant.calibration import weight_sensitivity
from lance_quant.calibration.activation_stats import ActStats, model_fingerprint
from lance_quant.calibration.layer_inputs import layer_inputs_of
from lance_quant.cpu.threads import block_threads, block_threads_on
from lance_quant.errors import InputError
from lance_quant.formats import channel_scales, int8, layout, packed_folder
from lance_quant.formats.base import Scaling
from lance_quant.formats.weights import Weights
from lance_quant.methods import bit_allocation, gptq, layer, model_card, plan, published, quant_report
from lance_quant.methods.bars import bar
from lance_quant.methods.conversion import Allocation, Conversion
from lance_quant.methods.layer import Activations
from lance_quant.methods.quantized_group import QuantizedGroup
from lance_quant.storage.atomic import size_text
from lance_quant.storage.output_place import reserved
from lance_quant.storage.resume import ResumeJob
from lance_quant.storage.tensor_file import (
    Checkpoint,
    TensorFile,
    TensorSpec,
    file_size,
    require_finite,
    require_written,
    write_tensors,
)

log = logging.getLogger("lance_quant")

JOURNAL = 3  # version of LayerRecord in the journal of a resumed job


@dataclass
class LayerRecord:
    """What was done in a layer, in plain values, as a job's journal keeps it.

    tensors: names that were written
    entries: name of a weight -> its meta entry
    seconds: name of a weight -> that its group took
    scaling: name of a weight -> how it was scaled; None where it was left in bfloat16
    """

    tensors: list[str] = field(default_factory=list)
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    scaling: dict[str, Scaling | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    out: the folder
    nbytes: size of its tensor file
    bits_per_weight: stored bits per quantized weight
    entries, seconds, scaling: as in LayerRecord, of all linears
    without_statistics: linears for which the statistics hold nothing
    """

    out: Path
    nbytes: int
    bits_per_weight: float
    entries: Mapping[str, Mapping[str, Any]]
    seconds: Mapping[str, float]
    scaling: Mapping[str, Scaling | None]
    without_statistics: Sequence[str]

    @property
    def searched(self) -> int:
        """Packed linears that were scaled into what precedes them."""
        return sum(scaling == "searched" for scaling in self.scaling.values())

    @property
    def kept(self) -> int:
        """Linears that a budget left in bfloat16."""
        return sum(scaling is None for scaling in self.scaling.values())

    @property
    def plain(self) -> int:
        """Packed linears that were not scaled."""
        return len(self.scaling) - self.searched - self.kept

    def tables(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Meta entries of the packed linears, and of those that were left in bfloat16."""
        packed = {name: entry for name, entry in self.entries.items() if self.scaling[name] is not None}
        return packed, {name: entry for name, entry in self.entries.items() if name not in packed}

    def __str__(self) -> str:
        kept = f", {self.kept} kept in bfloat16" if self.kept else ""
        return (f"wrote {self.out}: {size_text(self.nbytes)}, {self.bits_per_weight:.4f} bits per quantized weight, "
                f"{self.searched} linears searched, {self.plain} rounded plainly{kept}")


@torch.no_grad()
def quantize_checkpoint(source: Checkpoint, stats: ActStats, out: Path, conversion: Conversion,
                        activations: Activations | None = None,
                        sensitivity: bit_allocation.Sensitivity | None = None) -> Report:
    """Write a packed folder.

    Args:
        source: the float checkpoint.
        stats: of this model; linears without statistics are rounded plainly, and named.
        out: the folder; appears when it is complete.
        conversion: format, recipe and sizes.
        activations: layer inputs for GPTQ; None rounds to nearest.
        sensitivity: for a bits budget; None takes relative output errors.

    Raises:
        InputError: the checkpoint, the statistics and the codec do not fit together, `out` exists, the disk is too
            small, or a weight holds NaN or Inf.
    """
    codec, shapes = conversion.codec, plan.shapes_of(source.specs, conversion.codec)
    plan.require_fitting(stats, source, shapes)
    if conversion.bits_budget is not None:
        bit_allocation.limit(shapes, conversion.bits_budget)  # refused before a work folder is made
    parts = model_card.parts_of(source.path, source.specs) if conversion.with_parts else {}
    facts = {**_facts(source, stats, conversion, activations), **conversion.sizes(sensitivity is not None)}
    work = ResumeJob(Path(out), {**facts, "journal": JOURNAL}) if conversion.resume else None
    allocation = bit_allocation.choose(source, shapes, stats, conversion, sensitivity, work)
    specs = plan.plan(source.specs, codec, allocation, conversion.head_bits)
    gaps = _without_statistics(stats, shapes)
    packed_folder.require_space(Path(out), _copied_bytes(parts, Path(out)) + (file_size(specs) if work is None else 0))
    with packed_folder.new_folder(Path(out), codec, specs, work) as writer:
        job = _Job(source, stats, conversion, specs, shapes, writer, activations, work, allocation)
        layers = job.run()
        writer.tensor_files[channel_scales.FILE] = job.scales
        report = Report(Path(out), file_size(specs), packed_folder.bits_per_weight(specs, shapes),
                        _merged([done.entries for done in layers]), _merged([done.seconds for done in layers]),
                        _merged([done.scaling for done in layers]), gaps)
        _copy_rest(source, specs, writer, conversion.progress)
        packed, kept = report.tables()
        writer.meta.update({**codec.header(), "awq_linears": report.searched, "plain_linears": report.plain, **facts,
                            "without_statistics": gaps, **({packed_folder.KEPT: kept} if kept else {}),
                            **_head_table(source, conversion), "per_weight": packed})
        writer.texts[quant_report.FILE] = _page(report, stats, conversion, facts, specs)
        writer.links.update(parts)
        _add_card(writer, source, report, codec.name, facts)
    return report


def _add_card(writer: packed_folder.PackedWriter, source: Checkpoint, report: Report, codec: str,
              facts: Mapping[str, Any]) -> None:
    """Configuration, tokenizer and model card, with which a packed folder is a model."""
    writer.copies.update(model_card.beside(source.path))
    complete = all(name in writer.copies for name in model_card.NEEDED)
    writer.texts[model_card.FILE] = model_card.card(codec, facts, report.nbytes, report.bits_per_weight, complete,
                                                    bool(writer.links))


def _copied_bytes(parts: Mapping[str, Path], out: Path) -> int:
    """Bytes of the parts that cannot be linked to, since they lie on another disk than `out` will."""
    there = next(parent for parent in out.absolute().parents if parent.exists()).stat().st_dev
    return sum(file.stat().st_size for file in parts.values() if file.resolve().stat().st_dev != there)


def _head_table(source: Checkpoint, conversion: Conversion) -> dict[str, Any]:
    """The meta's table of an 8-bit head and embedding."""
    if conversion.head_bits == 16:
        return {}
    names = [f"{name}.weight" for name in layout.VOCABULARY]
    return {int8.META_KEY: {name: int8.entry(source.specs[name].shape) for name in names}}


def _without_statistics(stats: ActStats, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    missing = [name for name in shapes if name not in stats.linears]
    if missing:
        log.warning("%d of %d linears have no statistics and are rounded plainly, first: %s",
                    len(missing), len(shapes), ", ".join(missing[:5]))
    return missing


def _merged(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: value for part in parts for name, value in part.items()}


def _facts(source: Checkpoint, stats: ActStats, conversion: Conversion,
           activations: Activations | None) -> dict[str, Any]:
    """What decides the result: part of the meta, and what a resumed job is checked against."""
    captured: dict[str, Any] = {} if activations is None else {"captures": list(activations.facts)}
    if captured and conversion.gptq != "full":
        captured["gptq"] = conversion.gptq
    return {"tool": f"lance-quant {__version__}", "codec": str(conversion.codec), "recipe": conversion.recipe,
            "source_fingerprint": model_fingerprint(source), "tasks_calibrated": stats.tasks,
            "calibration_runs": stats.runs, **captured}


@dataclass(frozen=True)
class _Job:
    """A conversion on its way through the layers; arguments as for quantize_checkpoint.

    specs: everything that will be written
    shapes: [out, in] of every linear
    work: of a job that may be resumed
    allocation: linears that a budget gave a format of their own
    """

    source: Checkpoint
    stats: ActStats
    conversion: Conversion
    specs: Mapping[str, TensorSpec]
    shapes: Mapping[str, Sequence[int]]
    writer: packed_folder.PackedWriter
    activations: Activations | None
    work: ResumeJob | None
    allocation: Allocation
    scales: dict[str, Tensor] = field(default_factory=dict)  # moved, as channel_scales.py names them

    def run(self) -> list[LayerRecord]:
        """Convert the layers that an earlier run has not finished; the records of all, in order."""
        records = self._finished()
        todo = range(len(records), layout.num_layers(self.source.specs))
        spare: list[Tensor] = []
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as disk:
            coming = [reader.submit(self._stored, todo.start, spare)] if todo else []
            for index in bar(todo, f"quantize to {self.conversion.codec.name}", self.conversion.progress):
                stored = coming.pop().result()
                if index + 1 in todo:
                    coming.append(reader.submit(self._stored, index + 1, spare))
                spare = list(stored.values())
                with self._threads():
                    records.append(self.layer(index, stored, disk))
                self._keep(records[-1])
        return records

    def _finished(self) -> list[LayerRecord]:
        """What an earlier run has done, behind which the layer inputs go on; tokens are weighed where there is none."""
        records = [] if self.work is None else [LayerRecord(**record) for record in self.work.layers]
        for index in range(len(records)):
            with TensorFile(self._scales_file(index)) as file:
                self.scales.update({name: file.read(name) for name in file.specs})
        if self.activations is not None:
            if self.work is not None and records:
                self.activations.load(self.work.state_file(len(records)))
            else:
                with self._threads():
                    self.activations.weigh_tokens()
        return records

    def _threads(self) -> AbstractContextManager[object]:
        """Ours gives the same bytes on any number of threads; the products of the published search are torch's."""
        return block_threads_on(self.conversion.device) if self.conversion.recipe == "ours" else nullcontext()

    def _stored(self, index: int, spare: list[Tensor]) -> Weights:
        """A layer as the source has it, in the memory of `spare`; runs while the layer before is worked on."""
        free: dict[TensorSpec, list[Tensor]] = defaultdict(list)
        for tensor in spare:
            free[TensorSpec(tensor.dtype, tuple(tensor.shape))].append(tensor)
        specs = {name: self.source.specs[name] for name in layout.of_layer(self.source.specs, index)}
        return {name: self.source.stored(name, free[spec].pop() if free[spec] else None)
                for name, spec in specs.items()}

    def layer(self, index: int, stored: Weights, disk: ThreadPoolExecutor) -> LayerRecord:
        """Write a layer's groups as they are finished, then its norms and biases, which scales may have changed.

        Args:
            stored: the layer's tensors; emptied.
            disk: one thread, in which tensors are written; all of them are when this returns.
        """
        weights = {name: _finite(stored.pop(name), name, self.conversion.device) for name in list(stored)}
        norms = {name: weight.clone() for name, weight in weights.items() if weight.dim() == 1}
        moved: dict[str, Tensor] = {}
        writing: list[Future[None]] = []
        record = LayerRecord()
        for group, done in self._quantized(index, weights, moved):
            tensors = {f"{name}.{suffix}": tensor for name, linear in zip(group.linears, done.linears, strict=True)
                       for suffix, tensor in linear.tensors.items()}
            writing.append(disk.submit(self._write, tensors))
            record.tensors += tensors
            self._note(record, group, done)
            log.info("%-22s %s", group.name, done)
        rest = sorted((weights.keys() & self.specs.keys()) - set(record.tensors))
        writing.append(disk.submit(self._write, {name: weights[name].to(self.specs[name].dtype) for name in rest}))
        record.tensors += rest
        for written in writing:
            written.result()
        self._move(index, {**channel_scales.norm_columns(norms, weights, index), **moved})
        return record

    def _move(self, index: int, moved: Mapping[str, Tensor]) -> None:
        """Note the scales of a layer; of a job that may be resumed, on the disk."""
        kept = {name: scale.float().cpu().clone() for name, scale in moved.items()}
        self.scales.update(kept)
        if self.work is not None and kept:
            write_tensors(self._scales_file(index), kept)

    def _scales_file(self, index: int) -> Path:
        assert self.work is not None
        return self.work.root / f"scales-{index}.safetensors"

    def _quantized(self, index: int, weights: Weights,
                   moved: dict[str, Tensor]) -> Iterator[tuple[layout.Group, QuantizedGroup]]:
        codec = self.conversion.codec
        if self.conversion.recipe == "published":
            return published.quantize_layer(index, weights, self.stats, codec)
        sweeps = 0 if self.conversion.gptq == "light" else gptq.SWEEPS
        return layer.quantize_layer(index, weights, self.stats, codec, self.activations, self.allocation, moved, sweeps)

    def _note(self, record: LayerRecord, group: layout.Group, done: QuantizedGroup) -> None:
        names = [f"{name}.weight" for name in group.linears]
        codecs = [self.allocation.get(name, self.conversion.codec) for name in group.linears]
        shapes = [self.shapes[name] for name in group.linears]
        record.entries.update(zip(names, done.entries(codecs, shapes), strict=True))
        record.seconds.update(dict.fromkeys(names, done.seconds))
        record.scaling.update({name: None if codec is None else done.scaling
                               for name, codec in zip(names, codecs, strict=True)})

    def _write(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.writer.tensors.write(name, tensor)

    def _keep(self, record: LayerRecord) -> None:
        """Make a finished layer of a job that may be resumed survive a kill."""
        if self.work is None:
            return
        self.writer.tensors.flush()
        if self.activations is not None:
            self.activations.save(self.work.state_file(len(self.work.layers) + 1))
        self.work.finish_layer(asdict(record))


def _finite(stored: Tensor, name: str, device: torch.device) -> Tensor:
    """A weight in float32, on `device`."""
    tensor = stored.to(device, torch.float32)
    require_finite(tensor, name)
    require_written(tensor, name)
    return tensor


def _copy_rest(source: Checkpoint, specs: Mapping[str, TensorSpec], writer: packed_folder.PackedWriter,
               progress: bool) -> None:
    rest = [name for name in source.specs if not name.startswith(f"{layout.LAYERS}.")]
    with block_threads():  # pieces are too short for torch's threads
        for name in bar(rest, "copy the rest", progress):
            pieces = _checked(source.pieces(name), name)
            if name in specs:
                writer.tensors.write_pieces(name, pieces)
            else:
                _write_8_bit(name.removesuffix(".weight"), pieces, source.specs[name].shape[1], writer)


def _write_8_bit(module: str, pieces: Iterable[Tensor], width: int, writer: packed_folder.PackedWriter) -> None:
    scales: list[Tensor] = []

    def codes() -> Iterator[Tensor]:
        for q in int8.quantize_rows(pieces, width):
            scales.append(q.scale)
            yield q.codes.reshape(-1)

    codes_name, scales_name = (f"{module}.{suffix}" for suffix in int8.SUFFIXES)
    writer.tensors.write_pieces(codes_name, codes())
    writer.tensors.write(scales_name, torch.cat(scales))


def _checked(pieces: Iterable[Tensor], name: str) -> Iterator[Tensor]:
    """The pieces of a tensor, as long as they are finite."""
    for piece in pieces:
        require_finite(piece, name)
        yield piece


def _page(report: Report, stats: ActStats, conversion: Conversion, facts: Mapping[str, Any],
          specs: Mapping[str, TensorSpec]) -> str:
    labels = {"bits_budget": "bits budget", "harm": "sensitivity", "head_bits": "head bits"}
    sizes = {label: str(facts[key]) for key, label in labels.items() if key in facts}
    codec, slim = conversion.codec, ", slim" if getattr(conversion.codec, "slim", False) else ""
    summary = {"format": f"{codec.name}, {codec.group_size} inputs per scale{slim}", "recipe": conversion.recipe,
               "size": size_text(report.nbytes), "bits per quantized weight": f"{report.bits_per_weight:.4f}",
               "calibrated on": ", ".join(stats.tasks),
               "linears scaled": f"{report.searched} of {report.searched + report.plain}",
               "linears without statistics": str(len(report.without_statistics)),
               "tool": f"lance-quant {__version__}", **sizes}
    rows = [quant_report.Row(name.removesuffix(".weight"), entry, report.seconds[name])
            for name, entry in report.entries.items()]
    rows.sort(key=lambda row: int(row.name.removeprefix(f"{layout.LAYERS}.").split(".")[0]))
    return quant_report.page(f"Quantization to {conversion.codec.name}", summary, rows, packed_folder.sizes(specs))


def convert(src: Path, stats_path: Path, out: Path, conversion: Conversion, activations: Activations | None = None,
            sensitivity: bit_allocation.Sensitivity | None = None) -> Report:
    """From paths to a packed folder: everything cheap is checked before a weight is read.

    Raises:
        InputError: as quantize_checkpoint; also a file that is missing or malformed.
    """
    with reserved(Path(out)), Checkpoint(src) as source:
        stats = ActStats.load(stats_path)
        report = quantize_checkpoint(source, stats, out, conversion, activations, sensitivity)
    log.info("%s", report)
    return report


def run(src: Path, stats_path: Path | None, captures: Sequence[Path], out: Path | None, conversion: Conversion,
        dry_run: bool) -> str:
    """What both quantization scripts do once they have read their arguments.

    Args:
        captures: layer inputs; with them GPTQ rounds, and a budget goes by what an error does to the outputs.

    Returns:
        The path of the folder, or the plan as text.

    Raises:
        InputError: as convert and plan.dry_run; also paths that are needed and not given.
    """
    device = conversion.device
    measured = captures and conversion.bits_budget is not None
    sensitivity = weight_sensitivity.sensitivity_of(src, captures, device) if measured else None
    if dry_run:
        return plan.dry_run(src, conversion, stats_path, sensitivity)
    if stats_path is None or out is None:
        raise InputError("--stats and --out are needed unless --dry_run is given")
    if captures and conversion.recipe == "published":
        raise InputError("--capture has no place in the published recipe: leave it out, or use --recipe ours")
    light = conversion.gptq == "light"
    if light and not captures:
        raise InputError("--gptq light says what is done with captures, and there is none: give --capture, or leave it "
                         "out")
    activations = layer_inputs_of(src, captures, device, light) if captures else None
    return str(convert(src, stats_path, out, conversion, activations, sensitivity).out)
