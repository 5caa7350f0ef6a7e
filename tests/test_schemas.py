"""What files say is parsed by schemas: every field of every file, given values of the wrong kind, gets one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CPU, GOLDENS

from apple.decoder import DecoderConfig, extraction_record
from lance_nano import CHECKPOINT
from lance_quant.calibration import capture
from lance_quant.calibration.activation_stats import ActStats
from lance_quant.errors import InputError
from lance_quant.evaluation.run_folder import Results, read_run
from lance_quant.formats.packed_folder import PackedFolder
from lance_quant.lance.config import LanceConfig
from lance_quant.lance.media import samples
from lance_quant.lance.vit import load_vit
from lance_quant.storage.resume import ResumeJob
from lance_quant.storage.tensor_file import Checkpoint, TensorFile, write_tensors

JUNK = [None, "x", "1", "", True, -1, 0.5, 10**30, float("nan"), float("inf"), [], [None], [[]], {}, {"x": {}}]
LLM = json.loads((CHECKPOINT / "llm_config.json").read_text())
VIT = json.loads((CHECKPOINT.parent / "Qwen2.5-VL-ViT" / "config.json").read_text())
META = json.loads((GOLDENS / "published" / "int4_g64" / "awq_meta.json").read_text())
STATS = torch.load(GOLDENS / "published" / "act_stats.pt")
LINEAR = sorted(META["per_weight"])[0]
RUN = {"format": 1, "settings": {"task": "x2t_image"}, "samples": [{"key": "1", "image": "a.png"}],
       "model": {"path": "m", "bytes": 9, "bits_per_weight": 4.5},
       "dtype": "float32", "device": "cpu", "seconds": {"run": 1.0}, "peak_memory_bytes": {"host": 1, "device": None},
       "versions": {"torch": "2"}}
ANSWERS = [{"key": "1", "answer": "a boat"}]
QUESTION = {"interleave_array": ["a.png", ["", "What?", ""]], "element_dtype_array": ["image", "text"],
            "istarget_in_interleave": [0, 1]}
UND = {"model_type": "glm4_moe", **{name: LLM[name] for name in (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size",
    "rms_norm_eps", "rope_theta")}, "use_qk_norm": True, "tie_word_embeddings": False}
EXTRACTION = {"source_fingerprint": "f" * 64, "arch": "glm4_moe"}
CAPTURE = {"format": 2, "task": "t2i", "model": "f", "config": {name: LLM.get(name) for name in UND if name in LLM}
           | {"mrope_section": LLM["rope_scaling"]["mrope_section"]},
           "calls": [{"rows": [0], "lengths": [0], "causal": True, "decoded": 0}]}


def llm(folder: Path, content):
    (folder / "llm_config.json").write_text(json.dumps(content))
    return LanceConfig.load(folder / "llm_config.json")


def vit(folder: Path, content):
    (folder / "config.json").write_text(json.dumps(content))
    shutil.copy(CHECKPOINT.parent / "Qwen2.5-VL-ViT" / "vit.safetensors", folder)
    with Checkpoint(CHECKPOINT) as source:
        return load_vit(source, folder, CPU, torch.float32)


def meta(folder: Path, content):
    (folder / "awq_meta.json").write_text(json.dumps(content))
    shutil.copy(GOLDENS / "published" / "int4_g64" / "awq_state_dict.safetensors", folder)
    with PackedFolder(folder) as opened:
        return opened.linears


def run_json(folder: Path, content):
    (folder / "run.json").write_text(json.dumps(content))
    return read_run(folder)


def result_json(folder: Path, content):
    (folder / "run.json").write_text(json.dumps(RUN))
    (folder / "result.json").write_text(json.dumps(content))
    return Results(folder).answers()


def sample_file(folder: Path, content):
    shutil.copy(GOLDENS / "inputs" / "house_1x1.png", folder / "a.png")
    (folder / "s.json").write_text(json.dumps({"1": content}))
    return samples.load("x2t_image", folder / "s.json")


def stats(folder: Path, content):
    torch.save(content, folder / "s.pt")
    return ActStats.load(folder / "s.pt")


def extraction(folder: Path, content):
    (folder / "extraction.json").write_text(json.dumps(content))
    return extraction_record(folder)


def decoder(folder: Path, content):
    (folder / "config.json").write_text(json.dumps(content))
    return DecoderConfig.load(folder)


def captured_calls(folder: Path, content):
    text = torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)
    rest = {f"call.0.{key}": torch.ones(1, 2, 4) for key in ("und", "cos", "sin")}
    write_tensors(folder / "c.safetensors", {"capture": text, **rest})
    return capture.load(folder / "c.safetensors", "f")


def work_folder(folder: Path, content):
    (folder / "out.work").mkdir()
    (folder / "out.work" / "job.json").write_text(json.dumps(content))
    return ResumeJob(folder / "out", {"src": "a"}).layers


# read: file -> (how it is read, what it holds, fields below which each kind of junk is put, junk that is right there)
UNREAD = ("model_type", "tie_word_embeddings", "use_qk_norm")
FILES = {
    "llm_config": (llm, LLM, [(name,) for name in UND if name in LLM and name not in UNREAD]
                   + [("rope_scaling", "mrope_section"), ()],
                   {"rms_norm_eps": (0.5,)}),
    "vit": (vit, VIT, [(name,) for name in ("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size",
                                            "patch_size", "spatial_merge_size", "window_size", "in_channels",
                                            "hidden_act", "temporal_patch_size")] + [()], {}),
    "meta": (meta, META, [("per_weight",), *(("per_weight", LINEAR, name) for name in ("shape", "n_bit", "group_size",
                                                                                       "scheme")),
                          ("per_weight", LINEAR), ()], {}),
    "run.json": (run_json, RUN, [*((name,) for name in RUN), ("settings", "task"), ("seconds", "run"), ("samples", 0),
                                 ("model", "bytes"), ("model", "bits_per_weight"), ("peak_memory_bytes", "host"), ()],
                 {"samples": ([],), "seconds": ({},), "peak_memory_bytes": ({},), "versions": ({},),
                  "dtype": ("x", "1", ""), "device": ("x", "1", ""), "bits_per_weight": (0.5,),
                  "run": (-1, 0.5, 10**30), "host": (None,), 0: ({},),
                  "format": (True,)}),  # which is 1 to Python
    "result.json": (result_json, ANSWERS, [(), (0,), (0, "key"), (0, "answer")],
                    {None: ([],), "key": ("x", "1", ""), "answer": ("x", "1", "")}),
    "sample file": (sample_file, QUESTION, [(), *((name,) for name in QUESTION), ("interleave_array", 0),
                                            ("interleave_array", 1), ("element_dtype_array", 0),
                                            ("istarget_in_interleave", 0)], {0: (True,), 1: ("x", "1", "")}),
    "statistics": (stats, STATS, [("stats",), ("runs",), ("tasks",), ("n_linears",), ("stats", LINEAR[:-7]), ()],
                   {"runs": ([],), "tasks": ([],), "n_linears": (None,), "stats": ({},)}),
    "extraction": (extraction, EXTRACTION, [(), ("source_fingerprint",), ("arch",)],
                   {"source_fingerprint": ("x", "1", "")}),
    "decoder": (decoder, UND, [(), *((name,) for name in UND)], {"use_qk_norm": (True,), "rms_norm_eps": (0.5,),
                                                                 "rope_theta": (0.5,),
                                                                 "tie_word_embeddings": (True,)}),
    "capture": (captured_calls, CAPTURE, [(), ("format",), ("model",), ("config",), ("calls",),
                                          *(("calls", 0, name) for name in ("rows", "lengths", "causal", "decoded")),
                                          ("config", "hidden_size"), ("config", "rms_norm_eps")],
                {"causal": (True,), "lengths": ([],), "rms_norm_eps": (0.5,)}),
    "job": (work_folder, {"src": "a"}, [(), ("src",)], {}),
}
CASES = [(name, place) for name, (_, _, places, _) in FILES.items() for place in places]


def with_value(content, place, value):
    """`content` with `value` at a place below it."""
    if not place:
        return value
    copied = content.copy()
    copied[place[0]] = with_value(content[place[0]], place[1:], value) if len(place) > 1 else value
    return copied


@pytest.mark.parametrize("name", FILES)
def test_the_file_itself_is_read_and_so_is_a_newer_one(tmp_path, name):
    read, content, *_ = FILES[name]
    newer = {**content, "new_in_2030": [1]} if isinstance(content, dict) else [{**content[0], "new_in_2030": [1]}]
    for index, found in enumerate([content] if name == "job" else [content, newer]):
        (tmp_path / str(index)).mkdir()
        read(tmp_path / str(index), found)


@pytest.mark.parametrize(("name", "place"), CASES, ids=[f"{name}-{'.'.join(map(str, place))}" for name, place in CASES])
def test_a_field_of_a_wrong_kind_gets_one_line(tmp_path, name, place):
    read, content, _, right = FILES[name]
    fine = right.get(place[-1] if place else None, ())
    for index, value in enumerate(JUNK):
        if any(value is one or (type(value) is type(one) and value == one) for one in fine):
            continue
        folder = tmp_path / str(index)
        folder.mkdir()
        with pytest.raises(InputError) as error:
            read(folder, with_value(content, place, value))
            pytest.fail(f"{value!r} was taken for {'.'.join(map(str, place))}")
        text = str(error.value)
        assert text and "\n" not in text and len(text) < 600, text


def test_a_torn_journal_line_is_dropped_and_a_strange_one_named(tmp_path):
    job = {"src": "a"}
    work = ResumeJob(tmp_path / "out", job)
    work.finish_layer({"tensors": ["a"]})
    journal = tmp_path / "out.work" / "journal.jsonl"
    journal.write_text(journal.read_text() + '{"tensors": ["b')
    assert ResumeJob(tmp_path / "out", job).layers == [{"tensors": ["a"]}]
    journal.write_text("[1]\n")
    with pytest.raises(InputError, match="must be a valid dictionary; remove it"):
        ResumeJob(tmp_path / "out", job)


def test_a_vit_is_not_built_before_its_depth_was_compared_with_its_weights(tmp_path):
    with pytest.raises(InputError, match=r"depth 999, and .*vit.safetensors has \d blocks"):
        vit(tmp_path, {**VIT, "depth": 999})


def test_a_capture_holds_the_tensors_that_it_lists(tmp_path):
    captured_calls(tmp_path, CAPTURE)
    with TensorFile(tmp_path / "c.safetensors") as file:
        kept = {name: file.read(name) for name in file.specs if name != "call.0.cos"}
    write_tensors(tmp_path / "d.safetensors", kept)
    with pytest.raises(InputError, match="lacks call.0.cos"):
        capture.load(tmp_path / "d.safetensors", "f")
