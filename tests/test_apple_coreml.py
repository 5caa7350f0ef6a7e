"""Core ML: palettes are good, packages hold exactly them, and what they compute is Lance with a cache."""

import importlib.util
import json
import shutil
import sys

import pytest
import torch
from conftest import GOLDENS
from real_keys import write_headers_only
from safetensors.torch import load_file, save_file
from test_apple_extract import real_config, transformers_logits

from apple import export_coreml, extract_und
from apple.decoder import DecoderConfig, load_decoder
from apple.palette import COLORS, ROWS, palettize, values_of
from apple.stateful import Part, WideRMSNorm, build, step_inputs
from lance_quant.errors import InputError
from lance_quant.lance.config import LanceConfig
from lance_quant.lance.mot import RMSNorm
from lance_quant.storage.tensor_file import Checkpoint, file_size

GOLDEN = GOLDENS / "checkpoint" / "Lance_3B"
PER_PART = 2  # of the golden checkpoint's 3 layers: one full package of layers, one that is not
CONTEXT = 32
needs_coremltools = pytest.mark.skipif(importlib.util.find_spec("coremltools") is None,
                                       reason="coremltools is not installed (requirements-apple.txt)")
needs_mac = pytest.mark.skipif(sys.platform != "darwin", reason="Core ML runs packages on a Mac only")


