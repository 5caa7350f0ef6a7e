"""The C functions against the definitions in PyTorch: equal in every bit, whatever the weight holds."""

import pytest
import torch

from lance_quant.calibration import gram
from lance_quant.cpu import rounding
from lance_quant.cpu.weighted_sums import totals, weighted_squares
from lance_quant.formats.base import errors_by_definition, measured_by_definition
from lance_quant.formats.blocks import quantize_measured
from lance_quant.formats.int4 import Int4
from lance_quant.formats.nvfp4 import Nvfp4
from lance_quant.methods import awq, gptq

CODECS = [Int4(8), Int4(16), Int4(32), Int4(64), Int4(128), Int4(24), Nvfp4(), Nvfp4(slim=True)]
codecs = pytest.mark.parametrize("codec", CODECS, ids=str)
needs_c = pytest.mark.skipif(rounding.unavailable() is not None, reason=f"rounding: {rounding.unavailable()}")


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(rounding, "_library_or_reason", lambda: (None, "there is no C compiler; install gcc"))


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def width_of(codec):
    return 3 * max(codec.group_size, 16)  # a multiple of every group size above


def weights(codec):
    """What each weight is for, and the weight [out, in]."""
    w, n_in = rand(37, width_of(codec)) * 0.02, width_of(codec)
    halves = (rand(19, n_in, seed=1) * 8).round() / 16
    halves[:, ::codec.group_size] = 7.5  # scale 1/2: many values lie between two levels
    mixed = w.clone()
    mixed[3], mixed[:, :codec.group_size] = 0, 0
    mixed[5], mixed[6], mixed[7] = 0.25, -0.25, 1e-30
    mixed[8:10] *= 1e18
    return {"gaussian": w, "single output": w[:1], "16 outputs": w[:16], "all zero": torch.zeros(5, n_in),
            "halves": halves, "zeros, constants, tiny and huge": mixed, "subnormal": w * 1e-39,
            "negative zeros": torch.where(rand(37, n_in, seed=2) < 0, w, -0.0), "one sign": w.abs(),
            "outliers": w * (1 + 300 * (rand(37, n_in, seed=3) > 2))}


CASES = list(weights(Int4(8)))
cases = pytest.mark.parametrize("case", CASES)


def global_scale_of(codec, w):
    return codec.quantizer.global_scale(float(w.abs().max()))


def equal(ours, theirs):
    if ours is None or isinstance(ours, float):
        return ours == theirs
    return ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(ours, theirs)


def all_equal(ours, theirs):
    return all(equal(a, b) for a, b in zip(ours, theirs, strict=True))


@needs_c
@codecs
@cases
def test_plain_rounding_is_the_definition(codec, case, monkeypatch):
    w = weights(codec)[case]
    found = codec.quantizer.quantize(w, global_scale_of(codec, w))
    monkeypatch.setattr(rounding, "serves", lambda w, group_size: False)
    assert all_equal(found, codec.quantizer.quantize(w, global_scale_of(codec, w)))


@needs_c
@codecs
@cases
@pytest.mark.parametrize("importance", ["lognormal", "one"])
def test_searched_grids_bytes_and_sums_are_those_of_the_definition(codec, case, importance, monkeypatch):
    w, quantizer = weights(codec)[case], codec.quantizer
    global_scale = global_scale_of(codec, w)
    weight = torch.ones(w.shape[1]) if importance == "one" else rand(w.shape[1], seed=4).mul(2).exp()
    found, grid = quantizer.measured(w, weight, global_scale), quantizer.grid(w.t(), weight, global_scale)
    monkeypatch.setattr(rounding, "serves", lambda w, group_size: False)
    expected = measured_by_definition(quantizer, w, weight, global_scale)
    assert all_equal(found.q, expected.q) and equal(found.sums, expected.sums)
    assert all_equal(grid, quantizer.grid(w.t().contiguous(), weight, global_scale))


@needs_c
@codecs
@cases
def test_errors_of_candidates_are_those_of_the_definition(codec, case):
    w, quantizer = weights(codec)[case], codec.quantizer
    factors, each = rand(5, w.shape[1], seed=5).exp(), rand(6, w.shape[1], seed=6).exp()
    global_scales = [global_scale_of(codec, w * factor) for factor in factors]
    assert equal(quantizer.errors(w, factors, each, global_scales),
                 errors_by_definition(quantizer, w, factors, each, global_scales))


@needs_c
@codecs
def test_strides_change_nothing(codec):
    """Rows that are skipped, columns that are a part, and a weight that is stored transposed."""
    n_in, weight = width_of(codec), torch.ones(width_of(codec))
    whole = rand(60, 3 * n_in)
    for w in (whole[::3, n_in:2 * n_in], rand(n_in, 20).t(), rand(2 * n_in, 20).t()[:, ::2]):
        found, expected = (codec.quantizer.measured(x, weight, global_scale_of(codec, w)) for x in (w, w.contiguous()))
        assert all_equal(found.q, expected.q) and equal(found.sums, expected.sums)


