"""NVFP4 times NVFP4: how activations are rounded, and that tensor cores are handed what the simulation multiplies."""

import pytest
import torch
from test_kernels import generator, layer

from lance_quant.errors import InputError
from lance_quant.formats import int8, nvfp4
from lance_quant.formats.int4 import Int4
from lance_quant.formats.nvfp4 import Nvfp4, Nvfp4Weight
from lance_quant.kernels import dispatch, nvfp4_w4a4
from lance_quant.kernels.base import CALLS, warn_once
from lance_quant.kernels.quantized_linear import Int8Linear, merge_rows

CPU = torch.device("cpu")
BOTH = pytest.mark.parametrize("codec", [Nvfp4(), Nvfp4(slim=True)], ids=["published", "slim"])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
blackwell = pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (10, 0),
                               reason="needs a GPU of compute capability 10.0 or newer")


def activations(rows, n_in, seed=0):
    """Rows of sizes from 1e-10 to 1e10, which a scale for all of them could not hold."""
    x = torch.randn(rows, n_in, generator=generator(seed))
    return x * 10 ** (20 * torch.rand(rows, 1, generator=generator(seed + 1)) - 10)


def weight(codec, n_out=48, n_in=64, seed=0):
    """As a file has it."""
    q = nvfp4.quantize(torch.randn(n_out, n_in, generator=generator(seed)) * 0.02)
    return codec.weight(codec.tensors(q), q.global_scale)


def around(value):
    """A float32 value and its neighbours."""
    value = torch.tensor(value)
    return torch.stack([torch.nextafter(value, torch.tensor(0.0)), value, torch.nextafter(value, torch.tensor(9e9))])


def test_a_row_is_rounded_as_a_weight_of_one_row():
    x = activations(40, 64)
    x[3], x[4] = 0, 1e-42
    x[5:8] = around(3.0)[:, None]  # where the global scale doubles
    x[8:11, 5] = around(6144.0)
    rounded = nvfp4.quantize_rows(x)
    for row in range(len(x)):
        alone = nvfp4.quantize(x[row:row + 1])
        assert alone.global_scale == rounded.global_scale[row].item()
        assert torch.equal(alone.packed, rounded.packed[row:row + 1])
        assert torch.equal(alone.scale, rounded.scale[row:row + 1])


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 5, 33])
def test_the_simulation_is_a_product_of_dequantized_factors(codec, dtype, rows):
    q, x = weight(codec), torch.randn(rows, 64, generator=generator(3)).to(dtype)
    bias = torch.randn(48, generator=generator(4)).to(dtype)
    y = nvfp4_w4a4.W4A4().linear(x, q, codec, bias)
    assert y.shape == (rows, 48) and y.dtype == dtype
    if rows:
        factor, w = nvfp4.dequantize(nvfp4.quantize_rows(x)).double(), nvfp4.dequantize(q).double()
        # Factors and products are exact; a sum of 64 in float32, rounded twice in the compute dtype (products, result).
        sums = factor.abs() @ w.abs().t() + bias.double().abs()
        share = 2.0**-24 * 64 + torch.finfo(dtype).eps
        assert ((y.double() - (factor @ w.t() + bias.double())).abs() <= sums * share).all()


