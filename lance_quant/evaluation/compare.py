"""One quantized run beside its baseline: the numbers that run_quant_eval.py reports, as plain data."""

import math
from pathlib import Path
from typing import Any

from lance_quant.distributed import ALONE, Team
from lance_quant.errors import InputError
from lance_quant.evaluation.metrics import psnr, relative_error, step_errors, text_similarity, token_divergence
from lance_quant.evaluation.run_folder import Results, made, open_made
from lance_quant.inference.tasks import Settings, forced_velocities
from lance_quant.lance.media.samples import TASKS, Prompt, Question
from lance_quant.lance.progress import progress
from lance_quant.lance.runtime import Runtime
from lance_quant.storage.atomic import read_json

_DRAWN = (
    ("velocity_error", "velocity error, mean over steps", "lower is better"),
    ("latent_error", "final latent error", "lower is better"),
)
# By what a task makes, shown in this order; (key, heading, how a person reads it).
METRICS = {
    "text": (
        ("kl", "KL per token (nats)", "lower is better"),
        ("top1", "top-1 agreement", "higher is better"),
        ("exact", "exact answers", "higher is better"),
        ("characters", "character similarity", "higher is better"),
        ("words", "word similarity", "higher is better"),
    ),
    "image": (*_DRAWN, ("psnr", "PSNR of the picture (dB)", "higher is better")),
    "video": (*_DRAWN, ("psnr", "PSNR over all frames (dB)", "higher is better")),
}


def metrics_of(task: str) -> tuple[tuple[str, str, str], ...]:
    """The rows of METRICS for a task."""
    return METRICS[TASKS[task].makes]


def compare_run(pipeline: Runtime, samples: list[Question] | list[Prompt], settings: Settings, baseline: Results,
                folder: Path, team: Team = ALONE) -> list[dict[str, Any]]:
    """Per sample, the distance of a finished run in `folder` from `baseline`, in the keys of METRICS and more.

    Runs the quantized model once more, on the baseline's own tokens and points x_t. Of a team, each process compares
    its share of the samples, and the leader gets all of it.
    """
    compare = _compare_answer if settings.spec.makes == "text" else _compare_made
    with Results(folder) as run:
        own = [compare(pipeline, sample, settings, baseline, run)
               for sample in progress(team.share(samples), desc="compare", unit="sample")]
    return list(team.collect(own, len(samples)))


def _compare_answer(pipeline: Runtime, question: Question, settings: Settings, baseline: Results,
                    run: Results) -> dict[str, Any]:
    ids = baseline.trace.read(f"{question.key}.ids").tolist()
    if max(ids) >= len(pipeline.tokenizer):
        raise InputError(f"baseline {baseline.folder} was made with another tokenizer")
    packed, vit_tokens = pipeline.ask(question, settings.resolution)
    forced = pipeline.forced_logprobs(packed, vit_tokens, ids).cpu()
    divergence = token_divergence(baseline.trace.read(f"{question.key}.logprobs"), forced)
    theirs, ours = baseline.answers()[question.key], run.answers()[question.key]
    return {"key": question.key, "visual": str(question.visual), "question": question.question,
            "reference": question.reference, "baseline": theirs, "answer": ours, "tokens": len(ids),
            "kl": divergence.kl.mean().item(), "kl_max": divergence.kl.max().item(), "top1": divergence.top1,
            **text_similarity(ours, theirs)._asdict()}


def _compare_made(pipeline: Runtime, prompt: Prompt, settings: Settings, baseline: Results,
                  run: Results) -> dict[str, Any]:
    theirs = {part: baseline.trace.read(f"{prompt.key}.{part}") for part in ("x", "velocity", "t", "latent")}
    ours = {part: run.trace.read(f"{prompt.key}.{part}") for part in ("x", "latent")}
    errors = step_errors(forced_velocities(pipeline, prompt, settings, theirs["x"], theirs["t"]), theirs["velocity"])
    name = made(prompt, settings)
    source = {} if prompt.visual is None else {"visual": str(prompt.visual)}
    return {"key": prompt.key, "prompt": prompt.text, **source, "file": name, "t": theirs["t"].tolist(),
            "velocity_errors": errors, "velocity_error": sum(errors) / len(errors),
            "same_noise": bool((ours["x"][0] == theirs["x"][0]).all()),
            "latent_error": relative_error(ours["latent"], theirs["latent"]),
            "psnr": psnr(open_made(run.folder / name), open_made(baseline.folder / name))}


def summarize(task: str, samples: list[dict[str, Any]]) -> dict[str, float]:
    """Mean of every metric over the samples (KL and top-1 over all tokens)."""
    weights = [sample.get("tokens", 1) for sample in samples]
    summary = {}
    for key, _, _ in metrics_of(task):
        each = weights if key in ("kl", "top1") else [1] * len(samples)
        total = sum(weight * sample[key] for weight, sample in zip(each, samples, strict=True))
        summary[key] = total / sum(each)
    return summary


def section(settings: Settings, baseline: Results, root: Path) -> dict[str, Any]:
    """A report's section with no runs yet. Folders in it are relative to `root` where they lie below it."""
    return {"task": settings.task, "settings": settings.as_json(), "baseline": _facts(baseline.folder, root),
            "runs": []}


def run_entry(name: str, task: str, samples: list[dict[str, Any]], root: Path) -> dict[str, Any]:
    """One run of a section: what ran, the samples from `compare_run`, and their summary."""
    summary = summarize(task, samples)
    for row in (*samples, summary):  # JSON has no infinity
        row.update({key: "equal" for key, value in row.items() if value == math.inf})
    return {"name": name, **_facts(root / name, root), "summary": summary, "samples": samples}


def _facts(folder: Path, root: Path) -> dict[str, Any]:
    """What a report says of a results folder: its run.json, shortened."""
    run = read_json(folder / "run.json", "run.json")
    kept = ("model", "device", "dtype", "seconds", "peak_memory_bytes", "versions")
    place = folder.relative_to(root) if folder.is_relative_to(root) else folder.resolve()
    return {"folder": str(place), **{key: run[key] for key in kept}}
