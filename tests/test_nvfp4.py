import math

import pytest
import torch

from lance_quant.formats import nvfp4

MAGNITUDES = torch.tensor(nvfp4.MAGNITUDES)
NORMAL_E4M3 = torch.arange(127, dtype=torch.uint8)  # all finite non-negative ones


def gaussian(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def test_golden_bytes():
    """All sixteen values with scale 1: codes in order, even columns in the low nibble."""
    row = torch.cat([MAGNITUDES, -MAGNITUDES])[None] * 256
    q = nvfp4.quantize(row, global_scale=1.0)  # 6 * 256 / 6 = 256 = E4M3 0 1111 000
    assert q.packed.numpy().tobytes().hex() == "10325476" + "90badcfe"  # -0.0 < 0 is false: code 0
    assert q.scale.tolist() == [[0x78]]
    assert torch.equal(nvfp4.dequantize(q), row)


def test_a_negative_value_that_rounds_to_zero_is_code_8():
    row = torch.zeros(1, 16)
    row[0, 0], row[0, 1] = 6, -0.1
    q = nvfp4.quantize(row)
    assert q.packed[0, 0].item() == 0x87
    assert torch.signbit(nvfp4.dequantize(q)[0, 1])


def test_halves_go_to_the_smaller_magnitude():
    halves = (MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2
    row = torch.zeros(1, 16)
    row[0, :7], row[0, 7:14], row[0, 15] = halves, -halves, 6
    value = nvfp4.dequantize(nvfp4.quantize(row * 128, global_scale=1.0)) / 128
    assert value[0, :7].tolist() == MAGNITUDES[:-1].tolist()
    assert value[0, 7:14].tolist() == (-MAGNITUDES[:-1]).tolist()
    above = torch.nextafter(row, 2 * row)
    above[0, 15] = 6
    value = nvfp4.dequantize(nvfp4.quantize(above * 128, global_scale=1.0)) / 128
    assert value[0, :7].tolist() == MAGNITUDES[1:].tolist()


def test_codes_are_the_nearest_of_eight_magnitudes():
    """The slow way: distance to each magnitude times the stored scale."""
    w = gaussian(8, 64)
    q = nvfp4.quantize(w)
    scale = nvfp4.scale_values(q)[..., None, None]
    best = (w.view(8, 4, 16, 1).abs() - MAGNITUDES * scale).abs().amin(-1)
    torch.testing.assert_close((nvfp4.dequantize(q) - w).abs().view(8, 4, 16), best, rtol=0, atol=1e-9)


def test_e4m3_arithmetic_is_torchs():
    values = NORMAL_E4M3.view(torch.float8_e4m3fn).float()
    assert torch.equal(nvfp4.decode_e4m3(NORMAL_E4M3), values)
    assert torch.equal(nvfp4.encode_e4m3(values), NORMAL_E4M3)
    between = torch.cat([torch.linspace(2**-9, 0.1, 5001), torch.linspace(0.1, 448, 5001),
                         (values[1:] + values[:-1])[1:] / 2]).clamp(2**-9, 448)
    assert torch.equal(nvfp4.round_e4m3(between), between.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("amax", [1e-30, 0.013, 0.5, 1.0, 1536.0, 1537.0, 3e38])
def test_the_global_scale_is_the_smallest_sufficient_power_of_two(amax):
    scale = nvfp4.global_scale_for(amax)
    assert math.frexp(scale)[0] == 0.5
    assert 6 * 256 * scale >= amax
    assert 6 * 256 * scale / 2 < amax or scale == 2.0**-100
    assert nvfp4.global_scale_for(0.0) == 1.0


@pytest.mark.parametrize("size", [1e-6, 0.02, 1.0, 1e4])
def test_scales_times_the_global_scale_are_exact_in_bf16(size):
    scale = nvfp4.scale_values(nvfp4.quantize(gaussian(64, 256) * size * torch.logspace(-3, 0, 64)[:, None]))
    assert torch.equal(scale.bfloat16().float(), scale)


def test_the_error_is_within_half_a_step():
    """Largest gap is 2 (4 to 6), so 1 scale; E4M3 may be 2^-4 short, which clips 6 at 6/1.0625: below 1 too."""
    w = gaussian(16, 128)
    q = nvfp4.quantize(w)
    assert ((nvfp4.dequantize(q) - w).abs().view(16, 8, 16) <= 1.0 * nvfp4.scale_values(q)[..., None]).all()


def test_zero_tensor_zero_block_and_zero_row():
    assert (nvfp4.dequantize(nvfp4.quantize(torch.zeros(3, 32))) == 0).all()
    w = gaussian(3, 32)
    w[1] = 0
    w[2, :16] = 0
    value = nvfp4.dequantize(nvfp4.quantize(w))
    assert (value[1] == 0).all() and (value[2, :16] == 0).all() and torch.isfinite(value).all()


def test_a_block_with_a_subnormal_scale_is_not_lost():
    """Its scale is 2^-9 * G, the smallest E4M3; values reach 3 scales, where half a gap is 0.5 scales."""
    w = torch.zeros(1, 32)
    w[0, 0] = 6 * 256.0
    w[0, 16:] = torch.linspace(-3, 3, 16) * 2.0**-9
    q = nvfp4.quantize(w)
    assert (q.global_scale, q.scale.tolist()) == (1.0, [[0x78, 0x01]])
    assert ((nvfp4.dequantize(q) - w)[0, 16:].abs() <= 0.5 * 2**-9).all()


def test_one_outlier_leaves_other_blocks_alone():
    w = gaussian(1, 64)
    w[0, 3] = 3.0
    error = (nvfp4.dequantize(nvfp4.quantize(w)) - w)[0, 16:]
    assert 10 * torch.log10(w[0, 16:].square().sum() / error.square().sum()) > 15  # measured 20.4 dB


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("global_scale", [None, 2.0**-12])
def test_what_is_not_finite_is_refused(bad, global_scale):
    w = gaussian(2, 64)
    w[1, 7] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        nvfp4.quantize(w, global_scale)


def test_a_width_that_16_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="block size 16"):
        nvfp4.quantize(torch.zeros(1, 24))


def test_fake_quant_is_dequantize_of_quantize_to_the_bit():
    w = gaussian(5, 128) * torch.logspace(-9, 2, 5)[:, None]
    w[0, :64] = 0
    scale = 2 * nvfp4.global_scale_for(float(w.abs().max()))
    expected = nvfp4.dequantize(nvfp4.quantize(w, scale))
    assert torch.equal(nvfp4.fake_quant_io(w.t().contiguous(), scale).t(), expected)
