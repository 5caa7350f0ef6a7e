"""The headline numbers, recomputed here from the recordings that a run keeps."""

import json
import logging
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CPU, GOLDENS, relative
from PIL import Image
from safetensors.torch import load_file, save_file

import run_baseline
import run_quant_eval
from lance_quant.cli import requests, task_arguments
from lance_quant.distributed import ALONE
from lance_quant.errors import InputError
from lance_quant.evaluation.compare import compare_run
from lance_quant.evaluation.run_folder import Results, RunRecord
from lance_quant.evaluation.sample_store import SampleStore
from lance_quant.formats.packed_folder import PackedFolder
from lance_quant.inference import memory
from lance_quant.inference.memory import peak_memory, reset_peak_memory
from lance_quant.lance.config import LancePaths
from lance_quant.lance.generation import Sampling
from lance_quant.lance.runtime import Runtime
from quantized_linear import swap_linears

MODEL = GOLDENS / "checkpoint" / "Lance_3B"
PACKED = GOLDENS / "published" / "int4_g64"
SAMPLING = Sampling(num_timesteps=3)
T2I = ["--task", "t2i", "--model_path", str(MODEL), "--example_json", str(GOLDENS / "inputs/t2i.json"),
       "--video_height", "48", "--video_width", "64", "--validation_num_timesteps", "3", "--device", "cpu"]
X2T = ["--task", "x2t_image", "--model_path", str(MODEL), "--example_json", str(GOLDENS / "inputs/x2t_image.json"),
       "--resolution", "image_112res", "--max_new_tokens", "6", "--device", "cpu"]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    work = tmp_path_factory.mktemp("evaluation")
    for name, task in (("t2i", T2I), ("x2t", X2T)):
        run_baseline.main([*task, "--save_latents", "--save_path_gen", str(work / f"b_{name}")])
        run_quant_eval.main([*task, "--awq_dir", str(PACKED), "--baseline", str(work / f"b_{name}"), "--save_latents",
                             "--save_path_gen", str(work / f"q_{name}")])
    return work


@pytest.fixture(scope="module")
def quantized() -> Runtime:
    with PackedFolder(PACKED) as folder:
        path = folder.checkpoint.path
        return Runtime.load(LancePaths.find(MODEL), CPU, torch.float32, path,
                             lambda model: swap_linears(model, folder, torch.float32, CPU))


def compared(work, name) -> list[dict]:
    (section,) = json.loads((work / f"q_{name}/comparison.json").read_text())
    return section["runs"][0]["samples"]


def test_velocity_errors_are_those_on_the_baselines_trajectory(work, quantized, prompts):
    baseline, own = (load_file(work / folder / "latents.safetensors") for folder in ("b_t2i", "q_t2i/int4_g64"))
    for prompt, sample in zip(prompts, compared(work, "t2i"), strict=True):
        denoiser = quantized.denoiser(prompt.text, 48, 64, SAMPLING)
        expected = [relative(denoiser.velocity(x, t), velocity) for x, t, velocity in zip(
            baseline[f"{prompt.key}.x"], baseline[f"{prompt.key}.t"].tolist(), baseline[f"{prompt.key}.velocity"],
            strict=True)]
        assert sample["velocity_errors"] == pytest.approx(expected, rel=1e-5)
        assert not torch.equal(own[f"{prompt.key}.x"][-1], baseline[f"{prompt.key}.x"][-1])


def test_latent_error_and_psnr_compare_the_run_with_the_baseline(work, prompts):
    baseline, own = (load_file(work / folder / "latents.safetensors") for folder in ("b_t2i", "q_t2i/int4_g64"))
    for prompt, sample in zip(prompts, compared(work, "t2i"), strict=True):
        expected = relative(own[f"{prompt.key}.latent"], baseline[f"{prompt.key}.latent"])
        assert sample["latent_error"] == pytest.approx(expected, rel=1e-5) and expected > 0
        theirs, ours = (np.array(Image.open(work / folder / f"{prompt.key}.png")).astype(float)
                        for folder in ("b_t2i", "q_t2i/int4_g64"))
        assert sample["psnr"] == pytest.approx(10 * math.log10(255**2 / np.mean((theirs - ours) ** 2)))


