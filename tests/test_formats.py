import threading

import pytest
import torch

from lance_quant.cpu.threads import block_threads
from lance_quant.errors import InputError
from lance_quant.formats import nvfp4
from lance_quant.formats.base import nearest_levels
from lance_quant.formats.blocks import (
    dequantize_to,
    map_blocks,
    quantize_measured,
    quantize_scaled,
    quantize_searched,
)
from lance_quant.formats.int4 import Int4
from lance_quant.formats.nvfp4 import Nvfp4

CODECS = [Int4(32), Int4(64), Nvfp4(), Nvfp4(slim=True)]
codecs = pytest.mark.parametrize("codec", CODECS, ids=str)


def gaussian(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def small_blocks(monkeypatch):
    """2 rows and 64 columns or one group."""
    monkeypatch.setattr("lance_quant.formats.blocks._CPU_ROWS", 2)
    monkeypatch.setattr("lance_quant.formats.blocks._CPU_BLOCK", 128)


def global_scale_of(codec, *weights):
    return codec.quantizer.global_scale(max(float(w.abs().max()) for w in weights))


@codecs
def test_what_is_written_has_the_planned_specs_and_reads_back(codec):
    w = gaussian(8, 128)
    q = codec.quantizer.quantize(w, global_scale_of(codec, w))
    tensors = codec.tensors(q)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == codec.specs((8, 128))
    entry = codec.entry((8, 128), "searched", global_scale_of(codec, w))
    assert torch.equal(codec.dequantize(codec.weight(tensors, entry.get("global_scale"))), codec.dequantize(q))


@codecs
def test_fake_quant_is_dequantize_of_quantize(codec):
    w = gaussian(8, 128)
    global_scale = global_scale_of(codec, w)
    fake = codec.quantizer.fake_quant_io(w.t().contiguous(), global_scale).t()
    assert torch.equal(fake, codec.dequantize(codec.quantizer.quantize(w, global_scale)))


@codecs
def test_blocks_change_nothing(codec, monkeypatch):
    weights = [gaussian(9, 128), gaussian(3, 128, seed=1)]
    scale = torch.rand(128, generator=torch.Generator().manual_seed(2)) + 0.5
    global_scale = global_scale_of(codec, *(w * scale for w in weights))
    small_blocks(monkeypatch)
    before = torch.get_num_threads()
    for w, q in zip(weights, quantize_scaled(codec.quantizer, weights, scale, global_scale), strict=True):
        expected = codec.quantizer.quantize(w * scale, global_scale)
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(q, expected, strict=True))
        assert torch.equal(dequantize_to(codec, q, torch.bfloat16), codec.dequantize(expected).bfloat16())
    assert torch.get_num_threads() == before


def test_inside_block_threads_operations_have_one_thread_and_blocks_have_all(monkeypatch):
    small_blocks(monkeypatch)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with block_threads() as outer, block_threads() as inner:
            assert (outer, inner, torch.get_num_threads()) == (3, 3, 1)
            seen = map_blocks(lambda block: (threading.current_thread().name, torch.get_num_threads()),
                              [gaussian(64, 128)])
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert {count for _, count in seen} == {1} and threading.current_thread().name not in {name for name, _ in seen}


def test_block_threads_are_the_calling_threads_own():
    """Another thread that comes in the meantime takes what torch gives it, not the workers of the first."""
    found = []

    def look():
        with block_threads() as workers:
            found.append(workers)

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with block_threads():
            other = threading.Thread(target=look)
            other.start()
            other.join()
    finally:
        torch.set_num_threads(before)
    assert found == [1]


def test_stored_bits_per_weight_are_those_of_the_format():
    for codec, bits in ((Int4(64), 4.375), (Int4(128), 4.1875), (Int4(32), 4.75), (Nvfp4(), 5.5), (Nvfp4(True), 4.5)):
        assert 8 * sum(spec.nbytes for spec in codec.specs((4, 256)).values()) / (4 * 256) == bits


def test_published_readers_and_slim_readers_get_the_same_values():
    w = gaussian(8, 128)
    q = nvfp4.quantize(w)
    published, slim = Nvfp4().tensors(q), Nvfp4(slim=True).tensors(q)
    through_bf16 = Nvfp4().weight(published, None)
    through_e4m3 = Nvfp4(slim=True).weight(slim, q.global_scale)
    assert torch.equal(Nvfp4().dequantize(through_bf16), Nvfp4().dequantize(through_e4m3))
    assert torch.equal(published["scales_fp8"].view(torch.float8_e4m3fn),
                       published["scales_bf16"].to(torch.float8_e4m3fn))


