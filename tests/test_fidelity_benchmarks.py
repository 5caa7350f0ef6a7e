"""The benchmarks that compare quantizers, at sizes that take a second or two."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from conftest import CPU

from benchmarks import (
    activation_rounding,
    bits_budget,
    fidelity_nano,
    fidelity_synthetic,
    lance_nano_harness,
    outlier_ratios,
    quantize_cost,
    synthetic_lance,
)
from lance_nano import evaluate
from lance_nano.evaluate import Share
from lance_quant.calibration.layer_inputs import LayerInputs
from lance_quant.errors import InputError
from lance_quant.formats.int4 import Int4

CONFIG_OF = fidelity_synthetic.config_of
# Lance's structure, smaller than any --shrink.
CONFIG = dataclasses.replace(fidelity_synthetic.config_of(8), hidden_size=128, intermediate_size=256,
                             mrope_section=(1, 1, 2))


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(fidelity_synthetic, "config_of", lambda shrink, layers=1: CONFIG)


@pytest.mark.parametrize("outliers", fidelity_synthetic.GAINS)
@pytest.mark.parametrize("ratio", [5.35, 13.1])
def test_made_up_weights_have_the_published_ratio(outliers, ratio):
    """Twelve halvings of a deviation of 1.5; the largest of many groups moves by a few percent per step at most."""
    w = fidelity_synthetic.draw_weight((256, 512), ratio, outliers, torch.Generator().manual_seed(0))
    assert 0.95 * ratio < fidelity_synthetic.group_ratio(w) <= ratio
    assert float(w.square().mean()) == pytest.approx(1, rel=1e-5)


def test_a_ratio_below_a_gaussians_gives_a_gaussian():
    w = fidelity_synthetic.draw_weight((64, 256), 1.1, "rows", torch.Generator().manual_seed(0))
    assert 1.3 < fidelity_synthetic.group_ratio(w) < 2.5


def test_group_ratio_by_hand():
    w = torch.tensor([[1.0, -2.0, 0.5, 0.0], [3.0, 0.0, -12.0, 1.0]])
    assert fidelity_synthetic.group_ratio(w, 2) == 12 / 2  # of 2, 0.5, 3 and 12 the lower median


def test_lances_structure_survives_shrinking():
    for shrink in (1, 2, 4, 8):
        config = CONFIG_OF(shrink)
        assert config.num_attention_heads * config.head_dim == config.hidden_size == 2048 // shrink
        assert sum(config.mrope_section) == config.head_dim // 2 and config.intermediate_size % 128 == 0
    assert CONFIG_OF(1).intermediate_size == 11008


@pytest.fixture(scope="module")
def layer():
    weights = fidelity_synthetic.draw_layer(CONFIG, 0, fidelity_synthetic.DEPTHS[0], "rows", 0)
    calls = fidelity_synthetic.draw_calls(CONFIG, 128, 0)
    return weights, calls, fidelity_synthetic.statistics_of(CONFIG, [weights], calls)


@pytest.mark.parametrize("method", ["published", "ours_diagonal", "rtn_g64"])
def test_the_target_of_every_method_is_the_float_layer(layer, method):
    """Errors are judged against a layer with the same scales: it must compute what the float one does. The published
    recipe rounds its norms to bfloat16, the target's weights make up for that."""
    weights, calls, stats = layer
    packed, target = fidelity_synthetic.quantize(0, weights, method, Int4(64), stats,
                                                 LayerInputs(CONFIG, calls, CPU))
    wanted, same, off = (fidelity_synthetic.run(CONFIG, 0, w, calls)[0] for w in (weights, target, packed))
    assert fidelity_synthetic.relative(wanted, same, calls) < 1e-9  # float32 sums in another order: 1e-12
    assert 1e-4 < fidelity_synthetic.relative(wanted, off, calls) < 0.5


