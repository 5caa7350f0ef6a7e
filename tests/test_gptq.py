import dataclasses

import pytest
import torch

from lance_quant.calibration import gram
from lance_quant.formats.base import nearest_levels
from lance_quant.formats.int4 import Int4
from lance_quant.formats.nvfp4 import Nvfp4
from lance_quant.methods import gptq

CODECS = [Int4(32), Nvfp4()]
codecs = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
quantizers = pytest.mark.parametrize("quantizer", [codec.quantizer for codec in CODECS], ids=["int4", "nvfp4"])
IN, OUT = 96, 24


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight(seed=0):
    return rand(IN, OUT, seed=seed) * 0.02


def correlated(tokens, seed=1):
    """Inputs with a few strong directions, as those of a trained layer."""
    return rand(tokens, 12, seed=seed) @ rand(12, IN, seed=99) + 0.3 * rand(tokens, IN, seed=seed + 1)


def global_scale_of(quantizer, w):
    return quantizer.global_scale(float(w.abs().max()))


def gram_stats_of(x, exact=None):
    sums = gram.GramAccumulator(x.shape[1], paired=exact is not None)
    sums.add(x, x if exact is None else exact)
    return sums.stats()


def output_error(w, back, x):
    return float(((x @ back - x @ w) ** 2).sum() / ((x @ w) ** 2).sum())


def objective(w, back, inputs):
    gram = inputs.gram.double() + torch.eye(IN).double() * inputs.damping * inputs.gram.diagonal().double().mean()
    off = (back - w).double()
    return float((off * (gram @ off)).sum())


@quantizers
def test_correlated_inputs_gain_a_lot_over_nearest_rounding(quantizer):
    """New tokens of the same kind; measured 5 to 8 times."""
    w, inputs, fresh = weight(), gram_stats_of(correlated(4096)), correlated(1024, seed=50)
    global_scale = global_scale_of(quantizer, w)
    done = gptq.round_weight(w, inputs, quantizer, global_scale)
    grid = quantizer.grid(w, inputs.mean_square, global_scale)
    assert done.method == "gptq" and done.reason is None
    assert output_error(w, done.values, fresh) < 0.4 * output_error(w, nearest_levels(quantizer, w, grid), fresh)


@quantizers
def test_uncorrelated_inputs_leave_nothing_to_propagate(quantizer):
    """A diagonal Gram matrix: whatever the order of the columns, the loop is nearest rounding."""
    w, order = weight(), torch.randperm(IN, generator=torch.Generator().manual_seed(3))
    grid = quantizer.grid(w, torch.ones(IN), global_scale_of(quantizer, w))
    factor = gptq.inverse_factor(torch.eye(IN) * 7, 0.01, order)
    assert torch.equal(gptq.propagate(w, order, factor, grid, quantizer), nearest_levels(quantizer, w, grid))


@codecs
def test_values_are_levels_of_the_grid_and_pack_exactly(codec):
    w, quantizer = weight(), codec.quantizer
    global_scale = global_scale_of(quantizer, w)
    done = gptq.round_weight(w, gram_stats_of(correlated(4096)), quantizer, global_scale)
    assert torch.equal(nearest_levels(quantizer, done.values, done.grid), done.values)
    packed = quantizer.encode(done.values.t().contiguous(), done.grid, global_scale)
    assert torch.equal(codec.dequantize(packed), done.values.t())
    assert torch.equal(quantizer.storable(done.grid.scale, global_scale), done.grid.scale)


@quantizers
def test_blocks_change_nothing(quantizer, monkeypatch):
    """The lazy update of what is behind a block is a regrouping of the same sums."""
    w, inputs = weight(), gram_stats_of(correlated(4096))
    grid = quantizer.grid(w, inputs.mean_square, global_scale_of(quantizer, w))
    order = torch.arange(IN)
    factor = gptq.inverse_factor(inputs.gram, 0.01, order)
    whole = gptq.propagate(w, order, factor, grid, quantizer)
    monkeypatch.setattr(gptq, "BLOCK", 16)
    apart = gptq.propagate(w, order, factor, grid, quantizer)
    assert (whole != apart).float().mean() < 0.01  # sums in another order may tip a value halfway between levels


