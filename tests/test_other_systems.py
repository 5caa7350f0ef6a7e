"""What Windows and plain locales lack is taken away, and every stage runs all the same, to the same bytes.

In a process of its own: no os.pread, fork, uid or POSIX signals, none of resource, fcntl, pwd, grp and termios, ASCII
for files that are opened without an encoding, a console in cp1252, and an EncodingWarning in this package is an error.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GOLDENS
from made_up_requests import SMALL_PICTURE, SMALL_QUESTION

ROOT = Path(__file__).parent.parent
SHIM = """
import os, signal, sys, warnings
import diffusers, torch.distributed.checkpoint, transformers  # know their systems by sys.platform, and look once
for name in ("pread", "preadv", "pwrite", "fork", "forkpty", "getuid", "geteuid", "getgid", "killpg", "mkfifo"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("resource", "fcntl", "pwd", "grp", "termios", "syslog", "readline"):
    sys.modules[name] = None
for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGPIPE", "SIGQUIT", "SIGCHLD"):
    if hasattr(signal, name):
        delattr(signal, name)
warnings.filterwarnings("error", category=EncodingWarning, module=r"(lance_quant|lance_nano|awq_|nvfp4_|run_|merge_).*")
import importlib
from lance_quant.cli import script
module, *flags = sys.argv[1:]
script.run(lambda: importlib.import_module(module).main(flags))
"""


def stage(module, *flags):
    environment = {
        **os.environ,
        "PYTHONUTF8": "0",
        "LANG": "C",
        "LC_ALL": "C",
        "PYTHONIOENCODING": "cp1252",
        "PYTHONCOERCECLOCALE": "0",
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run(
        [sys.executable, "-X", "warn_default_encoding", "-c", SHIM, module, *map(str, flags)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr.decode("latin-1")[-1500:]
    return run


@pytest.mark.skipif(os.name == "nt", reason="is what Windows has")
@pytest.mark.slow
def test_all_stages_run_without_what_posix_has_and_give_the_same_bytes(tmp_path):
    import awq_apply

    model, stats = GOLDENS / "checkpoint" / "Lance_3B", GOLDENS / "published" / "act_stats.pt"
    named = tmp_path / "Größe 1"
    named.mkdir()
    task = [*SMALL_QUESTION, "--model_path", model, "--device", "cpu", "--max_new_tokens", "2"]
    stage("awq_calibrate_single", *task, "--out", named / "s.pt", "--capture", named / "c.safetensors")
    stage("awq_merge_stats", "--inputs", named / "s.pt", "--out", named / "all.pt")
    stage("awq_apply", "--src", model, "--stats", stats, "--out", named / "int4", "--resume", "--device", "cpu")
    stage(
        "nvfp4_apply",
        "--src",
        model,
        "--stats",
        named / "all.pt",
        "--out",
        named / "nvfp4",
        "--slim",
        "--device",
        "cpu",
    )
    stage("run_quant_eval", *task, "--awq_dir", named / "int4", named / "nvfp4", "--save_path_gen", named / "eval")
    draw = [*SMALL_PICTURE, "--model_path", model, "--device", "cpu"]
    stage("run_baseline", *draw, "--save_latents", "--save_path_gen", named / "draw")
    awq_apply.main(["--src", str(model), "--stats", str(stats), "--out", str(tmp_path / "here"), "--device", "cpu"])
    for name in ("awq_state_dict.safetensors", "awq_meta.json", "channel_scales.sft"):
        assert (tmp_path / "here" / name).read_bytes() == (named / "int4" / name).read_bytes(), name
    assert (named / "eval" / "report.html").is_file() and (named / "draw" / "000000.png").is_file()


@pytest.mark.slow
def test_a_mistake_with_characters_that_the_console_lacks_is_one_line(tmp_path):
    run = subprocess.run(
        [sys.executable, "awq_merge_stats.py", "--inputs", str(tmp_path / "日本.pt"), "--out", str(tmp_path / "x.pt")],
        cwd=ROOT,
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONUTF8": "0", "LANG": "C", "LC_ALL": "C", "PYTHONIOENCODING": "cp1252"},
    )
    assert run.returncode == 2 and run.stderr.startswith(b"error: ") and b"Traceback" not in run.stderr
