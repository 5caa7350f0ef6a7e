"""From a float checkpoint to a packed folder: the loop behind awq_apply.py and nvfp4_apply.py.

While a decoder layer is scaled, packed and written, the next is read, and everything outside of the layers is copied in
pieces, so memory stays at about two layers however large the model is. What a run writes is known from the headers
alone (`plan`), which is how the output file can be laid out first and --dry_run can be exact.
"""

import functools
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from lance_quant import __version__
from lance_quant.calibration.activation_stats import ActStats, model_fingerprint
from lance_quant.errors import InputError
from lance_quant.formats import int8, layout, packed_folder
from lance_quant.formats.base import Codec, Int4, block_threads
from lance_quant.formats.weights import Weights
from lance_quant.methods import bit_allocation, published, quant_report
from lance_quant.methods.layer import BF16_ENTRY, Activations, Choices, Quantized, quantize_layer
from lance_quant.storage.atomic import require_free, size_text
from lance_quant.storage.resume import Work
from lance_quant.storage.tensor_file import Checkpoint, TensorSpec, file_size, require_finite

log = logging.getLogger("lance_quant")

CPU = torch.device("cpu")
Recipe = Literal["ours", "published"]


def shapes_of(specs: Mapping[str, TensorSpec], codec: Codec) -> dict[str, tuple[int, ...]]:
    """Shape of every linear that will be quantized, by module name.

    Raises:
        InputError: not a float Lance checkpoint, or a width that the codec cannot pack.
    """
    if any(name.rpartition(".")[2] in (*packed_folder.SUFFIXES, *int8.SUFFIXES) for name in specs):
        raise InputError("this checkpoint is packed already: give the float one")
    count = layout.require_complete({name: spec.shape for name, spec in specs.items()})
    shapes = {name: specs[f"{name}.weight"].shape for name in layout.linears(count)}
    for name, shape in shapes.items():
        if not specs[f"{name}.weight"].dtype.is_floating_point:
            raise InputError(f"{name}.weight is {specs[f'{name}.weight'].dtype}, not a float tensor")
        codec.require_fits(name, shape)
    return shapes


@dataclass(frozen=True)
class Sizes:
    """What is stored in other sizes than the codec's.

    bits_budget: stored bits per quantized weight that group sizes may take together, see budget.py; None: one size
    head_bits: of the output head and the token embedding, 8 (see int8.py) or 16
    effects: with a budget, measured effects of errors (sensitivity.py); None takes relative output errors
    """

    bits_budget: float | None = None
    head_bits: Literal[8, 16] = 16
    effects: bit_allocation.Effects | None = None

    def facts(self) -> dict[str, Any]:
        """What a meta and a resumed job must know."""
        asked = {} if self.bits_budget is None else \
            {"bits_budget": self.bits_budget, "harm": "relative output error" if self.effects is None else "captures"}
        return asked if self.head_bits == 16 else {**asked, "head_bits": self.head_bits}


ONE_SIZE = Sizes()


def plan(specs: Mapping[str, TensorSpec], codec: Codec, choices: Choices | None = None,
         head_bits: int = 16) -> dict[str, TensorSpec]:
    """Name, dtype and shape of everything that a run writes, from the source's headers.

    Args:
        choices: linears that have another format than `codec`.
        head_bits: see Sizes.

    Raises:
        InputError: see shapes_of.
    """
    formats = dict.fromkeys(shapes_of(specs, codec), codec) | dict(choices or {})
    out: dict[str, TensorSpec] = {}
    for name, spec in specs.items():
        module = name.removesuffix(".weight")
        if module != name and formats.get(module) is not None:
            out.update({f"{module}.{suffix}": part for suffix, part in formats[module].specs(spec.shape).items()})
        elif module != name and module in layout.VOCABULARY and head_bits == 8:
            out.update({f"{module}.{suffix}": part for suffix, part in int8.specs(spec.shape).items()})
        else:
            out[name] = spec._replace(dtype=torch.bfloat16) if spec.dtype.is_floating_point else spec
    return out