@quantizers
@pytest.mark.parametrize("seed", range(4))
def test_coordinate_descent_never_raises_its_objective(quantizer, seed):
    w, inputs = weight(seed), gram_stats_of(correlated(3000, seed=seed))
    global_scale = global_scale_of(quantizer, w)
    grid = quantizer.grid(w, inputs.mean_square, global_scale)
    start = nearest_levels(quantizer, w, grid)
    values, _ = gptq.descend(w, start, grid, inputs, quantizer, global_scale)
    assert objective(w, values, inputs) < objective(w, start, inputs)
    assert torch.equal(nearest_levels(quantizer, w, grid), start), "the grid that was passed in is left alone"


@quantizers
def test_the_target_moves_towards_the_float_models_output(quantizer):
    """Inputs that earlier rounding changed: aiming at W x beats aiming at W xq."""
    exact = correlated(4096)
    packed = exact @ (torch.eye(IN) + 0.03 * rand(IN, IN, seed=7))
    w, global_scale = weight(), global_scale_of(quantizer, weight())
    paired = gram_stats_of(packed, exact)
    aimed = gptq.round_weight(w, paired, quantizer, global_scale)
    plain = gptq.round_weight(w, dataclasses.replace(paired, cross=None), quantizer, global_scale)
    wanted = exact @ w
    assert ((packed @ aimed.values - wanted) ** 2).sum() < 0.8 * ((packed @ plain.values - wanted) ** 2).sum()


def drifted():
    """Inputs and residual stream in the float model and in one whose earlier layers are rounded: both are off in the
    same directions."""
    exact = correlated(4096)
    off = exact @ (0.03 * rand(IN, IN, seed=7))
    return exact, exact + off, off @ (0.3 * rand(IN, OUT, seed=8) / IN**0.5)


def test_one_linears_sums_say_what_the_general_ones_say():
    exact, packed, _ = drifted()
    sums = gram.GramAccumulator(IN, weight=weight().t())
    sums.add(packed, exact, torch.zeros(len(exact), OUT))
    torch.testing.assert_close(gptq.aim(weight(), sums.stats()), gptq.aim(weight(), gram_stats_of(packed, exact)),
                               rtol=1e-4, atol=1e-6)


@quantizers
def test_the_target_makes_up_for_what_the_residual_stream_lacks(quantizer):
    """Stream and output together are nearer to the float model's than with the output alone as the target."""
    exact, packed, missing = drifted()
    w, left = weight(), {}
    for name, known in (("output", torch.zeros_like(missing)), ("stream", missing)):
        sums = gram.GramAccumulator(IN, weight=w.t())
        sums.add(packed, exact, known)
        values = gptq.round_weight(w, sums.stats(), quantizer, global_scale_of(quantizer, w)).values
        left[name] = float((exact @ w + missing - packed @ values).square().sum())
    assert left["stream"] < 0.7 * left["output"]


def test_a_token_that_counts_twice_is_there_twice():
    """As many tokens as are in front of the first that is held back, so that all are in the sums."""
    assert not gram.GramAccumulator(1)._is_held(torch.arange(64)).any()
    exact, packed, missing = (part[:64] for part in drifted())
    counts = torch.ones(52)
    counts[40:] = 2.0
    twice = [torch.cat([part[:52], part[40:52]]) for part in (packed, exact, missing)]
    for weight_ in (None, weight().t()):
        sums = gram.GramAccumulator(IN, weight=weight_, counts=counts)
        for piece in (slice(0, 30), slice(30, 45), slice(45, 52)):  # they need not end where counts change
            sums.add(packed[piece], exact[piece], missing[piece])
        repeated = gram.GramAccumulator(IN, weight=weight_)
        repeated.add(*twice)
        found, wanted = sums.stats(), repeated.stats()
        assert (found.n_tokens, found.counted, wanted.counted) == (52, 64, 64)
        for name in ("gram", "cross", "cross_target", "mean_square"):
            assert (getattr(found, name) is None) == (getattr(wanted, name) is None)
            if getattr(found, name) is not None:
                torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-4, atol=1e-4)


