"""Data from outside, by kind: each is refused with one line that names the place, or read for what it is.

A test per kind, with ten values and more: other inputs of these kinds are in the world.
"""

import json
import struct

import pytest
import torch
from conftest import CPU, GOLDENS
from safetensors.torch import load_file, save_file

from lance_nano import CHECKPOINT
from lance_quant.errors import InputError
from lance_quant.formats import int4, int8, nvfp4
from lance_quant.formats.int4 import Int4
from lance_quant.formats.nvfp4 import Nvfp4
from lance_quant.formats.packed_folder import PackedFolder
from lance_quant.lance.config import LanceConfig
from lance_quant.lance.loader import load_lance
from lance_quant.lance.settings import Sampling, Settings, TokenSampling
from lance_quant.methods import plan
from lance_quant.storage.atomic import parse_json, read_json
from lance_quant.storage.tensor_file import Checkpoint, TensorFile, TensorFileWriter, TensorSpec

NORM = "language_model.model.norm.weight"
Q_PROJ = "language_model.model.layers.0.self_attn.q_proj.weight"


def one_line(error):
    text = str(error.value)
    assert text and "\n" not in text.strip() and len(text) < 700, text
    return text


# JSON


@pytest.mark.parametrize(
    "data, said",
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"{'a': 1}", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[1,]", "not valid JSON"),
        (b'{"a": 1}{', "not valid JSON"),
        (b"nul", "not valid JSON"),
        (b'{"a": 1, "a": 2}', "'a' is there twice"),
        (b'{"x": {"b": 1, "c": 2, "b": 1}}', "'b' is there twice"),
        (b'{"a": "\\ud83d"}', "surrogate"),
        (b'["\\udc00"]', "surrogate"),
        (b'{"\\ud800": 1}', "surrogate"),
        (b"9" * 5000, "not valid JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 50_000, "nested too deeply"),
    ],
)
def test_json_that_readers_understand_differently_is_refused(data, said):
    with pytest.raises(InputError) as error:
        parse_json(data, "sample file s.json")
    assert one_line(error).startswith("sample file s.json") and said in str(error.value)


@pytest.mark.parametrize(
    "data, value",
    [
        (b"\xef\xbb\xbf{}", {}),
        (b'\xef\xbb\xbf{"0": "a red circle"}', {"0": "a red circle"}),
        (b"[]", []),
        (b" 1 ", 1),
        ('{"a": "日本"}'.encode(), {"a": "日本"}),
        (b'{"a": "\\ud83d\\ude00"}', {"a": "😀"}),
        (b'{"a": {"a": 1}}', {"a": {"a": 1}}),
    ],
)
def test_json_of_all_editors_is_read(data, value):
    assert parse_json(data, "x") == value


@pytest.mark.parametrize("name", ["none.json", "x" * 300, "a/" * 3000, "nul\0", "."])
def test_a_path_that_is_no_file_is_named(tmp_path, name):
    with pytest.raises(InputError, match="sample file not found"):
        read_json(tmp_path / name, "sample file")


# safetensors


