"""Evaluation of packed folders: baseline and packed models on the same samples, and how far apart they are.

The baseline is the float model, or a run of it that was kept. Where neither is there, the first packed folder is the
reference that the others are compared with, and a single one is only run.

One model is loaded at a time. What can be refused is refused by the `require` functions, before any is loaded.
"""

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lance_quant.distributed import ALONE, Team
from lance_quant.errors import InputError
from lance_quant.evaluation import report
from lance_quant.evaluation.compare import Section, compare_run, outputs, run_entry, section
from lance_quant.evaluation.run_folder import Results, RunRecord, describe, require_source, run_task
from lance_quant.evaluation.sample_store import RunWork, SampleStore
from lance_quant.formats.packed_folder import PackedFolder, is_packed
from lance_quant.inference.memory_plan import How, fit_line
from lance_quant.inference.request import PackedMode, RunRequest, float_facts, has_float, packed_facts
from lance_quant.kernels import quantized_linear
from lance_quant.lance.media.samples import content_hash
from lance_quant.lance.runtime import Runtime

log = logging.getLogger("lance_quant")


def open_folders(folders: Sequence[Path], model: Path,
                 baseline: Path | None) -> tuple[dict[str, PackedFolder], tuple[str, PackedFolder] | None]:
    """Packed folders by name, which names their results too; and of them the reference, which is not among the former.

    Args:
        folders: to be compared.
        model: a float model folder, whose weights are then the baseline; a packed one, which is then the reference; or
            a folder of neither, then the first of `folders` is it.
        baseline: results folder, with which there is no reference.

    Raises:
        InputError: two have one name, or a folder is no packed one.
    """
    alone = baseline is None and not has_float(model)
    if alone and is_packed(model) and model.resolve() not in [folder.resolve() for folder in folders]:
        folders = [model, *folders]
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names) or "baseline" in names:
        raise InputError(f"--awq_dir {' '.join(names)}: folders need different names, none of them 'baseline'")
    opened = {name: PackedFolder(folder) for name, folder in zip(names, folders, strict=True)}
    if not alone:
        return opened, None
    first = model.resolve().name if is_packed(model) else names[0]
    log.warning("%s has no float weights, and no --baseline is given: %s is the reference", model, first)
    return opened, (first, opened.pop(first))


def open_baseline(model: Path, how: PackedMode) -> tuple[PackedFolder | None, str | None]:
    """The packed weights of a model folder, None where it has float ones; and the fingerprint of the float weights.

    Args:
        how: packed weights are computed with; of float ones nothing of it may be asked.

    Raises:
        InputError: the folder has neither, or the arguments are for packed weights and it has float ones.
    """
    if is_packed(model):
        packed = PackedFolder(model)
        return packed, packed.meta.get("source_fingerprint")
    if how != PackedMode():
        raise InputError(f"--mode and --kernel are for packed weights, and {model} has none")
    return None, float_facts(model)["fingerprint"]


def require_comparable(request: RunRequest, packed: Mapping[str, PackedFolder], baseline: Path | None,
                       reference: PackedFolder | None = None) -> None:
    """Raise InputError unless the baseline, or without one the reference, or without one the float model, compares with
    the packed folders."""
    if reference is not None:
        fingerprint, what = reference.meta.get("source_fingerprint"), f"the reference {reference.path}"
    elif baseline:
        with Results(baseline) as results:
            results.require_same(request)
        fingerprint, what = results.run["model"].get("fingerprint"), f"the model of baseline {baseline}"
    else:
        fingerprint = float_facts(request.source.paths.model)["fingerprint"]
        what = f"--model_path {request.source.paths.model}"
    for one in packed.values():
        require_source(one, fingerprint, what)


def baseline_fingerprint(request: RunRequest, baseline: Path | None,
                         reference: tuple[str, PackedFolder] | None) -> str | None:
    """Of what the packed folders are compared with: the run.json of a baseline, or the float weights; None where a
    packed folder is the reference."""
    if reference is not None:
        return None
    if baseline is None:
        return str(float_facts(request.source.paths.model)["fingerprint"])
    return hashlib.sha256((baseline / "run.json").read_bytes()).hexdigest()


def require_kernel(request: RunRequest, packed: Sequence[PackedFolder], how: PackedMode) -> None:
    """Raise InputError if the kernel cannot run the packed folders on the request's device."""
    if how.mode == "cached":
        if how.kernel != "auto":
            log.warning("of no effect with --mode cached: --kernel")
        return
    for one in packed:
        quantized_linear.require_kernel(one, request.source.dtype, request.source.device, how.kernel)