@needs_c
@codecs
@pytest.mark.slow
def test_a_group_gives_the_same_with_and_without_a_compiler(codec, monkeypatch):
    """Both ways through everything that quantizing from statistics does, blocks and totals included."""
    monkeypatch.setattr("lance_quant.formats.blocks._CPU_ROWS", 16)
    monkeypatch.setattr("lance_quant.formats.blocks._CPU_BLOCK", 32 * codec.group_size)
    n_in = 6 * width_of(codec)
    group, m2 = [rand(37, n_in) * 0.02, rand(20, n_in, seed=1) * 0.03], rand(n_in, seed=2).exp()

    def results():
        scale = awq.search(group, torch.ones(n_in), m2, codec.quantizer)
        scaled = [w * scale.folded.column for w in group]
        importance = awq.importance(m2 / scale.folded.column**2)
        global_scale = global_scale_of(codec, torch.cat(scaled))
        packed, errors = quantize_measured(codec.quantizer, scaled, importance, global_scale)
        return scale, packed, errors

    scale, packed, errors = results()
    monkeypatch.setattr(rounding, "_library_or_reason", lambda: (None, "there is no C compiler; install gcc"))
    plain_scale, plain_packed, plain_errors = results()
    assert (scale.candidate.label, scale.before, scale.after) == \
        (plain_scale.candidate.label, plain_scale.before, plain_scale.after)
    assert errors == plain_errors
    assert all(all_equal(q, plain) for q, plain in zip(packed, plain_packed, strict=True))


@needs_c
@codecs
@pytest.mark.parametrize("n_out", [1, 16, 37, 600])
def test_gptq_gives_the_same_with_and_without_a_compiler(codec, n_out, monkeypatch):
    """More columns than gptq.BLOCK, more outputs than gptq.OUTPUTS; two threads and one."""
    n_in = width_of(codec)
    x = rand(3 * n_in, n_in) @ rand(n_in, n_in, seed=1)
    inputs = gram.GramStats(x.t() @ x, len(x), len(x), x[:0], x[:0])
    w_io = rand(n_in, n_out, seed=2) * 0.02
    w_io[:, n_out // 2] = 0
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = gptq.round_weight(w_io, inputs, codec.quantizer, global_scale_of(codec, w_io))
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(rounding, "_library_or_reason", lambda: (None, "there is no C compiler; install gcc"))
    expected = gptq.round_weight(w_io, inputs, codec.quantizer, global_scale_of(codec, w_io))
    assert found.method == expected.method == "gptq"
    assert torch.equal(found.values, expected.values) and all_equal(found.grid, expected.grid)


@needs_c
@codecs
def test_revisited_gradients_are_those_of_the_definition(codec, monkeypatch):
    n, n_out = 2 * codec.group_size, 37
    x, target = rand(3 * n, n), rand(n, n_out, seed=1)
    grid = codec.quantizer.grid(target, torch.ones(n), global_scale_of(codec, target))
    results = []
    for served in (True, False):
        if not served:
            monkeypatch.setattr(rounding, "_library_or_reason", lambda: (None, "there is no C compiler; install gcc"))
        values, gradient = rand(n, n_out, seed=2), rand(n, n_out, seed=3) * n
        gptq._revisit(values, gradient, x.t() @ x, 0, grid, codec.quantizer)
        results.append((values, gradient))
    assert all_equal(*results)


@needs_c
@codecs
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(codec, value):
    w = rand(20, width_of(codec))
    w[17, 5] = value
    quantizer, one = codec.quantizer, torch.ones(w.shape[1])
    for quantize in (quantizer.quantize, lambda w, global_scale: quantizer.measured(w, one, global_scale)):
        with pytest.raises(ValueError, match="NaN or Inf"):
            quantize(w, quantizer.global_scale(1.0))


def test_only_float32_on_the_cpu_in_groups_of_multiples_of_8_is_served(no_compiler, monkeypatch):
    assert not rounding.serves(torch.zeros(4, 64), 64)
    monkeypatch.setattr(rounding, "_library_or_reason", lambda: (object(), None))
    assert rounding.serves(torch.zeros(4, 64), 64)
    assert not rounding.serves(torch.zeros(4, 64, dtype=torch.bfloat16), 64)
    assert not rounding.serves(torch.zeros(4, 64, device="meta"), 64)
    assert not rounding.serves(torch.zeros(4, 60), 20) and not rounding.serves(torch.zeros(4, 60), 64)


def test_without_a_compiler_there_is_a_reason_and_no_library(no_compiler):
    assert "no C compiler" in rounding.unavailable()
    with pytest.raises(RuntimeError, match="not available: there is no C compiler"):
        rounding.quantize_int4(torch.zeros(4, 64), 64)


@pytest.mark.parametrize("size", [1, 2, 6, 8, 12, 16, 64])
def test_weighted_squares_are_the_sum_in_its_order(size):
    """Against the same sums one number at a time, in float32; and to rounding against float64."""
    off, weight = rand(3, size, 5), rand(3, size, seed=1).exp()
    lanes = max(n for n in (1, 2, 4, 8) if size % n == 0)
    found = weighted_squares(off.clone(), weight)
    for group in range(3):
        for out in range(5):
            sums = [torch.zeros(()) for _ in range(lanes)]
            for i in range(size):
                term = off[group, i, out] * off[group, i, out] * weight[group, i]
                sums[i % lanes] = sums[i % lanes] + term
            while len(sums) > 1:
                half = len(sums) // 2
                sums = [a + b for a, b in zip(sums[:half], sums[half:], strict=True)]
            assert torch.equal(found[group, out], sums[0])
    exact = (off.double().square() * weight[..., None].double()).sum(1)
    torch.testing.assert_close(found.double(), exact, rtol=size * 2**-23, atol=0)  # each sum rounds by 2^-24 at most


def test_a_total_does_not_depend_on_how_outputs_are_cut():
    sums = rand(2, 1000, 7).exp().mul(rand(2, 1000, 1).mul(5).exp())
    assert len({tuple(totals(sums.split(size, 1))) for size in (1, 7, 512, 1000)}) == 1