def file_with(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "header, data",
    [
        ({"a": entry()}, b"\0" * 5),
        ({"a": entry()}, b"\0" * 3),
        ({"a": entry()}, b""),
        ({"a": entry(offsets=(4, 8))}, b"\0" * 8),
        ({"a": entry(), "b": entry()}, b"\0" * 4),
        ({"a": entry(), "b": entry(offsets=(2, 6))}, b"\0" * 6),
        ({"a": entry(shape=(-1,))}, b"\0" * 4),
        ({"a": entry(shape=(10**30,))}, b"\0" * 4),
        ({"a": entry(shape=("1",))}, b"\0" * 4),
        ({"a": entry(dtype="F4")}, b"\0" * 4),
        ({"a": entry(dtype=5)}, b"\0" * 4),
        ({"a": entry(offsets=(0,))}, b"\0" * 4),
        ({"a": entry(offsets=(4, 0))}, b"\0" * 4),
        ({"a": 5}, b""),
        ({"a": {}}, b""),
        ([], b""),
        ("x", b""),
        (b"{", b""),
        (b'{"a": {}, "a": {}}', b""),
        (b'{"a":' * 30_000, b""),
        (b'{"\\ud800": 1}', b""),
        ({"a": entry(shape=(True,), offsets=(0, 4))} | {"b": 1}, b"\0" * 4),
        ({str(index): entry(shape=(0,), offsets=(0, 0)) for index in range(100_001)}, b""),
    ],
)
def test_a_header_that_lies_is_refused_before_anything_is_allocated(tmp_path, header, data):
    with pytest.raises(InputError) as error:
        TensorFile(file_with(tmp_path / "x.safetensors", header, data))
    assert "x.safetensors" in one_line(error)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        b"\0" * 8,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 10**8) + b"{}",
        b"PK\x03\x04" + b"\0" * 60,
        b"version https://git-lfs.github.com/spec/v1\n",
    ],
)
def test_what_is_no_safetensors_is_refused(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(InputError, match="not (a )?safetensors"):
        TensorFile(tmp_path / "x")


@pytest.mark.parametrize("value", [3.4e38, -3.4e38])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_finite_value_beyond_the_stored_dtype_is_no_infinity(tmp_path, value, dtype):
    with (
        pytest.raises(InputError, match="w holds values beyond"),
        TensorFileWriter(tmp_path / "x", {"w": TensorSpec(dtype, (2,))}) as writer,
    ):
        writer.write_pieces("w", [torch.tensor([1.0, value])])


# An index of shards


def shards(folder, weight_map, files):
    for name, tensors in files.items():
        save_file({key: torch.ones(1) * number for key, number in tensors.items()}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


A, B = "model-1.safetensors", "model-2.safetensors"


@pytest.mark.parametrize(
    "shard",
    [
        5,
        None,
        True,
        [],
        {},
        "",
        "..",
        "../x.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "C:\\x.safetensors",
        "c:x.safetensors",
        "x" * 300 + ".safetensors",
        "x.bin",
        "x\0.safetensors",
        "\\\\host\\x.safetensors",
    ],
)
def test_an_index_names_plain_files_in_its_own_folder(tmp_path, shard):
    with pytest.raises(InputError, match=r"no plain name|has weight_map\.b .*: must be a valid string"):
        Checkpoint(shards(tmp_path, {"a": A, "b": shard}, {A: {"a": 1}}))


@pytest.mark.parametrize("weight_map", [None, [], {}, "x", 5])
def test_an_index_without_a_map_is_refused(tmp_path, weight_map):
    with pytest.raises(InputError, match=r"has weight_map .*: (must|Dictionary should) "):
        Checkpoint(shards(tmp_path, weight_map, {}))


@pytest.mark.parametrize(
    "weight_map, files",
    [
        ({"a": A, "b": B}, {A: {"a": 1, "b": 1}, B: {"b": 0}}),  # the stale copy in the first shard
        ({"a": A, "b": B}, {A: {"a": 1}, B: {"b": 1, "a": 0}}),
        ({"a": A, "b": B}, {A: {"b": 1}, B: {"a": 1}}),
        ({"a": A, "b": A}, {A: {"a": 1}}),
        ({"a": A}, {A: {"a": 1, "b": 1}}),
        ({"a": A, "b": B}, {A: {"a": 1}, B: {"c": 1}}),
    ],
)
def test_an_index_and_its_shards_agree_tensor_by_tensor(tmp_path, weight_map, files):
    with pytest.raises(InputError, match="disagree on 1 tensors|disagree on 2 tensors"):
        Checkpoint(shards(tmp_path, weight_map, files))


def test_shards_may_be_links_as_in_the_hubs_cache(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir(), snapshot.mkdir()
    shards(snapshot, {"a": A}, {})
    save_file({"a": torch.ones(1)}, blobs / "1f2e")
    (snapshot / A).symlink_to("../blobs/1f2e")
    with Checkpoint(snapshot) as source:
        assert source.read("a").item() == 1


# llm_config.json

CONFIG = json.loads((CHECKPOINT / "llm_config.json").read_text())


@pytest.mark.parametrize(
    "change",
    [{"num_hidden_layers": value} for value in (0, -1, 1.5, "4", None, True, [], 10**5, 10**9, 10**30, 3)]
    + [
        {"hidden_size": 10**9},
        {"hidden_size": 256},
        {"intermediate_size": 10**30},
        {"intermediate_size": 640},
        {"vocab_size": 705},
        {"vocab_size": float("inf")},
        {"rms_norm_eps": float("inf")},
        {"rms_norm_eps": 1},
        {"rms_norm_eps": float("nan")},
        {"rope_theta": 1e-9},
        {"rope_theta": 1},
        {"hidden_act": "relu"},
        {"hidden_act": []},
        {"rope_scaling": "x"},
        {"rope_scaling": [1]},
        {"mrope_section": [16]},
        {"mrope_section": [4, 6, 7]},
        {"num_key_value_heads": 3},
    ],
)
def test_a_configuration_that_is_not_of_this_checkpoint_is_refused_before_a_model_is_built(tmp_path, change):
    raw = {**CONFIG, **change}
    if "mrope_section" in change:
        raw["rope_scaling"] = {"mrope_section": change["mrope_section"]}
    (tmp_path / "llm_config.json").write_text(json.dumps(raw))
    with pytest.raises(InputError) as error, Checkpoint(CHECKPOINT) as source:
        load_lance(source, LanceConfig.load(tmp_path / "llm_config.json"), CPU, torch.float32)
    one_line(error)


# Tensors of a float checkpoint


@pytest.mark.parametrize(
    "name", [NORM, Q_PROJ, Q_PROJ.replace("weight", "bias"), "llm2vae.bias", "language_model.model.embed_tokens.weight"]
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool, torch.uint8, torch.float8_e4m3fn])
def test_weights_are_floating_point_in_whole_bytes_that_torch_computes_with(tmp_path, name, dtype):
    tensors = load_file(CHECKPOINT / "model.safetensors")
    tensors[name] = torch.ones(tensors[name].shape).to(dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as source:
        with pytest.raises(InputError, match="floating-point"):
            load_lance(source, LanceConfig.load(CHECKPOINT / "llm_config.json"), CPU, torch.float32)
        with pytest.raises(InputError, match=f"{name} is "):
            plan.shapes_of(source.specs, Int4())


# A packed folder


def packed_with(folder, name, change=None, meta=None):
    """A published folder of the goldens with one tensor or meta entry changed; a linear of it."""
    source = GOLDENS / "published" / name
    codec = Int4 if name.startswith("int4") else Nvfp4
    tensors, told = load_file(source / codec.state_file), json.loads((source / codec.meta_file).read_text())
    linear = sorted(told["per_weight"])[0].removesuffix(".weight")
    if change is not None:
        suffix, make = change
        make(tensors[f"{linear}.{suffix}"])
    told["per_weight"][f"{linear}.weight"].update(meta or {})
    save_file(tensors, folder / codec.state_file)
    (folder / codec.meta_file).write_text(json.dumps(told))
    return linear


@pytest.mark.parametrize("value", [0.0, -0.0, -1.0, float("nan"), float("inf"), -float("inf"), 1e38, 3e37, -1e-9])
def test_scales_of_int4_are_positive_and_their_weights_finite(tmp_path, value):
    linear = packed_with(tmp_path, "int4_g64", ("scales", lambda scale: scale[0, 0].fill_(value)))
    with PackedFolder(tmp_path) as folder, pytest.raises(InputError, match=f"{linear} holds a scale"):
        folder.read_weight(linear)


@pytest.mark.parametrize("value", [16, 17, 100, 200, 255])
def test_zero_points_of_int4_are_codes(tmp_path, value):
    linear = packed_with(tmp_path, "int4_g64", ("zeros", lambda zero: zero[0, 0].fill_(value)))
    with PackedFolder(tmp_path) as folder, pytest.raises(InputError, match=f"a zero point of {value}, above 15"):
        folder.read_weight(linear)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), 1e38, -1e-9])
