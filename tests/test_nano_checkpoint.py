"""The trained lance-nano: official file layout, loaded by the public classes, and it does what it is for."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2Tokenizer
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from lance_nano import evaluate, outliers
from lance_nano.data import IGNORE, Packer
from lance_nano.model import NanoConfig, NanoLance, NanoViT
from lance_nano.questions import SHORT_KINDS
from lance_nano.recognise import shows
from lance_nano.scenes import picture_scene, render
from lance_nano.tokenizer import PICTURE_SYSTEM, SPECIALS, UNDERSTANDING_SYSTEM, Words
from lance_nano.vae import decode, encode
from lance_quant.errors import InputError
from lance_quant.lance.config import LanceConfig, LancePaths
from lance_quant.lance.generation import Sampling, initial_noise
from lance_quant.lance.media import samples
from lance_quant.lance.runtime import Runtime
from lance_quant.lance.vae import diffusers_name

ROOT = Path(__file__).parents[1] / "lance_nano" / "checkpoint"
MODEL = ROOT / "Lance_nano"
GOLDEN = Path(__file__).parent / "goldens" / "checkpoint"
SIZE_LIMIT = 25_000_000


@pytest.fixture(scope="module")
def pipeline():
    return Runtime.load(LancePaths.find(MODEL), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def trained():
    """The training model with the exported weights: (NanoLance, NanoViT, Packer)."""
    config = json.loads((MODEL / "llm_config.json").read_text())
    sizes = NanoConfig(config["vocab_size"], layers=config["num_hidden_layers"])
    lance, vit = NanoLance(sizes), NanoViT(sizes)
    tensors = load_file(MODEL / "model.safetensors")
    del tensors["latent_pos_embed.pos_embed"]
    lance.load_state_dict(tensors)
    vit.load_state_dict(load_file(ROOT / "Qwen2.5-VL-ViT" / "vit.safetensors"))
    return lance.eval(), vit.eval(), Packer(Words(MODEL))


def official_names(layers):
    """The table of model.safetensors: 28 tensors per layer and 12 others (1021 at 36 layers, less 1)."""
    names = {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight"}
    names |= {"language_model.model.norm.weight", "language_model.model.norm_moe_gen.weight"}
    names |= {f"time_embedder.mlp.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")}
    names |= {f"{name}.{part}" for name in ("vae2llm", "llm2vae") for part in ("weight", "bias")}
    names |= {"latent_pos_embed.pos_embed"}
    for layer in range(layers):
        for twin in ("", "_moe_gen"):
            root = f"language_model.model.layers.{layer}"
            names |= {f"{root}.self_attn.{x}_proj{twin}.{part}" for x in "qkv" for part in ("weight", "bias")}
            names |= {f"{root}.self_attn.{x}{twin}.weight" for x in ("o_proj", "q_norm", "k_norm")}
            names |= {f"{root}.mlp{twin}.{x}_proj.weight" for x in ("gate", "up", "down")}
            names |= {f"{root}.{x}_layernorm{twin}.weight" for x in ("input", "post_attention")}
    return names


def test_files_fit_in_25_mb():
    assert sum(path.stat().st_size for path in ROOT.rglob("*") if path.is_file()) <= SIZE_LIMIT


def test_every_official_tensor_is_there():
    assert len(official_names(36)) == 1021
    config = json.loads((MODEL / "llm_config.json").read_text())
    with safe_open(MODEL / "model.safetensors", "pt") as file:
        assert set(file.keys()) == official_names(config["num_hidden_layers"])


def test_configs_have_the_official_keys():
    for ours, theirs in (("Lance_nano/llm_config.json", "Lance_3B/llm_config.json"),) + (
        ("Qwen2.5-VL-ViT/config.json",) * 2,
    ):
        own, golden = (
            json.loads((root / name).read_text()) for root, name in ((ROOT, ours), (GOLDEN, theirs))
        )
        assert own.keys() == golden.keys()
        assert own.get("vision_config", {}).keys() == golden.get("vision_config", {}).keys()


def test_tokenizer_loads_and_keeps_the_templates_short():
    slow, auto = Qwen2Tokenizer.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)
    text = "<|im_start|>user\nan orange cross above two crêpes 漢<|im_end|>"
    assert slow(text)["input_ids"] == auto(text)["input_ids"]
    assert slow.decode(slow(text)["input_ids"]) == text
    ids = slow.convert_tokens_to_ids(list(SPECIALS))
    assert ids == list(range(len(slow) - 14, len(slow)))
    config = json.loads((MODEL / "llm_config.json").read_text())
    assert config["video_token_id"] == ids[SPECIALS.index("<|video_pad|>")]
    assert config["eos_token_id"] == ids[SPECIALS.index("<|im_end|>")]
    assert len(slow(UNDERSTANDING_SYSTEM)["input_ids"]) == 10
    assert len(slow(PICTURE_SYSTEM)["input_ids"]) == 26


def test_public_vision_tower_loads_strictly_and_agrees(trained):
    config = Qwen2_5_VLVisionConfig.from_pretrained(ROOT / "Qwen2.5-VL-ViT")
    tower = Qwen2_5_VisionTransformerPretrainedModel._from_config(config, attn_implementation="sdpa").eval()
    tower.load_state_dict(load_file(ROOT / "Qwen2.5-VL-ViT" / "vit.safetensors"), strict=True)
    patches = torch.randn(64, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    both_frames = patches[:, :, None].expand(-1, -1, 2, -1, -1).reshape(64, -1)
    with torch.no_grad():
        public = tower(both_frames, grid_thw=torch.tensor([[1, 8, 8]])).pooler_output
        _, vit, _ = trained
        x = vit.patch_embed(patches.reshape(1, 64, -1))
        for block in vit.blocks:
            x = block(x, vit.cos, vit.sin)
        torch.testing.assert_close(vit.merger(x)[0], public, rtol=1e-4, atol=1e-4)


def test_public_vae_loads_strictly_and_pictures_survive_it(pipeline):
    official = torch.load(ROOT / "Wan2.2_VAE.pth", weights_only=True)
    vae = AutoencoderKLWan.from_config(pipeline.vae.autoencoder.config)
    vae.load_state_dict({diffusers_name(name): tensor for name, tensor in official.items()}, strict=True)
    rng = random.Random(2)
    scenes = [picture_scene(rng)[0] for _ in range(60)]
    pictures = torch.from_numpy(np.stack([render(scene) for scene in scenes]))
    latents = encode(vae.eval(), pictures)
    assert latents.mean().abs() < 0.2 and 0.8 < latents.std() < 1.2
    decoded = decode(vae, latents, (7, 7)).numpy()
    assert sum(shows(scene, picture) for scene, picture in zip(scenes, decoded, strict=True)) >= 59


def test_training_model_and_runtime_give_the_same_answer_probabilities(trained, pipeline, tmp_path):
    lance, vit, packer = trained
    for scene, question in evaluate.held_out_questions(3, seed=1):
        request, answer = asked(scene, question, tmp_path), (*packer.words.ids(question.answer), packer.end)
        runtime = pipeline.forced_logprobs(*pipeline.prompt_of(request, evaluate.RESOLUTION), list(answer))
        batch = packer.question_batch([[(question.text, answer)]])
        with torch.no_grad():
            tokens = vit(torch.from_numpy(render(scene).copy())[None])
            logits = lance.logits(batch, tokens, batch.labels != IGNORE)[:, : len(packer.words)]
        torch.testing.assert_close(logits.log_softmax(-1), runtime, rtol=1e-4, atol=1e-4)


def asked(scene, question, folder):
    path = folder / "scene.png"
    evaluate.Image.fromarray(render(scene)).save(path)
    return samples.Question("0", path, UNDERSTANDING_SYSTEM, question.text, question.answer)


@pytest.mark.parametrize("t", [1.0, 0.2])
def test_training_model_and_runtime_give_the_same_velocity(trained, pipeline, t):
    """At t = 1 with guidance, so that the unconditional positions of the official sampler count too."""
    lance, _, packer = trained
    caption, sampling = "a red circle above an orange cross on a gray background", Sampling()
    x = initial_noise(49, 1, torch.float32)
    runtime = pipeline.denoiser(caption, 112, 112, sampling).velocity(x, t)
    with torch.no_grad():
        when = torch.tensor([[t]])
        conditional = lance.velocity(packer.picture_batch([caption], [None], 1), x[None], when)[0]
        unconditional = lance.velocity(packer.picture_batch([""], [caption], 1), x[None], when)[0]
    expected = conditional
    if sampling.guided(t):
        expected = unconditional + sampling.cfg_scale * (conditional - unconditional)
        expected = expected * (conditional.norm() / expected.norm()).clamp(max=1)
    torch.testing.assert_close(expected, runtime, rtol=1e-4, atol=1e-4)


def test_a_handful_of_answers_is_right(pipeline, tmp_path):
    rows = evaluate.held_out_questions(2 * len(SHORT_KINDS), seed=2)
    given = [evaluate.answer(pipeline, scene, question, tmp_path) for scene, question in rows]
    right = sum(text == question.answer for text, (_, question) in zip(given, rows, strict=True))
    assert right >= len(rows) - 2  # the draw is fixed, so this cannot flicker


@pytest.mark.slow
def test_a_handful_of_pictures_is_right(pipeline):
    captions = evaluate.held_out_captions(6, seed=2)
    right = sum(
        shows(caption.scene, np.asarray(evaluate.draw(pipeline, caption.text, seed)))
        for seed, caption in enumerate(captions)
    )
    assert right >= 5


def test_wilson_interval_of_a_perfect_score_stays_below_one():
    low, high = evaluate.Share(200, 200).interval()
    assert (low, high) == (0.9812, 1.0)


@pytest.mark.parametrize(("factor", "fed_factor"), [(8.0, None), (32.0, None), (16.0, 0.25)])
def test_outlier_variant_computes_the_same_function(trained, factor, fed_factor):
    lance, _, packer = trained
    config = LanceConfig.load(MODEL / "llm_config.json")
    tensors = load_file(MODEL / "model.safetensors")
    changed = outliers.rescale(tensors, config, factor, share=0.03, seed=0, fed_factor=fed_factor)
    assert sum(not torch.equal(changed[name], tensor) for name, tensor in tensors.items()) >= 20
    variant = NanoLance(lance.config)
    variant.load_state_dict(
        {name: tensor for name, tensor in changed.items() if name != "latent_pos_embed.pos_embed"}
    )
    batch = packer.picture_batch(["two red circles"], [None], 1)
    x, t = torch.randn(1, 49, 48, generator=torch.Generator().manual_seed(0)), torch.tensor([[0.5]])
    with torch.no_grad():
        torch.testing.assert_close(
            variant.velocity(batch, x, t), lance.velocity(batch, x, t), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(("factor", "share", "message"), [(3, 0.1, "power of two"), (8, 0, "--share")])
def test_outliers_refuse_inexact_requests(factor, share, message):
    config = LanceConfig.load(MODEL / "llm_config.json")
    with pytest.raises(InputError, match=message):
        outliers.rescale({}, config, factor, share, seed=0)
    with pytest.raises(InputError, match="--fed_factor 0.3"):
        outliers.rescale({}, config, 8, 0.1, seed=0, fed_factor=0.3)


def test_a_fed_factor_below_one_makes_large_weights_behind_v_and_up():
    """The columns of o_proj and down_proj grow by its inverse, in the share of channels, and no others."""
    config, tensors = LanceConfig.load(MODEL / "llm_config.json"), load_file(MODEL / "model.safetensors")
    changed = outliers.rescale(tensors, config, 16, share=0.01, seed=0, fed_factor=0.25)
    name = "language_model.model.layers.0.mlp_moe_gen.down_proj.weight"
    grown = (changed[name] == 4 * tensors[name]).all(0)
    assert grown.sum() == round(0.01 * config.intermediate_size) and torch.equal(
        changed[name][:, ~grown], tensors[name][:, ~grown]
    )
