import copy
import shutil

import pytest
import real_keys
import torch
import torch.nn.functional as F
from conftest import CPU, GOLDENS
from safetensors.torch import load_file, save_file
from test_packed_folder import edit
from torch import nn

from lance_quant.errors import InputError
from lance_quant.formats import int8, layout
from lance_quant.formats.int4 import Int4
from lance_quant.formats.nvfp4 import Nvfp4
from lance_quant.formats.packed_folder import PackedFolder
from lance_quant.kernels import base, cpu
from lance_quant.kernels.quantized_linear import Int8Embedding, Int8Linear, swap_int8_head, swap_linears
from lance_quant.kernels.reference import Reference
from lance_quant.lance.config import LancePaths
from lance_quant.lance.runtime import Runtime
from lance_quant.methods import convert, plan
from lance_quant.methods.conversion import Conversion

SRC = GOLDENS / "checkpoint" / "Lance_3B"
STATS = GOLDENS / "published" / "act_stats.pt"
EMBEDDING, HEAD = layout.VOCABULARY
KERNELS = {"native": cpu.Native, "reference": Reference}
needs_native = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"native: {cpu.unavailable()}")


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_codes_and_scales_by_hand():
    """127 steps of 0.5 reach 63.5; halves of a step go to the even neighbour."""
    q = int8.quantize(torch.tensor([[63.5, -63.5, 0.25, 0.75], [0.0, 0.0, 0.0, 0.0]]))
    assert q.scale.tolist() == [0.5, pytest.approx(int8.MIN_SCALE, rel=2**-8)]
    assert q.codes.tolist() == [[127, -127, 0, 2], [0, 0, 0, 0]]
    assert torch.equal(int8.dequantize(q), torch.tensor([[63.5, -63.5, 0.0, 1.0], [0.0] * 4]))


def test_every_weight_is_within_half_a_step():
    """A scale rounded down by up to 2^-9 puts the largest weight at most 127.25 steps away, so no code is clamped by
    more than a quarter of a step."""
    w = rand(64, 128) * torch.logspace(-6, 3, 64)[:, None]
    q = int8.quantize(w)
    assert ((int8.dequantize(q) - w).abs() <= 0.5001 * q.scale.float()[:, None]).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused(bad):
    with pytest.raises(ValueError, match="NaN or Inf"):
        int8.quantize(torch.tensor([[1.0, bad]]))


@pytest.mark.parametrize("cut", [1, 5, 16, 17, 48, 1000])
def test_pieces_of_any_length_give_the_same_rows(cut):
    w = rand(6, 16)
    parts = list(int8.quantize_rows(w.reshape(-1).split(cut), 16))
    whole = int8.quantize(w)
    assert torch.equal(torch.cat([part.codes for part in parts]), whole.codes)
    assert torch.equal(torch.cat([part.scale for part in parts]), whole.scale)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_layers_compute_with_the_dequantized_weight(monkeypatch, cached, dtype):
    monkeypatch.setattr(int8, "_BLOCK", 5 * 16)  # 5 rows at a time, the last block shorter
    q = int8.quantize(rand(23, 16))
    weight = int8.dequantize(q).to(dtype)
    linear, embedding = Int8Linear((23, 16), dtype, cached), Int8Embedding((23, 16), dtype, cached)
    assert all(t.is_meta for t in linear.buffers())
    linear.fill(q), embedding.fill(q)
    x, ids = rand(2, 3, 16, seed=1).to(dtype), torch.tensor([[0, 22], [7, 7]])
    # matmuls of another width may sum in another order
    torch.testing.assert_close(linear(x), F.linear(x, weight), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6,
                               atol=1e-2 if dtype == torch.bfloat16 else 1e-5)
    assert torch.equal(embedding(ids), F.embedding(ids, weight))
    assert linear.file_keys("head") == {"head.codes_int8", "head.row_scales"}
    if not cached:
        moved = copy.deepcopy(linear).to(torch.float16)
        assert moved.row_scales.dtype == torch.bfloat16 and torch.equal(moved(x), linear(x))