def test_synthetic_methods_go_through_the_real_code(layer, monkeypatch):
    monkeypatch.setattr(fidelity_synthetic, "DEPTHS", fidelity_synthetic.DEPTHS[:1])
    monkeypatch.setattr(fidelity_synthetic, "METHODS", {"int4": [("published", Int4(64)), ("ours", Int4(64))]})
    args = fidelity_synthetic.parse_args(["--tokens", "256", "--held_out", "128", "--formats", "int4"])
    found = fidelity_synthetic.measure("rows", 0, args)
    assert found["int4 ours"]["e2e"] < 0.7 * found["int4 published"]["e2e"]
    assert "| rows | int4 published |" in fidelity_synthetic.table({"rows": found})


@pytest.mark.parametrize("method", ["rtn", "ours"])
def test_cost_is_measured_with_the_layers_own_size(method):
    found = quantize_cost.measure(method, "int4", "cpu", tokens=64, shrink=8)
    # Per expert q, o, k, v, gate, up, down; the rest is biases and norms, below two percent.
    linears = 2 * (2 * 128 * 128 + 2 * 128 * 16 + 3 * 128 * 256)
    assert 4 * linears < found["layer_bytes"] < 1.02 * 4 * linears < found["peak_bytes"]
    assert found["full_model_hours"] == found["cpu_seconds"] * 36 / 3600 and found["cpu_seconds"] > 0
    assert (min(found.get("inputs_seconds", 0), found.get("relevance_seconds", 0)) > 0) == (method == "ours")
    assert f"| {method} |" in quantize_cost.table({method: found})


def test_spread_of_a_lognormal_is_its_deviation():
    """Quantiles at one deviation either side; 20000 draws fix them to a few percent. Silent channels do not count."""
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).mul(0.5).exp()
    x[:100] *= 100
    found = outlier_ratios.spread_of(torch.cat([x, torch.zeros(50)]))
    assert found["spread"] == pytest.approx(0.5, rel=0.05)
    assert found["hot"] == pytest.approx(0.005, abs=1e-3) and found["largest"] > 100


def test_ratios_are_reported_beside_lances(tmp_path, capsys):
    synthetic_lance.main(["--preset", "tiny", "--layers", "1", "--out", str(tmp_path / "tiny")])
    outlier_ratios.main(["--model_path", str(tmp_path / "tiny/Lance_3B"), "--stats", str(tmp_path / "tiny/stats.pt")])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("| und down_proj |") and line.endswith("| 13.10 | 28.96 |") for line in lines)
    result = json.loads(lines[-1])
    assert result["weights"]["all"]["largest"] >= result["weights"]["und v_proj"]["median"] > 1
    assert set(result["activations"]) == {f"{expert} {depth}" for expert in ("und", "gen")
                                          for depth in ("first", "middle", "last")}


def test_answers_run_together_give_what_each_gives_alone():
    """Three lengths of prompt and answer; float32 sums in another order: 2e-5 in log-probabilities of up to 20."""
    pipeline = lance_nano_harness.load(lance_nano_harness.MODEL)
    asked = [*evaluate.held_out_questions(3, 0), *evaluate.held_out_descriptions(1, 0)]
    requests = lance_nano_harness.requests_of(pipeline, [*asked, *asked[:2]])
    ids = [pipeline.answer(*request, 48).ids for request in requests]
    together = fidelity_nano.forced_logprobs(pipeline, requests, ids)
    for request, answer, found in zip(requests, ids, together, strict=True):
        torch.testing.assert_close(found, pipeline.forced_logprobs(*request, answer), rtol=0, atol=2e-4)
        assert found.argmax(-1).tolist() == answer


@pytest.mark.slow
def test_nano_methods_are_measured_on_the_float_models_own_tokens(monkeypatch):
    """One question, one caption, two steps: the float model agrees with itself, a packed one is near."""
    monkeypatch.setattr(fidelity_nano, "METHODS", ("published",))
    args = fidelity_nano.parse_args(["--formats", "int4", "--answers", "2", "--n", "1", "--traced", "1", "--steps", "2",
                                     "--questions", "1", "--captions", "1"])
    found = fidelity_nano.measure(0, args)
    own, packed = found["float"], found["int4 published"].distance
    assert np.concatenate(own.kl).max() < 1e-6 and (len(own.short), len(own.long)) == (2, 1)
    assert max(own.distance.velocity) < 1e-5
    assert own.distance.same == Share(2, 2)  # a short question and a description
    assert len(packed.velocity) == 2 and 0 < max(packed.velocity) < 1


