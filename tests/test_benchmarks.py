"""The benchmarks' own machinery, at sizes that take a second."""

import json
from pathlib import Path

import pytest
import torch
from conftest import CPU

import awq_apply
from benchmarks import apply_full_size, kill_stages, loader_memory, nano_experiments, synthetic_lance
from lance_nano.evaluate import Share
from lance_quant.formats.packed_folder import PackedFolder
from lance_quant.lance.config import LancePaths
from lance_quant.lance.generation import Sampling
from lance_quant.lance.runtime import Runtime
from lance_quant.methods import published
from lance_quant.storage.tensor_file import Checkpoint


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("synthetic") / "tiny"
    synthetic_lance.main(["--preset", "tiny", "--layers", "2", "--video", "--out", str(out)])
    return out


def test_a_synthetic_model_runs_and_quantizes(synthetic, tmp_path):
    """Its statistics fit its weights; its ViT is inside, as in the video checkpoint."""
    awq_apply.main(["--src", str(synthetic / "Lance_3B"), "--stats", str(synthetic / "stats.pt"), "--out",
                    str(tmp_path / "int4"), "--device", "cpu"])
    with PackedFolder(tmp_path / "int4") as folder:
        assert folder.meta["awq_linears"] + folder.meta["plain_linears"] == 28
    pipeline = Runtime.load(LancePaths.find(synthetic / "Lance_3B"), CPU, torch.float32)
    assert pipeline.vit.tower.config.depth == 2
    sampling = Sampling(num_timesteps=1)
    latent = pipeline.sample(pipeline.denoiser("a boat", 32, 32, sampling))
    assert torch.isfinite(latent).all()


def test_synthetic_values_depend_on_seed_and_place_only(synthetic, tmp_path):
    """The first layer is the same in a file of one layer, and another with another seed."""
    name = "language_model.model.layers.0.mlp_moe_gen.up_proj.weight"
    synthetic_lance.main(["--preset", "tiny", "--layers", "1", "--out", str(tmp_path / "one")])
    synthetic_lance.main(["--preset", "tiny", "--layers", "1", "--seed", "1", "--out", str(tmp_path / "other")])
    read = [Checkpoint(folder / "Lance_3B").read(name) for folder in (synthetic, tmp_path / "one", tmp_path / "other")]
    assert torch.equal(read[0], read[1]) and not torch.equal(read[0], read[2])


def test_loader_memory_reports_the_model_and_what_it_cost(synthetic, capsys):
    loader_memory.main(["--model_path", str(synthetic / "Lance_3B"), "--device", "cpu", "--dtype", "bfloat16"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    with Checkpoint(synthetic / "Lance_3B") as source:
        weights = sum(spec.nbytes for name, spec in source.specs.items()
                      if not name.startswith(("vit_model.", "latent_pos_embed."))) // 2
    assert weights < result["model"] < 1.2 * weights  # beside the weights: position tables and rotary frequencies
    assert result["beside_model"] == result["peak_above_start"] - result["model"]


def test_the_published_table_of_distances_gives_the_published_codes():
    ratio = torch.cat([torch.linspace(-8, 8, 6401), torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.0])])
    assert torch.equal(apply_full_size._index_by_distances(ratio), published._index(ratio))


def test_apply_full_size_measures_both_and_leaves_nothing(tmp_path, capfd, monkeypatch):
    """In this process, where peaks are everybody's: three new ones would import torch and transformers again."""
    monkeypatch.setattr(apply_full_size, "in_child", lambda function, *args: function(*args))
    work = tmp_path / "work"
    apply_full_size.main(["--work", str(work), "--preset", "tiny", "--layers", "1", "--formats", "int4"])
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert result["layers"] == 1 and not work.exists()
    found = result["int4"]
    assert all(found[row][key] > 0 for row in ("ours", "published") for key in ("seconds", "cpu_seconds", "peak_rss"))
    assert found["times_faster"]["seconds"] == found["published"]["seconds"] / found["ours"]["seconds"]


class _Draw:
    """Moments of kills: before anything is written, in the middle, and at the end."""

    def __init__(self, seed):
        self.moments = iter([0.1, 0.5, 0.9])

    def random(self):
        return next(self.moments)


@pytest.mark.slow
def test_killed_stages_are_counted_and_an_output_that_changed_is_seen(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(kill_stages.random, "Random", _Draw)
    kill_stages.main(["--kills", "3", "--stages", "merge_lora"])
    found = json.loads(capfd.readouterr().out.splitlines()[-1])["merge_lora"]
    assert found["kills"] == 3 and found["half"] == found["unequal"] == 0

    script = tmp_path / "a_stage.py"  # publishes at once what is not whole, and takes a second
    script.write_text("import pathlib, time\ndef main(flags):\n    out = pathlib.Path(flags[-1])\n"
                      "    out.write_text('half')\n    time.sleep(1)\n    out.write_text('whole')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    test = kill_stages.Test(tmp_path / "runs", kill_stages.Stage("a_stage", (), (("--out", "file"),)))
    count = kill_stages.Count()
    test.kill_once(0.5, count)
    assert (count.kills, count.published, count.half, count.unequal) == (1, 1, 1, 1)


def test_rounding_to_8_bits_by_hand():
    """0 to 255 is its own grid; halves in between go to a neighbour."""
    w = torch.arange(256.0)[None]
    assert torch.equal(nano_experiments.round_to_8_bits(w, 256), w)
    rounded = nano_experiments.round_to_8_bits(torch.tensor([[0.0, 0.4, 255.0, 127.6]]), 4)
    torch.testing.assert_close(rounded, torch.tensor([[0.0, 0.0, 255.0, 128.0]]))
    assert torch.equal(nano_experiments.round_to_8_bits(torch.full((1, 64), 3.0)), torch.full((1, 64), 3.0))


def test_experiment_rows_pool_the_seeds():
    rows = [nano_experiments.Measured(Share(9, 10), Share(10, 10), kl, [0.1, 0.3], [0.0, 0.2]) for kl in (0.1, 0.3)]
    row = nano_experiments.summarize("x", rows)
    assert row["answers"] == {"rate": 0.9, "interval": Share(18, 20).interval(), "n": 20}
    assert row["kl"]["mean"] == pytest.approx(0.2) and row["velocity"]["mean"] == pytest.approx(0.2)
    assert "| x | 90.0 % (" in nano_experiments.table([row])
