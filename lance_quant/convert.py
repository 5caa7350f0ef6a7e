"""From a float checkpoint to a packed folder: the loop behind awq_apply.py and nvfp4_apply.py.

A group of linears (layout.Group) is read, searched, packed and written before the next is read, and everything that is
not quantized is copied in pieces, so memory stays at one group however large the model is. What a run writes is known
from the headers alone (`plan`), which is how the output file can be laid out first and --dry_run can be exact.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from lance_quant import __version__, awq, fuse, layout, packed, published
from lance_quant.codec import Codec, Kind, quantize_scaled
from lance_quant.errors import InputError
from lance_quant.files import require_free
from lance_quant.stats import ActStats, model_fingerprint
from lance_quant.tensorfile import Checkpoint, TensorSpec, file_size

log = logging.getLogger("lance_quant")

Recipe = Literal["ours", "published"]


def shapes_of(specs: Mapping[str, TensorSpec], codec: Codec) -> dict[str, tuple[int, ...]]:
    """Shape of every linear that will be quantized, by module name.

    Raises:
        InputError: not a float Lance checkpoint, or a width that the codec cannot pack.
    """
    if any(name.rpartition(".")[2] in packed.SUFFIXES for name in specs):
        raise InputError("this checkpoint is packed already: give the float one")
    count = layout.require_linears({name: spec.shape for name, spec in specs.items()})
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
    searched, plain: linears scaled into their norm, and the others
    without_statistics: linears for which the statistics hold nothing
    """

    out: Path
    nbytes: int
    bits_per_weight: float
    searched: int = 0
    plain: int = 0
    without_statistics: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (f"wrote {self.out}: {self.nbytes / 1e9:.2f} GB, {self.bits_per_weight:.4f} bits per quantized weight, "
                f"{self.searched} linears searched, {self.plain} rounded plainly")


@dataclass(frozen=True)
class Quantized:
    """A finished group.

    tensors: one dict suffix -> tensor per linear
    norm: bfloat16 [in] to store, None where no norm precedes
    kind, context: for the meta entries
    label: which candidate won
    before, after: relative error per linear with s = 1 and as written; empty where it was not measured
    """

    tensors: Sequence[Mapping[str, Tensor]]
    norm: Tensor | None
    kind: Kind
    context: float | None
    label: str
    before: Sequence[float] = ()
    after: Sequence[float] = ()

    def entries(self, codec: Codec, shapes: Iterable[Sequence[int]]) -> Iterator[dict[str, Any]]:
        """Meta entry of every linear of the group."""
        for index, shape in enumerate(shapes):
            entry = codec.entry(shape, self.kind, self.context)
            if self.before:
                entry.update(candidate=self.label, error_before=self.before[index], error_after=self.after[index])
            yield entry

    def __str__(self) -> str:
        if not self.before:
            return self.label
        return f"{self.label:<18} {_decibel(self.before):5.1f} -> {_decibel(self.after):5.1f} dB"


def _decibel(errors: Sequence[float]) -> float:
    mean = sum(errors) / len(errors)
    return -10 * math.log10(mean) if mean else math.inf


def quantize_ours(group: layout.Group, weights: Sequence[Tensor], norm: Tensor | None, stats: ActStats,
                  codec: Codec) -> Quantized:
    """Search by second moments, fold exactly, pack.

    Args:
        weights: float32 [out, in] of the group's linears.
        norm: float32 [in] weight of the group's norm, or None.
    """
    m2 = _mean_square(group, stats, weights[0])
    if norm is None or m2 is None:
        folded = None if norm is None else fuse.fold_norm(norm, torch.ones_like(norm))
        column = torch.ones_like(weights[0][0]) if folded is None else folded.column
        known = torch.ones_like(column) if m2 is None else m2
        errors = awq.relative_errors(weights, [column], known, codec)[0]
        choice, kind = awq.Choice(folded, "s=1", errors, errors), "plain" if norm is None else "unsearched"
    else:
        choice, kind = awq.search(weights, norm, m2, codec), "searched"
        column = choice.folded.column
    context = codec.context(max(float((awq.column_max(w) * column).max()) for w in weights))
    tensors = [codec.tensors(q) for q in quantize_scaled(codec, weights, column, context)]
    new_norm = None if choice.folded is None else choice.folded.norm
    return Quantized(tensors, new_norm, kind, context, choice.label, choice.before, choice.after)


def _mean_square(group: layout.Group, stats: ActStats, like: Tensor) -> Tensor | None:
    known = [stats.linears[name].mean_square for name in group.linears if name in stats.linears]
    return torch.stack(known).mean(0).to(like.device) if known else None


