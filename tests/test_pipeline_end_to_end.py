"""All stages through their command lines on the golden checkpoint: outputs are compared, not files' existence."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import GOLDENS, recording, relative
from PIL import Image
from safetensors.torch import load_file, save_file

import awq_apply
import awq_calibrate_single
import awq_merge_stats
import nvfp4_apply
import run_baseline
import run_quant_eval
from lance_quant.calibration.activation_stats import ActStats
from lance_quant.cli import task_arguments
from lance_quant.errors import InputError
from lance_quant.evaluation.run_folder import open_made
from lance_quant.formats.packed_folder import PackedFolder
from lance_quant.inference.request import ModelSource
from lance_quant.lance.media import samples
from lance_quant.lance.media.samples import TASKS
from lance_quant.lance.vit import load_vit

MODEL = ["--model_path", str(GOLDENS / "checkpoint" / "Lance_3B")]
T2I = ["--task", "t2i", *MODEL, "--example_json", str(GOLDENS / "inputs" / "t2i.json"), "--video_height", "96",
       "--video_width", "128"]
X2T = ["--task", "x2t_image", *MODEL, "--example_json", str(GOLDENS / "inputs" / "x2t_image.json"), "--resolution",
       "image_256res"]
STEPS = ["--validation_num_timesteps", "6"]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Every stage, run once, in order."""
    work = tmp_path_factory.mktemp("work")
    awq_calibrate_single.main([*T2I, "--num_timesteps", "6", "--out", str(work / "t2i.pt")])
    awq_calibrate_single.main([*X2T, "--out", str(work / "x2t.pt")])
    awq_merge_stats.main(["--inputs", str(work / "t2i.pt"), str(work / "x2t.pt"), "--out", str(work / "all.pt")])
    source = ["--src", MODEL[1], "--stats", str(work / "all.pt"), "--device", "cpu"]
    awq_apply.main([*source, "--group_size", "32", "--out", str(work / "int4")])
    nvfp4_apply.main([*source, "--out", str(work / "nvfp4")])
    for name, task in (("t2i", [*T2I, *STEPS]), ("x2t", [*X2T, "--max_new_tokens", "24"])):
        run_baseline.main([*task, "--save_latents", "--save_path_gen", str(work / f"bf_{name}")])
        run_quant_eval.main([*task, "--awq_dir", str(work / "int4"), str(work / "nvfp4"), "--baseline",
                             str(work / f"bf_{name}"), "--save_latents", "--save_path_gen", str(work / f"q_{name}")])
    return work


@pytest.mark.parametrize("task", ["t2i", "x2t"])
def test_calibration_measures_what_the_official_run_showed(work, task, t2i, x2t):
    """Sums and maxima of every linear within 1e-4 relative, token counts exactly; no other linear has data."""
    official = (t2i if task == "t2i" else x2t)["f32"].tensors
    measured = ActStats.load(work / f"{task}.pt").linears
    names = {key[4:].rsplit(".", 1)[0] for key in official if key.startswith("act.") and key.endswith("n_tokens")
             and official[key].item() > 0}
    assert set(measured) == names
    for name in names:
        assert measured[name].n_tokens == official[f"act.{name}.n_tokens"].item()
        for key in ("sum_abs", "sum_sq", "max_abs"):
            assert relative(getattr(measured[name], key), official[f"act.{name}.{key}"]) < 1e-4


def test_baseline_pictures_equal_the_official_ones(work):
    for name in ("000000", "000001"):
        ours = torch.frombuffer(bytearray(Image.open(work / f"bf_t2i/{name}.png").tobytes()), dtype=torch.uint8)
        theirs = Image.open(GOLDENS / f"outputs/t2i.{name}.png").tobytes()
        assert (ours.int() - torch.frombuffer(bytearray(theirs), dtype=torch.uint8).int()).abs().max() <= 1


def test_noise_is_bit_identical_between_baseline_and_quantized_runs(work):
    baseline = load_file(work / "bf_t2i/latents.safetensors")
    for name in ("int4", "nvfp4"):
        run = load_file(work / f"q_t2i/{name}/latents.safetensors")
        for key in ("000000", "000001"):
            assert torch.equal(run[f"{key}.x"][0], baseline[f"{key}.x"][0])
            assert not torch.equal(run[f"{key}.x"][1], baseline[f"{key}.x"][1])