def test_nano_needs_something_to_measure():
    for benchmark, flag in ((fidelity_nano, "answers"), (activation_rounding, "traced"), (bits_budget, "n")):
        with pytest.raises(InputError, match=f"--{flag} 0: at least one"):
            benchmark.parse_args([f"--{flag}", "0"])


def test_nano_rows_pool_the_seeds_and_are_compared_with_published():
    short, long = np.full(2, 0.1), np.full(8, 0.1)
    apart = lance_nano_harness.Distance(Share(9, 10), Share(8, 10), Share(10, 10), 0.1, [0.1, 0.3])
    row = fidelity_nano.Judged(apart, [short], [long])
    better = fidelity_nano.Judged(dataclasses.replace(apart, velocity=[0.1, 0.1]), [0.5 * short], [0.2 * long])
    runs = [{"float": row, "int4 published": row, "int4 ours": better}] * 2
    rows = [fidelity_nano.summarize(name, [run[name] for run in runs]) for name in runs[0]]
    fidelity_nano.compare(rows, runs)
    assert rows[2]["answers"]["n"] == 20 and rows[2]["velocity_by_step"] == [0.1, 0.1] and rows[2]["tokens"] == 20
    assert rows[2]["kl_of_published"] == pytest.approx(0.26)  # 2 tokens at a half, 8 at a fifth
    assert rows[2]["kl_by_kind"] == pytest.approx({"short": 0.05, "descriptions": 0.02})
    assert rows[2]["kl_of_published_interval"] == pytest.approx([0.2, 0.5], abs=0.05)  # of two answers, one may be both
    assert rows[2]["squared_of_published"] == pytest.approx(0.25) and "kl_of_published" not in rows[0]
    assert "| int4 ours | 90.0 % (" in fidelity_nano.table(rows)
    nothing = [{"int4 published": fidelity_nano.Judged(apart, [0 * short], [0 * long])}]
    empty = [fidelity_nano.summarize("int4 published", [run["int4 published"] for run in nothing])]
    fidelity_nano.compare(empty, nothing)
    assert math.isnan(empty[0]["kl_of_published"]) and math.isnan(empty[0]["kl_in_top_percent"])


def test_the_loudest_percent_by_hand():
    assert fidelity_nano.top_percent(np.array([1.0] * 100 + [30.0] * 50 + [50.0] * 50)) == 100 / 4100


def test_an_interval_of_equal_ratios_is_that_ratio():
    """Answers differ a hundredfold, and the ratio does not: drawing pairs is exact, drawing apart would be far off."""
    theirs = [[np.array([0.01 * 10 ** (index % 3)]) for index in range(50)]] * 2
    ours = [[0.3 * part for part in seed] for seed in theirs]
    assert fidelity_nano.ratio_interval(ours, theirs) == pytest.approx([0.3, 0.3], rel=1e-5)


def test_kernels_that_cannot_run_a_method_or_format_say_so():
    for flags, said in ((["--kernel", "native_w4a8", "--methods", "rtn"], "take --methods ours_diagonal"),
                        (["--format", "int4"], "take --format nvfp4")):
        with pytest.raises(InputError, match=said):
            activation_rounding.parse_args(flags)


@pytest.mark.parametrize("flags", [["--methods", "rtn"], ["--kernel", "native_w4a8", "--format", "int4"]],
                         ids=["w4a4", "w4a8"])
@pytest.mark.slow
def test_rounded_activations_are_measured_beside_rounded_weights_alone(capsys, flags):
    few = ["--n", "1", "--traced", "1", "--steps", "2", "--questions", "1", "--captions", "1"]
    activation_rounding.main([*few, *flags])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1] for line in lines[2:4]] == ["weights", "weights and activations"]
    weights, both = json.loads(lines[-1])["models"]
    assert weights["velocity"] > 0 and weights["kl"] > 0
    ratio = both["velocity"] / weights["velocity"]
    # 8 bits per token add steps of a 254th of the largest value to errors of a fifth; 4 bits add as much again
    assert 0.9 < ratio < 1.1 and ratio != 1 if "native_w4a8" in flags else ratio > 1.1
