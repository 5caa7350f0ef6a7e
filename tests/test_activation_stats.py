import logging
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from lance_quant.calibration.activation_stats import (
    ActStats,
    Collector,
    LinearStats,
    coverage,
    merge,
    model_fingerprint,
)
from lance_quant.errors import InputError
from lance_quant.formats import layout
from lance_quant.storage.tensor_file import Checkpoint

GOLDENS = Path(__file__).parent / "goldens"
PUBLISHED = GOLDENS / "published"
Q, K = layout.groups(0)[0].linears[:2]
GEN = layout.groups(0)[1].linears[0]


def entry(width=4, tokens=10, size=1.0):
    value = torch.full((width,), size * tokens, dtype=torch.float64)
    return LinearStats(value, value * 2, value / tokens, tokens, 1)


def stats(names=(Q,), run_id="a", model="m", **kwargs):
    run = {"run_id": run_id, "task": "t2i", "model": model}
    return ActStats({name: entry(**kwargs) for name in names}, ["t2i"], [run], 14)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.idle = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        return self.q(x) + self.k(x)


def test_the_collector_counts_what_went_in():
    model, x, y = Toy(), torch.tensor([[[1.0, -2, 3], [0, 1, -5]]]), torch.tensor([[-1.0, 0, 0]])
    with Collector(model, ["q", "k", "idle"]) as collector:
        model(x), model(y), model(torch.zeros(0, 3))
    model(x)  # after the block nothing is counted
    got = collector.stats("t2i", {"seed": 42, "model": "m"})
    assert set(got.linears) == {"q", "k"} and got.n_linears == 3 and got.tasks == ["t2i"]
    for name in ("q", "k"):
        linear = got.linears[name]
        assert linear.sum_abs.tolist() == [2, 3, 8] and linear.sum_sq.tolist() == [2, 5, 34]
        assert linear.max_abs.tolist() == [1, 2, 5] and (linear.n_tokens, linear.n_calls) == (3, 3)
        assert linear.sum_abs.dtype == torch.float64
    assert got.runs[0]["seed"] == 42 and len(got.runs[0]["run_id"]) == 32


