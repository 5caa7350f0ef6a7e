"""comfy-kitchen's kernel, of which a plain PyTorch version runs on the CPU, and the choice between it and Triton."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from test_kernels import exact, generator, layer, random_weight

from lance_quant.errors import InputError
from lance_quant.formats.int4 import Int4, Int4Weight
from lance_quant.formats.nvfp4 import Nvfp4
from lance_quant.kernels import autotune, comfy_kitchen, dispatch, triton_w4a16
from lance_quant.kernels.base import CALLS
from lance_quant.kernels.ops import Derived, parts_of

CODEC, GPU = Int4(64), torch.device("cuda")
CALL = ("kind", torch.zeros(1))
# Share of the sum of |codes - 8| and |8 - zero| times scales and inputs: S and Z are rounded once, the weight as their
# sum, products of codes and S, and its sum (PyTorch's backend) once each, and so is the result, bias before and after.
SHARE = {torch.float32: 2.0**-24 * 256, torch.bfloat16: 6 * 2.0**-8, torch.float16: 6 * 2.0**-11}


def compared(x, q, bias):
    """comfy.compute's error, as a share of what SHARE is of."""
    y = comfy_kitchen.compute(x, q.packed, *parts_of(q), bias, 64)
    assert y.shape == (len(x), len(q.packed)) and y.dtype == x.dtype
    size = (q.scale.float() * ((8 - q.zero.float()).abs() + 8)).repeat_interleave(64, 1)
    sums = x.double().abs() @ size.double().t() + bias.double().abs()
    return ((y.double() - exact(x, CODEC.dequantize(q), bias)).abs() / sums).max().item()


@pytest.mark.parametrize("dtype", list(SHARE), ids=str)
@pytest.mark.parametrize("rows", [1, 9, 256])
def test_it_computes_what_the_definition_says(dtype, rows):
    pytest.importorskip("comfy_kitchen", reason="pip install comfy-kitchen")
    q = random_weight(CODEC, 40, 192)
    x = torch.randn(192, rows, generator=generator(1)).to(dtype).t()
    bias = torch.randn(40, generator=generator(2)).to(dtype)
    before = CALLS.counts()
    assert compared(x, q, bias) <= SHARE[dtype]
    assert CALLS.since(before) == {"comfy_kitchen": 1}


on_gpu = pytest.mark.skipif(not torch.cuda.is_available() or comfy_kitchen.unavailable() is not None,
                            reason=f"needs a CUDA device and comfy-kitchen: {comfy_kitchen.unavailable()}")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("tried_before", [False, True])
def test_a_recorded_graph_computes_the_same_whether_or_not_the_kernels_were_timed_before(tried_before, monkeypatch):
    winners = autotune.Winners(lambda: None)
    monkeypatch.setattr(autotune.AUTOTUNER, "_winners", winners)
    q = Int4Weight(*(part.cuda() for part in random_weight(CODEC, 256, 2048)))
    x, kernel = torch.randn(1, 2048, device=GPU).bfloat16(), dispatch.choose("auto", CODEC, 2048, torch.bfloat16, GPU)
    for compute in (triton_w4a16.compute, comfy_kitchen.compute):  # compile and load what a recording may not
        compute(x, q.packed, *parts_of(q), None, 64)
    if tried_before:
        kernel.linear(x, q, CODEC, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernel.linear(x, q, CODEC, None)
    graph.replay()
    assert bool(winners._known) == tried_before
    torch.testing.assert_close(y.double(), exact(x, CODEC.dequantize(q), None), rtol=2.0**-6, atol=2.0**-6 * 2048**0.5)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 9, 256, 300])
def test_its_cuda_kernels_compute_what_the_definition_says(dtype, rows):
    q = Int4Weight(*(part.cuda() for part in random_weight(CODEC, 256, 2048)))
    x, bias = torch.randn(rows, 2048, device=GPU).to(dtype), torch.randn(256, device=GPU).to(dtype)
    assert compared(x, q, bias) <= SHARE[dtype] + 2.0**-24 * 2048
    chosen = dispatch.choose("auto", CODEC, 2048, dtype, GPU)
    assert chosen.name == "triton or comfy_kitchen"
    torch.testing.assert_close(chosen.linear(x, q, CODEC, bias).double(), exact(x, CODEC.dequantize(q), bias),
                               rtol=2.0**-6, atol=2.0**-6 * 2048**0.5)


def test_zero_points_as_shifts_are_exact_but_for_bfloat16_where_the_error_is_a_36th_of_a_step():
    scale = (10 ** (torch.rand(50, 7, generator=generator(3)) * 3 - 4)).bfloat16()
    zero = torch.randint(0, 16, (50, 7), dtype=torch.uint8, generator=generator(4))
    meant = (8 - zero.double()) * scale.double()
    for dtype, largest in ((torch.float32, 0), (torch.float16, 0), (torch.bfloat16, 1 / 36)):
        s, z = (part.t().double() for part in comfy_kitchen.scales_and_zeros(scale, zero, dtype))
        assert torch.equal(s, scale.double())
        assert ((z - meant).abs() <= largest * scale.double()).all()
    s, z = (part.t() for part in comfy_kitchen.scales_and_zeros(scale, zero, torch.bfloat16))
    few = ((8 - zero.float()).abs() != 3) & ((8 - zero.float()).abs() < 5)
    assert torch.equal(z.double()[few], meant[few])


