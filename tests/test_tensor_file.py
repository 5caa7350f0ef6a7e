import json
import os
import random
import struct
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from lance_quant.errors import InputError
from lance_quant.storage.tensor_file import (
    DTYPES,
    Checkpoint,
    TensorFile,
    TensorFileWriter,
    TensorSpec,
    file_size,
    require_finite,
)

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).reshape(2, 3), "a.weight": torch.ones(5, dtype=torch.bfloat16),
    "z": torch.arange(7, dtype=torch.uint8), "i": torch.tensor([1, -2], dtype=torch.int64),
    "f8": torch.ones(3).to(torch.float8_e4m3fn), "flag": torch.tensor([True, False]),
    "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "half": torch.ones(2, dtype=torch.float16),
    "ü": torch.ones(1),
}
SPECS = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in TENSORS.items()}


def write(path, tensors=TENSORS):
    with TensorFileWriter(path, {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}) as writer:
        for name in reversed(list(tensors)):  # any order
            writer.write(name, tensors[name])


def test_the_writer_makes_the_bytes_of_save_file(tmp_path):
    write(tmp_path / "ours")
    save_file(TENSORS, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert file_size(SPECS) == (tmp_path / "ours").stat().st_size


def test_what_was_written_is_read_back(tmp_path):
    write(tmp_path / "file")
    with TensorFile(tmp_path / "file") as file:
        assert file.specs == SPECS
        for name, tensor in TENSORS.items():
            for back in (file.read(name), file.stored(name)):
                assert back.shape == tensor.shape and back.dtype == tensor.dtype
                assert torch.equal(back.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
        assert file.read("b", torch.bfloat16).dtype == torch.bfloat16
        assert file.read("i", torch.bfloat16).dtype == torch.int64


def test_pieces_are_the_tensor_and_a_writer_takes_them_in_another_dtype(tmp_path, monkeypatch):
    monkeypatch.setattr("lance_quant.storage.tensor_file._PIECE", 64)
    big = torch.randn(10, 7, generator=torch.Generator().manual_seed(0))
    write(tmp_path / "file", {"big": big})
    with TensorFile(tmp_path / "file") as file:
        assert len(list(file.pieces("big"))) == 5  # 280 bytes
        assert torch.equal(torch.cat(list(file.pieces("big"))), big.flatten())
        assert torch.equal(file.read("big"), big)
        with TensorFileWriter(tmp_path / "out", {"big": TensorSpec(torch.bfloat16, (10, 7))}) as writer:
            writer.write_pieces("big", file.pieces("big"))
    assert torch.equal(load_file(tmp_path / "out")["big"], big.bfloat16())


@pytest.fixture(params=["preadv", "seek"])
def system(request, monkeypatch):
    """With positional reads, and as on Windows, which has none."""
    if request.param == "seek":
        monkeypatch.delattr(os, "preadv", raising=False)
        monkeypatch.delattr(os, "pread", raising=False)
    elif not hasattr(os, "preadv"):
        pytest.skip("this system has no preadv")


def test_every_dtype_is_laid_out_written_and_read_as_by_safetensors(tmp_path, system):
    raw = torch.arange(48, dtype=torch.uint8)
    tensors = {f"{code}.{side}": (raw % 2 if code == "BOOL" else raw.clone()).view(dtype)
               for side in "ab" for code, dtype in DTYPES.items()}
    write(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    with TensorFile(tmp_path / "theirs") as file:
        for name, tensor in tensors.items():
            assert file.read(name).dtype == tensor.dtype
            assert torch.equal(file.read(name).view(torch.uint8), tensor.view(torch.uint8))


def test_a_dtype_without_whole_bytes_is_named(tmp_path):
    header = {"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}
    with pytest.raises(InputError, match="a: dtype 'F4' is none of U64, I64"):
        TensorFile(header_file(tmp_path / "x.safetensors", header))


def test_threads_that_read_one_file_get_their_own_bytes(tmp_path, system, monkeypatch):
    """Every tensor is one number, over several pieces; a cursor that two threads moved would mix them."""
    monkeypatch.setattr("lance_quant.storage.tensor_file._PIECE", 64)
    tensors = {str(index): torch.full((1000,), float(index)) for index in range(8)}
    write(tmp_path / "file", tensors)
    wrong = []

    def read_all(file, seed):
        for name in random.Random(seed).sample(sorted(tensors), len(tensors)):
            wrong.extend([name] * (not torch.equal(file.read(name), tensors[name])))

    with TensorFile(tmp_path / "file") as file:
        threads = [threading.Thread(target=read_all, args=(file, seed)) for seed in range(4)]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert wrong == []


def test_a_file_that_shrinks_while_it_is_open_is_an_error_and_not_garbage(tmp_path, system):
    write(tmp_path / "file")
    with TensorFile(tmp_path / "file") as file:
        os.truncate(tmp_path / "file", file_size(SPECS) - 1)
        with pytest.raises(InputError, match="became shorter"):
            [file.read(name) for name in SPECS]


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
    write(tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(content[:keep])
    with pytest.raises(InputError, match="truncated"):
        TensorFile(tmp_path / "file")


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "file").write_bytes((8).to_bytes(8, "little") + b"not json" + bytes(100))
    with pytest.raises(InputError, match="not safetensors"):
        TensorFile(tmp_path / "file")
    with open(tmp_path / "sparse", "wb") as file:  # its first bytes read as a length of 1 GB, which fits into it
        file.write((1 << 30).to_bytes(8, "little"))
        file.truncate(1 << 31)
    with pytest.raises(InputError, match="not a safetensors file.*header length 1073741824"):
        TensorFile(tmp_path / "sparse")


def test_a_missing_tensor_or_a_wrong_shape_is_our_bug_and_asserted(tmp_path):
    with pytest.raises(AssertionError, match="never written"), TensorFileWriter(tmp_path / "a", SPECS):
        pass
    with pytest.raises(AssertionError), TensorFileWriter(tmp_path / "b", SPECS) as writer:
        writer.write("b", torch.zeros(3, 2))


def sharded(folder):
    parts = {"one.safetensors": ["b", "z"], "two.safetensors": ["a.weight"]}
    for name, keys in parts.items():
        save_file({key: TENSORS[key] for key in keys}, folder / name)
    weight_map = {key: name for name, keys in parts.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_shards_read_like_one_file_and_have_its_fingerprint(tmp_path):
    names = sharded(tmp_path)
    save_file({key: TENSORS[key] for key in names}, tmp_path / "whole")
    with Checkpoint(tmp_path) as shards, Checkpoint(tmp_path / "whole") as whole:
        assert dict(shards.specs) == dict(whole.specs)
        assert all(torch.equal(shards.read(key), TENSORS[key]) for key in names)
        assert shards.fingerprint(names) == whole.fingerprint(names)


def test_the_fingerprint_sees_both_ends_of_every_tensor(tmp_path):
    base = torch.zeros(10_000)
    prints = set()
    for where in (None, 0, -1):
        changed = base.clone()
        if where is not None:
            changed[where] = 1
        save_file({"t": changed}, tmp_path / f"{where}")
        with Checkpoint(tmp_path / f"{where}") as checkpoint:
            prints.add(checkpoint.fingerprint(["t"]))
    assert len(prints) == 3


def test_index_and_shards_must_agree(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    names = sharded(tmp_path)
    index.write_text(json.dumps({"weight_map": {**names, "ghost": "one.safetensors"}}))
    with pytest.raises(InputError, match="ghost"):
        Checkpoint(tmp_path)
    index.write_text("{}")
    with pytest.raises(InputError, match="weight_map"):
        Checkpoint(tmp_path)


def test_a_folder_without_a_checkpoint_says_what_was_expected(tmp_path):
    with pytest.raises(InputError, match="model.safetensors"):
        Checkpoint(tmp_path)
    with pytest.raises(InputError, match="not found"):
        Checkpoint(tmp_path / "absent")


def header_file(path, header: dict, data: int = 64):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    return path


@pytest.mark.parametrize("entries, message", [
    ({"a": [[4], 0, 16], "b": [[4], 8, 24]}, "b starts at byte"),  # overlap
    ({"a": [[4], 0, 16], "b": [[4], 24, 40]}, "b starts at byte"),  # hole
    ({"a": [[4], 0, 12]}, "does not fit data_offsets"),
    ({"a": [[-1, -4], 0, 16]}, "does not fit data_offsets"),
    ({"a": [[4], -16, 0]}, "does not fit data_offsets"),
])
def test_a_header_that_contradicts_itself_is_refused(tmp_path, entries, message):
    header = {name: {"dtype": "F32", "shape": shape, "data_offsets": [first, last]}
              for name, (shape, first, last) in entries.items()}
    with pytest.raises(InputError, match=message):
        TensorFile(header_file(tmp_path / "x.safetensors", header))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_nan_and_inf_are_found_and_a_sum_that_overflows_is_neither(dtype):
    largest = torch.full((100,), torch.finfo(dtype).max, dtype=dtype)
    require_finite(largest, "large")
    require_finite(torch.cat([largest, -largest]), "both")
    for bad in (float("nan"), float("inf"), -float("inf")):
        for rest in (largest, torch.zeros_like(largest)):
            with pytest.raises(InputError, match="some.weight holds NaN or Inf"):
                require_finite(torch.cat([rest, torch.tensor([bad], dtype=dtype)]), "some.weight")
    require_finite(torch.zeros(0, dtype=dtype), "empty"), require_finite(torch.ones(3, dtype=torch.int32), "integers")


def test_a_tensor_is_read_into_memory_that_is_there(tmp_path):
    write(tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as source:
        memory = torch.full((2, 3), 9.0)
        assert source.stored("b", memory) is memory and torch.equal(memory, TENSORS["b"])
        assert torch.equal(source.stored("b"), TENSORS["b"])
