"""The official source: where it is looked for, what is refused, and, where it can be run, that both backends agree.

The comparison needs a checkout (LANCE_SRC_PATH) and a Python that its requirements are installed for
(LANCE_OFFICIAL_PYTHON, docs/official_source.md).
"""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from conftest import GOLDENS, relative
from safetensors.torch import load_file, save_file

import run_baseline
from lance_quant.errors import InputError
from lance_quant.evaluation.run_folder import Results
from lance_quant.official import __main__ as command
from lance_quant.official import checkout as official_checkout
from lance_quant.official import child, process, request

MODEL = ["--model_path", str(GOLDENS / "checkpoint" / "Lance_3B"), "--device", "cpu"]
SIZES = ["--video_height", "96", "--video_width", "128", "--num_frames", "5", "--validation_num_timesteps", "3"]
CLOSE = 1e-5  # float32 through some hundred sums in another order; see test_lance_mot.py
SOURCE = os.environ.get(official_checkout.ENV_SOURCE)  # read before the fixture below hides it


def how(task: str, *more: str) -> list[str]:
    resolution = "image_256res" if task in ("t2i", "x2t_image", "image_edit") else "video_192p"
    return ["--task", task, *MODEL, "--example_json", str(GOLDENS / "inputs" / f"{task}.json"), "--resolution",
            resolution, *more]


def checkout(folder: Path, main: str = "") -> Path:
    """A folder that looks like the official source, with this inference_lance.py."""
    (folder / "modeling" / "lance").mkdir(parents=True)
    (folder / "inference_lance.py").write_text(textwrap.dedent(main))
    (folder / "modeling" / "lance" / "lance.py").write_text("")
    return folder


@pytest.fixture
def places(tmp_path, monkeypatch) -> Path:
    """A repository, its parent and a working directory with no checkout anywhere, and none in the environment."""
    (tmp_path / "projects" / "lance-quant").mkdir(parents=True)
    (tmp_path / "work").mkdir()
    monkeypatch.setattr(official_checkout, "_HOME", tmp_path / "projects" / "lance-quant")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv(official_checkout.ENV_SOURCE, raising=False)
    monkeypatch.delenv(request.ENV_PYTHON, raising=False)
    return tmp_path


# Detection

def test_the_order_is_argument_environment_repository_host_working_directory(places, monkeypatch):
    working = checkout(places / "work" / "Lance-main")
    assert official_checkout.find() == ("working directory", working, "")
    host = checkout(places / "nodes" / "LANCE")
    more = [("custom nodes", places / "nodes")]
    assert official_checkout.find(None, more) == ("custom nodes", host, "")
    beside = checkout(places / "projects" / "lance")
    assert official_checkout.find(None, more) == ("beside this repository", beside, "")
    inside = checkout(places / "projects" / "lance-quant" / "Lance")
    assert official_checkout.find(None, more) == ("inside this repository", inside, "")
    named = checkout(places / "anywhere")
    monkeypatch.setenv(official_checkout.ENV_SOURCE, str(named))
    assert official_checkout.find(None, more) == ("LANCE_SRC_PATH", named, "")
    assert official_checkout.find(working, more) == ("--official_src", working, "")


def test_the_working_directory_itself_may_be_the_checkout(places, monkeypatch):
    monkeypatch.chdir(checkout(places / "cloned"))
    assert official_checkout.find().path == places / "cloned"


@pytest.mark.parametrize("marker", official_checkout.MARKERS)
def test_a_folder_without_either_file_is_no_checkout(places, marker):
    folder = checkout(places / "work" / "Lance")
    (folder / marker).unlink()
    with pytest.raises(InputError, match=f"work/Lance \\(working directory: no {marker}\\)"):
        official_checkout.find()


def test_not_finding_it_lists_every_place_and_why(places):
    with pytest.raises(InputError) as raised:
        official_checkout.find(None, [("custom nodes", places / "nodes")])
    message = str(raised.value)
    assert "--official_src or LANCE_SRC_PATH" in message and official_checkout.REPOSITORY in message
    wanted = [f"{places}/projects/lance-quant/Lance (inside this repository: does not exist)",
              f"{places}/projects/Lance (beside this repository: does not exist)",
              f"{places}/nodes/Lance (custom nodes: does not exist)",
              f"{places}/work (working directory: no inference_lance.py and no modeling/lance/lance.py)"]
    assert [message.count(place) for place in wanted] == [1, 1, 1, 1]