def test_kl_is_the_baselines_from_the_quantized_on_the_baselines_answer(work, quantized, questions):
    baseline = load_file(work / "b_x2t/logits.safetensors")
    for question, sample in zip(questions, compared(work, "x2t"), strict=True):
        packed, vit_tokens = quantized.prompt_of(question, "image_112res")
        theirs = baseline[f"{question.key}.logprobs"].double()
        ours = quantized.forced_logprobs(packed, vit_tokens, baseline[f"{question.key}.ids"].tolist()).double()
        kl = (theirs.exp() * (theirs - ours)).sum(-1)
        other_way = (ours.exp() * (ours - theirs)).sum(-1)
        assert sample["kl"] == pytest.approx(kl.mean().item(), rel=1e-3)
        assert abs(kl.mean() - other_way.mean()) > 2e-3 * kl.mean()  # so the check above can tell them apart
        assert sample["top1"] == (theirs.argmax(-1) == ours.argmax(-1)).double().mean().item()


def test_the_float_model_is_at_no_distance_from_itself(work, tmp_path):
    """All errors are exactly zero: nothing random, no state between requests, no second rounding."""
    for name, task, parts in (("t2i", T2I, 3), ("x2t", X2T, 0)):
        args = run_baseline.parse_args([*task, "--save_path_gen", "none"])
        request = requests.request_of(args, ALONE)
        folder = work / f"b_{name}"
        runtime = request.source.load()
        store = SampleStore(tmp_path / name)
        for row in compare_run(lambda runtime=runtime: runtime, request, Results(folder), folder, store):
            if parts:
                assert row["velocity_errors"] == [0.0] * parts and row["latent_error"] == 0.0
                assert row["psnr"] == math.inf
            else:
                assert row["kl"] == 0.0 and row["top1"] == row["exact"] == row["characters"] == row["words"] == 1.0


def test_traces_are_kept_where_asked_and_read(work):
    """Of the quantized answers nobody reads the log-probabilities, so they are not made."""
    assert (work / "q_t2i/int4_g64/latents.safetensors").is_file()
    assert not (work / "q_x2t/int4_g64/logits.safetensors").exists()
    stages = json.loads((work / "b_x2t/run.json").read_text())["seconds"]
    assert set(stages) == {"load", "run", "trace"}  # so that "run" compares with a run without the trace


@pytest.mark.parametrize("change, message", [
    (["--dtype", "bfloat16"], "dtype float32 there and bfloat16 here"),
    (["--seed", str(2**63)], "must be at least 0 and below"),
    (["--validation_timestep_shift", "inf"], "must be at least 1e-06 and at most 1000"),
])
def test_what_cannot_be_compared_or_run_is_refused_before_loading(work, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        run_quant_eval.main([*T2I, *change, "--awq_dir", str(PACKED), "--baseline", str(work / "b_t2i"),
                             "--save_path_gen", str(tmp_path / "q")])
    assert list(tmp_path.iterdir()) == []


def test_a_baseline_that_lost_a_picture_is_refused_before_loading(work, tmp_path):
    shutil.copytree(work / "b_t2i", tmp_path / "b")
    (tmp_path / "b/000001.png").unlink()
    with pytest.raises(InputError, match=r"lacks 1 of its files, first 000001.png"):
        run_quant_eval.main([*T2I, "--awq_dir", str(PACKED), "--baseline", str(tmp_path / "b"), "--save_path_gen",
                             str(tmp_path / "q")])


@pytest.mark.parametrize("content, message", [
    ("[]", r"holds \[\]: must be a JSON object"), ('{"format": 1}', r"lacks \['settings', 'samples', .* and 3 more"),
    ('{"format": 7}', "has format 7: must be 1"), ("nonsense", "is not valid JSON"),
])
def test_a_folder_of_another_kind_is_no_baseline(tmp_path, content, message):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(InputError, match=message):
        Results(tmp_path)


def test_weights_of_another_model_are_not_compared(tmp_path):
    """Packed weights say what they were made from; a baseline of other weights would be nonsense with a good face."""
    shutil.copytree(PACKED, tmp_path / "int4")
    meta = json.loads((tmp_path / "int4/awq_meta.json").read_text())
    (tmp_path / "int4/awq_meta.json").write_text(json.dumps(meta | {"source_fingerprint": "0" * 64}))
    with pytest.raises(InputError, match="made from other weights"):
        run_quant_eval.main([*T2I, "--awq_dir", str(tmp_path / "int4"), "--save_path_gen", str(tmp_path / "q")])
    assert not (tmp_path / "q").exists()


def test_a_flag_that_a_task_does_not_use_is_said_to_be_idle(tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="lance_quant")
    run_baseline.main([*X2T[:-2], "--limit", "1", "--cfg_scale", "2", "--device", "cpu", "--save_path_gen",
                       str(tmp_path / "r")])
    assert "of no effect on x2t_image: --cfg_scale" in caplog.text


def test_a_guided_velocity_is_shortened_and_never_lengthened(pipeline, prompts):
    """u + 4 (c - u): from u = c / 2 it is 2.5 c and comes back to c; from u = 1.25 c it is c / 4 and stays."""
    denoiser = pipeline.denoiser(prompts[0].text, 48, 64, SAMPLING)
    conditional = torch.randn(12, 48, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(denoiser._guide(conditional, conditional / 2), conditional)
    torch.testing.assert_close(denoiser._guide(conditional, 1.25 * conditional), conditional / 4)


def without(monkeypatch, *names):
    """A system without /proc and without these modules, where another module tells the peak."""
    monkeypatch.setattr(memory, "_STATUS", Path("none"))
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no resource")
def test_peak_memory_without_proc_is_the_process_own(monkeypatch):
    without(monkeypatch)
    assert peak_memory(CPU)["host"] > 1 << 26


def test_peak_memory_on_windows_is_psutils_or_unknown(monkeypatch):
    without(monkeypatch, "resource")
    told = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=123))
    monkeypatch.setitem(sys.modules, "psutil", SimpleNamespace(Process=lambda: told))
    assert peak_memory(CPU) == {"host": 123}
    without(monkeypatch, "resource", "psutil")
    assert peak_memory(CPU) == {"host": None}


