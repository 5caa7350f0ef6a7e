"""quant_report.html: what people read of a conversion, checked against its meta and in a browser."""

import json
import re
from pathlib import Path

import pytest
from browser import Page, look, needs_browser
from conftest import GOLDENS

from lance_quant.evaluation import report
from lance_quant.formats.int4 import Int4
from lance_quant.formats.nvfp4 import Nvfp4
from lance_quant.formats.packed_folder import PackedFolder
from lance_quant.methods import convert, quant_report
from lance_quant.methods.conversion import Conversion

STATS = GOLDENS / "published" / "act_stats.pt"
MODEL = GOLDENS / "checkpoint" / "Lance_3B"


@pytest.fixture(scope="module", params=[(Int4(64), "ours"), (Nvfp4(slim=True), "ours"), (Int4(64), "published")],
                ids=["int4", "nvfp4-slim", "published"])
def folder(request, tmp_path_factory):
    codec, recipe = request.param
    out = tmp_path_factory.mktemp("report") / "out"
    convert.convert(MODEL, STATS, out, Conversion(codec, recipe))
    return out, recipe


def read(out):
    return Page((out / quant_report.FILE).read_text(encoding="utf-8"))


def test_the_page_lists_every_linear_and_needs_no_other_file(folder):
    out, recipe = folder
    page = read(out)
    assert page.open == [] and page.of("a") == page.of("img") == []
    rows = [attrs for attrs in page.of("td") if "data-key" in attrs]
    assert len(rows) == 12 * 42  # columns, linears
    assert len(page.of("svg")) == (2 if recipe == "ours" else 0)
    assert sum(attrs.get("class") == "written" for attrs in page.of("line")) == (42 if recipe == "ours" else 0)


def test_the_folder_opens_with_the_page_in_it(folder):
    with PackedFolder(folder[0]) as opened:
        assert len(opened.linears) == 42
    parts = {"llm_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "README.md"}
    written = {path.name for path in folder[0].iterdir()} - parts
    assert sorted(Path(name).suffix for name in written) == [".html", ".json", ".safetensors", ".sft"]


def test_the_numbers_are_those_of_the_meta(folder):
    out, recipe = folder
    if recipe == "published":
        assert "This recipe measures no errors" in read(out).text
        return
    (meta,) = (json.loads(path.read_text()) for path in out.glob("*_meta.json"))
    text = (out / quant_report.FILE).read_text()
    for entry in meta["per_weight"].values():
        assert f'data-key="{entry["error_before"]:.6g}"' in text and f'data-key="{entry["error_after"]:.6g}"' in text
        assert f'data-key="{entry["outlier_ratio"]:.6g}"' in text


def row(name="mlp.up_proj", layer=0, **entry):
    return quant_report.Row(f"language_model.model.layers.{layer}.{name}", {"group_size": 64, **entry}, 1.0)


def test_text_is_escaped_and_missing_numbers_are_empty_cells():
    page = quant_report.page("a & b", {"x": "<script>"}, [row(candidate="<b>", error_before=0.0, error_after=0.0)],
                             {"up_proj packed": 12})
    assert "<b>" not in page and "&lt;script&gt;" in page and "a &amp; b" in page
    assert '<td data-key="0" class="n">exact</td>' in page and '<td data-key=""></td>' in page
    assert not re.search(r"\b(None|True|False|inf|nan)\b", Page(page).text)


def test_what_gptq_rounded_is_judged_by_what_it_minimised():
    """By second moments alone its error grows, which would read as a failure."""
    captured = row(rounding="gptq", error_before=0.008, error_after=0.012, held_nearest=0.010, held_after=0.006)
    text = Page(quant_report.page("t", {}, [captured], {})).text
    assert "0.6 % of its energy on average (nearest rounding: 1 %, so 40 % of its error is gone)" in text
    assert "1.2 %" not in text and "held-back tokens" in text


def test_the_verdict_names_the_worst_linear_and_every_exception():
    rows = [row(error_before=0.02, error_after=0.01),
            row("self_attn.q_proj_moe_gen", 1, error_before=0.05, error_after=0.03),
            row("mlp.down_proj", 1, error_before=0.02, error_after=0.02, reason="no captured tokens"),
            quant_report.Row("language_model.model.layers.2.mlp.up_proj", {"rounding": "bfloat16"}, 0.0)]
    said = " ".join(Page(quant_report.page("t", {}, rows, {})).text.split())
    assert "by 2 % of its energy on average (nearest rounding: 3 %" in said
    assert "The largest error is that of layer 1, self_attn.q_proj_moe_gen: 3 %." in said
    assert "1 of 4 linears stay in bfloat16" in said
    assert "1 of 4 linears were not rounded by GPTQ: no captured tokens." in said


def test_a_copy_in_a_results_folder_links_back(folder, tmp_path):
    report.adopt_quant_report(folder[0], tmp_path)
    page = read(tmp_path)
    assert page.open == [] and [attrs["href"] for attrs in page.of("a")] == ["../report.html"]
    report.adopt_quant_report(tmp_path / "published", tmp_path)  # has none: nothing to do


@needs_browser
@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.slow
def test_the_page_fits_a_phone_and_a_desk(folder, width, tmp_path):
    found = look((folder[0] / quant_report.FILE).read_text(encoding="utf-8"), width, tmp_path)
    assert found["width"] == width and found["needed"] <= width and found["wide"] == []
    assert min(found["fonts"]) >= 12
    assert all(cell["overflow"] <= 0 for row in found["rows"] for cell in row)


@needs_browser
@pytest.mark.browser
def test_a_heading_sorts_by_value(tmp_path):
    rows = [row(layer=layer, error_before=1.0, error_after=error)
            for layer, error in enumerate((0.02, 0.1, 0.003))]
    probe = """(() => {
      const head = [...page.querySelectorAll("th")].find(one => one.textContent.trim() === "error, written");
      const rows = () => [...page.querySelectorAll("#linears tbody tr")];
      const layers = () => rows().map(line => line.cells[0].textContent.trim());
      head.click();
      const up = layers();
      head.click();
      return [up, layers(), head.ariaSort];
    })()"""
    found = look(quant_report.page("t", {}, rows, {}), 1280, tmp_path, probe)
    assert found["result"] == [["2", "0", "1"], ["1", "0", "2"], "descending"]
