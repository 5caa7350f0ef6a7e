"""`from lance_quant import Pipeline, quantize`: every task on the two small models, and one line for every mistake."""

import ast
import random
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDENS
from PIL import Image

import lance_quant
from lance_nano import CHECKPOINT
from lance_nano.questions import questions as questions_of
from lance_nano.recognise import shows
from lance_nano.scenes import Scene, Thing, render
from lance_quant import InputError, Pipeline, Progress, Sampling, Stopped, quantize
from lance_quant.inference import tasks
from lance_quant.inference.pipeline import CAPTION_SYSTEMS, SamplingOptions
from lance_quant.lance.generation import Sampling as Fields
from lance_quant.lance.media.inputs import frames_of, picture_of
from lance_quant.lance.media.video import read_video

ROOT = Path(__file__).parents[1]
SRC, INPUTS = GOLDENS / "checkpoint" / "Lance_3B", GOLDENS / "inputs"
PACKED = GOLDENS / "published" / "int4_g32"
HOUSE, BALL = INPUTS / "house_1x1.png", INPUTS / "ball_yuv420.mp4"
SMALL = {"height": 48, "width": 64, "num_timesteps": 2}
SCENE = Scene("white", (Thing("circle", "red", "large", 4, 16.0),))


@pytest.fixture(scope="module")
def nano():
    return Pipeline.load(CHECKPOINT, device="cpu")


@pytest.fixture(scope="module")
def tiny():
    """The golden checkpoint: random weights, all parts."""
    return Pipeline.load(SRC, device="cpu")


def pixels(image):
    return np.asarray(image)


# What it does

def test_importing_the_package_imports_no_torch():
    program = ("import sys, lance_quant; dir(lance_quant); print(lance_quant.__version__, [name for name in "
               "('torch', 'numpy', 'PIL', 'transformers') if name in sys.modules])")
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.split(maxsplit=1)[1].strip() == "[]"


def test_the_front_door_and_its_stub_name_the_same():
    stub = ast.parse(Path(lance_quant.__file__ + "i").read_text(encoding="utf-8"))
    named = [alias.asname for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(named) == sorted(lance_quant.__all__)
    assert all(getattr(lance_quant, name) is not None for name in named)
    with pytest.raises(AttributeError, match="no attribute 'Quantise'"):
        lance_quant.Quantise  # noqa: B018


def test_every_field_of_sampling_can_be_given_by_name():
    assert SamplingOptions.__annotations__.keys() == {field.name for field in fields(Fields)}
    assert Sampling is Fields


def test_nano_draws_what_it_is_asked_for(nano):
    seen = []
    picture = nano.draw("a red circle on a white background", height=112, width=112, seed=3, num_timesteps=10,
                        on_step=seen.append)
    assert picture.size == (112, 112) and shows(SCENE, pixels(picture))
    assert seen == [Progress(done, 10, "step") for done in range(1, 11)]


def test_the_first_example_of_the_page_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "docs/python.md", "exec"), {})
    assert shows(SCENE, pixels(Image.open("circle.png"))) and capsys.readouterr().out == "red\n"


def test_a_seed_draws_what_it_draws_in_a_script(tiny):
    settings = tasks.Settings("t2i", height=48, width=64, seed=7, sampling=Sampling(num_timesteps=2))
    (drawn,) = tasks.draw_all(tiny.runtime, [tasks.Prompt("0", "a boat")], settings)
    assert np.array_equal(pixels(tiny.draw("a boat", seed=7, **SMALL)), pixels(tiny.runtime.decode(drawn.latent)))
    assert not np.array_equal(pixels(tiny.draw("a boat", seed=8, **SMALL)), pixels(tiny.runtime.decode(drawn.latent)))


def test_nano_answers_the_same_whatever_holds_the_picture(nano, tmp_path):
    array = render(SCENE)
    Image.fromarray(array).save(tmp_path / "scene.png")
    held = [tmp_path / "scene.png", str(tmp_path / "scene.png"), Image.open(tmp_path / "scene.png"), array,
            array / 255.0, torch.tensor(array)]
    pieces = []
    asked = next(one for one in questions_of(SCENE, random.Random(0)) if one.kind == "colour")
    answers = {nano.ask(picture, asked.text, resolution="image_112res", on_text=pieces.append) for picture in held}
    assert answers == {asked.answer} and "".join(pieces) == asked.answer * len(held)


def test_drawn_answers_follow_their_seed(tiny):
    def answer(seed):
        return tiny.ask(HOUSE, "What is this?", resolution="image_256res", max_new_tokens=8, temperature=1.5, seed=seed)

    assert answer(1) == answer(1) != answer(2)


