"""W4A8: the definition against exact arithmetic, C and oneDNN against the definition, and which linears may take it."""

import json

import pytest
import torch
from conftest import LEVELS, at_level
from test_kernels import CODECS, DTYPES, exact, generator, layer, needs_native, random_weight
from test_packed_folder import edit, folder_of
from test_quantized_linear import GOLDENS, toy

from lance_quant.errors import InputError
from lance_quant.formats.int4 import Int4, Int4Weight
from lance_quant.formats.nvfp4 import Nvfp4
from lance_quant.formats.packed_folder import PackedFolder
from lance_quant.kernels import cpu, cpu_w4a8, dispatch, w4a8
from lance_quant.kernels.base import CALLS
from lance_quant.kernels.ops import parts_of
from lance_quant.kernels.quantized_linear import merge_rows, require_kernel, swap_linears

CPU = torch.device("cpu")
MANY = cpu_w4a8.FEW_ROWS + 2


def activations(rows, n_in, seed=1):
    return torch.randn(rows, n_in, generator=generator(seed))


def scales(q):
    return w4a8.row_scales(*parts_of(q))


# The definition

def test_activations_golden():
    """127 is the largest code, halves go to the even neighbour, and 63.5 / 127 is the scale."""
    rounded = w4a8.quantize_activations(torch.tensor([[63.5, -63.5, 0.25, 0.75, 0.0]]))
    assert rounded.codes.tolist() == [[127, -127, 0, 2, 0]] and rounded.scale.tolist() == [0.5]


@pytest.mark.parametrize("row", [[0.0, 0.0], [1e-44, 0.0], [-0.0, 0.0]])
def test_rows_of_nothing_are_zeros(row):
    rounded = w4a8.quantize_activations(torch.tensor([row]))
    assert rounded.codes.tolist() == [[0, 0]] and 0 < rounded.scale.item() < 1e-30


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_gives_nan_and_no_other_does(bad):
    q = random_weight(Int4(64), 16, 128)
    x = activations(3, 128)
    x[1, 5] = bad
    y = w4a8.linear(x, q, scales(q), None)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_a_weight_is_off_by_half_a_step_of_its_row(codec):
    q = random_weight(codec, 24, 384)
    rounded, weight = w4a8.quantize_weight(q, scales(q)), codec.dequantize(q)
    # 127 steps to the largest; the product of weight and inverse scale is rounded twice
    error = (rounded.codes * rounded.scale[:, None] - weight).abs()
    assert (error <= (0.5 + 127 * 2.0**-22) * rounded.scale[:, None]).all()
    assert rounded.codes.abs().max() <= 127 and (rounded.codes[1] == 0).all()


def test_row_scales_follow_from_what_groups_can_hold():
    """Two groups: steps of 0.5 around zero point 3 reach 6, steps of 2 around 8 reach 16: 16 / 127."""
    scale, zero = torch.tensor([[0.5, 2.0]]).bfloat16(), torch.tensor([[3, 8]], dtype=torch.uint8)
    assert w4a8.row_scales(scale, zero, None).tolist() == [pytest.approx(16 / 127)]
    assert w4a8.row_scales(scale, None, None).tolist() == [pytest.approx(2 * 6 / 127)]
    assert w4a8.row_scales(scale, None, torch.tensor([[0.5]])).tolist() == [pytest.approx(6 / 127)]


def test_products_are_exact_where_one_float32_sum_would_not_be():
    codes = torch.full((2, 11008), 127, dtype=torch.int8)
    codes[1, ::2] = -126
    assert w4a8.products(codes, codes).tolist() == (codes.long() @ codes.long().t()).tolist()


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_definition_computes_a_linear(codec, dtype):
    """Off by half a step of each activation times its weight, half a step of each weight times its input, and what the
    result's dtype rounds (values near 2^15 would leave float16, so inputs are small)."""
    q, x = random_weight(codec, 24, 384), (activations(5, 384) / 64).to(dtype)
    bias = torch.randn(24, generator=generator(2)).to(dtype)
    weight, s = codec.dequantize(q), scales(q)
    a = x.float().abs().amax(1) / 127
    inputs, weights = x.float().abs().sum(1)[:, None] * s, a[:, None] * weight.abs().sum(1)
    bound = 0.51 * (weights + inputs + 0.51 * 384 * a[:, None] * s)
    y = exact(x, weight, bias)
    rounding = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[dtype]
    assert ((w4a8.linear(x, q, s, bias).double() - y).abs() <= bound + rounding * (y.abs() + bound)).all()


