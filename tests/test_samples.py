"""The committed samples: readable by every task, as varied as said, small, and what the script draws."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples import make_samples
from lance_quant.errors import InputError
from lance_quant.lance.config import LATENT_STRIDE, MAX_LATENT_SIZE
from lance_quant.lance.media import samples, vision

FOLDER = Path(__file__).parent.parent / "examples" / "samples"
LEAST = {"x2t_image": 32, "x2t_video": 8, "t2i": 64, "t2v": 8, "i2v": 4, "image_edit": 8, "video_edit": 4}


@pytest.mark.parametrize("task", samples.TASKS)
def test_every_task_has_readable_samples(task):
    found = samples.load(task, FOLDER / f"{task}.json")
    assert len(found) >= LEAST[task]
    assert len({(getattr(one, "text", None) or one.question, one.visual) for one in found}) == len(found)


@pytest.mark.parametrize("task", ["i2v", "image_edit", "video_edit"])
def test_no_source_is_too_wide_for_the_default_resolution(task):
    _, base = vision.RESOLUTIONS[samples.TASKS[task].resolution]
    for prompt in samples.load(task, FOLDER / f"{task}.json"):
        (frame, *_) = samples.open_visual(prompt.visual, samples.TASKS[task].takes)
        assert max(vision.bucket(*frame.size, base)) <= MAX_LATENT_SIZE * LATENT_STRIDE


def test_prompts_vary_in_length_and_language():
    prompts = list(json.loads((FOLDER / "t2i.json").read_text(encoding="utf-8")).values())
    lengths = sorted(map(len, prompts))
    assert lengths[0] < 10 and lengths[-1] > 200
    assert sum(not prompt.isascii() for prompt in prompts) >= 7


def test_samples_are_small():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) < 1_500_000


def test_the_script_draws_what_is_committed(tmp_path):
    make_samples.main(["--out", str(tmp_path / "samples")])
    drawn = sorted((tmp_path / "samples").rglob("*.*"))
    assert len(drawn) == 5 + len(make_samples.PICTURES) + len(make_samples.CLIPS)
    for path in drawn:
        committed = FOLDER / path.relative_to(tmp_path / "samples")
        if path.suffix == ".json":
            assert path.read_text(encoding="utf-8") == committed.read_text(encoding="utf-8")
        elif path.suffix == ".png":  # the font's edges may differ between versions of FreeType
            ours, theirs = (np.array(Image.open(one)).astype(int) for one in (path, committed))
            assert ours.shape == theirs.shape and np.abs(ours - theirs).mean() < 1


def test_official_sample_files_find_their_pictures_from_the_checkout(tmp_path):
    """They lie in config/examples and name assets/… from the root of the checkout, two folders up."""
    (tmp_path / "config/examples").mkdir(parents=True)
    (tmp_path / "assets").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "assets/case.png")
    entry = {"interleave_array": ["assets/case.png", ["look", "what is it?", "black"]],
             "element_dtype_array": ["image", "text"], "istarget_in_interleave": [0, 1]}
    manifest = tmp_path / "config/examples/x2t_image_example.json"
    manifest.write_text(json.dumps({"0001": entry}), encoding="utf-8")
    (question,) = samples.load("x2t_image", manifest)
    assert question.visual == tmp_path / "assets/case.png"


# Official evaluation manifests: first lines of GenEVAL.jsonl and DPG.jsonl (shortened), an entry of GEdit_en.json.
GENEVAL = """{"index": 0, "data": "a photo of a bench", "additional_info": {"tag": "single_object"}}
{"index": 1, "data": "a photo of a cow", "additional_info": {"tag": "single_object"}}
"""
DPG = """{"index": "0", "data": "An expansive field"}

{"index": "10", "data": "Three ripe eggplants"}
{"index": "COCOval2014000000010363", "data": "An immaculate white vanity desk"}"""


def edit_entry(*pictures, targets):
    return {"interleave_array": ["Change the background.", *pictures],
            "element_dtype_array": ["text", *["image"] * len(pictures)], "istarget_in_interleave": targets,
            "additional_info": {"task_type": "background_change"}}


@pytest.mark.parametrize(("text", "keys", "last"), [
    (GENEVAL, ["000000", "000001"], "a photo of a cow"),
    (DPG, ["000000", "000010", "COCOval2014000000010363"], "An immaculate white vanity desk"),
    ('{"index": 7, "data": "alone"}', ["000007"], "alone")])
def test_json_lines_are_read_as_they_are(tmp_path, text, keys, last):
    (tmp_path / "prompts.jsonl").write_text(text)
    found = samples.load("t2i", tmp_path / "prompts.jsonl")
    assert [one.key for one in found] == keys and found[-1].text == last


@pytest.mark.parametrize(("text", "message"), [
    (GENEVAL + '{"index": 2, "da', "line 3 is not valid JSON"), (GENEVAL + "[]", "line 3: must be a JSON object"),
    (GENEVAL + '{"index": 1, "data": "again"}', "line 3: index 1 is there already"),
    (GENEVAL.replace('"a photo of a cow"', "[1]"), "entry '1' must map a number to a prompt string"),
    ('{"index": "../a", "data": "x"}', "entry '../a' must be a number"),
    ('{"index": ".a", "data": "x"}', "entry '.a' must be a number"), ("", "is not valid JSON"),
    ("\n\n", "is not valid JSON")])
def test_broken_json_lines_are_refused_by_line(tmp_path, text, message):
    (tmp_path / "prompts.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        samples.load("t2i", tmp_path / "prompts.jsonl")


def test_an_edits_target_picture_is_no_source(tmp_path):
    """As in the repository of GEdit_en.json: pictures are named from its top, three folders above the manifest."""
    folder = tmp_path / "benchmarks" / "image_gen" / "GEdit"
    (folder / "images").mkdir(parents=True)
    for name in ("source", "target"):
        Image.new("RGB", (64, 64)).save(folder / "images" / f"{name}.png")
    source, target = (f"./benchmarks/image_gen/GEdit/images/{name}.png" for name in ("source", "target"))
    (folder / "GEdit_en.json").write_text(json.dumps({"0040": edit_entry(source, target, targets=[0, 0, 1])}))
    (prompt,) = samples.load("image_edit", folder / "GEdit_en.json")
    assert prompt.key == "000040" and prompt.visual == tmp_path / source and prompt.named == "image"


@pytest.mark.parametrize(("entry", "message"), [
    (edit_entry("b.png", targets=[0, 1]), "beside targets it lists text"),
    (edit_entry("a.png", "b.png", targets=[0, 0, 0]), "beside targets it lists text, image, image"),
    (edit_entry("a.png", "b.png", targets=[0, 1, 1]), "beside targets it lists text"),
    (edit_entry("a.png", targets=[0]), "its lists differ in length"),
    (edit_entry("a.png", targets=None), "must be a valid list"), ([], "must be a JSON object"),
    ({"interleave_array": "a.png"}, "it lacks")])
def test_edits_without_exactly_one_source_are_refused(tmp_path, entry, message):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    (tmp_path / "edits.json").write_text(json.dumps({"1": entry}))
    with pytest.raises(InputError, match=message):
        samples.load("image_edit", tmp_path / "edits.json")


def test_a_reference_answer_is_a_target_and_stays(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    entry = {"interleave_array": ["a.png", ["S", "Q", "A"]], "element_dtype_array": ["image", "text"],
             "istarget_in_interleave": [0, 1]}
    (tmp_path / "questions.json").write_text(json.dumps({"1": entry}))
    (question,) = samples.load("x2t_image", tmp_path / "questions.json")
    assert question.reference == "A"
