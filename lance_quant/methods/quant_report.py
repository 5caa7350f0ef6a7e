"""Signal-to-quantization-noise report: quant_report.html, one page that needs nothing else.

Errors are relative squared output errors in decibels (SQNR), higher is better. They are those of plain rounding without
a scale and as written, by second moments; where inputs were captured, also of nearest rounding and as written on tokens
that were held back.
"""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lance_quant.formats import layout
from lance_quant.methods.quantized_group import decibel

FILE = "quant_report.html"
COLOURS = {"q_proj": "#4477aa", "k_proj": "#66ccee", "v_proj": "#228833", "o_proj": "#ccbb44", "gate_proj": "#ee6677",
           "up_proj": "#aa3377", "down_proj": "#777777"}
_WIDTH, _HEIGHT, _MARGIN = 960, 260, 44
_STYLE = """body{font:14px system-ui,sans-serif;margin:2em auto;max-width:1100px;color:#222}
table{border-collapse:collapse;width:100%}th,td{padding:.2em .5em;text-align:right;border-bottom:1px solid #ddd}
th{cursor:pointer;background:#f4f4f4;position:sticky;top:0}td:first-child,th:first-child{text-align:left}
.key span,.key i{display:inline-block;margin-right:1.2em}.key i{width:.8em;height:.8em;margin-right:.3em}"""
_SORT = """document.querySelectorAll('th').forEach((head,column)=>head.onclick=()=>{
const body=document.querySelector('#linears tbody'),up=head.dataset.up=head.dataset.up==='1'?'0':'1';
const key=row=>{const text=row.cells[column].dataset.key;return text===''?-Infinity:isNaN(text)?text:+text};
[...body.rows].sort((a,b)=>(key(a)<key(b)?-1:key(a)>key(b)?1:0)*(up==='1'?1:-1)).forEach(row=>body.append(row))})"""
_COLUMNS = ("linear", "layer", "kind", "expert", "group size", "scale", "rounding", "plain dB", "written dB",
            "held back: nearest dB", "held back: written dB", "outlier ratio", "group seconds", "why not GPTQ")


class Row(NamedTuple):
    """One linear: its meta entry, and the seconds that its group took."""

    name: str
    entry: Mapping[str, Any]
    seconds: float


def page(title: str, summary: Mapping[str, str], rows: Sequence[Row], sizes: Mapping[str, int]) -> str:
    """The report as HTML.

    Args:
        title: of the page.
        summary: facts about the run, in order.
        rows: one per linear, in order of layers.
        sizes: bytes by kind of tensor.
    """
    facts = "".join(f"<tr><td>{_text(key)}</td><td>{_text(value)}</td></tr>" for key, value in summary.items())
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{_text(title)}</title>
<style>{_STYLE}</style><h1>{_text(title)}</h1><table>{facts}</table>
<h2>Output error per linear</h2><p>Decibels, higher is better. Small gray: plainly rounded, no scale. Coloured: as
written. Judged by second moments, or on held-back tokens where inputs were captured.</p>{_key()}{_errors(rows)}
<h2>Bytes by kind</h2>{_bars(sizes)}
<h2>Every linear</h2><p>Click a head to sort.</p>{_table(rows)}<script>{_SORT}</script></html>
"""


def _text(value: object) -> str:
    return html.escape(str(value))


def _key() -> str:
    parts = (f'<span><i style="background:{colour}"></i>{kind}</span>' for kind, colour in COLOURS.items())
    return f'<p class="key">{"".join(parts)}</p>'


def _pair(entry: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """dB before and after, on held-back tokens where there are any."""
    before, after = ("held_nearest", "held_after") if "held_after" in entry else ("error_before", "error_after")
    return _decibel(entry, before), _decibel(entry, after)


def _decibel(entry: Mapping[str, Any], key: str) -> float | None:
    """An error of the entry in dB; None where it has none."""
    return decibel(entry[key]) if key in entry else None


def _errors(rows: Sequence[Row]) -> str:
    """Dots over the linears in order: before and after."""
    pairs = [_pair(row.entry) for row in rows]
    shown = [value for pair in pairs for value in pair if value is not None and math.isfinite(value)]
    if not shown:
        return "<p>This recipe measures no errors.</p>"
    low, high = math.floor(min(shown) / 5) * 5, math.ceil(max(shown) / 5) * 5 + 1e-9
    step = (_WIDTH - 2 * _MARGIN) / max(1, len(rows))

    def y(value: float) -> float:
        return _HEIGHT - _MARGIN / 2 - (value - low) / (high - low) * (_HEIGHT - _MARGIN)

    marks = [f'<line x1="{_MARGIN}" x2="{_WIDTH - _MARGIN}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#ddd"/>'
             f'<text x="4" y="{y(tick) + 4:.1f}" font-size="11">{tick} dB</text>'
             for tick in range(int(low), int(high) + 1, 5)]
    for index, (row, pair) in enumerate(zip(rows, pairs, strict=True)):
        for value, colour, radius in zip(pair, ("#bbb", COLOURS[layout.kind_of(row.name)]), (1.5, 2.5), strict=True):
            if value is not None and math.isfinite(value):
                marks.append(f'<circle cx="{_MARGIN + (index + 0.5) * step:.1f}" cy="{y(value):.1f}" r="{radius}" '
                             f'fill="{colour}"><title>{_text(row.name)} {value:.1f} dB</title></circle>')
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(marks)}</svg>'


def _bars(sizes: Mapping[str, int]) -> str:
    largest = max(sizes.values(), default=1)
    marks = [f'<text x="0" y="{22 * index + 15}" font-size="13">{_text(kind)}</text>'
             f'<rect x="220" y="{22 * index + 3}" height="15" width="{560 * size / largest:.1f}" fill="#4477aa"/>'
             f'<text x="{228 + 560 * size / largest:.1f}" y="{22 * index + 15}" font-size="12">{size / 1e6:.2f} MB'
             f'</text>'
             for index, (kind, size) in enumerate(sizes.items())]
    return f'<svg viewBox="0 0 {_WIDTH} {22 * len(sizes) + 6}" role="img">{"".join(marks)}</svg>'


def _table(rows: Sequence[Row]) -> str:
    heads = "".join(f"<th>{name}</th>" for name in _COLUMNS)
    body = "".join(f"<tr>{''.join(_cell(value) for value in _values(row))}</tr>" for row in rows)
    return f'<table id="linears"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'


def _values(row: Row) -> list[object]:
    entry = row.entry
    layer = int(row.name.removeprefix(f"{layout.LAYERS}.").split(".")[0])
    return [row.name.removeprefix(f"{layout.LAYERS}."), layer, layout.kind_of(row.name), layout.expert_of(row.name),
            entry.get("group_size", entry.get("block_size", "bf16")), entry.get("candidate", ""),
            entry.get("rounding", ""), *(_decibel(entry, key) for key in (
                "error_before", "error_after", "held_nearest", "held_after")),
            entry.get("outlier_ratio"), row.seconds, entry.get("reason", "")]


def _cell(value: object) -> str:
    if isinstance(value, float):
        key, text = (f"{value:.4f}", f"{value:.1f}") if math.isfinite(value) else ("1e9", "exact")
    else:
        key = text = "" if value is None else _text(value)
    return f'<td data-key="{key}">{text}</td>'
