"""What makes the loops fast changes no result: merged projections, batches, one prefill, compiled steps."""

import functools
import json
import logging
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU, GOLDENS, relative
from torch import nn

import run_baseline
from lance_quant.formats.int4 import Int4
from lance_quant.formats.nvfp4 import Nvfp4
from lance_quant.formats.packed_folder import PackedFolder
from lance_quant.inference import tasks
from lance_quant.lance import compiled, understanding
from lance_quant.lance.compiled import compile_steps
from lance_quant.lance.config import LancePaths
from lance_quant.lance.generation import Sampling
from lance_quant.lance.merge import merge_projections, stacked
from lance_quant.lance.runtime import Runtime
from lance_quant.methods import convert
from lance_quant.methods.conversion import Conversion
from quantized_linear import swap_linears

CLOSE = 1e-5  # see test_lance_mot.py
SIZE = (96, 128)
SIX = Sampling(num_timesteps=6)


@pytest.fixture(scope="module")
def merged(paths):
    return Runtime.load(paths, CPU, torch.float32, merged=True)


def ask(pipeline, questions, sample):
    return pipeline.prompt_of(questions[sample], "image_256res")


@pytest.mark.parametrize("sample", [1, 2])
def test_merged_projections_answer_as_officially(merged, x2t, questions, sample):
    assert merged.answer(*ask(merged, questions, sample)).ids == x2t["f32"].meta["generated_ids"][sample]


def test_merged_projections_draw_as_officially(merged, t2i, prompts):
    latent = merged.sample(merged.denoiser(prompts[0].text, *SIZE, SIX))
    assert relative(latent, t2i["f32"].tensors["s0.latent.0.0"]) < CLOSE


