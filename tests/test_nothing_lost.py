"""What is finished is never lost, nothing half-made stays; outputs that cannot be made are refused at the start."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import GOLDENS

import run_baseline
import run_quant_eval
from lance_quant.errors import InputError
from lance_quant.evaluation import run_folder
from lance_quant.lance.runtime import Runtime
from lance_quant.storage import atomic, output_place
from lance_quant.storage.output_place import locked, require_free, reserved

ROOT = Path(__file__).parent.parent
MODEL = ["--model_path", str(GOLDENS / "checkpoint" / "Lance_3B"), "--device", "cpu"]
PACKED = str(GOLDENS / "published" / "int4_g64")
T2I = ["--task", "t2i", *MODEL, "--example_json", str(GOLDENS / "inputs" / "t2i.json"), "--video_height", "48",
       "--video_width", "48", "--num_timesteps", "2"]
X2T = ["--task", "x2t_image", *MODEL, "--example_json", str(GOLDENS / "inputs" / "x2t_image.json"), "--resolution",
       "image_112res", "--max_new_tokens", "3", "--limit", "3"]
TASKS = {"t2i": T2I, "x2t": X2T}
TIMES = ("seconds", "peak_memory_bytes", "peak_memory_bytes_by_stage", "arguments", "resumed", "kernels")


def contents(folder: Path) -> dict[str, object]:
    """Every file's bytes; of what says times and paths, what is neither."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == "run.json":
            run = json.loads(path.read_text())
            found[name] = {key: value for key, value in run.items() if key not in TIMES}
        elif path.is_file() and path.suffix not in (".html", ".md") and path.name != "comparison.json":
            found[name] = path.read_bytes()
    return found


