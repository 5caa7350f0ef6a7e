"""Files of other programs' formats (torch.save, tokenizer), and checkpoints that are not whole: one line for each."""

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CPU, GOLDENS
from made_up_requests import SMALL_PICTURE, SMALL_QUESTION
from safetensors.torch import load_file, save_file

import awq_apply
import awq_calibrate_single
import run_baseline
from lance_quant.calibration.activation_stats import ActStats
from lance_quant.errors import InputError
from lance_quant.formats import layout
from lance_quant.lance.config import LanceConfig, LancePaths
from lance_quant.lance.loader import load_lance
from lance_quant.lance.media.samples import Prompt, content_hash
from lance_quant.lance.tokens import LanceTokenizer, generation_sequence, understanding_sequence
from lance_quant.lance.vae import load_vae
from lance_quant.storage.tensor_file import Checkpoint

SRC = GOLDENS / "checkpoint" / "Lance_3B"
STATS = torch.load(GOLDENS / "published" / "act_stats.pt")
NAME = next(iter(STATS["stats"]))
VAE = torch.load(GOLDENS / "checkpoint" / "Wan2.2_VAE.pth")
X2T = [*SMALL_QUESTION, "--device", "cpu"]
T2I = [*SMALL_PICTURE, "--device", "cpu"]


def one_line(error):
    text = str(error.value)
    assert text and "\n" not in text and len(text) < 700, text


# torch.save


class Evil:
    def __reduce__(self):
        return os.mkdir, ("/tmp/should-not-exist-lance",)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:0],
        lambda data: data[:3],
        lambda data: data[:100],
        lambda data: data[:1000],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data[:-30],
        lambda data: data[:-300],
        lambda data: b"\x80\x04K\x05.",
        lambda data: b"\x80\x02R.",
        lambda data: b"(((((.",
        lambda data: b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        lambda data: b"PK\x03\x04" + b"\0" * 100,
        lambda data: data.replace(b"PK\x01\x02", b"PK\x01\x03")[:-8],
        lambda data: b"{}",
        lambda data: bytes(range(256)) * 9,
    ],
)
@pytest.mark.parametrize("read", [ActStats.load, lambda path: load_vae(path, CPU, torch.float32)], ids=["stats", "vae"])
def test_damaged_torch_files_are_named_whatever_the_unpickler_raises(tmp_path, change, read):
    for index, old in enumerate((False, True)):
        path = tmp_path / f"{index}.pt"
        torch.save({"format": 1, "stats": {"x": torch.ones(2000)}}, path, _use_new_zipfile_serialization=not old)
        path.write_bytes(change(path.read_bytes()))
        with pytest.raises(InputError, match=rf"{index}\.pt") as error:
            read(path)
        one_line(error)


def test_a_torch_file_runs_nothing(tmp_path):
    torch.save({"format": 1, "stats": Evil()}, tmp_path / "a.pt")
    for read in (ActStats.load, lambda path: load_vae(path, CPU, torch.float32)):
        with pytest.raises(InputError, match="holds more than tensors and plain values"):
            read(tmp_path / "a.pt")
    assert not Path("/tmp/should-not-exist-lance").exists()


FLOAT = STATS["stats"][NAME]["sum_abs"]


@pytest.mark.parametrize("field", ["sum_abs", "sum_sq", "max_abs"])
@pytest.mark.parametrize(
    "value",
    [
        torch.ones(0),
        FLOAT[None],
        FLOAT.int(),
        FLOAT.bool(),
        FLOAT.to(torch.float8_e4m3fn),
        FLOAT.to("meta"),
        FLOAT.to_sparse(),
        FLOAT.to(torch.complex64),
        -FLOAT - 1,
        FLOAT * float("nan"),
        FLOAT + float("inf"),
        FLOAT.double() * 1e300,
        "x",
        3,
        [1.0],
    ],
    ids=range(15),
)
def test_sums_are_floats_in_range(tmp_path, field, value):
    changed = copy.deepcopy(STATS)
    changed["stats"][NAME][field] = value
    torch.save(changed, tmp_path / "s.pt")
    with pytest.raises(InputError) as error:
        ActStats.load(tmp_path / "s.pt")
    one_line(error)


@pytest.mark.parametrize("value", [-1, 1.5, "3", None, True, 2**63, 10**400, [], torch.tensor(3), float("inf")])
def test_tokens_are_counts(tmp_path, value):
    changed = copy.deepcopy(STATS)
    changed["stats"][NAME]["n_tokens"] = value
    torch.save(changed, tmp_path / "s.pt")
    with pytest.raises(InputError) as error:
        ActStats.load(tmp_path / "s.pt")
    one_line(error)


def test_a_largest_value_below_the_mean_is_refused(tmp_path):
    changed = copy.deepcopy(STATS)
    entry = changed["stats"][NAME]
    entry["max_abs"] = entry["sum_abs"] / entry["n_tokens"] / 2
    torch.save(changed, tmp_path / "s.pt")
    with pytest.raises(InputError, match="below the mean"):
        ActStats.load(tmp_path / "s.pt")