def test_merging_takes_every_group_and_no_memory(merged, pipeline):
    def size(one):
        return sum(parameter.numel() for parameter in one.model.parameters())

    names = {name.rpartition(".")[2] for name, module in merged.model.named_modules() if isinstance(module, nn.Linear)}
    assert not names & {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"} and "gate_up_proj" in names
    assert size(merged) == size(pipeline)
    # a merged model has no groups left: AttributeError says which linear it lacks
    with pytest.raises(AttributeError, match="q_proj"):
        merge_projections(merged.model)


FORMATS = {"int4": Int4(32), "nvfp4": Nvfp4(), "slim": Nvfp4(slim=True)}


@pytest.mark.parametrize("mode", ["ondemand", "cached"])
@pytest.mark.parametrize("name", FORMATS)
def test_packed_weights_merge_without_being_unpacked(paths, prompts, tmp_path, name, mode):
    convert.convert(GOLDENS / "checkpoint/Lance_3B", GOLDENS / "published/act_stats.pt", tmp_path / name,
                    Conversion(FORMATS[name]))

    def loaded(**how):
        folder = PackedFolder(tmp_path / name)
        return Runtime.load(paths, CPU, torch.float32, folder.checkpoint.path,
                             lambda model: swap_linears(model, folder, torch.float32, CPU, mode), **how)

    apart, together = loaded(), loaded(merged=True)
    assert not any(isinstance(module, nn.Linear) and "qkv" in key for key, module in together.model.named_modules())
    two = Sampling(num_timesteps=2)
    latents = [one.sample(one.denoiser(prompts[0].text, *SIZE, two)) for one in (apart, together)]
    assert relative(*latents) < CLOSE


def test_linears_of_different_kinds_stay_apart():
    """A bias on one of two, and a module that is no linear."""
    assert stacked([nn.Linear(4, 2), nn.Linear(4, 2, bias=False)]) is None
    assert stacked([nn.Linear(4, 2), nn.Identity()]) is None


def test_stacked_linears_keep_their_order():
    parts = [nn.Linear(4, width) for width in (3, 1, 2)]
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(stacked(parts)(x), torch.cat([part(x) for part in parts], -1))


def calls_of(pipeline, run):
    """The number of rows of every decoder call that `run` makes."""
    rows = []
    hook = pipeline.model.language_model.model.register_forward_pre_hook(lambda _, args: rows.append(len(args[2])))
    result = run()
    hook.remove()
    return rows, result


def test_a_prompt_is_read_once_for_all_steps_and_seeds(pipeline, prompts):
    rows, denoiser = calls_of(pipeline, lambda: pipeline.denoiser(prompts[0].text, *SIZE, SIX))
    assert rows == [2, 1, 2]  # both rows read the template, the conditional one the prompt
    for seed in (1, 2):
        rows, _ = calls_of(pipeline, lambda seed=seed: pipeline.sample(denoiser, seed))
        assert len(rows) == 6


@pytest.mark.parametrize("task", ["i2v", "image_edit", "video_edit"])
def test_guidance_is_one_call_a_step(pipeline, recorded, task):
    """t2i: see the test above; all 6 recorded timesteps are guided."""
    sample, resolution = recorded(task).sample, "image_256res" if task == "image_edit" else "video_192p"
    kind = "video" if task == "video_edit" else "image"
    frames = pipeline.frames(sample.visual, kind)
    if task == "i2v":
        denoiser = pipeline.animator(sample.text, frames[0], resolution, 5, SIX)
    else:
        denoiser = pipeline.editor(sample.text, frames, resolution, sample.named, SIX)
    rows, _ = calls_of(pipeline, lambda: denoiser.velocity(denoiser.noise(1), 1.0))
    assert rows == [2]


@pytest.mark.parametrize("every", [8, 300])
def test_looking_for_the_end_seldom_changes_no_answer(pipeline, x2t, questions, monkeypatch, every):
    """Sample 1 ends after 64 tokens, sample 2 after 106."""
    monkeypatch.setattr(understanding, "_tokens_per_look", lambda device: every)
    for sample in (1, 2):
        seen = []
        answer = pipeline.answer(*ask(pipeline, questions, sample), on_token=seen.append)
        assert answer.ids == seen == x2t["f32"].meta["generated_ids"][sample]


def test_a_limit_below_the_distance_of_two_looks_is_kept(pipeline, x2t, questions, monkeypatch):
    monkeypatch.setattr(understanding, "_tokens_per_look", lambda device: 8)
    answer = pipeline.answer(*ask(pipeline, questions, 0), max_new_tokens=11)
    assert answer.ids == x2t["f32"].meta["generated_ids"][0][:11]


def test_calibration_sees_no_token_behind_an_end(pipeline, questions, monkeypatch):
    """Sample 1 ends after 64 tokens: on a GPU a run decodes up to 7 more before it looks."""
    monkeypatch.setattr(understanding, "_tokens_per_look", lambda device: 300)
    settings = SimpleNamespace(spec=SimpleNamespace(makes="text"), resolution="image_256res", max_new_tokens=256,
                               token_sampling=understanding.GREEDY, seed=42)
    rows, _ = calls_of(pipeline, lambda: tasks.run_watched(pipeline, questions[1:2], settings, [0], lambda _: None))
    assert len(rows) == 64 + 3  # system text, picture, question


@pytest.fixture
def traced(monkeypatch):
    """torch.compile up to the graphs, which then run as they are: no C++ compiler, seconds instead of minutes."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    whole = torch.compile
    monkeypatch.setattr(compiled.torch, "compile", lambda function: whole(function, backend=backend, fullgraph=True))
    return graphs


def test_a_compiled_answer_is_the_official_one_and_compiles_once(paths, x2t, questions, traced, caplog):
    """One graph before the attention and one after it, for all layers, tokens and questions."""
    pipeline = Runtime.load(paths, CPU, torch.float32, merged=True)
    with caplog.at_level(logging.INFO, "lance_quant"):
        assert compile_steps(pipeline.model)
        traced.clear()  # the probe's
        for sample in (1, 2):
            answer = pipeline.answer(*ask(pipeline, questions, sample))
            assert answer.ids == x2t["f32"].meta["generated_ids"][sample]
    assert len(traced) == 2
    assert "compiling the decoding step" in caplog.text and list(pipeline.model.steps.seconds) == [
        "decoding step, 512 tokens"]


def test_compiled_denoising_is_the_official_one_and_compiles_once_per_shape(paths, t2i, prompts, traced):
    pipeline = Runtime.load(paths, CPU, torch.float32)
    assert compile_steps(pipeline.model)
    traced.clear()
    for sample in (0, 1):  # prompts of different lengths
        latent = pipeline.sample(pipeline.denoiser(prompts[sample].text, *SIZE, SIX))
        assert relative(latent, t2i["f32"].tensors[f"s{sample}.latent.0.0"]) < CLOSE
    assert len(traced) == 2 and list(pipeline.model.steps.seconds) == ["denoising step, 2 x 48 latents"]


@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_packed_steps_are_compiled_once_too(paths, prompts, traced, tmp_path, kernel):
    """Neither the choice of a kernel nor the count of its calls is in the graphs."""
    convert.convert(GOLDENS / "checkpoint/Lance_3B", GOLDENS / "published/act_stats.pt", tmp_path / "packed",
                    Conversion(Int4(32)))
    latents, two = [], Sampling(num_timesteps=2)
    for compile_too in (False, True):
        with PackedFolder(tmp_path / "packed") as folder:
            prepare = functools.partial(swap_linears, folder=folder, dtype=torch.float32, device=CPU, kernel=kernel)
            pipeline = Runtime.load(paths, CPU, torch.float32, folder.checkpoint.path, prepare, merged=True)
        assert not compile_too or compile_steps(pipeline.model)
        traced.clear()
        latents.append(pipeline.sample(pipeline.denoiser(prompts[0].text, *SIZE, two)))
    assert relative(*latents) < CLOSE and len(traced) == 2


def test_a_run_says_what_it_compiled_and_how_long_that_took(traced, tmp_path):
    flags = ["--task", "x2t_image", "--model_path", str(GOLDENS / "checkpoint/Lance_3B"), "--example_json",
             str(GOLDENS / "inputs/x2t_image.json"), "--resolution", "image_256res", "--limit", "1",
             "--max_new_tokens", "4", "--device", "cpu"]
    run_baseline.main([*flags, "--compile", "--save_path_gen", str(tmp_path / "compiled")])
    run_baseline.main([*flags, "--save_path_gen", str(tmp_path / "eager")])
    runs = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("compiled", "eager")]
    assert runs[0]["compile_seconds"].keys() == {"decoding step, 512 tokens"}
    assert 0 < runs[0]["compile_seconds"]["decoding step, 512 tokens"] <= runs[0]["seconds"]["run"]
    assert runs[1]["compile_seconds"] is None
    answers = [(tmp_path / name / "prompt.json").read_text() for name in ("compiled", "eager")]
    assert answers[0] == answers[1]


def test_without_a_compiler_the_run_goes_on_and_says_so(paths, questions, x2t, monkeypatch, caplog):
    def fail(_):
        raise RuntimeError("no g++\nsecond line")

    monkeypatch.setattr(compiled.torch, "compile", fail)
    pipeline = Runtime.load(paths, CPU, torch.float32)
    assert not compile_steps(pipeline.model)
    assert "nothing can be compiled here, the run goes on without (RuntimeError: no g++)" in caplog.text
    assert pipeline.answer(*ask(pipeline, questions, 1)).ids == x2t["f32"].meta["generated_ids"][1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_recorded_graph_answers_as_officially(x2t, questions):
    """Twice: the second question runs on the graph of the first."""
    paths = LancePaths.find(GOLDENS / "checkpoint/Lance_3B")
    pipeline = Runtime.load(paths, torch.device("cuda"), torch.float32, merged=True)
    assert compile_steps(pipeline.model)
    for sample in (1, 2):
        assert pipeline.answer(*ask(pipeline, questions, sample)).ids == x2t["f32"].meta["generated_ids"][sample]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", FORMATS)
def test_packed_layers_answer_in_a_recorded_graph_as_without(questions, tmp_path, name):
    convert.convert(GOLDENS / "checkpoint/Lance_3B", GOLDENS / "published/act_stats.pt", tmp_path / name,
                    Conversion(FORMATS[name]))
    answers, device = [], torch.device("cuda")
    for compile_too in (False, True):
        with PackedFolder(tmp_path / name) as folder:
            prepare = functools.partial(swap_linears, folder=folder, dtype=torch.float32, device=device)
            pipeline = Runtime.load(LancePaths.find(GOLDENS / "checkpoint/Lance_3B"), device, torch.float32,
                                     folder.checkpoint.path, prepare, merged=True)
        assert not compile_too or compile_steps(pipeline.model)
        answers.append([pipeline.answer(*ask(pipeline, questions, sample)).ids for sample in (1, 2)])
    assert answers[0] == answers[1]
