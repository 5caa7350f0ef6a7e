"""MLX folders: our packers give MLX's bytes, mlx-lm runs what we write, statistics make it better at the same size."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import GOLDENS
from real_keys import write_headers_only
from safetensors.torch import load_file, save_file
from test_apple_extract import real_config

import awq_calibrate_single
from apple import compare_mlx, export_coreml, export_mlx, extract_und, measure_nano, mlx_fold
from apple.decoder import DecoderConfig, load_decoder
from apple.mlx_codec import MlxCodec
from apple.mlx_codes import FORMATS, dequantize, fake_quant_io, quantize
from lance_quant.calibration.activation_stats import ActStats
from lance_quant.calibration.decoder_calls import DecoderCall
from lance_quant.errors import InputError
from lance_quant.formats import layout
from lance_quant.formats.base import Grid, nearest_levels
from lance_quant.formats.blocks import quantize_searched
from lance_quant.lance.config import LanceConfig
from lance_quant.storage.tensor_file import Checkpoint, TensorSpec

GOLDEN = GOLDENS / "checkpoint" / "Lance_3B"
needs_mlx = pytest.mark.skipif(importlib.util.find_spec("mlx_lm") is None,
                               reason="mlx-lm is not installed (requirements-apple.txt)")
formats = pytest.mark.parametrize("name", FORMATS)
# What mlx.core.quantize 0.32.4 makes of `probe()`, on the CPU: words, scales, biases.
RECORDED = json.loads((Path(__file__).parent / "test_apple_mlx.json").read_text())


def probe(dtype):
    """Rows where grids go wrong: noise at three sizes, zeros, a constant, an outlier, halves between two levels."""
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(5)) * 0.02
    w[1], w[2], w[3] = 0, 0.37, -0.37
    w[4] *= 100
    w[5] *= 1e-3
    w[6, 9] = 3
    w[7] = (torch.arange(64) % 25) / 4 - 3
    return w.to(dtype)


def hexed(tensors):
    return {name: tensor.contiguous().view(torch.uint8).numpy().tobytes().hex() for name, tensor in tensors.items()}


@formats
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_our_packers_give_the_recorded_bytes_of_mlx(name, dtype):
    assert hexed(quantize(probe(getattr(torch, dtype)), FORMATS[name])) == RECORDED[f"{name}.{dtype}"]


@needs_mlx
@formats
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [1e-3, 0.02, 1.0])
def test_our_packers_equal_the_installed_mlx(name, dtype, scale):
    w = torch.randn(300, 512, generator=torch.Generator().manual_seed(6)) * scale
    w[0], w[1], w[2, 100:200] = 0, 0.37, 0
    w[3] *= torch.logspace(-3, 2, 512)
    w, fmt = torch.cat([w.to(getattr(torch, dtype)), *[probe(getattr(torch, dtype)).repeat(1, 8)]]), FORMATS[name]
    ours, theirs = quantize(w, fmt), export_mlx.mlx_quantize(w, fmt)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[part], theirs[part]) for part in ours)


@formats
def test_a_value_is_near_its_level(name):
    """Affine: half a step of (max - min) / 15, and one more at the far end: the larger edge lies at 7.5 steps or more
    and is moved by up to half a step onto a whole one, so 15 steps become shorter by at most 1. E2M1: the widest gap, 4
    to 6, is a third of the largest value; scales add 2^-4 (E4M3), or are up to twice as large (powers of two)."""
    w, fmt = torch.randn(16, 128, generator=torch.Generator().manual_seed(7)), FORMATS[name]
    blocks = w.view(16, -1, fmt.group_size)
    error = (dequantize(quantize(w, fmt), fmt).view_as(blocks) - blocks).abs().amax(-1)
    bound = {"4bit": 1.5 * (blocks.amax(-1) - blocks.amin(-1)) / 15, "nvfp4": blocks.abs().amax(-1) * (1 / 6 + 1 / 16),
             "mxfp4": blocks.abs().amax(-1) / 3}[name]
    assert (error <= bound).all()


@formats
def test_the_search_rounds_as_the_file_does(name):
    w, fmt = torch.randn(32, 128, generator=torch.Generator().manual_seed(10)), FORMATS[name]
    w[0], w[1, :64] = 0, 1e-6
    searched = fake_quant_io(w.t().contiguous(), fmt).t()
    torch.testing.assert_close(searched, dequantize(quantize(w, fmt), fmt), rtol=1e-6, atol=1e-30)


@formats
def test_rows_do_not_know_of_one_another(name):
    w, fmt = torch.randn(2500, 64, generator=torch.Generator().manual_seed(8)), FORMATS[name]
    whole, parts = quantize(w, fmt), export_mlx.pack_rows(w, fmt, quantize)
    assert all(torch.equal(whole[part], parts[part]) for part in whole)


@formats
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(name, bad):
    with pytest.raises(ValueError, match="NaN or Inf"):
        quantize(torch.full((2, 64), bad), FORMATS[name])


def awkward(rows=64, columns=256):
    """Ordinary rows, and zeros, constants, an outlier, rows far below and far above the others."""
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(9)) * 0.02
    w[0], w[1], w[2], w[3, 5] = 0, 0.37, -0.37, 4
    w[4] *= 1e-4
    w[5] *= 1e3
    return w


def fitted(w, codec, importance):
    (packed,) = quantize_searched(codec.quantizer, [w], importance, 1.0)
    return codec.tensors(packed)


@formats
def test_fitted_grids_are_never_worse_and_mostly_better(name):
    w, fmt = awkward(), FORMATS[name]
    importance = torch.rand(256, generator=torch.Generator().manual_seed(10)) ** 4

    def errors(tensors):
        return ((dequantize(tensors, fmt) - w).square() * importance).sum(1)

    plain = quantize(w, fmt)
    if name == "4bit":  # both with the scales that a bfloat16 file holds
        plain = {"weight": plain["weight"], **{part: plain[part].bfloat16() for part in ("scales", "biases")}}
    better = fitted(w, MlxCodec(fmt, torch.bfloat16), importance)
    assert {part: (t.dtype, t.shape) for part, t in better.items()} == {
        part: (t.dtype, t.shape) for part, t in plain.items()}
    assert (errors(better) <= errors(plain) * (1 + 1e-5) + 1e-20).all()
    assert errors(better)[6:].sum() < 0.95 * errors(plain)[6:].sum()


@formats
def test_levels_survive_the_file(name):
    """nearest -> encode -> bytes -> dequantize gives the same numbers, and steps are what a file can hold."""
    w, fmt = awkward(), FORMATS[name]
    codec = MlxCodec(fmt, torch.bfloat16)
    w_io = w.t().contiguous()
    grid = codec.quantizer.grid(w_io, torch.ones(256))
    values = nearest_levels(codec.quantizer, w_io, grid).t().contiguous()
    # a bias is rounded from -zero * step, both float32
    torch.testing.assert_close(codec.dequantize(codec.quantizer.encode(values, grid)), values, rtol=1e-6, atol=0)
    positive = grid.scale.abs()
    assert torch.equal(codec.quantizer.storable(positive), positive)


@formats
def test_a_coarser_step_is_stored_as_it_is_used(name):
    """GPTQ changes steps behind a grid's back, and what it then encodes must lie where it thinks: to half a unit in
    the last place of a bfloat16 bias, 2^-9 of its largest weight."""
    fmt = FORMATS[name]
    codec = MlxCodec(fmt, torch.bfloat16)
    w_io = awkward()[6:].t().contiguous()
    grid = codec.quantizer.grid(w_io, torch.ones(256))
    moved = Grid(codec.quantizer.storable(grid.scale.abs() * 1.4), grid.zero)
    values = nearest_levels(codec.quantizer, w_io, moved).t().contiguous()
    back = codec.dequantize(codec.quantizer.encode(values, moved))
    assert (back - values).abs().max() <= 2**-9 * values.abs().max()


@pytest.fixture(scope="module")
def extracted(tmp_path_factory):
    out = tmp_path_factory.mktemp("und") / "und"
    extract_und.main(["--src", str(GOLDEN), "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    """(statistics, capture)"""
    folder = tmp_path_factory.mktemp("stats")
    path, capture = folder / "x2t.pt", folder / "x2t.safetensors"
    awq_calibrate_single.main(["--task", "x2t_image", "--model_path", str(GOLDEN), "--example_json",
                               str(GOLDENS / "inputs" / "x2t_image.json"), "--resolution", "image_256res",
                               "--max_new_tokens", "4", "--device", "cpu", "--out", str(path), "--capture",
                               str(capture)])
    return path, capture


@pytest.fixture(scope="module", params=FORMATS)
def exported(request, extracted, tmp_path_factory):
    out = tmp_path_factory.mktemp("mlx") / request.param
    export_mlx.main(["--src", str(extracted), "--format", request.param, "--out", str(out)])
    return request.param, out


def test_the_file_holds_exactly_what_was_planned(exported, extracted):
    name, out = exported
    record = json.loads((out / "export.json").read_text())
    assert (out / "model.safetensors").stat().st_size == record["bytes"]
    planned = export_mlx.plan(Checkpoint(extracted).specs, FORMATS[name])
    found = {key: TensorSpec(t.dtype, tuple(t.shape)) for key, t in load_file(out / "model.safetensors").items()}
    assert found == planned
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(planned)


def test_what_is_not_quantized_is_the_sources(exported, extracted):
    source, tensors = load_file(extracted / "model.safetensors"), load_file(exported[1] / "model.safetensors")
    kept = [key for key in source if f"{key.removesuffix('weight')}scales" not in tensors]
    assert all(torch.equal(source[key], tensors[key]) for key in kept)
    assert {key.split(".")[-2] for key in kept if not key.endswith("bias")} == {
        "q_norm", "k_norm", "input_layernorm", "post_attention_layernorm", "norm"}


@needs_mlx
def test_mlx_lm_convert_writes_the_same_tensors_and_settings(exported, extracted, tmp_path):
    from mlx_lm.convert import convert

    name, out = exported
    fmt = FORMATS[name]
    convert(str(extracted), str(tmp_path / "theirs"), quantize=True, q_mode=fmt.mode, q_group_size=fmt.group_size,
            q_bits=4)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "theirs"))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
    assert json.loads((out / "config.json").read_text()) == json.loads((tmp_path / "theirs/config.json").read_text())


@needs_mlx
def test_mlx_lm_loads_it_and_generates(exported, extracted):
    import mlx.core as mx
    import mlx_lm

    _, out = exported
    model, tokenizer = mlx_lm.load(str(out))
    assert isinstance(mlx_lm.generate(model, tokenizer, prompt="two circles", max_tokens=3), str)
    ids = torch.arange(40)
    weights = compare_mlx.mlx_weights(out)
    ours = load_decoder(extracted, torch.float32)
    ours.load_state_dict({key: tensor.float() for key, tensor in weights.items()})
    expected = ours(ids[None])[0]
    theirs = torch.tensor(model(mx.array([ids.tolist()]))[0].astype(mx.float32).tolist())
    # mlx-lm computes in bfloat16: 8 bits, over 3 layers.
    assert (theirs - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("name", ["4bit", "nvfp4"])
def test_folding_changes_nothing_but_the_rounding(extracted, calibration, name):
    """The folded float layers compute what the layers did: to the rounding of the norms, which is put back."""
    model, config = load_decoder(extracted, torch.float32), DecoderConfig.load(extracted)
    ids = torch.arange(50)[None]
    before = model(ids)
    known, codec = mlx_fold.Calibration(ActStats.load(calibration[0]), ""), MlxCodec(FORMATS[name], torch.bfloat16)
    tensors = {f"language_model.{key}": tensor.clone() for key, tensor in model.state_dict().items()}
    for index in range(config.num_hidden_layers):
        own = {key: tensors[key] for key in layout.of_layer(tensors, index)}
        record = {}
        for _ in mlx_fold.layer_tensors(index, own, codec, known, record):
            pass
        assert len(record) == 7
        tensors.update(own)
    model.load_state_dict({key.removeprefix("language_model."): tensor for key, tensor in tensors.items()})
    assert (model(ids) - before).abs().max() < 1e-4


@pytest.mark.parametrize("captured", [False, True], ids=["statistics", "statistics and captures"])
@pytest.mark.slow
def test_calibration_lowers_the_error_at_the_same_size(extracted, exported, calibration, tmp_path, capsys, captured):
    (name, plain), out, (stats, capture) = exported, tmp_path / "fitted", calibration
    export_mlx.main(["--src", str(extracted), "--format", name, "--stats", str(stats), "--out", str(out),
                     "--device", "cpu", *(["--capture", str(capture)] if captured else [])])
    capsys.readouterr()
    compare_mlx.main(["--model_path", str(GOLDEN), "--example_json", str(GOLDENS / "inputs" / "x2t_image.json"),
                      "--resolution", "image_256res", "--limit", "2", "--device", "cpu",
                      "--mlx_dir", str(plain), str(out)])
    before, after = map(json.loads, capsys.readouterr().out.splitlines())
    assert after["bytes"] == before["bytes"]
    assert after["kl"] < before["kl"]
    assert after["logit_error"] < before["logit_error"]
    record = json.loads((out / "export.json").read_text())
    roundings = {entry["rounding"] for entry in record["linears"].values()}
    assert len(record["linears"]) == 7 * DecoderConfig.load(extracted).num_hidden_layers + 1  # and the head
    assert ("gptq" in roundings) == captured == bool(record["captures"])


def test_the_head_is_weighted_by_the_norm_in_front_of_it():
    """Loud channels of the final norm are rounded more finely, without any statistics."""
    generator = torch.Generator().manual_seed(12)
    head, norm = torch.randn(64, 128, generator=generator) * 0.02, torch.ones(128)
    norm[:8] = 20
    inputs = torch.randn(500, 128, generator=generator)

    def error(tensors, norm_now):
        got = inputs * norm_now @ dequantize(tensors, FORMATS["4bit"]).t()
        wanted = inputs * norm @ head.t()
        return ((got - wanted).norm() / wanted.norm()).item()

    plain = error(quantize(head, FORMATS["4bit"]), norm)
    folded = norm.clone()
    codec = MlxCodec(FORMATS["4bit"], torch.float32)
    tensors = {key.removeprefix("lm_head."): tensor for key, tensor in mlx_fold.head_tensors(
        head.clone(), folded, codec, None, 1e-6, {})}
    assert error(tensors, folded) < 0.6 * plain


def test_only_calls_without_latents_in_sight_are_replayed():
    def call(rows, **streams):
        return DecoderCall(rows, (0,) * len(rows), True, streams, ())

    x = torch.zeros(1, 2, 4)
    calls = [call((0,), und=x), call((1,), und=x), call((0,), und=x, gen=x), call((0,), und=x), call((1,), und=x),
             call((0, 2), und=x)]
    assert mlx_fold.understanding_only(calls) == [calls[0], calls[1], calls[4]]


def test_captures_alone_are_refused(extracted, calibration, tmp_path):
    with pytest.raises(InputError, match="give both"):
        export_mlx.main(["--src", str(extracted), "--format", "4bit", "--capture", str(calibration[1]), "--out",
                         str(tmp_path / "out")])


def test_statistics_of_another_model_are_refused(extracted, calibration, tmp_path):
    other = torch.load(calibration[0], weights_only=True)
    other["runs"][0]["model"] = "0" * 64
    torch.save(other, tmp_path / "other.pt")
    with pytest.raises(InputError, match="another model"):
        export_mlx.main(["--src", str(extracted), "--format", "4bit", "--stats", str(tmp_path / "other.pt"), "--out",
                         str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [["--out", "out"], ["--dry_run"]], ids=["export", "plan"])
@pytest.mark.parametrize(("script", "more"), [(export_mlx, ["--format", "4bit"]),
                                              (export_coreml, ["--storage", "float16"])], ids=["mlx", "coreml"])
def test_a_folder_that_was_not_extracted_is_refused(script, more, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="extraction record"):
        script.main(["--src", str(GOLDEN), *more, *flags])
    assert not list(tmp_path.iterdir())


def damaged(extracted, folder):
    """A copy of the extracted folder whose head holds a NaN."""
    shutil.copytree(extracted, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_damaged_folder_is_refused(extracted, tmp_path):
    with pytest.raises(InputError, match="lm_head.weight: weight holds NaN"):
        export_mlx.main(["--src", str(damaged(extracted, tmp_path / "und")), "--format", "4bit", "--out",
                         str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_statistics_do_not_go_with_mlxs_own_rounding(extracted, calibration, tmp_path):
    with pytest.raises(InputError, match="leave --packer out"):
        export_mlx.main(["--src", str(extracted), "--format", "4bit", "--stats", str(calibration[0]), "--packer", "mlx",
                         "--out", str(tmp_path / "out")])


def test_a_float_folder_is_no_mlx_folder(extracted):
    with pytest.raises(InputError, match="no 4-bit quantization"):
        compare_mlx.mlx_weights(extracted)


@pytest.mark.skipif(importlib.util.find_spec("mlx") is not None, reason="MLX is installed")
def test_mlx_can_be_asked_for_only_where_it_is():
    with pytest.raises(InputError, match="not installed"):
        export_mlx.packer_of("mlx")


@pytest.mark.parametrize("model", ["Lance_3B", "Lance_3B_Video"])
def test_sizes_of_the_real_models(tmp_path, model):
    source = tmp_path / "source"
    source.mkdir()
    write_headers_only(source, model).rename(source / "model.safetensors")
    real_config(source)
    with Checkpoint(source) as checkpoint:
        config = LanceConfig.load(source / "llm_config.json")
        und = extract_und.plan(checkpoint.specs, config, "glm4_moe", False, torch.bfloat16)
    assert {name: export_mlx.planned_bytes(und, fmt) for name, fmt in FORMATS.items()} == {
        "4bit": 1_911_351_752, "nvfp4": 1_911_322_464, "mxfp4": 1_805_170_312}


@pytest.fixture
def texts(tmp_path):
    """Lines of all three forms."""
    words = ["two", "circles", "one", "blue", "square", "above", "the", "large", "red", "triangle", "on", "a", "white"]
    rows = [{"text": " ".join(words[index % 7:index % 7 + 6])} for index in range(30)]
    rows += [{"messages": [{"role": "user", "content": words[index]}, {"role": "assistant", "content": "yes"}]}
             for index in range(8)]
    rows += [{"prompt": f"how many {word}", "completion": "3"} for word in words[:8]]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.slow
def test_distilled_scales_come_closer_to_the_float_model_on_texts_held_back(extracted, texts, tmp_path):
    plain, out = tmp_path / "plain", tmp_path / "dwq"
    common = ["--src", str(extracted), "--format", "4bit", "--device", "cpu"]
    export_mlx.main([*common, "--out", str(plain)])
    export_mlx.main([*common, "--out", str(out), "--dwq", str(texts), "--learning_rate", "3e-5", "--epochs", "6"])
    facts = json.loads((out / "export.json").read_text())["dwq"]
    assert facts["kept"]
    assert facts["kl_after"] < 0.97 * facts["kl_before"]
    before, after = (load_file(folder / "model.safetensors") for folder in (plain, out))
    assert {name: (t.dtype, t.shape) for name, t in before.items()} == {
        name: (t.dtype, t.shape) for name, t in after.items()}
    packed = [name for name in before if before[name].dtype == torch.uint32]
    assert all(torch.equal(before[name], after[name]) for name in packed)  # codes stay
    if importlib.util.find_spec("mlx_lm") is not None:
        import mlx_lm

        mlx_lm.load(str(out))


@pytest.mark.slow
def test_a_distillation_that_does_not_help_is_not_written(extracted, texts, tmp_path, caplog):
    out = tmp_path / "dwq"
    export_mlx.main(["--src", str(extracted), "--format", "4bit", "--device", "cpu", "--out",
                     str(out), "--dwq", str(texts), "--learning_rate", "1"])
    assert "did not help" in caplog.text
    tensors = load_file(out / "model.safetensors")
    expected = quantize(load_file(extracted / "model.safetensors")["lm_head.weight"], FORMATS["4bit"])
    assert torch.equal(tensors["lm_head.scales"], expected["scales"])


@pytest.mark.parametrize(("line", "named"), [("{}", "neither"), ("nonsense", "is not valid JSON"), ("", "at least 2")])
def test_texts_that_cannot_be_used_are_refused(extracted, tmp_path, line, named):
    path = tmp_path / "texts.jsonl"
    path.write_text(line)
    with pytest.raises(InputError, match=named):
        export_mlx.main(["--src", str(extracted), "--format", "4bit", "--device", "cpu", "--out",
                         str(tmp_path / "out"), "--dwq", str(path)])


def test_only_affine_scales_can_be_distilled(extracted, texts, tmp_path):
    with pytest.raises(InputError, match="--format 4bit"):
        export_mlx.main(["--src", str(extracted), "--format", "nvfp4", "--out", str(tmp_path / "out"), "--dwq",
                         str(texts)])


@pytest.mark.slow
@needs_mlx
@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="mlx_lm.dwq needs datasets")
def test_mlx_lms_own_distillation_takes_our_folders(extracted, texts, tmp_path):
    plain, out, data = tmp_path / "plain", tmp_path / "dwq", tmp_path / "data"
    export_mlx.main(["--src", str(extracted), "--format", "4bit", "--out", str(plain)])
    data.mkdir()
    rows = [line for line in texts.read_text().splitlines() if '"text"' in line] * 2  # 32 are for its validation
    (data / "train.jsonl").write_text("\n".join(rows))
    subprocess.run([sys.executable, "-m", "mlx_lm", "dwq", "--model", str(extracted), "--quantized-model", str(plain),
                    "--mlx-path", str(out), "--data-path", str(data), "--num-samples", "8", "--batch-size", "4",
                    "--max-seq-length", "17", "--learning-rate", "1e-3"], check=True, capture_output=True)
    before, after = (load_file(folder / "model.safetensors") for folder in (plain, out))
    assert {name: (t.dtype, t.shape) for name, t in before.items()} == {
        name: (t.dtype, t.shape) for name, t in after.items()}
    assert not torch.equal(before["lm_head.scales"], after["lm_head.scales"])
    assert compare_mlx.mlx_weights(out).keys() == load_file(extracted / "model.safetensors").keys()


def test_the_measurement_averages_over_seeds():
    rows = [{"format": fmt, "way": way, "bytes": 1000, "logit_error": 0.1 * seed, "kl": 0.01}
            for fmt in FORMATS for way in measure_nano.WAYS for seed in (1, 3)]
    lines = measure_nano.table(rows).splitlines()
    assert len(lines) == 2 + 9
    assert lines[2] == "| 4bit | plain | 1,000 | 0.200 ± 0.141 | 0.01000 ± 0.00000 |"