def every_code(n_out, n_in):
    """All codes, scales over six decades, one row of zeros and one whose codes are the largest."""
    order = torch.randperm(n_in, generator=torch.Generator().manual_seed(4))
    codes = (torch.arange(n_out * n_in) % 255 - 127).view(n_out, n_in)[:, order].to(torch.int8)
    codes[1], codes[2] = 0, 127
    return int8.Int8Weight(codes, (10 ** (rand(n_out, seed=3).clamp(-2, 2) * 1.5 - 3)).bfloat16())


# Share of the sum of |products| by which a result may be off. float32: a sum of n_in products and the scale, 2^-24 a
# step (n_in + 2 steps at most, n_in 384). Others: rounding of the weight, where a GEMM needs it in their dtype, and of
# the result, 2^-9 each for bfloat16; float16 multiplies in float32, 2^-11 for the result.
SHARE = {torch.float32: 2.0**-24 * 386, torch.bfloat16: 2.0**-24 * 386 + 2 * 2.0**-9,
         torch.float16: 2.0**-24 * 386 + 2 * 2.0**-11}


def check(kernel, rows, dtype, n_out=37, n_in=384, x=None):
    q = every_code(n_out, n_in)
    x = rand(rows, n_in, seed=1).to(dtype) if x is None else x
    y = kernel.int8_linear(x, q)
    assert y.shape == (len(x), n_out) and y.dtype == dtype
    weight = int8.dequantize(q).double()
    error, worst = (y.double() - x.double() @ weight.t()).abs(), x.double().abs() @ weight.abs().t()
    # 2^-25: half of float16's smallest number
    assert (error <= worst * SHARE[dtype] + (2.0**-25 if dtype == torch.float16 else 1e-30)).all(), error.max()


@needs_native
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8, 32, 33, 67])
def test_every_kernel_computes_what_the_definition_says(monkeypatch, kernel, dtype, rows):
    monkeypatch.setattr(cpu, "_INT8_BLOCK", 5 * 384)  # the last of 37 rows are a shorter block
    monkeypatch.setattr(int8, "_BLOCK", 5 * 384)
    check(kernel(), rows, dtype)


@needs_native
def test_inputs_may_be_strided_empty_and_of_very_different_size():
    strided = rand(384, 10).t()[::2]
    assert not strided.is_contiguous()
    check(cpu.Native(), 5, torch.float32, x=strided)
    for rows in (2, 40):
        for size in (0.0, 1e-30, 1e30):
            check(cpu.Native(), rows, torch.float32, x=rand(rows, 384) * size)
        check(cpu.Native(), rows, torch.float32, n_out=3, n_in=64)
    assert cpu.Native().int8_linear(torch.empty(0, 384), every_code(4, 384)).shape == (0, 4)


@needs_native
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows", [2, 40])
def test_a_row_that_is_not_finite_stays_visible_and_alone(bad, rows):
    x = rand(rows, 384)
    x[1, 100] = bad
    y = cpu.Native().int8_linear(x, every_code(40, 384))
    assert not y[1].isfinite().all() and y[[0, *range(2, rows)]].isfinite().all()


@needs_native
def test_few_rows_do_not_depend_on_one_another():
    kernel, q, x = cpu.Native(), every_code(40, 384), rand(7, 384)
    assert torch.equal(kernel.int8_linear(x, q), torch.cat([kernel.int8_linear(row[None], q) for row in x]))


@needs_native
@pytest.mark.parametrize("rows", [3, 40])
def test_the_dequantized_weight_is_never_there_as_a_whole(monkeypatch, rows):
    sizes, original = [], cpu.scratch
    monkeypatch.setattr(cpu, "_INT8_BLOCK", 16 * 384)
    monkeypatch.setattr(cpu, "scratch", lambda size, dtype: sizes.append(size) or original(size, dtype))
    check(cpu.Native(), rows, torch.float32, n_out=100)
    assert sizes == ([] if rows == 3 else 6 * [16 * 384] + [4 * 384])


def filled(n_in=128, dtype=torch.float32, **options):
    layer = Int8Linear((48, n_in), dtype, **options)
    layer.fill(int8.quantize(rand(48, n_in)))
    return layer


@needs_native
def test_the_head_takes_the_kernel_of_its_device_and_what_ran_is_counted():
    before = base.CALLS.counts()
    layers = [filled(), filled(kernel="reference"), filled(kernel="triton"), filled(n_in=96), filled(cached=True)]
    for layer in layers:
        for rows in (1, 40):
            layer(rand(rows, layer.in_features))
    assert [layer.kernel().name for layer in layers[:4]] == ["native", "reference", "reference", "reference"]
    assert base.CALLS.since(before) == {
        "native int8 dot": 1, "native int8 dequantize + float32 GEMM": 1, "reference int8": 6}