def test_quantized_runs_are_close_to_their_baseline_and_not_equal(work):
    """Random weights have no structure to protect: 4 bits cost 15 to 30 % per velocity here (int4 0.21, nvfp4 0.23)."""
    (section,) = json.loads((work / "q_t2i/comparison.json").read_text())
    for run in section["runs"]:
        assert 0.02 < run["summary"]["velocity_error"] < 0.35
        assert all(sample["same_noise"] for sample in run["samples"])
        assert len(run["samples"][0]["velocity_errors"]) == 6
    (section,) = json.loads((work / "q_x2t/comparison.json").read_text())
    for run in section["runs"]:
        assert 1e-4 < run["summary"]["kl"] < 0.3
        assert 0 <= run["summary"]["top1"] <= 1


def test_reports_hold_every_run_and_need_no_other_file(work):
    for task, pictures in (("t2i", 6), ("x2t", 3)):
        page = (work / f"q_{task}/report.html").read_text()
        assert page.count('src="data:image/png;base64,') == pictures == page.count("<img") - 1  # that of the viewer
        assert "int4" in page and "nvfp4" in page and "http" not in page
        table = (work / f"q_{task}/report.md").read_text()
        assert re.search(r"\| int4 \| 0\.40 MB \| 3\.\d\d x \| 4\.75 \|", table)


def test_run_json_says_what_ran_where_and_how_long(work):
    run = json.loads((work / "q_t2i/int4/run.json").read_text())
    assert run["settings"]["num_timesteps"] == 6 and run["dtype"] == "float32"
    assert set(run["seconds"]) == set(run["peak_memory_bytes_by_stage"]) == {"load", "run", "decode"}
    assert run["peak_memory_bytes"]["host"] == run["peak_memory_bytes_by_stage"]["decode"]["host"] > 1e6
    assert run["model"]["format"] == "int4" and run["versions"]["torch"] == str(torch.__version__)
    assert run["kernels"] and all(path.startswith(("native", "reference")) for path in run["kernels"])
    assert json.loads((work / "bf_t2i/run.json").read_text())["kernels"] == {}


@pytest.mark.parametrize(("mode", "kernel", "ran"), [("ondemand", "auto", None), ("ondemand", "reference", "reference"),
                                                     ("cached", "auto", "")])
def test_both_modes_and_all_kernels_give_the_same_answers(work, mode, kernel, ran, tmp_path):
    task = [*X2T, "--max_new_tokens", "24"]
    run_quant_eval.main([*task, "--awq_dir", str(work / "int4"), "--mode", mode, "--kernel", kernel,
                         "--baseline", str(work / "bf_x2t"), "--save_path_gen", str(tmp_path / "q")])
    if ran is not None:
        assert " ".join(json.loads((tmp_path / "q/int4/run.json").read_text())["kernels"]) == ran
    ours, theirs = ((folder / "result.json").read_text() for folder in (tmp_path / "q/int4", work / "q_x2t/int4"))
    assert ours == theirs
    assert not list(tmp_path.rglob("*.safetensors"))  # --save_latents was not asked for


def test_a_kernel_that_cannot_run_is_refused_before_the_float_model_runs(work, tmp_path, monkeypatch):
    monkeypatch.setattr(ModelSource, "load_to_run", None)
    with pytest.raises(InputError, match="kernel triton cannot run .* on cpu"):
        run_quant_eval.main([*X2T, "--awq_dir", str(work / "int4"), "--kernel", "triton", "--save_path_gen",
                             str(tmp_path / "q")])
    assert not (tmp_path / "q").exists()


def test_a_kernel_for_unpacked_weights_is_said_to_do_nothing(work, tmp_path, caplog):
    run_quant_eval.main([*X2T, "--limit", "1", "--max_new_tokens", "1", "--awq_dir", str(work / "int4"), "--mode",
                         "cached", "--kernel", "triton", "--save_path_gen", str(tmp_path / "q")])
    assert "of no effect with --mode cached: --kernel" in caplog.text


def test_without_a_baseline_the_float_model_runs_first(work, tmp_path):
    run_quant_eval.main([*T2I, *STEPS, "--limit", "1", "--awq_dir", str(work / "int4"), "--save_path_gen",
                         str(tmp_path / "q")])
    (ours,) = json.loads((tmp_path / "q/comparison.json").read_text())
    (theirs,) = json.loads((work / "q_t2i/comparison.json").read_text())
    assert ours["runs"][0]["samples"][0]["velocity_errors"] == theirs["runs"][0]["samples"][0]["velocity_errors"]