def test_published_scales_of_nvfp4_are_not_negative_and_their_weights_finite(tmp_path, value):
    linear = packed_with(tmp_path, "nvfp4", ("scales_bf16", lambda scale: scale[0, 0].fill_(value)))
    with PackedFolder(tmp_path) as folder, pytest.raises(InputError, match=f"{linear} holds a scale"):
        folder.read_weight(linear)


@pytest.mark.parametrize("byte", [0x7F, 0x80, 0x81, 0xC0, 0xFE, 0xFF])
def test_bytes_of_e4m3_are_positive_numbers(byte):
    """0x7F and 0xFF are NaN; the sign is the highest bit."""
    q = nvfp4.Nvfp4Weight(torch.zeros(1, 8, dtype=torch.uint8), torch.full((1, 1), byte, dtype=torch.uint8), 1.0)
    assert f"0x{byte:02X}" in nvfp4.fault(q)
    assert nvfp4.fault(q._replace(scale=torch.full((1, 1), 0x7E, dtype=torch.uint8))) is None


@pytest.mark.parametrize(
    "value", [0, -1, 3, 0.3, True, "1", None, [], 1e300, 1e-300, float("inf"), float("nan"), 2.0**200]
)
def test_a_global_scale_is_a_power_of_two(value):
    assert not nvfp4.is_global_scale(value)
    assert all(map(nvfp4.is_global_scale, (1, 1.0, 2.0**-20, 0.25, 2)))