def choose(source: Checkpoint, stats: ActStats, codec: Codec, sizes: Sizes, device: torch.device, progress: bool,
           work: Work | None = None) -> dict[str, Codec | None]:
    """The format of every linear under a budget; nothing where there is none.

    Every layer is scaled as it will be and measured, so this takes about as long again as the conversion.

    Args:
        work: keeps what was measured, for the next run of a job.

    Raises:
        InputError: the budget is below the smallest choice.
    """
    if sizes.bits_budget is None:
        return {}
    shapes = shapes_of(source.specs, codec)
    nbytes = bit_allocation.limit(shapes, sizes.bits_budget)

    def measured() -> dict[str, list[bit_allocation.Option]]:
        found: dict[str, list[bit_allocation.Option]] = {}
        # From the last layer to the first: effects are handed down that way.
        for index in _bar(range(layout.num_layers(source.specs))[::-1], "measure", progress):
            weights = {name: _finite(source.stored(name), name, device)
                       for name in layout.of_layer(source.specs, index)}
            found |= bit_allocation.measure(index, weights, stats, codec, sizes.effects)
        return found

    options = measured() if work is None else work.kept("options", measured)
    offered = {name: [bit_allocation.Option(*option) for option in options[name]] for name in shapes}
    chosen = bit_allocation.allocate(offered, nbytes)
    return {name: None if option.group_size is None else Int4(option.group_size) for name, option in chosen.items()}


def dry_run(src: Path, codec: Codec, sizes: Sizes = ONE_SIZE, stats_path: Path | None = None,
            device: torch.device = CPU) -> str:
    """The plan as text: a table by kind, bits per weight, and the exact size of the file as the last line.

    Headers say it all, but for a budget: choices depend on weights and statistics, which are then read.

    Raises:
        InputError: a budget without statistics, or one that is too small.
    """
    if sizes.bits_budget is not None and stats_path is None:
        raise InputError("--dry_run with --bits_budget needs --stats: what is chosen, and so the size, depends on them")
    with Checkpoint(src) as source:
        shapes, choices = shapes_of(source.specs, codec), {}
        if sizes.bits_budget is not None:
            stats = _fitting(ActStats.load(stats_path), source, shapes)
            choices = choose(source, stats, codec, sizes, device, progress=True)
        specs = plan(source.specs, codec, choices, sizes.head_bits)
        bits = packed_folder.bits_per_weight(specs, shapes)
    size, chosen = file_size(specs), f"{_counted(choices)}\n" if choices else ""
    return (f"{packed_folder.table(specs)}\n{chosen}{bits:.4f} bits per quantized weight, {size_text(size)}\n"
            f"output_bytes: {size}")


def _counted(choices: Choices) -> str:
    """How many linears of each kind have which format."""
    count = Counter((layout.kind_of(name), "bf16" if codec is None else f"g{codec.group_size}")
                    for name, codec in choices.items())
    return "\n".join(f"{kind:<9} " + "  ".join(f"{size} x {number}" for (other, size), number in sorted(count.items())
                                               if other == kind) for kind in layout.KINDS)


def _fitting(stats: ActStats, source: Checkpoint, shapes: Mapping[str, Sequence[int]]) -> ActStats:
    stats.require_model(model_fingerprint(source), {name: shape[1] for name, shape in shapes.items()})
    return stats


@dataclass
class Report:
    """What a conversion did.

    out: the folder
    nbytes: size of its tensor file
    bits_per_weight: stored bits per quantized weight
    searched, plain: packed linears that were scaled into what precedes them, and the others
    kept: linears that a budget left in bfloat16
    without_statistics: linears for which the statistics hold nothing
    rows: what the report page lists
    """

    out: Path
    nbytes: int
    bits_per_weight: float
    searched: int = 0
    plain: int = 0
    kept: int = 0
    without_statistics: list[str] = field(default_factory=list)
    rows: list[quant_report.Row] = field(default_factory=list)

    def count(self, layers: Sequence[Mapping[str, Any]], codec: Codec) -> None:
        """Take over what was done in each layer, see _Job.layer."""
        entries, seconds = _merged(layers, "entries"), _merged(layers, "seconds")
        self.rows = [quant_report.Row(name.removesuffix(".weight"), entry, seconds[name])
                     for name, entry in entries.items()]
        self.searched = sum(entry["scheme"] == codec.SCHEMES["searched"] for entry in entries.values())
        self.kept = sum(map(_is_kept, entries.values()))
        self.plain = len(entries) - self.searched - self.kept

    def __str__(self) -> str:
        kept = f", {self.kept} kept in bfloat16" if self.kept else ""
        return (f"wrote {self.out}: {size_text(self.nbytes)}, {self.bits_per_weight:.4f} bits per quantized weight, "
                f"{self.searched} linears searched, {self.plain} rounded plainly{kept}")