def test_rows_do_not_depend_on_one_another():
    codec, kernel = Nvfp4(), nvfp4_w4a4.W4A4()
    q, x = weight(codec), activations(7, 64)
    alone = torch.cat([kernel.linear(row[None], q, codec, None) for row in x])
    # the same products, which a GEMM may add in another order for another number of rows
    torch.testing.assert_close(kernel.linear(x, q, codec, None), alone, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_gives_nan_in_all_its_outputs_and_nowhere_else(bad):
    x = torch.randn(3, 64, generator=generator(5))
    x[1, 7] = bad
    y = nvfp4_w4a4.W4A4().linear(x, weight(Nvfp4()), Nvfp4(), None)
    assert y[1].isnan().all() and y[0].isfinite().all() and y[2].isfinite().all()


@pytest.mark.parametrize("rows, columns", [(1, 1), (128, 4), (129, 5), (300, 11)])
def test_scales_are_in_the_order_of_cublas(rows, columns):
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=generator(6))
    flat = nvfp4_w4a4.blocked(codes)
    assert flat.shape == (-(-rows // 128) * 128 * -(-columns // 4) * 4,)
    assert torch.equal(in_rows(flat, rows, columns), codes)
    assert flat.sum() == codes.sum()  # the padding is zero


def in_rows(flat, rows, columns):
    """The inverse of `blocked`, entry by entry from cuBLAS's description."""
    across = -(-columns // 4)
    out = torch.empty(rows, columns, dtype=flat.dtype)
    for row in range(rows):
        for column in range(columns):
            tile = row // 128 * across + column // 4
            out[row, column] = flat[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4]
    return out


@BOTH
def test_scales_of_our_files_are_e4m3_times_one_power_of_two(codec):
    q = weight(codec)
    shared = nvfp4_w4a4.e4m3_of(q)
    assert torch.equal(nvfp4.decode_e4m3(shared.codes) * shared.factor, nvfp4.scale_values(q))
    assert nvfp4_w4a4.misfit(q) is None


def test_all_e4m3_bytes_are_found_again_and_zeros():
    every = torch.arange(127, dtype=torch.uint8)[None]
    for power in (2.0**-20, 1.0, 2.0**9):
        values = nvfp4.decode_e4m3(every) * power
        shared = nvfp4_w4a4.e4m3_of(Nvfp4Weight(every, values, 1.0))
        assert torch.equal(nvfp4.decode_e4m3(shared.codes) * shared.factor, values)
    assert nvfp4_w4a4.misfit(Nvfp4Weight(every, torch.zeros(3, 4).bfloat16(), 1.0)) is None


def scaled_mm(a, b, scale_a, scale_recipe_a, swizzle_a, scale_b, scale_recipe_b, swizzle_b, output_dtype):
    """What torch.nn.functional.scaled_mm does on a GPU, from its documentation, in float64."""
    kinds, orders = torch.nn.functional.ScalingType, torch.nn.functional.SwizzleType
    assert scale_recipe_a == scale_recipe_b == [kinds.BlockWise1x16, kinds.TensorWise]
    assert swizzle_a == swizzle_b == [orders.SWIZZLE_32_4_4, orders.NO_SWIZZLE]
    assert a.dtype == b.dtype == torch.float4_e2m1fn_x2 and a.shape[0] % 16 == 0
    factors = []
    for codes, (scale, shared) in ((a, scale_a), (b.t(), scale_b)):
        assert scale.dtype == torch.float8_e4m3fn and shared.dtype == torch.float32 and shared.shape == (1,)
        codes = codes.view(torch.uint8)
        own = in_rows(scale.view(torch.uint8), codes.shape[0], codes.shape[1] // 8)
        factors.append(nvfp4.dequantize(Nvfp4Weight(codes, own, 1.0)).double() * shared.double())
    return (factors[0] @ factors[1].t()).to(output_dtype)


@pytest.fixture
def tensor_cores(monkeypatch):
    """A CPU that has them, slowly."""
    monkeypatch.setattr(nvfp4_w4a4, "without_tensor_cores", lambda device: None)
    monkeypatch.setattr(nvfp4_w4a4.F, "scaled_mm", scaled_mm)
    made = []
    derived = nvfp4_w4a4.Derived(
        lambda scale, row_scale: made.append(scale.shape) or nvfp4_w4a4._blocked_scales(scale, row_scale))
    monkeypatch.setattr(nvfp4_w4a4, "_KEPT", derived)
    return made


@BOTH
@pytest.mark.parametrize("rows", [1, 17])
def test_tensor_cores_are_handed_what_the_simulation_multiplies(codec, rows, tensor_cores, monkeypatch):
    model = layer(codec, n_in=64, kernel="nvfp4_w4a4")
    model.fill(weight(codec), torch.randn(48, generator=generator(7)))
    x = activations(rows, 64)
    before = CALLS.counts()
    y = model(x)
    assert CALLS.since(before)["nvfp4_w4a4"] == 1
    monkeypatch.setattr(nvfp4_w4a4, "without_tensor_cores", lambda device: "none here")
    torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-5 * model(x).abs().max().item())


def test_the_order_of_scales_is_made_once_per_layer_and_goes_with_it(tensor_cores):
    parts = [layer(Nvfp4(slim=True), n_in=64, kernel="nvfp4_w4a4", bias=False) for _ in range(2)]
    for seed, part in enumerate(parts):
        part.fill(weight(Nvfp4(slim=True), seed=seed), None)
    x = torch.randn(2, 64, generator=generator(8))
    expected = torch.cat([part(x) for part in parts], -1)
    torch.compile(parts[0], backend="aot_eager", fullgraph=True)(x)
    assert tensor_cores == [(48, 4)] * 2 and len(nvfp4_w4a4._KEPT._kept) == 2
    whole = merge_rows(parts)
    torch.testing.assert_close(whole(x), expected)
    whole(x)
    assert tensor_cores == [(48, 4)] * 2 + [(96, 4)]
    del parts, part
    assert len(nvfp4_w4a4._KEPT._kept) == 1


@pytest.mark.parametrize("n_out, n_in", [(40, 64), (48, 48)])
def test_shapes_that_tensor_cores_cannot_take_are_simulated(tensor_cores, n_out, n_in):
    y = nvfp4_w4a4.W4A4().linear(torch.randn(2, n_in), weight(Nvfp4(), n_out, n_in), Nvfp4(), None)
    assert y.shape == (2, n_out) and tensor_cores == []


def test_merged_rows_whose_scales_no_power_of_two_fits_are_simulated(tensor_cores):
    q = weight(Nvfp4(slim=True))
    far = q._replace(global_scale=torch.where(torch.arange(48)[:, None] < 24, 2.0**-30, 1.0) * q.global_scale)
    y = nvfp4_w4a4.W4A4().linear(torch.randn(2, 64), far, Nvfp4(slim=True), None)
    assert y.isfinite().all() and tensor_cores == [(48, 4)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 130])
def test_torch_takes_the_call_as_far_as_it_checks_without_a_gpu(dtype, rows):
    q, rounded = weight(Nvfp4()), nvfp4.quantize_rows(torch.randn(rows, 64))
    shared = nvfp4_w4a4._blocked_scales(q.scale, None)
    y = nvfp4_w4a4.multiplied(*(part.to("meta") for part in (rounded.packed, q.packed, rounded.scale, *shared)), dtype)
    assert y.shape == (rows, 48) and y.dtype == dtype


def test_a_compiled_step_traces_the_rounding_and_keeps_the_product_as_one_node():
    codec, x = Nvfp4(), activations(5, 64)
    q = weight(codec)
    compiled = torch.compile(lambda x: nvfp4_w4a4.W4A4().linear(x, q, codec, None), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), nvfp4_w4a4.W4A4().linear(x, q, codec, None))


def test_it_runs_by_name_only_and_on_nvfp4_only_and_says_once_that_it_is_simulated(caplog):
    warn_once.cache_clear()
    for _ in range(2):
        assert layer(Nvfp4(), kernel="nvfp4_w4a4").kernel().name == "nvfp4_w4a4"
    assert caplog.text.count("kernel nvfp4_w4a4 is simulated here, and slow: FP4 tensor cores are in NVIDIA GPUs") == 1
    assert layer(Nvfp4()).kernel().name != "nvfp4_w4a4"
    with pytest.raises(InputError, match="kernel nvfp4_w4a4 cannot run int4.*it takes NVFP4; take --kernel auto"):
        layer(Int4(64), kernel="nvfp4_w4a4").kernel()
    head = Int8Linear((8, 64), torch.float32, kernel="nvfp4_w4a4")
    head.fill(int8.quantize(torch.randn(8, 64, generator=generator(9))))
    assert head.kernel() is dispatch.choose_int8("auto", 64, torch.float32, CPU)


@pytest.mark.gpu
@blackwell
@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 200])
def test_tensor_cores_compute_what_is_simulated(codec, dtype, rows, monkeypatch):
    q = weight(codec, 64, 256)
    q = Nvfp4Weight(*(part.cuda() if isinstance(part, torch.Tensor) else part for part in q))
    x = activations(rows, 256).clamp(-1e3, 1e3).to(dtype).cuda()
    before = CALLS.counts()
    y = nvfp4_w4a4.W4A4().linear(x, q, codec, None)
    assert CALLS.since(before)["nvfp4_w4a4"] == 1
    factor = nvfp4.dequantize(nvfp4.quantize_rows(x)).double()
    w = nvfp4.dequantize(q).double()
    # Sums of 256 exact products in float32 (tensor cores keep some bits less of small terms), rounded twice at most.
    sums = factor.abs() @ w.abs().t()
    share = 2.0**-24 * 256 * 4 + 2 * torch.finfo(dtype).eps
    assert ((y.double() - factor @ w.t()).abs() <= sums * share + 1e-7).all()
