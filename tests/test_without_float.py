"""Packed folders without the float weights: run alone, kept as a baseline, and compared with each other."""

import json
import shutil

import pytest
from conftest import GOLDENS

import run_baseline
import run_quant_eval
from lance_quant.errors import InputError

CHECKPOINT = GOLDENS / "checkpoint"
INT4, NVFP4 = GOLDENS / "published" / "int4_g64", GOLDENS / "published" / "nvfp4"
T2I = ["--task", "t2i", "--example_json", str(GOLDENS / "inputs/t2i.json"), "--limit", "1", "--video_height", "48",
       "--video_width", "64", "--validation_num_timesteps", "2", "--device", "cpu"]
X2T = ["--task", "x2t_image", "--example_json", str(GOLDENS / "inputs/x2t_image.json"), "--limit", "1", "--resolution",
       "image_112res", "--max_new_tokens", "3", "--device", "cpu"]


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """A model folder without weights, ViT and VAE beside it."""
    root = tmp_path_factory.mktemp("configs")
    shutil.copytree(CHECKPOINT / "Lance_3B", root / "Lance_3B", ignore=shutil.ignore_patterns("*.safetensors"))
    for part in ("Qwen2.5-VL-ViT", "Wan2.2_VAE.pth"):
        (root / part).symlink_to(CHECKPOINT / part)
    return root / "Lance_3B"


def section_of(folder):
    (section,) = json.loads((folder / "comparison.json").read_text())
    return section


@pytest.mark.parametrize("task", [T2I, X2T], ids=["t2i", "x2t"])
def test_a_published_folder_runs_and_is_a_baseline_for_others(tmp_path, configs, task):
    run_baseline.main([*task, "--model_path", str(INT4), "--config_path", str(configs), "--save_latents",
                       "--save_path_gen", str(tmp_path / "b")])
    run = json.loads((tmp_path / "b" / "run.json").read_text())
    assert run["model"]["format"] == "int4" and sum(run["kernels"].values()) > 0
    run_quant_eval.main([*task, "--config_path", str(configs), "--awq_dir", str(INT4), "--baseline",
                         str(tmp_path / "b"), "--save_path_gen", str(tmp_path / "q")])
    (own,) = section_of(tmp_path / "q")["runs"]
    error = "kl" if task is X2T else "velocity_error"
    assert own["summary"][error] == 0  # the same weights, on their own path


@pytest.mark.parametrize("task", [T2I, X2T], ids=["t2i", "x2t"])
def test_packed_folders_are_compared_with_the_first_of_them(tmp_path, configs, task, caplog):
    run_quant_eval.main([*task, "--model_path", str(configs), "--awq_dir", str(INT4), str(NVFP4), "--save_path_gen",
                         str(tmp_path / "q")])
    assert "no float weights, and no --baseline is given: int4_g64 is the reference" in caplog.text
    section = section_of(tmp_path / "q")
    assert section["reference"] == "int4_g64" and [run["name"] for run in section["runs"]] == ["nvfp4"]
    assert section["baseline"]["folder"] == "int4_g64"
    assert section["runs"][0]["summary"]["kl" if task is X2T else "velocity_error"] > 0
    for name in ("report.md", "report.html"):
        text = (tmp_path / "q" / name).read_text(encoding="utf-8").replace("\\", "")
        assert "int4_g64" in text and "is the reference" in text and "nvfp4" in text


@pytest.mark.parametrize("task", [T2I, X2T], ids=["t2i", "x2t"])
def test_a_single_packed_folder_runs_and_the_report_says_that_nothing_is_compared(tmp_path, configs, task):
    run_quant_eval.main([*task, "--config_path", str(configs), "--awq_dir", str(NVFP4), "--save_path_gen",
                         str(tmp_path / "q")])
    section = section_of(tmp_path / "q")
    assert section["reference"] == "nvfp4" and section["runs"] == [] and len(section["outputs"]) == 1
    page, text = ((tmp_path / "q" / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    assert "ran alone" in page and "ran alone" in text and "KL per token" not in page + text
    if task is X2T:
        answer = json.loads((tmp_path / "q/nvfp4/result.json").read_text())[0]["answer"]
        assert section["outputs"][0]["baseline"] == answer
    else:
        assert (tmp_path / "q/nvfp4/000000.png").is_file() and "nvfp4/000000.png" in page


@pytest.mark.parametrize("flags, message", [
    (["--model_path", str(INT4)], "packed weights alone, without llm_config.json and tokenizer"),
    (["--model_path", str(CHECKPOINT / "Lance_3B"), "--config_path", str(CHECKPOINT / "Lance_3B")],
     "--config_path is for packed weights"),
    (["--model_path", str(CHECKPOINT / "Lance_3B"), "--mode", "cached"], "--mode and --kernel are for packed weights"),
    (["--model_path", str(INT4), "--config_path", str(INT4)], "packed weights alone"),
    (["--model_path", str(INT4), "--config_path", str(CHECKPOINT / "Lance_3B"), "--backend", "official"],
     "--backend official does not"),
])
def test_what_does_not_go_together_is_refused(tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        run_baseline.main([*T2I, *flags, "--save_path_gen", str(tmp_path / "b")])
    assert list(tmp_path.iterdir()) == []
