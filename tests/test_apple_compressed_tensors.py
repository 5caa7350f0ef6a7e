"""A packed folder's understanding path as compressed-tensors: the values of the packed folder to the bit.

What stock transformers computes with them is asked where compressed-tensors is installed; it was with 0.20.1.
"""

import json
import shutil

import pytest
import torch
from conftest import CPU, GOLDENS
from real_keys import configured, full_size
from safetensors.torch import load_file

from apple import export_compressed_tensors as exporter
from apple import extract_und
from lance_quant.errors import InputError
from lance_quant.formats import layout
from lance_quant.formats.int4 import Int4
from lance_quant.formats.nvfp4 import MAGNITUDES, Nvfp4
from lance_quant.formats.packed_folder import PackedFolder
from lance_quant.kernels.quantized_linear import PackedLinear
from lance_quant.lance.cache import allocate
from lance_quant.lance.config import LanceConfig
from lance_quant.lance.loader import load_lance
from lance_quant.lance.tokens import mrope_positions
from lance_quant.methods import convert
from lance_quant.methods.conversion import Conversion
from quantized_linear import swap_linears

MODEL, STATS = GOLDENS / "checkpoint" / "Lance_3B", GOLDENS / "published" / "act_stats.pt"
CONVERSIONS = {"int4": Conversion(Int4(64)), "g32": Conversion(Int4(32)),
               "budget": Conversion(Int4(64), bits_budget=5.0),
               "slim": Conversion(Nvfp4(slim=True)), "nvfp4": Conversion(Nvfp4())}