def test_an_unknown_peak_is_written_as_null(monkeypatch, prompts):
    without(monkeypatch, "resource", "psutil")
    record = RunRecord(CPU, torch.float32, {}, {})
    with record.stage("load"), record.stage("run"):
        pass
    settings = task_arguments.settings_of(run_baseline.parse_args([*T2I, "--save_path_gen", "none"]))
    run = record.as_json(settings, prompts)
    assert run["peak_memory_bytes"] == {"host": None} == run["peak_memory_bytes_by_stage"]["run"]


def test_peak_memory_is_of_the_stage_and_not_of_the_process():
    big = torch.ones(1 << 27)  # half a gigabyte
    high = peak_memory(CPU)["host"]
    del big
    reset_peak_memory(CPU)
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux can reset the peak")
    assert peak_memory(CPU)["host"] < high - (1 << 28)


NUMBER = "000000"
DAMAGE = {
    "nan": (f"{NUMBER}.x", lambda x: x * math.nan, "NaN"),
    "no key": (f"{NUMBER}.velocity", lambda x: None, "lacks 000000.velocity"),
    "another shape": (f"{NUMBER}.latent", lambda x: x[..., :5].clone(), "not"),
    "a step less": (f"{NUMBER}.velocity", lambda x: x[1:].clone(), "not"),
    "no steps": (f"{NUMBER}.t", lambda x: x[:0].clone(), "not"),
    "a flat one": (f"{NUMBER}.x", lambda x: x.flatten(), "not"),
    "no velocity": (f"{NUMBER}.velocity", torch.zeros_like, "all zeros"),
    "no ids": ("0001.ids", lambda x: x[:0].clone(), "not"),
    "ids in two dimensions": ("0001.ids", lambda x: x[None].clone(), "not"),
    "negative ids": ("0001.ids", lambda x: -x - 1, "another tokenizer"),
    "ids beyond the table": ("0001.ids", lambda x: x + 10**9, "another tokenizer"),
    "ids in floats": ("0001.ids", torch.Tensor.float, "another tokenizer"),
    "probabilities": ("0001.logprobs", torch.exp, "above 0"),
    "fewer tokens": ("0001.logprobs", lambda x: x[1:].clone(), "not"),
    "a smaller vocabulary": ("0001.logprobs", lambda x: x[:, 1:].clone(), "not"),
    "infinite": ("0001.logprobs", lambda x: x * math.inf, "NaN or Inf"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_recording_of_a_baseline_is_named(work, tmp_path, name):
    key, change, message = DAMAGE[name]
    kind, file, task = ("x2t", "logits", X2T) if key.startswith("0001") else ("t2i", "latents", T2I)
    shutil.copytree(work / f"b_{kind}", tmp_path / "b")
    tensors = load_file(tmp_path / "b" / f"{file}.safetensors")
    changed = change(tensors.pop(key))
    save_file(tensors if changed is None else {**tensors, key: changed}, tmp_path / "b" / f"{file}.safetensors")
    with pytest.raises(InputError, match=message) as error:
        run_quant_eval.main([*task, "--awq_dir", str(PACKED), "--baseline", str(tmp_path / "b"),
                             "--save_path_gen", str(tmp_path / "q")])
    assert "\n" not in str(error.value)
