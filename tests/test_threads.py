"""The same bytes from any number of threads."""

from pathlib import Path

import pytest
import torch
from conftest import CPU
from made_up_requests import answer, draw
from torch import nn

from benchmarks import synthetic_lance
from lance_quant.calibration import capture, gram, weight_sensitivity
from lance_quant.calibration.activation_stats import model_fingerprint
from lance_quant.calibration.layer_inputs import layer_inputs_of
from lance_quant.cpu import matmul, threads
from lance_quant.formats.int4 import Int4
from lance_quant.formats.nvfp4 import Nvfp4
from lance_quant.lance.config import LancePaths
from lance_quant.lance.linear import Linear
from lance_quant.lance.runtime import Runtime
from lance_quant.methods import convert
from lance_quant.methods.conversion import Conversion
from lance_quant.storage.tensor_file import Checkpoint

CONVERSIONS = {"int4": Conversion(Int4(64), progress=False), "nvfp4": Conversion(Nvfp4(), progress=False),
               "budget": Conversion(Int4(64), bits_budget=4.6, progress=False)}


@pytest.fixture
def few_threads():
    """Sets the number of torch's threads, for this test alone."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(matmul, "_LARGE", 1 << 16)
    monkeypatch.setattr(matmul, "_PIECE", 64)
    monkeypatch.setattr(gram, "_TILE", 64)


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    """A model of one layer, and captures of more numbers than torch takes one thread for (32768)."""
    folder = tmp_path_factory.mktemp("threads") / "made_up"
    synthetic_lance.main(["--out", str(folder), "--preset", "tiny", "--layers", "1"])
    src = folder / "Lance_3B"
    model = Runtime.load(LancePaths.find(src), CPU, torch.float32).model
    with Checkpoint(src) as source:
        fingerprint = model_fingerprint(source)
    with capture.recording(model, folder / "all.safetensors", "all", fingerprint) as begin:
        for seed in range(2):
            begin(seed)
            draw(model, seed, steps=3, latents=64)
            answer(model, seed, tokens=12)
    return src, folder / "stats.pt", folder / "all.safetensors"


@pytest.mark.parametrize("name", CONVERSIONS)
@pytest.mark.slow
def test_a_captured_conversion_has_the_same_bytes_on_one_and_two_threads(captured, tmp_path, few_threads, small_pieces,
                                                                         name):
    src, stats, file = captured
    conversion, written = CONVERSIONS[name], {}
    for count in (1, 2):
        few_threads(count)
        sensitivity = None if conversion.bits_budget is None \
            else weight_sensitivity.sensitivity_of(src, [file], CPU)
        out = tmp_path / str(count)
        convert.convert(src, stats, out, conversion, layer_inputs_of(src, [file], CPU), sensitivity)
        written[count] = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix != ".html"}
    assert {Path(name).suffix for name in written[1]} >= {".safetensors", ".json", ".md"}
    assert written[1] == written[2]


@pytest.mark.parametrize("rows, outputs", [(300, 64), (64, 300), (1, 70000)])
def test_a_product_is_cut_by_its_shape_alone_and_stays_what_it_was(few_threads, small_pieces, rows, outputs):
    """A float32 sum of 96 products of normals is within 96 * 2^-24 * 96 of the exact one, however it is ordered."""
    generator = torch.Generator().manual_seed(0)
    x, w, bias = (torch.randn(*shape, generator=generator) for shape in ((rows, 96), (outputs, 96), (outputs,)))
    found = []
    for count in (1, 2, 3):
        few_threads(count)
        with threads.block_threads():
            found.append(matmul.linear(x, w, bias))
    assert all(torch.equal(found[0], other) for other in found)
    exact = (x.double() @ w.double().t() + bias.double()).float()
    torch.testing.assert_close(found[0], exact, rtol=0, atol=96 * 96 * 2**-24)


def test_gradients_inside_block_threads_are_those_outside(few_threads, small_pieces):
    """Of inputs and of weights; the pieces are summed as the whole is, up to rounding."""
    generator = torch.Generator().manual_seed(0)
    layers = nn.Sequential(Linear(96, 200), nn.SiLU(), Linear(200, 48))
    layers[0].bias.requires_grad_(False)
    layers[2].bias.requires_grad_(False)
    x = torch.randn(2, 150, 96, generator=generator, requires_grad=True)
    wanted = [x, layers[0].weight, layers[2].weight]
    outside = torch.autograd.grad(layers(x).square().sum(), wanted)
    for count in (1, 3):
        few_threads(count)
        with threads.block_threads():
            inside = torch.autograd.grad(layers(x).square().sum(), wanted)
        for ours, theirs in zip(inside, outside, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_workers_inherit_whether_gradients_are_recorded(few_threads):
    few_threads(2)
    x = torch.ones(3, requires_grad=True)
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded):
            assert {y.requires_grad for y in threads.map_threads(lambda scale: x * scale, [1.0, 2.0, 3.0])} \
                == {recorded}


def test_a_worker_is_inside_block_threads(few_threads):
    """So that it cuts products as the thread that works alone does."""
    for count in (1, 2):
        few_threads(count)
        assert threads.map_threads(lambda _: threads.in_block_threads(), [0, 1]) == [True, True]
        assert not threads.in_block_threads()