@pytest.mark.parametrize(
    "run",
    [
        {},
        {"run_id": 3},
        {"run_id": "a", "x": torch.ones(2)},
        {"run_id": "a", "x": b"bytes"},
        {"run_id": "a", "x": {1: 2}},
        {"run_id": "a", "x": object},
        {"run_id": "a", "model": 5},
        {"run_id": "a", "weight": 0},
        {"run_id": "a", "weight": "2"},
        {"run_id": "a", "weight": float("nan")},
        {"run_id": "a", "x": (1, 2)},
        [],
        None,
        "run",
    ],
    ids=range(14),
)
def test_runs_are_described_in_plain_values(tmp_path, run):
    torch.save({**STATS, "runs": [run]}, tmp_path / "s.pt")
    with pytest.raises(InputError) as error:
        ActStats.load(tmp_path / "s.pt")
    one_line(error)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: [],
        lambda state: {"a": 3},
        lambda state: {1: torch.ones(2)},
        lambda state: {},
        lambda state: {**state, "encoder.conv1.weight": torch.zeros(0, 12, 3, 3, 3)},
        lambda state: {**state, "encoder.conv1.weight": torch.tensor(1.0)},
        lambda state: {**state, "encoder.conv1.weight": torch.zeros(9999, 1, 1, 1, 1)},
        lambda state: {**state, "decoder.head.0.gamma": torch.zeros(0, 1, 1, 1)},
        lambda state: {**state, "conv2.weight": state["conv2.weight"].to_sparse()},
        lambda state: {**state, "conv2.weight": state["conv2.weight"].to("meta")},
        lambda state: {**state, "conv2.weight": state["conv2.weight"].int()},
        lambda state: {**state, "conv2.weight": torch.zeros_like(state["conv2.weight"])},
        lambda state: {**state, "conv2.bias": state["conv2.bias"] * float("nan")},
        lambda state: {name: state[name] for name in list(state)[:-1]},
    ],
    ids=range(14),
)
def test_a_vae_that_is_none_is_named(tmp_path, change):
    torch.save(change(VAE), tmp_path / "v.pth")
    with pytest.raises(InputError) as error:
        load_vae(tmp_path / "v.pth", CPU, torch.float32)
    one_line(error)