CLOSE = 1e-4  # float32 sums in another order, as in test_apple_extract.py
by_name = pytest.mark.parametrize("name", CONVERSIONS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> (packed folder, export of it)."""
    root = tmp_path_factory.mktemp("compressed")
    for name, conversion in CONVERSIONS.items():
        convert.convert(MODEL, STATS, root / name, conversion)
        exporter.export(root / name, root / name, root / f"{name}-out")
    return {name: (root / name, root / f"{name}-out") for name in CONVERSIONS}


def nibbles(words, lanes):
    """The 4-bit numbers of words, lowest first, in a new last axis."""
    return torch.stack([words >> 4 * lane & 15 for lane in range(lanes)], -1)


def decoded(tensors, name, size):
    """A linear [out, in] by the layout's definition, written down anew."""
    parts = {suffix: tensors[f"{name}.{suffix}"] for suffix in (
        "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_global_scale")
        if f"{name}.{suffix}" in tensors}
    if "weight_global_scale" in parts:
        codes = nibbles(parts["weight_packed"].int(), 2).flatten(1)
        magnitudes = torch.tensor(MAGNITUDES)[codes & 7]
        scale = (parts["weight_scale"].float() / parts["weight_global_scale"]).repeat_interleave(16, 1)
        return torch.where(codes >= 8, -magnitudes, magnitudes) * scale
    n_out, n_in = parts["weight_shape"].tolist()
    codes = nibbles(parts["weight_packed"], 8).flatten(1)
    zeros = nibbles(parts["weight_zero_point"], 8).movedim(-1, 1).flatten(0, 1)
    assert codes.shape == (n_out, n_in) and zeros.shape == (n_out, n_in // size)
    return (codes - zeros.repeat_interleave(size, 1)).float() * parts["weight_scale"].float().repeat_interleave(size, 1)


@by_name
def test_every_linear_has_the_values_of_the_packed_folder(folders, name):
    source, out = folders[name]
    tensors, names = load_file(out / "model.safetensors"), set()
    with PackedFolder(source) as packed:
        for linear in exporter.linears_of(packed):
            short = linear.removeprefix(layout.LLM_PREFIX)
            wanted = packed.codec(linear).dequantize(packed.read_weight(linear))
            assert torch.equal(decoded(tensors, short, packed.linears[linear].group_size), wanted), linear
            names |= {key for key in tensors if key.startswith(f"{short}.weight")}
        for key in tensors.keys() - names:
            assert torch.equal(tensors[key], packed.checkpoint.read(layout.LLM_PREFIX + key)), key
        kept = [key for key in packed.checkpoint.specs if extract_und.why_left_out(key) is None]
    assert len(names) >= 3 * 7 and len(kept) >= 7


@by_name
def test_the_configuration_names_every_linear_once(folders, name):
    source, out = folders[name]
    config = json.loads((out / "config.json").read_text())
    quantization = config["quantization_config"]
    assert config["model_type"] == "glm4_moe" and not config["tie_word_embeddings"]
    assert quantization["format"] == ("nvfp4-pack-quantized" if name in ("nvfp4", "slim") else "pack-quantized")
    with PackedFolder(source) as packed:
        sizes = {linear.removeprefix(layout.LLM_PREFIX): packed.linears[linear].group_size
                 for linear in exporter.linears_of(packed)}
    named = {target: group["weights"]["group_size"] for group in quantization["config_groups"].values()
             for target in group["targets"]}
    common = named.pop("Linear")
    assert {linear: named.get(linear, common) for linear in sizes} == sizes
    assert not named.keys() & set(quantization["ignore"]) and "lm_head" in quantization["ignore"]


@pytest.mark.parametrize("name", ["int4", "nvfp4"])
def test_the_plan_is_the_file_to_the_byte(folders, name, capsys):
    source, out = folders[name]
    exporter.main(["--src", str(source), "--dry_run"])
    assert f"output_bytes: {(out / 'model.safetensors').stat().st_size}" in capsys.readouterr().out


@pytest.mark.parametrize(("codec", "tensors", "nbytes"), [(Int4(64), 1263, 2_740_956_848),
                                                          (Nvfp4(slim=True), 1011, 2_805_953_896)],
                         ids=["int4", "nvfp4"])
def test_the_real_model_takes_the_bytes_of_its_bits(tmp_path, capsys, codec, tensors, nbytes):
    """4.3125 and 4.5 bits per weight of 36 layers' 77 million, and two tables of 151,936 x 2048 in bfloat16."""
    full_size(tmp_path / "packed", codec, "Lance_3B")
    shutil.copytree(MODEL, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    configured(tmp_path / "model")
    exporter.main(["--src", str(tmp_path / "packed"), "--model_path", str(tmp_path / "model"), "--dry_run"])
    assert capsys.readouterr().out == f"{tensors} tensors\noutput_bytes: {nbytes}\n"


def test_what_the_layout_cannot_hold_is_refused(folders, tmp_path, ended):
    convert.convert(MODEL, STATS, tmp_path / "head", Conversion(Int4(64), head_bits=8))
    code, said = ended(exporter.main, "--src", str(tmp_path / "head"), "--out", str(tmp_path / "out"))
    assert code == 2 and "pack it again without --head_bits" in said
    convert.convert(MODEL, STATS, tmp_path / "published", Conversion(Nvfp4(), "published"))
    code, said = ended(exporter.main, "--src", str(tmp_path / "published"), "--out", str(tmp_path / "out"))
    assert code == 2 and "pack the float checkpoint anew" in said
    code, said = ended(exporter.main, "--src", str(folders["int4"][0]), "--out", str(folders["int4"][1]))
    assert code == 2 and "exists" in said
    assert not (tmp_path / "out").exists()


def test_without_out_it_says_so(folders):
    with pytest.raises(InputError, match="--out is needed"):
        exporter.main(["--src", str(folders["int4"][0])])


def packed_logits(source, ids):
    """Our runtime's in float32, on linears dequantized to bfloat16, as compressed-tensors does."""
    config = LanceConfig.load(source / "llm_config.json")
    with PackedFolder(source) as packed, torch.no_grad():
        model = load_lance(packed.checkpoint, config, CPU, torch.float32, torch.float32,
                           lambda model: swap_linears(model, packed, torch.float32, CPU, mode="cached"))
        for module in model.modules():
            if isinstance(module, PackedLinear):
                module.cached = module.cached.bfloat16().float()
        rows = allocate(config, [len(ids)], torch.float32, CPU)
        hidden = model.read(model.embed(ids), mrope_positions(len(ids), ()), rows, True)
        return model.language_model.lm_head(hidden[0])


@pytest.mark.slow
@by_name
def test_stock_transformers_computes_what_our_runtime_does(folders, name):
    """Logits over 40 tokens, after its own decompression: running compressed, compressed-tensors 0.20.1 expects zero
    points that are not packed, and float32 inputs to meet float32 weights."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    source, out = folders[name]
    ids = torch.randint(0, 500, (40,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16,
                                                     quantization_config=CompressedTensorsConfig(run_compressed=False))
        found = model.float().eval()(ids[None]).logits[0]
    assert (found - packed_logits(source, ids)).abs().max() < CLOSE
