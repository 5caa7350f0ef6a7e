"""Fidelity of a quantized run to its baseline: KL, velocity error, PSNR per sample, and their means with intervals.

The numbers that run_quant_eval.py reports, as plain data: comparison.json is a list of `Section`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

import torch

from lance_quant.distributed import ALONE, Team
from lance_quant.errors import InputError
from lance_quant.evaluation.metrics import (
    Interval,
    bootstrap,
    psnr,
    relative_error,
    step_errors,
    text_similarity,
    token_divergence,
    weighted_mean,
)
from lance_quant.evaluation.run_folder import Results, made, open_made, read_run
from lance_quant.evaluation.sample_store import SampleStore
from lance_quant.inference.request import RunRequest
from lance_quant.inference.tasks import forced_velocities
from lance_quant.lance.media.samples import Prompt, Question
from lance_quant.lance.progress import progress
from lance_quant.lance.runtime import Runtime
from lance_quant.lance.settings import TASKS, Settings


@dataclass(frozen=True)
class Metric:
    """What is reported of a comparison: its key in comparison.json, its heading, which way is better, what it says."""

    key: str
    heading: str
    better: Literal["lower", "higher"]
    meaning: str

    @property
    def direction(self) -> str:
        """For people: "lower is better"."""
        return f"{self.better} is better"


_DRAWN = (
    Metric("velocity_error", "velocity error", "lower",
           "How far each denoising step is off, at the baseline's own points: |difference| / |baseline's velocity|, "
           "mean over the steps."),
    Metric("latent_error", "final latent error", "lower",
           "How far the finished latents are from the baseline's, relative. Small differences of early steps grow, so "
           "this says less than the velocity error."),
)
# By what a task makes, shown in this order.
METRICS: dict[str, tuple[Metric, ...]] = {
    "text": (
        Metric("kl", "KL per token (nats)", "lower",
               "How much the next token's probabilities differ from the baseline's, along the baseline's own answer. "
               "0: the same distribution."),
        Metric("top1", "top-1 agreement", "higher",
               "Share of those tokens where both hold the same token for the likeliest."),
        Metric("exact", "exact answers", "higher", "Share of free answers that are the baseline's, letter for letter."),
        Metric("characters", "character similarity", "higher", "Matching share of the characters of the free answers."),
        Metric("words", "word similarity", "higher", "Matching share of the words of the free answers."),
    ),
    "image": (*_DRAWN, Metric("psnr", "PSNR (dB)", "higher",
                              "How close the pixels are (peak signal-to-noise ratio). From about 40 dB on nobody "
                              "sees a difference; below 30 dB look at the pictures.")),
    "video": (*_DRAWN, Metric("psnr", "PSNR (dB)", "higher",
                              "How close the pixels of all frames are (peak signal-to-noise ratio). From about "
                              "40 dB on nobody sees a difference; below 30 dB look at the clips.")),
}
COMPARED = "compared"  # part of a finished sample, see SampleStore
EQUAL = "equal"  # in place of an infinite PSNR, since JSON has no infinity


def metrics_of(task: str) -> tuple[Metric, ...]:
    """The rows of METRICS for a task."""
    return METRICS[TASKS[task].makes]


def compare_run(runtime: Callable[[], Runtime], request: RunRequest, baseline: Results, folder: Path,
                store: SampleStore, team: Team = ALONE) -> list[dict[str, Any]]:
    """Per sample, the distance of a finished run in `folder` from `baseline`, in the keys of METRICS and more.

    Runs the quantized model once more, on the baseline's own tokens and points x_t. Of a team, each process compares
    its share of the samples, and the leader gets all of it.

    Args:
        runtime: gives the loaded model; called only if a sample is still to be compared.
        store: what is found goes there sample by sample, and is taken from there if it is there already.
    """
    numbers = team.share(range(len(request.samples)))
    with Results(folder) as run:
        for number in progress(numbers, desc="compare", unit="sample"):
            if not store.has(number, COMPARED):
                store.put(number, COMPARED, _compare_one(runtime(), request.samples[number], request.settings, baseline,
                                                         run))
    return list(team.collect([store.values(number, COMPARED) for number in numbers], len(request.samples)))


def _compare_one(runtime: Runtime, sample: Question | Prompt, settings: Settings, baseline: Results,
                 run: Results) -> dict[str, Any]:
    if isinstance(sample, Question):
        return _compare_answer(runtime, sample, settings, baseline, run)
    return _compare_made(runtime, sample, settings, baseline, run)


def _compare_answer(pipeline: Runtime, question: Question, settings: Settings, baseline: Results,
                    run: Results) -> dict[str, Any]:
    found = baseline.read(question.key, "ids", (None,))
    ids = found.tolist()
    if found.dtype != torch.int64 or min(ids) < 0 or max(ids) >= len(pipeline.tokenizer):
        raise InputError(f"baseline {baseline.folder} was made with another tokenizer, or is damaged: ids of sample "
                         f"{question.key} are {found.dtype} from {min(ids)} to {max(ids)}, and there are "
                         f"{len(pipeline.tokenizer)} tokens")
    packed, vit_tokens = pipeline.prompt_of(question, settings.resolution)
    forced = pipeline.forced_logprobs(packed, vit_tokens, ids).cpu()
    logprobs = baseline.read(question.key, "logprobs", forced.shape)
    if logprobs.max() > 1e-3:  # rounding
        raise InputError(f"baseline {baseline.folder}: log-probabilities of sample {question.key} are above 0; make it "
                         "again")
    divergence = token_divergence(logprobs, forced)
    theirs, ours = baseline.answers()[question.key], run.answers()[question.key]
    return {"key": question.key, "visual": str(question.visual), "question": question.question,
            "reference": question.reference, "baseline": theirs, "answer": ours, "tokens": len(ids),
            "kl": divergence.kl.mean().item(), "kl_max": divergence.kl.max().item(), "top1": divergence.top1,
            **text_similarity(ours, theirs)._asdict()}


def _compare_made(pipeline: Runtime, prompt: Prompt, settings: Settings, baseline: Results,
                  run: Results) -> dict[str, Any]:
    ours = {part: run.read(prompt.key, part) for part in ("x", "latent")}
    shape = ours["x"].shape
    shapes = {"x": shape, "velocity": shape, "t": shape[:1], "latent": ours["latent"].shape}
    theirs = {part: baseline.read(prompt.key, part, wanted) for part, wanted in shapes.items()}
    if not theirs["velocity"].flatten(1).any(1).all():
        raise InputError(f"baseline {baseline.folder}: a velocity of sample {prompt.key} is all zeros, which no model "
                         "gives; make it again")
    forced = forced_velocities(pipeline, prompt, settings, theirs["x"], theirs["t"], baseline.condition(prompt.key))
    errors = step_errors(forced, theirs["velocity"])
    name = made(prompt, settings)
    source = {} if prompt.visual is None else {"visual": str(prompt.visual)}
    return {"key": prompt.key, "prompt": prompt.text, **source, "file": name, "t": theirs["t"].tolist(),
            "velocity_errors": errors, "velocity_error": sum(errors) / len(errors),
            "same_noise": bool((ours["x"][0] == theirs["x"][0]).all()),
            "latent_error": relative_error(ours["latent"], theirs["latent"]),
            "psnr": psnr(open_made(run.folder / name), open_made(baseline.folder / name))}


class RunFacts(TypedDict):
    """What comparison.json says of a results folder: its run.json, shortened; the folder is relative to the report's
    where it lies below it."""

    folder: str
    model: dict[str, Any]
    device: str
    dtype: str
    seconds: dict[str, float]
    peak_memory_bytes: dict[str, int | None]
    versions: dict[str, str]


class RunEntry(RunFacts):
    """One run in comparison.json.

    summary: key of METRICS -> mean over the samples (KL and top-1 over all tokens). Of PSNR: over the samples that are
        not equal to the baseline's, EQUAL if all are. None: infinite.
    intervals: key -> 95 % bootstrap interval of that mean, None where fewer than two samples are in it.
    equal_samples: how many samples' pixels are the baseline's; 0 where no pictures are made.
    samples: what compare_run found.
    """

    name: str
    summary: dict[str, float | str | None]
    intervals: dict[str, Interval | None]
    equal_samples: int
    samples: list[dict[str, Any]]


class Section(TypedDict):
    """One task in comparison.json.

    reference: name of the packed folder that stands for the float model, in `baseline`; absent where that was there.
    outputs: of the reference, what `outputs` gives.
    runs: those that were compared; none where the reference is alone.
    """

    task: str
    settings: dict[str, Any]
    baseline: RunFacts
    runs: list[RunEntry]
    reference: NotRequired[str]
    outputs: NotRequired[list[dict[str, Any]]]


def baseline_name(section: Section) -> str:
    """What reports call the run that the others are compared with."""
    return section.get("reference", "baseline")


def samples_of(section: Section) -> list[dict[str, Any]]:
    """The requests of a section: of each sample its key, what was asked, and what the baseline made of it."""
    return section["runs"][0]["samples"] if section["runs"] else section["outputs"]


def outputs(samples: Sequence[Question | Prompt], results: Results, settings: Settings) -> list[dict[str, Any]]:
    """What a run made of each sample, in the keys that compare_run uses for it."""
    rows: list[dict[str, Any]] = []
    answers = results.answers() if results.text else {}
    for sample in samples:
        shown = {} if sample.visual is None else {"visual": str(sample.visual)}
        if isinstance(sample, Question):
            rows.append({"key": sample.key, **shown, "question": sample.question, "baseline": answers[sample.key]})
        else:
            rows.append({"key": sample.key, "prompt": sample.text, **shown, "file": made(sample, settings)})
    return rows


def section(settings: Settings, baseline: Results, root: Path) -> Section:
    """A report's section with no runs yet. Folders in it are relative to `root` where they lie below it."""
    return {"task": settings.task, "settings": settings.as_json(), "baseline": _facts(baseline.folder, root),
            "runs": []}


