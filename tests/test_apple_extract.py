"""The extracted folder is Lance: transformers and mlx-lm, unmodified, give our runtime's logits."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CPU, GOLDENS
from real_keys import shapes, write_headers_only
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from apple import extract_und
from apple.decoder import load_decoder
from lance_quant.errors import InputError
from lance_quant.lance.cache import allocate
from lance_quant.lance.config import LanceConfig
from lance_quant.lance.loader import load_lance
from lance_quant.lance.tokens import LanceTokenizer, mrope_positions
from lance_quant.storage.tensor_file import Checkpoint

GOLDEN = GOLDENS / "checkpoint" / "Lance_3B"
NANO = Path(__file__).parents[1] / "lance_nano" / "checkpoint" / "Lance_nano"
CLOSE = 1e-4  # float32 sums in another order: 5e-6 on the golden checkpoint, 4e-5 on lance-nano, whose logits reach 20
needs_mlx = pytest.mark.skipif(importlib.util.find_spec("mlx_lm") is None,
                               reason="mlx-lm is not installed (requirements-apple.txt)")
SOURCES = [pytest.param(GOLDEN, id="golden"),
           pytest.param(NANO, id="nano", marks=pytest.mark.skipif(not NANO.exists(), reason="no trained lance-nano"))]


def lance_logits(folder, ids):
    """Logits [t, vocabulary] of token ids [t] by our own runtime, which test_lance_* prove to be Lance."""
    config = LanceConfig.load(folder / "llm_config.json")
    model = load_lance(Checkpoint(folder), config, CPU, torch.float32)
    with torch.no_grad():
        rows = allocate(config, [len(ids)], torch.float32, CPU)
        hidden = model.read(model.embed(ids), mrope_positions(len(ids), ()), rows, True)
        return model.language_model.lm_head(hidden[0])


def some_ids(folder, count=60):
    return torch.randint(len(LanceTokenizer(folder)), (count,), generator=torch.Generator().manual_seed(1))


def transformers_logits(folder, ids):
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return model(ids[None]).logits[0]


def worst(a, b):
    return (a - b).abs().max().item()


@pytest.fixture(scope="module", params=SOURCES)
def extracted(request, tmp_path_factory):
    """(Lance folder, extracted folder, ids, our logits)"""
    out = tmp_path_factory.mktemp("und") / "und"
    extract_und.main(["--src", str(request.param), "--out", str(out), "--dtype", "float32"])
    ids = some_ids(request.param)
    return request.param, out, ids, lance_logits(request.param, ids)


@pytest.fixture
def changed(extracted, tmp_path):
    """A copy of the extracted folder with other tensors and settings."""
    def change(tensors=lambda tensors: tensors, **settings):
        folder = tmp_path / "changed"
        shutil.copytree(extracted[1], folder)
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
        save_file(tensors(load_file(folder / "model.safetensors")), folder / "model.safetensors")
        return folder

    return change


def test_transformers_gives_our_logits(extracted):
    _, out, ids, ours = extracted
    assert worst(transformers_logits(out, ids), ours) < CLOSE


def test_the_plain_decoder_gives_our_logits(extracted):
    _, out, ids, ours = extracted
    with torch.no_grad():
        assert worst(load_decoder(out, torch.float32)(ids[None])[0], ours) < CLOSE


@needs_mlx
def test_mlx_lm_gives_our_logits(extracted):
    import mlx.core as mx
    import mlx_lm

    _, out, ids, ours = extracted
    model, tokenizer = mlx_lm.load(str(out))
    theirs = torch.tensor(model(mx.array([ids.tolist()]))[0].tolist())
    assert worst(theirs, ours) < CLOSE
    assert tokenizer.encode("two circles") == LanceTokenizer(extracted[0]).encode("two circles")


def test_transformers_generates_and_stops_as_lance_does(extracted):
    source, out, ids, _ = extracted
    settings = json.loads((out / "generation_config.json").read_text())
    tokenizer = LanceTokenizer(source)
    assert settings["eos_token_id"] == tokenizer.im_end
    assert settings["suppress_tokens"] == list(range(len(tokenizer), LanceConfig.load(
        source / "llm_config.json").vocab_size))
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    generated = model.generate(ids[None, :8], max_new_tokens=5)[0, 8:].tolist()
    expected, known = [], ids[:8].tolist()
    while len(expected) < 5 and tokenizer.im_end not in expected:
        logits = lance_logits(source, torch.tensor(known + expected))[-1, :len(tokenizer)]
        expected.append(int(logits.argmax()))
    assert generated == expected


def test_the_tokenizer_is_lances(extracted):
    text = "<|im_start|>user\nHow many red circles? ünïcode 42<|im_end|>"
    assert AutoTokenizer.from_pretrained(extracted[1]).encode(text) == LanceTokenizer(extracted[0]).encode(text)


def test_every_tensor_of_the_source_is_accounted_for(extracted):
    source, out, _, _ = extracted
    facts = json.loads((out / "extraction.json").read_text())
    assert facts["kept"] + sum(facts["left_out"].values()) == len(Checkpoint(source).specs)
    assert facts["kept"] == len(load_file(out / "model.safetensors"))
    assert (out / "model.safetensors").stat().st_size == facts["bytes"]
    assert facts["exact"] is True


def test_values_are_the_sources_bits(extracted):
    source = Checkpoint(extracted[0])
    for name, tensor in load_file(extracted[1] / "model.safetensors").items():
        assert torch.equal(tensor, source.read(f"language_model.{name}", torch.float32))


def test_half_the_rotary_width_would_be_another_model(extracted, changed):
    """transformers' default for this architecture, which the folder must therefore override."""
    assert worst(transformers_logits(changed(partial_rotary_factor=0.5), extracted[2]), extracted[3]) > 0.1


