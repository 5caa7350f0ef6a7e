"""The comparison as a person reads it: report.md, and report.html with pictures side by side, in one file each.
Clips are shown as strips of frames.

Both are made from the same sections, one per task, as evaluation.py and run_quant_eval.py lay them down in
comparison.json: {"task", "settings", "baseline": {...}, "runs": [{"name", "summary", "samples", ...}, ...]}.
"""

import base64
import difflib
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lance_quant.evaluation.compare import metrics_of
from lance_quant.evaluation.run_folder import open_made
from lance_quant.lance.media.samples import TASKS, open_visual

_THUMBNAIL = (160, 320)  # narrowest and widest picture in the page, in pixels; the former for frames of clips
_FRAMES = 5  # of a clip in the page
_COLORS = ("#c2410c", "#1d4ed8", "#15803d", "#7e22ce")
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem;color:#1c1917}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.35rem .7rem;border-bottom:1px solid #d6d3d1;
text-align:left;vertical-align:top}td{overflow-wrap:anywhere}th{font-weight:600}
td.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
table.samples{width:100%;table-layout:fixed}img{max-width:100%;display:block}
ins{background:#fde68a;text-decoration:none}.note{color:#57534e;font-size:.9em}figure{margin:1rem 0}
"""


def markdown(sections: Sequence[dict[str, Any]]) -> str:
    """The report without pictures."""
    lines = ["# Quantized Lance beside its baseline", ""]
    for section in sections:
        head, *rows = _summary_rows(section)
        lines += [f"## {section['task']}", "", _facts(section), "", "| " + " | ".join(head) + " |",
                  "|" + "---|" * len(head)]
        lines += ["| " + " | ".join(row) + " |" for row in rows] + [""]
        for index, sample in enumerate(section["runs"][0]["samples"]):
            lines += _markdown_sample(section, index, sample)
    return "\n".join(lines) + "\n"


def page(sections: Sequence[dict[str, Any]], root: Path) -> str:
    """The report as one self-contained HTML page.

    Args:
        root: folder to which the `folder` of baselines and runs is relative.
    """
    body = ["<h1>Quantized Lance beside its baseline</h1>"]
    for section in sections:
        body += [f"<h2>{html.escape(section['task'])}</h2>", f"<p class=note>{html.escape(_facts(section))}</p>",
                 _table(_summary_rows(section))]
        if TASKS[section["task"]].makes != "text":
            body += [_velocity_chart(section), _contact_sheet(section, root)]
        else:
            body.append(_answers(section))
    return ("<!doctype html><html lang=en><meta charset=utf-8><title>Quantized Lance</title>"
            f"<style>{_STYLE}</style><body>{''.join(body)}</body></html>\n")


def summary_table(sections: Sequence[dict[str, Any]]) -> str:
    """The summary tables as aligned text, for a terminal."""
    blocks = []
    for section in sections:
        rows = _summary_rows(section)
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        blocks.append(f"{section['task']}\n" + "\n".join(
            "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows))
    return "\n\n".join(blocks)


def _facts(section: dict[str, Any]) -> str:
    baseline = section["baseline"]
    settings = ", ".join(f"{key} {value}" for key, value in section["settings"].items() if key != "task")
    return (f"{len(section['runs'][0]['samples'])} samples; {settings}; baseline {baseline['dtype']} on "
            f"{baseline['device']}; torch {baseline['versions']['torch']}")


def _summary_rows(section: dict[str, Any]) -> list[list[str]]:
    """Heading and one row per model: name, size, compression, then the task's metrics."""
    metrics = metrics_of(section["task"])
    source = section["baseline"]["model"]["bytes"]
    rows = [["model", "file", "compression", "bits/weight", *(heading for _, heading, _ in metrics)],
            [f"baseline ({section['baseline']['dtype']})", _size(source), "1.00 x",
             f"{section['baseline']['model']['bits_per_weight']:.2f}", *["" for _ in metrics]]]
    for run in section["runs"]:
        model = run["model"]
        rows.append([run["name"], _size(model["bytes"]), f"{source / model['bytes']:.2f} x",
                     f"{model['bits_per_weight']:.2f}", *(_number(run["summary"][key]) for key, _, _ in metrics)])
    return rows


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _table(rows: list[list[str]]) -> str:
    head, *body = [[html.escape(cell) for cell in row] for row in rows]
    lines = ["<tr>" + "".join(f"<th>{cell}" for cell in head)]
    lines += ["<tr>" + "".join(f"<td{' class=n' if column else ''}>{cell}" for column, cell in enumerate(row))
              for row in body]
    return f"<table>{''.join(lines)}</table>"


def _markdown_sample(section: dict[str, Any], index: int, sample: dict[str, Any]) -> list[str]:
    runs = [(run["name"], run["samples"][index]) for run in section["runs"]]
    if TASKS[section["task"]].makes != "text":
        return [f"- `{sample['key']}` {sample['prompt']!r}: " + "; ".join(
            f"{name} velocity error {one['velocity_error']:.3g}, PSNR {_number(one['psnr'])} dB"
            for name, one in runs)]
    return [f"- `{sample['key']}` {sample['question']!r}", f"  - baseline: {sample['baseline']!r}",
            *(f"  - {name} (KL {one['kl']:.3g}): {one['answer']!r}" for name, one in runs)]


def _velocity_chart(section: dict[str, Any]) -> str:
    """Relative velocity error over the timesteps, mean over the prompts, one line per run."""
    curves = []
    for run in section["runs"]:
        columns = zip(*(sample["velocity_errors"] for sample in run["samples"]), strict=True)
        curves.append([sum(column) / len(column) for column in columns])
    times = section["runs"][0]["samples"][0]["t"]
    top = max(max(curve) for curve in curves) or 1.0
    width, height, left, bottom = 640, 240, 60, 40

    def point(index: int, value: float) -> str:
        x = left + (width - left - 10) * (index / max(1, len(times) - 1))
        return f"{x:.1f},{10 + (height - bottom - 10) * (1 - value / top):.1f}"

    parts = [f"<text x={left - 6} y=20 text-anchor=end>{top:.2g}</text>",
             f"<text x={left - 6} y={height - bottom} text-anchor=end>0</text>",
             f"<text x={left} y={height - 18}>t = {times[0]:.2f}</text>",
             f"<text x={width - 10} y={height - 18} text-anchor=end>t = {times[-1]:.2f}</text>",
             f"<path d='M{left} 10V{height - bottom}H{width - 10}' fill=none stroke='#78716c'/>"]
    for number, (run, curve) in enumerate(zip(section["runs"], curves, strict=True)):
        color = _COLORS[number % len(_COLORS)]
        line = " ".join(point(index, value) for index, value in enumerate(curve))
        parts.append(f"<polyline points='{line}' fill=none stroke='{color}' stroke-width=2 />")
        parts.append(f"<text x={left + 20 + 150 * number} y={height - 2} fill='{color}'>{html.escape(run['name'])}"
                     "</text>")
    return ("<figure><figcaption>Relative velocity error along the baseline's own trajectory, from noise to picture"
            f"</figcaption><svg viewBox='0 0 {width} {height}' width={width} font-size=13>{''.join(parts)}</svg>"
            "</figure>")


def _contact_sheet(section: dict[str, Any], root: Path) -> str:
    head = ["prompt", "baseline", *(run["name"] for run in section["runs"])]
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}" for cell in head)]
    for index, sample in enumerate(section["runs"][0]["samples"]):
        name, asked = sample["file"], html.escape(sample["prompt"])
        if "visual" in sample:
            asked += _picture(open_visual(Path(sample["visual"]), TASKS[section["task"]].takes))
        cells = [asked, _picture(open_made(root / section["baseline"]["folder"] / name))]
        for run in section["runs"]:
            caption = f"PSNR {_number(run['samples'][index]['psnr'])} dB"
            cells.append(_picture(open_made(root / run["folder"] / name)) + f"<span class=note>{caption}</span>")
        lines.append("<tr>" + "".join(f"<td>{cell}" for cell in cells))
    return f"<table class=samples>{''.join(lines)}</table>"


