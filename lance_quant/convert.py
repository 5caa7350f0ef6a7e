"""From a float checkpoint to a packed folder: the loop behind awq_apply.py and nvfp4_apply.py.

A decoder layer is read, scaled, packed and written before the next is read, and everything outside of the layers is
copied in pieces, so memory stays at about one layer however large the model is. What a run writes is known
from the headers alone (`plan`), which is how the output file can be laid out first and --dry_run can be exact.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from lance_quant import __version__, layout, packed, published, quant_report
from lance_quant.codec import Codec
from lance_quant.errors import InputError
from lance_quant.files import require_free
from lance_quant.ours import Activations, Quantized, Weights, quantize_layer
from lance_quant.stats import ActStats, model_fingerprint
from lance_quant.tensorfile import Checkpoint, TensorSpec, file_size, require_finite
from lance_quant.work import Work

log = logging.getLogger("lance_quant")

Recipe = Literal["ours", "published"]


def shapes_of(specs: Mapping[str, TensorSpec], codec: Codec) -> dict[str, tuple[int, ...]]:
    """Shape of every linear that will be quantized, by module name.

    Raises:
        InputError: not a float Lance checkpoint, or a width that the codec cannot pack.
    """
    if any(name.rpartition(".")[2] in packed.SUFFIXES for name in specs):
        raise InputError("this checkpoint is packed already: give the float one")
    count = layout.require_complete({name: spec.shape for name, spec in specs.items()})
    shapes = {name: specs[f"{name}.weight"].shape for name in layout.linears(count)}
    for name, shape in shapes.items():
        if not specs[f"{name}.weight"].dtype.is_floating_point:
            raise InputError(f"{name}.weight is {specs[f'{name}.weight'].dtype}, not a float tensor")
        codec.require_fits(name, shape)
    return shapes


def plan(specs: Mapping[str, TensorSpec], codec: Codec) -> dict[str, TensorSpec]:
    """Name, dtype and shape of everything that a run writes, from the source's headers.

    Raises:
        InputError: see shapes_of.
    """
    shapes = shapes_of(specs, codec)
    out: dict[str, TensorSpec] = {}
    for name, spec in specs.items():
        linear = name.removesuffix(".weight")
        if linear in shapes and linear != name:
            out.update({f"{linear}.{suffix}": part for suffix, part in codec.specs(spec.shape).items()})
        else:
            out[name] = spec._replace(dtype=torch.bfloat16) if spec.dtype.is_floating_point else spec
    return out


def dry_run(src: Path, codec: Codec) -> str:
    """The plan as text: a table by kind, bits per weight, and the exact size of the file as the last line."""
    with Checkpoint(src) as source:
        specs = plan(source.specs, codec)
        bits = packed.bits_per_weight(specs, shapes_of(source.specs, codec))
    size = file_size(specs)
    return f"{packed.table(specs)}\n{bits:.4f} bits per quantized weight, {size / 1e9:.2f} GB\noutput_bytes: {size}"


@dataclass
class Report:
    """What a conversion did.

    out: the folder
    nbytes: size of its tensor file
    bits_per_weight: stored bits per quantized weight
    searched, plain: linears scaled into what precedes them, and the others
    without_statistics: linears for which the statistics hold nothing
    rows: what the report page lists
    """

    out: Path
    nbytes: int
    bits_per_weight: float
    searched: int = 0
    plain: int = 0
    without_statistics: list[str] = field(default_factory=list)
    rows: list[quant_report.Row] = field(default_factory=list)

    def count(self, layers: Sequence[Mapping[str, Any]], codec: Codec) -> None:
        """Take over what was done in each layer, see _Job.layer."""
        entries, seconds = _merged(layers, "entries"), _merged(layers, "seconds")
        self.rows = [quant_report.Row(name.removesuffix(".weight"), entry, seconds[name])
                     for name, entry in entries.items()]
        self.searched = sum(entry["scheme"] == codec.SCHEMES["searched"] for entry in entries.values())
        self.plain = len(entries) - self.searched

    def __str__(self) -> str:
        return (f"wrote {self.out}: {self.nbytes / 1e9:.2f} GB, {self.bits_per_weight:.4f} bits per quantized weight, "
                f"{self.searched} linears searched, {self.plain} rounded plainly")


def quantize_published(index: int, weights: Weights, stats: ActStats, codec: Codec,
                       activations: Activations | None = None) -> Iterator[tuple[layout.Group, Quantized]]:
    """Quantize one layer by the published recipe, see published.py; arguments as for ours.quantize_layer."""
    for group in layout.groups(index):
        started = time.perf_counter()
        done = _published_group(group, [weights[f"{name}.weight"].bfloat16() for name in group.linears], weights,
                                stats, codec)
        yield group, replace(done, seconds=time.perf_counter() - started)


def _published_group(group: layout.Group, linears: Sequence[Tensor], weights: Weights, stats: ActStats,
                     codec: Codec) -> Quantized:
    known = [stats.linears[name] for name in group.linears if name in stats.linears]
    means = [(entry.sum_abs.float() / entry.n_tokens).to(linears[0].device) for entry in known]
    chosen = None if group.norm is None else published.search(linears, means, codec)
    if chosen is None:
        kind = "plain" if group.norm is None else "unsearched"
        return Quantized([published.pack(w.float(), codec) for w in linears], kind, None, "no scale")
    norm = f"{group.norm}.weight"
    weights[norm] = (weights[norm].bfloat16().float() / chosen.s).bfloat16()
    tensors = [published.pack(w.float() * chosen.s, codec) for w in linears]
    return Quantized(tensors, "searched", None, f"act^{chosen.alpha:.2f}/w^{1 - chosen.alpha:.2f}")


RECIPES: dict[Recipe, Callable[..., Iterator[tuple[layout.Group, Quantized]]]] = {
    "ours": quantize_layer, "published": quantize_published}


@torch.no_grad()
def quantize_checkpoint(source: Checkpoint, stats: ActStats, codec: Codec, out: Path, recipe: Recipe,
                        device: torch.device, progress: bool = True, activations: Activations | None = None,
                        resume: bool = False) -> Report:
    """Write a packed folder.

    Args:
        source: the float checkpoint.
        stats: of this model; linears without statistics are rounded plainly, and named.
        codec: the format.
        out: the folder; appears when it is complete.
        recipe: "ours", or "published" to repeat the published algorithm.
        device: where the search runs.
        progress: show a bar where stderr is a terminal.
        activations: layer inputs for GPTQ, see ours.py.
        resume: keep finished layers beside `out` (work.py), and go on from those that are there.

    Raises:
        InputError: the checkpoint, the statistics and the codec do not fit together, `out` exists, the disk is too
            small, or a weight holds NaN or Inf.
    """
    specs, shapes = plan(source.specs, codec), shapes_of(source.specs, codec)
    fingerprint = model_fingerprint(source)
    stats.require_model(fingerprint, {name: shape[1] for name, shape in shapes.items()})
    report = Report(Path(out), file_size(specs), packed.bits_per_weight(specs, shapes),
                    without_statistics=[name for name in shapes if name not in stats.linears])
    _warn_of_gaps(report, len(shapes))
    facts = _facts(codec, stats, recipe, fingerprint, activations)
    work = Work(Path(out), facts) if resume else None
    with packed.new_folder(Path(out), codec, specs, work) as writer:
        job = _Job(source, stats, codec, recipe, device, specs, shapes, writer, activations, work)
        layers = job.run(progress)
        entries = _merged(layers, "entries")
        report.count(layers, codec)
        _copy_rest(source, specs, writer, progress)
        writer.meta.update({**codec.header(), "awq_linears": report.searched, "plain_linears": report.plain, **facts,
                            "without_statistics": report.without_statistics, "per_weight": entries})
        writer.texts[quant_report.FILE] = _page(codec, report, stats, recipe, specs)
    return report


def _warn_of_gaps(report: Report, total: int) -> None:
    missing = report.without_statistics
    if missing:
        log.warning("%d of %d linears have no statistics and are rounded plainly, first: %s",
                    len(missing), total, ", ".join(missing[:5]))


def _merged(layers: Sequence[Mapping[str, Any]], key: str) -> dict[str, Any]:
    return {name: value for layer in layers for name, value in layer[key].items()}


def _facts(codec: Codec, stats: ActStats, recipe: Recipe, fingerprint: str,
           activations: Activations | None) -> dict[str, Any]:
    """What decides the result: part of the meta, and what a resumed job is checked against."""
    captured = {} if activations is None else {"captures": list(activations.facts)}
    return {"tool": f"lance-quant {__version__}", "codec": str(codec), "recipe": recipe,
            "source_fingerprint": fingerprint, "tasks_calibrated": stats.tasks, "calibration_runs": stats.runs,
            **captured}


@dataclass(frozen=True)
class _Job:
    """Everything that the conversion of a layer needs; see quantize_checkpoint."""

    source: Checkpoint
    stats: ActStats
    codec: Codec
    recipe: Recipe
    device: torch.device
    specs: Mapping[str, TensorSpec]
    shapes: Mapping[str, Sequence[int]]
    writer: packed.PackedWriter
    activations: Activations | None
    work: Work | None

    def run(self, progress: bool) -> list[dict[str, Any]]:
        """Convert the layers that an earlier run has not finished; what `layer` returned for each, in order."""
        layers = [] if self.work is None else list(self.work.layers)
        if layers and self.activations is not None:
            self.activations.load(self.work.state_file(len(layers)))
        todo = range(len(layers), layout.num_layers(self.source.specs))
        for index in _bar(todo, f"quantize to {self.codec.name}", progress):
            layers.append(self.layer(index))
            if self.work is not None:
                self._keep(layers[-1])
        return layers

    def layer(self, index: int) -> dict[str, Any]:
        """Write a layer's groups as they are finished, then its norms and biases, which scales may have changed.

        Returns:
            Plain values: `tensors`, the names that were written; `entries`, for the meta; `seconds` of each linear's
            group.
        """
        weights = {name: _finite(self.source, name, self.device)
                   for name in layout.of_layer(self.source.specs, index)}
        out: dict[str, Any] = {"tensors": [], "entries": {}, "seconds": {}}
        for group, done in RECIPES[self.recipe](index, weights, self.stats, self.codec, self.activations):
            names = [f"{name}.weight" for name in group.linears]
            tensors = {f"{name}.{suffix}": tensor for name, parts in zip(group.linears, done.tensors, strict=True)
                       for suffix, tensor in parts.items()}
            out["tensors"] += self._write(tensors)
            shapes = (self.shapes[name] for name in group.linears)
            out["entries"].update(zip(names, done.entries(self.codec, shapes), strict=True))
            out["seconds"].update(dict.fromkeys(names, done.seconds))
            log.info("%-22s %s", group.name, done)
        rest = sorted(weights.keys() & self.specs.keys())
        out["tensors"] += self._write({name: weights[name].to(self.specs[name].dtype) for name in rest})
        return out

    def _write(self, tensors: Mapping[str, Tensor]) -> list[str]:
        for name, tensor in tensors.items():
            self.writer.tensors.write(name, tensor)
        return list(tensors)

    def _keep(self, layer: Mapping[str, Any]) -> None:
        """Make a finished layer survive a kill."""
        self.writer.tensors.flush()
        if self.activations is not None:
            self.activations.save(self.work.state_file(len(self.work.layers) + 1))
        self.work.finish_layer(layer)


def _finite(source: Checkpoint, name: str, device: torch.device) -> Tensor:
    tensor = source.read(name, torch.float32, device)
    require_finite(tensor, name)
    return tensor


def _copy_rest(source: Checkpoint, specs: Mapping[str, TensorSpec], writer: packed.PackedWriter,
               progress: bool) -> None:
    rest = [name for name in source.specs if not name.startswith(f"{layout.LAYERS}.")]
    for name in _bar(rest, "copy the rest", progress):
        writer.tensors.write_pieces(name, _checked(source.pieces(name), name))


def _checked(pieces: Iterable[Tensor], name: str) -> Iterator[Tensor]:
    """The pieces of a tensor, as long as they are finite."""
    for piece in pieces:
        require_finite(piece, name)
        yield piece


def _page(codec: Codec, report: Report, stats: ActStats, recipe: Recipe, specs: Mapping[str, TensorSpec]) -> str:
    facts = {"format": str(codec), "recipe": recipe, "size": f"{report.nbytes / 1e9:.3f} GB",
             "bits per quantized weight": f"{report.bits_per_weight:.4f}", "calibrated on": ", ".join(stats.tasks),
             "linears scaled": f"{report.searched} of {report.searched + report.plain}",
             "linears without statistics": str(len(report.without_statistics)), "tool": f"lance-quant {__version__}"}
    by_layer = sorted(report.rows, key=lambda row: int(row.name.removeprefix(f"{layout.LAYERS}.").split(".")[0]))
    return quant_report.page(f"Quantization to {codec.name}", facts, by_layer, packed.sizes(specs))


def _bar(items: Sequence[Any], stage: str, progress: bool) -> Iterator[Any]:
    with _lines_above_bar(progress):
        yield from tqdm(items, desc=stage, disable=None if progress else True)  # None: only on a terminal


@contextmanager
def _lines_above_bar(progress: bool) -> Iterator[None]:
    """Log lines move the bar down instead of tearing it."""
    if not progress:
        yield
        return
    with logging_redirect_tqdm():
        yield


def convert(src: Path, stats_path: Path, out: Path, codec: Codec, recipe: Recipe, device: torch.device,
            activations: Activations | None = None, resume: bool = False) -> Report:
    """From paths to a packed folder: everything cheap is checked before a weight is read.

    Raises:
        InputError: see quantize_checkpoint; also `recipe` published with a layout that was never published.
    """
    if recipe == "published" and getattr(codec, "slim", False):
        raise InputError("--slim is not part of the published layout: use it with --recipe ours")
    require_free(Path(out))
    stats = ActStats.load(stats_path)
    with Checkpoint(src) as source:
        report = quantize_checkpoint(source, stats, codec, out, recipe, device, activations=activations, resume=resume)
    log.info("%s", report)
    return report
