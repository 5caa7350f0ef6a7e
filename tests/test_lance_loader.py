"""Loading is exact, lazy and frugal: right keys or an error that names them, nothing left on meta."""

import json
import shutil

import pytest
import torch
from conftest import CPU, GOLDENS
from safetensors.torch import load_file, save_file

from lance_quant.errors import InputError
from lance_quant.lance.config import LanceConfig, LancePaths
from lance_quant.lance.loader import TorchFile, require_nothing_on_meta
from lance_quant.lance.runtime import Runtime
from lance_quant.lance.vae import load_vae
from lance_quant.lance.vit import load_vit
from lance_quant.storage.tensor_file import Checkpoint

Q0 = "language_model.model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def model_folder(tmp_path):
    """A copy of the golden Lance folder that a test may damage, ViT and VAE beside it."""
    shutil.copytree(GOLDENS / "checkpoint", tmp_path / "downloads")
    return tmp_path / "downloads" / "Lance_3B"


@pytest.fixture
def tensors(model_folder):
    return load_file(model_folder / "model.safetensors")


def load(folder):
    return Runtime.load(LancePaths.find(folder), CPU, torch.float32)


def test_weights_arrive_unchanged_and_nothing_is_left_on_meta(pipeline, tensors):
    require_nothing_on_meta(pipeline.model)
    ours = pipeline.model.state_dict()
    assert set(tensors) - set(ours) == {"latent_pos_embed.pos_embed"}
    assert all(torch.equal(ours[name], tensors[name]) for name in ours)


def test_bfloat16_is_the_rounded_checkpoint(model_folder, tensors):
    model = Runtime.load(LancePaths.find(model_folder), CPU, torch.bfloat16).model
    assert torch.equal(model.state_dict()[Q0], tensors[Q0].bfloat16())


@pytest.mark.parametrize("name", ["ema.safetensors", "sharded"])
def test_other_forms_of_the_checkpoint_load_alike(model_folder, tensors, name):
    (model_folder / "model.safetensors").unlink()
    if name == "sharded":
        names = sorted(tensors)
        shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for shard, part in shards.items():
            save_file({key: tensors[key] for key in part}, model_folder / shard)
        index = {"weight_map": {key: shard for shard, part in shards.items() for key in part}}
        (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(tensors, model_folder / name)
    assert torch.equal(load(model_folder).model.state_dict()[Q0], tensors[Q0])


def damage(folder, tensors, change):
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop(Q0), r"1 tensors missing \(first \['language_model.model.layers.0.self_attn.q_proj.weight'\]"),
    (lambda t: t.update(extra=torch.zeros(1)), r"1 tensors unexpected \(first \['extra'\]"),
    (lambda t: t.update({Q0: torch.zeros(64, 65)}), r"wrong shape.*\[64, 65\] instead of \[64, 64\]"),
])
def test_disagreement_is_an_error_that_names_the_first_offenders(model_folder, tensors, change, message):
    damage(model_folder, tensors, change)
    with pytest.raises(InputError, match=message):
        load(model_folder)


def test_truncated_checkpoint_is_refused(model_folder):
    path = model_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="truncated"):
        load(model_folder)


def test_vit_inside_the_checkpoint_overrides_the_folder(model_folder, tensors, pipeline):
    inside = load_file(model_folder.parent / "Qwen2.5-VL-ViT" / "vit.safetensors")
    inside = {f"vit_model.{name}": value + 1 for name, value in inside.items()}
    save_file(tensors | inside, model_folder / "model.safetensors")
    theirs = load(model_folder).vit.tower.state_dict()
    ours = pipeline.vit.tower.state_dict()
    assert all(torch.equal(theirs[name], ours[name] + 1) for name in ours)


def test_vit_rotary_frequencies_are_computed_and_rounded_like_the_weights(paths, x2t):
    recorded = torch.tensor(x2t["f32r"].meta["inv_freq"]["vit_model.rotary_pos_emb.inv_freq"]["values"])
    with Checkpoint(paths.model) as source:
        vit = load_vit(source, paths.vit, CPU, torch.float32, rotary_rounding=torch.bfloat16)
    torch.testing.assert_close(vit.tower.rotary_pos_emb.inv_freq, recorded, rtol=0, atol=0)


