"""A packed folder becomes the tree that vllm-omni loads, with every weight's value the same to the bit.

Whether vllm-omni loads it is asked in test_vllm_omni.py, where that is installed.
"""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CPU, GOLDENS
from real_keys import configured, full_size
from safetensors.torch import load_file, save_file

import export_vllm
from lance_quant.errors import InputError
from lance_quant.formats import layout
from lance_quant.formats.int4 import Int4
from lance_quant.formats.nvfp4 import MAGNITUDES, Nvfp4, Nvfp4Weight
from lance_quant.formats.packed_folder import PackedFolder
from lance_quant.lance.config import LancePaths
from lance_quant.lance.mot import LatentPositions
from lance_quant.methods import convert
from lance_quant.methods.conversion import Conversion
from lance_quant.serving import omni_folder, omni_names, weight_layouts
from lance_quant.storage.tensor_file import write_tensors

MODEL = GOLDENS / "checkpoint" / "Lance_3B"
STATS = GOLDENS / "published" / "act_stats.pt"
PUBLISHED = GOLDENS / "published"
Q, K, OUT = (layout.linear(0, "und", f"{kind}_proj") for kind in "qko")
CODECS = {"int4": Int4(64), "int4_g32": Int4(32), "slim": Nvfp4(slim=True), "nvfp4": Nvfp4()}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Packed folders of the golden checkpoint, by name."""
    root = tmp_path_factory.mktemp("packed")
    for name, codec in CODECS.items():
        convert.convert(MODEL, STATS, root / name, Conversion(codec))
    return {name: root / name for name in CODECS}


def export(src, out, **options):
    omni_folder.export(src, LancePaths.find(MODEL), out, **options)
    return out


def edited(folder, copy, codec, tensors=lambda state: None, meta=lambda meta: None):
    """A copy of a packed folder with other tensors and meta."""
    shutil.copytree(folder, copy)
    state, described = load_file(copy / codec.state_file), json.loads((copy / codec.meta_file).read_text())
    tensors(state), meta(described)
    save_file(state, copy / codec.state_file)
    (copy / codec.meta_file).write_text(json.dumps(described))
    return copy


def awq_values(state, name):
    """[out, in] float32 of AWQ tensors, from the format's definition: eight outputs a word, 0 2 4 6 1 3 5 7."""
    def unpack(words):
        out = torch.empty(len(words), words.shape[1] * 8)
        for nibble, place in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            out[:, place::8] = (words >> 4 * nibble & 15).float()
        return out

    code, zero, scale = unpack(state[f"{name}.qweight"]), unpack(state[f"{name}.qzeros"]), state[f"{name}.scales"]
    each = len(code) // len(zero)
    return ((code - zero.repeat_interleave(each, 0)) * scale.float().repeat_interleave(each, 0)).t()


def modelopt_values(state, name):
    """[out, in] float32 of ModelOpt's NVFP4 tensors, from the format's definition."""
    table = torch.tensor([*MAGNITUDES, *(-value for value in MAGNITUDES)])
    weight = state[f"{name}.weight"].int()
    values = torch.stack([table[weight & 15], table[weight >> 4]], -1).flatten(1)
    scale = state[f"{name}.weight_scale"].float() * state[f"{name}.weight_scale_2"]
    return values * scale.repeat_interleave(16, 1)


def test_awq_order_by_hand():
    """Output 0 in the lowest nibble, output 1 in the fifth."""
    code = torch.arange(8, dtype=torch.uint8)[:, None].repeat(1, 3)
    assert weight_layouts.awq_words(code).tolist() == [[0x75316420]] * 3
    assert weight_layouts.awq_words(torch.full((8, 1), 15, dtype=torch.uint8)).item() == -1


@pytest.mark.parametrize("name", CODECS)
def test_every_linear_decodes_to_our_values(packed, tmp_path, name):
    state = load_file(export(packed[name], tmp_path / "out") / "Lance_3B" / "model.safetensors")
    decode = awq_values if name.startswith("int4") else modelopt_values
    with PackedFolder(packed[name]) as folder:
        assert len(folder.linears) == 42
        for linear in folder.linears:
            ours = folder.codec(linear).dequantize(folder.read_weight(linear))
            assert torch.equal(decode(state, linear), ours), linear