def test_published_folders_run(tmp_path):
    """What the published scripts wrote loads as it is; NVFP4 without a global scale too."""
    published = [str(GOLDENS / "published" / name) for name in ("int4_g64", "nvfp4")]
    run_quant_eval.main([*T2I, *STEPS, "--limit", "1", "--awq_dir", *published, "--save_path_gen", str(tmp_path / "q")])
    (section,) = json.loads((tmp_path / "q/comparison.json").read_text())
    assert all(0.02 < run["summary"]["velocity_error"] < 0.5 for run in section["runs"])


def test_two_questions_about_one_picture_are_two_answers_and_one_line_manifests_work(tmp_path):
    picture = str(GOLDENS / "inputs" / "shapes_4x3.png")
    entries = {key: {"interleave_array": [picture, ["Answer.", question, ""]], "element_dtype_array": ["image", "text"],
                     "istarget_in_interleave": [0, 1]} for key, question in (("1", "How many?"), ("2", "Which?"))}
    (tmp_path / "one_line.json").write_text(json.dumps(entries))
    run_baseline.main(["--task", "x2t_image", *MODEL, "--example_json", str(tmp_path / "one_line.json"), "--resolution",
                       "image_112res", "--max_new_tokens", "4", "--save_path_gen", str(tmp_path / "r")])
    results = json.loads((tmp_path / "r/result.json").read_text())
    assert [row["question"] for row in results] == ["How many?", "Which?"]
    assert set(json.loads((tmp_path / "r/prompt.json").read_text())) == {"shapes_4x3.png", "shapes_4x3.png#2"}


@pytest.mark.parametrize("change, message", [
    (["--seed", "7"], "seed 42 there and 7 here"),
    (["--cfg_scale", "2"], "cfg_scale 4.0 there and 2.0 here"),
    (["--limit", "1"], "other samples"),
])
def test_a_baseline_with_other_settings_is_refused(work, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        run_quant_eval.main([*T2I, *STEPS, *change, "--awq_dir", str(work / "int4"), "--baseline",
                             str(work / "bf_t2i"), "--save_path_gen", str(tmp_path / "q")])
    assert list(tmp_path.iterdir()) == []


def test_a_baseline_without_traces_says_how_to_make_one(work, tmp_path):
    shutil.copytree(work / "bf_t2i", tmp_path / "b")
    (tmp_path / "b/latents.safetensors").unlink()
    with pytest.raises(InputError, match="run_baseline.py --save_latents"):
        run_quant_eval.main([*T2I, *STEPS, "--awq_dir", str(work / "int4"), "--baseline", str(tmp_path / "b"),
                             "--save_path_gen", str(tmp_path / "q")])


def test_a_packed_file_with_a_tensor_too_few_is_refused(work, tmp_path):
    """A missing pass-through tensor is the loader's to find: the folder itself is consistent."""
    shutil.copytree(work / "int4", tmp_path / "int4")
    with PackedFolder(tmp_path / "int4") as folder:
        path = folder.checkpoint.path
    tensors = load_file(path)
    del tensors["vae2llm.bias"]
    save_file(tensors, path)
    with pytest.raises(InputError, match=r"1 tensors missing \(first \['vae2llm.bias'\]"):
        run_quant_eval.main([*T2I, *STEPS, "--awq_dir", str(tmp_path / "int4"), "--baseline", str(work / "bf_t2i"),
                             "--save_path_gen", str(tmp_path / "q")])


@pytest.mark.parametrize("flags, message", [
    (["--task", "t2j"], "invalid choice: 't2j'"),
    (["--task", "t2i", "--example_json", "none.json"], "sample file not found: none.json"),
    (["--task", "t2i", "--validation_num_timesteps", "0"], "num_timesteps 0 must be at least 1"),
    (["--task", "t2i", "--device", "cuda:99"], "device cuda:99: this torch sees"),
    (["--task", "t2i", "--video_height", "5000"], "each side must be 16 to 1024 pixels"),
    (["--task", "t2i", "--vae_path", "none.pth"], "VAE file not found: none.pth"),
])
def test_user_mistakes_end_with_one_line_and_code_2(ended, tmp_path, flags, message):
    defaults = {"--example_json": str(GOLDENS / "inputs" / "t2i.json"), "--save_path_gen": str(tmp_path / "r")}
    given = [item for pair in defaults.items() if pair[0] not in flags for item in pair]
    code, said = ended(run_baseline.main, *MODEL, *given, *flags)
    assert code == 2
    assert message in said.splitlines()[-1] and "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content, message", [
    ("{}", "holds no samples"),
    ("[1]", "must be a JSON object"),
    ("{", "not valid JSON"),
    ('{"picture.png": "a"}', "entry 'picture.png' must be a number such as"),
    ('{"1.png": ["a"]}', "entry '1.png' must map a number to a prompt string"),
    ('{"1.png": "a", "01.png": "b"}', "two entries have the same number"),
])
def test_bad_prompt_files_are_refused(tmp_path, content, message):
    (tmp_path / "prompts.json").write_text(content)
    with pytest.raises(InputError, match=re.escape(message)):
        run_baseline.main(["--task", "t2i", *MODEL, "--example_json", str(tmp_path / "prompts.json"), "--save_path_gen",
                           str(tmp_path / "r")])


