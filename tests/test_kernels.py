"""Every kernel against the definition, `dequantize`, over the shapes, dtypes and degenerate inputs that it claims."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import LEVELS, at_level
from torch import Tensor

from benchmarks import linear_kernels
from lance_quant.cpu import compile_c
from lance_quant.errors import InputError
from lance_quant.formats.blocks import dequantize_to
from lance_quant.formats.int4 import Int4, Int4Weight
from lance_quant.formats.nvfp4 import Nvfp4, Nvfp4Weight
from lance_quant.kernels import base, cpu
from lance_quant.kernels.quantized_linear import WQLinearINT4, WQLinearNVFP4, merge_rows

CODECS = {"int4-g16": Int4(16), "int4-g32": Int4(32), "int4-g64": Int4(64), "int4-g192": Int4(192),
          "nvfp4": Nvfp4(), "slim": Nvfp4(slim=True)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_native = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"native: {cpu.unavailable()}")


@pytest.fixture(params=LEVELS)
def version(request, monkeypatch):
    """The C code as it is compiled for this CPU, and for lesser ones."""
    at_level(request.param, monkeypatch)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_weight(codec, n_out, n_in, seed=0):
    """All codes, scales over three decades, one row of zeros."""
    g = generator(seed)
    packed = torch.randint(0, 256, (n_out, n_in // 2), dtype=torch.uint8, generator=g)
    per_row = n_in // codec.group_size
    exponent = torch.rand(n_out, per_row, generator=g) * 3 - 4
    if isinstance(codec, Int4):
        zero = torch.randint(0, 16, (n_out, per_row), dtype=torch.uint8, generator=g)
        packed[1], zero[1] = 0x77, 7
        return Int4Weight(packed, (10**exponent).bfloat16(), zero)
    packed[1] = 0x80
    if codec.slim:
        return Nvfp4Weight(packed, torch.randint(0, 127, (n_out, per_row), dtype=torch.uint8, generator=g), 2.0**-9)
    return Nvfp4Weight(packed, (10**exponent).bfloat16(), 1.0)


def exact(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x.double() @ weight.double().t()
    return y if bias is None else y + bias.double()


def worst_case(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What an error of one part in every product may add up to, per output; [rows, out]."""
    # Activations are fixed-point numbers of 64 columns: an error is a share of the largest of them.
    largest = x.double().abs().unflatten(-1, (-1, 64)).amax(-1, keepdim=True).expand(-1, -1, 64).flatten(1)
    y = largest @ weight.double().abs().t()
    return y if bias is None else y + bias.double().abs()


# Share of the sum of |products| by which a result may be off: rounding of the inputs (none; 16- or 24-bit fixed point
# against the largest of 64), of float32 sums (2^-24 a step, at most 256 here), and of the result.
SHARE = {torch.float32: 2.0**-24 * 256, torch.bfloat16: 2.0**-15 + 2.0**-9, torch.float16: 2.0**-24 * 256 + 2.0**-11}


def check(kernel, codec, rows, n_out, n_in, dtype, with_bias=True, x=None):
    q = random_weight(codec, n_out, n_in)
    x = torch.randn(rows, n_in, generator=generator(1)).to(dtype) if x is None else x
    bias = torch.randn(n_out, generator=generator(2)).to(dtype) if with_bias else None
    y = kernel.linear(x, q, codec, bias)
    assert y.shape == (rows, n_out) and y.dtype == dtype
    weight = codec.dequantize(q)
    error = (y.double() - exact(x, weight, bias)).abs()
    assert (error <= worst_case(x, weight, bias) * SHARE[dtype] + 1e-30).all(), (error.max(), y.abs().max())


@needs_native
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 18, 33, 67])
def test_native_computes_what_the_definition_says(version, codec, dtype, rows):
    check(cpu.Native(), codec, rows, 37, 384, dtype, with_bias=rows != 2)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_rows_than_fit_the_cache_are_taken_in_parts(version, dtype):
    codec, n_in = Int4(64), 11008
    q, x = random_weight(codec, 6, n_in), torch.randn(49, n_in, generator=generator(1)).to(dtype)
    weight = cpu.weight_of(q, codec.group_size)
    alone = torch.cat([cpu.dot(row[None], weight, None) for row in x])
    assert torch.equal(cpu.dot(x, weight, None), alone)


@needs_native
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_paths_compute_what_the_definition_says(version, codec, dtype):
    q, x = random_weight(codec, 37, 384), torch.randn(40, 384, generator=generator(1)).to(dtype)
    weight = codec.dequantize(q)
    for path in (cpu.dot, cpu.gemm):
        error = (path(x, cpu.weight_of(q, codec.group_size), None).double() - exact(x, weight, None)).abs()
        # the GEMM in bfloat16 rounds the weights too
        share = SHARE[dtype] + (2.0**-9 if dtype == torch.bfloat16 else 0)
        assert (error <= worst_case(x, weight, None) * share + 1e-30).all(), path