def quantize_published(group: layout.Group, weights: Sequence[Tensor], norm: Tensor | None, stats: ActStats,
                       codec: Codec) -> Quantized:
    """See published.py; arguments as for quantize_ours."""
    weights = [w.bfloat16() for w in weights]
    known = [stats.linears[name] for name in group.linears if name in stats.linears]
    means = [(entry.sum_abs.float() / entry.n_tokens).to(weights[0].device) for entry in known]
    chosen = None if norm is None else published.search(weights, means, codec)
    if chosen is None:
        kind = "plain" if norm is None else "unsearched"
        tensors = [published.pack(w.float(), codec) for w in weights]
        return Quantized(tensors, None if norm is None else norm.bfloat16(), kind, None, "no scale")
    tensors = [published.pack(w.float() * chosen.s, codec) for w in weights]
    new_norm = (norm.bfloat16().float() / chosen.s).bfloat16()
    return Quantized(tensors, new_norm, "searched", None, f"act^{chosen.alpha:.2f}/w^{1 - chosen.alpha:.2f}")


RECIPES: dict[Recipe, Callable[..., Quantized]] = {"ours": quantize_ours, "published": quantize_published}


@torch.no_grad()
def quantize_checkpoint(source: Checkpoint, stats: ActStats, codec: Codec, out: Path, recipe: Recipe,
                        device: torch.device, progress: bool = True) -> Report:
    """Write a packed folder.

    Args:
        source: the float checkpoint.
        stats: of this model; linears without statistics are rounded plainly, and named.
        codec: the format.
        out: the folder; appears when it is complete.
        recipe: "ours", or "published" to repeat the published algorithm.
        device: where the search runs.
        progress: show a bar where stderr is a terminal.

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
    with packed.new_folder(out, codec, specs) as writer:
        groups = [group for layer in range(layout.num_layers(source.specs)) for group in layout.groups(layer)]
        entries: dict[str, Any] = {}
        for group in _bar(groups, f"quantize to {codec.name}", progress):
            done = _convert_group(group, source, stats, codec, RECIPES[recipe], device, writer)
            entries.update(zip((f"{name}.weight" for name in group.linears),
                               done.entries(codec, (shapes[name] for name in group.linears)), strict=True))
            report.searched += len(group.linears) * (done.kind == "searched")
        report.plain = len(shapes) - report.searched
        _copy_rest(source, specs, groups, writer, progress)
        writer.meta.update(_meta(codec, report, stats, recipe, fingerprint, entries))
    return report


def _warn_of_gaps(report: Report, total: int) -> None:
    missing = report.without_statistics
    if missing:
        log.warning("%d of %d linears have no statistics and are rounded plainly, first: %s",
                    len(missing), total, ", ".join(missing[:5]))


def _convert_group(group: layout.Group, source: Checkpoint, stats: ActStats, codec: Codec,
                   quantize: Callable[..., Quantized], device: torch.device, writer: packed.PackedWriter) -> Quantized:
    started = time.perf_counter()
    weights = [_finite(source, f"{name}.weight", device) for name in group.linears]
    norm = None if group.norm is None else _finite(source, f"{group.norm}.weight", device)
    done = quantize(group, weights, norm, stats, codec)
    for name, tensors in zip(group.linears, done.tensors, strict=True):
        for suffix, tensor in tensors.items():
            writer.tensors.write(f"{name}.{suffix}", tensor)
    if done.norm is not None:
        writer.tensors.write(f"{group.norm}.weight", done.norm)
    log.info("%-22s %s  %.1f s", group.name, done, time.perf_counter() - started)
    return done


def _finite(source: Checkpoint, name: str, device: torch.device) -> Tensor:
    tensor = source.read(name, torch.float32, device)
    if not torch.isfinite(torch.linalg.vector_norm(tensor, math.inf)):
        raise InputError(f"{name} holds NaN or Inf: the checkpoint is damaged, download it again")
    return tensor


def _copy_rest(source: Checkpoint, specs: Mapping[str, TensorSpec], groups: Iterable[layout.Group],
               writer: packed.PackedWriter, progress: bool) -> None:
    norms = {f"{group.norm}.weight" for group in groups}
    rest = [name for name in source.specs if name in specs and name not in norms]
    for name in _bar(rest, "copy the rest", progress):
        writer.tensors.write_pieces(name, source.pieces(name))


def _meta(codec: Codec, report: Report, stats: ActStats, recipe: Recipe, fingerprint: str,
          entries: Mapping[str, Any]) -> dict[str, Any]:
    return {**codec.header(), "awq_linears": report.searched, "plain_linears": report.plain,
            "tasks_calibrated": stats.tasks, "tool": f"lance-quant {__version__}", "recipe": recipe,
            "source_fingerprint": fingerprint, "calibration_runs": stats.runs,
            "without_statistics": report.without_statistics, "per_weight": entries}


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


def convert(src: Path, stats_path: Path, out: Path, codec: Codec, recipe: Recipe, device: torch.device) -> Report:
    """From paths to a packed folder: everything cheap is checked before a weight is read.

    Raises:
        InputError: see quantize_checkpoint; also `recipe` published with a layout that was never published.
    """
    if recipe == "published" and getattr(codec, "slim", False):
        raise InputError("--slim is not part of the published layout: use it with --recipe ours")
    require_free(Path(out))
    stats = ActStats.load(stats_path)
    with Checkpoint(src) as source:
        report = quantize_checkpoint(source, stats, codec, out, recipe, device)
    log.info("%s", report)
    return report