def test_bad_question_files_are_refused(tmp_path):
    entry = {"interleave_array": ["none.png", ["S", "Q", "A"]], "element_dtype_array": ["image", "text"]}
    for change, message in (({}, r"image none\.png of .* not found"),
                            ({"element_dtype_array": ["image"]}, "is no x2t_image sample"),
                            ({"interleave_array": ["none.png", ["S", "Q"]]}, "is no x2t_image sample")):
        (tmp_path / "q.json").write_text(json.dumps({"1": entry | change}))
        with pytest.raises(InputError, match=message):
            run_baseline.main(["--task", "x2t_image", *MODEL, "--example_json", str(tmp_path / "q.json"),
                               "--save_path_gen", str(tmp_path / "r")])


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lance_quant.lance.runtime.Runtime.decode_frames", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_baseline.main([*T2I, *STEPS, "--save_path_gen", str(tmp_path / "r")])
    assert list(tmp_path.iterdir()) == []


def test_outputs_are_never_overwritten(work):
    before = (work / "bf_t2i/run.json").read_text()
    with pytest.raises(InputError, match="exists already"):
        run_baseline.main([*T2I, *STEPS, "--save_path_gen", str(work / "bf_t2i")])
    assert (work / "bf_t2i/run.json").read_text() == before


SIZES = {"t2v": ["--video_height", "96", "--video_width", "128", "--num_frames", "6"],
         "i2v": ["--resolution", "video_192p", "--num_frames", "6"],
         "image_edit": ["--resolution", "image_256res"], "video_edit": ["--resolution", "video_192p"],
         "x2t_video": ["--resolution", "video_192p", "--max_new_tokens", "8"]}
MADE = {"t2v": "000000.mp4", "i2v": "000001.mp4", "image_edit": "000001.png", "video_edit": "000001.mp4"}


def flags(task: str) -> list[str]:
    return ["--task", task, *MODEL, "--example_json", str(GOLDENS / "inputs" / f"{task}.json"), *SIZES[task]]


@pytest.fixture(scope="module", params=SIZES)
def ran(request, work, tmp_path_factory) -> tuple[str, Path]:
    """Every other task through a baseline and a quantized run; two steps, as only the way through is tested here."""
    task, folder = request.param, tmp_path_factory.mktemp(request.param)
    how = [*flags(task), "--validation_num_timesteps", "2"]
    run_baseline.main([*how, "--save_latents", "--save_path_gen", str(folder / "bf")])
    run_quant_eval.main([*how, "--awq_dir", str(work / "int4"), "--baseline", str(folder / "bf"), "--save_path_gen",
                         str(folder / "q")])
    return task, folder


def test_every_task_runs_and_compares_with_its_own_noise_and_source(ran):
    task, folder = ran
    (section,) = json.loads((folder / "q/comparison.json").read_text())
    (run,) = section["runs"]
    if task == "x2t_video":
        assert 1e-4 < run["summary"]["kl"] < 0.3
    else:
        assert 0.02 < run["summary"]["velocity_error"] < 0.5 and run["samples"][0]["same_noise"]
        assert 5 < run["summary"]["psnr"] < 60
        assert run["samples"][0]["velocity_errors"][0] > 0


def test_every_task_writes_the_official_names_and_sizes(ran):
    task, folder = ran
    if task == "x2t_video":
        (row,) = json.loads((folder / "bf/result.json").read_text())
        assert row["video"].endswith("ball_yuv420.mp4")
        assert list(json.loads((folder / "bf/prompt.json").read_text())) == ["ball_yuv420.mp4"]
        return
    official = recording(task, "f32")
    assert json.loads((folder / "bf/prompt.json").read_text()) == official.meta["prompt.json"]
    frames = open_made(folder / "bf" / MADE[task])
    _, count, height, width = official.tensors["s0.decoded.0"].shape
    assert len(frames) == count and frames[0].size == (width, height)


