import pytest
import torch

from lance_quant.formats import int4

# Half a step from rounding; and a bf16 scale may be 2^-9 short over at most 15 steps, which clips an end of the range.
STEP_BOUND = 0.5 + 15 * 2**-9 + 1e-4


def gaussian(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def test_golden_bytes():
    """-1, -7/8 .. 7/8 is its own grid: scale 1/8, zero 8, codes 0..15 in order, even columns in the low nibble."""
    q = int4.quantize(torch.arange(-8, 8).float()[None] / 8, group_size=16)
    assert q.packed.numpy().tobytes().hex() == "1032547698badcfe"
    assert (q.scale.item(), q.zero.item()) == (0.125, 8)
    assert torch.equal(int4.dequantize(q), torch.arange(-8, 8).float()[None] / 8)


def test_nibbles_round_trip():
    codes = torch.arange(16, dtype=torch.uint8).repeat(2, 3)
    assert torch.equal(int4.unpack_nibbles(int4.pack_nibbles(codes)), codes)


@pytest.mark.parametrize("group_size", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_error_is_within_half_a_step(group_size, dtype):
    w = gaussian(8, 256).to(dtype)
    q = int4.quantize(w, group_size)
    error = (int4.dequantize(q) - w.float()).abs().view(8, -1, group_size)
    assert (error <= STEP_BOUND * q.scale.float()[..., None]).all()


def test_a_code_is_the_nearest_level_of_the_stored_grid():
    """The slow way: all 16 levels of the grid as it is stored."""
    w = gaussian(4, 64)
    q = int4.quantize(w, 32)
    levels = (torch.arange(16) - q.zero[..., None].float()) * q.scale.float()[..., None]  # [out, group, 16]
    best = (w.view(4, 2, 32, 1) - levels[:, :, None]).abs().amin(-1)
    error = (int4.dequantize(q) - w).abs().view(4, 2, 32)
    torch.testing.assert_close(error, best, rtol=0, atol=1e-9)


@pytest.mark.parametrize("value", [0.0, 0.37, -0.37, 1e-12, 1e30])
def test_a_constant_group_survives(value):
    """All-equal groups are where min-max grids break. 2^-7: a bf16 scale is 2^-9 off, the top code is 15 steps away."""
    w = torch.full((2, 64), value)
    torch.testing.assert_close(int4.dequantize(int4.quantize(w, 64)), w, rtol=2**-7, atol=1e-9)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_group_that_does_not_straddle_zero_survives(sign):
    w = sign * torch.linspace(0.5, 0.51, 64)[None]
    error = (int4.dequantize(int4.quantize(w, 64)) - w).abs().max()
    assert error <= STEP_BOUND * 0.51 / 15 * 1.01


def test_zero_stays_exactly_zero():
    w = gaussian(4, 64)
    w[1] = 0
    w[:, 5] = 0
    dequantized = int4.dequantize(int4.quantize(w, 32))
    assert (dequantized[1] == 0).all() and (dequantized[:, 5] == 0).all()


def test_an_outlier_costs_only_its_own_group():
    w = gaussian(1, 128)
    w[0, 3] = 50.0
    error = (int4.dequantize(int4.quantize(w, 64)) - w).abs()
    assert error[0, 3] <= 50 * 2**-7 and error[0, 64:].max() < 0.01


def test_quantizing_twice_changes_nothing():
    once = int4.dequantize(int4.quantize(torch.arange(-8, 8).float()[None] / 8, 16))
    assert torch.equal(int4.dequantize(int4.quantize(once, 16)), once)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(bad):
    w = gaussian(2, 64)
    w[1, 7] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        int4.quantize(w, 32)


@pytest.mark.parametrize("width, group_size", [(63, 63), (64, 48), (0 + 33, 11)])
def test_a_width_that_does_not_divide_is_refused(width, group_size):
    with pytest.raises(ValueError, match="multiple"):
        int4.quantize(torch.zeros(1, width), group_size)


@pytest.mark.parametrize("group_size", [16, 64])
def test_fake_quant_is_dequantize_of_quantize_to_the_bit(group_size):
    w = gaussian(5, 128) * torch.logspace(-9, 2, 5)[:, None]
    w[0, :64] = 0
    expected = int4.dequantize(int4.quantize(w, group_size))
    assert torch.equal(int4.fake_quant_io(w.t().contiguous(), group_size).t(), expected)