@pytest.mark.parametrize("why", ["no compiler", "width"])
def test_a_head_that_runs_on_the_reference_says_why(monkeypatch, caplog, why):
    base.warn_once.cache_clear()
    if why == "no compiler":
        monkeypatch.setattr(cpu, "_library_or_reason", lambda: (None, "there is no C compiler; install gcc"))
    layer, x = filled(128 if why == "no compiler" else 96), rand(2, 128 if why == "no compiler" else 96)
    assert torch.equal(layer(x), F.linear(x, int8.dequantize(int8.Int8Weight(layer.codes_int8, layer.row_scales))))
    layer(x), filled(layer.in_features)(x)
    (message,) = caplog.messages
    said = "no C compiler; install gcc" if why == "no compiler" else "multiples of 64 inputs"
    assert said in message and "the 8-bit head" in message and "much slower reference" in message


@pytest.mark.parametrize("x", [torch.zeros(2, 128, dtype=torch.bfloat16), torch.zeros(2, 64)], ids=["dtype", "width"])
def test_inputs_of_another_dtype_or_width_are_refused(x):
    with pytest.raises(ValueError, match=r"expected 128 inputs in torch.float32, got \d+ in torch"):
        filled()(x)


def test_gradients_pass_through_the_head():
    layer, x = filled(), rand(3, 128).requires_grad_()
    layer(x).sum().backward()
    weight = int8.dequantize(int8.Int8Weight(layer.codes_int8, layer.row_scales))
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, -1))  # the same sums in another order


@needs_native
def test_the_head_is_one_node_of_a_compiled_graph():
    layer, x = filled(), rand(3, 128)
    layer.settle(), filled(cached=True).settle()
    compiled = torch.compile(lambda x: layer(x) * 2, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x) * 2)