def test_answers_about_pictures_and_clips_are_the_official_ones(tiny, recorded, questions, x2t):
    first = questions[0]
    assert tiny.ask(first.visual, first.question, system=first.system, resolution="image_256res",
                    max_new_tokens=12) == tiny.runtime.tokenizer.decode(
                        x2t["f32"].meta["generated_ids"][0][:12]).replace("<|im_end|>", "").strip()
    clip = recorded("x2t_video")
    given = tiny.ask_video(clip.sample.visual, clip.sample.question, system=clip.sample.system,
                           resolution="video_192p", max_new_tokens=12)
    assert given == tiny.runtime.tokenizer.decode(clip.meta["generated_ids"][0][:12]).replace("<|im_end|>", "").strip()


def test_captions_take_pictures_and_clips(tiny):
    short = {"max_new_tokens": 3}
    assert tiny.caption(HOUSE, resolution="image_256res", **short) == tiny.ask(
        HOUSE, "", system=CAPTION_SYSTEMS[0].format("image"), resolution="image_256res", **short)
    frames = read_video(BALL)
    assert tiny.caption_video(frames, resolution="image_112res", **short) == tiny.caption_video(
        BALL, resolution="image_112res", **short)


def test_an_edit_has_the_shape_of_its_source(tiny):
    picture = tiny.edit(INPUTS / "hills_16x9.png", "Paint the sky.", resolution="image_112res", num_timesteps=2)
    assert picture.size == (144, 80)


def test_clips_begin_with_a_picture_or_with_a_prompt_alone(tiny, tmp_path):
    clip = tiny.animate(None, "a kite rises", num_frames=5, **SMALL)
    assert len(clip) == 5 and clip[0].size == (64, 48)
    clip.save(tmp_path / "kite.mp4")
    assert len(read_video(tmp_path / "kite.mp4", every=True)) == 5
    assert len(tiny.animate(HOUSE, "it moves", resolution="image_112res", num_frames=5, num_timesteps=1)) == 5


def test_an_edited_clip_is_as_long_as_what_is_seen_of_it(tiny):
    frames = read_video(BALL)
    clip = tiny.edit_video(frames[:8], "Make it red.", resolution="image_112res", num_timesteps=1)
    assert len(clip) == 5 and all(map(np.array_equal, map(pixels, frames_of(BALL)), map(pixels, frames)))


# Packed folders

@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "int4"
    assert quantize(SRC, out, stats=GOLDENS / "published" / "act_stats.pt", group_size=32, recipe="published",
                    device="cpu") == out
    return out


def test_quantize_writes_what_the_script_writes(packed):
    ours, theirs = ((folder / "awq_state_dict.safetensors").read_bytes() for folder in (packed, PACKED))
    assert len(ours) == len(theirs)


@pytest.mark.parametrize("how", [{}, {"mode": "cached"}, {"kernel": "reference"}])
def test_a_packed_folder_draws_in_every_mode(packed, tiny, how):
    pipeline = Pipeline.load(SRC, packed=packed, device="cpu", **how)
    picture = pixels(pipeline.draw("a boat", **SMALL)).astype(int)
    assert not np.array_equal(picture, pixels(tiny.draw("a boat", **SMALL)))
    slow = pixels(Pipeline.load(SRC, packed=packed, device="cpu", kernel="reference").draw("a boat", **SMALL))
    assert abs(picture - slow).max() <= 2  # kernels sum in another order; 2 levels of 255 after the VAE


def test_a_packed_folder_with_config_and_tokenizer_is_a_model(packed, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(packed, folder)
    (folder / "llm_config.json").unlink()  # as folders were that were made before they held it
    with pytest.raises(InputError, match="packed weights alone.*packed="):
        Pipeline.load(folder)
    shutil.copy(SRC / "llm_config.json", folder)
    shutil.copytree(SRC.parent / "Qwen2.5-VL-ViT", folder / "Qwen2.5-VL-ViT")
    alone = Pipeline.load(folder, vae=SRC.parent / "Wan2.2_VAE.pth", device="cpu")
    beside = Pipeline.load(SRC, packed=packed, device="cpu")
    assert np.array_equal(pixels(alone.draw("a boat", **SMALL)), pixels(beside.draw("a boat", **SMALL)))
    assert alone.ask(HOUSE, "What?", max_new_tokens=4) == beside.ask(HOUSE, "What?", max_new_tokens=4)


# Stopping, threads

def test_a_request_can_be_stopped_between_steps_and_the_next_one_runs(tiny):
    seen = []

    def on_step(progress):
        seen.append(progress.done)
        if progress.done == 2:
            tiny.stop()

    with pytest.raises(Stopped, match="stopped after 2 of 9 steps"):
        tiny.draw("a boat", height=48, width=64, num_timesteps=9, on_step=on_step)
    with pytest.raises(Stopped, match="stopped after 3 of 256 tokens"):
        tiny.ask(HOUSE, "What?", resolution="image_256res", on_step=lambda progress: progress.done == 3 and tiny.stop())
    assert seen == [1, 2]
    tiny.draw("a boat", **SMALL)


def test_what_a_callback_raises_ends_the_request(tiny):
    def fail(_):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        tiny.draw("a boat", **SMALL, on_step=fail)
    tiny.draw("a boat", **SMALL)


def test_threads_take_turns_and_get_their_own_pictures(tiny):
    alone = [pixels(tiny.draw("a boat", seed=seed, **SMALL)) for seed in range(3)]
    running, most, found = [], [], {}

    def draw(seed):
        def on_step(progress):
            running.append(seed)
            most.append(len(set(running)))
            if progress.done == progress.total:
                running[:] = []

        found[seed] = pixels(tiny.draw("a boat", seed=seed, **SMALL, on_step=on_step))

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[seed], alone[seed]) for seed in range(3)) and max(most) == 1