def test_a_group_size_that_does_not_fit_names_the_linear_its_width_and_what_works():
    with pytest.raises(InputError, match=r"group size 48 .* 2048 inputs of some\.linear; .* 16, 32, 64, 128, 256"):
        Int4(48).require_fits("some.linear", (8, 2048))
    with pytest.raises(InputError, match="16 inputs; some.linear has 24"):
        Nvfp4().require_fits("some.linear", (8, 24))
    with pytest.raises(InputError, match="not positive"):
        Int4(0)


def test_the_linears_of_a_group_share_their_global_scale():
    small, large = gaussian(4, 64), gaussian(4, 64) * 100
    global_scale = global_scale_of(Nvfp4(), small, large)
    packed = quantize_scaled(Nvfp4().quantizer, [small, large], None, global_scale)
    assert {q.global_scale for q in packed} == {global_scale}


def weighted_error(codec, back_io, w_io, importance):
    blocks = (back_io - w_io).square().mul(importance[:, None])
    return blocks.view(-1, codec.group_size, w_io.shape[1]).sum(1)


@codecs
@pytest.mark.parametrize("seed", range(3))
def test_a_searched_grid_is_never_worse_than_min_max_in_any_group(codec, seed):
    w_io = gaussian(128, 24, seed)
    importance = gaussian(128, 1, seed + 50).exp().pow(40)[:, 0]
    global_scale = global_scale_of(codec, w_io)
    grid = codec.quantizer.grid(w_io, importance, global_scale)
    searched = weighted_error(codec, nearest_levels(codec.quantizer, w_io, grid), w_io, importance)
    plain = weighted_error(codec, codec.quantizer.fake_quant_io(w_io, global_scale), w_io, importance)
    assert (searched <= plain * (1 + 1e-5)).all()  # float32 sums of 16 to 64 squares
    assert searched.sum() < 0.95 * plain.sum()


@codecs
def test_levels_pack_and_come_back_exactly(codec):
    w_io = gaussian(128, 24)
    global_scale = global_scale_of(codec, w_io)
    grid = codec.quantizer.grid(w_io, torch.ones(128), global_scale)
    values = nearest_levels(codec.quantizer, w_io, grid)
    q = codec.quantizer.encode(values.t().contiguous(), grid, global_scale)
    assert torch.equal(codec.dequantize(q), values.t())
    assert {name: (t.dtype, tuple(t.shape)) for name, t in codec.tensors(q).items()} == codec.specs((24, 128))


@codecs
def test_searched_packing_is_the_searched_grid_row_by_row(codec, monkeypatch):
    weights, importance = [gaussian(9, 128), gaussian(3, 128, seed=1)], torch.arange(1.0, 129)
    global_scale = global_scale_of(codec, *weights)
    small_blocks(monkeypatch)
    for w, q in zip(weights, quantize_searched(codec.quantizer, weights, importance, global_scale), strict=True):
        grid = codec.quantizer.grid(w.t().contiguous(), importance, global_scale)
        assert torch.equal(codec.dequantize(q), nearest_levels(codec.quantizer, w.t().contiguous(), grid).t())


@codecs
def test_measured_errors_are_those_of_what_comes_back(codec, monkeypatch):
    weights, importance = [gaussian(9, 128), torch.zeros(3, 128)], torch.arange(1.0, 129)
    small_blocks(monkeypatch)
    packed, errors = quantize_measured(codec.quantizer, weights, importance, global_scale_of(codec, *weights))
    off = ((codec.dequantize(packed[0]) - weights[0]).square() @ importance).sum()
    assert errors[0] == pytest.approx(float(off / (weights[0].square() @ importance).sum()), rel=1e-5)  # float32 sums
    assert errors[1] == 0


@codecs
def test_packing_on_the_way_is_packing_of_the_values(codec):
    """round_io's bytes are encode's, and its values those that the bytes mean; halves and zeros among them."""
    w_io = (gaussian(128, 24) * 200).round() / 400
    grid = codec.quantizer.grid(w_io, torch.ones(128), global_scale_of(codec, w_io))
    q, values = codec.quantizer.round_io(w_io, grid, global_scale_of(codec, w_io))
    assert torch.equal(values, nearest_levels(codec.quantizer, w_io, grid))
    expected = codec.quantizer.encode(values.t().contiguous(), grid, global_scale_of(codec, w_io))
    assert torch.equal(codec.dequantize(q), codec.dequantize(expected)) and torch.equal(q.packed, expected.packed)
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(q, expected, strict=True))


@codecs
def test_storable_steps_stay_and_others_move_little(codec):
    """bfloat16 has 8 significant bits and E4M3 four: half a step is at most 2^-8 and 2^-4 of the value."""
    step = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 0.01 + 1e-3
    stored = codec.quantizer.storable(step, codec.quantizer.global_scale(0.06))
    assert torch.equal(codec.quantizer.storable(stored, codec.quantizer.global_scale(0.06)), stored)
    bound = 2**-8 if codec.name == "int4" else 2**-4
    assert ((stored - step).abs() <= bound * step * 1.001).all()