def test_the_collector_agrees_with_one_big_sum_in_any_dtype():
    x = torch.randn(2500, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    model = Toy().bfloat16()
    with Collector(model, ["q"]) as collector, torch.inference_mode():
        model(x[:2100]), model(x[2100:])
    torch.testing.assert_close(collector.stats("t").linears["q"].sum_sq, x.double().square().sum(0))


def test_a_tensor_that_changes_in_place_is_measured_anew():
    model, x = Toy(), torch.ones(1, 3)
    with Collector(model, ["q", "k"]) as collector, torch.no_grad():
        model.q(x)
        x.mul_(2)
        model.k(x)
    assert collector.stats("t").linears["k"].sum_abs.tolist() == [2, 2, 2]


def test_the_collector_refuses_unknown_names_no_tokens_and_nan():
    with pytest.raises(InputError, match="nothing.here"):
        Collector(Toy(), ["nothing.here"])
    with Collector(Toy(), ["q"]) as collector:
        pass
    with pytest.raises(InputError, match="no token reached"):
        collector.stats("t2i")
    model = Toy()
    with Collector(model, ["q"]) as collector:
        model(torch.tensor([[1.0, float("nan"), 0]]))
    with pytest.raises(InputError, match="input of q is NaN"):
        collector.stats("t2i")


def test_save_and_load_round_trip(tmp_path):
    before = stats((Q, K))
    before.save(tmp_path / "a.pt")
    after = ActStats.load(tmp_path / "a.pt")
    assert (after.tasks, after.runs, after.n_linears) == (before.tasks, before.runs, 14)
    assert all(torch.equal(after.linears[name].sum_sq.double(), before.linears[name].sum_sq) for name in (Q, K))
    raw = torch.load(tmp_path / "a.pt", weights_only=True)  # what published readers look at
    assert raw["format"] == 1 and raw["task"] == "t2i" and raw["stats"][Q]["sum_abs"].dtype == torch.float32
    with pytest.raises(InputError, match="never overwritten"):
        before.save(tmp_path / "a.pt")


def test_published_files_load_and_merge_to_the_published_merge():
    parts = [ActStats.load(PUBLISHED / f"{task}_stats.pt") for task in ("x2t_image", "t2i")]
    merged, golden = merge(parts), ActStats.load(PUBLISHED / "act_stats.pt")
    assert merged.tasks == golden.tasks == ["x2t_image", "t2i"] and merged.linears.keys() == golden.linears.keys()
    for name, linear in golden.linears.items():
        assert torch.equal(merged.linears[name].sum_abs.float(), linear.sum_abs)
        assert merged.linears[name].n_tokens == linear.n_tokens and linear.sum_sq is None
        mean = linear.sum_abs / linear.n_tokens
        torch.testing.assert_close(linear.mean_square, mean**2)


def test_merging_adds_sums_and_takes_the_larger_maximum(tmp_path):
    merged = merge([stats(run_id="a", tokens=10, size=1.0), stats((Q, GEN), run_id="b", tokens=30, size=3.0)])
    linear = merged.linears[Q]
    assert (linear.sum_abs[0], linear.sum_sq[0], linear.max_abs[0]) == (100, 200, 3)
    assert (linear.n_tokens, linear.n_calls, merged.linears[GEN].n_tokens) == (40, 2, 30)
    assert merged.tasks == ["t2i", "t2i"] and [run["run_id"] for run in merged.runs] == ["a", "b"]
    merged.save(tmp_path / "m.pt")
    assert ActStats.load(tmp_path / "m.pt").runs == merged.runs


def test_a_weight_scales_tokens_and_sums_and_keeps_means():
    merged = merge([stats(run_id="a", tokens=10, size=1.0), stats(run_id="b", tokens=10, size=3.0)], weights=[3, 1])
    assert merged.linears[Q].n_tokens == 40
    assert float(merged.linears[Q].sum_abs[0]) / 40 == pytest.approx((3 * 1 + 1 * 3) / 4)
    assert merged.runs[0]["weight"] == 3
    tiny = merge([stats(tokens=1, size=2.0)], weights=[0.001])
    assert tiny.linears[Q].n_tokens == 1 and tiny.linears[Q].sum_abs[0] == 2


def test_a_sum_that_one_part_lacks_is_dropped():
    legacy = replace(stats(run_id="b"), linears={Q: replace(entry(), sum_sq=None, max_abs=None)})
    assert merge([stats(), legacy]).linears[Q].sum_sq is None


@pytest.mark.parametrize("parts, weights, message", [
    ([], None, "nothing to merge"),
    ([stats(), stats()], None, "listed twice"),
    ([stats(), stats(run_id="b", model="other")], None, "different models: fingerprints m, other"),
    ([stats(), stats(run_id="b", width=8)], None, "4 and 8 inputs"),
    ([stats(), stats((Q, Q.replace(".0.", ".1.")), run_id="b")], None, "1 and 2 layers"),
    ([stats()], [1.0, 2.0], "positive weights"), ([stats()], [0.0], "positive weights"),
    ([stats()], [float("nan")], "positive weights"),
])
def test_what_does_not_belong_together_is_refused(parts, weights, message):
    with pytest.raises(InputError, match=message):
        merge(parts, weights)


def test_a_published_file_given_twice_is_recognised_by_its_content():
    twice = [ActStats.load(PUBLISHED / "t2i_stats.pt") for _ in range(2)]
    with pytest.raises(InputError, match="listed twice"):
        merge(twice)


def bad(**changes):
    good = {"sum_abs": torch.ones(4), "n_tokens": 3, "n_calls": 1}
    return {"format": 1, "task": "t", "n_linears": 1, "stats": {Q: {**good, **changes}}}


@pytest.mark.parametrize("value, message", [
    (bad(sum_abs=torch.tensor([1.0, float("nan"), 0, 0])), "NaN"), (bad(sum_abs=-torch.ones(4)), "negative"),
    (bad(sum_sq=torch.ones(5)), "width of sum_abs"), (bad(sum_abs=torch.ones(2, 2)), "one dimension"),
    (bad(sum_abs=None), "no sum_abs"), (bad(n_tokens=-1), "n_tokens"), (bad(n_tokens=1.5), "n_tokens"),
    ({"format": 2, "stats": {}}, "format 1"), ([1], "format 1"),
    ({**bad(), "runs": [{}]}, r"lacks \['runs.0.run_id'\]"),
])
def test_a_damaged_statistics_file_is_refused(tmp_path, value, message):
    torch.save(value, tmp_path / "s.pt")
    with pytest.raises(InputError, match=message):
        ActStats.load(tmp_path / "s.pt")


def test_a_file_that_is_no_statistics_or_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, ("true",)

    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    stats().save(tmp_path / "short.pt")
    (tmp_path / "short.pt").write_bytes((tmp_path / "short.pt").read_bytes()[:300])
    for name in ("evil", "text", "empty", "short"):
        with pytest.raises(InputError, match="is no statistics file"):
            ActStats.load(tmp_path / f"{name}.pt")
    with pytest.raises(InputError, match="not found"):
        ActStats.load(tmp_path / "absent.pt")


def test_statistics_of_another_model_are_refused(caplog):
    stats().require_model("m", {Q: 4})
    with pytest.raises(InputError, match="another model.*fingerprint"):
        stats().require_model("other", {Q: 4})
    for widths in ({Q: 8}, {K: 4}):
        with pytest.raises(InputError, match="another model: 1 linears"):
            stats().require_model("m", widths)
    with caplog.at_level(logging.WARNING, "lance_quant"):
        stats(model=None).require_model("m", {Q: 4})
    assert len(caplog.records) == 1


def test_coverage_counts_per_expert_and_names_the_one_without_data():
    text = coverage(ActStats.load(PUBLISHED / "x2t_image_stats.pt"), layout.linears(3))
    assert "und     21 of 21" in text and "gen     0 of 21" in text and "the gen expert" in text
    assert "expert will be" not in coverage(ActStats.load(PUBLISHED / "act_stats.pt"), layout.linears(3))


def test_the_fingerprint_is_of_the_language_model_only():
    with Checkpoint(GOLDENS / "checkpoint" / "Lance_3B") as checkpoint:
        names = [name for name in checkpoint.specs if name.startswith("language_model.")]
        assert model_fingerprint(checkpoint) == checkpoint.fingerprint(names)


def test_the_same_calibration_run_twice_is_the_same_run():
    """Repeating a command must not let its tokens count double; another seed is another run."""
    def measured(seed):
        with Collector(torch.nn.Sequential(torch.nn.Linear(4, 4)), ["0"]) as collector:
            collector._modules["0"](torch.ones(2, 4))
        return collector.stats("t2i", {"model": "m", "seed": seed}).runs[0]["run_id"]

    assert measured(1) == measured(1) != measured(2)