def test_a_request_from_within_a_request_is_refused(tiny):
    with pytest.raises(InputError, match="at work"):
        tiny.draw("a boat", **SMALL, on_step=lambda _: tiny.draw("another", **SMALL))
    tiny.draw("a boat", **SMALL)


# Mistakes

@pytest.mark.parametrize("arguments, message", [
    ({"prompt": 3}, "prompt 3 must be a text, not a int"),
    ({"prompt": None}, "prompt None must be a text"),
    ({"height": 8}, "height 8 and width 64: each side must be 16 to 1024"),
    ({"height": 48.0}, "height 48.0 must be a whole number"),
    ({"width": True}, "width True must be a whole number"),
    ({"seed": -1}, "seed -1 must be at least 0"),
    ({"seed": 2**63}, r"seed 9223372036854775808 must be at least 0 and below 2\*\*63"),
    ({"seed": None}, "seed None must be a whole number"),
    ({"num_timesteps": 0}, "num_timesteps 0 must be at least 1"),
    ({"num_timesteps": "4"}, "num_timesteps '4' must be a whole number"),
    ({"cfg_scale": float("nan")}, "cfg_scale nan must be at least 0 and at most 1000"),
    ({"cfg_scale": 10**400}, "cfg_scale inf must be at least 0 and at most 1000"),
    ({"cfg_scale": -1}, "cfg_scale -1.0 must be at least 0"),
    ({"timestep_shift": 0}, "timestep_shift 0.0 must be at least 1e-06"),
    ({"cfg_low": 0.9, "cfg_high": 0.4}, "cfg_interval 0.9 0.4"),
    ({"cfg_renorm": "all"}, "cfg_renorm 'all' must be one of global, channel, none"),
    ({"solver": ["euler"]}, "solver .* must be one of euler, ab2"),
])
def test_impossible_pictures_are_refused_in_one_line(tiny, arguments, message):
    with pytest.raises(InputError, match=message) as raised:
        tiny.draw(**({"prompt": "a boat"} | SMALL | arguments))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("arguments, message", [
    ({"question": b"What?"}, "question .* must be a text"),
    ({"max_new_tokens": 0}, "max_new_tokens 0 must be at least 1"),
    ({"temperature": -0.5}, "temperature -0.5 must be at least 0"),
    ({"top_p": 0}, "top_p 0 must be above 0"),
    ({"top_p": 1.01}, "top_p 1.01 must be at least 0 and at most 1"),
    ({"resolution": "image_1res"}, "resolution 'image_1res' must be one of image_112res"),
    ({"picture": "nowhere.png"}, "image not found: nowhere.png"),
    ({"picture": None}, "a picture must be a path, a PIL image or an array"),
    ({"picture": np.zeros((3, 8, 8), np.uint8)}, r"\[height, width, 3\], not \[3, 8, 8\]"),
    ({"picture": np.zeros((0, 8, 3), np.uint8)}, r"not \[0, 8, 3\]"),
    ({"picture": np.zeros((8, 8, 3), np.int64)}, "uint8 in 0..255 or floating point"),
    ({"picture": np.full((8, 8), np.nan)}, "finite, and this one has values from nan"),
    ({"picture": np.full((8, 8, 3), 200.0)}, "in 0..1 and finite, and this one has values from 200"),
    ({"picture": Image.new("RGB", (0, 4))}, "0 x 4 pixels"),
])
def test_impossible_questions_are_refused_in_one_line(tiny, arguments, message):
    with pytest.raises(InputError, match=message) as raised:
        tiny.ask(**({"picture": HOUSE, "question": "What?", "max_new_tokens": 1} | arguments))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("video, message", [
    ([], "0 frames"),
    (HOUSE, "video"),
    (Image.new("RGB", (8, 8)), r"must be a path or frames.*\[picture\]"),
    (7, "must be a path or frames, not a int"),
    ([np.zeros((8, 8)), np.zeros((8, 9)), np.zeros((8, 8)), np.zeros((8, 9)), np.zeros((8, 9))], "of one size"),
])
def test_impossible_clips_are_refused(tiny, video, message):
    with pytest.raises(InputError, match=message):
        tiny.edit_video(video, "Make it red.", num_timesteps=1)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), True, "12"])
