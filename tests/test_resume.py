import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import GOLDENS

import awq_apply
from lance_quant.errors import InputError
from lance_quant.formats.packed_folder import PackedFolder
from lance_quant.methods import convert, quant_report
from lance_quant.storage.resume import ResumeJob

ROOT = Path(__file__).parent.parent
SRC = str(GOLDENS / "checkpoint" / "Lance_3B")
STATS = str(GOLDENS / "published" / "act_stats.pt")


def command(out, *flags):
    return ["--src", SRC, "--stats", STATS, "--device", "cpu", "--out", str(out), *flags]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != quant_report.FILE}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an uninterrupted run without --resume writes."""
    out = tmp_path_factory.mktemp("work") / "whole"
    awq_apply.main(command(out))
    return contents(out)


@pytest.fixture
def stops_in(monkeypatch):
    """Make the conversion of one layer fail."""

    def arm(layer):
        read = convert._finite

        def failing(source, name, device):
            if layer is not None and f".layers.{layer}." in name:
                raise KeyboardInterrupt
            return read(source, name, device)

        monkeypatch.setattr(convert, "_finite", failing)

    return arm


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_an_interrupted_job_goes_on_and_ends_the_same(tmp_path, whole, stops_in, monkeypatch, layer):
    out = tmp_path / "out"
    stops_in(layer)
    with pytest.raises(KeyboardInterrupt):
        awq_apply.main(command(out, "--resume"))
    assert not out.exists() and len((tmp_path / "out.work" / "journal.jsonl").read_text().splitlines()) == layer \
        if layer else not out.exists()
    monkeypatch.undo()
    awq_apply.main(command(out, "--resume"))
    assert contents(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_a_killed_process_leaves_a_job_that_goes_on(tmp_path, whole):
    """SIGKILL: nothing can be tidied up."""
    out, journal = tmp_path / "out", tmp_path / "out.work" / "journal.jsonl"
    process = subprocess.Popen([sys.executable, str(ROOT / "awq_apply.py"), *command(out, "--resume")],
                               stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    while not journal.exists() and not out.exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not out.exists():  # a fast machine may have finished
        awq_apply.main(command(out, "--resume"))
    assert contents(out) == whole


def test_a_journal_line_that_was_cut_short_is_done_again(tmp_path, whole, stops_in, monkeypatch):
    stops_in(2)
    with pytest.raises(KeyboardInterrupt):
        awq_apply.main(command(tmp_path / "out", "--resume"))
    monkeypatch.undo()
    journal = tmp_path / "out.work" / "journal.jsonl"
    journal.write_text(journal.read_text()[:-20])
    awq_apply.main(command(tmp_path / "out", "--resume"))
    assert contents(tmp_path / "out") == whole


def test_other_arguments_are_refused_and_named(tmp_path, stops_in, monkeypatch):
    stops_in(1)
    with pytest.raises(KeyboardInterrupt):
        awq_apply.main(command(tmp_path / "out", "--resume"))
    monkeypatch.undo()
    for flags, name in ((["--group_size", "32"], "codec"), (["--recipe", "published"], "recipe")):
        with pytest.raises(InputError, match=f"job with another {name}"):
            awq_apply.main(command(tmp_path / "out", "--resume", *flags))


def test_a_job_with_another_journal_is_refused(tmp_path, stops_in, monkeypatch):
    """Records of an older version lack what the report counts."""
    stops_in(1)
    with pytest.raises(KeyboardInterrupt):
        awq_apply.main(command(tmp_path / "out", "--resume"))
    monkeypatch.undo()
    job = tmp_path / "out.work" / "job.json"
    job.write_text(json.dumps({**json.loads(job.read_text()), "journal": 1}))
    with pytest.raises(InputError, match="job with another journal"):
        awq_apply.main(command(tmp_path / "out", "--resume"))


def test_without_resume_nothing_is_left(tmp_path, stops_in):
    stops_in(1)
    with pytest.raises(KeyboardInterrupt):
        awq_apply.main(command(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_the_report_of_a_resumed_job_lists_all_layers(tmp_path, stops_in, monkeypatch):
    stops_in(1)
    with pytest.raises(KeyboardInterrupt):
        awq_apply.main(command(tmp_path / "out", "--resume"))
    monkeypatch.undo()
    awq_apply.main(command(tmp_path / "out", "--resume"))
    assert (tmp_path / "out" / quant_report.FILE).read_text().count("<tr>") == 8 + 1 + 42
    with PackedFolder(tmp_path / "out") as folder:
        assert len(folder.linears) == 42


def test_states_are_replaced_layer_by_layer(tmp_path):
    work = ResumeJob(tmp_path / "out", {"a": 1})
    for layer in range(3):
        work.state_file(layer + 1).write_text("state")
        work.finish_layer({"tensors": [], "entries": {}, "seconds": {}})
    assert [path.name for path in work.root.glob("state-*")] == ["state-3.safetensors"]
    assert json.loads((work.root / "job.json").read_text()) == {"a": 1}
    assert len(ResumeJob(tmp_path / "out", {"a": 1}).layers) == 3