# The kernel

PATHS = {"oneDNN": None, "plain C": "plain", "AVX2": "avx2"}


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.skipif(bool(level) and level not in LEVELS,
                                                                    reason=f"this CPU cannot run {level}"))
                        for name, level in PATHS.items()])
def path(request, monkeypatch):
    level = PATHS[request.param]
    if level:
        at_level(level, monkeypatch)
    monkeypatch.setattr(cpu_w4a8, "has_vnni", lambda: level is None)
    return request.param


def same(y, expected):
    """Equal to the bit, NaN where NaN is."""
    return torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.nan_to_num(0.0), expected.nan_to_num(0.0))


@needs_native
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_out, n_in, rows", [(1, 192, 1), (40, 384, 7), (133, 192, 50), (16, 2240, 12)])
def test_c_equals_the_definition_to_the_bit(codec, dtype, n_out, n_in, rows, path):
    """Outputs and rows that fill no tile, inputs on both sides of a block, NaN, Inf, zeros, and ties in 16 bits."""
    if n_in % codec.group_size:
        n_in = 384
    q, x = random_weight(codec, max(n_out, 2), n_in), activations(rows, n_in)
    for row, value in ((2, 0.0), (3, float("nan")), (4, float("inf")), (5, 1e-42)):
        if row < rows:
            x[row, n_in // 2 if row in (3, 4) else slice(None)] = value
    x = x.to(dtype)
    for bias in (torch.randn(len(q.packed), generator=generator(2)).to(dtype), None):
        before = CALLS.counts()
        y = cpu_w4a8.compute(x, q.packed, *parts_of(q), bias, codec.group_size)
        assert CALLS.since(before) == {f"native_w4a8 {path}": 1}
        assert y.dtype == dtype and same(y, w4a8.linear(x, q, scales(q), bias))


@needs_native
def test_blocks_of_rows_and_of_weights_and_threads_change_nothing(path, monkeypatch):
    q, x = random_weight(Int4(64), 1100, 128), activations(1700, 128)  # more than 1536 rows, 512 weight rows, a chunk
    expected = w4a8.linear(x, q, scales(q), None)
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert same(cpu_w4a8.compute(x, q.packed, *parts_of(q), None, 64), expected)


@needs_native
def test_nothing_in_nothing_out(path):
    q = random_weight(Int4(64), 8, 128)
    assert cpu_w4a8.compute(torch.empty(0, 128), q.packed, *parts_of(q), None, 64).shape == (0, 8)


@needs_native
def test_activations_in_one_pass_are_the_definition_s():
    x = activations(9, 192)
    x[1], x[2, 3] = 0, float("nan")
    for dtype in (torch.float32, torch.bfloat16):
        rounded, expected = cpu_w4a8.quantize_activations(x.to(dtype)), w4a8.quantize_activations(x.to(dtype))
        assert torch.equal(rounded.codes, expected.codes) and same(rounded.scale, expected.scale)


@needs_native
def test_views_and_strides_are_fine(path):
    q, x = random_weight(Nvfp4(), 24, 128), activations(128, MANY).t()
    assert same(cpu_w4a8.compute(x, q.packed, *parts_of(q), None, 16), w4a8.linear(x, q, scales(q), None))


@needs_native
@pytest.mark.parametrize("codec", [Int4(64), Nvfp4(), Nvfp4(slim=True)], ids=["int4", "nvfp4", "slim"])
def test_few_rows_keep_16_bit_activations_and_many_do_not(codec):
    rounded, plain = layer(codec, kernel="native_w4a8"), layer(codec, kernel="native")
    few, many = activations(cpu_w4a8.FEW_ROWS, 128), activations(MANY, 128)
    assert torch.equal(rounded(few), plain(few))
    q = rounded._packed()
    assert torch.equal(rounded(many), w4a8.linear(many, q, scales(q), rounded.bias))
    assert not torch.equal(rounded(many), plain(many))


@needs_native
@pytest.mark.parametrize("codec", [Int4(32), Nvfp4(slim=True)], ids=["int4", "slim"])
def test_merged_projections_compute_what_their_parts_do(codec):
    parts = [layer(codec, n_out, seed=n_out, kernel="native_w4a8") for n_out in (48, 3, 16)]
    x = activations(MANY, 128)
    expected = torch.cat([part(x) for part in parts], -1)
    assert torch.equal(merge_rows(parts)(x), expected)


@needs_native
def test_what_is_kept_beside_the_packed_bytes_is_one_number_a_row():
    model = layer(Int4(64), kernel="native_w4a8")
    before = {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    model(activations(MANY, 128))
    assert {name: buffer.data_ptr() for name, buffer in model.named_buffers()} == before
    kept = cpu_w4a8._INT4_ROW_SCALES.of(model.scales, model.zeros)
    assert kept.shape == (48,) and kept is cpu_w4a8._INT4_ROW_SCALES.of(model.scales, model.zeros)


@needs_native
def test_it_is_one_node_of_a_compiled_graph():
    model, x = layer(Int4(64), kernel="native_w4a8"), activations(MANY, 128)
    model.settle()
    compiled = torch.compile(lambda x: model(x) * 2, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x) * 2)


@needs_native
def test_gradients_are_those_of_the_reference():
    model, x = layer(Int4(64), kernel="native_w4a8"), activations(MANY, 128).requires_grad_()
    model(x).sum().backward()
    torch.testing.assert_close(x.grad, model.dequantize().sum(0).expand(MANY, -1), rtol=1e-4, atol=1e-4)


# Who may take it

def test_auto_never_rounds_activations():
    for codec in (Int4(64), Nvfp4()):
        assert "w4a8" not in dispatch.choose("auto", codec, 128, torch.float32, CPU).name


def test_what_it_cannot_run_is_refused_by_name(monkeypatch):
    kernel = cpu_w4a8.NativeW4A8()
    assert "it runs on the CPU" in kernel.refusal(Int4(64), 128, torch.float32, torch.device("cuda"))
    assert "131072 inputs" in kernel.refusal(Int4(64), 131136, torch.float32, CPU)
    monkeypatch.setattr(cpu, "_library_or_reason", lambda: (None, "there is no C compiler; install gcc"))
    with pytest.raises(InputError, match="kernel native_w4a8 cannot run .* no C compiler.* take --kernel auto"):
        layer(Int4(64), kernel="native_w4a8").kernel()


def test_the_cpu_says_whether_it_has_vnni(monkeypatch):
    for flags, expected in (("avx2 avx512f", False), ("avx2 avx_vnni", True), ("avx512_vnni", True)):
        monkeypatch.setattr(cpu_w4a8, "_cpu_lines", lambda flags=flags: ["model name : x", f"flags : {flags}"])
        assert cpu_w4a8.has_vnni.__wrapped__() is expected
    monkeypatch.setattr(cpu_w4a8, "_cpu_lines", list)
    assert not cpu_w4a8.has_vnni.__wrapped__()


@needs_native
@pytest.mark.parametrize("name", ["int4_g64", "nvfp4"])
def test_linears_that_a_published_file_leaves_unscaled_keep_16_bit_activations(name):
    model = toy()
    swap_linears(model, GOLDENS / "published" / name, torch.float32, CPU, kernel="native_w4a8")
    kernels = {name.rpartition(".")[2].removesuffix("_moe_gen"): part.kernel().name
               for name, part in model.named_modules() if hasattr(part, "kernel_choice")}
    assert kernels == {**dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), "native_w4a8"),
                       "o_proj": "native", "down_proj": "native"}


def test_a_file_without_moved_scales_is_refused(tmp_path):
    def meta(described):
        for entry in described["per_weight"].values():
            entry["scheme"] = "asym_int4_grouped_minmax"

    folder = edit(folder_of(tmp_path), Int4, lambda tensors: None, meta)
    with PackedFolder(folder) as packed, pytest.raises(InputError, match="scales that were moved .* --kernel auto"):
        require_kernel(packed, torch.float32, CPU, "native_w4a8")
    assert json.loads((folder / "awq_meta.json").read_text())["per_weight"]


def test_an_8_bit_head_is_not_its_business():
    assert dispatch.choose_int8("native_w4a8", 128, torch.float32, CPU) is dispatch.choose_int8(
        "auto", 128, torch.float32, CPU)


def test_a_weight_of_zeros_is_zeros():
    q = Int4Weight(torch.full((2, 64), 0x77, dtype=torch.uint8), torch.full((2, 2), 1e-30).bfloat16(),
                   torch.full((2, 2), 7, dtype=torch.uint8))
    assert (w4a8.linear(activations(3, 128), q, scales(q), None) == 0).all()