def samples_of(folder: Path) -> list[object]:
    (section,) = json.loads((folder / "comparison.json").read_text())
    return [run["samples"] for run in section["runs"]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What uninterrupted runs write."""
    root = tmp_path_factory.mktemp("whole")
    for name, task in TASKS.items():
        run_baseline.main([*task, "--save_latents", "--save_path_gen", str(root / name)])
        run_quant_eval.main([*task, "--awq_dir", PACKED, "--save_path_gen", str(root / f"q_{name}")])
    return root


@pytest.fixture
def fails_at(monkeypatch):
    """Make the `count`-th call of a method of Runtime fail."""

    def arm(method, count, error):
        real, calls = getattr(Runtime, method), [0]

        def failing(*args, **kwargs):
            calls[0] += 1
            if calls[0] == count:
                raise error
            return real(*args, **kwargs)

        monkeypatch.setattr(Runtime, method, failing)

    return arm


ERRORS = [KeyboardInterrupt(), MemoryError(), OSError(errno.ENOSPC, "No space left on device"), InputError("a size"),
          RuntimeError("CUDA out of memory")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(("name", "method"), [("t2i", "sample"), ("t2i", "decode_frames"), ("x2t", "answer"),
                                              ("x2t", "forced_logprobs")])
def test_what_ends_a_run_leaves_what_is_finished_and_resume_goes_on_to_the_same(tmp_path, whole, monkeypatch, fails_at,
                                                                              caplog, name, method, error):
    command = [*TASKS[name], "--save_latents", "--save_path_gen", str(tmp_path / "out")]
    fails_at(method, 2, error)
    with pytest.raises(type(error)):
        run_baseline.main(command)
    assert not (tmp_path / "out").exists() and "1 finished samples are kept in" in caplog.text
    with pytest.raises(InputError, match="holds an unfinished run: add --resume"):
        run_baseline.main(command)
    monkeypatch.undo()
    made = []
    real = Runtime.sample if name == "t2i" else Runtime.answer
    monkeypatch.setattr(Runtime, "sample" if name == "t2i" else "answer",
                        lambda *args, **kwargs: made.append(1) or real(*args, **kwargs))
    run_baseline.main([*command, "--resume"])
    assert contents(tmp_path / "out") == contents(whole / name)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["resumed"] == 1
    assert len(made) == len(json.loads((whole / name / "run.json").read_text())["samples"]) - (
        2 if method == "decode_frames" else 1)  # its latent was finished, its pixels were not
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("name", "method", "count"), [
    ("t2i", "sample", 1), ("t2i", "sample", 3), ("t2i", "decode_frames", 4), ("x2t", "answer", 2), ("x2t", "answer", 5),
    ("x2t", "forced_logprobs", 5)])
def test_an_evaluation_goes_on_in_whatever_stage_it_was(tmp_path, whole, monkeypatch, fails_at, name, method, count):
    command = [*TASKS[name], "--awq_dir", PACKED, "--save_path_gen", str(tmp_path / "out")]
    fails_at(method, count, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run_quant_eval.main(command)
    monkeypatch.undo()
    run_quant_eval.main([*command, "--resume"])
    assert contents(tmp_path / "out") == contents(whole / f"q_{name}")
    assert samples_of(tmp_path / "out") == samples_of(whole / f"q_{name}")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_where_nothing_is_finished_nothing_stays(tmp_path, fails_at):
    fails_at("sample", 1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run_baseline.main([*T2I, "--save_path_gen", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [["--seed", "7"], ["--limit", "1"], ["--dtype", "bfloat16"], ["--save_latents"],
                                    ["--fix_quirks"]])
def test_an_unfinished_run_goes_on_as_the_same_one_only(tmp_path, fails_at, monkeypatch, change):
    command = [*T2I, "--save_path_gen", str(tmp_path / "out")]
    fails_at("sample", 2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run_baseline.main(command)
    monkeypatch.undo()
    with pytest.raises(InputError, match="belongs to a job with another"):
        run_baseline.main([*command, *change, "--resume"])
    run_baseline.main([*command, "--resume"])


def test_pictures_stay_in_place_of_memory_when_the_vae_is_on_the_disk(tmp_path, whole):
    run_baseline.main([*T2I, "--save_latents", "--offload", "vae_vit", "--save_path_gen", str(tmp_path / "out")])
    assert contents(tmp_path / "out") == contents(whole / "t2i")


KILLED = """
import os, signal, sys
import run_baseline, run_quant_eval
from lance_quant.cli import script
from lance_quant.evaluation import sample_store
from lance_quant.storage import atomic
point, seen = int(sys.argv[1]), 0
def after(module, name):
    real = getattr(module, name)
    def counting(*args, **kwargs):
        global seen
        seen += 1
        if seen == point:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        return result
    setattr(module, name, counting)
for module, name in ((os, "replace"), (sample_store, "write_tensors")):
    after(module, name)
main = run_quant_eval.main if "--awq_dir" in sys.argv else run_baseline.main
script.run(lambda: main(sys.argv[2:]))
"""


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
@pytest.mark.parametrize(("name", "point"), [("t2i", 4), ("t2i", 7), ("x2t", 3)])
@pytest.mark.slow
def test_a_killed_run_leaves_no_half_file_and_goes_on_to_the_same(tmp_path, whole, name, point):
    flags = [*TASKS[name], "--save_latents", "--save_path_gen", str(tmp_path / "out")]
    command = [sys.executable, "-c", KILLED, str(point), *flags]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    run_baseline.main([*flags, "--resume"])
    assert contents(tmp_path / "out") == contents(whole / name)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_closed_terminal_ends_a_run_as_an_interrupt_does(tmp_path, ended):
    def main(_):
        with atomic.whole_folder(tmp_path / "out") as folder:
            (folder / "x").write_text("half")
            signal.raise_signal(signal.SIGHUP)

    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and stays so
    code, said = ended(main)
    assert code == 130 and "interrupted" in said and not list(tmp_path.iterdir())


# Places of outputs

def test_what_can_take_a_place_is_free(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "new", tmp_path / "a" / "b" / "new", tmp_path / "empty", tmp_path / ("n" * 255),
                 tmp_path / ("ü" * 127), tmp_path / "a b", tmp_path / "12:30", tmp_path / "[1]*?"):
        if os.name != "nt" or ":" not in path.name:
            with atomic.whole_folder(path) as folder:
                (folder / "x").write_text("whole")
            assert (path / "x").read_text() == "whole"


def bad_places(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return [tmp_path / "file", tmp_path / "full", tmp_path / "file" / "x", tmp_path / "link", tmp_path / "dangling",
            Path("."), tmp_path / "here", Path("/proc/x"), Path("/proc/x/y"), Path("/proc"), Path("/dev/null"),
            Path("/"), tmp_path / ("n" * 256), tmp_path / ("ü" * 128), Path("a\0b"), Path(os.fsdecode(b"\xff\xfe")),
            tmp_path / "loop" / "x", Path("/dev/shm") if os.path.ismount("/dev/shm") else tmp_path / "file"]


@pytest.mark.skipif(os.name == "nt", reason="places of POSIX systems")
def test_what_cannot_take_its_place_is_refused_before_the_work(tmp_path, monkeypatch):
    for path in bad_places(tmp_path, monkeypatch):
        with pytest.raises(InputError) as error:
            require_free(path)
        assert "\n" not in str(error.value) and len(str(error.value)) < 500, path
        with pytest.raises(InputError):
            run_baseline.main([*T2I, "--save_path_gen", str(path)])
    assert (tmp_path / "full" / "x").read_text() == "mine" and not list((tmp_path / "empty").iterdir())


@pytest.mark.slow
def test_two_makers_of_one_output_get_one_clear_line(tmp_path):
    out = tmp_path / "out"
    said = []

    def other():
        try:
            with atomic.whole_folder(out):
                pass
        except InputError as error:
            said.append(str(error))

    with atomic.whole_folder(out) as folder:
        (folder / "x").write_text("first")
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        run = subprocess.run([sys.executable, "run_baseline.py", *T2I, "--save_path_gen", str(out)], cwd=ROOT,
                             capture_output=True, text=True, check=False)
    assert len(said) == 1 and "another run is making" in said[0]
    assert run.returncode == 2 and "another run is making" in run.stderr and "Traceback" not in run.stderr
    assert (out / "x").read_text() == "first" and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_lock_is_held_once_per_thread_and_goes_with_its_block(tmp_path):
    with reserved(tmp_path / "out"), locked(tmp_path / "out"):
        assert (tmp_path / ".out.lock").exists() or os.name == "nt"
    assert not list(tmp_path.iterdir()) and not output_place._held


def test_what_a_killed_run_left_is_named_at_the_next_start(tmp_path, caplog):
    (tmp_path / ".out.partial-123").mkdir()
    (tmp_path / ".other.partial-123").mkdir()
    with atomic.whole_folder(tmp_path / "out"):
        pass
    assert ".out.partial-123 was left by a run that was killed: remove it" in caplog.text
    assert "other" not in caplog.text


def test_a_disk_that_fills_is_one_line(tmp_path, ended, monkeypatch):
    """In the middle of a run's second picture; the first one is kept."""
    real, calls = run_folder._write_frames, [0]

    def full(*args):
        calls[0] += 1
        if calls[0] == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*args)

    monkeypatch.setattr(run_folder, "_write_frames", full)
    code, said = ended(run_baseline.main, *T2I, "--save_path_gen", str(tmp_path / "out"))
    assert code == 2 and "No space left on device" in said and (tmp_path / "out.work").is_dir()


@pytest.mark.skipif(not shutil.which("sh") or os.name == "nt", reason="ulimit is of POSIX shells")
@pytest.mark.parametrize("blocks", [0, 1, 8])
@pytest.mark.slow
def test_a_limit_of_file_sizes_is_one_line_and_never_success(tmp_path, blocks):
    """ulimit -f counts in 512 or 1024 bytes; Python ignores SIGXFSZ, so that writing fails with EFBIG."""
    out = tmp_path / "out"
    flags = " ".join([*T2I, "--save_latents", "--save_path_gen", str(out)])
    command = f"ulimit -f {blocks}; exec {sys.executable} run_baseline.py {flags}"
    run = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and "Traceback" not in run.stderr and not out.exists(), run.stderr[-500:]
    assert "File too large" in run.stderr