def test_reports_show_clips_as_strips_and_need_no_other_file(ran):
    task, folder = ran
    page = (folder / "q/report.html").read_text()
    pictures = {"x2t_video": 1, "t2v": 2}.get(task, 3)  # what was given, the baseline's, the run's
    assert page.count('src="data:image/png;base64,') == pictures == page.count("<img") - 1  # that of the viewer
    assert "pixels of all frames" in page or TASKS[task].makes != "video"


@pytest.mark.parametrize("task", ["image_edit", "i2v", "t2v", "video_edit", "x2t_video"])
def test_calibration_of_every_task_measures_what_the_official_run_showed(tmp_path, monkeypatch, task):
    """As above. The source's noise is drawn otherwise, so the recorded latents stand in; nothing is ever decoded."""
    official = recording(task, "f32").tensors
    if "s0.encoded.0" in official:
        monkeypatch.setattr("lance_quant.lance.runtime.Runtime.encode", lambda *_: official["s0.encoded.0"])
    monkeypatch.setattr("lance_quant.lance.vae.Vae.decode", None)
    steps = ["--num_timesteps", "6", *(["--max_new_tokens", "256"] if task == "x2t_video" else [])]
    awq_calibrate_single.main([*flags(task), *steps, "--out", str(tmp_path / "stats.pt")])
    measured = ActStats.load(tmp_path / "stats.pt").linears
    names = {key[4:].rsplit(".", 1)[0] for key in official if key.startswith("act.") and key.endswith("n_tokens")
             and official[key].item() > 0}
    assert set(measured) == names
    for name in names:
        assert measured[name].n_tokens == official[f"act.{name}.n_tokens"].item()
        for key in ("sum_abs", "sum_sq", "max_abs"):
            assert relative(getattr(measured[name], key), official[f"act.{name}.{key}"]) < 1e-4


@pytest.mark.parametrize("flag, message", [
    (["--num_frames", "122"], "num_frames 122 must be 1 to 121"),
    (["--num_frames", "0"], "num_frames 0 must be at least 1"),
])
def test_lengths_that_the_model_has_no_positions_for_are_refused(tmp_path, flag, message):
    with pytest.raises(InputError, match=message):
        run_baseline.main([*flags("t2v"), *flag, "--save_path_gen", str(tmp_path / "r")])


def test_rounded_and_unusual_sizes_are_said(tmp_path, caplog):
    how = task_cli_settings("t2v", "--video_height", "1024", "--video_width", "1000")
    assert how.as_json()["num_frames"] == 49 and how.as_json()["width"] == 992
    said = " ".join(caplog.messages)
    assert "1024 x 1000 is floored to 1024 x 992" in said
    assert "50 frames are floored to 49" in said
    assert "larger than anything that Lance was trained on" in said


def task_cli_settings(task, *more):
    return task_arguments.settings_of(run_baseline.parse_args(
        ["--task", task, *MODEL, "--example_json", "none", "--save_path_gen", "none", *more]))


@pytest.mark.parametrize("task", TASKS)
def test_defaults_are_the_official_ones_of_each_task(task):
    settings = task_cli_settings(task)
    assert settings.resolution == ("image_768res" if task in ("x2t_image", "t2i", "image_edit") else "video_480p")
    assert settings.num_frames == (50 if task in ("t2v", "i2v") else 1)


EDIT = {"interleave_array": ["Paint it red.", str(GOLDENS / "inputs/house_1x1.png")],
        "element_dtype_array": ["text", "image"]}


@pytest.mark.parametrize("change, message", [
    ({"element_dtype_array": ["text", "video"]}, "is no image_edit sample"),
    ({"interleave_array": ["Paint it red."]}, "is no image_edit sample.*its lists differ in length"),
    ({"interleave_array": [["S", "Q", "A"], EDIT["interleave_array"][1]]}, "instruction as one string"),
    ({"interleave_array": ["Paint it red.", "none.png"]}, r"image none\.png of .* not found"),
])
def test_bad_edit_files_are_refused(tmp_path, change, message):
    (tmp_path / "e.json").write_text(json.dumps({"1": EDIT | change}))
    with pytest.raises(InputError, match=message):
        samples.load("image_edit", tmp_path / "e.json")