@pytest.mark.parametrize(
    "meta",
    [{"scheme": value} for value in (None, [], "x", 5, "nvfp4_awq")]
    + [
        {"n_bit": 3},
        {"shape": [1]},
        {"shape": "x"},
        {"group_size": 0},
        {"group_size": "64"},
        {"global_scale": True},
        {"global_scale": 3},
    ],
)
def test_meta_entries_say_what_this_version_knows(tmp_path, meta):
    packed_with(tmp_path, "int4_g64", meta=meta)
    with pytest.raises(InputError, match="meta of ") as error:
        PackedFolder(tmp_path)
    one_line(error)


def test_a_folder_holds_one_format(tmp_path):
    packed_with(tmp_path, "int4_g64"), packed_with(tmp_path, "nvfp4")
    with pytest.raises(InputError, match="keep each format in its own folder"):
        PackedFolder(tmp_path)


@pytest.mark.parametrize(
    "codes, scale, said",
    [
        (-128, 1.0, "the code -128"),
        (1, 0.0, "not positive"),
        (1, -1.0, "not positive"),
        (1, float("nan"), "not positive"),
        (1, float("inf"), "beyond bfloat16"),
        (1, 1e38, "beyond bfloat16"),
    ],
)
def test_rows_of_8_bits_are_symmetric_and_finite(codes, scale, said):
    q = int8.Int8Weight(torch.full((2, 4), codes, dtype=torch.int8), torch.full((2,), scale).bfloat16())
    assert said in int8.fault(q)
    assert int8.fault(int8.quantize(torch.zeros(2, 4))) is None


@pytest.mark.parametrize(
    "w", [torch.zeros(2, 64), torch.ones(2, 64), torch.full((2, 64), 1e-30), torch.full((2, 64), 1e30)]
)
def test_what_the_quantizers_write_has_no_fault(w):
    """All-zero, constant, tiny and huge weights."""
    assert int4.fault(int4.quantize(w, 64)) is None
    assert int8.fault(int8.quantize(w)) is None
    if w.max() < 1e30:
        assert nvfp4.fault(nvfp4.quantize(w, nvfp4.global_scale_for(w.abs().max().item()))) is None


# Numbers


@pytest.mark.parametrize(
    "kind, given",
    [
        (Sampling, {name: value})
        for name in ("num_timesteps", "timestep_shift", "cfg_scale", "reuse", "cfg_low")
        for value in (-1, float("nan"), float("inf"), 10**9, 1e18, 10**400, "3", None, [], True)
    ]
    + [
        (TokenSampling, {name: value})
        for name in ("temperature", "top_p")
        for value in (-1, float("nan"), float("inf"), "0.5", None, 1e9)
    ]
    + [(TokenSampling, {"top_p": 0}), (TokenSampling, {"top_p": 2})],
)
def test_sampling_takes_numbers_in_their_range(kind, given):
    with pytest.raises(InputError) as error:
        kind(**given)
    assert next(iter(given)).split("_")[0] in one_line(error)


@pytest.mark.parametrize("name", ["height", "width", "num_frames", "seed", "max_new_tokens"])
@pytest.mark.parametrize("value", [-1, float("nan"), 2.5, 10**30, "3", None, [], True])
def test_settings_take_whole_numbers_in_their_range(name, value):
    with pytest.raises(InputError) as error:
        Settings("t2v", **{name: value})
    assert name in one_line(error)