def run_entry(name: str, task: str, samples: Sequence[Mapping[str, Any]], root: Path) -> RunEntry:
    """One run of a section: what ran, the samples from `compare_run`, and their summary."""
    summary: dict[str, float | str | None] = {}
    intervals: dict[str, Interval | None] = {}
    for metric in metrics_of(task):
        rows = [sample for sample in samples if metric.key != "psnr" or sample["psnr"] != math.inf]
        values, weights = [row[metric.key] for row in rows], weights_of(metric, rows)
        summary[metric.key] = weighted_mean(values, weights) if rows else math.inf
        intervals[metric.key] = bootstrap(values, weights)
    return {**_facts(root / name, root), "name": name, "summary": _finite(summary), "intervals": intervals,
            "equal_samples": sum(sample.get("psnr") == math.inf for sample in samples),
            "samples": [_finite(sample) for sample in samples]}


def weights_of(metric: Metric, samples: Sequence[Mapping[str, Any]]) -> list[int]:
    """What each sample counts in the mean of a metric."""
    return [sample["tokens"] if metric.key in ("kl", "top1") else 1 for sample in samples]


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row for JSON, which has no infinity: equal pictures have an infinite PSNR, a zero baseline infinite errors."""
    def finite(key: str, value: Any) -> Any:
        if isinstance(value, list):
            return [finite(key, one) for one in value]
        return (EQUAL if key == "psnr" else None) if value == math.inf else value

    return {key: finite(key, value) for key, value in row.items()}


def _facts(folder: Path, root: Path) -> RunFacts:
    run = read_run(folder)
    kept = ("model", "device", "dtype", "seconds", "peak_memory_bytes", "versions")
    place = folder.relative_to(root) if folder.is_relative_to(root) else folder.resolve()
    return cast(RunFacts, {"folder": str(place), **{key: run[key] for key in kept}})
