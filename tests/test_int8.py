import copy
import shutil

import pytest
import real_keys
import torch
import torch.nn.functional as F
from conftest import CPU, GOLDENS
from safetensors.torch import load_file, save_file
from test_packed import edit
from torch import nn

from lance_quant import convert, int8, layout
from lance_quant.codec import Int4, Nvfp4
from lance_quant.errors import InputError
from lance_quant.lance.config import LancePaths
from lance_quant.lance.pipeline import Pipeline
from lance_quant.packed import PackedFolder
from quantized_linear import swap_linears

SRC = GOLDENS / "checkpoint" / "Lance_3B"
STATS = GOLDENS / "published" / "act_stats.pt"
EMBEDDING, HEAD = layout.VOCABULARY


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
    linear, embedding = int8.Int8Linear((23, 16), dtype, cached), int8.Int8Embedding((23, 16), dtype, cached)
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


def write(out, codec):
    return convert.convert(SRC, STATS, out, codec, "ours", CPU, sizes=convert.Sizes(head_bits=8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("int8") / "out"
    write(out, Int4(64))
    return out


@pytest.mark.parametrize("codec", [Int4(64), Nvfp4(), Nvfp4(slim=True)], ids=str)
def test_the_dry_run_promises_the_bytes_and_only_the_two_tables_shrink(tmp_path, codec):
    plain = int(convert.dry_run(SRC, codec).splitlines()[-1].split()[-1])
    promised = convert.dry_run(SRC, codec, convert.Sizes(head_bits=8)).splitlines()
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
    plain, small = (int(convert.dry_run(path, codec, convert.Sizes(head_bits=bits)).split()[-1]) for bits in (16, 8))
    assert small == size and abs(plain - small - 2 * 151936 * (2048 - 2)) < 10_000


@pytest.mark.parametrize("mode", ["ondemand", "cached"])
def test_a_folder_with_an_8_bit_head_loads_like_any_other_and_means_its_codes(folder, mode):
    """Against the float model with these two tables rounded by hand and the same packed linears."""
    paths = LancePaths.find(SRC)
    with PackedFolder(folder) as packed:
        assert set(packed.head) == {EMBEDDING, HEAD} and packed.bits_per_weight == 4.375
        pipeline = Pipeline.load(paths, CPU, torch.float32, packed.checkpoint.path,
                                 lambda model: swap_linears(model, packed, torch.float32, CPU, mode))
    model = pipeline.model
    assert isinstance(model.get_submodule(HEAD), int8.Int8Linear)
    original = load_file(SRC / "model.safetensors")
    rounded = {name: int8.dequantize(int8.quantize(original[f"{name}.weight"])) for name in (EMBEDDING, HEAD)}
    ids, hidden = torch.tensor([3, 1, 4]), rand(5, model.config.hidden_size)
    assert torch.equal(model.embed(ids), rounded[EMBEDDING][ids])
    torch.testing.assert_close(model.get_submodule(HEAD)(hidden), hidden @ rounded[HEAD].t(), rtol=1e-5, atol=1e-5)


def drop(key):
    return lambda tensors: tensors.pop(key)


@pytest.mark.parametrize("tensors, meta, message", [
    (drop(f"{HEAD}.codes_int8"), lambda meta: None, "lm_head.codes_int8 is missing"),
    (lambda t: t.update({f"{HEAD}.weight": torch.ones(2, 2)}), lambda meta: None, "lm_head.weight beside a packed"),
    (lambda t: t.update({f"{HEAD}.row_scales": torch.ones(3)}), lambda meta: None, r"row_scales is float32 \[3\], not"),
    (lambda t: None, lambda meta: meta.pop("head_weights"), "codes_int8 belongs to no listed linear"),
    (lambda t: None, lambda meta: meta["head_weights"][f"{HEAD}.weight"].update(n_bit=6), "unknown to this version"),
    (lambda t: None, lambda meta: meta["head_weights"].update({"vae2llm.weight": int8.entry((2, 2))}), "vae2llm"),
    (lambda t: None, lambda meta: meta.update(head_weights=[1]), "no table of weights"),
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
        int8.swap(model, packed, torch.float32, CPU)
    assert isinstance(model.language_model.lm_head, nn.Linear)


def test_nan_in_the_table_is_refused_by_name(tmp_path):
    tensors = load_file(SRC / "model.safetensors")
    tensors[f"{HEAD}.weight"][2, 3] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="lm_head.weight holds NaN"):
        convert.convert(tmp_path, STATS, tmp_path / "out", Int4(64), "ours", CPU, sizes=convert.Sizes(head_bits=8))
    assert not (tmp_path / "out").exists()


def test_the_published_recipe_knows_no_8_bit_head(tmp_path):
    with pytest.raises(InputError, match="--head_bits 8 is not part of the published recipe"):
        convert.convert(SRC, STATS, tmp_path / "out", Int4(64), "published", CPU, sizes=convert.Sizes(head_bits=8))


def test_a_packed_checkpoint_with_an_8_bit_head_is_no_source(folder):
    with pytest.raises(InputError, match="packed already"):
        convert.dry_run(folder / Int4.state_file, Int4(64))