@pytest.mark.parametrize("given", ["argument", "environment"])
def test_a_wrong_path_that_was_given_is_an_error_although_another_would_do(places, monkeypatch, given):
    checkout(places / "work" / "Lance")
    if given == "environment":
        monkeypatch.setenv(official_checkout.ENV_SOURCE, str(places / "nowhere"))
    with pytest.raises(InputError, match="nowhere is no checkout of .*: does not exist"):
        official_checkout.find(places / "nowhere" if given == "argument" else None)


def test_one_folder_too_high_is_told_the_right_one(places):
    right = checkout(places / "downloads" / "Lance")
    with pytest.raises(InputError, match=f"did you mean {right}\\?"):
        official_checkout.find(places / "downloads")


def test_a_file_is_no_checkout(places):
    (places / "Lance").write_text("")
    with pytest.raises(InputError, match="is a file"):
        official_checkout.find(places / "Lance")


def test_detection_imports_neither_torch_nor_the_source(places):
    checkout(places / "work" / "Lance", "raise SystemExit('imported')")
    program = ("import sys; from lance_quant.official import checkout; print(checkout.find().path);"
               "print([name for name in ('torch', 'transformers', 'inference_lance') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(places / "work" / "Lance"), "[]"]


def test_find_prints_the_places_in_front_of_the_found_one(places, capsys):
    found = checkout(places / "work" / "Lance")
    command.main(["find"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[-1] == f"{found} (working directory)" and "does not exist" in lines[0]


# Refusals, and the child

def baseline(*more: str, task: str = "t2i", out: Path) -> None:
    run_baseline.main([*how(task, *more), "--backend", "official", "--save_path_gen", str(out)])


@pytest.mark.parametrize(("flags", "message"), [
    (["--fix_quirks"], "knows nothing like --fix_quirks"),
    (["--solver", "ab2", "--vae_tiling"], "knows nothing like --solver, --vae_tiling"),
    (["--seed", "0"], "--seed 0: the official code takes that as no seed"),
    (["--device", "mps"], "--device mps: the official code runs on CUDA"),
    (["--vit_path", str(GOLDENS)], "config.json not found: the official code loads ViT and VAE for every task"),
])
def test_what_the_official_code_cannot_do_is_refused_before_it_is_looked_for(places, flags, message):
    with pytest.raises(InputError, match=message):
        baseline(*flags, out=places / "out")
    assert not (places / "out").exists()


def test_the_bridges_flags_go_with_the_official_backend(places):
    with pytest.raises(InputError, match="go with --backend official"):
        run_baseline.main([*how("t2i"), "--official_src", str(places), "--save_path_gen", str(places / "out")])


@pytest.mark.parametrize(("main", "message"), [
    ("import a_package_that_nobody_has", "cannot be imported by {python}: ModuleNotFoundError: No module named "
                                         "'a_package_that_nobody_has'.*--official_python or LANCE_OFFICIAL_PYTHON"),
    ("raise RuntimeError('out of luck')", "run by {python}, failed with exit status 1: RuntimeError: out of luck"),
])
@pytest.mark.slow
def test_a_child_that_fails_is_explained_and_leaves_nothing(places, main, message):
    source = checkout(places / "Lance", main)
    with pytest.raises(InputError, match=message.format(python=sys.executable)):
        baseline("--official_src", str(source), "--official_python", sys.executable, out=places / "out")
    assert not (places / "out").exists() and not list(source.rglob("__pycache__"))


# A stand-in of the official code, as far as the bridge touches it: every sample draws from all global generators,
# before and while it is run, and the third one may fail. Pictures are noise; answers are numbers.
STAND_IN = """
import json, os, random, sys, types
import numpy, torch
from PIL import Image

def init_from_model_path_if_needed(model, args):
    return types.SimpleNamespace(missing_keys=[], unexpected_keys=[])

def drawn():
    return [torch.randint(256, (64,)).tolist(), random.random(), numpy.random.rand()]

def validate_on_fixed_batch(vae_model, val_data_cpu, training_args, model_args, inference_args, save_path_gen):
    if val_data_cpu.index == 2 and os.path.exists(os.path.join(os.path.dirname(__file__), "fails")):
        raise RuntimeError("out of luck")
    seen = val_data_cpu.seen, drawn()
    if isinstance(val_data_cpu.sample, dict):
        name = os.path.basename(val_data_cpu.sample["interleave_array"][0])
        inference_args.prompt_data_dict[name] = str(seen)
    else:
        image = Image.frombytes("L", (8, 8), bytes(seen[1][0]))
        image.putpixel((0, 0), int(1000 * (seen[0][1] + seen[1][2])) % 256)
        image.save(os.path.join(save_path_gen, f"{val_data_cpu.index:06d}.png"))
        inference_args.prompt_data_dict[f"{val_data_cpu.index:06d}.png"] = val_data_cpu.sample

def main():
    flags = dict(zip(sys.argv[1:], sys.argv[2:]))
    torch.manual_seed(2025), random.seed(2025), numpy.random.seed(2025)
    init_from_model_path_if_needed(None, None)
    out = types.SimpleNamespace(prompt_data_dict={})
    with open(flags["--val_dataset_config_file"]) as file:
        samples = json.load(file)
    os.makedirs(flags["--save_path_gen"], exist_ok=True)
    for index, sample in enumerate(samples.values()):
        batch = types.SimpleNamespace(index=index, sample=sample, seen=drawn(), mse_loss_indexes=[])
        training = types.SimpleNamespace(cfg_interval=(0, 1), cfg_renorm_type="none")
        validate_on_fixed_batch(vae_model=None, val_data_cpu=batch, training_args=training,
                                model_args=types.SimpleNamespace(cfg_text_scale=4), inference_args=out,
                                save_path_gen=flags["--save_path_gen"])
    with open(os.path.join(flags["--save_path_gen"], "prompt.json"), "w") as file:
        json.dump(out.prompt_data_dict, file)
"""


@pytest.fixture
def stand_in(places) -> Path:
    source = checkout(places / "Lance", STAND_IN)
    for name, text in {"modeling/lance/qwen2_navit.py": "", "modeling/vae/wan/vae2_2.py": "_video_vae = None",
                       "config/config_factory.py": "def get_model_path_config(known={'vae': {}}): return known",
                       "torchvision-0.dist-info/METADATA": "Name: torchvision\nVersion: 0"}.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    (source / "inference_lance.py").write_text("import modeling.lance.qwen2_navit" + STAND_IN)
    return source


def results_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.json"}


@pytest.mark.slow
@pytest.mark.parametrize("task", ["t2i", "x2t_image"])
def test_samples_of_the_official_code_are_kept_and_a_resumed_run_equals_an_uninterrupted_one(places, stand_in, task):
    """Its generators are global: sample 4 is what it would have been only if they stand where they stood."""
    asked = {f"{number}.png": f"prompt {number}" for number in range(4)}
    if task == "x2t_image":
        (entry,) = list(json.loads((GOLDENS / "inputs" / "x2t_image.json").read_text()).values())[:1]
        shutil.copytree(GOLDENS / "inputs", places / "inputs")
        asked = {str(number): entry for number in range(4)}
    (places / "asked.json").write_text(json.dumps(asked))
    flags = ["--task", task, *MODEL, *SIZES, "--example_json", str(places / "asked.json"), "--resolution",
             "image_256res", "--backend", "official", "--official_src", str(stand_in)]

    def draw(name: str, *more: str) -> dict[str, bytes]:
        run_baseline.main([*flags, *more, "--save_path_gen", str(places / name)])
        return results_of(places / name)

    whole = draw("whole")
    (stand_in / "fails").write_text("")
    with pytest.raises(InputError, match="out of luck"):
        draw("out")
    assert not (places / "out").exists()
    assert len(list((places / "out.work").glob("samples/run/*.done.json"))) == 2
    with pytest.raises(InputError, match="holds an unfinished run: add --resume"):
        draw("out")
    with pytest.raises(InputError, match="belongs to a job with another dtype"):
        draw("out", "--resume", "--dtype", "bfloat16")
    (stand_in / "fails").unlink()
    assert draw("out", "--resume") == whole
    assert json.loads((places / "out/run.json").read_text())["resumed"] == 2
    assert "resumed" not in json.loads((places / "whole/run.json").read_text())
    assert len(whole) == (5 if task == "t2i" else 2)
    assert not (places / "out.work").exists()


@pytest.mark.skipif(os.name == "nt", reason="needs a signal that kills")
@pytest.mark.slow
def test_the_official_code_ends_with_the_process_that_started_it(places):
    """Killed, that cannot end it; what it went on writing would come between the samples of the next run."""
    started = places / "started"
    source = checkout(places / "Lance", f"""
        import os, time
        open({str(started)!r}, "w").write(str(os.getpid()))
        time.sleep(60)
    """)
    flags = [*how("t2i"), "--backend", "official", "--official_src", str(source), "--save_path_gen",
             str(places / "out")]
    with subprocess.Popen([sys.executable, run_baseline.__file__, *flags], cwd=places, stderr=subprocess.DEVNULL,
                          env={**os.environ, "PYTHONPATH": str(Path(run_baseline.__file__).parent)}) as parent:
        while not started.is_file() or not started.read_text():
            assert parent.poll() is None
            time.sleep(0.05)
        parent.kill()
    for _ in range(200):
        try:
            os.kill(int(started.read_text()), 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("it runs on")


def test_an_interpreter_that_is_none_is_named(places, monkeypatch):
    monkeypatch.setenv(request.ENV_PYTHON, str(places / "python"))
    with pytest.raises(InputError, match="python is no program"):
        baseline("--official_src", str(checkout(places / "Lance")), out=places / "out")


@pytest.mark.parametrize(("device", "visible", "seen"), [
    ("cpu", "0,1", ""), ("auto", "0,1", "0,1"), ("cuda:1", "2,5", "5"), ("cuda:1", None, "1"), ("cuda", None, None)])
def test_the_child_sees_the_gpu_that_was_asked_for_and_no_process_group(monkeypatch, device, visible, seen):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    environment = process._environment(device, Path("request.json"))
    assert environment.get("CUDA_VISIBLE_DEVICES") == seen and "RANK" not in environment


@pytest.mark.parametrize("causal", [False, True])
def test_packed_attention_is_the_written_out_one(causal):
    """Two sequences with a cache in front: 3 queries on 5 keys, 4 on 4; two query heads to a key head."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(*shape, generator=draw) for shape in ((7, 4, 8), (9, 2, 8), (9, 2, 8)))
    got = child.attention(q, k, v, torch.tensor([0, 3, 7]), torch.tensor([0, 5, 9]), 4, 5, causal=causal)
    for row in range(7):
        (q0, k0), keys, queries = ((0, 0), 5, 3) if row < 3 else ((3, 5), 4, 4)
        last = keys - queries + (row - q0) if causal else keys - 1
        for head in range(4):
            ours = k[k0:k0 + last + 1, head // 2]
            weights = (ours @ q[row, head] / 8**0.5).softmax(0)
            # float32, 8 products and at most 5 weights of order 1
            torch.testing.assert_close(got[row, head], weights @ v[k0:k0 + last + 1, head // 2], rtol=1e-5, atol=1e-6)


def test_the_view_of_torch_changes_names_for_the_official_modules_only():
    view = child.torch_view("cpu", torch.float32)
    assert view.bfloat16 is torch.float32 and torch.bfloat16 is not torch.float32
    assert view.device("cuda", 0) == torch.device("cpu") and view.device("meta").type == "meta"
    assert 0 % view.cuda.device_count() == torch.device("cpu")  # how main() finds its device
    assert view.nn is torch.nn and view.cuda.is_available()
    with view.amp.autocast("cuda", enabled=True, dtype=view.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    with child.torch_view("cpu", torch.bfloat16).autocast(device_type="cuda", dtype=torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


# The real thing

needs_source = pytest.mark.skipif(not SOURCE, reason=f"needs {official_checkout.ENV_SOURCE}, a checkout of "
                                                     f"{official_checkout.REPOSITORY}")


def compared(task: str, capsys) -> dict:
    """What `compare` prints as JSON."""
    command.main(["compare", *how(task, *SIZES, "--limit", "1", "--dtype", "float32", "--max_new_tokens", "12")])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@needs_source
@pytest.mark.parametrize("task", ["t2i", "t2v", "i2v", "image_edit", "video_edit"])
def test_both_backends_draw_the_same(task, capsys):
    (found,) = compared(task, capsys)["samples"].values()
    assert found["noise"] == 0  # CPU generators, same seed
    assert max(found[name] for name in ("latent", "velocity_first", "velocity_worst")) < CLOSE
    assert found["pixels_max"] <= 1  # rounding of nearly equal values
    assert ("vit" in found, "condition_mean" in found) == (task.endswith("edit"), task not in ("t2i", "t2v"))
    assert max(found.get("vit", 0), found.get("condition_mean", 0)) < CLOSE


@needs_source
@pytest.mark.parametrize("task", ["x2t_image", "x2t_video"])
def test_both_backends_answer_the_same(task, capsys):
    (found,) = compared(task, capsys)["samples"].values()
    assert found["tokens_equal"] and found["tokens"] == 12
    assert found["vit"] < CLOSE and found["logprobs"] < 1e-4  # absolute, of logits of order 10


@needs_source
def test_an_official_run_is_a_baseline_like_a_native_one(tmp_path):
    how_long = [*SIZES, "--save_latents", "--dtype", "float32"]
    baseline(*how_long, out=tmp_path / "official")
    run_baseline.main([*how("t2i", *how_long), "--save_path_gen", str(tmp_path / "native")])
    theirs, ours = (Results(tmp_path / name) for name in ("official", "native"))
    assert {path.name for path in theirs.folder.iterdir()} == {path.name for path in ours.folder.iterdir()}
    assert theirs.run["backend"] == "official" and theirs.run["source"]["path"] == str(Path(SOURCE).resolve())
    same = ("format", "settings", "samples", "model", "dtype")
    assert {name: theirs.run[name] for name in same} == {name: ours.run[name] for name in same}
    a, b = (load_file(one.folder / "latents.safetensors") for one in (theirs, ours))
    assert a.keys() == b.keys()
    assert max(relative(b[name], a[name]) for name in a) < CLOSE


@needs_source
def test_two_questions_about_one_picture_keep_their_answers(tmp_path):
    (entry,) = list(json.loads((GOLDENS / "inputs" / "x2t_image.json").read_text()).values())[:1]
    picture, (system, question, reference) = entry["interleave_array"]
    other = {**entry, "interleave_array": [picture, [system, "What else?", reference]]}
    (tmp_path / "two.json").write_text(json.dumps({"a": entry, "b": other}))
    shutil.copytree(GOLDENS / "inputs", tmp_path / "inputs")
    flags = ["--task", "x2t_image", *MODEL, "--example_json", str(tmp_path / "two.json"), "--resolution",
             "image_256res", "--max_new_tokens", "5", "--dtype", "float32"]
    run_baseline.main([*flags, "--backend", "official", "--save_path_gen", str(tmp_path / "official")])
    run_baseline.main([*flags, "--save_path_gen", str(tmp_path / "native")])
    theirs, ours = (Results(tmp_path / name).answers() for name in ("official", "native"))
    assert theirs == ours and theirs["a"] != theirs["b"]


@needs_source
def test_an_interrupted_run_of_edits_goes_on_to_the_same_results(tmp_path):
    """Condition latents of an edit come from the global generator."""
    (entry,) = json.loads((GOLDENS / "inputs" / "image_edit.json").read_text()).values()
    (tmp_path / "three.json").write_text(json.dumps({f"000{number}": entry for number in range(3)}))
    shutil.copytree(GOLDENS / "inputs", tmp_path / "inputs")
    flags = [*how("image_edit", *SIZES), "--example_json", str(tmp_path / "three.json"), "--dtype", "float32",
             "--save_latents", "--backend", "official", "--save_path_gen"]
    run_baseline.main([*flags, str(tmp_path / "whole")])
    done = tmp_path / "out.work/samples/run/000000.done.json"
    with subprocess.Popen([sys.executable, run_baseline.__file__, *flags, str(tmp_path / "out")]) as process:
        while not done.is_file():
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    assert not (tmp_path / "out").exists() and not done.with_name("000002.done.json").exists()
    run_baseline.main([*flags, str(tmp_path / "out"), "--resume"])
    assert results_of(tmp_path / "out") == results_of(tmp_path / "whole")


@needs_source
def test_an_incomplete_checkpoint_is_refused(tmp_path):
    shutil.copytree(GOLDENS / "checkpoint", tmp_path / "checkpoint")
    weights = tmp_path / "checkpoint" / "Lance_3B" / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(weights).items() if ".layers.1.mlp.up_proj." not in name}
    save_file(kept, weights)
    with pytest.raises(InputError, match=r"lacks 1 tensors, first \['language_model.model.layers.1.mlp.up_proj.weight"):
        run_baseline.main([*how("t2i", *SIZES), "--model_path", str(weights.parent), "--backend", "official",
                           "--save_path_gen", str(tmp_path / "out")])