@quantizers
def test_a_token_that_counts_more_is_met_more_closely(quantizer):
    """Two halves of the tokens with directions of their own; the error moves to the half that counts for less."""
    w, x = weight(), torch.cat([correlated(2048), correlated(2048, seed=2).flip(1)])
    errors = []
    for louder in (slice(0, 2048), slice(2048, 4096)):
        counts = torch.full((4096,), 0.02)
        counts[louder] = 1.98
        sums = gram.GramAccumulator(IN, counts=counts)
        sums.add(x, x)
        values = gptq.round_weight(w, sums.stats(), quantizer, global_scale_of(quantizer, w)).values
        errors.append([float((x[half] @ (values - w)).square().sum()) for half in (slice(0, 2048), slice(2048, 4096))])
    assert errors[0][0] < 0.9 * errors[1][0] and errors[1][1] < 0.9 * errors[0][1], errors


@pytest.mark.parametrize("tokens, counted", [(4096, False), (4096, True), (65536, True)])
def test_tokens_are_held_back_evenly_and_at_no_period(tokens, counted):
    """One in eight, or HELD_BACK of all if they are known to be more; every quarter of the tokens, and every place in
    requests of 128, 256 or 2304 tokens, gives its share."""
    held = gram.GramAccumulator(1, counts=torch.ones(tokens) if counted else None)._is_held(torch.arange(tokens))
    share = min(1 / 8, gram.HELD_BACK / tokens)
    assert float(held.float().mean()) == pytest.approx(share, rel=0.2)  # 32 and 128 runs, as if drawn: 1 in 6, 1 in 11
    assert (held.view(4, -1).float().mean(1) > 0.4 * share).all()
    for length in (128, 256, 2304):
        whole = held[:tokens // length * length].view(-1, length)
        assert whole.any(0).float().mean() > 0.6 * (1 - (1 - share) ** len(whole)), length


def test_held_back_tokens_are_judged_by_what_they_count():
    exact, packed, _ = drifted()
    counts = torch.linspace(0, 2, len(exact))
    sums = gram.GramAccumulator(IN, counts=counts)
    sums.add(packed, exact)
    inputs = sums.stats()
    done = gptq.round_weight(weight(), inputs, Int4(32).quantizer, 1.0)
    held = sums._is_held(torch.arange(len(exact)))
    off = (packed[held] @ done.values - exact[held] @ weight()).square().sum(1)
    signal = (exact[held] @ weight()).square().sum(1)
    assert done.after == pytest.approx(float((off * counts[held]).sum() / (signal * counts[held]).sum()), rel=1e-4)


def test_held_back_tokens_judge_the_stream_as_well():
    exact, packed, missing = drifted()
    sums = gram.GramAccumulator(IN, weight=weight().t())
    sums.add(packed, exact, missing)
    inputs = sums.stats()
    assert len(inputs.held_missing) == len(inputs.held) == len(inputs.held_float)
    done = gptq.round_weight(weight(), inputs, Int4(32).quantizer, 1.0)
    wanted = inputs.held_float @ weight()
    error = (inputs.held @ done.values - wanted - inputs.held_missing).square().sum() / wanted.square().sum()
    assert done.after == pytest.approx(float(error), rel=1e-4)


def test_a_gram_matrix_is_summed_by_halves(monkeypatch):
    """Blocks of rows right of the diagonal, mirrored: symmetric to the bit, whatever the block."""
    x = rand(500, IN)
    for rows in (1024, 32, 7):
        monkeypatch.setattr(gram, "_TILE", rows)
        inputs = gram_stats_of(x)
        assert torch.equal(inputs.gram, inputs.gram.t())
        kept = x[~gram.GramAccumulator(1)._is_held(torch.arange(500))]
        torch.testing.assert_close(inputs.gram, kept.t() @ kept, rtol=1e-4, atol=1e-3)


@quantizers
def test_blocks_of_the_gram_matrix_are_problems_of_their_own(quantizer):
    """Their inputs count as uncorrelated with others: the same levels as of three linears with 32 inputs each."""
    w, x = weight(), correlated(4096)
    sums = gram.GramAccumulator(IN, paired=False, block=32)
    sums.add(x, x)
    inputs = sums.stats()
    spans, global_scale = [slice(0, 32), slice(32, 64), slice(64, 96)], global_scale_of(quantizer, w)
    assert inputs.spans == spans
    whole = gram_stats_of(x).gram
    for row in spans:
        for column in spans:
            assert torch.equal(inputs.gram[row, column], whole[row, column]) if row == column \
                else not inputs.gram[row, column].any()
    alone = [dataclasses.replace(gram_stats_of(x[:, span].contiguous()), block=32) for span in spans]  # damped alike
    parts = [gptq.round_weight(w[span], own, quantizer, global_scale, sweeps=0)
             for span, own in zip(spans, alone, strict=True)]
    done = gptq.round_weight(w, inputs, quantizer, global_scale, sweeps=0)
    assert [part.method for part in parts] == ["gptq"] * 3 and done.method == "gptq"
    assert torch.equal(done.values, torch.cat([part.values for part in parts]))


@pytest.mark.parametrize("width, block", [(32, 64), (64, 64), (96, 64)])
def test_the_last_block_may_be_smaller(width, block):
    sums = gram.GramAccumulator(width, paired=False, block=block)
    sums.add(rand(64, width), rand(64, width))
    spans = sums.stats().spans
    assert [span.stop for span in spans][-1] == width and all(span.stop - span.start <= block for span in spans)


@quantizers
def test_one_factorisation_serves_all_linears_of_the_same_inputs(quantizer):
    w, inputs = weight(), gram_stats_of(correlated(600))
    global_scale = global_scale_of(quantizer, w)
    alone = gptq.round_weight(w, inputs, quantizer, global_scale)
    shared = gptq.round_weight(w, inputs, quantizer, global_scale, factors=gptq.inverse_factors(inputs))
    assert torch.equal(alone.values, shared.values)


def test_a_pass_alone_stays_as_it_is_without_sweeps():
    w, inputs = weight(), gram_stats_of(correlated(600))
    quantizer = Int4(32).quantizer
    grid = quantizer.grid(w, inputs.mean_square, 1.0)
    values = nearest_levels(quantizer, w, grid)
    assert gptq.descend(w, values, grid, inputs, quantizer, 1.0, sweeps=0)[0] is values


def test_without_a_difference_the_target_is_the_weight():
    inputs = gram_stats_of(correlated(600), correlated(600))
    torch.testing.assert_close(gptq.aim(weight(), inputs), weight())


@quantizers
def test_the_same_numbers_give_the_same_weight(quantizer):
    w, inputs = weight(), gram_stats_of(correlated(4096))
    first, second = (gptq.round_weight(w, inputs, quantizer, global_scale_of(quantizer, w)) for _ in range(2))
    assert torch.equal(first.values, second.values) and torch.equal(first.grid.scale, second.grid.scale)


@quantizers
def test_it_keeps_nearest_rounding_where_held_back_tokens_prefer_it(quantizer):
    """Calibrated on one direction, judged on white noise: what was compensated there is an error here."""
    w, inputs = weight(), gram_stats_of(correlated(4096))
    noise = rand(512, IN, seed=8)
    global_scale = global_scale_of(quantizer, w)
    done = gptq.round_weight(w, dataclasses.replace(inputs, held=noise, held_float=noise), quantizer, global_scale)
    grid = quantizer.grid(w, inputs.mean_square, global_scale)
    assert (done.method, done.reason) == ("nearest", "better on held-back tokens") and done.after == done.before
    assert torch.equal(done.values, nearest_levels(quantizer, w, grid))


def silent(x):
    x[:, 5] = 0
    return x


def silent_group(x):
    x[:, 32:64] = 0
    return x


@quantizers
@pytest.mark.parametrize("x", [silent(correlated(512)), silent_group(correlated(512)), correlated(1),
                               correlated(40), torch.ones(512, IN)],
                         ids=["silent channel", "silent group", "one token", "few tokens", "rank one"])
def test_degenerate_inputs_give_finite_levels(quantizer, x):
    w = weight()
    done = gptq.round_weight(w, gram_stats_of(x), quantizer, global_scale_of(quantizer, w))
    assert torch.isfinite(done.values).all() and torch.isfinite(done.grid.scale).all()
    assert torch.equal(nearest_levels(quantizer, done.values, done.grid), done.values)
    assert output_error(w, done.values, x) < 0.02


@quantizers
@pytest.mark.parametrize("x", [torch.zeros(512, IN), torch.zeros(0, IN), torch.full((512, IN), float("nan"))],
                         ids=["silence", "no token", "NaN"])
def test_without_usable_statistics_rounding_is_plain_and_says_why(quantizer, x):
    w = weight()
    done = gptq.round_weight(w, gram_stats_of(x), quantizer, global_scale_of(quantizer, w))
    grid = quantizer.grid(w, torch.ones(IN), global_scale_of(quantizer, w))
    assert (done.method, done.reason) == ("nearest", "no usable Gram matrix")
    assert torch.equal(done.values, nearest_levels(quantizer, w, grid))


@quantizers
def test_a_gram_matrix_that_cannot_be_inverted_is_named(quantizer):
    inputs = gram_stats_of(correlated(512))
    broken = dataclasses.replace(inputs, gram=inputs.gram - 2 * torch.eye(IN) * inputs.gram.diagonal().min())
    done = gptq.round_weight(weight(), broken, quantizer, global_scale_of(quantizer, weight()))
    assert (done.method, done.reason) == ("nearest", "singular Gram matrix")


@quantizers
def test_a_zero_weight_stays_zero(quantizer):
    inputs = gram_stats_of(correlated(512))
    done = gptq.round_weight(torch.zeros(IN, OUT), inputs, quantizer, quantizer.global_scale(0.0))
    assert (done.values == 0).all() and torch.isfinite(done.grid.scale).all()


def test_one_run_of_tokens_in_eight_is_held_back_and_never_counted_twice():
    x = rand(2048, 8)
    inputs = gram_stats_of(x)
    held = gram.GramAccumulator(1)._is_held(torch.arange(2048))
    assert torch.equal(inputs.held, x[held]) and inputs.n_tokens == int((~held).sum())
    assert (held.view(-1, 16).all(1) == held.view(-1, 16).any(1)).all(), "runs of 16"
    assert 0.08 < held.float().mean() < 0.17
    whole = x.t() @ x
    torch.testing.assert_close(inputs.gram + inputs.held.t() @ inputs.held, whole, rtol=1e-4, atol=1e-3)
    assert len(gram_stats_of(rand(40000, 2)).held) == pytest.approx(gram.HELD_BACK, rel=0.1)


def test_tokens_may_arrive_in_any_pieces():
    x, sums = rand(1500, 8), gram.GramAccumulator(8)
    for piece in x.split(77):
        sums.add(piece, piece)
    assert torch.equal(sums.stats().held, gram_stats_of(x, x).held)
    torch.testing.assert_close(sums.stats().gram, gram_stats_of(x, x).gram, rtol=1e-4, atol=1e-3)


def test_few_tokens_are_damped_more():
    assert gram_stats_of(rand(500, 4)).damping == 0.1 and gram_stats_of(rand(9000, 4)).damping == 0.01
    for counts, damping in ((torch.ones(9000), 0.01), (torch.linspace(0.5, 1.5, 9000), 0.1)):  # few may make up most
        sums = gram.GramAccumulator(4, counts=counts)
        sums.add(rand(9000, 4), rand(9000, 4))
        assert sums.stats().damping == damping
