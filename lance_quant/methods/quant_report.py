"""quant_report.html: the rounding error of every linear that a conversion wrote, as one page that needs nothing else.

The error shown is the one that was minimised, relative and squared: |(What - W) x|^2 / |W x|^2, summed over the tokens
that were held back where layer inputs were captured (GPTQ), else over uncorrelated inputs with the measured second
moments (the search for scales). A linear that GPTQ rounded is not judged by second moments: it gives up that error to
lower the true one.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lance_quant.formats import layout
from lance_quant.storage import html

FILE = "quant_report.html"
_LINKS = "<!-- links to other reports -->"  # where `linked` puts one
_EXPERTS = {"und": "understanding expert (text and ViT tokens)", "gen": "generation expert (VAE latents)"}


class Row(NamedTuple):
    """One linear: its meta entry, and the seconds that its group took."""

    name: str
    entry: Mapping[str, Any]
    seconds: float


class RoundingError(NamedTuple):
    """Relative squared output errors of a linear, of nearest rounding and as written; `held`: on held-back tokens."""

    nearest: float
    written: float
    held: bool


@dataclass(frozen=True)
class Linear:
    """A linear as the page lists it; `linear` is its name inside the layer."""

    layer: int
    linear: str
    kind: str
    expert: str
    group_size: int | None  # inputs per scale; None: left in bfloat16
    scale: str
    rounding: str
    error: RoundingError | None
    outlier_ratio: float | None
    seconds: float
    note: str


@dataclass(frozen=True)
class Chart:
    """Nearest rounding and as written over the linears of an expert, in percent of the drawing; y grows downwards."""

    title: str
    marks: Sequence[tuple[Linear, float, float, float]]  # linear, x, y of nearest rounding, y as written
    labels: tuple[str, str, str]  # of the logarithmic y axis, from the top
    layers: tuple[int, int]


def minimised(entry: Mapping[str, Any]) -> RoundingError | None:
    """The error of a linear's meta entry that its rounding minimised; None where none was measured."""
    if entry.get("held_after") is not None:
        return RoundingError(entry["held_nearest"], entry["held_after"], True)
    if entry.get("error_after") is not None:
        return RoundingError(entry["error_before"], entry["error_after"], False)
    return None


def page(title: str, summary: Mapping[str, str], rows: Sequence[Row], sizes: Mapping[str, int]) -> str:
    """The report as HTML.

    Args:
        title: of the page.
        summary: facts about the run, in order.
        rows: one per linear, in order of layers.
        sizes: bytes by kind of tensor.
    """
    linears = [_linear(row) for row in rows]
    return html.render("methods/quant_report.html.jinja", title=title, summary=summary, verdict=verdict(linears),
                       linears=linears, charts=_charts(linears), kinds=layout.KINDS, sizes=sizes, links=_LINKS,
                       largest=max(sizes.values(), default=1), percent=percent)


def linked(text: str, href: str, label: str) -> str:
    """A page of this module, with a link to another report at its top."""
    return text.replace(_LINKS, html.render("methods/link.html.jinja", href=href, label=label), 1)


def percent(share: float | None) -> str:
    """A share in percent, to three digits."""
    if share is None:
        return ""
    return "exact" if share == 0 else f"{100 * share:.3g} %"


def _linear(row: Row) -> Linear:
    layer, linear = row.name.removeprefix(f"{layout.LAYERS}.").split(".", 1)
    entry = row.entry
    return Linear(int(layer), linear, layout.kind_of(row.name), layout.expert_of(row.name),
                  entry.get("group_size", entry.get("block_size")), entry.get("candidate", ""),
                  entry.get("rounding", ""), minimised(entry), entry.get("outlier_ratio"), row.seconds,
                  entry.get("reason", ""))


def verdict(linears: Sequence[Linear]) -> list[str]:
    """The page in sentences."""
    packed = [one for one in linears if one.group_size is not None]
    judged = [(one, one.error) for one in packed if one.error is not None]
    said = []
    if judged:
        nearest, written = (sum(values) / len(judged) for values in zip(*((error.nearest, error.written)
                                                                          for _, error in judged), strict=True))
        gained = f", so {100 * (1 - written / nearest):.0f} % of its error is gone" if 0 < written < nearest else ""
        said.append(f"Rounding changes the output of a linear by {percent(written)} of its energy on average (nearest "
                    f"rounding: {percent(nearest)}{gained}).")
        worst, error = max(judged, key=lambda pair: pair[1].written)
        said.append(f"The largest error is that of layer {worst.layer}, {worst.linear}: {percent(error.written)}.")
    else:
        said.append("This recipe measures no errors. run_quant_eval.py compares what the models make.")
    said += _exceptions(linears, len(packed))
    return said


def _exceptions(linears: Sequence[Linear], packed: int) -> Iterable[str]:
    if packed < len(linears):
        yield f"{len(linears) - packed} of {len(linears)} linears stay in bfloat16: the bits budget spared them."
    for reason, count in Counter(one.note for one in linears if one.note).items():
        yield f"{count} of {len(linears)} linears were not rounded by GPTQ: {reason}."


def _charts(linears: Sequence[Linear]) -> list[Chart]:
    """One chart per expert, on a common axis."""
    shown = [(one, math.log10(one.error.nearest), math.log10(one.error.written)) for one in linears
             if one.group_size is not None and one.error is not None and min(one.error[:2]) > 0
             and max(one.error[:2]) < math.inf]
    if not shown:
        return []
    low = min(min(nearest, written) for _, nearest, written in shown) - 0.05
    high = max(max(nearest, written) for _, nearest, written in shown) + 0.05
    labels = (percent(10**high), percent(10**((low + high) / 2)), percent(10**low))
    charts = []
    for expert, title in _EXPERTS.items():
        own = [mark for mark in shown if mark[0].expert == expert]
        marks = [(one, 100 * (index + 0.5) / len(own), 100 * (high - nearest) / (high - low),
                  100 * (high - written) / (high - low)) for index, (one, nearest, written) in enumerate(own)]
        if marks:
            charts.append(Chart(title, marks, labels, (own[0][0].layer, own[-1][0].layer)))
    return charts
