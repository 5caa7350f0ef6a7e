import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import awq_apply
import nvfp4_apply
from lance_quant.cli import script
from lance_quant.formats.packed_folder import PackedFolder

ROOT = Path(__file__).parent.parent
GOLDENS = ROOT / "tests" / "goldens"
MODEL = str(GOLDENS / "checkpoint" / "Lance_3B")
STATS = str(GOLDENS / "published" / "act_stats.pt")
SCRIPTS = pytest.mark.parametrize("stage", [awq_apply, nvfp4_apply], ids=lambda module: module.__name__)
CPU = ["--device", "cpu"]


def fails(capsys, stage, argv):
    """Exit code 2 and exactly one line on stderr; returns the line."""
    with pytest.raises(SystemExit) as caught:
        script.run(lambda: stage.main([str(arg) for arg in argv]))
    err = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and len(err) == 1 and err[0].startswith("error: "), err
    return err[0]


@SCRIPTS
def test_a_run_prints_the_folder_and_logs_size_bits_and_counts(tmp_path, capsys, caplog, stage):
    with caplog.at_level("INFO", "lance_quant"):
        stage.main(["--src", MODEL, "--stats", STATS, "--out", str(tmp_path / "out"), *CPU])
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    last = caplog.records[-1].getMessage()
    assert "bits per quantized weight" in last and "42 linears searched, 0 rounded plainly" in last
    with PackedFolder(tmp_path / "out") as folder:
        assert len(folder.linears) == 42


@pytest.mark.parametrize("stage, flags", [
    (awq_apply, []), (awq_apply, ["--group_size", "32"]), (awq_apply, ["--recipe", "published"]),
    (nvfp4_apply, []), (nvfp4_apply, ["--slim"]), (nvfp4_apply, ["--recipe", "published"]),
])
def test_the_dry_run_needs_no_statistics_and_ends_with_the_bytes_of_the_run(tmp_path, capsys, stage, flags):
    stage.main(["--src", MODEL, "--dry_run", *flags])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("q_proj packed") for line in lines)
    stage.main(["--src", MODEL, "--stats", STATS, "--out", str(tmp_path / "out"), *CPU, *flags])
    assert lines[-1] == f"output_bytes: {next((tmp_path / 'out').glob('*.safetensors')).stat().st_size}"


def model_with(tmp_path, change):
    tensors = load_file(f"{MODEL}/model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


@SCRIPTS
def test_each_mistake_is_one_line_and_leaves_no_output(tmp_path, capsys, stage):
    out = tmp_path / "out"
    good = ["--src", MODEL, "--stats", STATS, "--out", out, *CPU]
    nan = {"format": 1, "task": "t", "stats": {"x": {"sum_abs": torch.tensor([float("nan")]), "n_tokens": 1,
                                                     "n_calls": 1}}}
    torch.save(nan, tmp_path / "nan.pt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "cut.safetensors").write_bytes(Path(MODEL, "model.safetensors").read_bytes()[:-9])
    (tmp_path / "empty").mkdir()
    for flags, message in (
        (["--src", tmp_path / "absent"], "not found"), (["--src", tmp_path / "empty"], "expected one of"),
        (["--src", tmp_path / "cut.safetensors"], "truncated"), (["--src", tmp_path / "text.pt"], "not a safetensors"),
        (["--stats", tmp_path / "absent"], "not found"), (["--stats", tmp_path / "nan.pt"], "NaN"),
        (["--stats", tmp_path / "text.pt"], "is no statistics file"), (["--out", GOLDENS], "never overwritten"),
        (["--device", "tpu:x"], "no torch device"), (["--device", "cuda:99"], "CUDA devices"),
        (["--threads", "0"], "must be from 1 to 4096"),
    ):
        assert message in fails(capsys, stage, [*good, *flags]), flags
    assert "--stats and --out are needed" in fails(capsys, stage, ["--src", MODEL])
    assert not out.exists()


@SCRIPTS
def test_a_damaged_checkpoint_is_named_before_anything_is_written(tmp_path, capsys, stage):
    key = "language_model.model.layers.1.mlp.up_proj.weight"
    rest = ["--stats", STATS, "--out", tmp_path / "out", *CPU]
    src = model_with(tmp_path, lambda tensors: tensors.pop(key))
    assert key in fails(capsys, stage, ["--src", src, *rest])
    assert key in fails(capsys, stage, ["--src", src, "--dry_run"])
    src = model_with(tmp_path, lambda tensors: tensors.update({key: torch.full((128, 64), float("inf"))}))
    with pytest.raises(SystemExit) as caught:
        script.run(lambda: stage.main(["--src", str(src), *map(str, rest)]))
    assert caught.value.code == 2 and f"{key} holds NaN or Inf" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]


def test_flags_of_one_format(tmp_path, capsys):
    rest = ["--src", MODEL, "--stats", STATS, "--out", tmp_path / "out", *CPU]
    assert "sizes that work there: 16, 32, 64" in fails(capsys, awq_apply, [*rest, "--group_size", 128])
    assert "not positive" in fails(capsys, awq_apply, [*rest, "--group_size", 0])
    assert "blocks of 16" in fails(capsys, nvfp4_apply, [*rest, "--block_size", 32])
    slim = [*rest, "--slim", "--recipe", "published"]
    assert "--slim is not part of the published" in fails(capsys, nvfp4_apply, slim)


def test_the_disk_running_full_is_one_line(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lance_quant.storage.tensor_file.TensorFileWriter.write", full)
    with pytest.raises(SystemExit) as caught:
        script.run(lambda: awq_apply.main(["--src", MODEL, "--stats", STATS, "--out", str(tmp_path / "out"), *CPU]))
    assert caught.value.code == 2 and "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@SCRIPTS
def test_help_is_the_docstring_with_every_default(capsys, stage):
    with pytest.raises(SystemExit) as caught:
        stage.main(["--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0 and stage.__doc__.splitlines()[0] in out and "(default: auto)" in out


@pytest.mark.slow
def test_the_scripts_run_as_programs_from_any_folder(tmp_path):
    command = [sys.executable, str(ROOT / "nvfp4_apply.py"), "--src", MODEL, "--stats", STATS, "--out", "out", "--slim"]
    done = subprocess.run([*command, *CPU], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stdout) == (0, "out\n"), done.stderr
    assert json.loads((tmp_path / "out" / "nvfp4_meta.json").read_text())["layout"] == "slim"
    shutil.rmtree(tmp_path / "out")