@pytest.mark.parametrize("name", ["int4_g64", "int4_g32"])
def test_published_int4_folders_are_taken_too(tmp_path, name):
    state = load_file(export(PUBLISHED / name, tmp_path / "out") / "Lance_3B" / "model.safetensors")
    with PackedFolder(PUBLISHED / name) as folder:
        for linear in folder.linears:
            assert torch.equal(awq_values(state, linear), folder.codec(linear).dequantize(folder.read_weight(linear)))


def test_the_other_tensors_are_those_of_the_packed_folder(packed, tmp_path):
    state = load_file(export(packed["int4"], tmp_path / "out") / "Lance_3B" / "model.safetensors")
    theirs = load_file(packed["int4"] / Int4.state_file)
    with PackedFolder(packed["int4"]) as folder:
        parts = {f"{name}.{suffix}" for name in folder.linears for suffix in ("qweight", "scales", "zeros", "qzeros")}
    assert state.keys() - parts == theirs.keys() - parts
    assert all(torch.equal(state[name], theirs[name]) for name in theirs.keys() - parts - {layout.IGNORED})


def test_slim_and_published_layout_export_to_the_same_file(packed, tmp_path):
    files = [export(packed[name], tmp_path / name) / "Lance_3B" / "model.safetensors" for name in ("slim", "nvfp4")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_fused_linears_share_a_global_scale(packed, tmp_path):
    """vLLM keeps one for q, k and v and one for gate and up, per expert."""
    state = load_file(export(packed["slim"], tmp_path / "out") / "Lance_3B" / "model.safetensors")
    for group in (group for layer in range(3) for group in layout.groups(layer)):
        assert len({state[f"{name}.weight_scale_2"].item() for name in group.linears}) == 1, group.name


def test_global_scales_that_differ_are_brought_to_one_where_that_is_exact(packed, tmp_path):
    def meta(described):
        described["per_weight"][f"{K}.weight"]["global_scale"] /= 2

    halved = edited(packed["slim"], tmp_path / "halved", Nvfp4, meta=meta)
    state = load_file(export(halved, tmp_path / "out") / "Lance_3B" / "model.safetensors")
    assert state[f"{Q}.weight_scale_2"] == state[f"{K}.weight_scale_2"]
    with PackedFolder(halved) as folder:
        assert torch.equal(modelopt_values(state, K), folder.codec(K).dequantize(folder.read_weight(K)))


def test_a_common_global_scale_too_large_for_a_block_is_refused():
    """2^-9 is E4M3's smallest number: half of it cannot be stored."""
    weight = Nvfp4Weight(torch.zeros(1, 8, dtype=torch.uint8), torch.ones(1, 1, dtype=torch.uint8), 1.0)
    assert weight_layouts.modelopt_tensors(weight, 1.0, "a.b")["weight_scale"].float().item() == 2.0**-9
    with pytest.raises(InputError, match=r"block scales of a\.b are no E4M3 numbers times 2"):
        weight_layouts.modelopt_tensors(weight, 2.0, "a.b")


def test_block_scales_of_the_published_recipe_are_refused_and_nothing_is_left(tmp_path):
    with pytest.raises(InputError, match=r"block scales of \S+q_proj are no E4M3 numbers .* nvfp4_apply\.py"):
        export(PUBLISHED / "nvfp4", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def finer(state, described, name):
    """Halve the group size of a linear without changing its values."""
    for suffix in ("scales", "zeros"):
        state[f"{name}.{suffix}"] = state[f"{name}.{suffix}"].repeat_interleave(2, 1)
    described["per_weight"][f"{name}.weight"]["group_size"] //= 2


def test_group_sizes_that_differ_in_a_fused_linear_become_the_smaller_one(packed, tmp_path):
    state, described = load_file(packed["int4"] / Int4.state_file), {}

    def meta(found):
        described.update(found)
        finer(state, found, Q)

    mixed = edited(packed["int4"], tmp_path / "mixed", Int4, lambda tensors: None, meta)
    save_file(state, mixed / Int4.state_file)
    out = export(mixed, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["group_size"] == 64 and config["extra_config"] == {
        "bagel.language_model.model.layers.0.self_attn.qkv_proj": {"bits": 4, "group_size": 32, "sym": False}}
    state, plain = (load_file(folder / "Lance_3B" / "model.safetensors")
                    for folder in (out, export(packed["int4"], tmp_path / "plain")))
    experts = [layout.linear(0, expert, kind) for expert in layout.EXPERTS for kind in ("q_proj", "k_proj", "v_proj")]
    assert all(state[f"{name}.scales"].shape[0] == 2 for name in experts)
    assert all(torch.equal(awq_values(state, name), awq_values(plain, name)) for name in layout.linears(3))


def in_bf16(names):
    """Edits that leave linears in bfloat16, as a budget does."""
    def tensors(state):
        for name in names:
            rows, half = state.pop(f"{name}.qweight").shape
            del state[f"{name}.scales"], state[f"{name}.zeros"]
            state[f"{name}.weight"] = torch.zeros(rows, 2 * half, dtype=torch.bfloat16)

    def meta(described):
        described["kept_bf16"] = {f"{name}.weight": {"shape": described["per_weight"].pop(f"{name}.weight")["shape"]}
                                  for name in names}

    return tensors, meta


def test_a_fused_linear_partly_in_bfloat16_is_refused(packed, tmp_path):
    kept = edited(packed["int4"], tmp_path / "kept", Int4, *in_bf16([K]))
    with pytest.raises(InputError, match=r"k_proj is in bfloat16 and \S+q_proj in 4 bits, but vLLM runs both as one "
                                         r"linear, \S+qkv_proj: pack with --group_size"):
        export(kept, tmp_path / "out")


def test_a_fused_linear_wholly_in_bfloat16_is_listed(packed, tmp_path):
    names = [OUT, layout.linear(0, "gen", "o_proj")]
    out = export(edited(packed["int4"], tmp_path / "kept", Int4, *in_bf16(names)), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["extra_config"] == {"bagel.language_model.model.layers.0.self_attn.o_proj": {"bits": 16}}
    assert load_file(out / "Lance_3B" / "model.safetensors")[f"{OUT}.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("sizes, wanted", [((64, 64), 64), ((128, 32), 32), ((256, 128), 128), ((64,), 64)])
def test_the_shared_group_size(sizes, wanted):
    assert weight_layouts.awq_group_size(["a"] * len(sizes), sizes) == wanted


@pytest.mark.parametrize("sizes", [(16,), (64, 16), (48,)])
def test_group_sizes_without_a_kernel_are_refused(sizes):
    with pytest.raises(InputError, match=rf"group size {min(sizes)} of b: vLLM's kernels take groups of 128, 64, 32"):
        weight_layouts.awq_group_size(["a", "b"][-len(sizes):], sizes)


def test_an_8_bit_head_is_refused(tmp_path):
    convert.convert(MODEL, STATS, tmp_path / "head", Conversion(Int4(64), head_bits=8))
    with pytest.raises(InputError, match=r"8-bit head .* pack it again without --head_bits"):
        export(tmp_path / "head", tmp_path / "out")


def test_another_model_is_refused(packed, tmp_path):
    other = tmp_path / "Lance_3B"
    shutil.copytree(MODEL, other, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((other / "llm_config.json").read_text())
    (other / "llm_config.json").write_text(json.dumps({**config, "vocab_size": 77}))
    with pytest.raises(InputError, match=r"is not of the model in .* \[3, \d+, 64, \d+\] here and \[3, 77, 64"):
        omni_folder.export(packed["int4"], LancePaths.find(other), tmp_path / "out")


def test_a_missing_tensor_is_named(packed, tmp_path):
    def tensors(state):
        del state["language_model.model.norm_moe_gen.weight"]

    with pytest.raises(InputError, match=r"1 tensors are missing .*norm_moe_gen\.weight"):
        export(edited(packed["int4"], tmp_path / "less", Int4, tensors), tmp_path / "out")


@pytest.mark.parametrize("part, flag", [("vit", "--vit_path"), ("vae", "--vae_path")])
def test_missing_parts_are_named(packed, tmp_path, part, flag):
    shutil.copytree(MODEL, tmp_path / "Lance_3B", ignore=shutil.ignore_patterns("*.safetensors"))
    paths = LancePaths.find(MODEL)
    given = {"vit": paths.vit, "vae": paths.vae}
    del given[part]
    with pytest.raises(InputError, match=rf"is not there: .*{flag}"):
        omni_folder.export(packed["int4"], LancePaths.find(tmp_path / "Lance_3B", **given), tmp_path / "out")


def test_damaged_weights_are_refused(packed, tmp_path):
    def tensors(state):
        state["language_model.model.norm.weight"][3] = math.nan

    with pytest.raises(InputError, match=r"norm\.weight holds NaN or Inf"):
        export(edited(packed["int4"], tmp_path / "damaged", Int4, tensors), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parts_are_linked_or_copied(packed, tmp_path):
    linked, copied = (export(packed["int4"], tmp_path / parts, parts=parts) for parts in omni_names.PARTS)
    names = {"config.json", "Wan2.2_VAE.pth", "Qwen2.5-VL-ViT/config.json", "Qwen2.5-VL-ViT/vit.safetensors",
             *(f"Lance_3B/{name}" for name in ("config.json", "model.safetensors", "llm_config.json", "vocab.json",
                                               "merges.txt", "tokenizer_config.json"))}
    for out in (linked, copied):
        assert {str(path.relative_to(out)) for path in out.rglob("*") if not path.is_dir()} == names
    links = {str(path.relative_to(linked)) for path in linked.rglob("*") if path.is_symlink()}
    assert links == {"Wan2.2_VAE.pth", "Qwen2.5-VL-ViT/config.json", "Qwen2.5-VL-ViT/vit.safetensors"}
    assert not any(path.is_symlink() for path in copied.rglob("*"))
    assert all((linked / name).read_bytes() == (copied / name).read_bytes() for name in names)


def test_the_table_of_latent_positions_is_the_computed_one(packed, tmp_path):
    table = load_file(export(packed["int4"], tmp_path / "out") / "Lance_3B" / "model.safetensors")[layout.IGNORED]
    positions = LatentPositions(64)
    positions.compute_buffers(torch.bfloat16, CPU)
    assert torch.equal(table, positions((1, 64, 64)))
    pieces = list(omni_folder.latent_positions(64, 3))
    assert torch.equal(torch.cat(pieces).view(-1, 64), positions((3, 64, 64)))


@pytest.fixture
def video(packed, tmp_path):
    """A packed folder with a ViT inside, as Lance_3B_Video has."""
    vit = load_file(GOLDENS / "checkpoint" / "Qwen2.5-VL-ViT" / "vit.safetensors")

    def tensors(state):
        state.update({layout.VIT_PREFIX + name: tensor + 1 for name, tensor in vit.items()})

    return edited(packed["int4"], tmp_path / "video", Int4, tensors), vit


def test_the_video_checkpoints_own_vit_is_the_one_that_serves(video, tmp_path):
    """vllm-omni loads the folder's ViT last; the official code lets the checkpoint's win."""
    out = export(video[0], tmp_path / "out")
    written = load_file(out / "Qwen2.5-VL-ViT" / "vit.safetensors")
    assert written.keys() == video[1].keys() and all(torch.equal(written[name], video[1][name] + 1) for name in written)
    state = load_file(out / "Lance_3B_Video" / "model.safetensors")
    assert not [name for name in state if name.startswith(layout.VIT_PREFIX)]
    assert state[layout.IGNORED].shape == (31 * 64 * 64, 64)


def test_what_a_model_is_to_vllm_omni_can_be_said(packed, video, tmp_path):
    assert (export(packed["int4"], tmp_path / "a", folder="Lance_3B_Video") / "Lance_3B_Video").is_dir()
    assert (export(video[0], tmp_path / "b", folder="Lance_3B") / "Lance_3B").is_dir()


@pytest.mark.parametrize("parts", omni_names.PARTS)
def test_a_dry_run_tells_every_byte(packed, video, tmp_path, parts):
    for name, src in {**packed, "video": video[0]}.items():
        with PackedFolder(src) as folder:
            said = omni_folder.describe(omni_folder.plan_of(folder, LancePaths.find(MODEL)), parts).splitlines()
        out = export(src, tmp_path / "out" / name, parts=parts)
        files = [path for path in out.rglob("*") if not path.is_dir()]
        assert {line.split()[0]: int(line.split()[1]) for line in said[:-1]} == {
            str(path.relative_to(out)): path.stat().st_size for path in files}
        assert said[-1] == f"output_bytes: {sum(path.lstat().st_size for path in files if not path.is_symlink())}"


@pytest.fixture(scope="module")
def real_paths(tmp_path_factory):
    """The real model's configuration, beside stand-ins for its other parts."""
    root = tmp_path_factory.mktemp("real")
    shutil.copytree(MODEL, root / "Lance_3B", ignore=shutil.ignore_patterns("*.safetensors"))
    configured(root / "Lance_3B")
    given = LancePaths.find(MODEL)
    return LancePaths.find(root / "Lance_3B", given.vit, given.vae)


@pytest.mark.parametrize("model, codec, nbytes", [
    ("Lance_3B", Int4(64), 4_263_843_424), ("Lance_3B", Nvfp4(slim=True), 4_393_901_112),
    ("Lance_3B_Video", Nvfp4(), 4_897_217_592 + 1_337_407_560)])
def test_the_real_model_takes_the_bytes_of_its_bits(tmp_path, real_paths, model, codec, nbytes):
    """INT4 with zero points in 4 bits: 4.3125 bits per weight; NVFP4 4.5 and four bytes per linear."""
    with PackedFolder(full_size(tmp_path / "packed", codec, model)) as folder:
        plan = omni_folder.plan_of(folder, real_paths)
        weights = sum(math.prod(linear.shape) for linear in folder.linears.values())
        others = {name: spec for name, spec in folder.checkpoint.specs.items()
                  if name.rpartition(".")[0] not in folder.linears or name.endswith(".bias")}
    assert plan.folder == model and bool(plan.vit) == (model == "Lance_3B_Video")
    packed_bytes = weights * 4.3125 / 8 if codec.name == "int4" else weights * 4.5 / 8 + 4 * 504
    tensors = sum(spec.nbytes for spec in (*plan.weights.values(), *plan.vit.values()))
    assert tensors == packed_bytes + sum(spec.nbytes for spec in others.values())
    assert sum(plan.written.values()) == nbytes


def test_the_script_plans_and_exports(packed, tmp_path, capsys):
    flags = ["--src", str(packed["int4"]), "--model_path", str(MODEL)]
    export_vllm.main([*flags, "--dry_run"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("output_bytes: ")
    export_vllm.main([*flags, "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    with pytest.raises(InputError, match="is never overwritten"):
        export_vllm.main([*flags, "--out", str(tmp_path / "out")])
    with pytest.raises(InputError, match="--out is needed"):
        export_vllm.main(flags)


def test_a_float_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="no packed model in"):
        export(Path(MODEL), tmp_path / "out")


def test_a_tensor_that_no_lance_has_is_refused(packed, tmp_path):
    """vllm-omni would drop it without a word."""
    with pytest.raises(InputError, match=r"1 tensors are unknown .*extra"):
        export(edited(packed["int4"], tmp_path / "more", Int4, lambda state: state.update(extra=torch.ones(2))),
               tmp_path / "out")


def test_an_output_count_that_fills_no_word_is_refused():
    with pytest.raises(InputError, match="a linear with 12 outputs has no AWQ layout"):
        weight_layouts.awq_specs((12, 64), 64)


def test_zero_rows_export(tmp_path):
    """An all-zero group has the smallest scale and an all-zero block E4M3's smallest number; of a matrix, one row is
    left, since all zeros are a broken download."""
    tensors = load_file(MODEL / "model.safetensors")
    for tensor in tensors.values():
        tensor[1 if tensor.dim() > 1 else 0:] = 0
    write_tensors(tmp_path / "model.safetensors", tensors)
    for codec, decode in ((Int4(64), awq_values), (Nvfp4(slim=True), modelopt_values)):
        convert.convert(tmp_path / "model.safetensors", STATS, tmp_path / codec.name, Conversion(codec))
        state = load_file(export(tmp_path / codec.name, tmp_path / f"out_{codec.name}") / "Lance_3B/model.safetensors")
        assert all(not decode(state, name)[1:].any() for name in layout.linears(3))