def test_several_sources_are_refused(tmp_path):
    """The official code accepts them; silently taking one of them would answer another question."""
    source = EDIT["interleave_array"][1]
    (tmp_path / "e.json").write_text(json.dumps({"1": {"interleave_array": ["Join them.", source, source],
                                                       "element_dtype_array": ["text", "image", "image"]}}))
    with pytest.raises(InputError, match="it lists text, image, image"):
        samples.load("image_edit", tmp_path / "e.json")


def test_an_edit_that_lists_its_picture_first_is_named_text_officially_and_image_when_fixed(tmp_path):
    turned = {name: values[::-1] for name, values in EDIT.items()}
    (tmp_path / "e.json").write_text(json.dumps({"1": turned}))
    assert [samples.load("image_edit", tmp_path / "e.json", fix)[0].named for fix in (False, True)] == ["text", "image"]


def test_a_vit_inside_the_checkpoint_serves_float_and_packed_runs(tmp_path):
    """As Lance_3B_Video has it: the folder's ViT is overridden, and the packed folder needs none beside it."""
    downloads = tmp_path / "downloads"
    shutil.copytree(GOLDENS / "checkpoint", downloads)
    model = downloads / "Lance_3B" / "model.safetensors"
    vit = load_file(downloads / "Qwen2.5-VL-ViT/vit.safetensors")
    shifted = {f"vit_model.{name}": tensor * 1.5 for name, tensor in vit.items()}
    save_file(load_file(model) | shifted, model)
    how = ["--task", "x2t_video", "--model_path", str(model.parent), "--example_json",
           str(GOLDENS / "inputs/x2t_video.json"), *SIZES["x2t_video"]]
    awq_calibrate_single.main([*how, "--out", str(tmp_path / "stats.pt")])
    awq_apply.main(["--src", str(model), "--stats", str(tmp_path / "stats.pt"), "--out", str(tmp_path / "int4"),
                    "--device", "cpu"])
    (downloads / "Qwen2.5-VL-ViT/vit.safetensors").unlink()  # its config.json is still read
    run_baseline.main([*how, "--save_path_gen", str(tmp_path / "float"), "--save_latents"])
    run_quant_eval.main([*how, "--awq_dir", str(tmp_path / "int4"), "--baseline", str(tmp_path / "float"),
                         "--save_path_gen", str(tmp_path / "q")])
    (section,) = json.loads((tmp_path / "q/comparison.json").read_text())
    assert 1e-5 < section["runs"][0]["summary"]["kl"] < 0.3
    with PackedFolder(tmp_path / "int4") as packed:
        inside = load_vit(packed.checkpoint, downloads / "Qwen2.5-VL-ViT", torch.device("cpu"), torch.float32)
    weight = inside.tower.patch_embed.proj.weight
    assert relative(weight.flatten(1), shifted["vit_model.patch_embed.proj.weight"].flatten(1)) < 4e-3  # bfloat16


def test_calibration_over_all_tasks_is_the_merge_of_each(work, tmp_path):
    folder = tmp_path / "samples"
    folder.mkdir()
    for name in ("t2i", "x2t_image"):
        shutil.copy(GOLDENS / "inputs" / f"{name}.json", folder)
    shutil.copytree(GOLDENS / "inputs", tmp_path / "inputs")
    awq_calibrate_single.main(["--task", "all", *MODEL, "--example_json", str(folder), "--resolution", "image_256res",
                               "--video_height", "96", "--video_width", "128", "--num_timesteps", "6", "--out",
                               str(tmp_path / "all.pt")])
    ours, theirs = ActStats.load(tmp_path / "all.pt"), ActStats.load(work / "all.pt")
    assert sorted(ours.tasks) == sorted(theirs.tasks) == ["t2i", "x2t_image"]
    assert set(ours.linears) == set(theirs.linears)
    for name, entry in ours.linears.items():
        assert entry.n_tokens == theirs.linears[name].n_tokens
        assert relative(entry.sum_sq, theirs.linears[name].sum_sq) < 1e-6


def test_calibration_over_all_tasks_needs_a_folder_with_one(tmp_path):
    with pytest.raises(InputError, match=r"no folder with any of x2t_image\.json, x2t_video\.json"):
        awq_calibrate_single.main(["--task", "all", *MODEL, "--example_json", str(tmp_path), "--out",
                                   str(tmp_path / "all.pt")])