def evaluate(request: RunRequest, packed: Mapping[str, PackedFolder], how: PackedMode, baseline: Path | None,
             work: RunWork, team: Team = ALONE, reference: tuple[str, PackedFolder] | None = None) -> list[Section]:
    """Run and compare every packed folder, after the float model where there is no baseline.

    Args:
        packed: by name; may be empty where there is a reference.
        baseline: its results folder.
        reference: name and weights of what stands for the float model; None: the baseline, or the float model itself.
        work: its folder gets a results folder per model; what an earlier run finished is there.

    Returns:
        The report's sections, complete on the leader of the team.
    """
    name, weights = reference or ("baseline", None)
    folder = work.folder
    if baseline is None:
        baseline = folder / name
        run_model(request, weights, how, baseline, True, work.store(name), team)
        if weights is not None and team.leads:
            report.adopt_quant_report(weights.path, baseline)
    with Results(baseline) as results:
        found = section(request.settings, results, folder)
        if reference is not None:
            found["reference"] = name
            found["outputs"] = outputs(request.samples, results, request.settings) if team.leads else []
        for name, one in packed.items():
            compared = _compare(request, one, how, results, folder / name, work.store(name), team)
            if team.leads:
                report.adopt_quant_report(one.path, folder / name)
                found["runs"].append(run_entry(name, request.settings.task, compared, folder))
    return [found]


def _compare(request: RunRequest, packed: PackedFolder, how: PackedMode, baseline: Results, folder: Path,
             store: SampleStore, team: Team) -> list[dict[str, Any]]:
    """Run one packed folder and compare it; the model is gone when this returns, before the next one is loaded."""
    keep_trace = request.settings.spec.makes != "text"  # of answers, only the baseline's trace is read
    runtime = run_model(request, packed, how, folder, keep_trace, store, team)
    return compare_run(runtime, request, baseline, folder, store, team)


def run_model(request: RunRequest, packed: PackedFolder | None, how: PackedMode, folder: Path, keep_trace: bool,
              store: SampleStore, team: Team = ALONE) -> Callable[[], Runtime]:
    """Run a model into a results folder, unless an earlier run has finished it.

    Args:
        packed: its weights; None: the float weights of the request's model folder.
        how: packed weights are computed with.
        folder: made if it is not there.
        keep_trace: also write what other runs are compared with.
        store: of its samples.

    Returns:
        What gives the loaded model.
    """
    source = request.source

    @functools.cache
    def loaded() -> Runtime:
        return source.load_to_run() if packed is None else source.load_packed(packed, how)

    folder.mkdir(exist_ok=True)
    if (folder / "run.json").is_file():
        return loaded
    facts = float_facts(source.paths.model) if packed is None else packed_facts(packed)
    if source.loras:
        facts["loras"] = [use.as_json() for use in source.loras]
    record = RunRecord(source.device, source.dtype, facts, request.arguments)
    if team.leads:
        needs = How(source.dtype, source.device.type == "cpu", how.mode, source.offload,
                    request.settings.sampling.batch_guidance, source.vae_tiling)
        log.info("%s", fit_line(source.paths, None if packed is None else packed.path, request.settings, needs,
                                source.device))
    with record.stage("load"):
        loaded()
    run_task(loaded(), request, record, folder, keep_trace, store, team)
    return loaded


def job_of(request: RunRequest, packed: Mapping[str, PackedFolder], fingerprint: str | None, how: PackedMode,
           keep_trace: bool) -> dict[str, Any]:
    """What decides the results of a run, in plain values: an unfinished run goes on only as the same one.

    Args:
        packed: folders that are run, by name.
        fingerprint: of the float weights that are run, or of the baseline's.
    """
    weights = {name: hashlib.sha256(json.dumps(one.meta, sort_keys=True).encode()).hexdigest()
               for name, one in packed.items()}
    return {"settings": request.settings.as_json(), "samples": [describe(sample) for sample in request.samples],
            "content": content_hash(request.samples), "model": fingerprint, "packed": weights,
            "device": request.source.device.type, "dtype": str(request.source.dtype).removeprefix("torch."),
            "how": [how.mode, how.kernel], "save_latents": keep_trace,
            "loras": [use.as_json() for use in request.source.loras]}
