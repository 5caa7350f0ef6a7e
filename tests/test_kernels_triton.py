"""The CUDA kernels, on a GPU where there is one and through Triton's interpreter elsewhere; not how fast they are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is in requirements-dev.txt")

from test_kernels import CODECS, exact, generator, random_weight  # noqa: E402

from lance_quant.formats import int8  # noqa: E402
from lance_quant.formats.int4 import Int4  # noqa: E402
from lance_quant.formats.nvfp4 import Nvfp4  # noqa: E402
from lance_quant.kernels import triton_kernels, triton_w4a16  # noqa: E402
from lance_quant.kernels.ops import parts_of  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLAIMED = {name: codec for name, codec in CODECS.items() if triton_w4a16.unsupported(codec, torch.float32) is None}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Share of the sum of |products|: rounding of weights (tile only), of the result, of float32 sums. The interpreter
# truncates to bfloat16 (one part in 2^8), where a GPU rounds.
SHARE = {torch.float32: 2.0**-24 * 256, torch.bfloat16: 2 * 2.0**-8, torch.float16: 2 * 2.0**-11}


def there(*tensors):
    return [tensor if tensor is None else tensor.to(DEVICE) for tensor in tensors]


def check(function, codec, rows, n_out, n_in, dtype, with_bias):
    q = random_weight(codec, n_out, n_in)
    x = torch.randn(n_in, rows, generator=generator(1)).to(dtype).t()
    bias = torch.randn(n_out, generator=generator(2)).to(dtype) if with_bias else None
    y = function(*there(x, q.packed, *parts_of(q), bias), codec.group_size).cpu()
    assert y.shape == (rows, n_out) and y.dtype == dtype
    weight = codec.dequantize(q)
    sums = x.double().abs() @ weight.double().abs().t() + (0 if bias is None else bias.double().abs())
    assert ((y.double() - exact(x, weight, bias)).abs() <= sums * SHARE[dtype] + 1e-7).all()


@pytest.mark.parametrize("codec", CLAIMED.values(), ids=CLAIMED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gemv_computes_what_the_definition_says(codec, dtype):
    check(triton_kernels.gemv, codec, 1, 11, 576, dtype, with_bias=True)
    check(triton_kernels.gemv, codec, 3, 5, 64, dtype, with_bias=False)


@pytest.mark.parametrize("codec", CLAIMED.values(), ids=CLAIMED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [5, 33, 65])
def test_tile_computes_what_the_definition_says(codec, dtype, rows):
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter multiplies the bit patterns of bfloat16 as integers")
    check(triton_kernels.tile, codec, rows, 35, 128, dtype, with_bias=rows != 33)


@pytest.mark.parametrize("codec", CLAIMED.values(), ids=CLAIMED)
def test_unpacks_to_the_last_bit(codec):
    q = random_weight(codec, 11, 320)
    if isinstance(codec, Nvfp4) and codec.slim:
        q = q._replace(scale=torch.arange(11 * 20).remainder(127).byte().view(11, 20))
    expected = codec.dequantize(q)
    for dtype in (torch.float32, torch.float16):
        weight = triton_kernels.unpack(*there(q.packed, *parts_of(q)), codec.group_size, dtype).cpu()
        assert torch.equal(weight, expected.to(dtype))
    weight = triton_kernels.unpack(*there(q.packed, *parts_of(q)), codec.group_size, torch.bfloat16).cpu()
    truncated = (expected.view(torch.int32) & -65536).view(torch.float32)  # see SHARE
    assert ((weight == expected.bfloat16()) | (weight == truncated.bfloat16())).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, n_out, n_in", [(0, 11, 64), (1, 11, 576), (3, 5, 50), (5, 11, 576)])
def test_an_8_bit_head_computes_what_the_definition_says(dtype, rows, n_out, n_in):
    q = int8.quantize(torch.randn(n_out, n_in, generator=generator(1)) * torch.logspace(-3, 0, n_out)[:, None])
    x = torch.randn(n_in, rows, generator=generator(2)).to(dtype).t()
    y = triton_w4a16.compute_int8(*there(x, *q)).cpu()
    assert y.shape == (rows, n_out) and y.dtype == dtype
    weight = int8.dequantize(q)
    sums = x.double().abs() @ weight.double().abs().t()
    assert ((y.double() - exact(x, weight, None)).abs() <= sums * SHARE[dtype] + 1e-7).all()


@pytest.mark.parametrize("rows", [0, 1, 5, 257])
def test_every_number_of_rows_has_a_path(rows):
    check(triton_w4a16.compute, Int4(64), rows, 16, 64, torch.float32, with_bias=True)


def test_rows_may_have_scales_of_their_own():
    codec = Nvfp4(slim=True)
    q = random_weight(codec, 16, 64)
    q = q._replace(global_scale=2.0 ** torch.arange(-16, 0).view(16, 1))
    x = torch.randn(2, 64, generator=generator(3))
    for function in (triton_kernels.gemv, triton_kernels.tile):
        y = function(*there(x, q.packed, *parts_of(q)), None, 16).cpu()
        torch.testing.assert_close(y, x @ codec.dequantize(q).t(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("codec, dtype, message", [(Int4(48), torch.float32, "it takes groups of 16, 32"),
                                                   (Int4(64), torch.float64, "float32, bfloat16 or float16")])
def test_what_the_kernels_cannot_take_is_said(codec, dtype, message):
    assert message in triton_w4a16.unsupported(codec, dtype)


@pytest.mark.parametrize("rows, group_size, dtype, blocks", [
    (5, 64, torch.bfloat16, (16, 32)), (64, 64, torch.float32, (32, 64)), (65, 64, torch.float32, (64, 64)),
    (65, 128, torch.float32, (32, 64)), (65, 256, torch.float32, (16, 32)), (65, 128, torch.bfloat16, (64, 64))])
def test_blocks_are_smaller_where_groups_are_wide(rows, group_size, dtype, blocks):
    assert triton_kernels.tile_blocks(rows, group_size, dtype) == blocks


@pytest.mark.slow
def test_every_kernel_compiles_for_gpus_that_are_not_here_and_fits_their_shared_memory(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("compile_triton.py"))], text=True, check=True,
                          stdout=subprocess.PIPE, env={**environment, "TRITON_CACHE_DIR": str(tmp_path)})
    made = [json.loads(line) for line in done.stdout.splitlines()]
    assert {one["gpu"] for one in made} == {80, 89, 90, 100, 120}
    assert [one for one in made if one["shared"] > one["of"]] == []
