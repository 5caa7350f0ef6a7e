import signal
from pathlib import Path

import pytest

from lance_quant.errors import InputError
from lance_quant.storage import atomic
from lance_quant.storage.output_place import require_free


def test_a_file_appears_whole(tmp_path):
    with atomic.whole_file(tmp_path / "sub" / "a") as partial:
        partial.write_text("done")
        assert not (tmp_path / "sub" / "a").exists()
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["a"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError()])
def test_after_an_error_nothing_is_left(tmp_path, error):
    with pytest.raises(type(error)), atomic.whole_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        raise error
    with pytest.raises(type(error)), atomic.whole_file(tmp_path / "file") as partial:
        partial.write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_except_an_empty_folder(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for taken in (tmp_path / "full", tmp_path / "full" / "file"):
        with pytest.raises(InputError, match="never overwritten"):
            require_free(taken)
    (tmp_path / "empty").mkdir()
    with atomic.whole_folder(tmp_path / "empty") as folder:
        (folder / "file").write_text("new")
    assert (tmp_path / "empty" / "file").read_text() == "new"


def test_a_folder_is_moved_as_windows_demands_it(tmp_path, monkeypatch):
    """There a rename onto a folder fails, even an empty one."""
    rename = atomic.os.replace

    def replace(source, target):
        assert not Path(target).is_dir()
        rename(source, target)

    monkeypatch.setattr(atomic.os, "replace", replace)
    (tmp_path / "empty").mkdir()
    with atomic.whole_folder(tmp_path / "empty") as folder:
        (folder / "file").write_text("new")
    assert (tmp_path / "empty" / "file").read_text() == "new"


def test_json_round_trip_and_its_errors(tmp_path):
    atomic.write_json(tmp_path / "a.json", {"ü": [1]})
    assert atomic.read_json(tmp_path / "a.json", "meta") == {"ü": [1]}
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        atomic.read_json(tmp_path / "b.json", "meta")
    with pytest.raises(InputError, match="meta not found"):
        atomic.read_json(tmp_path / "c.json", "meta")


def test_a_polite_kill_cleans_up_like_an_interrupt(ended, tmp_path):
    """SIGTERM in the middle of writing: exit 130, nothing left."""
    def main(_):
        with atomic.whole_folder(tmp_path / "out") as folder:
            (folder / "x").write_text("half")
            signal.raise_signal(signal.SIGTERM)

    code, said = ended(main)
    assert code == 130 and "interrupted" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count, text", [(0, "0.00 MB"), (2_580_000, "2.58 MB"), (4_307_195_656, "4.31 GB")])
def test_sizes_are_written_for_people(count, text):
    assert atomic.size_text(count) == text
