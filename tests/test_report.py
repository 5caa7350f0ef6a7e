"""The comparison as people read it: verdict, measures, intervals, links, escaping; on sections laid down by hand."""

import json
import math
import re

import pytest
from browser import Page, look, needs_browser
from PIL import Image

from lance_quant.evaluation import report, report_page
from lance_quant.evaluation.compare import run_entry
from lance_quant.evaluation.verdict import verdict
from lance_quant.lance.media.video import write_video

HOSTILE = "<script>alert('x')</script> & \"q\" | `code`\nsecond line"


def run_json(folder, size):
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({
        "format": 1, "settings": {"task": "t2i"}, "samples": [],
        "model": {"path": "x", "bytes": size, "bits_per_weight": 4.375}, "device": "a CPU", "dtype": "float32",
        "seconds": {"run": 1.0}, "peak_memory_bytes": {"host": 1}, "versions": {"torch": "2.13.0"}}))


def picture(path, level, size=(64, 48)):
    Image.new("RGB", size, (level, level, level)).save(path)


def sample(key, error, psnr, prompt="a boat", file=None):
    return {"key": key, "prompt": prompt, "file": file or f"{key}.png", "t": [1.0, 0.6, 0.2],
            "velocity_errors": [error, error / 2, error * 1.5], "velocity_error": error, "same_noise": True,
            "latent_error": 2 * error, "psnr": psnr}


def answer(key, kl, text, theirs="two red circles", question="How many?"):
    return {"key": key, "visual": "", "question": question, "reference": "", "baseline": theirs, "answer": text,
            "tokens": 3, "kl": kl, "kl_max": kl, "top1": 1.0, "exact": float(text == theirs), "characters": 0.9,
            "words": 0.5}


def section_of(root, task, runs, baseline=None):
    """A section with these samples by run; every folder holds a run.json."""
    run_json(root / "baseline", 12_000_000)
    entries = []
    for name, samples in runs.items():
        run_json(root / name, 4_000_000)
        entries.append(run_entry(name, task, samples, root))
    facts = {key: value for key, value in entries[0].items() if key in ("device", "dtype", "versions")}
    return {"task": task, "settings": {"task": task, "fix_quirks": False, "cfg_scale": 4.0}, "runs": entries,
            "baseline": {"folder": "baseline", **facts,
                         "model": {"path": "x", "bytes": 12_000_000, "bits_per_weight": 32.0}}}


@pytest.fixture
def drawn(tmp_path):
    """Three prompts, two runs; the first picture of `close` is the baseline's."""
    root = tmp_path / "drawn"
    errors = {"close": (0.1, 0.12, 0.09), "far": (0.3, 0.28, 0.33)}
    section = section_of(root, "t2i", {
        name: [sample(f"{index:06d}", error, math.inf if name == "close" and not index else 30.0 + index,
                      HOSTILE if index == 1 else "a boat") for index, error in enumerate(values)]
        for name, values in errors.items()})
    for name in ("baseline", *errors):
        for index in range(3):
            picture(root / name / f"{index:06d}.png", 10 * index)
    return root, section


@pytest.fixture
def answered(tmp_path):
    root = tmp_path / "answered"
    root.mkdir()
    picture(root / "shown.png", 90, (320, 200))
    runs = {"Lance_3B-AWQ-INT4-with-a-long-name": [answer("a", 0.01, "two red circles"), answer("b", 0.2, HOSTILE)],
            "nvfp4": [answer("a", 0.03, "two blue circles"), answer("b", 0.1, "")]}
    for samples in runs.values():
        for one in samples:
            one["visual"] = str(root / "shown.png")
    return root, section_of(root, "x2t_image", runs)


def test_one_equal_picture_does_not_make_the_mean_equal(drawn):
    _, section = drawn
    close, far = section["runs"]
    assert close["summary"]["psnr"] == pytest.approx((31 + 32) / 2) and close["equal_samples"] == 1
    assert far["summary"]["psnr"] == pytest.approx(31.0) and far["equal_samples"] == 0
    assert [one["psnr"] for one in close["samples"]] == ["equal", 31.0, 32.0]


def test_all_equal_pictures_are_equal_and_infinite_errors_are_null(tmp_path):
    samples = [sample("000000", 0.0, math.inf), sample("000001", math.inf, math.inf)]
    (run,) = section_of(tmp_path, "t2i", {"same": samples})["runs"]
    assert run["summary"]["psnr"] == "equal" and run["equal_samples"] == 2 and run["intervals"]["psnr"] is None
    assert run["summary"]["velocity_error"] is None and run["samples"][1]["velocity_errors"] == [None, None, None]
    json.dumps(run, allow_nan=False)


def test_intervals_hold_the_mean_and_one_sample_has_none(drawn, tmp_path):
    _, section = drawn
    for run in section["runs"]:
        low, high = run["intervals"]["velocity_error"]
        assert low < run["summary"]["velocity_error"] < high
    alone = section_of(tmp_path / "alone", "t2i", {"one": [sample("000000", 0.1, 20.0)]})["runs"][0]
    assert set(alone["intervals"].values()) == {None}