@pytest.fixture(scope="module")
def extracted(tmp_path_factory):
    out = tmp_path_factory.mktemp("und") / "und"
    extract_und.main(["--src", str(GOLDEN), "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def float16(extracted, tmp_path_factory):
    out = tmp_path_factory.mktemp("float16") / "float16"
    export_coreml.main(["--src", str(extracted), "--out", str(out), "--storage", "float16"])
    return out


@pytest.fixture(scope="module")
def packages(extracted, tmp_path_factory):
    out = tmp_path_factory.mktemp("packages") / "packages"
    export_coreml.main(["--src", str(extracted), "--out", str(out), "--context", str(CONTEXT), "--layers_per_part",
                        str(PER_PART)])
    return out


def parts(tensors, config):
    """The torch modules behind the packages."""
    pieces = export_coreml.parts_of(config.num_hidden_layers, PER_PART)
    own = [{name: tensors[name] for name in export_coreml.names_of(dict.fromkeys(tensors), piece)} for piece in pieces]
    return [build(part, config, piece, CONTEXT).float() for part, piece in zip(own, pieces, strict=True)]


def run(modules, config, ids, steps):
    """Logits [t, vocabulary] of token ids, fed in pieces of the given lengths."""
    out, past = [], 0
    for new in steps:
        x = ids[None, past:past + new].int()
        for module in modules:
            x = module(x, *step_inputs(config, past, new)) if isinstance(module, Part) else module(x)
        out.append(x[0])
        past += new
    return torch.cat(out)


def test_sixteen_values_per_group_come_back_exactly():
    values = torch.randn(2, COLORS, generator=torch.Generator().manual_seed(1)).half()
    w = values.repeat_interleave(ROWS, 0)[:, torch.arange(64) % COLORS]
    w = w[:, torch.randperm(64, generator=torch.Generator().manual_seed(2))]
    assert torch.equal(values_of(palettize(w)), w)


@pytest.mark.parametrize("value", [0.0, 0.37])
def test_a_constant_weight_comes_back(value):
    w = torch.full((ROWS, 16), value).half()
    assert torch.equal(values_of(palettize(w)), w)


def test_palettes_of_a_normal_weight_are_as_good_as_theory_allows():
    """The best 16 levels for a normal density leave a mean square error of 0.009497 (Max 1960)."""
    w = torch.randn(ROWS, 4096, generator=torch.Generator().manual_seed(3))
    error = (values_of(palettize(w)).float() - w).square().mean() / w.square().mean()
    assert error < 0.0097


def test_one_outlier_does_not_spoil_the_others():
    w = torch.randn(ROWS, 256, generator=torch.Generator().manual_seed(4))
    w[3, 7] = 1000
    error = (values_of(palettize(w)).float() - w).abs()
    assert error[3, 7] < 0.5  # float16 near 1000
    assert error.square().mean() < 0.02


@pytest.mark.parametrize(("w", "named"), [
    (torch.zeros(33, 4), "multiple of 32"),
    (torch.full((32, 4), float("nan")), "NaN"),
    (torch.full((32, 4), 1e6), "NaN"),
])
def test_what_palettes_cannot_hold_is_refused(w, named):
    with pytest.raises(ValueError, match=named):
        palettize(w)


def test_a_folder_with_values_beyond_float16_is_refused(extracted, tmp_path):
    folder = tmp_path / "und"
    shutil.copytree(extracted, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][3, 5] = 1e6
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match="lm_head.weight: weight holds NaN, Inf or a value beyond float16"):
        export_coreml.main(["--src", str(folder), "--out", str(tmp_path / "out"), "--storage", "float16"])
    assert not (tmp_path / "out").exists()


@needs_coremltools
@pytest.mark.parametrize("colors", [1, 5, COLORS])
def test_indices_of_a_large_group_are_found_and_take_four_bits(colors):
    """As large as the groups of a real o_proj: NumPy's own float16 sort is wrong at that size on some machines."""
    from apple import coreml_parts

    values = torch.randn(colors, generator=torch.Generator().manual_seed(7)).half()
    group = values[torch.arange(ROWS * 2048).view(ROWS, 2048) % colors]
    palette, index = coreml_parts.indexed(group.numpy())
    assert palette.shape == (COLORS,)
    assert sorted(palette[:colors].tolist()) == palette[:colors].tolist()
    assert torch.equal(torch.from_numpy(palette[index]).view_as(group), group)


def test_the_norm_is_the_same_and_survives_large_values_in_float16():
    norm, wide = RMSNorm(64, 1e-6), WideRMSNorm(64, 1e-6)
    norm.weight.data.uniform_(0.5, 2, generator=torch.Generator().manual_seed(5))
    wide.load_state_dict(norm.state_dict())
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(6))
    for size in (1e-4, 1.0, 1e4):
        torch.testing.assert_close(wide(x * size), norm(x * size), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(wide(torch.zeros(1, 64)), torch.zeros(1, 64))
    half = wide.half()((x * 5000).half()).float()
    torch.testing.assert_close(half, norm(x * 5000), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("steps", [[20], [7, 1, 1, 11], [1] * 20], ids=["whole", "pieces", "one by one"])
def test_parts_in_a_row_are_the_model_however_it_is_fed(extracted, steps):
    """Keys and values lie in float16, hence 1e-2 and not 1e-4."""
    config, tensors = DecoderConfig.load(extracted), load_file(extracted / "model.safetensors")
    ids = torch.arange(20) * 7
    whole = load_decoder(extracted, torch.float32)(ids[None])[0]
    assert (run(parts(tensors, config), config, ids, steps) - whole).abs().max() < 1e-2


def test_the_float16_form_is_an_ordinary_folder_of_palette_values(extracted, float16):
    source, tensors = load_file(extracted / "model.safetensors"), load_file(float16 / "model.safetensors")
    assert set(source) == set(tensors)
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float16
        if tensor.dim() == 2:
            assert all(len(group.unique()) <= COLORS for group in tensor.split(ROWS))
        else:
            assert torch.equal(tensor, source[name].half())
    record = json.loads((float16 / "export.json").read_text())
    assert (float16 / "model.safetensors").stat().st_size == record["bytes"]
    assert transformers_logits(float16, torch.arange(20)).isfinite().all()


@needs_coremltools
def test_packages_hold_the_palettes_and_nothing_else_is_palettized(packages, float16):
    import coremltools as ct

    from apple import coreml_parts

    record = json.loads((packages / "coreml.json").read_text())
    values = [tensor for tensor in load_file(float16 / "model.safetensors").values() if tensor.dim() == 2]
    found, counted = [], 0
    for name in record["parts"]:
        model = ct.models.MLModel(str(packages / name), skip_model_load=True)
        counted += coreml_parts.palette_count(model)
        found += coreml_parts.dense_weights(model)
    assert counted == len(values)
    wanted = sorted((tuple(tensor.shape), tensor.numpy().tobytes()) for tensor in values)
    assert sorted((tuple(tensor.shape), tensor.numpy().tobytes()) for tensor in found) == wanted


@needs_coremltools
def test_packages_are_as_small_as_planned_and_layers_keep_state(packages, extracted, capsys):
    import coremltools as ct

    planned = [export_coreml.weight_bytes(Checkpoint(extracted).specs, piece) for piece in
               export_coreml.parts_of(DecoderConfig.load(extracted).num_hidden_layers, PER_PART)]
    assert [path.stat().st_size for path in sorted(packages.rglob("weight.bin"))] == planned
    export_coreml.main(["--src", str(extracted), "--layers_per_part", str(PER_PART), "--dry_run"])
    assert capsys.readouterr().out == f"output_bytes: {sum(planned)} and programs\n"
    record = json.loads((packages / "coreml.json").read_text())
    assert record["holds"] == ["embedding", "layers 0 to 1", "layers 2 to 2", "head"]
    for name, holds in zip(record["parts"], record["holds"], strict=True):
        description = ct.models.MLModel(str(packages / name), skip_model_load=True).get_spec().description
        assert {state.name for state in description.state} == ({"keys", "values"} if "layers" in holds else set())


@needs_mac
@needs_coremltools
def test_packages_predict_what_torch_computes(packages, float16):
    import coremltools as ct

    config, tensors = DecoderConfig.load(float16), load_file(float16 / "model.safetensors")
    ids, past, got = torch.arange(12) * 7, 0, []
    models = [ct.models.MLModel(str(packages / name))
              for name in json.loads((packages / "coreml.json").read_text())["parts"]]
    states = [None, *(model.make_state() for model in models[1:-1]), None]
    for new in (8, 1, 3):
        x, names = ids[None, past:past + new].int().numpy(), ("cos", "sin", "mask")
        tables = {name: table.half().numpy() for name, table in zip(names, step_inputs(config, past, new), strict=True)}
        for index, (model, state) in enumerate(zip(models, states, strict=True)):
            given = {"ids" if index == 0 else "hidden": x, **({} if state is None else tables)}
            (x,) = model.predict(given, state=state).values()
        got.append(torch.from_numpy(x)[0].float())
        past += new
    expected = run(parts(tensors, config), config, ids, [12])
    assert (torch.cat(got) - expected).norm() < 0.02 * expected.norm()


@pytest.mark.skipif(importlib.util.find_spec("coremltools") is not None, reason="coremltools is installed")
def test_packages_can_be_made_only_where_coremltools_is(extracted, tmp_path):
    with pytest.raises(InputError, match="coremltools is not installed"):
        export_coreml.main(["--src", str(extracted), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [["--context", "1"], ["--layers_per_part", "0"]])
def test_numbers_out_of_range_are_refused(extracted, tmp_path, flags):
    with pytest.raises(InputError, match="must be"):
        export_coreml.main(["--src", str(extracted), "--out", str(tmp_path / "out"), *flags])


@pytest.mark.parametrize("model", ["Lance_3B", "Lance_3B_Video"])
def test_sizes_of_the_real_models(tmp_path, model):
    source = tmp_path / "source"
    source.mkdir()
    write_headers_only(source, model).rename(source / "model.safetensors")
    real_config(source)
    with Checkpoint(source) as checkpoint:
        und = extract_und.plan(checkpoint.specs, LanceConfig.load(source / "llm_config.json"), "glm4_moe", False,
                               torch.bfloat16)
    assert export_coreml.planned_bytes(und, 36, 9) == 1_700_726_784
    assert file_size(export_coreml.float16_specs(und)) == 6_794_283_056
    pieces = export_coreml.parts_of(36, 12)
    assert [export_coreml.holds(piece) for piece in pieces] == [
        "embedding", "layers 0 to 11", "layers 12 to 23", "layers 24 to 35", "head"]
    named = [name for piece in pieces for name in export_coreml.names_of(und, piece)]
    assert sorted(named) == sorted(und)