def test_without_head_norms_it_would_be_another_model(extracted, changed):
    def without(tensors):
        return {name: tensor for name, tensor in tensors.items() if not extract_und.is_head_norm(name)}

    folder = changed(without, use_qk_norm=False)
    assert worst(transformers_logits(folder, extracted[2]), extracted[3]) > 0.1


def test_with_a_tied_head_it_would_be_another_model(extracted, changed):
    def tied(tensors):
        return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}

    assert worst(transformers_logits(changed(tied), extracted[2]), extracted[3]) > 0.1


def altered_source(folder, change):
    """A copy of the golden Lance folder with other tensors."""
    shutil.copytree(GOLDEN, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_the_head_is_tied_only_where_it_is_equal_bit_for_bit(tmp_path):
    def tie(tensors):
        tensors["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"].clone()

    def almost(tensors):
        tie(tensors)
        tensors["language_model.lm_head.weight"].view(torch.uint8)[-1, -1] ^= 1

    for name, change, expected in (("tied", tie, True), ("almost", almost, False)):
        source = altered_source(tmp_path / name, change)
        extract_und.main(["--src", str(source), "--out", str(tmp_path / f"{name}-und"), "--dtype", "float32"])
        config = json.loads((tmp_path / f"{name}-und" / "config.json").read_text())
        assert config["tie_word_embeddings"] is expected
        ids = some_ids(source)
        assert worst(transformers_logits(tmp_path / f"{name}-und", ids), lance_logits(source, ids)) < CLOSE


@pytest.mark.parametrize(("change", "named"), [
    (lambda tensors: tensors.pop("language_model.model.layers.1.self_attn.q_norm.weight"), "q_norm"),
    (lambda tensors: tensors.update({"language_model.model.extra.weight": torch.zeros(3)}), "extra"),
    (lambda tensors: tensors.update({"language_model.model.norm.weight": torch.zeros(3)}), "model.norm"),
    (lambda tensors: tensors["language_model.lm_head.weight"].view(-1)[7:8].fill_(float("nan")), "lm_head.*NaN"),
], ids=["missing", "unexpected", "wrong shape", "not finite"])
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, change, named):
    source = altered_source(tmp_path / "source", change)
    with pytest.raises(InputError, match=named):
        extract_und.main(["--src", str(source), "--out", str(tmp_path / "und")])
    assert not (tmp_path / "und").exists()


def test_qwen2_is_the_published_form_and_says_what_it_costs(tmp_path, caplog):
    out = tmp_path / "qwen2"
    extract_und.main(["--src", str(GOLDEN), "--out", str(out), "--arch", "qwen2", "--dtype", "float32"])
    assert "lossy" in caplog.text
    facts, config = (json.loads((out / name).read_text()) for name in ("extraction.json", "config.json"))
    assert (config["model_type"], config["tie_word_embeddings"], facts["exact"]) == ("qwen2", True, False)
    ids = torch.tensor(LanceTokenizer(GOLDEN).encode(extract_und.PROBE))
    error = worst(transformers_logits(out, ids), lance_logits(GOLDEN, ids))
    assert error > 0.1
    assert facts["lossy"]["max_logit_error"] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("model", ["Lance_3B", "Lance_3B_Video"])
@pytest.mark.parametrize(("arch", "tensors", "size"), [("glm4_moe", 507, 6_794_283_560), ("qwen2", 434, 6_171_927_080)])
def test_sizes_of_the_real_models(tmp_path, capsys, model, arch, tensors, size):
    source = tmp_path / "source"
    source.mkdir()
    write_headers_only(source, model).rename(source / "model.safetensors")
    real_config(source)
    extract_und.main(["--src", str(source), "--arch", arch, "--dry_run"])
    assert capsys.readouterr().out == f"{tensors} tensors\noutput_bytes: {size}\n"
    kept = sum(name.startswith("language_model.") and "_moe_gen" not in name for name in shapes(model))
    assert kept == 507


def real_config(folder):
    """llm_config.json of the official download, as far as it is read."""
    (folder / "llm_config.json").write_text(json.dumps({
        "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
        "intermediate_size": 11008, "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "tie_word_embeddings": True}))


@pytest.mark.slow
def test_the_script_runs_by_its_path(tmp_path):
    script = Path(extract_und.__file__)
    done = subprocess.run([sys.executable, str(script), "--src", str(GOLDEN), "--dry_run"], capture_output=True,
                          text=True, cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": str(script.parents[1])})
    assert "output_bytes" in done.stdout
