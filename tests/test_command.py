"""`lance-quant`: from a prompt to a file in one command, on lance-nano; and a packed folder that is a model."""

import json
import shutil
import subprocess
import sys

import pytest
from PIL import Image

import awq_apply
import nvfp4_apply
from lance_nano import CHECKPOINT
from lance_quant.calibration.activation_stats import ActStats
from lance_quant.cli import command, jobs
from lance_quant.lance.media.video import read_video
from lance_quant.methods import model_card

CLIP = ["--num_frames", "5", "--num_timesteps", "2"]
QUICK = ["--num_timesteps", "2"]


@pytest.fixture
def lance(tmp_path, monkeypatch, capsys):
    """Run the command in an empty folder; what it printed, and what it logged."""
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        command.main([str(flag) for flag in flags])
        return capsys.readouterr().out.splitlines()

    run.fails = lambda *flags: fails(capsys, *flags)
    return run


def fails(capsys, *flags):
    """Exit code 2 and one line on stderr; returns the line."""
    with pytest.raises(SystemExit) as caught:
        command.command([str(flag) for flag in flags])
    err = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and err[-1].startswith("error: "), err
    return err[-1]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Folders of both formats with nothing of the float model beside them but ViT and VAE."""
    root = tmp_path_factory.mktemp("packed")
    ActStats({}, [], [{"run_id": "none", "task": "t2i", "samples": ["a", "b"], "seed": 3}], 0).save(root / "stats.pt")
    for script, name in ((awq_apply, "int4"), (nvfp4_apply, "nvfp4")):
        script.main(["--src", str(CHECKPOINT), "--stats", str(root / "stats.pt"), "--out", str(root / name),
                     "--device", "cpu", *(["--slim"] if name == "nvfp4" else [])])
    for part in ("Qwen2.5-VL-ViT", "Wan2.2_VAE.pth"):
        (root / part).symlink_to(CHECKPOINT.parent / part)
    return root


def test_a_picture_is_named_by_prompt_and_seed_and_tells_its_settings(lance, tmp_path, caplog):
    with caplog.at_level("INFO", "lance_quant"):
        assert lance("draw", "A red circle: left of a blue square!", "--seed", 7, *QUICK) == [
            "a-red-circle-left-of-a-blue-square_7.png"]
    assert "no --model: the small Lance" in caplog.records[0].getMessage()
    picture = Image.open(tmp_path / "a-red-circle-left-of-a-blue-square_7.png")
    assert picture.size == (112, 112)
    told = json.loads(picture.text["lance"])
    assert (told["prompt"], told["seed"], told["num_timesteps"]) == ("A red circle: left of a blue square!", 7, 2)


def test_several_pictures_count_the_seed_up_and_each_can_be_drawn_again_alone(lance, tmp_path):
    assert lance("draw", "two red circles", "--number", 2, "--seed", 3, "--out", "x.png", *QUICK) == ["x_3.png",
                                                                                                   "x_4.png"]
    lance("draw", "two red circles", "--seed", 4, "--out", "alone.png", *QUICK)
    assert Image.open(tmp_path / "alone.png").tobytes() == Image.open(tmp_path / "x_4.png").tobytes()


@pytest.mark.parametrize("name", ["int4", "nvfp4"])
@pytest.mark.slow
def test_a_packed_folder_alone_draws_edits_animates_and_answers(lance, tmp_path, packed, name):
    model = ["--model", packed / name]
    lance("draw", "a red circle", "--out", "a.png", *model)
    assert lance("ask", "a.png", "What color is the circle?", *model) == ["red"]
    assert lance("caption", "a.png", "--max_new_tokens", 8, *model)[0]
    lance("edit", "a.png", "make it green", "--out", "b.png", *QUICK, *model)
    assert Image.open(tmp_path / "b.png").size == (112, 112)
    lance("animate", "it moves", "--out", "a.mp4", *CLIP, *model)
    lance("animate", "it moves", "--picture", "a.png", "--out", "b.mp4", *CLIP, *model)
    lance("edit-video", "a.mp4", "make it green", "--out", "c.mp4", *QUICK, *model)
    assert {read_video(tmp_path / f"{clip}.mp4")[0].size for clip in "abc"} == {(112, 112)}
    assert lance("ask", "a.mp4", "How many circles are there?", "--max_new_tokens", 4, *model)
    assert lance("caption", "a.mp4", "--max_new_tokens", 4, *model)


def test_a_published_folder_needs_the_configuration_of_a_model_folder_and_no_float_weights(lance, tmp_path, packed):
    bare, configs = tmp_path / "bare", tmp_path / "configs"
    bare.mkdir()
    for name in ("awq_meta.json", "awq_state_dict.safetensors"):
        shutil.copy(packed / "int4" / name, bare)
    shutil.copytree(CHECKPOINT, configs, ignore=shutil.ignore_patterns("*.safetensors"))
    vae = ["--vae_path", packed / "Wan2.2_VAE.pth"]
    assert "without llm_config.json and tokenizer" in lance.fails("draw", "x", "--model", bare, *vae)
    lance("draw", "a red circle", "--model", configs, "--packed", bare, *vae, "--out", "a.png", *QUICK)
    lance("draw", "a red circle", "--model", packed / "int4", "--out", "b.png", *QUICK)
    assert Image.open(tmp_path / "a.png").tobytes() == Image.open(tmp_path / "b.png").tobytes()


def test_the_card_says_what_a_folder_is_and_how_it_runs(packed):
    text = (packed / "int4" / model_card.FILE).read_text(encoding="utf-8")
    head, body = text.removeprefix("---\n").split("\n---\n")
    assert "base_model: bytedance-research/Lance\n" in head and "library_name: lance-quant\n" in head
    assert "| bits per quantized weight | 4.3750 |" in body and "- t2i, 2 samples, seed 3" in body
    (line,) = [line for line in body.splitlines() if line.startswith("lance-quant draw")]
    assert "--model THIS_FOLDER" in line
    facts = {"recipe": "ours", "tool": "t", "source_fingerprint": "f", "calibration_runs": []}
    without = model_card.card("int4", facts, 1, 4.375, has_config=False)
    assert "--packed THIS_FOLDER" in without and "- nothing" in without


def test_what_lies_beside_the_source_is_copied_byte_for_byte(packed):
    for name in model_card.NEEDED:
        assert (packed / "int4" / name).read_bytes() == (CHECKPOINT / name).read_bytes()


@pytest.mark.parametrize("flags, message", [
    (["draw", "x", "--num_timesteps", "0"], "num_timesteps 0 must be at least 1"),
    (["draw", "x", "--number", "0"], "number 0 must be at least 1"),
    (["draw", "x", "--seed", "-1"], "seed -1 must be at least 0"),
    (["draw", "x", "--cfg_scale", "nan"], "cfg_scale nan must be"),
    (["draw", "x", "--out", "x.jpg"], "--out x.jpg must end with .png"),
    (["animate", "x", "--out", "x.png"], "--out x.png must end with .mp4"),
    (["draw", "x", "--model", "none"], "none is no Lance model folder"),
    (["draw", "x", "--height", "8"], "height 8"),
    (["draw", "x", "--kernel", "native"], "are for packed weights"),
    (["edit", "none.png", "x"], "none.png is no file"),
    (["ask", "none.png", "x"], "none.png is no file"),
    (["ask", ".", "x"], ". is no file"),
    (["caption", "none.png", "--max_new_tokens", "0"], "max_new_tokens 0 must be at least 1"),
])
def test_mistakes_are_one_line_and_leave_nothing(lance, tmp_path, flags, message):
    assert message in lance.fails(*flags)
    assert list(tmp_path.iterdir()) == []


def samples(tmp_path, name, entries):
    (tmp_path / name).write_text(json.dumps(entries))
    return name


def asked(text, *shown):
    return {"interleave_array": [*shown, text], "istarget_in_interleave": [0] * (len(shown) + 1),
            "element_dtype_array": [*("video" if one.endswith(".mp4") else "image" for one in shown), "text"]}


@pytest.mark.slow
def test_a_sample_file_is_many_requests_with_the_results_of_one_each(lance, tmp_path):
    file = samples(tmp_path, "t2i.json", {"1": "a red circle", "2": "a blue square", "3": "two red circles"})
    assert lance("draw", "--example_json", file, "--limit", 2, "--out", "made", *QUICK) == [
        "made/000001.png", "made/000002.png"]
    assert lance("draw", "--example_json", file, "--limit", 1, "--number", 2, "--seed", 5, *QUICK) == [
        "000001_5.png", "000001_6.png"]
    lance("draw", "a blue square", "--out", "alone.png", *QUICK)
    assert Image.open(tmp_path / "alone.png").tobytes() == Image.open(tmp_path / "made/000002.png").tobytes()


@pytest.mark.slow
def test_sample_files_of_all_seven_tasks_run(lance, tmp_path):
    lance("draw", "a red circle", "--out", "a.png")
    lance("animate", "it moves", "--out", "a.mp4", *CLIP)
    shown = samples(tmp_path, "i.json", {"1": asked("make it green", "a.png")})
    film = samples(tmp_path, "v.json", {"1": asked("make it green", "a.mp4")})
    assert lance("edit", "--example_json", shown, "--out", "e", *QUICK) == ["e/000001.png"]
    assert lance("animate", "--example_json", shown, "--out", "i2v", *CLIP) == ["i2v/000001.mp4"]
    text = samples(tmp_path, "t.json", {"1": "it moves"})
    assert lance("animate", "--example_json", text, "--out", "t2v", *CLIP) == ["t2v/000001.mp4"]
    assert lance("edit-video", "--example_json", film, "--out", "ve", *QUICK) == ["ve/000001.mp4"]
    question = ["You answer.", "What color is the circle?", ""]
    for name, source in (("q.json", "a.png"), ("w.json", "a.mp4")):
        file = samples(tmp_path, name, {"7": asked(question, source)})
        (line,) = lance("ask", "--example_json", file, "--max_new_tokens", 3)
        told = json.loads(line)
        assert (told["key"], told["file"], told["question"]) == ("7", source, question[1]) and told["answer"]
        (line,) = lance("caption", "--example_json", file, "--max_new_tokens", 3)
        assert json.loads(line)["question"] == ""


@pytest.mark.parametrize("flags, message", [
    (["draw", "x", "--example_json", "t.json"], "x and --example_json t.json: give one or the other"),
    (["draw"], "what is asked for is missing"), (["edit", "t.json"], "what is asked for is missing"),
    (["caption"], "what is asked for is missing"),
    (["draw", "x", "--limit", "2"], "--limit 2 is for --example_json"),
    (["draw", "--example_json", "t.json", "--limit", "0"], "limit 0 must be at least 1"),
    (["draw", "--example_json", "none.json"], "none.json"),
    (["draw", "--example_json", "t.json", "--out", "x.png"], "--out x.png must be a folder"),
    (["edit", "--example_json", "t.json"], "is no image_edit sample"),
    (["ask", "--example_json", "t.json"], "is no x2t_image sample"),
])
def test_mistakes_with_sample_files_are_one_line_and_leave_nothing(lance, tmp_path, flags, message):
    samples(tmp_path, "t.json", {"1": "a red circle"})
    assert message in lance.fails(*flags)
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]


def test_nothing_is_overwritten(lance, tmp_path):
    (tmp_path / "x_42.png").write_text("mine")
    assert "x_42.png exists already" in lance.fails("draw", "x", *QUICK)
    assert (tmp_path / "x_42.png").read_text() == "mine"


@pytest.mark.parametrize("prompt, stem", [
    ("", "lance"), ("?!", "lance"), ("日本 の 猫", "日本-の-猫"), ("a/b\\c:d", "a-b-c-d"),
    ("word " * 40, "-".join(["word"] * 12))])
def test_any_prompt_names_a_file(tmp_path, monkeypatch, prompt, stem):
    monkeypatch.chdir(tmp_path)
    assert [path.name for path in jobs.outputs(None, prompt, 1, 1, ".png").values()] == [f"{stem}_1.png"]


def test_help_needs_no_torch():
    code = ("import sys; from lance_quant.cli import command\n"
            "try: command.parse_args(['draw', '--help'])\n"
            "except SystemExit: pass\n"
            "assert not {'torch', 'transformers', 'diffusers'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
