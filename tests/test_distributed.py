"""Two real processes, started by torchrun, do what one process does; they talk through gloo on the CPU.

One start serves all tests (SCENES): importing torch twice costs more than everything that is run here.
"""

import contextlib
import io
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CPU, GOLDENS, relative
from made_up_requests import draw

import awq_calibrate_single
import run_baseline
import run_quant_eval
from lance_quant import distributed
from lance_quant.calibration import capture
from lance_quant.calibration.activation_stats import ActStats
from lance_quant.distributed import ALONE, joined
from lance_quant.errors import InputError
from lance_quant.lance.config import LancePaths
from lance_quant.lance.progress import progress
from lance_quant.lance.runtime import Runtime
from lance_quant.storage.tensor_file import Checkpoint

SRC = GOLDENS / "checkpoint" / "Lance_3B"
MODEL = ["--model_path", str(SRC), "--device", "cpu"]
SMALL = ["--video_height", "48", "--video_width", "64", "--resolution", "image_112res", "--max_new_tokens", "6"]
STEPS = ["--validation_num_timesteps", "3"]
LIMIT = 400  # tokens of a capture: a sixth of what SAMPLES requests have
SAMPLES = 5


def inputs(root: Path) -> None:
    """Three samples a task, for two processes; two questions about one picture fall to different ones."""
    prompts = {f"{number}.png": text for number, text in enumerate(["a boat", "a red house by a lake", "two moons"])}
    asked = [("1", "shapes_4x3.png", "How many?"), ("2", "shapes_4x3.png", "Which?"), ("3", "house_1x1.png", "Where?")]
    questions = {key: {"interleave_array": [str(GOLDENS / "inputs" / picture), ["Answer.", question, ""]],
                       "element_dtype_array": ["image", "text"]} for key, picture, question in asked}
    (root / "samples").mkdir()
    (root / "samples/t2i.json").write_text(json.dumps(prompts), encoding="utf-8")
    (root / "samples/x2t_image.json").write_text(json.dumps(questions), encoding="utf-8")


def task(name: str, root: Path, *more: str) -> list[str]:
    return ["--task", name, *MODEL, *SMALL, "--example_json", str(root / f"samples/{name}.json"), *more]


def another_meeting() -> None:
    """Where the processes of this run meet next; torchrun's own place serves once per process."""
    if "PORTS" in os.environ:
        os.environ["MASTER_PORT"], _, os.environ["PORTS"] = os.environ["PORTS"].partition(" ")
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)


def start(script: object, flags: list[str]) -> None:
    """A script, once more in this process."""
    script.main(flags)
    another_meeting()


def calibrate(root: Path, out: Path) -> None:
    start(awq_calibrate_single, ["--task", "all", *MODEL, *SMALL, "--example_json", str(root / "samples"),
                                 "--num_timesteps", "3", "--capture", str(out / "c.safetensors"),
                                 "--out", str(out / "stats.pt")])


def baselines(root: Path, out: Path) -> None:
    for name in ("t2i", "x2t_image"):
        start(run_baseline, task(name, root, *STEPS, "--save_latents", "--save_path_gen", str(out / name)))
    start(run_baseline, task("t2i", root, *STEPS, "--limit", "1", "--save_latents", "--save_path_gen",
                             str(out / "single")))


def comparison(root: Path, out: Path) -> None:
    """With the float run of one's own, and with a given one."""
    packed = ["--awq_dir", str(GOLDENS / "published" / "int4_g64")]
    start(run_quant_eval, task("t2i", root, *STEPS, *packed, "--save_latents", "--save_path_gen", str(out / "drawn")))
    start(run_quant_eval, task("x2t_image", root, *packed, "--baseline", str(out / "x2t_image"),
                               "--save_path_gen", str(out / "answered")))


def thinned(root: Path, out: Path) -> None:
    """A capture that is far over its limit."""
    model = Runtime.load(LancePaths.find(SRC), CPU, torch.float32).model
    with joined("cpu") as team:
        with capture.CallRecorder(model, LIMIT) as recorder:
            for sample in team.share(range(SAMPLES)):
                recorder.begin(sample)
                draw(model, sample, steps=10)
        recorder.save(out / "thinned.safetensors", "t2i", "0" * 64, team)
    another_meeting()


SCENES = [calibrate, baselines, comparison, thinned]


