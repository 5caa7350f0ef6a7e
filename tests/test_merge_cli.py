from pathlib import Path

import pytest
import torch

import awq_merge_stats
from lance_quant.calibration.activation_stats import ActStats
from lance_quant.cli import script
from lance_quant.errors import InputError

PUBLISHED = Path(__file__).parent / "goldens" / "published"
T2I, X2T = str(PUBLISHED / "t2i_stats.pt"), str(PUBLISHED / "x2t_image_stats.pt")


def fails(capsys, argv):
    with pytest.raises(SystemExit) as caught:
        script.run(lambda: awq_merge_stats.main([str(arg) for arg in argv]))
    err = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and len(err) == 1, err
    return err[0]


def test_the_merge_is_the_published_one_and_says_what_it_covers(tmp_path, capsys, caplog):
    out = tmp_path / "sub" / "all.pt"
    with caplog.at_level("INFO", "lance_quant"):
        awq_merge_stats.main(["--inputs", X2T, T2I, "--out", str(out)])
    assert capsys.readouterr().out == f"{out}\n"
    assert "gen     21 of 21" in caplog.text
    ours, theirs = (torch.load(path, weights_only=True) for path in (out, PUBLISHED / "act_stats.pt"))
    assert (ours["tasks"], ours["n_linears"]) == (theirs["tasks"], theirs["n_linears"])
    for name, entry in theirs["stats"].items():
        assert torch.equal(ours["stats"][name]["sum_abs"], entry["sum_abs"])
        assert ours["stats"][name]["n_tokens"] == entry["n_tokens"]


def test_an_expert_without_data_is_said_in_words(tmp_path, caplog):
    with caplog.at_level("INFO", "lance_quant"):
        awq_merge_stats.main(["--inputs", X2T, "--out", str(tmp_path / "all.pt")])
    assert "No latent token was seen: the gen expert" in caplog.text


def test_weights_follow_the_inputs(tmp_path):
    awq_merge_stats.main(["--inputs", X2T, T2I, "--out", str(tmp_path / "all.pt"), "--weights", "2", "1"])
    name = "language_model.model.layers.0.mlp.down_proj"
    assert ActStats.load(tmp_path / "all.pt").linears[name].n_tokens == 2 * 746 + 343


def test_each_mistake_is_one_line_and_leaves_no_output(tmp_path, capsys):
    out = tmp_path / "all.pt"
    assert "listed twice" in fails(capsys, ["--inputs", T2I, T2I, "--out", out])
    assert "not found" in fails(capsys, ["--inputs", tmp_path / "x.pt", "--out", out])
    assert "positive weights" in fails(capsys, ["--inputs", T2I, "--out", out, "--weights", 1, 2])
    assert "never overwritten" in fails(capsys, ["--inputs", X2T, "--out", T2I])
    merged = ["--inputs", PUBLISHED / "act_stats.pt", "--out", out]
    awq_merge_stats.main([str(arg) for arg in merged])
    assert "never overwritten" in fails(capsys, merged)
    assert [path.name for path in tmp_path.iterdir()] == ["all.pt"]


def test_files_without_any_data_leave_no_output(tmp_path):
    empty = {"format": 1, "tasks": ["t2i"], "n_linears": 0, "stats": {}, "runs": [{"run_id": "a"}]}
    torch.save(empty, tmp_path / "empty.pt")
    with pytest.raises(InputError, match="no file of --inputs has data"):
        awq_merge_stats.main(["--inputs", str(tmp_path / "empty.pt"), "--out", str(tmp_path / "all.pt")])
    assert not (tmp_path / "all.pt").exists()
