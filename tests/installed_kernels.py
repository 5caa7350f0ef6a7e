"""Every C function of an installed wheel, away from any compiler; a script for tests and for where wheels are made."""

import os

import torch

from lance_quant.cpu import compile_c, rounding
from lance_quant.formats.int4 import Int4
from lance_quant.formats.nvfp4 import Nvfp4
from lance_quant.kernels import base, cpu_w4a8, w4a8
from lance_quant.kernels.ops import parts_of
from lance_quant.kernels.quantized_linear import WQLinearINT4, WQLinearNVFP4

os.environ["PATH"] = os.environ["CC"] = ""
library = compile_c._from_wheel()
assert library is not None, f"no library for {compile_c.level()} beside {compile_c.__file__}"
assert rounding.unavailable() is None and rounding._library() is library
g = torch.Generator().manual_seed(0)
layers = (WQLinearINT4(256, 48, 64, bias=False, dtype=torch.float32, kernel="native"),
          WQLinearNVFP4(256, 48, bias=False, dtype=torch.float32, kernel="native"))
for codec, layer in zip((Int4(64), Nvfp4()), layers, strict=True):
    w, x = torch.randn(48, 256, generator=g), torch.randn(70, 256, generator=g)
    q = codec.quantizer.quantize(w, codec.quantizer.global_scale(float(w.abs().max())))
    layer.fill(q, None)
    before = base.CALLS.counts()
    for rows in (1, 70):
        expected = torch.nn.functional.linear(x[:rows], layer.dequantize())
        # activations of 24 bits, sums of 256 products in another order
        torch.testing.assert_close(layer(x[:rows]), expected, rtol=1e-4, atol=1e-4)
    assert "native dot" in base.CALLS.since(before)
    y = cpu_w4a8.compute(x, q.packed, *parts_of(q), None, codec.group_size)
    assert torch.equal(y, w4a8.linear(x, q, w4a8.row_scales(*parts_of(q)), None))
print(f"{compile_c.level()}: {library._name}")