def undrawable(*_: object) -> None:
    """A sample that turns out to be a mistake when its turn comes."""
    raise InputError("this one cannot be drawn")


def run_scenes(root: Path, out: Path) -> None:
    """What one of the two processes runs; only process 0 may write into `out`."""
    for scene in SCENES:
        scene(root, out)
    rank, ends = int(os.environ["RANK"]), {}
    missing = [*task("t2i", root), "--save_path_gen", str(out / "never")]
    missing[missing.index("--example_json") + 1] = str(root / ("samples/t2i.json", "none.json")[rank])
    drawn = [*task("t2i", root, *STEPS), "--save_latents", "--save_path_gen", str(out / "never")]
    for name, flags in (("streamed", [*task("x2t_image", root), "--stream", "--save_path_gen", str(out / "never")]),
                        ("missing", missing), ("drawn", drawn)):
        if name == "drawn" and rank == 1:
            Runtime.sample = undrawable
        try:
            run_baseline.main(flags)
        except (SystemExit, InputError) as error:
            ends[name] = repr(error)
        another_meeting()
    (root / f"ends_{rank}.json").write_text(json.dumps(ends), encoding="utf-8")


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> tuple[Path, Path, str]:
    """Folders of one process and of two, and what the two said."""
    root = tmp_path_factory.mktemp("distributed")
    inputs(root)
    for name in ("one", "two"):
        (root / name).mkdir()
    here = Path(__file__).parent
    (root / "worker.py").write_text("import sys\nfrom pathlib import Path\nimport test_distributed\n"
                                    "from lance_quant.cli import script\n"
                                    "root = Path(sys.argv[1])\n"
                                    "script.run(lambda: test_distributed.run_scenes(root, root / 'two'))\n",
                                    encoding="utf-8")
    paths = os.pathsep.join([str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(16)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        ports = " ".join(str(probe.getsockname()[1]) for probe in probes)
    started = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                              str(root / "worker.py"), str(root)], capture_output=True, text=True, check=False,
                             timeout=300, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1",
                                                "PORTS": ports})
    assert started.returncode == 0, started.stderr
    for scene in SCENES:
        scene(root, root / "one")
    return root / "one", root / "two", started.stderr


@pytest.mark.slow
def test_two_processes_leave_the_files_of_one_and_no_others(ran):
    one, two, _ = ran
    # What one process finished of the run that fails; of two, the first one had nothing finished.
    names = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "never.work" not in path.parts)
             for folder in (one, two)]
    assert names[0] == names[1]
    assert len(names[0]) > 30 and "never" not in names[1]


@pytest.mark.slow
def test_statistics_are_those_of_one_process_up_to_float_addition(ran):
    one, two = (ActStats.load(folder / "stats.pt") for folder in ran[:2])
    assert one.runs == two.runs and one.tasks == two.tasks and one.linears.keys() == two.linears.keys()
    for name, entry in one.linears.items():
        assert (entry.n_tokens, entry.n_calls) == (two.linears[name].n_tokens, two.linears[name].n_calls)
        # Summed in float64, stored in float32, whose last bit is 1.2e-7.
        assert relative(two.linears[name].sum_abs, entry.sum_abs) < 1e-6
        assert relative(two.linears[name].sum_sq, entry.sum_sq) < 1e-6
        assert torch.equal(two.linears[name].max_abs, entry.max_abs)


@pytest.mark.parametrize("name", ["c_t2i.safetensors", "c_x2t_image.safetensors", "thinned.safetensors"])
@pytest.mark.slow
def test_captures_are_those_of_one_process_also_when_they_are_thinned(ran, name):
    one, two, _ = ran
    assert (one / name).read_bytes() == (two / name).read_bytes()


@pytest.mark.slow
def test_a_thinned_capture_keeps_to_its_limit_and_has_steps_of_every_sample(ran):
    with Checkpoint(ran[1] / "thinned.safetensors") as file:
        facts = json.loads(file.read("capture").numpy().tobytes())
        tokens = sum(spec.shape[1] * len(facts["calls"][int(name.split(".")[1])]["rows"])
                     for name, spec in file.specs.items() if name.endswith((".und", ".gen")))
    assert LIMIT / 2 < tokens <= LIMIT
    assert len({call["rows"][0] for call in facts["calls"]}) == SAMPLES