# Tokenizer


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", b"[]"),
        ("vocab.json", b"{}"),
        ("vocab.json", b"{"),
        ("vocab.json", b'{"a": "b"}'),
        ("vocab.json", b'{"a": 1.5}'),
        ("vocab.json", b"\xff\xfe"),
        ("vocab.json", b'{"a": -1}'),
        ("vocab.json", b"null"),
        ("vocab.json", b'{"a": 1, "a": 2}'),
        ("merges.txt", b"\xff\xfe\x00"),
        ("merges.txt", b"a b c d\n"),
        ("merges.txt", b"notthere either\n"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'"x"'),
        ("tokenizer_config.json", b"[" * 100_000),
        ("tokenizer_config.json", b"{}"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": 5}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": 1}}'),
    ],
)
def test_a_tokenizer_that_is_none_is_named(tmp_path, name, content):
    for file in LanceTokenizer.FILES:
        shutil.copy(SRC / file, tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        LanceTokenizer(tmp_path)
    one_line(error)


@pytest.mark.parametrize("token", ["<|video_pad|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"])
@pytest.mark.parametrize("text", ["{}", "a {} b", "{}{}", " {}", "\n{}"])
def test_tokens_of_pictures_in_a_text_are_refused(token, text):
    tokenizer, text = LanceTokenizer(SRC), text.replace("{}", token)
    with pytest.raises(InputError, match="marks the place of a picture"):
        understanding_sequence(tokenizer, "", text, (1, 2, 2))
    with pytest.raises(InputError, match="marks the place of a picture"):
        understanding_sequence(tokenizer, text, "What?", (1, 2, 2))
    with pytest.raises(InputError, match="marks the place of a picture"):
        generation_sequence(tokenizer, "", text, (1, 2, 2))


# Checkpoints that are not whole


def with_tensors(folder, change):
    """The goldens' model folder with another checkpoint, ViT and VAE beside it."""
    shutil.copytree(GOLDENS / "checkpoint", folder)
    tensors = load_file(SRC / "model.safetensors")
    save_file(change(tensors), folder / "Lance_3B" / "model.safetensors")
    return folder / "Lance_3B"


@pytest.mark.parametrize(
    "name",
    [
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "language_model.model.layers.1.mlp_moe_gen.down_proj.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.lm_head.weight",
        "vae2llm.weight",
    ],
)
def test_a_matrix_of_zeros_is_a_download_that_broke_off(tmp_path, name):
    model = with_tensors(tmp_path / "a", lambda tensors: {**tensors, name: torch.zeros_like(tensors[name])})
    with (
        Checkpoint(model) as source,
        pytest.raises(InputError, match=f"{name} is all zeros: the file was not downloaded"),
    ):
        load_lance(source, LanceConfig.load(model / "llm_config.json"), CPU, torch.float32)
    if layout.LAYERS in name:
        with pytest.raises(InputError, match=f"{name} is all zeros"):
            awq_apply.main(
                [
                    "--src",
                    str(model),
                    "--stats",
                    str(GOLDENS / "published" / "act_stats.pt"),
                    "--out",
                    str(tmp_path / "out"),
                    "--device",
                    "cpu",
                ]
            )
        assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def understands(tmp_path_factory):
    return with_tensors(
        tmp_path_factory.mktemp("und") / "a",
        lambda tensors: {
            name: tensor for name, tensor in tensors.items() if not name.startswith(layout.LATENT_INTERFACE)
        },
    )


def test_a_fine_tune_for_understanding_alone_answers_and_is_packed(understands, tmp_path):
    whole = ["--model_path", str(SRC), *X2T, "--max_new_tokens", "4"]
    alone = ["--model_path", str(understands), *X2T, "--max_new_tokens", "4"]
    for name, flags in (("whole", whole), ("alone", alone)):
        run_baseline.main([*flags, "--save_path_gen", str(tmp_path / name)])
    answers = [json.loads((tmp_path / name / "result.json").read_text())[0]["answer"] for name in ("whole", "alone")]
    assert answers[0] == answers[1]
    stats, capture = str(tmp_path / "s.pt"), str(tmp_path / "c.safetensors")
    awq_calibrate_single.main([*alone, "--out", stats, "--capture", capture])
    pack = ["--src", str(understands), "--stats", stats, "--device", "cpu", "--capture", capture]
    awq_apply.main([*pack, "--out", str(tmp_path / "int4")])
    assert (tmp_path / "int4" / "awq_state_dict.safetensors").is_file()
    with pytest.raises(InputError, match="is given twice"):
        awq_apply.main([*pack, capture, "--out", str(tmp_path / "twice")])


def test_a_task_that_needs_what_is_missing_says_so(understands, tmp_path):
    with pytest.raises(InputError, match="for understanding alone .*take a task that answers"):
        run_baseline.main(["--model_path", str(understands), *T2I, "--save_path_gen", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_half_of_the_latent_interface_is_no_fine_tune(tmp_path):
    model = with_tensors(
        tmp_path / "a",
        lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.startswith("vae2llm.")},
    )
    with Checkpoint(model) as source, pytest.raises(InputError, match=r"2 tensors missing.*vae2llm"):
        load_lance(source, LanceConfig.load(model / "llm_config.json"), CPU, torch.float32)


@pytest.mark.parametrize("number", ["1" + "0" * 30, "2000000000", "9" * 5000, "5", "3"])
def test_layers_are_counted_before_anything_of_their_number_is_made(number):
    names = ["language_model.model.layers.0.x", f"language_model.model.layers.{number}.x"]
    if len(number) > 9:  # no layer of ours: an unknown tensor
        assert layout.num_layers(names) == 1
    else:
        with pytest.raises(InputError, match="decoder layer 1 is missing"):
            layout.num_layers(names)


def test_parts_beside_a_link_to_the_model_are_found_and_so_are_those_beside_its_target(tmp_path):
    (tmp_path / "disk").mkdir()
    shutil.copytree(SRC, tmp_path / "disk" / "Lance_3B")
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    (downloads / "Lance_3B").symlink_to("../disk/Lance_3B")
    shutil.copytree(GOLDENS / "checkpoint" / "Qwen2.5-VL-ViT", downloads / "Qwen2.5-VL-ViT")
    shutil.copy(GOLDENS / "checkpoint" / "Wan2.2_VAE.pth", tmp_path / "disk")
    found = LancePaths.find(downloads / "Lance_3B")
    assert found.vit == downloads / "Qwen2.5-VL-ViT" and found.vae == tmp_path / "disk" / "Wan2.2_VAE.pth"


def test_runs_of_other_prompts_under_the_same_keys_are_other_runs(tmp_path):
    picture = tmp_path / "a.png"
    shutil.copy(GOLDENS / "inputs" / "house_1x1.png", picture)
    one = content_hash([Prompt("000000", "a boat", picture)])
    assert one == content_hash([Prompt("000000", "a boat", picture)])
    moved = shutil.copy(picture, tmp_path / "b.png")
    assert one == content_hash([Prompt("000000", "a boat", Path(moved))])
    assert one != content_hash([Prompt("000000", "a goat", picture)])
    shutil.copy(GOLDENS / "inputs" / "shapes_4x3.png", picture)
    assert one != content_hash([Prompt("000000", "a boat", picture)])


@pytest.mark.parametrize("count", [0, -1, 4097, 10**12])
def test_threads_are_a_number_that_a_machine_has(count, tmp_path):
    with pytest.raises(InputError, match="--threads .* must be from 1 to 4096"):
        awq_apply.main(["--src", str(SRC), "--dry_run", "--threads", str(count)])