@needs_native
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_native_unpacks_to_the_last_bit(version, codec):
    q = random_weight(codec, 35, 384)
    weight = cpu.weight_of(q, codec.group_size)
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.full((20, 384), torch.nan, dtype=dtype)
        cpu.dequantize_rows(weight, 9, 29, out)
        assert torch.equal(out, dequantize_to(codec, q, dtype)[9:29])


@needs_native
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_native_decodes_every_code_and_scale_byte(version, codec):
    every = torch.arange(256, dtype=torch.uint8)
    n_in = 3 * 512
    q = random_weight(codec, 2, n_in)
    q = q._replace(packed=torch.stack((every.repeat(3), every.flip(0).repeat(3))))
    if isinstance(codec, Nvfp4) and codec.slim:
        q = q._replace(scale=torch.arange(2 * n_in // 16).clamp(max=126).byte().view(2, -1), global_scale=2.0**-20)
    out, weight = torch.empty(2, n_in), cpu.weight_of(q, codec.group_size)
    cpu.dequantize_rows(weight, 0, 2, out)
    assert torch.equal(out, codec.dequantize(q))
    # a column at a time through the product, too: sums of one term are as exact as its activation, 1
    columns = torch.eye(n_in)[::16]
    torch.testing.assert_close(cpu.dot(columns, weight, None), out.t()[::16], rtol=2.0**-22, atol=0)


@needs_native
def test_inputs_may_be_strided_empty_and_of_very_different_size(version):
    codec, kernel = Int4(64), cpu.Native()
    strided = torch.randn(384, 10, generator=generator(3)).t()[::2]
    assert not strided.is_contiguous()
    check(kernel, codec, 5, 40, 384, torch.float32, x=strided)
    for size in (0.0, 1e-42, 1e-30, 1e30):
        check(kernel, codec, 2, 40, 384, torch.float32, x=torch.randn(2, 384, generator=generator(4)) * size)
    for rows in (1, 40):
        outliers = torch.randn(rows, 384, generator=generator(5))
        outliers[:, 70] *= 1e4
        check(kernel, codec, rows, 40, 384, torch.float32, x=outliers)
    assert kernel.linear(torch.empty(0, 384), random_weight(codec, 40, 384), codec, None).shape == (0, 40)


@needs_native
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rows", [2, 40])
def test_a_row_that_is_not_finite_stays_visible_and_alone(version, bad, rows):
    codec = Int4(64)
    x = torch.randn(rows, 384, generator=generator(6))
    x[1, 100] = bad
    y = cpu.Native().linear(x, random_weight(codec, 40, 384, seed=1), codec, None)
    assert not y[1].isfinite().any() or rows == 40  # a GEMM may meet 0 x Inf in some outputs only
    assert not y[1].isfinite().all() and y[0].isfinite().all()


@needs_native
@pytest.mark.parametrize("codec", [Int4(64), Nvfp4(slim=True)], ids=["int4", "slim"])
@pytest.mark.parametrize("rows", [2, 40])
def test_a_default_dtype_of_the_process_changes_nothing(codec, rows):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        check(cpu.Native(), codec, rows, 300, 384, torch.float32,
              x=torch.randn(rows, 384, generator=generator(1), dtype=torch.float32))
    finally:
        torch.set_default_dtype(before)


@needs_native
@pytest.mark.parametrize("rows", [2, 40])
def test_a_gradient_passes_as_through_the_dequantized_weight(rows):
    model = layer(Int4(64))
    x = torch.randn(rows, 128, generator=generator(10)).requires_grad_()
    model(x).square().sum().backward()
    other = x.detach().clone().requires_grad_()
    torch.nn.functional.linear(other, model.dequantize(), model.bias).square().sum().backward()
    assert torch.equal(x.grad, other.grad)


@needs_native
def test_few_rows_do_not_depend_on_one_another(version):
    codec, kernel = Nvfp4(), cpu.Native()
    rows = min(7, cpu.most_dot_rows(torch.float32, cpu.DOT_ROWS))
    q, x = random_weight(codec, 40, 384), torch.randn(rows, 384, generator=generator(7))
    alone = torch.cat([kernel.linear(row[None], q, codec, None) for row in x])
    assert torch.equal(kernel.linear(x, q, codec, None), alone)


@needs_native
def test_the_op_is_one_node_of_a_compiled_graph():
    codec = Int4(64)
    q, x = random_weight(codec, 40, 384), torch.randn(3, 384, generator=generator(8))
    compiled = torch.compile(lambda x: kernels_linear(x, q, codec) * 2, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), kernels_linear(x, q, codec) * 2)


def kernels_linear(x, q, codec):
    return cpu.Native().linear(x, q, codec, None)


def layer(codec, n_out=48, n_in=128, bias=True, seed=0, **options):
    options = {"dtype": torch.float32, **options}
    if isinstance(codec, Int4):
        made = WQLinearINT4(n_in, n_out, codec.group_size, bias, **options)
    else:
        made = WQLinearNVFP4(n_in, n_out, bias, codec.slim, **options)
    made.fill(random_weight(codec, n_out, n_in, seed), torch.randn(n_out, generator=generator(seed)) if bias else None)
    return made


@pytest.fixture
def no_native(monkeypatch):
    monkeypatch.setattr(cpu, "_library_or_reason", lambda: (None, "there is no C compiler; install gcc"))
    base.warn_once.cache_clear()


def test_without_a_compiler_the_reference_runs_and_a_warning_says_why(no_native, caplog):
    model, x = layer(Int4(64)), torch.randn(2, 128)
    assert model.kernel().name == layer(Int4(64)).kernel().name == "reference"
    assert torch.equal(model(x), torch.nn.functional.linear(x, model.dequantize(), model.bias))
    (message,) = caplog.messages
    assert "there is no C compiler; install gcc" in message and "much slower reference" in message


def test_a_kernel_asked_for_by_name_runs_or_is_refused(no_native):
    assert layer(Int4(64), kernel="reference").kernel().name == "reference"
    with pytest.raises(InputError, match="kernel native cannot run .* no C compiler.* take --kernel auto or reference"):
        layer(Int4(64), kernel="native").kernel()
    with pytest.raises(InputError, match="kernel 'marlin' is unknown; there are auto, reference"):
        layer(Int4(64), kernel="marlin").kernel()
    with pytest.raises(InputError, match="kernel triton cannot run .* on cpu"):
        layer(Int4(64), kernel="triton").kernel()


@needs_native
@pytest.mark.parametrize("codec, n_in", [(Int4(48), 96), (Int4(8), 128), (Nvfp4(), 96)])
def test_shapes_that_native_cannot_take_run_on_the_reference(codec, n_in):
    assert layer(codec, n_in=n_in).kernel().name == "reference"
    with pytest.raises(InputError, match="multiples of 64 inputs, in groups of 16, 32 or multiples of 64"):
        layer(codec, n_in=n_in, kernel="native").kernel()


@pytest.fixture
def slow_compiler(tmp_path):
    """Takes half a second and leaves one word."""
    script = tmp_path / "slow cc"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && exit\n'
                      'while [ "$1" != -o ]; do shift; done\nsleep 0.5\necho compiled > "$2"\n')
    script.chmod(0o755)
    return [str(script)]


