"""float32 products come out the same, whichever library computes them."""

import pytest
import torch
import torch.nn.functional as F

from lance_quant.cpu import matmul
from lance_quant.lance.linear import Linear

needs_onednn = pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
                                  reason="this PyTorch does not let its oneDNN be called")


@pytest.fixture(params=[pytest.param(False, id="PyTorch"), pytest.param(True, id="oneDNN", marks=needs_onednn)])
def library(request, monkeypatch):
    monkeypatch.setattr(matmul, "_onednn_is_faster", lambda: request.param)


@pytest.mark.parametrize("n, width, out", [(1, 64, 1), (7, 33, 130), (300, 257, 65), (2, 1, 3)])
def test_a_product_is_that_of_float64_to_rounding(library, n, width, out):
    torch.manual_seed(0)
    x, w = torch.randn(n, width), torch.randn(out, width)
    # 2^-24 for every sum of a row, at most `width` of them, of terms whose sizes add up to |x| |w|
    bound = (x.abs().double() @ w.abs().double().t()) * width * 2.0**-24
    for left, right in ((x, w), (x.t().contiguous().t(), w), (x, w.t().contiguous().t()),
                        (torch.cat([x, x], 1)[:, :width], torch.cat([w, w], 1)[:, width:])):
        assert ((matmul.linear(left, right).double() - x.double() @ w.double().t()).abs() <= bound).all()


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (0, 3, 5)])
def test_it_is_f_linear_for_inputs_of_any_number_of_axes(library, shape):
    x, w, bias = torch.randn(shape), torch.randn(7, 5), torch.randn(7)
    torch.testing.assert_close(matmul.linear(x, w, bias), F.linear(x, w, bias), rtol=1e-5, atol=1e-5)


def test_a_layer_has_the_gradient_of_nn_linear():
    layer = Linear(5, 7)
    x = torch.randn(2, 5, requires_grad=True)
    layer(x).square().sum().backward()
    y = F.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer.weight.grad, torch.autograd.grad(y.square().sum(), layer.weight)[0])
    with torch.no_grad():
        torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n, width, out", [(0, 8, 4), (3, 8, 0), (3, 0, 4)])
def test_nothing_times_something_has_the_shape_of_a_product(library, n, width, out):
    y = matmul.linear(torch.randn(n, width), torch.randn(out, width))
    assert torch.equal(y, torch.zeros(n, out))


def test_rows_that_are_not_finite_stay_visible(library):
    x, w = torch.randn(4, 64), torch.randn(8, 64)
    x[1, 5], x[2, 6] = torch.nan, torch.inf
    assert matmul.linear(x, w).isfinite().all(1).tolist() == [True, False, False, True]


@needs_onednn
@pytest.mark.parametrize("text, capability, faster", [("vendor_id : AuthenticAMD", "AVX512", True),
                                                      ("vendor_id : AuthenticAMD", "AVX2", False),
                                                      ("vendor_id : GenuineIntel", "AVX512", False)])
def test_the_machine_alone_decides(monkeypatch, text, capability, faster):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(matmul.Path, "read_text", lambda *_, **__: text)
    assert matmul._onednn_is_faster.__wrapped__() is faster


def test_another_dtype_is_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(matmul, "_onednn_is_faster", lambda: True)
    x, w = torch.randn(3, 16, dtype=torch.float64), torch.randn(5, 16, dtype=torch.float64)
    assert torch.equal(matmul.linear(x, w), F.linear(x, w))
