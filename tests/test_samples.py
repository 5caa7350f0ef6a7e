"""The committed samples: readable by every task, as varied as said, small, and what the script draws."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples import make_samples
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