def compiled(command):
    return compile_c.compiled(cpu._SOURCE, command)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell script that runs")
def test_two_that_compile_at_once_leave_one_library(slow_compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with ThreadPoolExecutor(2) as pool:  # of one process id, as processes in two containers may be
        first, second = pool.map(compiled, [slow_compiler] * 2)
    assert first == second and first.read_text() == "compiled\n"
    left = sorted(path.name for path in (tmp_path / "cache/lance-quant").iterdir())
    assert left == [first.name, f"{first.name}.sha256"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell script that runs")
@pytest.mark.parametrize("trouble", ["no folder", "not writable", "no home"])
def test_without_a_home_to_write_in_the_library_is_compiled_for_this_process(slow_compiler, monkeypatch, tmp_path,
                                                                            trouble):
    monkeypatch.setattr(compile_c.tempfile, "tempdir", str(tmp_path))
    if trouble == "no folder":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    elif trouble == "not writable":  # also root, whom permissions do not stop
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(compile_c.os, "access", lambda path, mode: Path(path) != tmp_path / "cache/lance-quant")
    else:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home directory")))
    made = compiled(slow_compiler)
    assert made.read_text() == "compiled\n" and made.parent.name.startswith("lance-quant-")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell script that runs")
def test_a_library_that_is_there_is_taken_where_nothing_can_be_written(slow_compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = compiled(slow_compiler)
    monkeypatch.setattr(compile_c.os, "access", lambda path, mode: False)
    assert compiled(slow_compiler) == first


@needs_native
def test_what_ran_is_counted():
    before = base.CALLS.counts()
    model = layer(Int4(64))
    for rows in (1, 1, 40):
        model(torch.randn(rows, 128))
    assert base.CALLS.since(before) == {"native dot": 2, "native dequantize + float32 GEMM": 1}


@pytest.mark.parametrize("x", [torch.zeros(2, 128, dtype=torch.bfloat16), torch.zeros(2, 64)], ids=["dtype", "width"])
def test_inputs_of_another_dtype_or_width_are_refused(x):
    with pytest.raises(ValueError, match=r"expected 128 inputs in torch.float32, got \d+ in torch"):
        layer(Int4(64))(x)


@pytest.mark.parametrize("codec", [Int4(32), Nvfp4(), Nvfp4(slim=True)], ids=["int4", "nvfp4", "slim"])
@pytest.mark.parametrize("mode", ["ondemand", "cached"])
def test_merged_rows_are_the_parts_after_one_another_and_share_their_memory(codec, mode):
    parts = [layer(codec, n_out, seed=n_out, mode=mode) for n_out in (48, 3, 16)]
    if mode == "ondemand" and codec == Nvfp4(slim=True):
        parts[1].global_scale *= 2.0**5  # q, k and v of a file may have different ones
    weights, x = torch.cat([part.dequantize() for part in parts]), torch.randn(2, 3, 128, generator=generator(9))
    expected = torch.cat([part(x) for part in parts], -1)
    whole = merge_rows(parts)
    assert torch.equal(whole.dequantize(), weights) and whole.out_features == 67
    # the same sums, in another order where the GEMM blocks them differently
    torch.testing.assert_close(whole(x), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), weights)
    ours = {tensor.untyped_storage().data_ptr() for tensor in whole.buffers()}
    assert {tensor.untyped_storage().data_ptr() for part in parts for tensor in part.buffers()} == ours


def test_layers_that_differ_are_not_merged():
    one = layer(Int4(64))
    for other in (layer(Int4(32)), layer(Nvfp4()), layer(Int4(64), bias=False), layer(Int4(64), mode="cached"),
                  layer(Int4(64), n_in=256), layer(Int4(64), kernel="reference"),
                  layer(Int4(64), dtype=torch.bfloat16), torch.nn.Linear(128, 48)):
        assert merge_rows([one, other]) is None and merge_rows([other, one]) is None
    assert one.stacked([one, layer(Int4(64))]).out_features == 96


@needs_native
def test_the_benchmark_times_all_contestants_and_ends_with_json(monkeypatch, capsys):
    monkeypatch.setattr(linear_kernels, "_COLD", 1)
    monkeypatch.setattr(linear_kernels, "_TURNS", (2, 2))
    linear_kernels.main(["--shapes", "64x48", "--rows", "1", "40", "--formats", *linear_kernels.FORMATS, "--paths",
                         "--device", "cpu", "--dtype", "float32"])
    cells = json.loads(capsys.readouterr().out.splitlines()[-1])["cells"]
    assert [(cell["format"], cell["rows"]) for cell in cells] == [(name, rows) for name in linear_kernels.FORMATS
                                                                  for rows in (1, 40)]
    for cell in cells:
        assert set(cell["ms"]) == {"bf16", "fp32", "published", "ours", "native_w4a8", "dot", "gemm"}
        assert min(cell["ms"].values()) > 0


@pytest.mark.parametrize("codec", linear_kernels.FORMATS.values(), ids=linear_kernels.FORMATS)
def test_the_restated_published_method_computes_the_same_weight(codec):
    q = random_weight(codec, 16, 128)
    assert torch.equal(linear_kernels.published(q, torch.float32), codec.dequantize(q))


def test_tinygemm_is_timed_on_the_same_weight():
    """Its scales by the CPU's version of the op, which packs codes otherwise; codes by the order of their nibbles."""
    codec = Int4(64)
    q, x = random_weight(codec, 32, 128), torch.randn(3, 128, generator=generator(1))
    codes = torch.stack((q.packed & 15, q.packed >> 4), -1).flatten(1).int()
    tiles = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, tiles, 64, linear_kernels.scales_and_zeros(q, torch.float32))
    torch.testing.assert_close(y, x @ codec.dequantize(q).t(), rtol=1e-5, atol=1e-5)
    swapped = linear_kernels.even_high(q.packed)
    assert torch.equal(torch.stack((swapped >> 4, swapped & 15), -1).flatten(1).int(), codes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tinygemm_computes_what_the_definition_says_on_a_gpu():
    codec = Int4(64)
    q = Int4Weight(*(part.cuda() for part in random_weight(codec, 64, 256)))
    x = torch.randn(5, 256, device="cuda").bfloat16()
    y = torch.ops.aten._weight_int4pack_mm(x, linear_kernels.tinygemm_weight(q)[0], 64,
                                           linear_kernels.tinygemm_weight(q)[1])
    # weights rounded to bfloat16 in three operations, of up to 16 steps; the result once
    sums = x.double().abs() @ (16 * q.scale.double()).repeat_interleave(64, 1).t()
    assert ((y.double() - exact(x, codec.dequantize(q), None)).abs() <= sums * 4 * 2.0**-8).all()


@pytest.mark.parametrize("shape", ["2048", "2048x", "100x64", "ax64", "0x64"])
def test_a_shape_that_is_none_is_refused(shape):
    with pytest.raises(InputError, match=f"--shapes {shape}: expected INxOUT"):
        linear_kernels.sizes(shape)
