"""report.html: a comparison for people, readable as one file: verdict, measures, velocity chart, samples side by side.

Pictures in the page are thumbnails. A click opens the full files, which lie beside the page, and flips between the
baseline and the variants in one place; where the files are gone, the thumbnails serve.
"""

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lance_quant.evaluation.compare import (
    EQUAL,
    Metric,
    RunEntry,
    RunFacts,
    Section,
    baseline_name,
    metrics_of,
    samples_of,
)
from lance_quant.evaluation.pictures import Thumbnail, thumbnail
from lance_quant.evaluation.run_folder import open_made
from lance_quant.evaluation.verdict import verdict
from lance_quant.lance.media.samples import open_visual
from lance_quant.lance.settings import TASKS
from lance_quant.methods import quant_report
from lance_quant.storage import html
from lance_quant.storage.atomic import size_text

TITLE = "Quantized Lance beside its baseline"
_TASKS = {"t2i": "text to image", "t2v": "text to video", "i2v": "image to video", "image_edit": "image edit",
          "video_edit": "video edit", "x2t_image": "questions about pictures", "x2t_video": "questions about clips"}
_SETTINGS = {"num_timesteps": "denoising steps", "timestep_shift": "timestep shift", "cfg_scale": "guidance",
             "cfg_low": "guidance from t", "cfg_high": "guidance up to t", "cfg_renorm": "guidance renormalised",
             "max_new_tokens": "longest answer", "num_frames": "frames", "top_p": "top-p"}
_SWITCHES = {"fix_quirks": ("quirks as in the official code", "quirks repaired"),
             "vae_tiling": ("VAE in one piece", "VAE in tiles")}  # off, on


@dataclass(frozen=True)
class Shot:
    """A picture or clip of a sample: whose, its thumbnail, the full file, and what is said below it."""

    name: str
    thumbnail: Thumbnail
    href: str
    note: str


@dataclass(frozen=True)
class Reply:
    """An answer to a sample's question: whose, its words with those that differ from the baseline's marked, a note."""

    name: str
    words: Sequence[tuple[str, bool]]
    note: str


@dataclass(frozen=True)
class Sample:
    """A request with what became of it."""

    key: str
    asked: str
    shown: Shot | None
    shots: Sequence[Shot]
    replies: Sequence[Reply]


@dataclass(frozen=True)
class Curve:
    """A line of the chart: whose, and its points in percent of the drawing, y downwards."""

    name: str
    points: str


@dataclass(frozen=True)
class Chart:
    """Velocity error over the timesteps."""

    top: str
    first: str
    last: str
    curves: Sequence[Curve]


@dataclass(frozen=True)
class Measure:
    """A row of the table of measures; a cell has a value and its interval."""

    heading: str
    direction: str
    meaning: str
    cells: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Part:
    """A task in the page; `measured`: its figures are means over samples that were compared."""

    task: str
    title: str
    verdict: Sequence[str]
    runs: Sequence[tuple[str, str]]  # name, link to its quant_report.html or ""
    measures: Sequence[Measure]
    chart: Chart | None
    samples: Sequence[Sample]
    facts: str
    measured: bool


def page(sections: Sequence[Section], root: Path) -> str:
    """The report as HTML.

    Args:
        sections: of comparison.json.
        root: folder of the page, to which the `folder` of baselines and runs is relative.
    """
    return html.render("evaluation/report.html.jinja", title=TITLE, parts=[_part(one, root) for one in sections])


def facts(section: Section) -> str:
    """Number of samples, settings and hardware, as one sentence."""
    baseline = section["baseline"]
    settings = ", ".join(_SWITCHES[key][value] if key in _SWITCHES else
                         f"{_SETTINGS.get(key, key.replace('_', ' '))} {value}"
                         for key, value in section["settings"].items() if key != "task")
    return (f"{len(samples_of(section))} samples; {settings}; {baseline_name(section)} in {baseline['dtype']} on "
            f"{baseline['device']}; torch {baseline['versions']['torch']}")