def _is_kept(entry: Mapping[str, Any]) -> bool:
    return entry["scheme"] == BF16_ENTRY["scheme"]


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
                        resume: bool = False, sizes: Sizes = ONE_SIZE) -> Report:
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
        sizes: what is stored in other sizes than the codec's.

    Raises:
        InputError: the checkpoint, the statistics and the codec do not fit together, `out` exists, the disk is too
            small, or a weight holds NaN or Inf.
    """
    shapes, fingerprint = shapes_of(source.specs, codec), model_fingerprint(source)
    _fitting(stats, source, shapes)
    if sizes.bits_budget is not None:
        bit_allocation.limit(shapes, sizes.bits_budget)  # refused before a work folder is made
    facts = {**_facts(codec, stats, recipe, fingerprint, activations), **sizes.facts()}
    work = Work(Path(out), facts) if resume else None
    choices = choose(source, stats, codec, sizes, device, progress, work)
    specs = plan(source.specs, codec, choices, sizes.head_bits)
    report = Report(Path(out), file_size(specs), packed_folder.bits_per_weight(specs, shapes),
                    without_statistics=[name for name in shapes if name not in stats.linears])
    _warn_of_gaps(report, len(shapes))
    with packed_folder.new_folder(Path(out), codec, specs, work) as writer:
        job = _Job(source, stats, codec, recipe, device, specs, shapes, writer, activations, work, choices)
        layers = job.run(progress)
        entries = _merged(layers, "entries")
        report.count(layers, codec)
        _copy_rest(source, specs, writer, progress)
        per_weight = {name: entry for name, entry in entries.items() if not _is_kept(entry)}
        writer.meta.update({**codec.header(), "awq_linears": report.searched, "plain_linears": report.plain, **facts,
                            "without_statistics": report.without_statistics, **_tables(source, entries, sizes),
                            "per_weight": per_weight})
        writer.texts[quant_report.FILE] = _page(codec, report, stats, recipe, specs, sizes)
    return report


def _tables(source: Checkpoint, entries: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """The meta's tables of weights that are not in the codec's format."""
    kept = {name: entry for name, entry in entries.items() if _is_kept(entry)}
    head = {f"{name}.weight": int8.entry(source.specs[f"{name}.weight"].shape) for name in layout.VOCABULARY} \
        if sizes.head_bits == 8 else {}
    return {**({packed_folder.KEPT: kept} if kept else {}), **({int8.META_KEY: head} if head else {})}


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
    writer: packed_folder.PackedWriter
    activations: Activations | None
    work: Work | None
    choices: Choices

    def run(self, progress: bool) -> list[dict[str, Any]]:
        """Convert the layers that an earlier run has not finished; what `layer` returned for each, in order."""
        layers = [] if self.work is None else list(self.work.layers)
        if layers and self.activations is not None:
            self.activations.load(self.work.state_file(len(layers)))
        todo = range(len(layers), layout.num_layers(self.source.specs))
        spare: list[Tensor] = []
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as disk:
            coming = reader.submit(self._stored, todo.start, spare) if todo else None
            for index in _bar(todo, f"quantize to {self.codec.name}", progress):
                stored, coming = coming.result(), None
                if index + 1 in todo:
                    coming = reader.submit(self._stored, index + 1, spare)
                spare = list(stored.values())
                with self._threads():
                    layers.append(self.layer(index, stored, disk))
                if self.work is not None:
                    self._keep(layers[-1])
        return layers

    def _threads(self) -> AbstractContextManager[Any]:
        """Large products, of the published search and of captured layers, are torch's to share among threads."""
        blockwise = self.recipe == "ours" and self.activations is None and self.device.type == "cpu"
        return block_threads() if blockwise else nullcontext()

    def _stored(self, index: int, spare: list[Tensor]) -> Weights:
        """A layer as the source has it, in the memory of `spare`; runs while the layer before is worked on."""
        free: dict[TensorSpec, list[Tensor]] = defaultdict(list)
        for tensor in spare:
            free[TensorSpec(tensor.dtype, tuple(tensor.shape))].append(tensor)
        specs = {name: self.source.specs[name] for name in layout.of_layer(self.source.specs, index)}
        return {name: self.source.stored(name, free[spec].pop() if free[spec] else None)
                for name, spec in specs.items()}

    def layer(self, index: int, stored: Weights, disk: ThreadPoolExecutor) -> dict[str, Any]:
        """Write a layer's groups as they are finished, then its norms and biases, which scales may have changed.

        Args:
            stored: the layer's tensors; emptied.
            disk: one thread, in which tensors are written; all of them are when this returns.

        Returns:
            Plain values: `tensors`, the names that were written; `entries`, for the meta; `seconds` of each linear's
            group.
        """
        weights = {name: _finite(stored.pop(name), name, self.device) for name in list(stored)}
        writing: list[Future[None]] = []
        out: dict[str, Any] = {"tensors": [], "entries": {}, "seconds": {}}
        recipe = RECIPES[self.recipe]
        if self.choices:
            recipe = functools.partial(recipe, choices=self.choices)
        for group, done in recipe(index, weights, self.stats, self.codec, self.activations):
            names = [f"{name}.weight" for name in group.linears]
            tensors = {f"{name}.{suffix}": tensor for name, parts in zip(group.linears, done.tensors, strict=True)
                       for suffix, tensor in parts.items()}
            writing.append(disk.submit(self._write, tensors))
            out["tensors"] += tensors
            shapes = (self.shapes[name] for name in group.linears)
            codecs = (self.choices.get(name, self.codec) for name in group.linears)
            out["entries"].update(zip(names, done.entries(codecs, shapes), strict=True))
            out["seconds"].update(dict.fromkeys(names, done.seconds))
            log.info("%-22s %s", group.name, done)
        rest = sorted((weights.keys() & self.specs.keys()) - set(out["tensors"]))
        writing.append(disk.submit(self._write, {name: weights[name].to(self.specs[name].dtype) for name in rest}))
        out["tensors"] += rest
        for written in writing:
            written.result()
        return out

    def _write(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.writer.tensors.write(name, tensor)

    def _keep(self, layer: Mapping[str, Any]) -> None:
        """Make a finished layer survive a kill."""
        self.writer.tensors.flush()
        if self.activations is not None:
            self.activations.save(self.work.state_file(len(self.work.layers) + 1))
        self.work.finish_layer(layer)


def _finite(stored: Tensor, name: str, device: torch.device) -> Tensor:
    """A weight in float32, on `device`."""
    tensor = stored.to(device, torch.float32)
    require_finite(tensor, name)
    return tensor


def _copy_rest(source: Checkpoint, specs: Mapping[str, TensorSpec], writer: packed_folder.PackedWriter,
               progress: bool) -> None:
    rest = [name for name in source.specs if not name.startswith(f"{layout.LAYERS}.")]
    with block_threads():  # pieces are too short for torch's threads
        for name in _bar(rest, "copy the rest", progress):
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


def _page(codec: Codec, report: Report, stats: ActStats, recipe: Recipe, specs: Mapping[str, TensorSpec],
          sizes: Sizes) -> str:
    facts = {"format": str(codec), "recipe": recipe, "size": size_text(report.nbytes),
             "bits per quantized weight": f"{report.bits_per_weight:.4f}", "calibrated on": ", ".join(stats.tasks),
             "linears scaled": f"{report.searched} of {report.searched + report.plain}",
             "linears without statistics": str(len(report.without_statistics)), "tool": f"lance-quant {__version__}",
             **{key.replace("_", " "): str(value) for key, value in sizes.facts().items()}}
    by_layer = sorted(report.rows, key=lambda row: int(row.name.removeprefix(f"{layout.LAYERS}.").split(".")[0]))
    return quant_report.page(f"Quantization to {codec.name}", facts, by_layer, packed_folder.sizes(specs))


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
            activations: Activations | None = None, resume: bool = False, sizes: Sizes = ONE_SIZE) -> Report:
    """From paths to a packed folder: everything cheap is checked before a weight is read.

    Raises:
        InputError: see quantize_checkpoint; also `recipe` published with a layout that was never published.
    """
    if recipe == "published" and getattr(codec, "slim", False):
        raise InputError("--slim is not part of the published layout: use it with --recipe ours")
    if recipe == "published" and sizes != ONE_SIZE:
        flag = "--head_bits 8" if sizes.bits_budget is None else "--bits_budget"
        raise InputError(f"{flag} is not part of the published recipe: leave it out, or use --recipe ours")
    require_free(Path(out))
    stats = ActStats.load(stats_path)
    with Checkpoint(src) as source:
        report = quantize_checkpoint(source, stats, codec, out, recipe, device, activations=activations, resume=resume,
                                     sizes=sizes)
    log.info("%s", report)
    return report
