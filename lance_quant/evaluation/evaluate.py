"""Evaluation of packed folders: baseline and packed models on the same samples, and how far apart they are.

One model is loaded at a time. What can be refused is refused by the `require` functions, before any is loaded.
"""

import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lance_quant.distributed import ALONE, Team
from lance_quant.errors import InputError
from lance_quant.evaluation import report
from lance_quant.evaluation.compare import Section, compare_run, run_entry, section
from lance_quant.evaluation.run_folder import Results, RunRecord, require_source, run_task
from lance_quant.formats.packed_folder import PackedFolder
from lance_quant.inference.request import RunRequest, float_facts
from lance_quant.kernels import quantized_linear
from lance_quant.kernels.choices import KernelChoice, Mode
from lance_quant.lance.runtime import Runtime

log = logging.getLogger("lance_quant")


class PackedMode(NamedTuple):
    """How packed weights are computed with."""

    mode: Mode
    kernel: KernelChoice


def open_folders(folders: Sequence[Path]) -> dict[str, PackedFolder]:
    """Packed folders by name, which names their results too.

    Raises:
        InputError: two have one name, or a folder is no packed one.
    """
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names) or "baseline" in names:
        raise InputError(f"--awq_dir {' '.join(names)}: folders need different names, none of them 'baseline'")
    return {name: PackedFolder(folder) for name, folder in zip(names, folders, strict=True)}


def require_comparable(request: RunRequest, packed: Mapping[str, PackedFolder], baseline: Path | None) -> None:
    """Raise InputError unless the baseline, or without one the float model, compares with the packed folders."""
    if baseline:
        with Results(baseline) as results:
            results.require_same(request)
        fingerprint, what = results.run["model"].get("fingerprint"), f"the model of baseline {baseline}"
    else:
        fingerprint = float_facts(request.source.paths.model)["fingerprint"]
        what = f"--model_path {request.source.paths.model}"
    for one in packed.values():
        require_source(one, fingerprint, what)


def require_kernel(request: RunRequest, packed: Mapping[str, PackedFolder], how: PackedMode) -> None:
    """Raise InputError if the kernel cannot run the packed folders on the request's device."""
    if how.mode == "cached":
        if how.kernel != "auto":
            log.warning("of no effect with --mode cached: --kernel")
        return
    for one in packed.values():
        quantized_linear.require_kernel(one, request.source.dtype, request.source.device, how.kernel)


def evaluate(request: RunRequest, packed: Mapping[str, PackedFolder], how: PackedMode, baseline: Path | None,
             folder: Path, team: Team = ALONE) -> list[Section]:
    """Run and compare every packed folder, after the float model where there is no baseline.

    Args:
        baseline: its results folder.
        folder: an existing, empty one; gets a results folder per model.

    Returns:
        The report's sections, complete on the leader of the team.
    """
    if baseline is None:
        baseline = folder / "baseline"
        baseline.mkdir()
        run_float(request, baseline, True, team)
    with Results(baseline) as results:
        found = section(request.settings, results, folder)
        for name, one in packed.items():
            (folder / name).mkdir()
            compared = _compare(request, one, how, results, folder / name, team)
            if team.leads:
                report.adopt_quant_report(one.path, folder / name)
                found["runs"].append(run_entry(name, request.settings.task, compared, folder))
    return [found]


def _compare(request: RunRequest, packed: PackedFolder, how: PackedMode, baseline: Results, folder: Path,
             team: Team) -> list[dict[str, Any]]:
    """Run one packed folder and compare it; the model is gone when this returns, before the next one is loaded."""
    return compare_run(_run_packed(request, packed, how, folder, team), request, baseline, folder, team)


def run_float(request: RunRequest, folder: Path, keep_trace: bool, team: Team = ALONE) -> None:
    """Run the float model into an existing, empty results folder.

    Args:
        keep_trace: also write what quantized runs are compared with.
    """
    source = request.source
    record = RunRecord(source.device, source.dtype, float_facts(source.paths.model), request.arguments)
    with record.stage("load"):
        runtime = source.load_to_run()
    run_task(runtime, request, record, folder, keep_trace, team)


def _run_packed(request: RunRequest, packed: PackedFolder, how: PackedMode, folder: Path, team: Team) -> Runtime:
    source = request.source
    record = RunRecord(source.device, source.dtype, packed.facts(), request.arguments)
    swap = functools.partial(quantized_linear.swap_linears, folder=packed, dtype=source.dtype, device=source.device,
                             mode=how.mode, kernel=how.kernel)
    with record.stage("load"):
        runtime = source.load_to_run(packed.checkpoint.path, swap)
    keep_trace = request.settings.spec.makes != "text"  # of answers, only the baseline's trace is read
    run_task(runtime, request, record, folder, keep_trace, team)
    return runtime