def number(value: float | str | None) -> str:
    """A figure to four digits."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else f"{value:.4g}"


def between(run: RunEntry, metric: Metric) -> str:
    """The interval of a mean to three digits, "" where there is none."""
    interval = run["intervals"][metric.key]
    return f"{interval[0]:.3g}–{interval[1]:.3g}" if interval else ""


def _part(section: Section, root: Path) -> Part:
    task, runs = section["task"], section["runs"]
    drawn = TASKS[task].makes != "text"
    links = [(run["name"], _quant_report(run, root)) for run in runs]
    samples = [(_drawn if drawn else _answered)(section, index, root) for index in range(len(samples_of(section)))]
    if not runs:
        links = [(baseline_name(section), _quant_report(section["baseline"], root))]
    return Part(task, _TASKS[task], verdict(section), links, _measures(section) if runs else _alone(section),
                _chart(runs) if drawn and runs else None, samples, facts(section), bool(runs))


def _alone(section: Section) -> list[Measure]:
    """What there is to say of a packed folder that nothing is compared with."""
    run = section["baseline"]
    peaks = [(kind, size) for kind, size in run["peak_memory_bytes"].items() if size is not None]
    rows = [Measure("size of the file", "lower is better", "", [(size_text(run["model"]["bytes"]), "")]),
            Measure("bits per weight", "lower is better", "Of the packed linears, scales and zero points included.",
                    [(f"{run['model']['bits_per_weight']:.2f}", "")])]
    rows += [Measure(f"seconds to {stage}", "lower is better", "Wall time of the stage, for all samples.",
                     [(f"{seconds:.1f}", "")]) for stage, seconds in run["seconds"].items()]
    return rows + [Measure(f"peak memory, {kind}", "lower is better", "Of the process, or of torch on a GPU.",
                           [(size_text(size), "")]) for kind, size in peaks]


def _quant_report(run: RunFacts, root: Path) -> str:
    path = root / run["folder"] / quant_report.FILE
    return _href(path, root) if path.is_file() else ""


def _href(path: Path, root: Path) -> str:
    """A link from a page in `root`, relative where that is possible."""
    try:
        return quote(Path(os.path.relpath(path.resolve(), root.resolve())).as_posix())
    except ValueError:  # another drive
        return path.resolve().as_uri()


def _measures(section: Section) -> list[Measure]:
    runs, source = section["runs"], section["baseline"]["model"]["bytes"]
    sizes = [(size_text(run["model"]["bytes"]), f"{source / run['model']['bytes']:.2f} times smaller") for run in runs]
    bits = [(f"{run['model']['bits_per_weight']:.2f}", "") for run in runs]
    rows = [Measure("size of the file", "lower is better", f"The baseline's file has {size_text(source)}.", sizes),
            Measure("bits per weight", "lower is better", "Of the packed linears, scales and zero points included. The "
                    f"baseline has {section['baseline']['model']['bits_per_weight']:.2f}.", bits)]
    rows += [Measure(metric.heading, metric.direction, metric.meaning,
                     [(number(run["summary"][metric.key]), between(run, metric)) for run in runs])
             for metric in metrics_of(section["task"])]
    if TASKS[section["task"]].makes != "text":
        rows.append(Measure("equal pixels", "higher is better", "Samples whose result is the baseline's, pixel for "
                            "pixel. They are left out of the mean PSNR, which would be infinite.",
                            [(f"{run['equal_samples']} of {len(run['samples'])}", "") for run in runs]))
    return rows


def _chart(runs: Sequence[RunEntry]) -> Chart:
    """Relative velocity error over the timesteps, mean over the prompts, one line per run."""
    curves = []
    for run in runs:
        columns = zip(*(sample["velocity_errors"] for sample in run["samples"]), strict=True)
        curves.append([sum(value or 0 for value in column) / len(column) for column in columns])
    times = runs[0]["samples"][0]["t"]
    top = max(max(curve) for curve in curves) or 1.0
    lines = [Curve(run["name"], " ".join(f"{100 * index / max(1, len(times) - 1):.2f},{100 * (1 - value / top):.2f}"
                                         for index, value in enumerate(curve)))
             for run, curve in zip(runs, curves, strict=True)]
    return Chart(f"{top:.2g}", f"t = {times[0]:.2f} (noise)", f"t = {times[-1]:.2f}", lines)


def _drawn(section: Section, index: int, root: Path) -> Sample:
    sample = samples_of(section)[index]
    shots = [_shot(baseline_name(section), section["baseline"], sample, root, "")]
    for run in section["runs"]:
        psnr = run["samples"][index]["psnr"]
        note = "equal, pixel for pixel" if psnr == EQUAL else f"PSNR {number(psnr)} dB"
        shots.append(_shot(run["name"], run, sample, root, note))
    return Sample(sample["key"], sample["prompt"], _visual(section["task"], sample, root, "source"), shots, [])


def _shot(name: str, made: RunFacts, sample: Mapping[str, Any], root: Path, note: str) -> Shot:
    path = root / made["folder"] / sample["file"]
    return Shot(name, thumbnail(open_made(path)), _href(path, root), note)


def _visual(task: str, sample: Mapping[str, Any], root: Path, name: str) -> Shot | None:
    """What a request shows the model."""
    modality = TASKS[task].takes
    if modality is None:
        return None
    path = Path(sample["visual"])
    return Shot(name, thumbnail(open_visual(path, modality)), _href(path, root), "")


def _answered(section: Section, index: int, root: Path) -> Sample:
    sample = samples_of(section)[index]
    replies = [Reply(baseline_name(section), [(sample["baseline"], False)], "")]
    for run in section["runs"]:
        one = run["samples"][index]
        replies.append(Reply(run["name"], _marked(sample["baseline"], one["answer"]),
                             f"KL {number(one['kl'])} per token"))
    return Sample(sample["key"], sample["question"], _visual(section["task"], sample, root, "shown"), [], replies)


def _marked(baseline: str, answer: str) -> list[tuple[str, bool]]:
    """The answer in pieces, those that differ from the baseline's words marked."""
    ours, theirs = answer.split(), baseline.split()
    codes = difflib.SequenceMatcher(None, theirs, ours, autojunk=False).get_opcodes()
    return [(" ".join(ours[start:end]), tag != "equal") for tag, _, _, start, end in codes if start < end]