def test_what_it_cannot_take_is_said_before_it_is_looked_for(monkeypatch):
    monkeypatch.setattr(comfy_kitchen, "unavailable", lambda: "comfy-kitchen was looked for")
    monkeypatch.setattr(triton_w4a16, "_not_here", lambda device: None)
    kernel = comfy_kitchen.ComfyKitchen()
    for codec, dtype, message in ((Int4(128), torch.bfloat16, "INT4 in groups of 64"),
                                  (Nvfp4(), torch.bfloat16, "INT4 in groups of 64"),
                                  (CODEC, torch.float32, "bfloat16 or float16"),
                                  (CODEC, torch.bfloat16, "was looked for")):
        assert message in kernel.refusal(codec, 128, dtype, GPU)
    with pytest.raises(InputError, match="kernel comfy_kitchen cannot run .* on cpu: .*take --kernel auto"):
        monkeypatch.undo()
        layer(CODEC, dtype=torch.bfloat16, kernel="comfy_kitchen").kernel()


def test_a_missing_broken_or_old_package_is_named(monkeypatch):
    def reason():
        comfy_kitchen.unavailable.cache_clear()
        return comfy_kitchen.unavailable()

    with monkeypatch.context() as patched:
        patched.setattr(comfy_kitchen.importlib.util, "find_spec", lambda name: None)
        assert "pip install comfy-kitchen" in reason()
        patched.setattr(comfy_kitchen.importlib.util, "find_spec", lambda name: True)
        patched.setitem(sys.modules, "comfy_kitchen", None)
        assert "cannot be imported (ModuleNotFoundError" in reason()
        package, registry = ModuleType("comfy_kitchen"), ModuleType("comfy_kitchen.registry")
        registry.registry = SimpleNamespace(is_available=lambda backend: backend == "eager")
        patched.setitem(sys.modules, "comfy_kitchen", package)
        patched.setitem(sys.modules, "comfy_kitchen.registry", registry)
        assert "has no AWQ kernel" in reason()
        package.gemv_awq_w4a16 = len
        assert "cannot load its CUDA kernels" in reason()
        registry.registry.is_available = lambda backend: True
        assert reason() is None
    comfy_kitchen.unavailable.cache_clear()


def test_auto_takes_the_faster_of_two_only_where_both_can_serve(monkeypatch):
    monkeypatch.setattr(triton_w4a16, "_not_here", lambda device: None)
    monkeypatch.setattr(comfy_kitchen, "unavailable", lambda: None)
    chosen = {(codec, dtype): dispatch.choose("auto", codec, 128, dtype, GPU).name
              for codec, dtype in ((CODEC, torch.bfloat16), (CODEC, torch.float32), (Nvfp4(), torch.bfloat16))}
    assert list(chosen.values()) == ["triton or comfy_kitchen", "triton", "triton"]
    monkeypatch.setattr(comfy_kitchen, "unavailable", lambda: "it is not there")
    assert dispatch.choose("auto", CODEC, 128, torch.bfloat16, GPU).name == "triton"
    assert dispatch.choose("triton", CODEC, 128, torch.bfloat16, GPU).name == "triton"


def tuner(times, may_time=lambda: True, folder=None):
    """An autotuner whose contestants return their names and take so many seconds; an exception is raised."""
    tried = []

    def contestant(name):
        def call(*_):
            if isinstance(times[name], Exception):
                raise times[name]
            return name
        return call

    def seconds(call):
        tried.append(call())
        return times[tried[-1]]

    winners = autotune.Winners(lambda: folder)
    return autotune.Autotuner({name: contestant(name) for name in times}, seconds, may_time, winners), tried


@pytest.mark.parametrize("times, winner", [
    ({"triton": 2.0, "comfy_kitchen": 1.0}, "comfy_kitchen"), ({"triton": 1.0, "comfy_kitchen": 2.0}, "triton"),
    ({"triton": 1.0, "comfy_kitchen": 1.0}, "triton"), ({"triton": 1.0, "comfy_kitchen": 0.95}, "triton"),
    ({"triton": 1.0, "comfy_kitchen": float("nan")}, "triton")])
def test_the_faster_one_is_taken_if_it_is_clearly_faster_and_timed_once(times, winner):
    kernel, tried = tuner(times)
    assert [kernel.run(*CALL) for _ in range(3)] == [winner] * 3
    assert tried == ["triton", "comfy_kitchen"]
    assert kernel.run("another kind", *CALL[1:]) == winner and len(tried) == 4