def write(out, codec):
    return convert.convert(SRC, STATS, out, Conversion(codec, head_bits=8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("int8") / "out"
    write(out, Int4(64))
    return out


@pytest.mark.parametrize("codec", [Int4(64), Nvfp4(), Nvfp4(slim=True)], ids=str)
def test_the_dry_run_promises_the_bytes_and_only_the_two_tables_shrink(tmp_path, codec):
    plain = int(plan.dry_run(SRC, Conversion(codec)).splitlines()[-1].split()[-1])
    promised = plan.dry_run(SRC, Conversion(codec, head_bits=8)).splitlines()
    report = write(tmp_path / "out", codec)
    file = tmp_path / "out" / codec.state_file
    assert int(promised[-1].split()[-1]) == report.nbytes == file.stat().st_size < plain
    written, original = load_file(file), load_file(SRC / "model.safetensors")
    tables = {f"{name}.weight" for name in (EMBEDDING, HEAD)}
    assert not tables & written.keys() and len([name for name in written if name.endswith("codes_int8")]) == 2
    for name in (EMBEDDING, HEAD):
        whole = int8.quantize(original[f"{name}.weight"])
        assert torch.equal(written[f"{name}.codes_int8"], whole.codes)
        assert torch.equal(written[f"{name}.row_scales"], whole.scale)


@pytest.mark.parametrize("model, codec, size", [("Lance_3B", Int4(64), 3_685_470_376),
                                                ("Lance_3B", Nvfp4(slim=True), 3_772_110_472)], ids=str)
def test_the_sizes_of_the_real_model(tmp_path, model, codec, size):
    """Half of two tables of 151936 x 2048 in bfloat16 less, 2 bytes per row more; smaller offsets in the header."""
    path = real_keys.write_headers_only(tmp_path, model)
    plain, small = (int(plan.dry_run(path, Conversion(codec, head_bits=bits)).split()[-1]) for bits in (16, 8))
    assert small == size and abs(plain - small - 2 * 151936 * (2048 - 2)) < 10_000


@pytest.mark.parametrize("mode", ["ondemand", "cached"])
def test_a_folder_with_an_8_bit_head_loads_like_any_other_and_means_its_codes(folder, mode):
    """Against the float model with these two tables rounded by hand and the same packed linears."""
    paths = LancePaths.find(SRC)
    with PackedFolder(folder) as packed:
        assert set(packed.head) == {EMBEDDING, HEAD} and packed.bits_per_weight == 4.375
        pipeline = Runtime.load(paths, CPU, torch.float32, packed.checkpoint.path,
                                 lambda model: swap_linears(model, packed, torch.float32, CPU, mode))
    model = pipeline.model
    assert isinstance(model.get_submodule(HEAD), Int8Linear)
    original = load_file(SRC / "model.safetensors")
    rounded = {name: int8.dequantize(int8.quantize(original[f"{name}.weight"])) for name in (EMBEDDING, HEAD)}
    ids, hidden = torch.tensor([3, 1, 4]), rand(5, model.config.hidden_size)
    assert torch.equal(model.embed(ids), rounded[EMBEDDING][ids])
    torch.testing.assert_close(model.get_submodule(HEAD)(hidden), hidden @ rounded[HEAD].t(), rtol=1e-5, atol=1e-5)


def test_a_kernel_asked_for_by_name_is_the_head_s_too(folder):
    with PackedFolder(folder) as packed:
        model = Runtime.load(LancePaths.find(SRC), CPU, torch.float32, packed.checkpoint.path,
                              lambda model: swap_linears(model, packed, torch.float32, CPU, kernel="reference")).model
    assert model.get_submodule(HEAD).kernel().name == "reference"


def drop(key):
    return lambda tensors: tensors.pop(key)


@pytest.mark.parametrize("tensors, meta, message", [
    (drop(f"{HEAD}.codes_int8"), lambda meta: None, "lm_head.codes_int8 is missing"),
    (lambda t: t.update({f"{HEAD}.weight": torch.ones(2, 2)}), lambda meta: None, "lm_head.weight beside a packed"),
    (lambda t: t.update({f"{HEAD}.row_scales": torch.ones(3)}), lambda meta: None, r"row_scales is float32 \[3\], not"),
    (lambda t: None, lambda meta: meta.pop("head_weights"), "codes_int8 belongs to no listed linear"),
    (lambda t: None, lambda meta: meta["head_weights"][f"{HEAD}.weight"].update(n_bit=6), "unknown to this version"),
    (lambda t: None, lambda meta: meta["head_weights"].update({"vae2llm.weight": int8.entry((2, 2))}), "vae2llm"),
    (lambda t: None, lambda meta: meta.update(head_weights=[1]),
     r"head_weights in the meta holds \[1\]: must be a valid dict"),
])
def test_meta_and_tensors_of_the_head_must_agree(folder, tmp_path, tensors, meta, message):
    copied = shutil.copytree(folder, tmp_path / "copy")
    with pytest.raises(InputError, match=message):
        PackedFolder(edit(copied, Int4, tensors, meta))


def test_a_model_of_another_size_is_refused_and_left_alone(folder):
    with torch.device("meta"):
        model = nn.Module()
        model.language_model = nn.Module()
        model.language_model.model = nn.Module()
        model.language_model.model.embed_tokens = nn.Embedding(3, 64)
        model.language_model.lm_head = nn.Linear(64, 3, bias=False)
    with PackedFolder(folder) as packed, pytest.raises(InputError, match=r"8 bits, .* the model has a Embedding \[3"):
        swap_int8_head(model, packed, torch.float32, CPU)
    assert isinstance(model.language_model.lm_head, nn.Linear)


def test_nan_in_the_table_is_refused_by_name(tmp_path):
    tensors = load_file(SRC / "model.safetensors")
    tensors[f"{HEAD}.weight"][2, 3] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="lm_head.weight holds NaN"):
        convert.convert(tmp_path, STATS, tmp_path / "out", Conversion(Int4(64), head_bits=8))
    assert not (tmp_path / "out").exists()


def test_the_published_recipe_knows_no_8_bit_head(tmp_path):
    with pytest.raises(InputError, match="--head_bits 8 is not part of the published recipe"):
        Conversion(Int4(64), "published", head_bits=8)


def test_a_packed_checkpoint_with_an_8_bit_head_is_no_source(folder):
    with pytest.raises(InputError, match="packed already"):
        plan.dry_run(folder / Int4.state_file, Conversion(Int4(64)))