@pytest.mark.slow
def test_pictures_answers_and_traces_are_those_of_one_process(ran):
    one, two, _ = ran
    files = [path.relative_to(one) for path in one.rglob("*")
             if path.suffix in (".png", ".safetensors") or path.name in ("result.json", "prompt.json")]
    assert len(files) > 15
    assert [str(path) for path in files if (one / path).read_bytes() != (two / path).read_bytes()] == []


@pytest.mark.slow
def test_run_json_differs_in_times_and_the_number_of_processes_only(ran):
    one, two = (json.loads((folder / "t2i/run.json").read_text("utf-8")) for folder in ran[:2])
    assert (one.pop("processes"), two.pop("processes")) == (1, 2)
    for run in (one, two):
        assert set(run.pop("seconds")) == {"load", "run", "decode"}
        run.pop("arguments")
    peaks = two.pop("peak_memory_bytes_by_stage")
    assert two.pop("peak_memory_bytes")["host"] == max(peak["host"] for peak in peaks.values())
    assert one == {**two, **{name: one[name] for name in ("peak_memory_bytes", "peak_memory_bytes_by_stage")}}


@pytest.mark.parametrize("name", ["drawn", "answered"])
@pytest.mark.slow
def test_comparisons_are_those_of_one_process(ran, name):
    one, two = (json.loads((folder / name / "comparison.json").read_text("utf-8"))[0]["runs"] for folder in ran[:2])
    assert [run["samples"] for run in one] == [run["samples"] for run in two]
    assert [run["summary"] for run in one] == [run["summary"] for run in two]
    assert len(one[0]["samples"]) == 3


@pytest.mark.slow
def test_a_mistake_on_one_process_ends_all_with_code_2_and_is_said_once(ran):
    _, two, said = ran
    ends = [json.loads((two.parent / f"ends_{rank}.json").read_text("utf-8")) for rank in range(2)]
    assert [end["missing"] for end in ends] == ["SystemExit(2)"] * 2
    assert [end["streamed"] for end in ends] == ["SystemExit(2)"] * 2
    assert said.count("error: process 1 of 2: sample file not found") == said.count("sample file not found") == 1
    assert said.count("--stream shows one answer after the other") == 1


@pytest.mark.slow
def test_a_process_that_fails_on_its_sample_does_not_leave_the_others_waiting(ran):
    ends = [json.loads((ran[1].parent / f"ends_{rank}.json").read_text("utf-8"))["drawn"] for rank in range(2)]
    assert "this one cannot be drawn" in ends[1]
    assert "another process of this run has ended" in ends[0]


@pytest.mark.slow
def test_notes_come_from_the_first_process_only_and_a_log_has_no_bars(ran):
    assert ran[2].count("expert  linears with data") == 1
    assert re.findall(r"compare:[^\r\n]*\|", ran[2]) == []


class Terminal(io.StringIO):
    """What tqdm takes for one."""

    def isatty(self) -> bool:
        return True


def test_a_bar_is_shown_on_a_terminal_by_the_first_process_only(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert progress(range(3), file=Terminal()).disable
    monkeypatch.setenv("RANK", "0")
    assert not progress(range(3), file=Terminal()).disable
    assert progress(range(3), file=io.StringIO()).disable
    assert progress(None, total=3, disable=True, file=Terminal()).disable


def test_without_torchrun_a_process_is_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with joined("auto") as team:
        assert team is ALONE and team.share([1, 2]) == [1, 2] and list(team.collect([1, 2], 2)) == [1, 2]


@pytest.mark.parametrize("given, message", [
    ({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT not set: start the script with torchrun, or unset"),
    ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "WORLD_SIZE is 2 and RANK is 2"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not a number"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', not a number"),
])
def test_variables_that_make_no_sense_are_named(monkeypatch, given, message):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message), joined("cpu"):
        pass


def test_a_torch_that_cannot_connect_processes_is_named(monkeypatch):
    """Some builds, ROCm's for Windows among them, have no torch.distributed."""
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", "a"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed.dist, "is_available", lambda: False)
    with pytest.raises(InputError, match="2 processes cannot work together.*without torchrun"), joined("cpu"):
        pass


def test_each_process_takes_the_gpu_of_its_local_rank(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for device in ("auto", "cuda", "cuda:0", "cpu"):
        distributed._take_gpu(device, 1)
    assert taken == [1, 1]
    with pytest.raises(InputError, match="process 2 on this machine finds 2 GPUs.*--nproc_per_node 2"):
        distributed._take_gpu("auto", 2)
