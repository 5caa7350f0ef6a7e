import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lance_quant.errors import InputError
from lance_quant.formats import nvfp4, packed_folder
from lance_quant.formats.int4 import Int4
from lance_quant.formats.nvfp4 import Nvfp4
from lance_quant.formats.packed_folder import PackedFolder
from lance_quant.storage.tensor_file import TensorSpec

PUBLISHED = Path(__file__).parent / "goldens" / "published"
Q = "language_model.model.layers.0.self_attn.q_proj"


def folder_of(tmp_path, name="int4_g64"):
    return Path(shutil.copytree(PUBLISHED / name, tmp_path / name))


def edit(folder, codec, tensors=lambda t: t, meta=lambda m: None):
    """Change a folder's tensors and meta in place."""
    state, described = load_file(folder / codec.state_file), json.loads((folder / codec.meta_file).read_text())
    state = {name: t.clone() for name, t in state.items()}
    tensors(state), meta(described)
    save_file(state, folder / codec.state_file)
    (folder / codec.meta_file).write_text(json.dumps(described))
    return folder


def test_published_int4_dequantizes_to_values_computed_by_hand():
    raw = load_file(PUBLISHED / "int4_g32" / Int4.state_file)
    code, scale, zero = raw[f"{Q}.qweight"], raw[f"{Q}.scales"].double(), raw[f"{Q}.zeros"].double()
    with PackedFolder(PUBLISHED / "int4_g32") as folder:
        assert folder.format == "int4" and len(folder.linears) == 42
        assert folder.linears[Q] == ((64, 64), 32, "asym_int4_grouped_awq", None)
        value = folder.codec(Q).dequantize(folder.read_weight(Q)).double()
    for row, column in ((0, 0), (0, 1), (5, 31), (5, 32), (63, 63)):
        nibble = int(code[row, column // 2]) >> (4 * (column % 2)) & 15
        assert value[row, column] == (nibble - zero[row, column // 32]) * scale[row, column // 32]


def test_published_nvfp4_dequantizes_through_its_bf16_scales():
    raw = load_file(PUBLISHED / "nvfp4" / Nvfp4.state_file)
    with PackedFolder(PUBLISHED / "nvfp4") as folder:
        assert folder.format == "nvfp4" and not folder.slim and folder.linears[Q].global_scale is None
        value = folder.codec(Q).dequantize(folder.read_weight(Q))
        assert folder.bits_per_weight == 5.5
    for row, column in ((0, 0), (0, 1), (7, 15), (7, 16), (63, 63)):
        nibble = int(raw[f"{Q}.qweight"][row, column // 2]) >> (4 * (column % 2)) & 15
        scale = float(raw[f"{Q}.scales_bf16"][row, column // 16])
        assert value[row, column] == nvfp4.MAGNITUDES[nibble & 7] * (-1) ** (nibble >> 3) * scale


def test_bits_per_weight_are_counted_from_bytes():
    with PackedFolder(PUBLISHED / "int4_g64") as folder:
        assert folder.bits_per_weight == 4.375


def test_mixed_group_sizes_and_a_linear_left_in_bf16_are_in_the_layout(tmp_path):
    def tensors(state):
        for suffix in ("scales", "zeros"):
            state[f"{Q}.{suffix}"] = state[f"{Q}.{suffix}"].repeat_interleave(2, 1)
        escaped = Q.replace("q_proj", "o_proj")
        state[f"{escaped}.weight"] = torch.zeros(64, 64, dtype=torch.bfloat16)
        for suffix in ("qweight", "scales", "zeros"):
            del state[f"{escaped}.{suffix}"]

    def meta(described):
        described["per_weight"][f"{Q}.weight"]["group_size"] = 32
        del described["per_weight"][f"{Q}.weight".replace("q_proj", "o_proj")]

    with PackedFolder(edit(folder_of(tmp_path), Int4, tensors, meta)) as folder:
        assert len(folder.linears) == 41 and folder.codec(Q) == Int4(32)
        assert folder.codec(Q).dequantize(folder.read_weight(Q)).shape == (64, 64)


def drop(key):
    return lambda state: state.pop(key)


def put(key, tensor):
    return lambda state: state.__setitem__(key, tensor)


@pytest.mark.parametrize("tensors, message", [
    (drop(f"{Q}.zeros"), r"q_proj\.zeros is missing"),
    (put(f"{Q}.scales", torch.ones(64, 1)), r"q_proj\.scales is float32 \[64, 1\], not bfloat16 \[64, 1\]"),
    (put(f"{Q}.qweight", torch.ones(64, 16, dtype=torch.uint8)), r"\[64, 16\], not uint8 \[64, 32\]"),
    (put(f"{Q}.weight", torch.ones(64, 64)), r"q_proj\.weight beside a packed weight"),
    (put("vae2llm.qweight", torch.ones(2, dtype=torch.uint8)), "vae2llm.qweight belongs to no listed linear"),
    (put(f"{Q}.bias", torch.ones(63)), r"q_proj\.bias beside"),
])
def test_meta_and_tensors_must_agree(tmp_path, tensors, message):
    with pytest.raises(InputError, match=message):
        PackedFolder(edit(folder_of(tmp_path), Int4, tensors))


def test_bf16_bytes_under_the_name_of_fp8_scales_are_refused(tmp_path):
    """What a torch without float8 would have written: twice as wide."""
    wide = put(f"{Q}.scales_fp8", torch.ones(64, 8, dtype=torch.uint8))
    with pytest.raises(InputError, match=r"scales_fp8 is uint8 \[64, 8\], not uint8 \[64, 4\]"):
        PackedFolder(edit(folder_of(tmp_path, "nvfp4"), Nvfp4, wide))


def test_only_the_first_five_disagreements_are_listed(tmp_path):
    def remove(state):
        for key in [key for key in state if key.endswith(".zeros")]:
            del state[key]

    with pytest.raises(InputError, match="in 42 places") as caught:
        PackedFolder(edit(folder_of(tmp_path), Int4, remove))
    assert str(caught.value).count("is missing") == 5


def change(**fields):
    return lambda meta: meta["per_weight"][f"{Q}.weight"].update(fields)


@pytest.mark.parametrize("meta, message", [
    (change(n_bit=5), "n_bit 5"), (change(group_size=0), "size 0"), (change(group_size=48), "does not divide"),
    (change(shape=[64]), r"has shape \[64\]: List should have at least 2"),
    (change(global_scale=-1.0), "global_scale -1.0"),
    (lambda meta: meta.update(layout="v9"), "has layout 'v9': must be 'published' or 'slim'; update"),
    (lambda meta: meta.update(per_weight={}), "has per_weight an object: Dictionary should have at least 1 item"),
    (lambda meta: meta["per_weight"].update(strange={}), "'strange' is not that of a weight"),
])
def test_a_meta_that_makes_no_sense_is_refused(tmp_path, meta, message):
    with pytest.raises(InputError, match=message):
        PackedFolder(edit(folder_of(tmp_path), Int4, meta=meta))


def test_slim_needs_its_global_scale(tmp_path):
    with pytest.raises(InputError, match="lacks .*global_scale.*layout slim"):
        PackedFolder(edit(folder_of(tmp_path, "nvfp4"), Nvfp4, meta=lambda meta: meta.update(layout="slim")))


def test_missing_and_truncated_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="neither awq_meta.json nor nvfp4_meta.json"):
        PackedFolder(tmp_path)
    folder = folder_of(tmp_path)
    state = folder / Int4.state_file
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(InputError, match="truncated"):
        PackedFolder(folder)
    state.unlink()
    with pytest.raises(InputError, match="not found"):
        PackedFolder(folder)
    (folder / Int4.meta_file).write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        PackedFolder(folder)


SPECS = {"a": TensorSpec(torch.float32, (4,)), "b": TensorSpec(torch.uint8, (2,))}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"])
def test_after_a_full_disk_or_an_interrupt_nothing_is_left(tmp_path, error):
    with pytest.raises(type(error)), packed_folder.new_folder(tmp_path / "out", Int4(), SPECS) as writer:
        writer.tensors.write("a", torch.ones(4))
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_noticed_before_any_work(tmp_path):
    huge = {"a": TensorSpec(torch.uint8, (1 << 60,))}
    with pytest.raises(InputError, match="GB free"), packed_folder.new_folder(tmp_path / "deep" / "out", Int4(), huge):
        pass
    assert list(tmp_path.iterdir()) == []