def test_impossible_frame_rates_are_refused(fps):
    with pytest.raises(InputError, match="fps"):
        frames_of([np.zeros((8, 8))] * 5, fps)


def test_frames_are_thinned_to_twelve_a_second():
    frames = np.arange(24 * 16, dtype=np.uint8).reshape(24, 4, 4).repeat(3, -1).reshape(24, 4, 4, 3)
    assert len(frames_of(frames, 24)) == 9 and len(frames_of(frames, 12)) == 21
    assert picture_of(frames[0]).size == (4, 4)


@pytest.mark.parametrize("arguments, message", [
    ({"height": 48}, "takes its size from the picture"),
    ({"num_frames": 122}, "num_frames 122 must be 1 to 121"),
    ({"picture": None, "resolution": "video_192p"}, "give height and width"),
])
def test_a_clip_takes_its_size_from_one_place(tiny, arguments, message):
    with pytest.raises(InputError, match=message):
        tiny.animate(**({"picture": HOUSE, "prompt": "it moves", "num_timesteps": 1} | arguments))


@pytest.mark.parametrize("arguments, message", [
    ({"model": "nowhere"}, "nowhere is no Lance model folder"),
    ({"model": None}, "model None must be a path"),
    ({"model": ""}, "model '' must be a path"),
    ({"device": "tpu9"}, "device 'tpu9' is no torch device"),
    ({"device": "cuda:99"}, "torch sees . CUDA devices"),
    ({"dtype": "float16"}, "dtype 'float16' must be one of auto, float32, bfloat16"),
    ({"kernel": "fast"}, "kernel 'fast' must be one of auto"),
    ({"kernel": "reference"}, "are for packed weights, and .* has none"),
    ({"mode": "cached"}, "are for packed weights"),
    ({"offload": "disk"}, "offload 'disk' must be one of none"),
    ({"fix_quirks": "yes"}, "fix_quirks 'yes' must be True or False"),
    ({"packed": HOUSE.parent}, "meta"),
    ({"vae": "nowhere.pth"}, "VAE file not found: nowhere.pth"),
])
def test_impossible_models_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Pipeline.load(**({"model": SRC} | arguments))


def test_parts_that_a_task_needs_are_asked_for_by_name(tmp_path):
    shutil.copytree(SRC, tmp_path / "alone" / "Lance_3B")
    pipeline = Pipeline.load(tmp_path / "alone" / "Lance_3B", device="cpu")
    with pytest.raises(InputError, match="VAE not found: .*vae="):
        pipeline.draw("a boat", **SMALL)
    with pytest.raises(InputError, match="ViT not found: .*vit="):
        pipeline.ask(HOUSE, "What?")


def test_a_clip_is_saved_as_mp4_only(tmp_path):
    with pytest.raises(InputError, match="must end with .mp4"):
        lance_quant.inference.pipeline.Clip([Image.new("RGB", (16, 16))]).save(tmp_path / "clip.gif")


@pytest.mark.parametrize("arguments, message", [
    ({"format": "int3"}, "format 'int3' must be one of int4, nvfp4"),
    ({"group_size": 0}, "group_size 0 must be at least 1"),
    ({"format": "nvfp4", "group_size": 64}, "NVFP4 has blocks of 16"),
    ({"slim": True}, "slim is a layout of nvfp4"),
    ({"head_bits": 4}, "head_bits 4 must be 8 or 16"),
    ({"recipe": "theirs"}, "recipe 'theirs' must be one of ours, published"),
    ({"captures": "t2i.safetensors"}, "must be a list of paths"),
    ({"captures": ["t2i.safetensors"], "recipe": "published"}, "no place in the published recipe"),
    ({"bits_budget": float("nan")}, "bits_budget nan"),
    ({"stats": "nowhere.pt"}, "nowhere.pt"),
    ({"resume": 1}, "resume 1 must be True or False"),
])
def test_impossible_conversions_are_refused_and_write_nothing(tmp_path, arguments, message):
    known = {"src": SRC, "out": tmp_path / "out", "stats": GOLDENS / "published" / "act_stats.pt", "device": "cpu"}
    with pytest.raises(InputError, match=message):
        quantize(**(known | arguments))
    assert not list(tmp_path.iterdir())
