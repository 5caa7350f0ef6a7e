"""Evaluation reports: report.md and report.html in a results folder, and the summary table of a terminal.

All are made from the same sections, one per task, as compare.py and run_quant_eval.py lay them down in comparison.json.
"""

import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lance_quant.evaluation import report_page
from lance_quant.evaluation.compare import EQUAL, Metric, RunEntry, Section, baseline_name, metrics_of, samples_of
from lance_quant.evaluation.verdict import verdict
from lance_quant.lance.settings import TASKS
from lance_quant.methods import quant_report
from lance_quant.storage.atomic import size_text, write_text

_WIDTH = 80  # of a terminal


def write(folder: Path, sections: Iterable[Section]) -> None:
    """Write report.md and report.html into `folder`, to which the sections' folders are relative."""
    sections = list(sections)
    write_text(folder / "report.md", markdown(sections))
    write_text(folder / "report.html", report_page.page(sections, folder))


def adopt_quant_report(packed: Path, folder: Path) -> None:
    """Copy a packed folder's quant_report.html, if it has one, into a run's folder, with a link back to report.html."""
    page = packed / quant_report.FILE
    if page.is_file():
        text = quant_report.linked(page.read_text(encoding="utf-8"), "../report.html",
                                   "What becomes of answers, pictures and clips: the comparison with the baseline")
        write_text(folder / quant_report.FILE, text)


def markdown(sections: Sequence[Section]) -> str:
    """The report without pictures."""
    lines = ["# Quantized Lance beside its baseline", ""]
    for section in sections:
        head, *rows = _by_model(section)
        lines += [f"## {section['task']}", "", *(f"- {_plain(sentence)}" for sentence in verdict(section)), "",
                  report_page.facts(section), "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines += ["| " + " | ".join(map(_plain, row)) + " |" for row in rows] + [""]
        lines += [f"- {metric.heading}, {metric.direction}: {metric.meaning}" for metric in
                  metrics_of(section["task"]) if section["runs"]] + [""]
        for index, sample in enumerate(samples_of(section)):
            lines += _markdown_sample(section, index, sample)
        lines.append("")
    return "\n".join(lines)


def summary_table(sections: Sequence[Section]) -> str:
    """The summaries as aligned text for a terminal of 80 columns: a row per measure, a column per run."""
    return "\n\n".join("\n".join(_terminal(section)) for section in sections)


def _by_model(section: Section) -> list[list[str]]:
    """Heading and one row per model: name, size, compression, then the task's metrics."""
    metrics, baseline = metrics_of(section["task"]) if section["runs"] else (), section["baseline"]
    source = baseline["model"]["bytes"]
    rows = [["model", "file", "compression", "bits/weight", *(metric.heading for metric in metrics)],
            [f"{baseline_name(section)} ({baseline['dtype']})", size_text(source), "1.00 x",
             f"{baseline['model']['bits_per_weight']:.2f}", *["" for _ in metrics]]]
    return rows + [[run["name"], *_size_facts(run, source), *(_value(run, metric) for metric in metrics)]
                   for run in section["runs"]]


def _size_facts(run: RunEntry, source: int) -> tuple[str, str, str]:
    model = run["model"]
    return size_text(model["bytes"]), f"{source / model['bytes']:.2f} x", f"{model['bits_per_weight']:.2f}"


def _value(run: RunEntry, metric: Metric) -> str:
    """A mean with its interval, as "0.2134 (0.191–0.24)"."""
    between = report_page.between(run, metric)
    return report_page.number(run["summary"][metric.key]) + (f" ({between})" if between else "")


def _terminal(section: Section) -> Iterator[str]:
    metrics, baseline, count = metrics_of(section["task"]), section["baseline"], len(samples_of(section))
    source, makes = baseline["model"]["bytes"], TASKS[section["task"]].makes
    if not section["runs"]:
        yield from textwrap.wrap(f"{section['task']}, {count} samples. {verdict(section)[0]}", _WIDTH)
        return
    heads = ["", "file", "compression", "bits per weight", *(metric.heading for metric in metrics)]
    columns = [[run["name"], *_size_facts(run, source), *(_value(run, metric) for metric in metrics)]
               for run in section["runs"]]
    if makes != "text":
        heads.append(f"equal {makes}s")
        for run, column in zip(section["runs"], columns, strict=True):
            column.append(f"{run['equal_samples']} of {len(run['samples'])}")
    better = "; ".join(f"{direction} is better: " + ", ".join(one.heading for one in metrics if one.better == direction)
                       for direction in ("lower", "higher"))
    yield from textwrap.wrap(f"{section['task']}, {count} samples beside {_called(section)} "
                             f"({baseline['dtype']}, {size_text(source)}). Means with 95 % intervals; {better}", _WIDTH)
    for block in _side_by_side(heads, columns):
        yield ""
        yield from block


def _called(section: Section) -> str:
    return f"the reference {section['reference']}" if "reference" in section else "the baseline"


def _side_by_side(heads: list[str], columns: list[list[str]]) -> Iterator[list[str]]:
    """Blocks of lines no wider than a terminal, with as many columns as fit."""
    left = max(map(len, heads))
    lines, used = [f"  {head:<{left}}" for head in heads], 0
    for column in columns:
        cells = [_shortened(cell, _WIDTH - left - 4) for cell in column]
        width = max(map(len, cells))
        if used and len(lines[0]) + 2 + width > _WIDTH:
            yield [line.rstrip() for line in lines]
            lines, used = [f"  {head:<{left}}" for head in heads], 0
        lines = [f"{line}  {cell:<{width}}" for line, cell in zip(lines, cells, strict=True)]
        used += 1
    yield [line.rstrip() for line in lines]


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[:width - 9]}…{text[-8:]}"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def _markdown_sample(section: Section, index: int, sample: dict[str, Any]) -> list[str]:
    runs = [(_plain(run["name"]), run["samples"][index]) for run in section["runs"]]
    number = report_page.number
    if TASKS[section["task"]].makes != "text":
        found = "; ".join(f"{name} velocity error {number(one['velocity_error'])}, "
                          + ("equal pixels" if one["psnr"] == EQUAL else f"PSNR {number(one['psnr'])} dB")
                          for name, one in runs)
        return [f"- `{sample['key']}` “{_plain(sample['prompt'])}”: {found or sample['file']}"]
    return [f"- `{sample['key']}` “{_plain(sample['question'])}”",
            f"  - {_plain(baseline_name(section))}: {_plain(sample['baseline'])}",
            *(f"  - {name} (KL {number(one['kl'])}): {_plain(one['answer'])}" for name, one in runs)]
