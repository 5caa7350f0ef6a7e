"""Calibration runs: a task over its samples with every quantizable linear watched."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lance_quant.calibration import capture
from lance_quant.calibration.activation_stats import ActStats, Collector
from lance_quant.distributed import ALONE, Team
from lance_quant.inference.tasks import run_watched
from lance_quant.lance.config import LancePaths
from lance_quant.lance.media.samples import Prompt, Question, content_hash
from lance_quant.lance.runtime import Runtime
from lance_quant.lance.settings import Settings


class Job(NamedTuple):
    """One task to run; `capture` is where its capture goes, if one was asked for."""

    settings: Settings
    samples: Sequence[Question | Prompt]
    paths: LancePaths
    capture: Path | None


def measure(runtime: Runtime, job: Job, linears: Sequence[str], fingerprint: str, versions: Mapping[str, str],
            team: Team = ALONE) -> ActStats:
    """Run a job and measure what enters every linear.

    Args:
        runtime: loaded unmerged, so that each linear can be watched.
        linears: module names.
        fingerprint, versions: of the weights and of the programs, for the statistics' record.
        team: shares the samples; the leader's statistics are of all of them.
    """
    settings, samples = job.settings, job.samples
    recording = capture.recording(runtime.model, job.capture, settings.task, fingerprint, team)
    with Collector(runtime.model, linears) as collector, recording as begin:
        run_watched(runtime, team.share(samples), settings, team.share(range(len(samples))), begin)
    collector.pool(team)
    with team.agreed():
        return collector.stats(settings.task, {
            "model": fingerprint, "seed": settings.seed, "settings": settings.as_json(),
            "samples": [sample.key for sample in samples], "content": content_hash(samples),
            "versions": dict(versions)})