def test_parts_that_a_task_does_not_need_may_be_absent(model_folder):
    shutil.rmtree(model_folder.parent / "Qwen2.5-VL-ViT")
    (model_folder.parent / "Wan2.2_VAE.pth").unlink()
    pipeline = load(model_folder)
    with pytest.raises(InputError, match="ViT configuration not found"):
        _ = pipeline.vit
    with pytest.raises(InputError, match=r"torch state dict not found: .*Wan2\.2_VAE\.pth"):
        _ = pipeline.vae


def test_vae_of_another_kind_is_refused(tmp_path):
    torch.save({"something": torch.zeros(1)}, tmp_path / "vae.pth")
    with pytest.raises(InputError, match="no Wan2.2 VAE"):
        load_vae(tmp_path / "vae.pth", CPU, torch.float32)


@pytest.mark.parametrize("content", [b"", b"rubbish"])
def test_broken_torch_file_is_refused(tmp_path, content):
    (tmp_path / "vae.pth").write_bytes(content)
    with pytest.raises(InputError, match="no torch state dict"):
        TorchFile(tmp_path / "vae.pth")


def test_configuration_errors_name_the_field(tmp_path):
    raw = json.loads((GOLDENS / "checkpoint/Lance_3B/llm_config.json").read_text())
    path = tmp_path / "llm_config.json"
    path.write_text(json.dumps({key: value for key, value in raw.items() if key != "vocab_size"}))
    with pytest.raises(InputError, match=r"lacks \['vocab_size'\]"):
        LanceConfig.load(path)
    path.write_text(json.dumps(raw | {"rope_scaling": {"mrope_section": [1, 1, 1]}}))
    with pytest.raises(InputError, match="mrope_section"):
        LanceConfig.load(path)


def test_wrong_paths_are_named(tmp_path, paths):
    with pytest.raises(InputError, match=r"no Lance model folder"):
        LancePaths.find(tmp_path)
    with pytest.raises(InputError, match="ViT folder not found"):
        LancePaths.find(paths.model, vit=tmp_path / "none")


@pytest.mark.parametrize("name", [Q0, "language_model.lm_head.weight", "vae2llm.bias"])
def test_nan_anywhere_in_a_checkpoint_is_refused(model_folder, tensors, name):
    damage(model_folder, tensors, lambda t: t[name].view(-1)[3].fill_(float("nan")))
    with pytest.raises(InputError, match=f"{name} holds NaN or Inf"):
        load(model_folder)


@pytest.mark.parametrize("change", [[], {"hidden_size": "128"}, {"num_hidden_layers": 0}, {"rms_norm_eps": True},
                                    {"rope_scaling": {"mrope_section": [2, 3]}}])
def test_nonsense_in_the_configuration_is_refused(tmp_path, change):
    raw = json.loads((GOLDENS / "checkpoint/Lance_3B/llm_config.json").read_text())
    path = tmp_path / "llm_config.json"
    path.write_text(json.dumps(change if isinstance(change, list) else raw | change))
    with pytest.raises(InputError, match="llm_config.json"):
        LanceConfig.load(path)


def test_truncated_vae_is_refused(tmp_path):
    (tmp_path / "vae.pth").write_bytes((GOLDENS / "checkpoint/Wan2.2_VAE.pth").read_bytes()[:-1000])
    with pytest.raises(InputError, match="truncated"):
        load_vae(tmp_path / "vae.pth", CPU, torch.float32)


def test_shards_come_before_a_leftover_ema_file(model_folder, tensors):
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, model_folder / "ema.safetensors")
    (model_folder / "model.safetensors").rename(model_folder / "only.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "only.safetensors")}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(load(model_folder).model.state_dict()[Q0], tensors[Q0])
