"""Memory planning: exact where bytes can be counted, and every option that it names brings the peak down."""

import json
import logging
import shutil

import pytest
import real_keys
import torch
from conftest import CPU, GOLDENS

import awq_apply
import nvfp4_apply
from benchmarks import plan_check
from benchmarks.random_lance import weight_bytes
from lance_nano import CHECKPOINT
from lance_quant.calibration.activation_stats import ActStats
from lance_quant.cli import command, plan
from lance_quant.errors import InputError
from lance_quant.inference import memory, memory_plan
from lance_quant.inference.memory_plan import Files, How
from lance_quant.inference.pipeline import Pipeline
from lance_quant.lance.config import LancePaths
from lance_quant.lance.settings import TASKS, Settings

MODEL = GOLDENS / "checkpoint" / "Lance_3B"
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The golden checkpoint in every form of linears and head that a folder may have."""
    root = tmp_path_factory.mktemp("plans")
    ActStats({}, [], [{"run_id": "none", "task": "t2i", "samples": []}], 0).save(root / "stats.pt")
    for name, script, flags in (("int4", awq_apply, []), ("int4_head8", awq_apply, ["--head_bits", "8"]),
                                ("nvfp4", nvfp4_apply, []), ("slim", nvfp4_apply, ["--slim"])):
        script.main(["--src", str(MODEL), "--stats", str(root / "stats.pt"), "--out", str(root / name), "--device",
                     "cpu", *flags])
    return root


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A model folder with the real names and shapes, and no value in it."""
    model = tmp_path_factory.mktemp("real") / "Lance_3B"
    model.mkdir()
    real_keys.write_headers_only(model, "Lance_3B").rename(model / "model.safetensors")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT / name, model)
    (model / "llm_config.json").write_text(json.dumps({
        "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
        "intermediate_size": 11008, "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "mrope_section": [16, 24, 24]}))
    return Files.open(LancePaths.find(model), None), model


@pytest.mark.parametrize("mode", ["ondemand", "cached"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [None, "int4", "int4_head8", "nvfp4", "slim"])
def test_the_weights_bytes_are_those_of_the_loaded_model(folders, name, dtype, mode):
    if name is None and mode == "cached":
        return
    packed = None if name is None else folders / name
    pipeline = Pipeline.load(MODEL, packed=packed, device="cpu", dtype=dtype, mode=mode, kernel="auto")
    files = Files.open(LancePaths.find(MODEL), packed)
    how = How(getattr(torch, dtype), True, mode)
    assert memory_plan.language_bytes(files, how).total == weight_bytes(pipeline.runtime.model)


@pytest.mark.parametrize("task, how", [("x2t_image", How(BF16, False)), ("image_edit", How(torch.float32, True)),
                                       ("i2v", How(BF16, False, batch_guidance=False))])
def test_the_number_of_layers_that_run_changes_nothing(monkeypatch, task, how):
    """Activations do not depend on it, and cache entries are added to the byte."""
    settings, found = Settings(task, height=48, width=64, num_frames=5, resolution="image_112res"), []
    for layers in (2, 3):
        monkeypatch.setattr(memory_plan, "LAYERS", layers)
        memory_plan._small.cache_clear()
        files = Files.open(LancePaths.find(MODEL), GOLDENS / "published" / "int4_g64")
        found.append(memory_plan.plan(files, settings, how, 0, 5).stages)
    memory_plan._small.cache_clear()
    assert found[0] == found[1] and min(found[0].values()) > 0


def test_lance_3b_from_its_header_alone(real):
    """12.4 GB of weights in bfloat16 (6.18 billion parameters without the position table), as docs/memory.md has it."""
    files, _ = real
    assert files.missing == ("ViT", "VAE")
    how = How(BF16, False)
    weights = memory_plan.language_bytes(files, how)
    assert weights.total == pytest.approx(2 * (real_keys.SOURCE_BYTES["Lance_3B"] / 4 - 4096 * 2048), rel=1e-4)
    # of the published INT4 file, embedding and head are 1.245 GB, and the position table, which is not loaded, 16.8 MB
    four_bits = memory_plan.language_bytes(files, How(BF16, False, four_bits=True)).total
    assert four_bits == pytest.approx(4_307_195_656 - 2 * 4096 * 2048, rel=1e-4)
    found = memory_plan.plan(files, Settings("t2i"), how, 0)
    # docs/memory.md: denoising takes 12.97 and decoding 15.48, without the VAE in the former. Its prompts are of other
    # lengths: a token's cache is 37 kB a row, so 300 tokens are 0.02 GB.
    vae = memory_plan.vae_bytes(memory_plan.VAE_WIDTHS, BF16)
    assert (found.stages["denoise, guided"] - vae) / 1e9 == pytest.approx(12.97, abs=0.03)
    assert found.stages["decode"] / 1e9 == pytest.approx(15.48, abs=0.02)


@pytest.mark.slow
def test_every_choice_that_is_named_brings_a_peak_down(real):
    files, how = real[0], How(BF16, False)
    settings = Settings("image_edit", resolution="image_512res")
    plain = memory_plan.plan(files, settings, how, 0)
    single = {names[0]: changed for names, changed in memory_plan.choices(how, files) if len(names) == 1}
    assert set(single) == {"--sequential_guidance", "--offload cpu", "--offload layers", "--vae_tiling",
                           "a 4-bit folder (awq_apply.py)"}
    for name, changed in single.items():
        stages = memory_plan.plan(files, settings, changed, 0).stages
        assert any(stages[stage] < need for stage, need in plain.stages.items()), name
        assert all(stages[stage] <= need for stage, need in plain.stages.items()), name
    for names, changed in memory_plan.choices(how, files):
        if names == ("a 4-bit folder (awq_apply.py)", "--head_bits 8 (when quantizing)"):
            smaller = memory_plan.plan(files, settings, changed, 0)
            assert smaller.peak < memory_plan.plan(files, settings, single[names[0]], 0).peak - 6e8  # 0.62 GB


@pytest.mark.slow
def test_what_is_named_fits_and_nothing_less_does(real, capsys):
    _, model = real
    command.main(["plan", "--model", str(model), "--memory", "8GB"])
    out = capsys.readouterr().out
    assert "GPU of 8GB, bfloat16: does not fit: decode is the peak. With " in out
    assert "a 4-bit folder (awq_apply.py)" in out and "which fits" in out
    assert "Not there, and planned as the official ones: ViT, VAE." in out
    assert max(map(len, out.splitlines()[2:10])) <= 80
    command.main(["plan", "--model", str(model), "--memory", "4GB"])
    out = capsys.readouterr().out
    names = "--vae_tiling and --offload layers and a 4-bit folder (awq_apply.py)"
    assert f"With {names}: 3.53 GB (decode), which fits" in out
    command.main(["plan", "--model", str(model), "--memory", "8GB", "--offload", "layers"])
    assert "GPU of 8GB, bfloat16: fits" in capsys.readouterr().out
    command.main(["plan", "--model", str(model), "--memory", "1GiB", "--task", "x2t_image"])
    assert "no option here brings it down far enough" in capsys.readouterr().out


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.slow
def test_the_small_lance_is_planned_for_the_devices_here_in_every_task(task, capsys):
    command.main(["plan", "--task", task, "--num_frames", "5"])
    out = capsys.readouterr().out
    assert out.splitlines()[0].startswith(f"{CHECKPOINT}: {task}, ") and "cpu, float32: fits" in out
    stages = [line.split("  ")[0] for line in out.splitlines()[3:]]
    assert ("look" in stages) == (task not in ("t2i", "t2v", "i2v")) and ("decode" in stages) == ("x2t" not in task)


def test_a_packed_folder_is_planned_by_its_own_bytes(folders, capsys):
    command.main(["plan", "--model", str(MODEL), "--packed", str(folders / "int4"), "--resolution", "image_112res",
                  "--task", "x2t_image", "--memory", "2e9", "--device", "cpu"])
    assert "CPU of 2e9, float32: fits" in capsys.readouterr().out


@pytest.mark.parametrize("text, size", [("8GB", 8 * 10**9), ("8 gib", 8 << 30), ("1.5g", 1_500_000_000),
                                        ("123", 123), ("2e9", 2_000_000_000)])
def test_sizes_are_read(text, size):
    assert plan.bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "8TB", "-1GB", "0", "GB", "nan", "1e999GBs"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InputError, match="must be a size such as 8GB"):
        plan.bytes_of(text)


def test_loading_says_what_the_request_needs(caplog, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO, "lance_quant"):
        command.main(["draw", "a red circle", "--num_timesteps", "1", "--device", "cpu"])
    (said,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("memory: ")]
    assert "t2i, 112 x 112: " in said and said.endswith("free on cpu: fits")
    paths = LancePaths.find(CHECKPOINT)
    monkeypatch.setattr(memory_plan, "free_memory", lambda _: 1000)
    said = memory_plan.fit_line(paths, None, Settings("t2i", height=112, width=112), How(torch.float32, True), CPU)
    assert "does not fit; `lance-quant plan` names what helps" in said
    monkeypatch.setattr(memory_plan, "free_memory", lambda _: None)
    said = memory_plan.fit_line(paths, None, Settings("t2i", height=112, width=112), How(torch.float32, True), CPU)
    assert said.endswith("on cpu")


def test_a_system_that_tells_nothing_gives_unknown_sizes(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "none")
    monkeypatch.setattr(memory, "_SYSTEM", tmp_path / "none")
    monkeypatch.setattr(memory, "_module", lambda _: None)
    assert memory.free_memory(CPU) is None and memory.process_memory(CPU) == memory.CONTEXT


def test_the_benchmark_plans_the_model_that_it_measures(monkeypatch):
    """Same stages, and the weights of the plan are those that random_lance makes."""
    case = plan_check.peak_memory.cases_of(plan_check.argparse.Namespace(
        tasks=["t2i"], formats=["int4"], offload=["none"], head_bits=16, height=48, width=64, vae_tiling=False,
        sequential_guidance=False, vae=True, device="cpu", dtype="float32"))[0]
    small = memory_plan.LanceConfig(128, 2, 4, 2, 256, 2048, 1e-6, 1e6, (4, 6, 6))
    found = plan_check.planned(case, small, 10**9)
    assert set(found) == {"denoise", "decode"} and all(need > 10**9 for need in found.values())
    model = plan_check.peak_memory.random_lance(small, "int4", torch.float32, CPU)
    files = plan_check.files_of(small, "int4")
    assert memory_plan.language_bytes(files, How(torch.float32, True)).total == weight_bytes(model)
