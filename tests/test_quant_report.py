import html.parser
import json
import math

import pytest
from conftest import GOLDENS

from lance_quant.formats.int4 import Int4
from lance_quant.formats.nvfp4 import Nvfp4
from lance_quant.formats.packed_folder import PackedFolder
from lance_quant.methods import convert, quant_report
from lance_quant.methods.conversion import Conversion

STATS = GOLDENS / "published" / "act_stats.pt"
MODEL = GOLDENS / "checkpoint" / "Lance_3B"


class Page(html.parser.HTMLParser):
    """Counts what a page holds, and checks that tags close in order."""

    VOID = {"meta", "line", "rect"}

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.links = [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen[tag] = self.seen.get(tag, 0) + 1
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module", params=[(Int4(64), "ours"), (Nvfp4(slim=True), "ours"), (Int4(64), "published")],
                ids=["int4", "nvfp4-slim", "published"])
def folder(request, tmp_path_factory):
    codec, recipe = request.param
    out = tmp_path_factory.mktemp("report") / "out"
    convert.convert(MODEL, STATS, out, Conversion(codec, recipe))
    return out, recipe


def test_the_page_lists_every_linear_and_needs_no_other_file(folder):
    out, recipe = folder
    page = Page((out / quant_report.FILE).read_text())
    assert page.open == [] and page.links == [] and page.seen["svg"] == (2 if recipe == "ours" else 1)
    assert page.seen["tr"] == 8 + 1 + 42
    assert page.seen.get("circle", 0) == (84 if recipe == "ours" else 0)


def test_the_folder_opens_with_the_page_in_it(folder):
    with PackedFolder(folder[0]) as opened:
        assert len(opened.linears) == 42
    assert len(list(folder[0].iterdir())) == 3


def test_the_numbers_are_those_of_the_meta(folder):
    out, recipe = folder
    if recipe == "published":
        pytest.skip("measures no errors")
    (meta,) = (json.loads(path.read_text()) for path in out.glob("*_meta.json"))
    text = (out / quant_report.FILE).read_text()
    for entry in meta["per_weight"].values():
        assert f'data-key="{-10 * math.log10(entry["error_after"]):.4f}"' in text
        assert f'data-key="{entry["outlier_ratio"]:.4f}"' in text


def test_text_is_escaped_and_missing_numbers_are_empty_cells():
    row = quant_report.Row("language_model.model.layers.0.mlp.up_proj", {"candidate": "<b>", "error_before": 0.0}, 1.0)
    page = quant_report.page("a & b", {"x": "<script>"}, [row], {"up_proj packed": 12})
    assert "<b>" not in page and "&lt;script&gt;" in page and "a &amp; b" in page
    assert 'data-key="1e9">exact<' in page and '<td data-key=""></td>' in page