def _answers(section: dict[str, Any]) -> str:
    kind = TASKS[section["task"]].takes
    head = ["shown", "question", "baseline", *(run["name"] for run in section["runs"])]
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}" for cell in head)]
    for index, sample in enumerate(section["runs"][0]["samples"]):
        shown = _picture(open_visual(Path(sample["visual"]), kind))
        cells = [shown, html.escape(sample["question"]), html.escape(sample["baseline"])]
        for run in section["runs"]:
            one = run["samples"][index]
            note = f"KL {one['kl']:.3g} per token"
            cells.append(_marked(sample["baseline"], one["answer"]) + f"<br><span class=note>{note}</span>")
        lines.append("<tr>" + "".join(f"<td>{cell}" for cell in cells))
    return f"<table class=samples>{''.join(lines)}</table>"


def _marked(baseline: str, answer: str) -> str:
    """The answer with every word that differs from the baseline's marked."""
    ours, theirs = answer.split(), baseline.split()
    pieces: list[str] = []
    for tag, _, _, start, end in difflib.SequenceMatcher(None, theirs, ours, autojunk=False).get_opcodes():
        words = html.escape(" ".join(ours[start:end]))
        if words:
            pieces.append(words if tag == "equal" else f"<ins>{words}</ins>")
    return " ".join(pieces)


def _picture(frames: Sequence[Image.Image]) -> str:
    image = _strip(frames)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"<img alt='' width={max(image.width, _THUMBNAIL[0])} src='data:image/png;base64,{data}'>"


def _strip(frames: Sequence[Image.Image]) -> Image.Image:
    """A picture, or frames of a clip from first to last, side by side."""
    chosen = [round(step * (len(frames) - 1) / (_FRAMES - 1)) for step in range(_FRAMES)]
    kept = [frames[index].convert("RGB") for index in sorted(set(chosen))]
    for frame in kept:
        frame.thumbnail((_THUMBNAIL[1], _THUMBNAIL[1]) if len(kept) == 1 else (_THUMBNAIL[0], _THUMBNAIL[0]))
    strip = Image.new("RGB", (kept[0].width * len(kept), kept[0].height))
    for column, frame in enumerate(kept):
        strip.paste(frame, (column * frame.width, 0))
    return strip


def write(folder: Path, sections: Iterable[dict[str, Any]]) -> None:
    """Write report.md and report.html into `folder`, to which the sections' folders are relative."""
    sections = list(sections)
    (folder / "report.md").write_text(markdown(sections), encoding="utf-8")
    (folder / "report.html").write_text(page(sections, folder), encoding="utf-8")