def test_one_that_fails_while_it_is_tried_is_not_taken_and_named(caplog):
    kernel, _ = tuner({"triton": 1.0, "comfy_kitchen": RuntimeError("no kernel image")})
    assert [kernel.run(*CALL) for _ in range(2)] == ["triton"] * 2
    assert caplog.text.count("kernel comfy_kitchen failed when it was tried and is not taken (RuntimeError: no") == 1
    kernel, _ = tuner({"triton": RuntimeError("out of resource"), "comfy_kitchen": 1.0})
    assert kernel.run(*CALL) == "comfy_kitchen"
    kernel, _ = tuner({"triton": RuntimeError("a"), "comfy_kitchen": RuntimeError("b")})
    with pytest.raises(RuntimeError, match="a"):
        kernel.run(*CALL)


def test_nothing_is_timed_or_settled_while_a_graph_is_recorded():
    recording = [True]
    kernel, tried = tuner({"triton": 2.0, "comfy_kitchen": 1.0}, lambda: not recording[0])
    assert kernel.run(*CALL) == "triton" and tried == []
    recording[0] = False
    assert kernel.run(*CALL) == "comfy_kitchen"
    recording[0] = True
    assert kernel.run(*CALL) == "comfy_kitchen"


def test_kinds_are_shapes_and_powers_of_two_of_rows_and_many_rows_are_not_tried(monkeypatch):
    kinds = []
    monkeypatch.setattr(autotune, "AUTOTUNER", SimpleNamespace(run=lambda kind, x, *weight: kinds.append(kind) or x))
    monkeypatch.setattr(triton_w4a16, "compute", lambda x, *weight: x)
    q = random_weight(CODEC, 40, 128)
    for rows in (0, 1, 2, 3, 4, 5, 200, 256, 257):
        autotune.compute(torch.zeros(rows, 128), q.packed, *parts_of(q), None, 64)
    assert [kind.split(" rows")[0].split("for ")[1] for kind in kinds] == [
        f"up to {rows}" for rows in (1, 2, 4, 4, 8, 256, 256)]
    assert kinds[0].startswith("INT4 128 -> 40 for up to 1 rows in torch.float32 on cpu (torch ")
    assert "comfy-kitchen" in kinds[0] and "triton" in kinds[0]


def test_a_machine_decides_once_and_deleting_the_file_lets_it_decide_again(tmp_path):
    times = {"triton": 2.0, "comfy_kitchen": 1.0}
    first, _ = tuner(times, folder=tmp_path)
    assert first.run(*CALL) == "comfy_kitchen"
    later, tried = tuner({"triton": 1.0, "comfy_kitchen": 2.0}, folder=tmp_path)  # another process
    assert later.run(*CALL) == "comfy_kitchen" and tried == []
    assert later.run("another GPU", *CALL[1:]) == "triton" and tried == ["triton", "comfy_kitchen"]
    assert [path.name for path in tmp_path.iterdir()] == [autotune.FILE]
    assert json.loads((tmp_path / autotune.FILE).read_text()) == {"kind": "comfy_kitchen", "another GPU": "triton"}
    (tmp_path / autotune.FILE).unlink()
    assert tuner({"triton": 1.0, "comfy_kitchen": 2.0}, folder=tmp_path)[0].run(*CALL) == "triton"


@pytest.mark.parametrize("content", ["", "[1, 2]", '{"kind": "marlin"}', '{"kind": 3', "\x00"])
def test_a_spoilt_file_or_a_winner_that_is_gone_is_decided_anew(tmp_path, content):
    (tmp_path / autotune.FILE).write_text(content)
    kernel, tried = tuner({"triton": 2.0, "comfy_kitchen": 1.0}, folder=tmp_path)
    assert kernel.run(*CALL) == kernel.run(*CALL) == "comfy_kitchen" and len(tried) == 2
    assert json.loads((tmp_path / autotune.FILE).read_text()) == {"kind": "comfy_kitchen"}


def test_a_failure_decides_for_its_process_only(tmp_path):
    kernel, _ = tuner({"triton": 1.0, "comfy_kitchen": RuntimeError("out of memory")}, folder=tmp_path)
    assert kernel.run(*CALL) == "triton" and not list(tmp_path.iterdir())
    assert tuner({"triton": 1.0, "comfy_kitchen": 0.5}, folder=tmp_path)[0].run(*CALL) == "comfy_kitchen"


def test_where_nothing_can_be_written_the_process_decides_for_itself(tmp_path):
    kernel, tried = tuner({"triton": 2.0, "comfy_kitchen": 1.0}, folder=tmp_path / "missing")
    assert [kernel.run(*CALL) for _ in range(3)] == ["comfy_kitchen"] * 3 and len(tried) == 2


def test_what_is_derived_is_kept_with_its_tensors_only():
    made = []
    derived = Derived(lambda first, second: made.append(1) or [len(made)])
    first, second, other = (torch.zeros(2) for _ in range(3))
    assert derived.of(first, second) == derived.of(first, second) == [1]
    assert derived.of(first, other) == [2] and derived.of(first, None) == [3] and derived.of(other, None) == [4]
    del first
    assert len(derived._kept) == 1