def test_the_verdict_says_what_shrank_what_changed_and_what_is_closer(drawn):
    said = verdict(drawn[1])
    assert said[0].startswith("close: 4.00 MB instead of 12.00 MB, 3.0 times smaller. A denoising step is off by 10.3")
    assert "1 of 3 pictures equal the baseline's, pixel for pixel; the others are slightly different" in said[0]
    assert said[2] == "close is closer to the baseline than far, by velocity error."
    assert "3 samples are few" in said[3]


def test_runs_whose_differences_change_sign_are_not_ranked(tmp_path):
    runs = {"a": [sample("000000", 0.1, 20.0), sample("000001", 0.3, 20.0)],
            "b": [sample("000000", 0.2, 20.0), sample("000001", 0.21, 20.0)]}
    said = verdict(section_of(tmp_path, "t2i", runs))
    assert "Between a and b these samples show no clear difference." in said
    assert not [one for one in said if "closer" in one]


def test_answers_are_counted_and_differing_words_marked(answered):
    root, section = answered
    assert "1 of 2 answers are the baseline's, letter for letter." in verdict(section)[0]
    assert "0 of 2 answers" in verdict(section)[1]
    page = report_page.page([section], root)
    assert "two <ins>blue</ins> circles" in page


def test_what_users_wrote_is_escaped_and_no_repr_is_shown(drawn, answered):
    root, section = drawn
    for text in (report_page.page([section], root), report_page.page([answered[1]], answered[0])):
        assert "<script>alert" not in text and "&lt;script&gt;alert" in text
        shown = Page(text).text
        assert not re.search(r"\b(True|False|None|inf|nan)\b|\\n|torch\.|\[['\"]", shown)
    markdown = report.markdown([section])
    assert "<script>" not in markdown and "\\<script\\>" in markdown and "second line" in markdown
    assert not re.search(r"\b(True|False|None|inf|nan)\b|\\\\n", markdown)


def test_the_page_is_whole_without_its_neighbours_and_links_to_them(drawn):
    root, section = drawn
    (root / "far" / "quant_report.html").write_text("a page")
    page = Page(report_page.page([section], root))
    assert page.open == []
    pictures = page.of("img")
    assert len(pictures) == 9 + 1 and all(one["src"].startswith("data:image/png;base64,") for one in pictures[:9])
    links = [one["href"] for one in page.of("a")]
    assert "far/quant_report.html" in links and "close/quant_report.html" not in links
    full = [link for link in links if link.endswith(".png")]
    assert len(full) == 9 and all((root / link).is_file() for link in full)


def test_every_measure_is_explained_with_its_direction(drawn, answered):
    for root, section in (drawn, answered):
        text = Page(report_page.page([section], root)).text
        rows = report.metrics_of(section["task"])
        assert all(f"{metric.direction}. {metric.meaning}" in " ".join(text.split()) for metric in rows)


def test_clips_are_strips_and_open_as_clips(tmp_path):
    section = section_of(tmp_path, "t2v", {"int4": [sample("000000", 0.1, 20.0, file="clip one.mp4")]})
    frames = [Image.new("RGB", (32, 32), (40 * index, 0, 0)) for index in range(5)]
    for name in ("baseline", "int4"):
        write_video(tmp_path / name / "clip one.mp4", frames)
    page = Page(report_page.page([section], tmp_path))
    assert [one["href"] for one in page.of("a")] == ["baseline/clip%20one.mp4", "int4/clip%20one.mp4"]
    assert [one["width"] for one in page.of("img")[:2]] == ["160", "160"]  # five frames of 32 pixels


def test_the_terminal_table_fits_80_columns(drawn, answered):
    text = report.summary_table([drawn[1], answered[1]])
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert re.search(r"equal images\s+1 of 3\s+0 of 3", text)
    many = {**drawn[1], "runs": [{**drawn[1]["runs"][0], "name": f"{'long-' * 20}{index}"} for index in range(3)]}
    lines = report.summary_table([many]).splitlines()
    assert max(map(len, lines)) <= 80 and sum(line.strip().startswith("velocity error") for line in lines) == 3


@needs_browser
@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.slow
def test_the_page_fits_a_phone_and_a_desk(drawn, answered, width, tmp_path):
    for root, section in (drawn, answered):
        found = look(report_page.page([section], root), width, tmp_path)
        assert found["width"] == width and found["needed"] <= width and found["wide"] == []
        assert min(found["fonts"]) >= 12
        assert all(cell["overflow"] <= 0 for row in found["rows"] for cell in row)


@needs_browser
@pytest.mark.browser
def test_pictures_open_and_flip_between_the_variants(drawn, tmp_path):
    """A click on the second picture of a sample, the next by a click on the large one, the first by its name."""
    root, section = drawn
    probe = """(() => {
      const pressed = () => page.querySelector("dialog [aria-pressed=true]").textContent;
      const seen = [];
      page.querySelectorAll("article a")[1].click();
      seen.push(page.querySelector("dialog").open, pressed());
      page.querySelector("dialog img").click();
      seen.push(pressed());
      page.querySelectorAll("dialog .names button")[0].click();
      seen.push(pressed());
      return seen;
    })()"""
    found = look(report_page.page([section], root), 390, tmp_path, probe)
    assert found["result"] == [True, "close", "far", "baseline"]
