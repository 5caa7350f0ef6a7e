import pytest
import torch

from lance_quant.formats.int4 import Int4
from lance_quant.formats.nvfp4 import Nvfp4
from lance_quant.methods import awq

CODECS = [Int4(32), Nvfp4()]
codecs = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def group(seed=0, n_in=128):
    weights = [rand(48, n_in, seed=seed) * 0.02, rand(16, n_in, seed=seed + 1) * 0.02]
    norm = rand(n_in, seed=seed + 2).abs() + 0.1
    m2 = (rand(n_in, seed=seed + 3) * 0.8).exp() ** 2
    return weights, norm, m2


def slow_error(w, column, m2, codec, global_scale):
    """The definition, in float64, one weight at a time."""
    back = codec.dequantize(codec.quantizer.quantize(w * column, global_scale)).double() / column.double()
    return float(((back - w) ** 2 @ m2.double()).sum() / (w.double() ** 2 @ m2.double()).sum())


@codecs
def test_errors_are_those_of_the_definition(codec):
    weights, norm, m2 = group()
    found = awq.search(weights, norm, m2, codec.quantizer)
    one = awq.fold_norm(norm, torch.ones_like(norm))
    for folded, errors in ((one, found.before), (found.folded, found.after)):
        global_scale = codec.quantizer.global_scale(max(float((w * folded.column).abs().max()) for w in weights))
        expected = [slow_error(w, folded.column, m2, codec, global_scale) for w in weights]
        assert errors == pytest.approx(expected, rel=1e-4)  # float32 sums of 6000 squares


@codecs
@pytest.mark.parametrize("seed", range(5))
def test_the_search_is_never_worse_than_plain_rounding(codec, seed):
    found = awq.search(*group(seed * 10), codec.quantizer)
    assert sum(found.after) <= sum(found.before)


@codecs
def test_a_planted_loud_channel_gets_a_large_scale_and_gains(codec):
    weights, norm, m2 = group()
    m2 = torch.ones_like(m2)
    m2[7] = 400.0 ** 2
    found = awq.search(weights, torch.ones_like(norm), m2, codec.quantizer)
    assert found.candidate.label != "s=1" and found.candidate.alpha > 0
    assert found.folded.column.argmax() == 7
    assert sum(found.after) < 0.5 * sum(found.before)


@codecs
def test_the_expected_output_error_is_what_real_inputs_see(codec):
    """Independent Gaussian channels: the closed form is the expectation; 4096 rows estimate it to a few percent."""
    weights, norm, m2 = group()
    found = awq.search(weights, norm, m2, codec.quantizer)
    global_scale = codec.quantizer.global_scale(max(float((w * found.folded.column).abs().max()) for w in weights))
    x = rand(4096, len(m2), seed=9) * m2.sqrt()
    for w, error in zip(weights, found.after, strict=True):
        back = codec.dequantize(codec.quantizer.quantize(w * found.folded.column, global_scale)) / found.folded.column
        measured = ((x @ (back - w).t()) ** 2).sum() / ((x @ w.t()) ** 2).sum()
        assert float(measured) == pytest.approx(error, rel=0.1)


@codecs
def test_silent_channels_and_silence_do_not_break_it(codec):
    weights, norm, m2 = group()
    m2[:64] = 0
    found = awq.search(weights, norm, m2, codec.quantizer)
    assert torch.isfinite(found.folded.column).all() and sum(found.after) <= sum(found.before)
    silent = awq.search(weights, norm, torch.zeros_like(m2), codec.quantizer)
    assert torch.isfinite(silent.folded.column).all()


@codecs
def test_zero_weights_and_zero_norms_do_not_break_it(codec):
    weights, norm, m2 = group()
    weights[1].zero_()
    weights[0][:, 3] = 0
    norm[5] = 0
    found = awq.search(weights, norm, m2, codec.quantizer)
    assert found.before[1] == found.after[1] == 0
    assert torch.isfinite(found.folded.column).all()


@codecs
def test_what_is_tried_is_as_good_as_trying_everything(codec):
    """Errors change smoothly along the candidates: the descent is allowed 1 % more than the best of all."""
    weights, norm, m2 = group()
    tried = awq.candidates(m2.sqrt(), torch.stack([awq.column_max(w) for w in weights]).mean(0))
    columns = [awq.fold_norm(norm, one.s).column for one in tried]
    least = min(map(sum, awq.relative_errors(weights, columns, m2, codec.quantizer)))
    assert least <= sum(awq.search(weights, norm, m2, codec.quantizer).after) <= 1.01 * least


def test_the_descent_finds_the_bottom_of_a_valley_from_few_looks():
    looks = []

    def errors_of(places):
        looks.extend(places)
        return [((place - 29) ** 2 + 1.0,) for place in places]

    errors, best = awq._descend(41, errors_of)
    assert best == 29 and len(looks) == len(set(looks)) == 15 and set(errors) == set(looks)
    assert awq._descend(41, lambda places: [(1.0,)] * len(places))[1] == 0  # nothing gained: the first


def test_some_rows_stand_for_all(monkeypatch):
    """Rows are evenly spaced; a wide weight is searched by them, and packed with its scale whole."""
    weights, norm, m2 = group()
    monkeypatch.setattr(awq, "ROWS", 16)
    assert torch.equal(awq._some_rows(weights[0]), weights[0][::3])
    one = awq.fold_norm(norm, torch.ones_like(norm)).column
    global_scale = CODECS[0].quantizer.global_scale(1.0)
    before = awq.search(weights, norm, m2, CODECS[0].quantizer).before
    assert before[0] == pytest.approx(slow_error(weights[0][::3], one, m2, CODECS[0], global_scale), rel=1e-4)


def test_identity_comes_first_and_every_scale_is_normalised():
    tried = awq.candidates(torch.rand(32) + 0.1, torch.rand(32) + 0.1)
    assert (tried[0].label, tried[0].alpha) == ("s=1", 0) and torch.equal(tried[0].s, torch.ones(32))
    assert len(tried) == len({one.label for one in tried}) == 41
    assert all(one.label.startswith(f"act^{one.alpha:.2f}") for one in tried[1:])
    for one in tried:
        assert float(one.s.log().mean()) == pytest.approx(0, abs=1e-5)
